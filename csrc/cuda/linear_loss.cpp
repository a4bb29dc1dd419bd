// Cross entropy of a linear layer in chunks of rows (csrc/ops/linear_loss.cpp) on the device.
//
//   A chunk's logits are FP32, the result of a product of 16-bit operands with FP32 sums. Their
//   gradient is an operand of the next two products, so it is 16 bits wide again, rounded times
//   2^10 (less where class weights are above 1): below 2^16, and not zero down to 2^-34. With a
//   z-loss it has no such bound: it stays FP32, and so do the operands of those products. What
//   arrives is brought in after the products, in FP32. Rows of a chunk: kBudget bytes of logits,
//   2,048 at least where there are so many. Nothing waits for the device.
//   Tests: tests/gpu/test_loss_cuda.py.

#include <ATen/ops/addmm.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "loss.h"

namespace halfstep::cuda {

namespace {

using ops::OptionalTensor;
using ops::Reduction;
using Wants = std::array<bool, 3>;
using Forms = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr int64_t kBudget = int64_t(512) << 20;

/// What the 16-bit gradient of the logits is multiplied by before it is rounded.
at::Tensor lift_of(const at::Tensor& x, const OptionalTensor& class_weight) {
  at::Tensor lift = at::full({}, 1024.0, x.options().dtype(at::kFloat));
  if (class_weight) lift.div_(at::amax(class_weight->to(at::kFloat)).clamp_min_(1));
  return lift;
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
  return a.scalar_type() == type ? at::mm(a, b) : at::mm(a, b, type);
}
/// sum += a b, in place.
void add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() == sum.scalar_type())
    at::addmm_out(sum, sum, a, b);
  else
    at::addmm_out(sum, sum, a, b, sum.scalar_type());
}

struct Chunked {
  at::Tensor losses, grad_x, grad_weight, grad_bias;  // gradients in the wide type
};

/// upstream: one number, brought in by the caller, or one for each row (per_row).
Chunked run(const char* op, const Place& place, const LossCall& call, const at::Tensor& x,
            const at::Tensor& weight, const OptionalTensor& bias,
            const OptionalTensor& class_weight, const OptionalTensor& per_row, Wants wants) {
  const auto type = ops::wide_type(x);
  const auto options = x.options().dtype(type);
  const int64_t rows = x.size(0), classes = weight.size(0);
  const int64_t most =
      std::max<int64_t>(2048, kBudget / (classes * int64_t(options.dtype().itemsize())));
  const bool any = wants[0] || wants[1] || wants[2];
  // The dtype of the logits' gradient and of the operands that it meets.
  const auto operand = call.z_loss() != 0 ? type : x.scalar_type();
  const bool lifts = any && operand != type;
  const at::Tensor lift = lifts ? lift_of(x, class_weight) : at::Tensor();
  const at::Tensor weights = any ? weight.to(operand) : weight;
  const at::Tensor lower = lift.defined() ? lift.reciprocal() : lift;
  Chunked result;
  result.losses = at::empty({rows}, x.options().dtype(at::kDouble));
  if (wants[0]) result.grad_x = at::empty(x.sizes(), options);
  if (wants[1]) result.grad_weight = at::zeros(weight.sizes(), options);
  if (wants[2]) result.grad_bias = at::zeros({classes}, options);
  const at::Tensor wide_bias = bias ? bias->to(type) : at::Tensor();
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    const at::Tensor part = x.narrow(0, first, count);
    at::Tensor logits = product(part, weight.t(), type);
    if (bias) logits.add_(wide_bias);
    const at::Tensor stats = at::empty({count, 2}, options);
    at::Tensor grad;
    LossRows p = call.rows(logits, first);
    p.losses = result.losses.mutable_data_ptr<double>() + first;
    p.stats = stats.mutable_data_ptr();
    at::Tensor arrives;
    if (any) {
      grad = at::empty({count, classes}, x.options().dtype(operand));
      p.grad = grad.mutable_data_ptr();
      p.grad_dtype = ops::dtype_code(grad.scalar_type());
      if (lift.defined()) p.upstream = scalar(lift);
      if (per_row && !lift.defined()) {
        arrives = per_row->narrow(0, first, count).to(type).contiguous();
        p.upstream = scalar(arrives);
        p.per_row = true;
      }
    }
    check(op, loss_forward(p, place.stream()));
    if (!any) continue;
    // With 16-bit operands each row's factor goes to x and to the result, in FP32, not to the
    // gradient of the logits, which it could push out of range.
    const at::Tensor factor = per_row && lift.defined()
                                  ? per_row->narrow(0, first, count).to(type).unsqueeze(1)
                                  : at::Tensor();
    if (wants[0]) {
      at::Tensor dx = product(grad, weights, type);
      if (lift.defined()) dx.mul_(lower);
      if (factor.defined()) dx.mul_(factor);
      result.grad_x.narrow(0, first, count).copy_(dx);
    }
    if (wants[1]) {
      if (factor.defined())  // FP32 operands: the factor may have any size
        add_product(result.grad_weight, grad.t().to(type), part.to(type).mul(factor).mul_(lower));
      else
        add_product(result.grad_weight, grad.t(), part.to(operand));
    }
    if (wants[2]) {
      at::Tensor wide = factor.defined() ? grad.to(type).mul_(factor).mul_(lower) : grad;
      result.grad_bias.add_(at::sum(wide, {0}, false, type));
    }
  }
  if (lift.defined() && !per_row) {
    if (wants[1]) result.grad_weight.mul_(lower);
    if (wants[2]) result.grad_bias.mul_(lower);
  }
  return result;
}

