#include "loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "dispatch.h"
#include "loss_calls.h"

// Cross entropy (csrc/math/loss.h). The gradient is rounded once, in units that the gradient which
// arrives has brought along: a loss scale goes into every element before it is rounded to 16 bits.
//
//   without grad_scale: the forward keeps two numbers a row and the backward reads the logits
//   again: 6 bytes a 16-bit logit for both, and nothing the size of the logits is held.
//   with grad_scale: what will arrive is known, so the forward writes the gradient while the row is
//   on the chip, 4 bytes a logit, and the backward multiplies by grad_output / grad_scale, which
//   touches no memory where that is 1.

namespace halfstep::ops {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kSchemas[] = {
    // logits [V], [N, V] or [N, V, d1, …] in float16, bfloat16, float32 or float64; target: int64
    // class indices without the V. weight: [V], any of these dtypes. grad_scale: one float32 or
    // float64 element. The loss is float32, float64 for float64 logits.
    "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, int ignore_index=-100, "
    "str reduction=\"mean\", float label_smoothing=0.0, float z_loss=0.0, Tensor? grad_scale=None) "
    "-> Tensor",
    // logits [N, V], target [N]. loss: [N] or one number; stats [N, 2]: max and rest of each row;
    // both float32, float64 for float64. total: float64 sum of the weights of the labels. grad:
    // with
    // grad_scale the gradient for a grad_output of that, in logits' dtype, else empty.
    "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
    "str reduction, float label_smoothing, float z_loss, Tensor? grad_scale) -> (Tensor loss, "
    "Tensor stats, Tensor total, Tensor grad)",
    // grad_output: float32 or float64 as loss. The gradient in logits' dtype.
    "cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, "
    "Tensor stats, Tensor total, int ignore_index, str reduction, float label_smoothing, "
    "float z_loss) -> Tensor",
    // grad * grad_output / grad_scale (1 without), for each row of a matrix or all of grad, in
    // float32 (float64), rounded once to dtype; grad in any of the four dtypes.
    "rescale_gradient(Tensor grad, Tensor grad_output, Tensor? grad_scale, ScalarType dtype) -> "
    "Tensor",
    // The same in place; a factor of 1 leaves the memory alone.
    "rescale_gradient_(Tensor(a!) grad, Tensor grad_output, Tensor? grad_scale) -> ()",
};

Forward cross_entropy_forward_meta(const at::Tensor& logits, const at::Tensor& target,
                                   const OptionalTensor& weight, int64_t, std::string_view name,
                                   double smoothing, double z_loss,
                                   const OptionalTensor& grad_scale) {
  constexpr const char* kOp = "cross_entropy_forward";
  const Reduction reduction = reduction_of(kOp, name);
  check_rows(kOp, logits, target);
  check_loss_options(kOp, "weight", "logits", logits, logits.sym_size(1), weight, smoothing, z_loss,
                     grad_scale);
  const auto options = logits.options().dtype(wide_type(logits));
  const c10::SymInt rows = logits.sym_size(0);
  return {reduction == Reduction::kNone ? at::empty_symint({rows}, options)
                                        : at::empty_symint(c10::SymIntArrayRef{}, options),
          at::empty_symint({rows, 2}, options),
          at::empty_symint(c10::SymIntArrayRef{}, options.dtype(at::kDouble)),
          grad_scale ? at::empty_symint(logits.sym_sizes(), logits.options())
                     : at::empty_symint({c10::SymInt(0)}, logits.options())};
}

at::Tensor cross_entropy_backward_meta(const at::Tensor& grad_output, const at::Tensor& logits,
                                       const at::Tensor& target, const OptionalTensor& weight,
                                       const at::Tensor&, const at::Tensor&, int64_t,
                                       std::string_view name, double smoothing, double z_loss) {
  constexpr const char* kOp = "cross_entropy_backward";
  const Reduction reduction = reduction_of(kOp, name);
  check_rows(kOp, logits, target);
  check_loss_options(kOp, "weight", "logits", logits, logits.sym_size(1), weight, smoothing, z_loss,
                     {});
  check_grad_output(kOp, grad_output, logits, reduction == Reduction::kNone);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

at::Tensor rescale_gradient_meta(const at::Tensor& grad, const at::Tensor& grad_output,
                                 const OptionalTensor& grad_scale, at::ScalarType dtype) {
  check_rescale("rescale_gradient", grad, grad_output, grad_scale);
  return at::empty_like(grad, grad.options().dtype(dtype));
}
void rescale_gradient_meta_(const at::Tensor& grad, const at::Tensor& grad_output,
                            const OptionalTensor& grad_scale) {
  check_rescale("rescale_gradient_", grad, grad_output, grad_scale);
}

at::Tensor backward_once(const at::Tensor& grad_output, const at::Tensor& logits,
                         const at::Tensor& target, const OptionalTensor& weight,
                         const at::Tensor& stats, const at::Tensor& total, int64_t ignore_index,
                         std::string_view reduction, double smoothing, double z_loss) {
  at::Tensor grad;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    grad = call_backward(grad_output, logits, target, weight, stats, total, ignore_index, reduction,
                         smoothing, z_loss);
  }
  differentiable_once("cross_entropy_backward", {&grad_output, &logits}, {&grad});
  return grad;
}
at::Tensor rescale_once(const at::Tensor& grad, const at::Tensor& grad_output,
                        const OptionalTensor& grad_scale, at::ScalarType dtype) {
  at::Tensor scaled;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    scaled = call_rescale(grad, grad_output, grad_scale, dtype);
  }
  differentiable_once("rescale_gradient", {&grad, &grad_output}, {&scaled});
  return scaled;
}

