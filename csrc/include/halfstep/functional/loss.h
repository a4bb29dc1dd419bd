#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>

#include "../export.h"

namespace halfstep::functional {

/// torch's meanings and defaults. grad_scale: one floating-point element on the device that the
/// gradient which arrives at the loss will be (the scaler's scale); it only says how to round.
struct CrossEntropyOptions {
  std::optional<at::Tensor> weight_;  ///< [classes]
  int64_t ignore_index_ = -100;
  std::string reduction_ = "mean";
  double label_smoothing_ = 0, z_loss_ = 0;
  std::optional<at::Tensor> grad_scale_;

  CrossEntropyOptions& weight(at::Tensor x) { return weight_ = std::move(x), *this; }
  CrossEntropyOptions& ignore_index(int64_t x) { return ignore_index_ = x, *this; }
  CrossEntropyOptions& reduction(std::string x) { return reduction_ = std::move(x), *this; }
  CrossEntropyOptions& label_smoothing(double x) { return label_smoothing_ = x, *this; }
  CrossEntropyOptions& z_loss(double x) { return z_loss_ = x, *this; }
  CrossEntropyOptions& grad_scale(at::Tensor x) { return grad_scale_ = std::move(x), *this; }
};

/// Cross entropy of logits [V], [N, V] or [N, V, d1, …] and int64 class indices without the V, in
/// FP32 (FP64 for FP64 logits); z_loss * logsumexp^2 is added to each row. docs/layers.md.
HALFSTEP_API at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                                      const CrossEntropyOptions& options = {});

/// cross_entropy(x weight^T + bias, target) in chunks of rows, without the logits in memory.
/// x: [H] or […, H], weight: [V, H], bias: [V]; options.weight is that of the classes.
HALFSTEP_API at::Tensor linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                             const at::Tensor& target,
                                             const std::optional<at::Tensor>& bias = {},
                                             const CrossEntropyOptions& options = {});

}  // namespace halfstep::functional