at::Tensor finished(const at::Tensor& grad, const at::Tensor& factor, const at::Tensor& x,
                    at::ScalarType type) {
  if (!grad.defined()) return at::empty({0}, x.options().dtype(type));
  if (factor.defined()) grad.mul_(factor);
  return grad.to(type);
}

Forms forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target,
              const OptionalTensor& bias, const OptionalTensor& class_weight, int64_t ignore_index,
              std::string_view name, double smoothing, double z_loss,
              const OptionalTensor& grad_scale, Wants wants) {
  constexpr const char* kOp = "linear_cross_entropy";
  const Reduction reduction = ops::reduction_of(kOp, name);
  ops::check_linear_rows(kOp, x, weight, target, bias);
  ops::check_loss_options(kOp, "class_weight", "x", x, weight.size(0), class_weight, smoothing,
                          z_loss, grad_scale);
  const Place place(x);
  const LossCall call(kOp, place, x, weight.size(0), target, class_weight, ignore_index, smoothing,
                      z_loss);
  const Chunked c = run(kOp, place, call, x, weight, bias, class_weight, {}, wants);
  const auto wide = ops::wide_type(x);
  const auto type = grad_scale ? x.scalar_type() : wide;
  at::Tensor factor;
  if (grad_scale) factor = grad_scale->reshape(at::IntArrayRef()).to(at::kDouble);
  if (reduction == Reduction::kMean) {
    // Where no label counts, the loss is NaN and the gradient zero, as on the CPU.
    const at::Tensor total = call.total();
    const at::Tensor inverse = at::where(total.eq(0), at::zeros_like(total), total.reciprocal());
    factor = factor.defined() ? factor.mul(inverse) : inverse;
  }
  if (factor.defined()) factor = factor.to(wide);
  return {reduced(kOp, place, c.losses, reduction, call.sums(), wide),
          finished(c.grad_x, factor, x, type), finished(c.grad_weight, factor, x, type),
          finished(c.grad_bias, factor, x, type)};
}

Grads backward(const at::Tensor& grad_output, const at::Tensor& x, const at::Tensor& weight,
               const at::Tensor& target, const OptionalTensor& bias,
               const OptionalTensor& class_weight, int64_t ignore_index, double smoothing,
               double z_loss, Wants wants) {
  constexpr const char* kOp = "linear_cross_entropy_backward";
  ops::check_linear_rows(kOp, x, weight, target, bias);
  ops::check_loss_options(kOp, "class_weight", "x", x, weight.size(0), class_weight, smoothing,
                          z_loss, {});
  ops::check_grad_output(kOp, grad_output, x, true);
  const Place place(x);
  const LossCall call(kOp, place, x, weight.size(0), target, class_weight, ignore_index, smoothing,
                      z_loss);
  const Chunked c = run(kOp, place, call, x, weight, bias, class_weight, grad_output, wants);
  const auto type = x.scalar_type();
  return {finished(c.grad_x, {}, x, type), finished(c.grad_weight, {}, x, type),
          finished(c.grad_bias, {}, x, type)};
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CUDA, m) {
  m.impl("linear_cross_entropy_forward", forward);
  m.impl("linear_cross_entropy_backward", backward);
}

}  // namespace halfstep::cuda
