#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>

#include "loss.h"
#include "loss_calls.h"

// Cross entropy of a linear layer, rows in chunks: the logits of a chunk are formed, turned into
// the loss and their gradient, and used up, before those of the next take their memory.
//
//   mean, sum: what arrives for the loss is one number, so the gradients of x, weight and bias are
//   formed in the forward, three products as without chunks, and held in FP32 until it is known:
//   one rounding, after the product with it. With grad_scale they are rounded in the forward,
//   times that, to the inputs' dtype, and the backward multiplies by grad_output / grad_scale.
//   none: what arrives differs by row, so the backward forms the logits again: four products.

namespace halfstep::ops {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Wants = std::array<bool, 3>;
using Forms = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kSchemas[] = {
    // x [H] or […, H], weight [V, H], bias [V] of one dtype, float16 to float64; the rest as in
    // cross_entropy.
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, Tensor? bias=None, "
    "Tensor? class_weight=None, int ignore_index=-100, str reduction=\"mean\", "
    "float label_smoothing=0.0, float z_loss=0.0, Tensor? grad_scale=None) -> Tensor",
    // x [N, H]. The gradients that `wants` asks for (x, weight, bias), for a grad_output of 1 in
    // float32 (float64), with grad_scale for one of that in x's dtype; empty where not asked for.
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor target, Tensor? bias, "
    "Tensor? class_weight, int ignore_index, str reduction, float label_smoothing, float z_loss, "
    "Tensor? grad_scale, bool[3] wants) -> (Tensor loss, Tensor grad_x, Tensor grad_weight, "
    "Tensor grad_bias)",
    // grad_output [N], of reduction "none". Gradients in x's dtype.
    "linear_cross_entropy_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor target, "
    "Tensor? bias, Tensor? class_weight, int ignore_index, float label_smoothing, float z_loss, "
    "bool[3] wants) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
};

Forms call_linear_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target,
                          const OptionalTensor& bias, const OptionalTensor& class_weight,
                          int64_t ignore_index, std::string_view reduction, double smoothing,
                          double z_loss, const OptionalTensor& grad_scale, Wants wants) {
  static const auto op =
      find_op<Forms(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                    const OptionalTensor&, int64_t, std::string_view, double, double,
                    const OptionalTensor&, Wants)>("halfstep::linear_cross_entropy_forward");
  return op.call(x, weight, target, bias, class_weight, ignore_index, reduction, smoothing, z_loss,
                 grad_scale, wants);
}
Grads call_linear_backward(const at::Tensor& grad_output, const at::Tensor& x,
                           const at::Tensor& weight, const at::Tensor& target,
                           const OptionalTensor& bias, const OptionalTensor& class_weight,
                           int64_t ignore_index, double smoothing, double z_loss, Wants wants) {
  static const auto op =
      find_op<Grads(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                    const OptionalTensor&, const OptionalTensor&, int64_t, double, double, Wants)>(
          "halfstep::linear_cross_entropy_backward");
  return op.call(grad_output, x, weight, target, bias, class_weight, ignore_index, smoothing,
                 z_loss, wants);
}

Grads empty_grads(const at::Tensor& x, const at::Tensor& weight, Wants wants, at::ScalarType type) {
  const auto options = x.options().dtype(type);
  const c10::SymInt none = 0;
  return {
      wants[0] ? at::empty_symint(x.sym_sizes(), options) : at::empty_symint({none}, options),
      wants[1] ? at::empty_symint(weight.sym_sizes(), options) : at::empty_symint({none}, options),
      wants[2] ? at::empty_symint({weight.sym_size(0)}, options)
               : at::empty_symint({none}, options)};
}

