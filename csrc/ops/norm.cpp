#include "norm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>

#include "dispatch.h"
#include "optional.h"

// LayerNorm and RMSNorm, with a residual stream that is added on the way in and handed on.
// Formulas: csrc/math/norm.h. There is no autocast kernel: every dtype is computed in FP32 or
// wider, x keeps its own.

namespace halfstep::ops {

namespace {

using at::Tensor;
using Shape = c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// x: float16, bfloat16, float32, float64; weight, bias: x's dtype or float32; residual: any of the
// first three (float64 with float64 only). y has x's dtype. With a residual, residual_out = x +
// residual in the residual's dtype, and y is formed of it; without, it is empty. mean and rstd:
// float32 (float64 for float64), a number a row.
// Backward: input is residual_out where there was a residual, else x; grad_residual_out has its
// dtype. Results by output_mask, empty where not asked for: the gradient in grad_y's dtype (x), the
// same in input's dtype (residual), weight, bias.
constexpr const char* kSchemas[] = {
    "layer_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
    "float eps=1e-5, Tensor? residual=None) -> (Tensor y, Tensor residual_out, Tensor mean, Tensor "
    "rstd)",
    "layer_norm_backward(Tensor grad_y, Tensor? grad_residual_out, Tensor input, SymInt[] "
    "normalized_shape, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool[4] "
    "output_mask) -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    "rms_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight=None, float eps=1e-5, float "
    "weight_offset=0., Tensor? residual=None) -> (Tensor y, Tensor residual_out, Tensor rstd)",
    "rms_norm_backward(Tensor grad_y, Tensor? grad_residual_out, Tensor input, SymInt[] "
    "normalized_shape, Tensor? weight, float weight_offset, Tensor rstd, bool[3] output_mask) -> "
    "(Tensor grad_x, Tensor grad_residual, Tensor grad_weight)",
};

using Four = NormOutputs;
using Three = std::tuple<Tensor, Tensor, Tensor>;

Four call_layer_norm(const Tensor& x, Shape shape, const OptionalTensor& weight,
                     const OptionalTensor& bias, double eps, const OptionalTensor& residual) {
  static const auto op =
      find_op<Four(const Tensor&, Shape, const OptionalTensor&, const OptionalTensor&, double,
                   const OptionalTensor&)>("halfstep::layer_norm");
  return op.call(x, shape, weight, bias, eps, residual);
}
Four call_layer_norm_backward(const Tensor& grad_y, const OptionalTensor& grad_residual_out,
                              const Tensor& input, Shape shape, const OptionalTensor& weight,
                              const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                              std::array<bool, 4> mask) {
  static const auto op =
      find_op<Four(const Tensor&, const OptionalTensor&, const Tensor&, Shape,
                   const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                   std::array<bool, 4>)>("halfstep::layer_norm_backward");
  return op.call(grad_y, grad_residual_out, input, shape, weight, bias, mean, rstd, mask);
}
Three call_rms_norm(const Tensor& x, Shape shape, const OptionalTensor& weight, double eps,
                    double weight_offset, const OptionalTensor& residual) {
  static const auto op = find_op<Three(const Tensor&, Shape, const OptionalTensor&, double, double,
                                       const OptionalTensor&)>("halfstep::rms_norm");
  return op.call(x, shape, weight, eps, weight_offset, residual);
}
Three call_rms_norm_backward(const Tensor& grad_y, const OptionalTensor& grad_residual_out,
                             const Tensor& input, Shape shape, const OptionalTensor& weight,
                             double weight_offset, const Tensor& rstd, std::array<bool, 3> mask) {
  static const auto op =
      find_op<Three(const Tensor&, const OptionalTensor&, const Tensor&, Shape,
                    const OptionalTensor&, double, const Tensor&, std::array<bool, 3>)>(
          "halfstep::rms_norm_backward");
  return op.call(grad_y, grad_residual_out, input, shape, weight, weight_offset, rstd, mask);
}

// ---- Meta --------------------------------------------------------------------------------------
Four norm_meta(const char* op, const Tensor& x, Shape shape, const OptionalTensor& weight,
               const OptionalTensor& bias, double eps, double, const OptionalTensor& residual,
               bool centred) {
  const NormSizes sizes = check_norm(op, x, shape, weight, bias, eps, residual);
  return empty_norm_outputs(x, residual, sizes, centred);
}
Four norm_backward_meta(const char* op, const Tensor& grad_y,
                        const OptionalTensor& grad_residual_out, const Tensor& input, Shape shape,
                        const OptionalTensor& weight, const OptionalTensor& bias, double,
                        const OptionalTensor& mean, const Tensor& rstd, std::array<bool, 4> mask) {
  check_norm_backward(op, grad_y, grad_residual_out, input, shape, weight, bias, mean, rstd);
  return empty_norm_gradients(grad_y, input, weight, bias, mask);
}

// ---- Autograd ----------------------------------------------------------------------------------
/// What both norms keep for their backward.
struct Saved {
  Tensor input;
  OptionalTensor weight, bias, mean;
  Tensor rstd;
  Shape shape;  ///< of `input`
  bool has_residual;
};

void save(AutogradContext* context, size_t dims, const Tensor& x, const OptionalTensor& residual,
          const Tensor& residual_out, const OptionalTensor& weight, const OptionalTensor& bias,
          const Tensor& mean, const Tensor& rstd) {
  context->save_for_backward({residual ? residual_out : x, weight.value_or(Tensor()),
                              bias.value_or(Tensor()), mean, rstd});
  // Zeros in the place of gradients that mean and rstd never have took a third of a small backward.
  context->set_materialize_grads(false);
  context->saved_data["dims"] = int64_t(dims);
  context->saved_data["dtype"] = x.scalar_type();
  context->saved_data["has_residual"] = residual.has_value();
}

Saved unpack(AutogradContext* context) {
  const variable_list saved = context->get_saved_variables();
  const auto sizes = saved[0].sym_sizes();
  return {saved[0],
          given(saved[1]),
          given(saved[2]),
          given(saved[3]),
          saved[4],
          sizes.slice(sizes.size() - size_t(context->saved_data["dims"].toInt())),
          context->saved_data["has_residual"].toBool()};
}

/// What x, normalized_shape, weight, bias (or eps), … and residual get where y has no gradient:
/// that of x + residual, if there is one.
variable_list without_grad_y(AutogradContext* context, const Tensor& grad_residual_out) {
  variable_list grads(6);
  if (!grad_residual_out.defined()) return grads;
  grads[0] = grad_residual_out.to(context->saved_data["dtype"].toScalarType());
  grads[5] = grad_residual_out;
  return grads;
}

/// Which of the two gradients of x + residual the op forms: one serves both where the dtypes agree.
struct Wanted {
  bool x, residual, grad_x, grad_residual;
  Wanted(bool x, bool residual, const Tensor& grad_y, const Tensor& input)
      : x(x),
        residual(residual),
        grad_x(x || (residual && grad_y.scalar_type() == input.scalar_type())),
        grad_residual(residual && grad_y.scalar_type() != input.scalar_type()) {}
  Tensor of_x(const Tensor& grad) const { return x ? grad : Tensor(); }
  Tensor of_residual(const Tensor& grad, const Tensor& own) const {
    return !residual ? Tensor() : grad_residual ? own : grad;
  }
};

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static variable_list forward(AutogradContext* context, const Tensor& x, Shape shape,
                               const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                               const OptionalTensor& residual) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, residual_out, mean, rstd] = call_layer_norm(x, shape, weight, bias, eps, residual);
    save(context, shape.size(), x, residual, residual_out, weight, bias, mean, rstd);
    if (residual)
      context->mark_non_differentiable({mean, rstd});
    else
      context->mark_non_differentiable({residual_out, mean, rstd});
    return {y, residual_out, mean, rstd};
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return without_grad_y(context, grads[1]);
    const Saved s = unpack(context);
    const OptionalTensor grad_residual_out = s.has_residual ? given(grads[1]) : std::nullopt;
    const Wanted wanted(context->needs_input_grad(0),
                        s.has_residual && context->needs_input_grad(kResidual(s)), grads[0],
                        s.input);
    const std::array<bool, 4> mask = {
        wanted.grad_x, wanted.grad_residual, s.weight && context->needs_input_grad(1),
        s.bias && context->needs_input_grad(1 + s.weight.has_value())};
    auto [dx, dresidual, dweight, dbias] = call_layer_norm_backward(
        grads[0], grad_residual_out, s.input, s.shape, s.weight, s.bias, *s.mean, s.rstd, mask);
    return {wanted.of_x(dx),
            Tensor(),
            mask[2] ? dweight : Tensor(),
            mask[3] ? dbias : Tensor(),
            Tensor(),
            wanted.of_residual(dx, dresidual)};
  }
  /// Tensors are counted without those that are absent.
  static size_t kResidual(const Saved& s) {
    return 1 + size_t(s.weight.has_value()) + size_t(s.bias.has_value());
  }
};

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static variable_list forward(AutogradContext* context, const Tensor& x, Shape shape,
                               const OptionalTensor& weight, double eps, double weight_offset,
                               const OptionalTensor& residual) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, residual_out, rstd] = call_rms_norm(x, shape, weight, eps, weight_offset, residual);
    save(context, shape.size(), x, residual, residual_out, weight, std::nullopt, Tensor(), rstd);
    context->saved_data["weight_offset"] = weight_offset;
    if (residual)
      context->mark_non_differentiable({rstd});
    else
      context->mark_non_differentiable({residual_out, rstd});
    return {y, residual_out, rstd};
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return without_grad_y(context, grads[1]);
    const Saved s = unpack(context);
    const OptionalTensor grad_residual_out = s.has_residual ? given(grads[1]) : std::nullopt;
    const Wanted wanted(
        context->needs_input_grad(0),
        s.has_residual && context->needs_input_grad(1 + size_t(s.weight.has_value())), grads[0],
        s.input);
    const std::array<bool, 3> mask = {wanted.grad_x, wanted.grad_residual,
                                      s.weight && context->needs_input_grad(1)};
    auto [dx, dresidual, dweight] =
        call_rms_norm_backward(grads[0], grad_residual_out, s.input, s.shape, s.weight,
                               context->saved_data["weight_offset"].toDouble(), s.rstd, mask);
    return {wanted.of_x(dx), Tensor(), mask[2] ? dweight : Tensor(),
            Tensor(),        Tensor(), wanted.of_residual(dx, dresidual)};
  }
};

