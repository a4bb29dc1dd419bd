#include "loss.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace halfstep::cuda {

using ops::OptionalTensor;
using ops::Reduction;

LossCall::LossCall(const char* op, const Place& place, const at::Tensor& rows, int64_t classes,
                   const at::Tensor& target, const OptionalTensor& weight, int64_t ignore_index,
                   double smoothing, double z_loss)
    : weights_(ops::wide_weights(weight, rows)),
      target_(target.contiguous()),
      sums_(at::empty({2}, rows.options().dtype(at::kDouble))) {
  numbers_.classes = classes;
  numbers_.ignored = ignore_index;
  numbers_.smoothing = smoothing;
  numbers_.z_loss = z_loss;
  numbers_.weight_sum = double(classes);
  if (weights_.defined()) numbers_.weights = weights_.const_data_ptr();
  LossRows labels;
  labels.numbers = numbers_;
  labels.dtype = ops::dtype_code(ops::wide_type(rows));
  labels.rows = target_.numel();
  labels.labels = target_.const_data_ptr<int64_t>();
  check(op, loss_sums(labels, sums_.mutable_data_ptr<double>(), place.stream()));
}

LossRows LossCall::rows(const at::Tensor& logits, int64_t first) const {
  LossRows rows;
  rows.numbers = numbers_;
  rows.logits = logits.const_data_ptr();
  rows.dtype = ops::dtype_code(logits.scalar_type());
  rows.rows = logits.size(0);
  rows.stride = logits.stride(0);
  rows.labels = target_.const_data_ptr<int64_t>() + first;
  rows.sums = sums();
  return rows;
}

at::Tensor LossCall::total() const { return sums_.select(0, 0).clone(); }

at::Tensor reduced(const char* op, const Place& place, const at::Tensor& losses,
                   Reduction reduction, const double* sums, at::ScalarType type) {
  if (reduction == Reduction::kNone) return losses.to(type);
  at::Tensor out = at::empty({}, losses.options().dtype(type));
  check(op, loss_total(losses.const_data_ptr<double>(), losses.numel(), sums,
                       reduction == Reduction::kMean, out.mutable_data_ptr(), type == at::kDouble,
                       place.stream()));
  return out;
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward(
    const at::Tensor& given_logits, const at::Tensor& target, const OptionalTensor& weight,
    int64_t ignore_index, std::string_view name, double smoothing, double z_loss,
    const OptionalTensor& grad_scale) {
  constexpr const char* kOp = "cross_entropy";
  const Reduction reduction = ops::reduction_of(kOp, name);
  ops::check_rows(kOp, given_logits, target);
  ops::check_loss_options(kOp, "weight", "logits", given_logits, given_logits.size(1), weight,
                          smoothing, z_loss, grad_scale);
  const Place place(given_logits);
  const at::Tensor logits = ops::runs(given_logits);
  const LossCall call(kOp, place, logits, logits.size(1), target, weight, ignore_index, smoothing,
                      z_loss);
  const auto options = logits.options().dtype(ops::wide_type(logits));
  const at::Tensor losses = at::empty({logits.size(0)}, options.dtype(at::kDouble));
  at::Tensor stats = at::empty({logits.size(0), 2}, options);
  at::Tensor grad =
      grad_scale ? at::empty(logits.sizes(), logits.options()) : at::empty({0}, logits.options());
  LossRows rows = call.rows(logits);
  rows.is_mean = reduction == Reduction::kMean;
  rows.stats = stats.mutable_data_ptr();
  rows.losses = losses.mutable_data_ptr<double>();
  if (grad_scale) {
    rows.upstream = scalar(grad_scale);
    rows.grad = grad.mutable_data_ptr();
    rows.grad_dtype = rows.dtype;
  }
  check(kOp, loss_forward(rows, place.stream()));
  return {reduced(kOp, place, losses, reduction, call.sums(), options.dtype().toScalarType()),
          stats, call.total(), grad};
}

at::Tensor cross_entropy_backward(const at::Tensor& given_grad, const at::Tensor& given_logits,
                                  const at::Tensor& target, const OptionalTensor& weight,
                                  const at::Tensor& given_stats, const at::Tensor&,
                                  int64_t ignore_index, std::string_view name, double smoothing,
                                  double z_loss) {
  constexpr const char* kOp = "cross_entropy_backward";
  const Reduction reduction = ops::reduction_of(kOp, name);
  ops::check_rows(kOp, given_logits, target);
  ops::check_loss_options(kOp, "weight", "logits", given_logits, given_logits.size(1), weight,
                          smoothing, z_loss, {});
  ops::check_grad_output(kOp, given_grad, given_logits, reduction == Reduction::kNone);
  const Place place(given_logits);
  const at::Tensor logits = ops::runs(given_logits), stats = given_stats.contiguous();
  const at::Tensor grad_output = given_grad.contiguous();
  const LossCall call(kOp, place, logits, logits.size(1), target, weight, ignore_index, smoothing,
                      z_loss);
  at::Tensor grad = at::empty(logits.sizes(), logits.options());
  LossRows rows = call.rows(logits);
  rows.is_mean = reduction == Reduction::kMean;
  rows.stats = const_cast<void*>(stats.const_data_ptr());
  rows.upstream = scalar(grad_output);
  rows.per_row = reduction == Reduction::kNone;
  rows.grad = grad.mutable_data_ptr();
  rows.grad_dtype = rows.dtype;
  check(kOp, loss_backward(rows, place.stream()));
  return grad;
}

void rescale(const char* op, const at::Tensor& grad, const at::Tensor& given_grad_output,
             const OptionalTensor& grad_scale, const at::Tensor& out) {
  if (grad.numel() == 0) return;
  const Place place(grad);
  const at::Tensor grad_output = given_grad_output.contiguous();
  Rescale rescale;
  rescale.per_row = grad.dim() == 2 && grad_output.dim() == 1;
  rescale.grad = grad.const_data_ptr();
  rescale.dtype = ops::dtype_code(grad.scalar_type());
  rescale.out = out.mutable_data_ptr();
  rescale.out_dtype = ops::dtype_code(out.scalar_type());
  rescale.rows = rescale.per_row ? grad.size(0) : 1;
  rescale.length = grad.numel() / rescale.rows;
  rescale.factor = scalar(grad_output);
  rescale.divisor = scalar(grad_scale);
  check(op, rescale_rows(rescale, place.stream()));
}

at::Tensor rescale_gradient(const at::Tensor& grad, const at::Tensor& grad_output,
                            const OptionalTensor& grad_scale, at::ScalarType dtype) {
  ops::check_rescale("rescale_gradient", grad, grad_output, grad_scale);
  at::Tensor out = at::empty_like(grad, grad.options().dtype(dtype));
  rescale("rescale_gradient", grad, grad_output, grad_scale, out);
  return out;
}

void rescale_gradient_(const at::Tensor& grad, const at::Tensor& grad_output,
                       const OptionalTensor& grad_scale) {
  ops::check_rescale("rescale_gradient_", grad, grad_output, grad_scale);
  rescale("rescale_gradient_", grad, grad_output, grad_scale, grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CUDA, m) {
  m.impl("cross_entropy_forward", cross_entropy_forward);
  m.impl("cross_entropy_backward", cross_entropy_backward);
  m.impl("rescale_gradient", rescale_gradient);
  m.impl("rescale_gradient_", rescale_gradient_);
}

}  // namespace halfstep::cuda