/// logits [N, V], target [N].
struct CrossEntropyRows : torch::autograd::Function<CrossEntropyRows> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& logits,
                            const at::Tensor& target, const OptionalTensor& weight,
                            int64_t ignore_index, const std::string& reduction, double smoothing,
                            double z_loss, const OptionalTensor& grad_scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [loss, stats, total, grad] = call_forward(logits, target, weight, ignore_index,
                                                         reduction, smoothing, z_loss, grad_scale);
    auto& saved = context->saved_data;
    saved["formed"] = grad_scale.has_value();
    if (grad_scale) {
      context->save_for_backward({grad, *grad_scale});
    } else {
      context->save_for_backward({logits, target, weight.value_or(at::Tensor()), stats, total});
      saved["ignore_index"] = ignore_index;
      saved["reduction"] = reduction;
      saved["smoothing"] = smoothing;
      saved["z_loss"] = z_loss;
    }
    return loss;
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    auto& numbers = context->saved_data;
    at::Tensor grad;
    if (numbers["formed"].toBool())
      grad = rescaled("cross_entropy", saved[0], grads[0], saved[1], saved[0].scalar_type());
    else
      grad = call_backward(grads[0], saved[0], saved[1], given(saved[2]), saved[3], saved[4],
                           numbers["ignore_index"].toInt(), numbers["reduction"].toStringRef(),
                           numbers["smoothing"].toDouble(), numbers["z_loss"].toDouble());
    return {grad, {}, {}, {}, {}, {}, {}, {}};
  }
};

/// Classes last, as rows.
at::Tensor as_rows(const at::Tensor& logits) {
  if (logits.dim() == 1) return logits.unsqueeze(0);
  const at::Tensor last = logits.dim() == 2 ? logits : logits.movedim(1, -1);
  return last.reshape_symint({-1, last.sym_size(-1)});
}

void check_shapes(const char* op, const at::Tensor& logits, const at::Tensor& target) {
  check_target(op, "logits", logits, target);
  bool fits = logits.dim() > 0 && target.dim() == logits.dim() - 1;
  for (int64_t i = 0; fits && i < target.dim(); ++i)
    fits = target.sym_size(i) == logits.sym_size(i == 0 ? 0 : i + 1);
  TORCH_CHECK(
      fits && is_supported_float(logits.scalar_type()), op, ": target is ", describe(target),
      " but logits is ", describe(logits),
      "; expected floating-point [classes], [rows, classes] or [rows, classes, d1, …] and a "
      "target without the classes");
}

at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                         const OptionalTensor& weight, int64_t ignore_index,
                         std::string_view reduction, double smoothing, double z_loss,
                         const OptionalTensor& grad_scale) {
  constexpr const char* kOp = "cross_entropy";
  const bool per_row = reduction_of(kOp, reduction) == Reduction::kNone;
  check_shapes(kOp, logits, target);
  const c10::SymInt classes = logits.sym_size(logits.dim() == 1 ? 0 : 1);
  TORCH_CHECK(classes > 0, kOp, ": logits is ", describe(logits), ": no classes");
  check_loss_options(kOp, "weight", "logits", logits, classes, weight, smoothing, z_loss,
                     grad_scale);
  const at::Tensor rows = as_rows(logits), labels = target.reshape({-1});
  const bool wants = c10::GradMode::is_enabled() && logits.requires_grad();
  const at::Tensor loss =
      wants ? CrossEntropyRows::apply(rows, labels, weight, ignore_index, std::string(reduction),
                                      smoothing, z_loss, grad_scale)
            : std::get<0>(call_forward(rows, labels, weight, ignore_index, reduction, smoothing,
                                       z_loss, std::nullopt));
  return per_row ? loss.reshape_symint(target.sym_sizes()) : loss;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  m.impl("cross_entropy_forward", cross_entropy_forward_meta);
  m.impl("cross_entropy_backward", cross_entropy_backward_meta);
  m.impl("rescale_gradient", rescale_gradient_meta);
  m.impl("rescale_gradient_", rescale_gradient_meta_);
}
TORCH_LIBRARY_IMPL(halfstep, Autograd, m) {
  m.impl("cross_entropy_backward", backward_once);
  m.impl("rescale_gradient", rescale_once);
}
// Of differentiable operations around one node.
TORCH_LIBRARY_IMPL(halfstep, CompositeImplicitAutograd, m) {
  m.impl("cross_entropy", cross_entropy);
}

}  // namespace halfstep::ops
