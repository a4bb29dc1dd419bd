// Cross entropy of a linear layer in chunks of rows (csrc/ops/linear_loss.cpp).
//
//   A chunk's logits lie in one buffer of kLogits FP32 numbers, or kLeastRows rows of more: it
//   holds the logits, then their gradient in place. Products are FP32 (product.h), in pieces of
//   weight rows, so that logits and sums are free of the logits' rounding. Each chunk widens or
//   packs all of weight twice, and reads and writes all of its gradient, which is summed over
//   chunks in FP32: this is why chunks are not smaller. Tests: tests/python/test_linear_loss.py.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <optional>

#include "loss.h"
#include "product.h"

namespace halfstep::cpu {

namespace {

using ops::OptionalTensor;
using ops::Reduction;
using Wants = std::array<bool, 3>;
using Forms = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// Logits of a chunk.
constexpr int64_t kLogits = int64_t(4) << 20;
constexpr int64_t kLeastRows = 512;
/// Elements of a piece of weight where it is widened for torch's product, which packs it again: a
/// piece that stays in the cache costs more than it saves (measured).
constexpr int64_t kWidePiece = 4 * kPiece;

class Chunks {
 public:
  Chunks(const LossProblem& problem, const at::Tensor& x, const at::Tensor& weight,
         const OptionalTensor& bias, Wants wants)
      : problem_(problem),
        x_(x),
        weight_(weight),
        wants_(wants),
        type_(ops::wide_type(x)),
        widens_(type_ != x.scalar_type()),
        rows_(x.size(0)),
        classes_(weight.size(0)),
        rows_of_chunk_(even_part(rows_, std::max(kLogits / classes_, kLeastRows))),
        use_tiles_(x.scalar_type() == at::kHalf && in_tiles(rows_of_chunk_, classes_, x.size(1)) &&
                   values_fit_tiles(x) && values_fit_tiles(weight)),
        classes_of_piece_(widens_ ? even_part(classes_, (use_tiles_ ? kPiece : kWidePiece) /
                                                            std::max<int64_t>(x.size(1), 1))
                                  : classes_) {
    const auto options = x.options().dtype(type_);
    if (bias) bias_ = bias->to(type_);
    logits_ = fresh({rows_of_chunk_, classes_}, options);
    losses = at::empty({rows_}, x.options().dtype(at::kDouble));
    if (wants[1]) grad_weight = fresh(weight.sizes(), options);
    if (wants[1] && rows_ == 0) grad_weight.zero_();
    if (wants[2]) grad_bias = at::zeros({classes_}, options);
  }

  /// factor(row): what arrives for a row's loss. grad_x(first row, FP32 gradient of a chunk).
  template <class Factor, class GradX>
  void run(const Factor& factor, const GradX& grad_x) {
    for (int64_t first = 0; first < rows_; first += rows_of_chunk_) {
      const int64_t count = std::min(rows_of_chunk_, rows_ - first);
      at::Tensor x = x_.narrow(0, first, count);
      if (!use_tiles_) x = x.to(type_);
      at::Tensor logits = logits_.narrow(0, 0, count);
      form_logits(x, logits);
      form_losses(first, logits, factor);
      if (wants_[0] || wants_[1]) form_grads(first, x, logits, grad_x);
      if (wants_[2]) grad_bias.add_(at::cpu::sum(logits, {0}));
    }
  }

  at::Tensor losses, grad_weight, grad_bias;

 private:
  /// body(first class, count, their weights) for each piece.
  template <class Body>
  void for_pieces(const Body& body) {
    for (int64_t c = 0; c < classes_; c += classes_of_piece_) {
      const int64_t count = std::min(classes_of_piece_, classes_ - c);
      body(c, count, weight_.narrow(0, c, count));
    }
  }

  void form_logits(const at::Tensor& x, const at::Tensor& logits) {
    for_pieces([&](int64_t c, int64_t count, const at::Tensor& weight) {
      at::Tensor out = logits.narrow(1, c, count);
      if (bias_.defined()) out.copy_(bias_.narrow(0, c, count).expand_as(out));
      Right(weight.t(), 0, use_tiles_).multiply(out, x, bias_.defined());
    });
  }

