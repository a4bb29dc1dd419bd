#pragma once

// The CUDA side's cross entropy over rows, for the losses that stand on it.

#include <ATen/core/Tensor.h>

#include <optional>

#include "../ops/loss.h"
#include "common.h"

namespace halfstep::cuda {

/// A call's options with its tensors as pointers, and the sums of its weights on the device.
class LossCall {
 public:
  LossCall(const char* op, const Place& place, const at::Tensor& rows, int64_t classes,
           const at::Tensor& target, const std::optional<at::Tensor>& weight, int64_t ignore_index,
           double smoothing, double z_loss);

  /// [N, V] logits whose rows are runs, from row `first` of the target on.
  LossRows rows(const at::Tensor& logits, int64_t first = 0) const;
  const double* sums() const { return sums_.const_data_ptr<double>(); }
  at::Tensor total() const;
  double z_loss() const { return numbers_.z_loss; }

 private:
  math::CrossEntropy numbers_;
  at::Tensor weights_, target_, sums_;
};

/// The losses as the caller wants them, from FP64 ones of each row.
at::Tensor reduced(const char* op, const Place& place, const at::Tensor& losses,
                   ops::Reduction reduction, const double* sums, at::ScalarType type);

}  // namespace halfstep::cuda
