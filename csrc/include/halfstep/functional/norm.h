#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "../export.h"

namespace halfstep::functional {

/// (x - mean) / sqrt(variance + eps) * weight + bias over the last dimensions, `normalized_shape`.
/// weight, bias: x's dtype or float32. Computed in FP32 (FP64 for FP64), rounded once to x's dtype.
HALFSTEP_API at::Tensor layer_norm(const at::Tensor& x, at::IntArrayRef normalized_shape,
                                   const std::optional<at::Tensor>& weight = {},
                                   const std::optional<at::Tensor>& bias = {}, double eps = 1e-5);
/// (y, new residual): new residual = x + residual in the residual's dtype, and y is formed of it.
HALFSTEP_API std::tuple<at::Tensor, at::Tensor> layer_norm(const at::Tensor& x,
                                                           at::IntArrayRef normalized_shape,
                                                           const std::optional<at::Tensor>& weight,
                                                           const std::optional<at::Tensor>& bias,
                                                           double eps, const at::Tensor& residual);

/// x / sqrt(mean of x^2 + eps) * (weight + weight_offset) over the last dimensions. eps: that of
/// x's dtype unless given, as in torch.
HALFSTEP_API at::Tensor rms_norm(const at::Tensor& x, at::IntArrayRef normalized_shape,
                                 const std::optional<at::Tensor>& weight = {},
                                 std::optional<double> eps = {}, double weight_offset = 0);
HALFSTEP_API std::tuple<at::Tensor, at::Tensor> rms_norm(
    const at::Tensor& x, at::IntArrayRef normalized_shape, const std::optional<at::Tensor>& weight,
    std::optional<double> eps, const at::Tensor& residual, double weight_offset = 0);

}  // namespace halfstep::functional
