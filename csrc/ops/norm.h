#pragma once

// What every backend of LayerNorm and RMSNorm asks of its arguments, and the tensors they return.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"

namespace halfstep::ops {

/// x as rows of what is normalised together.
struct NormSizes {
  c10::SymIntArrayRef leading;
  c10::SymInt rows = 1, columns = 1;
};

inline NormSizes norm_sizes(const char* op, const char* name, const at::Tensor& x,
                            c10::SymIntArrayRef normalized_shape) {
  const auto sizes = x.sym_sizes();
  const size_t count = normalized_shape.size();
  TORCH_CHECK(count > 0, op, ": normalized_shape is []; expected at least one dimension");
  TORCH_CHECK(count <= sizes.size() && sizes.slice(sizes.size() - count) == normalized_shape, op,
              ": ", name, " is ", describe(x), " but normalized_shape is ", normalized_shape);
  NormSizes result;
  result.leading = sizes.slice(0, sizes.size() - count);
  for (const auto& size : result.leading) result.rows = result.rows * size;
  for (const auto& size : normalized_shape) result.columns = result.columns * size;
  return result;
}

inline void check_norm_float(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK(is_supported_float(x.scalar_type()), op, ": ", name, " is ", describe(x),
              "; expected float16, bfloat16, float32 or float64");
  TORCH_CHECK(x.layout() == at::kStrided, op, ": ", name, " is sparse or of another layout (",
              x.layout(), "); only dense tensors are supported");
}

/// Weight or bias: x's dtype or float32.
inline void check_norm_parameter(const char* op, const char* name,
                                 const std::optional<at::Tensor>& parameter, const at::Tensor& x,
                                 c10::SymIntArrayRef normalized_shape) {
  if (!parameter) return;
  check_norm_float(op, name, *parameter);
  TORCH_CHECK(parameter->sym_sizes() == normalized_shape, op, ": ", name, " is ",
              describe(*parameter), " but normalized_shape is ", normalized_shape);
  TORCH_CHECK(parameter->scalar_type() == x.scalar_type() || parameter->scalar_type() == at::kFloat,
              op, ": ", name, " is ", describe(*parameter), " but x is ", describe(x),
              "; expected x's dtype or float32");
  check_device(op, {name}, *parameter, {"x"}, x);
}

/// Tensors that meet in one sum: FP64 with FP64 only.
inline void check_norm_like(const char* op, const char* name, const at::Tensor& tensor,
                            const char* reference_name, const at::Tensor& reference) {
  check_norm_float(op, name, tensor);
  TORCH_CHECK(tensor.sym_sizes() == reference.sym_sizes(), op, ": ", name, " is ", describe(tensor),
              " but ", reference_name, " is ", describe(reference));
  TORCH_CHECK(wide_type(tensor) == wide_type(reference), op, ": ", name, " is ", describe(tensor),
              " but ", reference_name, " is ", describe(reference),
              "; float64 goes with float64 only");
  check_device(op, {name}, tensor, {reference_name}, reference);
}

inline NormSizes check_norm(const char* op, const at::Tensor& x,
                            c10::SymIntArrayRef normalized_shape,
                            const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, double eps,
                            const std::optional<at::Tensor>& residual) {
  check_norm_float(op, "x", x);
  const NormSizes sizes = norm_sizes(op, "x", x, normalized_shape);
  check_norm_parameter(op, "weight", weight, x, normalized_shape);
  check_norm_parameter(op, "bias", bias, x, normalized_shape);
  TORCH_CHECK(eps >= 0, op, ": eps is ", eps, "; expected 0 or more");
  if (residual) check_norm_like(op, "residual", *residual, "x", x);
  return sizes;
}

inline NormSizes check_norm_backward(const char* op, const at::Tensor& grad_y,
                                     const std::optional<at::Tensor>& grad_residual_out,
                                     const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                                     const std::optional<at::Tensor>& weight,
                                     const std::optional<at::Tensor>& bias,
                                     const std::optional<at::Tensor>& mean,
                                     const at::Tensor& rstd) {
  check_norm_float(op, "input", input);
  const NormSizes sizes = norm_sizes(op, "input", input, normalized_shape);
  check_norm_like(op, "grad_y", grad_y, "input", input);
  check_norm_parameter(op, "weight", weight, grad_y, normalized_shape);
  check_norm_parameter(op, "bias", bias, grad_y, normalized_shape);
  if (grad_residual_out) {
    check_norm_like(op, "grad_residual_out", *grad_residual_out, "input", input);
    TORCH_CHECK(grad_residual_out->scalar_type() == input.scalar_type(), op,
                ": grad_residual_out is ", describe(*grad_residual_out), " but input is ",
                describe(input));
  }
  const auto check_moment = [&](const char* name, const at::Tensor& moment) {
    TORCH_CHECK(moment.sym_sizes() == sizes.leading && moment.scalar_type() == wide_type(input) &&
                    moment.is_contiguous(),
                op, ": ", name, " is ", describe(moment), "; expected contiguous ",
                wide_type(input), sizes.leading);
    check_device(op, {name}, moment, {"input"}, input);
  };
  if (mean) check_moment("mean", *mean);
  check_moment("rstd", rstd);
  return sizes;
}

/// y, residual_out, mean, rstd; empty where there is none.
using NormOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline NormOutputs empty_norm_outputs(const at::Tensor& x,
                                      const std::optional<at::Tensor>& residual,
                                      const NormSizes& sizes, bool centred) {
  const auto wide = x.options().dtype(wide_type(x));
  const c10::SymInt none[] = {0};
  return {at::empty_symint(x.sym_sizes(), x.options()),
          residual ? at::empty_symint(x.sym_sizes(), residual->options())
                   : at::empty_symint(none, x.options()),
          at::empty_symint(centred ? sizes.leading : c10::SymIntArrayRef(none), wide),
          at::empty_symint(sizes.leading, wide)};
}

/// Gradients of x (grad_y's dtype), of what was normalised (its dtype), of weight and of bias;
/// empty where they are not asked for.
inline NormOutputs empty_norm_gradients(const at::Tensor& grad_y, const at::Tensor& input,
                                        const std::optional<at::Tensor>& weight,
                                        const std::optional<at::Tensor>& bias,
                                        const std::array<bool, 4>& mask) {
  const c10::SymInt none[] = {0};
  const auto like = [&](bool wanted, const at::Tensor& tensor) {
    return at::empty_symint(wanted ? tensor.sym_sizes() : c10::SymIntArrayRef(none),
                            tensor.options());
  };
  return {like(mask[0], grad_y), like(mask[1], input),
          like(mask[2] && weight, weight ? *weight : grad_y),
          like(mask[3] && bias, bias ? *bias : grad_y)};
}

/// The four ops of one backend, from its two functions:
///   kForward(op, x, normalized_shape, weight, bias, eps, weight_offset, residual, centred)
///   kBackward(op, grad_y, grad_residual_out, input, normalized_shape, weight, bias,
///             weight_offset, mean, rstd, mask)
template <auto kForward, auto kBackward>
struct NormOps {
  using Tensor = at::Tensor;
  using OptionalTensor = std::optional<at::Tensor>;
  using Shape = c10::SymIntArrayRef;
  using Three = std::tuple<Tensor, Tensor, Tensor>;

