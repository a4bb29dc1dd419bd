#pragma once

// The CPU's cross entropy over rows, for the losses that stand on it.

#include <ATen/core/Tensor.h>

#include <optional>

#include "../ops/loss.h"
#include "common.h"

namespace halfstep::cpu {

/// A call's options with its tensors as pointers.
struct LossProblem {
  LossProblem(const char* op, const at::Tensor& rows, int64_t classes, const at::Tensor& target,
              const std::optional<at::Tensor>& weight, int64_t ignore_index, double smoothing,
              double z_loss);
  /// Sum of the weights of the labels that count.
  double total() const;

  CrossEntropy numbers;
  at::Tensor weights, target;  // keep the memory
  const int64_t* labels = nullptr;
};

/// Rows a thread takes at least: about 32,768 logits.
inline int64_t row_grain(int64_t classes) { return std::max<int64_t>(1, 32768 / classes); }

/// Uninitialised memory of that shape. Large memory fresh from the system is asked for in huge
/// pages, where the system gives them to who asks: page faults took 16 of the 24 ms in which 50 MB
/// were written for the first time.
at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options);

/// The losses of the rows (float64), added in order where they are asked for as one number; `total`
/// divides their mean.
at::Tensor reduced(const at::Tensor& losses, ops::Reduction reduction, double total);

}  // namespace halfstep::cpu
