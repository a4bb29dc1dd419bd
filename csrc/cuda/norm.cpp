#include "../ops/norm.h"

#include <torch/library.h>

#include "common.h"

namespace halfstep::cuda {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using ops::NormOutputs;

void* data_or_null(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

/// Contiguous tensors that live until the kernels are queued.
struct Rows {
  std::vector<Tensor> kept;
  const void* operator()(const Tensor& t) {
    kept.push_back(t.contiguous());
    return kept.back().const_data_ptr();
  }
  const void* operator()(const OptionalTensor& t) { return t ? (*this)(*t) : nullptr; }
};

math::Dtype code(const OptionalTensor& t) {
  return t ? ops::dtype_code(t->scalar_type()) : math::Dtype::kF32;
}

NormOutputs norm(const char* op, const Tensor& x, c10::SymIntArrayRef shape,
                 const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                 double weight_offset, const OptionalTensor& residual, bool centred) {
  const auto sizes = ops::check_norm(op, x, shape, weight, bias, eps, residual);
  const Place place(x);
  auto out = ops::empty_norm_outputs(x, residual, sizes, centred);
  auto& [y, residual_out, mean, rstd] = out;
  if (x.numel() == 0) {
    mean.zero_();
    rstd.zero_();
    return out;
  }
  Rows rows;
  NormForward work;
  work.x = rows(x);
  work.residual = rows(residual);
  work.weight = rows(weight);
  work.bias = rows(bias);
  work.y = y.mutable_data_ptr();
  work.residual_out = data_or_null(residual_out);
  work.mean = data_or_null(mean);
  work.rstd = rstd.mutable_data_ptr();
  work.x_dtype = ops::dtype_code(x.scalar_type());
  work.residual_dtype = code(residual);
  work.weight_dtype = code(weight);
  work.bias_dtype = code(bias);
  work.rows = sizes.rows.expect_int();
  work.n = sizes.columns.expect_int();
  work.eps = eps;
  work.weight_offset = weight_offset;
  check(op, norm_forward(work, place.stream()));
  return out;
}

NormOutputs norm_backward_of(const char* op, const Tensor& grad_y,
                             const OptionalTensor& grad_residual_out, const Tensor& input,
                             c10::SymIntArrayRef shape, const OptionalTensor& weight,
                             const OptionalTensor& bias, double weight_offset,
                             const OptionalTensor& mean, const Tensor& rstd,
                             std::array<bool, 4> mask) {
  const auto sizes = ops::check_norm_backward(op, grad_y, grad_residual_out, input, shape, weight,
                                              bias, mean, rstd);
  const Place place(input);
  auto out = ops::empty_norm_gradients(grad_y, input, weight, bias, mask);
  auto& [grad_x, grad_input, grad_weight, grad_bias] = out;
  if (input.numel() == 0) {
    grad_weight.zero_();
    grad_bias.zero_();
    return out;
  }
  Rows rows;
  NormBackward work;
  work.grad_y = rows(grad_y);
  work.grad_residual = rows(grad_residual_out);
  work.input = rows(input);
  work.weight = rows(weight);
  work.mean = mean ? mean->const_data_ptr() : nullptr;
  work.rstd = rstd.const_data_ptr();
  work.grad_x = data_or_null(grad_x);
  work.grad_input = data_or_null(grad_input);
  work.grad_weight = data_or_null(grad_weight);
  work.grad_bias = data_or_null(grad_bias);
  work.grad_dtype = ops::dtype_code(grad_y.scalar_type());
  work.input_dtype = ops::dtype_code(input.scalar_type());
  work.weight_dtype = code(weight);
  work.bias_dtype = code(bias);
  work.rows = sizes.rows.expect_int();
  work.n = sizes.columns.expect_int();
  work.weight_offset = weight_offset;
  const int64_t bytes = norm_scratch(work);
  const Tensor scratch = bytes ? place.scratch(bytes) : Tensor();
  check(op, norm_backward(work, bytes ? scratch.mutable_data_ptr() : nullptr, place.stream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CUDA, m) { ops::NormOps<norm, norm_backward_of>::add_to(m); }

}  // namespace halfstep::cuda
