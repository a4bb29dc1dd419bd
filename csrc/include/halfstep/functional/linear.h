#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../export.h"

namespace halfstep::functional {

/// act(x weight^T + bias), accumulated in FP32 (FP64 for FP64) and rounded once. x: [..., K],
/// weight: [N, K], of one floating dtype; bias: [N], of that dtype or FP32, or undefined.
/// activation: none, "relu", "gelu" (erf) or "gelu_tanh"; another name throws.
HALFSTEP_API at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& bias = {},
                               std::optional<std::string_view> activation = std::nullopt);

}  // namespace halfstep::functional