  template <class Factor>
  void form_losses(int64_t first, const at::Tensor& logits, const Factor& factor) {
    const bool wants = wants_[0] || wants_[1] || wants_[2];
    const LossKernels& k = *kernels().loss;
    const auto dtype = ops::dtype_code(type_);
    const int64_t bytes = classes_ * int64_t(logits.element_size());
    auto* memory = static_cast<char*>(logits.mutable_data_ptr());
    auto* loss = losses.mutable_data_ptr<double>() + first;
    const int64_t* labels = problem_.labels + first;
    at::parallel_for(0, logits.size(0), row_grain(classes_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        char* row = memory + i * bytes;
        RowStats stats;
        loss[i] = k.loss(problem_.numbers, row, dtype, labels[i], stats);
        if (wants)
          k.gradient(problem_.numbers, row, dtype, labels[i], stats, factor(first + i), row);
      }
    });
  }

  template <class GradX>
  void form_grads(int64_t first, const at::Tensor& x, const at::Tensor& logits,
                  const GradX& grad_x) {
    at::Tensor dx;
    if (wants_[0]) dx = at::empty(x.sizes(), x.options().dtype(type_));
    std::optional<Right> right;
    if (wants_[1]) right.emplace(x, 0, use_tiles_);
    for_pieces([&](int64_t c, int64_t count, const at::Tensor& weight) {
      const at::Tensor grad = logits.narrow(1, c, count);
      if (wants_[0]) Right(weight, 0, use_tiles_).multiply(dx, grad, c != 0);
      if (!wants_[1]) return;
      at::Tensor dw = grad_weight.narrow(0, c, count);
      right->multiply(dw, grad.t(), first != 0);
    });
    if (wants_[0]) grad_x(first, dx);
  }

  const LossProblem& problem_;
  const at::Tensor& x_;
  const at::Tensor& weight_;
  const Wants wants_;
  const at::ScalarType type_;
  const bool widens_;
  const int64_t rows_, classes_, rows_of_chunk_;
  const bool use_tiles_;
  const int64_t classes_of_piece_;
  at::Tensor bias_, logits_;
};

at::Tensor or_empty(const at::Tensor& grad, const at::Tensor& x, at::ScalarType type) {
  if (!grad.defined()) return at::empty({0}, x.options().dtype(type));
  if (grad.scalar_type() == type) return grad;
  return fresh(grad.sizes(), grad.options().dtype(type)).copy_(grad);
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
  const LossProblem problem(kOp, x, weight.size(0), target, class_weight, ignore_index, smoothing,
                            z_loss);
  const Plain plain;
  const double total = problem.total();
  const double factor =
      (grad_scale ? number(*grad_scale) : 1) / (reduction == Reduction::kMean ? total : 1);
  const auto type = grad_scale ? x.scalar_type() : ops::wide_type(x);
  Chunks chunks(problem, x, weight, bias, wants);
  at::Tensor grad_x;
  if (wants[0]) grad_x = at::empty(x.sizes(), x.options().dtype(type));
  chunks.run(
      [&](int64_t) { return factor; },
      [&](int64_t first, const at::Tensor& dx) { grad_x.narrow(0, first, dx.size(0)).copy_(dx); });
  return {reduced(chunks.losses, reduction, total).to(ops::wide_type(x)), or_empty(grad_x, x, type),
          or_empty(chunks.grad_weight, x, type), or_empty(chunks.grad_bias, x, type)};
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
  const LossProblem problem(kOp, x, weight.size(0), target, class_weight, ignore_index, smoothing,
                            z_loss);
  const Plain plain;
  const at::Tensor arrives = grad_output.to(at::kDouble).contiguous();
  const auto* factors = arrives.const_data_ptr<double>();
  Chunks chunks(problem, x, weight, bias, wants);
  at::Tensor grad_x;
  if (wants[0]) grad_x = at::empty(x.sizes(), x.options());
  chunks.run(
      [&](int64_t row) { return factors[row]; },
      [&](int64_t first, const at::Tensor& dx) { grad_x.narrow(0, first, dx.size(0)).copy_(dx); });
  const auto type = x.scalar_type();
  return {or_empty(grad_x, x, type), or_empty(chunks.grad_weight, x, type),
          or_empty(chunks.grad_bias, x, type)};
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CPU, m) {
  m.impl("linear_cross_entropy_forward", forward);
  m.impl("linear_cross_entropy_backward", backward);
}

}  // namespace halfstep::cpu
