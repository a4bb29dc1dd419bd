#pragma once

// Checks, shapes and names that the CPU and the CUDA side of `linear` and its Meta kernels share.

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "../math/linear.h"
#include "optional.h"

namespace halfstep::ops {

using math::LinearActivation;
using OptionalName = std::optional<std::string_view>;
/// None, "relu", "gelu", "gelu_tanh"; another name raises.
LinearActivation activation_of(const char* op, OptionalName name);

void check_linear(const char* op, const at::Tensor& x, const at::Tensor& weight,
                  const OptionalTensor& bias);
void check_linear_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                           const at::Tensor& saved, LinearActivation activation,
                           at::ScalarType weight_dtype, std::optional<at::ScalarType> bias_dtype);
void check_linear_wgrad(const at::Tensor& into, const at::Tensor& dz, const at::Tensor& x);

/// x's leading dimensions as one.
c10::SymInt row_count(const at::Tensor& x);
inline at::Tensor as_rows(const at::Tensor& x) {
  return x.reshape({row_count(x).expect_int(), x.size(-1)});
}
/// Uninitialised: y, and what the backward needs of it.
at::Tensor empty_output(const at::Tensor& x, const at::Tensor& weight);
at::Tensor empty_saved(const at::Tensor& x, const at::Tensor& weight, LinearActivation activation);
/// Uninitialised, or empty where not wanted: gradients of x, weight and bias.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
Gradients empty_gradients(const at::Tensor& x, const at::Tensor& weight, std::array<bool, 3> wanted,
                          at::ScalarType weight_dtype, std::optional<at::ScalarType> bias_dtype);

}  // namespace halfstep::ops