Forms forward_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target,
                   const OptionalTensor& bias, const OptionalTensor& class_weight, int64_t,
                   std::string_view name, double smoothing, double z_loss,
                   const OptionalTensor& grad_scale, Wants wants) {
  constexpr const char* kOp = "linear_cross_entropy_forward";
  const Reduction reduction = reduction_of(kOp, name);
  check_linear_rows(kOp, x, weight, target, bias);
  check_loss_options(kOp, "class_weight", "x", x, weight.sym_size(0), class_weight, smoothing,
                     z_loss, grad_scale);
  auto [dx, dw, db] = empty_grads(x, weight, wants, grad_scale ? x.scalar_type() : wide_type(x));
  const auto options = x.options().dtype(wide_type(x));
  return {reduction == Reduction::kNone ? at::empty_symint({x.sym_size(0)}, options)
                                        : at::empty_symint(c10::SymIntArrayRef{}, options),
          dx, dw, db};
}
Grads backward_meta(const at::Tensor& grad_output, const at::Tensor& x, const at::Tensor& weight,
                    const at::Tensor& target, const OptionalTensor& bias,
                    const OptionalTensor& class_weight, int64_t, double smoothing, double z_loss,
                    Wants wants) {
  constexpr const char* kOp = "linear_cross_entropy_backward";
  check_linear_rows(kOp, x, weight, target, bias);
  check_loss_options(kOp, "class_weight", "x", x, weight.sym_size(0), class_weight, smoothing,
                     z_loss, {});
  check_grad_output(kOp, grad_output, x, true);
  return empty_grads(x, weight, wants, x.scalar_type());
}

Grads backward_once(const at::Tensor& grad_output, const at::Tensor& x, const at::Tensor& weight,
                    const at::Tensor& target, const OptionalTensor& bias,
                    const OptionalTensor& class_weight, int64_t ignore_index, double smoothing,
                    double z_loss, Wants wants) {
  Grads grads;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    grads = call_linear_backward(grad_output, x, weight, target, bias, class_weight, ignore_index,
                                 smoothing, z_loss, wants);
  }
  auto& [dx, dw, db] = grads;
  differentiable_once("linear_cross_entropy_backward", {&grad_output, &x, &weight},
                      {&dx, &dw, &db});
  return grads;
}

/// x [N, H], target [N].
struct LinearCrossEntropyRows : torch::autograd::Function<LinearCrossEntropyRows> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& target, const OptionalTensor& bias,
                            const OptionalTensor& class_weight, int64_t ignore_index,
                            const std::string& reduction, double smoothing, double z_loss,
                            const OptionalTensor& grad_scale) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto& saved = context->saved_data;
    const bool per_row = reduction == "none";
    const Wants wants = {x.requires_grad(), weight.requires_grad(),
                         bias.has_value() && bias->requires_grad()};
    const auto [loss, dx, dw, db] = call_linear_forward(
        x, weight, target, bias, class_weight, ignore_index, reduction, smoothing, z_loss,
        per_row ? std::nullopt : grad_scale, per_row ? Wants{} : wants);
    saved["per_row"] = per_row;
    saved["x"] = wants[0];
    saved["weight"] = wants[1];
    saved["bias"] = wants[2];
    saved["dtype"] = int64_t(x.scalar_type());
    saved["ignore_index"] = ignore_index;
    saved["smoothing"] = smoothing;
    saved["z_loss"] = z_loss;
    if (per_row)
      context->save_for_backward(
          {x, weight, target, bias.value_or(at::Tensor()), class_weight.value_or(at::Tensor())});
    else
      context->save_for_backward({dx, dw, db, grad_scale.value_or(at::Tensor())});
    return loss;
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    auto& numbers = context->saved_data;
    const Wants wants = {numbers["x"].toBool(), numbers["weight"].toBool(),
                         numbers["bias"].toBool()};
    at::Tensor dx, dw, db;
    if (numbers["per_row"].toBool()) {
      std::tie(dx, dw, db) = call_linear_backward(
          grads[0], saved[0], saved[1], saved[2], given(saved[3]), given(saved[4]),
          numbers["ignore_index"].toInt(), numbers["smoothing"].toDouble(),
          numbers["z_loss"].toDouble(), wants);
    } else {
      const auto dtype = at::ScalarType(numbers["dtype"].toInt());
      const auto scale = given(saved[3]);
      if (wants[0]) dx = rescaled("linear_cross_entropy", saved[0], grads[0], scale, dtype);
      if (wants[1]) dw = rescaled("linear_cross_entropy", saved[1], grads[0], scale, dtype);
      if (wants[2]) db = rescaled("linear_cross_entropy", saved[2], grads[0], scale, dtype);
    }
    const auto only = [&](bool wanted, const at::Tensor& t) { return wanted ? t : at::Tensor(); };
    return {only(wants[0], dx), only(wants[1], dw), {}, only(wants[2], db), {}, {}, {}, {}, {}, {}};
  }
};

