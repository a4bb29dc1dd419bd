// aten::linear and aten::matmul in 16 bits on CPUs without a 16-bit unit: operands are widened to
// FP32, multiplied by the stock FP32 kernel and rounded once. The stock 16-bit path is 40 to 500
// times slower than FP32 there (pytorch#146508). Every other dtype goes to the stock kernel as it
// is. The graph keeps the 16-bit tensors, not their FP32 copies. Tests:
// tests/python/test_overrides.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/linear_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/matmul_compositeimplicitautograd_dispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../ops/overrides.h"

namespace halfstep::cpu {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

bool widens(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && ops::widens_products(a.scalar_type());
}

at::Tensor wide_linear(const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias) {
  const auto wide_bias = bias && bias->defined() ? OptionalTensor(bias->to(at::kFloat)) : bias;
  return at::linear(input.to(at::kFloat), weight.to(at::kFloat), wide_bias).to(input.scalar_type());
}

at::Tensor wide_matmul(const at::Tensor& a, const at::Tensor& b) {
  return at::matmul(a.to(at::kFloat), b.to(at::kFloat)).to(a.scalar_type());
}

/// Backward through at::matmul, which is differentiable itself: second derivatives come for free.
struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const OptionalTensor& bias) {
    ctx->save_for_backward({input, weight});
    ctx->saved_data["bias"] = bias && bias->defined();
    at::AutoDispatchBelowADInplaceOrView below;
    return wide_linear(input, weight, bias);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &input = saved[0], &weight = saved[1], &grad = grads[0];
    if (!grad.defined()) return {{}, {}, {}};
    const at::Tensor rows = grad.reshape_symint({-1, weight.sym_size(0)});
    at::Tensor grad_input, grad_weight, grad_bias;
    if (ctx->needs_input_grad(0)) grad_input = at::matmul(grad, weight);
    if (ctx->needs_input_grad(1))
      grad_weight = at::matmul(rows.t(), input.reshape_symint({-1, weight.sym_size(1)}));
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)) grad_bias = rows.sum(0);
    return {grad_input, grad_weight, grad_bias};
  }
};

struct Matmul : torch::autograd::Function<Matmul> {  // both operands have two dimensions or more
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& a, const at::Tensor& b) {
    ctx->save_for_backward({a, b});
    at::AutoDispatchBelowADInplaceOrView below;
    return wide_matmul(a, b);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &a = saved[0], &b = saved[1], &grad = grads[0];
    if (!grad.defined()) return {{}, {}};
    at::Tensor grad_a, grad_b;
    if (ctx->needs_input_grad(0))
      grad_a = at::matmul(grad, b.mT()).sum_to_size_symint(a.sym_sizes());
    if (ctx->needs_input_grad(1))
      grad_b = at::matmul(a.mT(), grad).sum_to_size_symint(b.sym_sizes());
    return {grad_a, grad_b};
  }
};

at::Tensor linear_autograd(const at::Tensor& input, const at::Tensor& weight,
                           const OptionalTensor& bias) {
  if (!widens(input, weight) || weight.dim() != 2 || input.dim() == 0)
    return at::compositeimplicitautograd::linear(input, weight, bias);
  return Linear::apply(input, weight, bias);
}

at::Tensor linear_cpu(const at::Tensor& input, const at::Tensor& weight,
                      const OptionalTensor& bias) {
  if (!widens(input, weight)) return at::compositeimplicitautograd::linear(input, weight, bias);
  return wide_linear(input, weight, bias);
}

at::Tensor matmul_autograd(const at::Tensor& a, const at::Tensor& b) {
  if (!widens(a, b) || a.dim() == 0 || b.dim() == 0)
    return at::compositeimplicitautograd::matmul(a, b);
  const at::Tensor left = a.dim() == 1 ? a.unsqueeze(0) : a;
  const at::Tensor right = b.dim() == 1 ? b.unsqueeze(1) : b;
  at::Tensor product = Matmul::apply(left, right);
  if (b.dim() == 1) product = product.squeeze(-1);
  return a.dim() == 1 ? product.squeeze(b.dim() == 1 ? -1 : -2) : product;
}

at::Tensor matmul_cpu(const at::Tensor& a, const at::Tensor& b) {
  if (!widens(a, b)) return at::compositeimplicitautograd::matmul(a, b);
  return wide_matmul(a, b);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, AutogradCPU, m) {
  m.impl("linear", linear_autograd);
  m.impl("matmul", matmul_autograd);
}
TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("linear", linear_cpu);
  m.impl("matmul", matmul_cpu);
}

}  // namespace halfstep::cpu
