#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../export.h"

namespace halfstep::functional {

/// x Phi(x), Phi the normal distribution; approximate "tanh": the usual approximation of it. Any
/// shape and layout; float16, bfloat16, float32, float64; computed in FP32 (FP64 for FP64), rounded
/// once. The same holds for all of this file.
HALFSTEP_API at::Tensor gelu(const at::Tensor& x, std::string_view approximate = "none");
/// x / (1 + exp(-x))
HALFSTEP_API at::Tensor silu(const at::Tensor& x);
/// max(x, 0)^2
HALFSTEP_API at::Tensor squared_relu(const at::Tensor& x);

/// silu(gate) up. Without `up`, gate is [..., 2F] with gate and up side by side, and the result
/// [..., F]. `overflowed`: one int64 element, which grows by the number of results that left the
/// dtype's range although gate and up are finite.
HALFSTEP_API at::Tensor swiglu(const at::Tensor& gate, const std::optional<at::Tensor>& up = {},
                               const std::optional<at::Tensor>& overflowed = {});
/// gelu(gate) up; the rest as in swiglu.
HALFSTEP_API at::Tensor geglu(const at::Tensor& gate, const std::optional<at::Tensor>& up = {},
                              std::string_view approximate = "none",
                              const std::optional<at::Tensor>& overflowed = {});

/// residual + dropout(x + bias). bias: [F], F the last dimension of x. p: the probability that an
/// element is dropped; the others are divided by 1 - p. `seed`: int64 [2] on x's device, key and
/// offset of Philox4x32-10; not given, torch's generator of the device makes one. The backward
/// draws the same mask again from it, so do not write it in between.
HALFSTEP_API at::Tensor bias_dropout_add(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                                         const at::Tensor& residual, double p = 0.5,
                                         bool training = true,
                                         const std::optional<at::Tensor>& seed = {});

}  // namespace halfstep::functional