at::Tensor linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& target, const OptionalTensor& bias,
                                const OptionalTensor& class_weight, int64_t ignore_index,
                                std::string_view reduction, double smoothing, double z_loss,
                                const OptionalTensor& grad_scale) {
  constexpr const char* kOp = "linear_cross_entropy";
  const bool per_row = reduction_of(kOp, reduction) == Reduction::kNone;
  bool fits = x.dim() > 0 && target.dim() == x.dim() - 1;
  for (int64_t i = 0; fits && i < target.dim(); ++i) fits = target.sym_size(i) == x.sym_size(i);
  check_target(kOp, "x", x, target);
  TORCH_CHECK(fits, kOp, ": target is ", describe(target), " but x is ", describe(x),
              "; expected x's shape without its last dimension");
  const at::Tensor rows = x.reshape_symint({-1, x.sym_size(-1)}), labels = target.reshape({-1});
  check_linear_rows(kOp, rows, weight, labels, bias);
  check_loss_options(kOp, "class_weight", "x", x, weight.sym_size(0), class_weight, smoothing,
                     z_loss, grad_scale);
  const bool wants = c10::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() ||
                                                     (bias && bias->requires_grad()));
  const at::Tensor loss =
      wants
          ? LinearCrossEntropyRows::apply(rows, weight, labels, bias, class_weight, ignore_index,
                                          std::string(reduction), smoothing, z_loss, grad_scale)
          : std::get<0>(call_linear_forward(rows, weight, labels, bias, class_weight, ignore_index,
                                            reduction, smoothing, z_loss, std::nullopt, Wants{}));
  return per_row ? loss.reshape_symint(target.sym_sizes()) : loss;
}

template <c10::DeviceType kDevice>
at::Tensor linear_cross_entropy_autocast(const at::Tensor& x, const at::Tensor& weight,
                                         const at::Tensor& target, const OptionalTensor& bias,
                                         const OptionalTensor& class_weight, int64_t ignore_index,
                                         std::string_view reduction, double smoothing,
                                         double z_loss, const OptionalTensor& grad_scale) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         const OptionalTensor&, const OptionalTensor&, int64_t, std::string_view,
                         double, double, const OptionalTensor&)>("halfstep::linear_cross_entropy");
  const NoAutocast off;
  return op.call(autocast_to_lower(x, kDevice), autocast_to_lower(weight, kDevice), target,
                 autocast_to_lower(bias, kDevice), class_weight, ignore_index, reduction, smoothing,
                 z_loss, grad_scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  m.impl("linear_cross_entropy_forward", forward_meta);
  m.impl("linear_cross_entropy_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(halfstep, Autograd, m) {
  m.impl("linear_cross_entropy_backward", backward_once);
}
// Of differentiable operations around one node.
TORCH_LIBRARY_IMPL(halfstep, CompositeImplicitAutograd, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy);
}
TORCH_LIBRARY_IMPL(halfstep, AutocastCPU, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_autocast<c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(halfstep, AutocastCUDA, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_autocast<c10::DeviceType::CUDA>);
}

}  // namespace halfstep::ops
