#pragma once

// What the two losses check, on every backend and before anything is written.

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

#include "../math/loss.h"
#include "check.h"
#include "gather.h"
#include "optional.h"

namespace halfstep::ops {

enum class Reduction { kNone, kMean, kSum };
inline Reduction reduction_of(const char* op, std::string_view name) {
  if (name == "none") return Reduction::kNone;
  if (name == "mean") return Reduction::kMean;
  TORCH_CHECK(name == "sum", op, ": reduction is '", std::string(name),
              "'; expected 'mean', 'sum' or 'none'");
  return Reduction::kSum;
}

/// Rows of which each is one run in memory.
inline at::Tensor runs(const at::Tensor& rows) {
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

inline void check_target(const char* op, const char* name, const at::Tensor& rows,
                         const at::Tensor& target) {
  TORCH_CHECK(target.scalar_type() == at::kLong, op, ": target is ", describe(target),
              "; expected int64 class indices (class probabilities are not supported)");
  check_device(op, {"target"}, target, {name}, rows);
}

/// Class weights for `classes` classes, smoothing, z-loss and grad_scale; `device` names the tensor
/// beside which all must lie.
inline void check_loss_options(const char* op, const char* weight_name, const char* name,
                               const at::Tensor& device, const c10::SymInt& classes,
                               const OptionalTensor& weight, double smoothing, double z_loss,
                               const OptionalTensor& grad_scale) {
  TORCH_CHECK(smoothing >= 0 && smoothing <= 1, op, ": label_smoothing is ", smoothing,
              "; expected 0 to 1");
  TORCH_CHECK(z_loss >= 0 && z_loss <= 1e30, op, ": z_loss is ", z_loss,
              "; expected a finite number that is not negative");
  if (weight) {
    TORCH_CHECK(is_supported_float(weight->scalar_type()) && weight->dim() == 1 &&
                    weight->sym_size(0) == classes,
                op, ": ", weight_name, " is ", describe(*weight), "; expected ", classes,
                " floating-point class weights");
    TORCH_CHECK(!weight->requires_grad(), op, ": ", weight_name,
                " requires grad, but it gets none: pass ", weight_name, ".detach()");
    check_device(op, {weight_name}, *weight, {name}, device);
  }
  if (grad_scale) {
    TORCH_CHECK(
        grad_scale->sym_numel() == 1 &&
            (grad_scale->scalar_type() == at::kFloat || grad_scale->scalar_type() == at::kDouble),
        op, ": grad_scale is ", describe(*grad_scale), "; expected one float32 or float64 element");
    TORCH_CHECK(!grad_scale->requires_grad(), op, ": grad_scale requires grad, but it gets none");
    check_device(op, {"grad_scale"}, *grad_scale, {name}, device);
  }
}

/// [N, V] and [N].
inline void check_rows(const char* op, const at::Tensor& logits, const at::Tensor& target) {
  TORCH_CHECK(is_supported_float(logits.scalar_type()) && logits.dim() == 2, op, ": logits is ",
              describe(logits), "; expected a floating-point [rows, classes]");
  check_target(op, "logits", logits, target);
  TORCH_CHECK(target.dim() == 1 && target.sym_size(0) == logits.sym_size(0), op, ": target is ",
              describe(target), " but logits is ", describe(logits));
  TORCH_CHECK(logits.sym_size(1) > 0, op, ": logits is ", describe(logits), ": no classes");
}

/// x [N, H], weight [V, H], bias [V], target [N].
inline void check_linear_rows(const char* op, const at::Tensor& x, const at::Tensor& weight,
                              const at::Tensor& target, const OptionalTensor& bias) {
  TORCH_CHECK(is_supported_float(x.scalar_type()) && x.dim() == 2, op, ": x is ", describe(x),
              "; expected a floating-point [rows, features]");
  TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.dim() == 2 &&
                  weight.sym_size(1) == x.sym_size(1) && weight.sym_size(0) > 0,
              op, ": weight is ", describe(weight), " but x is ", describe(x),
              "; expected [classes, features] of the same dtype");
  check_device(op, {"weight"}, weight, {"x"}, x);
  if (bias) {
    TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->dim() == 1 &&
                    bias->sym_size(0) == weight.sym_size(0),
                op, ": bias is ", describe(*bias), " but weight is ", describe(weight));
    check_device(op, {"bias"}, *bias, {"x"}, x);
  }
  check_target(op, "x", x, target);
  TORCH_CHECK(target.dim() == 1 && target.sym_size(0) == x.sym_size(0), op, ": target is ",
              describe(target), " but x is ", describe(x));
}

/// Losses go out as [N] or one number; what arrives for them comes in as the same, on their device.
inline void check_grad_output(const char* op, const at::Tensor& grad_output, const at::Tensor& rows,
                              bool per_row) {
  const bool fits = per_row ? grad_output.dim() == 1 && grad_output.sym_size(0) == rows.sym_size(0)
                            : grad_output.sym_numel() == 1;
  TORCH_CHECK(
      fits && (grad_output.scalar_type() == at::kFloat || grad_output.scalar_type() == at::kDouble),
      op, ": grad_output is ", describe(grad_output), "; expected float32 or float64, ",
      per_row ? "one for each row" : "one element");
  check_device(op, {"grad_output"}, grad_output, {"rows"}, rows);
}

inline void check_rescale(const char* op, const at::Tensor& grad, const at::Tensor& grad_output,
                          const OptionalTensor& grad_scale) {
  TORCH_CHECK(is_supported_float(grad.scalar_type()) && grad.is_contiguous(), op, ": grad is ",
              describe(grad), " with strides ", grad.sym_strides(), "; expected it contiguous");
  check_grad_output(op, grad_output, grad, grad_output.dim() == 1 && grad.dim() == 2);
  check_loss_options(op, "weight", "grad", grad, 0, std::nullopt, 0, 0, grad_scale);
}

/// Class weights in the type that the rows are computed in.
inline at::Tensor wide_weights(const OptionalTensor& weight, const at::Tensor& rows) {
  return weight ? weight->to(wide_type(rows)).contiguous() : at::Tensor();
}

}  // namespace halfstep::ops