  static NormOutputs layer_norm(const Tensor& x, Shape shape, const OptionalTensor& weight,
                                const OptionalTensor& bias, double eps,
                                const OptionalTensor& residual) {
    return kForward("layer_norm", x, shape, weight, bias, eps, 0, residual, true);
  }
  static NormOutputs layer_norm_backward(const Tensor& grad_y,
                                         const OptionalTensor& grad_residual_out,
                                         const Tensor& input, Shape shape,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const Tensor& mean, const Tensor& rstd,
                                         std::array<bool, 4> mask) {
    return kBackward("layer_norm_backward", grad_y, grad_residual_out, input, shape, weight, bias,
                     0, mean, rstd, mask);
  }
  static Three rms_norm(const Tensor& x, Shape shape, const OptionalTensor& weight, double eps,
                        double weight_offset, const OptionalTensor& residual) {
    auto [y, residual_out, mean, rstd] =
        kForward("rms_norm", x, shape, weight, std::nullopt, eps, weight_offset, residual, false);
    return {y, residual_out, rstd};
  }
  static Three rms_norm_backward(const Tensor& grad_y, const OptionalTensor& grad_residual_out,
                                 const Tensor& input, Shape shape, const OptionalTensor& weight,
                                 double weight_offset, const Tensor& rstd,
                                 std::array<bool, 3> mask) {
    auto [grad_x, grad_residual, grad_weight, grad_bias] = kBackward(
        "rms_norm_backward", grad_y, grad_residual_out, input, shape, weight, std::nullopt,
        weight_offset, std::nullopt, rstd, {mask[0], mask[1], mask[2], false});
    return {grad_x, grad_residual, grad_weight};
  }

  static void add_to(torch::Library& m) {
    m.impl("layer_norm", layer_norm);
    m.impl("layer_norm_backward", layer_norm_backward);
    m.impl("rms_norm", rms_norm);
    m.impl("rms_norm_backward", rms_norm_backward);
  }
};

}  // namespace halfstep::ops
