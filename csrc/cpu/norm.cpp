#include "../ops/norm.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

#include "../math/norm.h"
#include "../ops/gather.h"
#include "common.h"

namespace halfstep::cpu {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Elements below which another thread costs more than it brings.
constexpr int64_t kGrain = 32768;
/// Blocks of rows whose sums for weight and bias are kept apart until the end.
constexpr int64_t kBlocks = 256;

int64_t grain(int64_t elements) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
}

Tensor buffer(int64_t count, at::ScalarType type) {
  return at::empty({count}, at::TensorOptions(type));
}

/// Weight or bias in the compute type, in whole packs.
Tensor widened(const OptionalTensor& from, double offset, double otherwise, int64_t n,
               at::ScalarType wide) {
  const NormKernels& k = *kernels().norm;
  Tensor to = buffer(k.padded(n), wide);
  const Tensor dense = from ? from->contiguous() : Tensor();
  k.parameters(from ? dense.const_data_ptr() : nullptr,
               from ? ops::dtype_code(from->scalar_type()) : Dtype::kF32, offset, otherwise, n,
               wide == at::kDouble, to.mutable_data_ptr());
  return to;
}

void* mutable_data_of(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

ops::NormOutputs norm(const char* op, const Tensor& x, c10::SymIntArrayRef shape,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                      double weight_offset, const OptionalTensor& residual, bool centred) {
  const auto sizes = ops::check_norm(op, x, shape, weight, bias, eps, residual);
  auto out = ops::empty_norm_outputs(x, residual, sizes, centred);
  auto& [y, residual_out, mean, rstd] = out;
  if (x.numel() == 0) {
    mean.zero_();
    rstd.zero_();
    return out;
  }
  const auto wide = ops::wide_type(x);
  const int64_t rows = sizes.rows.expect_int(), n = sizes.columns.expect_int();
  const Tensor x_rows = x.contiguous(),
               residual_rows = residual ? residual->contiguous() : Tensor();
  const Tensor w = widened(weight, weight_offset, 1 + weight_offset, n, wide);
  const Tensor b = widened(bias, 0, -0.0, n, wide);
  NormForward work;
  work.x = x_rows.const_data_ptr();
  work.x_dtype = ops::dtype_code(x.scalar_type());
  if (residual) {
    work.residual = residual_rows.const_data_ptr();
    work.residual_dtype = ops::dtype_code(residual->scalar_type());
    work.residual_out = residual_out.mutable_data_ptr();
  }
  work.weight = w.const_data_ptr();
  work.bias = b.const_data_ptr();
  work.y = y.mutable_data_ptr();
  work.mean = mutable_data_of(mean);
  work.rstd = rstd.mutable_data_ptr();
  work.n = n;
  work.eps = eps;
  const NormKernels& k = *kernels().norm;
  at::parallel_for(0, rows, grain(n),
                   [&](int64_t begin, int64_t end) { k.forward(work, begin, end); });
  return out;
}

/// Rows whose sums are one block: a function of the sizes alone, so that the bits are too.
int64_t block_rows(int64_t rows, int64_t n) {
  const int64_t least = n <= 4096 ? math::kNormRows : math::kNormRows / 4;
  return std::max<int64_t>(1, (rows + least * kBlocks - 1) / (least * kBlocks)) * least;
}

ops::NormOutputs norm_backward(const char* op, const Tensor& grad_y,
                               const OptionalTensor& grad_residual_out, const Tensor& input,
                               c10::SymIntArrayRef shape, const OptionalTensor& weight,
                               const OptionalTensor& bias, double weight_offset,
                               const OptionalTensor& mean, const Tensor& rstd,
                               std::array<bool, 4> mask) {
  const auto sizes = ops::check_norm_backward(op, grad_y, grad_residual_out, input, shape, weight,
                                              bias, mean, rstd);
  auto out = ops::empty_norm_gradients(grad_y, input, weight, bias, mask);
  auto& [grad_x, grad_input, grad_weight, grad_bias] = out;
  if (input.numel() == 0) {
    grad_weight.zero_();
    grad_bias.zero_();
    return out;
  }
  const auto wide = ops::wide_type(input);
  const int64_t rows = sizes.rows.expect_int(), n = sizes.columns.expect_int();
  const Tensor grad_rows = grad_y.contiguous(), input_rows = input.contiguous();
  const Tensor residual_rows = grad_residual_out ? grad_residual_out->contiguous() : Tensor();
  const Tensor w = widened(weight, weight_offset, 1 + weight_offset, n, wide);
  NormBackward work;
  work.grad_y = grad_rows.const_data_ptr();
  work.grad_dtype = ops::dtype_code(grad_y.scalar_type());
  work.input = input_rows.const_data_ptr();
  work.input_dtype = ops::dtype_code(input.scalar_type());
  work.grad_residual = grad_residual_out ? residual_rows.const_data_ptr() : nullptr;
  work.weight = w.const_data_ptr();
  work.mean = mean ? mean->const_data_ptr() : nullptr;
  work.rstd = rstd.const_data_ptr();
  work.grad_x = mutable_data_of(grad_x);
  work.grad_input = mutable_data_of(grad_input);
  work.n = n;
  const NormKernels& k = *kernels().norm;
  const int64_t width = k.padded(n);
  const bool sums = grad_weight.numel() || grad_bias.numel();
  const int64_t per_block = block_rows(rows, n), blocks = (rows + per_block - 1) / per_block;
  const int64_t stride = 2 * width;
  const Tensor partial = buffer(sums ? blocks * stride : 0, at::kDouble);
  at::parallel_for(0, blocks, grain(n * per_block), [&](int64_t begin, int64_t end) {
    const Tensor scratch = buffer(sums ? stride : 0, wide);
    for (int64_t block = begin; block < end; ++block)
      k.backward(work, block * per_block, std::min(rows, (block + 1) * per_block),
                 sums ? partial.mutable_data_ptr<double>() + block * stride : nullptr,
                 mutable_data_of(scratch));
  });
  const auto finish = [&](const Tensor& to, int64_t first) {
    if (to.numel() == 0) return;
    at::parallel_for(0, n, grain(blocks), [&](int64_t begin, int64_t end) {
      k.add_blocks(partial.const_data_ptr<double>() + first, blocks, stride, begin, end,
                   ops::dtype_code(to.scalar_type()), to.mutable_data_ptr());
    });
  };
  finish(grad_weight, 0);
  finish(grad_bias, width);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CPU, m) { ops::NormOps<norm, norm_backward>::add_to(m); }

}  // namespace halfstep::cpu
