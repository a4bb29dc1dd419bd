#include "../math/scale.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "check.h"
#include "dispatch.h"

// The loss scale: one state machine on the device (csrc/math/scale.h). And a scale for gradients in
// the middle of a graph, which autograd carries to where it is divided out.

namespace halfstep::ops {

namespace {

constexpr const char* kSchemas[] = {
    // scale: one float32 element; state, policy: float64 [32]. A bad step is found_inf != 0 or NaN.
    "update_scale_(Tensor(a!) scale, Tensor(b!) state, Tensor found_inf, Tensor policy) -> ()",
    // The same for policies that look at gradients: stats are tables of grad_stats over gradients
    // that carry the scale; proposal, one element, is the scale that a policy of the user asks for.
    "advance_scale_(Tensor(a!) scale, Tensor(b!) state, Tensor found_inf, Tensor policy, Tensor[] "
    "stats, Tensor? proposal) -> ()",
    // The scale after each update of a whole string of steps: float64 [T]. state is left as it is.
    // Gradients are not looked at: for Static and Dynamic.
    "simulate_scale(Tensor found_inf, Tensor policy, Tensor state) -> Tensor",
    // The state a policy starts in: float64 [32].
    "init_scale_state(Tensor policy) -> Tensor",
    // x itself; its gradient is scale_gradient_backward's. scale: one floating element beside x.
    "scale_gradient(Tensor x, Tensor scale) -> Tensor",
    // grad * scale, formed in float32 (float64 for float64) and rounded once to grad's dtype.
    "scale_gradient_backward(Tensor grad, Tensor scale) -> Tensor",
};

void update_scale_meta(const at::Tensor& scale, const at::Tensor& state,
                       const at::Tensor& found_inf, const at::Tensor& policy) {
  check_update_scale("update_scale_", scale, state, found_inf, policy, {}, std::nullopt);
}

void advance_scale_meta(const at::Tensor& scale, const at::Tensor& state,
                        const at::Tensor& found_inf, const at::Tensor& policy, at::TensorList stats,
                        const std::optional<at::Tensor>& proposal) {
  check_update_scale("advance_scale_", scale, state, found_inf, policy, stats, proposal);
}

at::Tensor simulate_scale_meta(const at::Tensor& found_inf, const at::Tensor& policy,
                               const at::Tensor& state) {
  check_simulate_scale(found_inf, policy, state);
  return at::empty_symint({found_inf.sym_size(0)}, policy.options());
}

at::Tensor init_scale_state_meta(const at::Tensor& policy) {
  check_scale_vector("init_scale_state", "policy", policy);
  return at::empty({math::kStateEntries}, policy.options());
}

void check_scale_gradient(const char* op, const char* name, const at::Tensor& x,
                          const at::Tensor& scale) {
  TORCH_CHECK(at::isFloatingType(x.scalar_type()), op, ": ", name, " is ", x.scalar_type(),
              "; expected a real floating-point dtype");
  TORCH_CHECK(scale.sym_numel() == 1 && at::isFloatingType(scale.scalar_type()), op, ": scale is ",
              scale.toString(), scale.sym_sizes(), "; expected one floating-point element");
  TORCH_CHECK(scale.device() == x.device(), op, ": scale is on ", scale.device(), " but ", name,
              " is on ", x.device());
  TORCH_CHECK(!scale.requires_grad(), op, ": scale requires grad, but it gets none");
}

at::Tensor call_backward(const at::Tensor& grad, const at::Tensor& scale) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, const at::Tensor&)>(
      "halfstep::scale_gradient_backward");
  return op.call(grad, scale);
}

/// One pass: the operands differ in dtype, so that torch computes in the wider one as it reads, and
/// a scale beyond FP16 range stays what it is.
at::Tensor scale_gradient_backward(const at::Tensor& grad, const at::Tensor& scale) {
  check_scale_gradient("scale_gradient_backward", "grad", grad, scale);
  const auto wide = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor factor = grad.dim() == 0 ? scale.reshape(at::IntArrayRef()) : scale.reshape({1});
  at::Tensor out = at::empty_like(grad);
  at::mul_out(out, grad, factor.to(wide));
  return out;
}

struct ScaleGradient : torch::autograd::Function<ScaleGradient> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& scale) {
    context->save_for_backward({scale});
    return x;  // which autograd makes a view of
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    return {call_backward(grads[0], context->get_saved_variables()[0]), at::Tensor()};
  }
};

/// Its own derivative.
struct ScaleGradientBackward : torch::autograd::Function<ScaleGradientBackward> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& grad,
                            const at::Tensor& scale) {
    context->save_for_backward({scale});
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad, scale);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    return {call_backward(grads[0], context->get_saved_variables()[0]), at::Tensor()};
  }
};

at::Tensor scale_gradient(const at::Tensor& x, const at::Tensor& scale) {
  check_scale_gradient("scale_gradient", "x", x, scale);
  return ScaleGradient::apply(x, scale);
}

at::Tensor scale_gradient_backward_autograd(const at::Tensor& grad, const at::Tensor& scale) {
  return ScaleGradientBackward::apply(grad, scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  m.impl("update_scale_", update_scale_meta);
  m.impl("advance_scale_", advance_scale_meta);
  m.impl("simulate_scale", simulate_scale_meta);
  m.impl("init_scale_state", init_scale_state_meta);
}

// One kernel for CPU, CUDA and Meta: torch's own product.
TORCH_LIBRARY_IMPL(halfstep, CompositeExplicitAutograd, m) {
  m.impl("scale_gradient_backward", scale_gradient_backward);
}
TORCH_LIBRARY_IMPL(halfstep, Autograd, m) {
  m.impl("scale_gradient_backward", scale_gradient_backward_autograd);
}
// No kernel below autograd: the forward does nothing, and no op may return its argument.
TORCH_LIBRARY_IMPL(halfstep, CompositeImplicitAutograd, m) {
  m.impl("scale_gradient", scale_gradient);
}

}  // namespace halfstep::ops
