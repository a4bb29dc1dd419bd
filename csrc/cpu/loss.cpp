#include "loss.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <sys/mman.h>

namespace halfstep::cpu {

using ops::OptionalTensor;
using ops::Reduction;

at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  at::Tensor tensor = at::empty(sizes, options);
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (begin + tensor.nbytes()) / kHuge * kHuge;
  // Advice: what comes of it does not matter.
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  return tensor;
}

LossProblem::LossProblem(const char* op, const at::Tensor& rows, int64_t classes,
                         const at::Tensor& given_target, const OptionalTensor& weight,
                         int64_t ignore_index, double smoothing, double z_loss)
    : weights(ops::wide_weights(weight, rows)), target(given_target.contiguous()) {
  numbers.classes = classes;
  numbers.ignored = ignore_index;
  numbers.smoothing = smoothing;
  numbers.z_loss = z_loss;
  numbers.weight_sum = double(classes);
  labels = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < target.numel(); ++i)
    TORCH_CHECK(labels[i] == ignore_index || (labels[i] >= 0 && labels[i] < classes), op,
                ": target[", i, "] is ", labels[i], "; expected a class from 0 to ", classes - 1,
                ", or ignore_index ", ignore_index);
  if (!weights.defined()) return;
  numbers.weights = weights.const_data_ptr();
  numbers.weight_sum = 0;
  for (int64_t i = 0; i < classes; ++i)
    numbers.weight_sum +=
        math::load_scalar<double>(numbers.weights, ops::dtype_code(weights.scalar_type()), i);
}

double LossProblem::total() const {
  double total = 0;
  for (int64_t i = 0; i < target.numel(); ++i)
    if (labels[i] != numbers.ignored)
      total += numbers.weights
                   ? math::load_scalar<double>(numbers.weights,
                                               ops::dtype_code(weights.scalar_type()), labels[i])
                   : 1;
  return total;
}

at::Tensor reduced(const at::Tensor& losses, Reduction reduction, double total) {
  if (reduction == Reduction::kNone) return losses;
  const auto* rows = losses.const_data_ptr<double>();
  double sum = 0;
  for (int64_t i = 0; i < losses.numel(); ++i) sum += rows[i];
  at::Tensor out = at::empty({}, losses.options());
  *out.mutable_data_ptr<double>() = reduction == Reduction::kMean ? sum / total : sum;
  return out;
}

namespace {

const char* row_of(const at::Tensor& rows, int64_t i) {
  return static_cast<const char*>(rows.const_data_ptr()) +
         i * rows.stride(0) * int64_t(rows.element_size());
}
char* mutable_row_of(const at::Tensor& rows, int64_t i) {
  return static_cast<char*>(rows.mutable_data_ptr()) +
         i * rows.stride(0) * int64_t(rows.element_size());
}

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Forward cross_entropy_forward(const at::Tensor& given_logits, const at::Tensor& target,
                              const OptionalTensor& weight, int64_t ignore_index,
                              std::string_view name, double smoothing, double z_loss,
                              const OptionalTensor& grad_scale) {
  constexpr const char* kOp = "cross_entropy";
  const Reduction reduction = ops::reduction_of(kOp, name);
  ops::check_rows(kOp, given_logits, target);
  ops::check_loss_options(kOp, "weight", "logits", given_logits, given_logits.size(1), weight,
                          smoothing, z_loss, grad_scale);
  const at::Tensor logits = ops::runs(given_logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const LossProblem problem(kOp, logits, classes, target, weight, ignore_index, smoothing, z_loss);
  const auto options = logits.options().dtype(ops::wide_type(logits));
  const double total = problem.total();
  at::Tensor grad =
      grad_scale ? fresh({rows, classes}, logits.options()) : at::empty({0}, logits.options());
  const double factor =
      grad_scale ? number(*grad_scale) / (reduction == Reduction::kMean ? total : 1) : 0;
  const at::Tensor losses = at::empty({rows}, options.dtype(at::kDouble));
  at::Tensor stats = at::empty({rows, 2}, options);
  auto* loss = losses.mutable_data_ptr<double>();
  const auto dtype = ops::dtype_code(logits.scalar_type());
  const LossKernels& k = *kernels().loss;
  const auto walk = [&](auto* kept) {
    at::parallel_for(0, rows, row_grain(classes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        using T = std::decay_t<decltype(*kept)>;
        RowStats of_row;
        loss[i] = k.loss(problem.numbers, row_of(logits, i), dtype, problem.labels[i], of_row);
        kept[2 * i] = T(of_row.max);
        kept[2 * i + 1] = T(of_row.rest);
        // As a backward will read them, so that both give the same gradient.
        of_row = {double(kept[2 * i]), double(kept[2 * i + 1])};
        if (grad_scale)
          k.gradient(problem.numbers, row_of(logits, i), dtype, problem.labels[i], of_row, factor,
                     mutable_row_of(grad, i));
      }
    });
  };
  if (stats.scalar_type() == at::kDouble)
    walk(stats.mutable_data_ptr<double>());
  else
    walk(stats.mutable_data_ptr<float>());
  at::Tensor total_out = at::empty({}, options.dtype(at::kDouble));
  *total_out.mutable_data_ptr<double>() = total;
  return {reduced(losses, reduction, total).to(options.dtype()), stats, total_out, grad};
}

at::Tensor cross_entropy_backward(const at::Tensor& given_grad, const at::Tensor& given_logits,
                                  const at::Tensor& target, const OptionalTensor& weight,
                                  const at::Tensor& given_stats, const at::Tensor& total,
                                  int64_t ignore_index, std::string_view name, double smoothing,
                                  double z_loss) {
  constexpr const char* kOp = "cross_entropy_backward";
  const Reduction reduction = ops::reduction_of(kOp, name);
  ops::check_rows(kOp, given_logits, target);
  ops::check_loss_options(kOp, "weight", "logits", given_logits, given_logits.size(1), weight,
                          smoothing, z_loss, {});
  ops::check_grad_output(kOp, given_grad, given_logits, reduction == Reduction::kNone);
  const at::Tensor logits = ops::runs(given_logits), stats = given_stats.contiguous();
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const LossProblem problem(kOp, logits, classes, target, weight, ignore_index, smoothing, z_loss);
  const at::Tensor grad_output = given_grad.contiguous();
  const double divisor = reduction == Reduction::kMean ? number(total) : 1;
  at::Tensor grad = fresh({rows, classes}, logits.options());
  const auto dtype = ops::dtype_code(logits.scalar_type());
  const auto wide = ops::dtype_code(stats.scalar_type());
  const auto arrives = ops::dtype_code(grad_output.scalar_type());
  const LossKernels& k = *kernels().loss;
  const void* kept = stats.const_data_ptr();
  at::parallel_for(0, rows, row_grain(classes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowStats of_row = {math::load_scalar<double>(kept, wide, 2 * i),
                               math::load_scalar<double>(kept, wide, 2 * i + 1)};
      const double upstream = math::load_scalar<double>(grad_output.const_data_ptr(), arrives,
                                                        reduction == Reduction::kNone ? i : 0);
      k.gradient(problem.numbers, row_of(logits, i), dtype, problem.labels[i], of_row,
                 upstream / divisor, mutable_row_of(grad, i));
    }
  });
  return grad;
}

