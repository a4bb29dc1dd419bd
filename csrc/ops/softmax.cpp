#include "softmax.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "dispatch.h"

// softmax(scale * x + mask) along one dimension. What the backward keeps is the result alone.

namespace halfstep::ops {

namespace {

constexpr const char* kSchemas[] = {
    // x: FP16, BF16, FP32 or FP64, and so is the result. mask, broadcast to x: bool, True takes
    // part,
    // or floating, added; causal: [..., i, j] takes part where j <= i, and dim is the last one.
    "softmax(Tensor x, int dim, float scale, Tensor? mask, bool causal) -> Tensor",
    // The gradient of x; y, the result, has grad's dtype.
    "softmax_backward(Tensor grad, Tensor y, int dim, float scale, bool causal) -> Tensor",
};

at::Tensor softmax_meta(const at::Tensor& x, int64_t dim, double scale,
                        const std::optional<at::Tensor>& mask, bool causal) {
  check_softmax(x, dim, scale, mask, causal);
  return at::empty_like(x);
}

at::Tensor softmax_backward_meta(const at::Tensor& grad, const at::Tensor& y, int64_t dim,
                                 double scale, bool causal) {
  check_softmax_backward(grad, y, dim, scale, causal);
  return at::empty_like(y);
}

at::Tensor call_softmax(const at::Tensor& x, int64_t dim, double scale,
                        const std::optional<at::Tensor>& mask, bool causal) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, int64_t, double, const std::optional<at::Tensor>&,
                         bool)>("halfstep::softmax");
  return op.call(x, dim, scale, mask, causal);
}

at::Tensor call_backward(const at::Tensor& grad, const at::Tensor& y, int64_t dim, double scale,
                         bool causal) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, double, bool)>(
          "halfstep::softmax_backward");
  return op.call(grad, y, dim, scale, causal);
}

/// The gradient of the masked logits, summed over the dimensions that the mask was broadcast along:
/// FP32 until one rounding at the end.
at::Tensor mask_gradient(const at::Tensor& grad, const at::Tensor& y, const at::Tensor& mask,
                         int64_t dim, bool causal) {
  const auto wide = wide_type(y);
  const at::Tensor logits = call_backward(grad.to(wide), y.to(wide), dim, 1, causal);
  return logits.sum_to_size_symint(mask.sym_sizes()).to(mask.scalar_type());
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Softmax : torch::autograd::Function<Softmax> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, int64_t dim,
                            double scale, const std::optional<at::Tensor>& mask, bool causal) {
    at::Tensor y;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      y = call_softmax(x, dim, scale, mask, causal);
    }
    const bool learns_mask = mask && mask->defined() && mask->requires_grad();
    context->save_for_backward({y, learns_mask ? *mask : at::Tensor()});
    context->saved_data["dim"] = dim;
    context->saved_data["scale"] = scale;
    context->saved_data["causal"] = causal;
    return y;
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &grad = grads[0], &y = saved[0], &mask = saved[1];
    const int64_t dim = context->saved_data["dim"].toInt();
    const bool causal = context->saved_data["causal"].toBool();
    at::Tensor grad_x, grad_mask;
    if (context->needs_input_grad(0))
      grad_x = call_backward(grad, y, dim, context->saved_data["scale"].toDouble(), causal);
    if (mask.defined()) grad_mask = mask_gradient(grad, y, mask, dim, causal);
    return {grad_x, at::Tensor(), at::Tensor(), grad_mask, at::Tensor()};
  }
};

/// dx = scale y (dy - m), m = sum y dy, is linear in dy, and symmetric: the gradient of dy is the
/// same op of what arrives, v. That of y is scale (v (dy - m) - dy sum y v). The division of m by
/// the sum of y adds the same number to every element of a row, which the softmax in front of y
/// takes out again.
struct SoftmaxBackward : torch::autograd::Function<SoftmaxBackward> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& grad, const at::Tensor& y,
                            int64_t dim, double scale, bool causal) {
    context->save_for_backward({grad, y});
    context->saved_data["dim"] = dim;
    context->saved_data["scale"] = scale;
    context->saved_data["causal"] = causal;
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(grad, y, dim, scale, causal);
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &grad = saved[0], &y = saved[1];
    const int64_t dim = context->saved_data["dim"].toInt();
    const double scale = context->saved_data["scale"].toDouble();
    const auto wide = wide_type(y);
    const at::Tensor upper = grads[0].to(wide), dy = grad.to(wide), share = y.to(wide);
    const auto mean = [&](const at::Tensor& x) { return share.mul(x).sum({dim}, true); };
    const at::Tensor grad_y =
        upper.mul(dy.sub(mean(dy))).sub(dy.mul(mean(upper))).mul(scale).to(y.scalar_type());
    return {call_backward(grads[0], y, dim, scale, context->saved_data["causal"].toBool()), grad_y,
            at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor softmax_autograd(const at::Tensor& x, int64_t dim, double scale,
                            const std::optional<at::Tensor>& mask, bool causal) {
  return Softmax::apply(x, dim, scale, mask, causal);
}

at::Tensor softmax_backward_autograd(const at::Tensor& grad, const at::Tensor& y, int64_t dim,
                                     double scale, bool causal) {
  return SoftmaxBackward::apply(grad, y, dim, scale, causal);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  m.impl("softmax", softmax_meta);
  m.impl("softmax_backward", softmax_backward_meta);
}

TORCH_LIBRARY_IMPL(halfstep, Autograd, m) {
  m.impl("softmax", softmax_autograd);
  m.impl("softmax_backward", softmax_backward_autograd);
}

}  // namespace halfstep::ops