Four layer_norm_autograd(const Tensor& x, Shape shape, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, const OptionalTensor& residual) {
  const variable_list out = LayerNorm::apply(x, shape, weight, bias, eps, residual);
  return {out[0], out[1], out[2], out[3]};
}
Three rms_norm_autograd(const Tensor& x, Shape shape, const OptionalTensor& weight, double eps,
                        double weight_offset, const OptionalTensor& residual) {
  const variable_list out = RmsNorm::apply(x, shape, weight, eps, weight_offset, residual);
  return {out[0], out[1], out[2]};
}

Four layer_norm_backward_autograd(const Tensor& grad_y, const OptionalTensor& grad_residual_out,
                                  const Tensor& input, Shape shape, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const Tensor& mean,
                                  const Tensor& rstd, std::array<bool, 4> mask) {
  Four out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = call_layer_norm_backward(grad_y, grad_residual_out, input, shape, weight, bias, mean,
                                   rstd, mask);
  }
  const Tensor residual = grad_residual_out.value_or(Tensor()), w = weight.value_or(Tensor());
  auto& [dx, dresidual, dweight, dbias] = out;
  differentiable_once("layer_norm_backward", {&grad_y, &residual, &input, &w, &mean, &rstd},
                      {&dx, &dresidual, &dweight, &dbias});
  return out;
}
Three rms_norm_backward_autograd(const Tensor& grad_y, const OptionalTensor& grad_residual_out,
                                 const Tensor& input, Shape shape, const OptionalTensor& weight,
                                 double weight_offset, const Tensor& rstd,
                                 std::array<bool, 3> mask) {
  Three out;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = call_rms_norm_backward(grad_y, grad_residual_out, input, shape, weight, weight_offset,
                                 rstd, mask);
  }
  const Tensor residual = grad_residual_out.value_or(Tensor()), w = weight.value_or(Tensor());
  auto& [dx, dresidual, dweight] = out;
  differentiable_once("rms_norm_backward", {&grad_y, &residual, &input, &w, &rstd},
                      {&dx, &dresidual, &dweight});
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(halfstep, Meta, m) { NormOps<norm_meta, norm_backward_meta>::add_to(m); }
TORCH_LIBRARY_IMPL(halfstep, Autograd, m) {
  m.impl("layer_norm", layer_norm_autograd);
  m.impl("layer_norm_backward", layer_norm_backward_autograd);
  m.impl("rms_norm", rms_norm_autograd);
  m.impl("rms_norm_backward", rms_norm_backward_autograd);
}

}  // namespace halfstep::ops
