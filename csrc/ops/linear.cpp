#include "linear.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "check.h"
#include "dispatch.h"

// y = act(x w^T + b) as one op with one rounding (csrc/math/linear.h), its backward, and a weight
// gradient that is added to an FP32 tensor. Checks that both libraries need are in
// linear_check.cpp.

namespace halfstep::ops {

namespace {

constexpr const char* kSchemas[] = {
    // x: [..., K], weight: [N, K], of one dtype: float16, bfloat16, float32 or float64. bias: [N],
    // of that dtype or float32. activation: None, "relu", "gelu" (erf), "gelu_tanh".
    "linear(Tensor x, Tensor weight, Tensor? bias=None, str? activation=None) -> Tensor",
    // The same, and what the backward needs beside x and weight, for M = x.numel() / K rows: uint8
    // [M, bytes] for relu, the pre-activation [M, N] in y's dtype for gelu, nothing ([0]) for None.
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, str? activation) -> (Tensor y, Tensor "
    "saved)",
    // Gradients of x, weight and bias; one that is not wanted is empty ([0]). weight_dtype: x's, or
    // float32, then rounded once to it. bias_dtype: None where there is no bias.
    "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor saved, str? activation, bool[3] "
    "wanted, ScalarType weight_dtype, ScalarType? bias_dtype) -> (Tensor dx, Tensor dw, Tensor db)",
    // into += dz^T x, without a rounding between. into: float32 [N, K] (float64 for float64); dz:
    // [..., N], x: [..., K], of one dtype.
    "linear_wgrad_(Tensor(a!) into, Tensor dz, Tensor x) -> ()",
};

// ---- calls -------------------------------------------------------------------------------------
using Pair = std::tuple<at::Tensor, at::Tensor>;

at::Tensor call_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                       OptionalName activation) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                         OptionalName)>("halfstep::linear");
  return op.call(x, weight, bias, activation);
}
Pair call_forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                  OptionalName activation) {
  static const auto op =
      find_op<Pair(const at::Tensor&, const at::Tensor&, const OptionalTensor&, OptionalName)>(
          "halfstep::linear_forward");
  return op.call(x, weight, bias, activation);
}
Gradients call_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& saved, OptionalName activation,
                        std::array<bool, 3> wanted, at::ScalarType weight_dtype,
                        std::optional<at::ScalarType> bias_dtype) {
  static const auto op =
      find_op<Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        OptionalName, std::array<bool, 3>, at::ScalarType,
                        std::optional<at::ScalarType>)>("halfstep::linear_backward");
  return op.call(dy, x, weight, saved, activation, wanted, weight_dtype, bias_dtype);
}

// ---- Meta --------------------------------------------------------------------------------------
at::Tensor linear_meta(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                       OptionalName activation) {
  activation_of("linear", activation);
  check_linear("linear", x, weight, bias);
  return empty_output(x, weight);
}

Pair linear_forward_meta(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         OptionalName activation) {
  const LinearActivation kind = activation_of("linear_forward", activation);
  check_linear("linear_forward", x, weight, bias);
  return {empty_output(x, weight), empty_saved(x, weight, kind)};
}

Gradients linear_backward_meta(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& saved, OptionalName activation,
                               std::array<bool, 3> wanted, at::ScalarType weight_dtype,
                               std::optional<at::ScalarType> bias_dtype) {
  check_linear_backward(dy, x, weight, saved, activation_of("linear_backward", activation),
                        weight_dtype, bias_dtype);
  return empty_gradients(x, weight, wanted, weight_dtype, bias_dtype);
}

void linear_wgrad_meta(const at::Tensor& into, const at::Tensor& dz, const at::Tensor& x) {
  check_linear_wgrad(into, dz, x);
}

// ---- Autograd ----------------------------------------------------------------------------------
bool any_requires_grad(std::initializer_list<const at::Tensor*> tensors) {
  if (!c10::GradMode::is_enabled()) return false;
  for (const at::Tensor* tensor : tensors)
    if (tensor->defined() && tensor->requires_grad()) return true;
  return false;
}

struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& weight, const OptionalTensor& bias,
                            const std::optional<std::string>& activation) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, saved] = call_forward(x, weight, bias, activation);
    context->save_for_backward({x, weight, saved});
    context->saved_data["activation"] = activation;
    // A weight whose gradients are summed in FP32 gets an FP32 one, never rounded to 16 bits.
    const bool wide = weight.is_leaf() && weight.grad_dtype() == at::kFloat;
    context->saved_data["weight_dtype"] = int64_t(wide ? at::kFloat : weight.scalar_type());
    if (bias) context->saved_data["bias_dtype"] = int64_t(bias->scalar_type());
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto activation = context->saved_data["activation"].toOptional<std::string>();
    std::optional<at::ScalarType> bias_dtype;
    if (const auto found = context->saved_data.find("bias_dtype");
        found != context->saved_data.end())
      bias_dtype = at::ScalarType(found->second.toInt());
    // An absent bias is no input.
    const std::array<bool, 3> wanted = {context->needs_input_grad(0), context->needs_input_grad(1),
                                        bias_dtype && context->needs_input_grad(2)};
    auto [dx, dw, db] =
        call_backward(grads[0], saved[0], saved[1], saved[2], activation, wanted,
                      at::ScalarType(context->saved_data["weight_dtype"].toInt()), bias_dtype);
    const auto given = [&](int i, const at::Tensor& t) { return wanted[i] ? t : at::Tensor(); };
    return {given(0, dx), given(1, dw), given(2, db), at::Tensor()};
  }
};

at::Tensor linear_autograd(const at::Tensor& x, const at::Tensor& weight,
                           const OptionalTensor& bias, OptionalName activation) {
  if (any_requires_grad({&x, &weight, bias ? &*bias : &x})) {
    std::optional<std::string> name;
    if (activation) name = std::string(*activation);
    return Linear::apply(x, weight, bias, name);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_linear(x, weight, bias, activation);
}

/// The gradients of a plain product are products, and have derivatives of every order.
Gradients differentiable_backward(const at::Tensor& dy, const at::Tensor& x,
                                  const at::Tensor& weight, const std::array<bool, 3>& wanted,
                                  at::ScalarType weight_dtype,
                                  std::optional<at::ScalarType> bias_dtype) {
  Gradients gradients;
  auto& [dx, dw, db] = gradients;
  const auto rows = [&](const at::Tensor& t) {
    return t.reshape_symint({row_count(x), t.sym_size(-1)});
  };
  const at::Tensor none = at::empty({0}, x.options());
  dx = wanted[0] ? at::matmul(dy, weight) : none;
  dw = wanted[1] ? at::mm(rows(dy).t(), rows(x)).to(weight_dtype) : none;
  db = wanted[2] && bias_dtype ? rows(dy).sum(0, false, *bias_dtype) : none;
  return gradients;
}

Gradients linear_backward_autograd(const at::Tensor& dy, const at::Tensor& x,
                                   const at::Tensor& weight, const at::Tensor& saved,
                                   OptionalName activation, std::array<bool, 3> wanted,
                                   at::ScalarType weight_dtype,
                                   std::optional<at::ScalarType> bias_dtype) {
  const bool higher = any_requires_grad({&dy, &x, &weight, &saved});
  const LinearActivation kind = activation_of("linear_backward", activation);
  if (higher && kind == LinearActivation::kNone) {
    check_linear_backward(dy, x, weight, saved, kind, weight_dtype, bias_dtype);
    return differentiable_backward(dy, x, weight, wanted, weight_dtype, bias_dtype);
  }
  Gradients gradients;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    gradients = call_backward(dy, x, weight, saved, activation, wanted, weight_dtype, bias_dtype);
  }
  auto& [dx, dw, db] = gradients;
  differentiable_once("linear_backward", {&dy, &x, &weight, &saved}, {&dx, &dw, &db});
  return gradients;
}

// ---- Autocast ----------------------------------------------------------------------------------
template <c10::DeviceType kDevice>
at::Tensor linear_autocast(const at::Tensor& x, const at::Tensor& weight,
                           const OptionalTensor& bias, OptionalName activation) {
  const NoAutocast off;
  return call_linear(autocast_to_lower(x, kDevice), autocast_to_lower(weight, kDevice),
                     autocast_to_lower(bias, kDevice), activation);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema);
}
TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  m.impl("linear", linear_meta);
  m.impl("linear_forward", linear_forward_meta);
  m.impl("linear_backward", linear_backward_meta);
  m.impl("linear_wgrad_", linear_wgrad_meta);
}
TORCH_LIBRARY_IMPL(halfstep, Autograd, m) {
  m.impl("linear", linear_autograd);
  m.impl("linear_backward", linear_backward_autograd);
}
TORCH_LIBRARY_IMPL(halfstep, AutocastCPU, m) {
  m.impl("linear", linear_autocast<c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(halfstep, AutocastCUDA, m) {
  m.impl("linear", linear_autocast<c10::DeviceType::CUDA>);
}

}  // namespace halfstep::ops