/// out = grad * factor of its row or of all.
void rescale(const at::Tensor& grad, const at::Tensor& grad_output,
             const OptionalTensor& grad_scale, const at::Tensor& out) {
  const double divisor = grad_scale ? number(*grad_scale) : 1;
  const bool per_row = grad.dim() == 2 && grad_output.dim() == 1;
  const int64_t pieces = per_row ? grad.size(0) : 1;
  if (grad.numel() == 0) return;
  const int64_t length = grad.numel() / pieces;
  const at::Tensor factors = grad_output.contiguous();
  const auto from = ops::dtype_code(grad.scalar_type()), to = ops::dtype_code(out.scalar_type());
  const auto arrives = ops::dtype_code(factors.scalar_type());
  const auto* read = static_cast<const char*>(grad.const_data_ptr());
  auto* write = static_cast<char*>(out.mutable_data_ptr());
  Blocks blocks;
  for (int64_t i = 0; i < pieces; ++i) blocks.add(length);
  blocks.for_each([&](size_t piece, int64_t, int64_t begin, int64_t end) {
    const double factor =
        math::load_scalar<double>(factors.const_data_ptr(), arrives, int64_t(piece)) / divisor;
    if (factor == 1 && read == write) return;
    const int64_t at = int64_t(piece) * length + begin;
    kernels().unscale(read + at * math::dtype_size(from), from, write + at * math::dtype_size(to),
                      to, factor, end - begin);
  });
}

at::Tensor rescale_gradient(const at::Tensor& grad, const at::Tensor& grad_output,
                            const OptionalTensor& grad_scale, at::ScalarType dtype) {
  ops::check_rescale("rescale_gradient", grad, grad_output, grad_scale);
  at::Tensor out = fresh(grad.sizes(), grad.options().dtype(dtype));
  rescale(grad, grad_output, grad_scale, out);
  return out;
}

void rescale_gradient_(const at::Tensor& grad, const at::Tensor& grad_output,
                       const OptionalTensor& grad_scale) {
  ops::check_rescale("rescale_gradient_", grad, grad_output, grad_scale);
  rescale(grad, grad_output, grad_scale, grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CPU, m) {
  m.impl("cross_entropy_forward", cross_entropy_forward);
  m.impl("cross_entropy_backward", cross_entropy_backward);
  m.impl("rescale_gradient", rescale_gradient);
  m.impl("rescale_gradient_", rescale_gradient_);
}

}  // namespace halfstep::cpu
