#include <ATen/ops/empty.h>

#include "check.h"
#include "linear.h"

namespace halfstep::ops {

namespace {

/// "float16[4, 3]" of tensors whose sizes may be symbols.
std::string shown(const at::Tensor& tensor) {
  std::ostringstream out;
  out << tensor.scalar_type() << tensor.sym_sizes();
  return out.str();
}

/// math::mask_bytes of a size that may be a symbol.
c10::SymInt mask_bytes(const c10::SymInt& columns) { return (columns + 127) / 128 * 16; }

void check_operand(const char* op, const char* name, const at::Tensor& t,
                   const char* reference_name, const at::Tensor& reference) {
  TORCH_CHECK(t.scalar_type() == reference.scalar_type(), op, ": ", name, " is ", shown(t), " but ",
              reference_name, " is ", shown(reference), "; expected one dtype");
  TORCH_CHECK(t.layout() == at::kStrided, op, ": ", name, " is ", t.layout(),
              "; only dense tensors are supported");
  check_device(op, {name}, t, {reference_name}, reference);
}

}  // namespace

LinearActivation activation_of(const char* op, OptionalName name) {
  if (!name) return LinearActivation::kNone;
  if (*name == "relu") return LinearActivation::kRelu;
  if (*name == "gelu") return LinearActivation::kGelu;
  if (*name == "gelu_tanh") return LinearActivation::kGeluTanh;
  TORCH_CHECK_VALUE(false, op, ": activation is '", *name,
                    "'; expected None, 'relu', 'gelu' or 'gelu_tanh'");
}

void check_linear(const char* op, const at::Tensor& x, const at::Tensor& weight,
                  const OptionalTensor& bias) {
  TORCH_CHECK(is_supported_float(x.scalar_type()), op, ": x is ", shown(x),
              "; expected float16, bfloat16, float32 or float64");
  TORCH_CHECK(x.dim() >= 1, op, ": x is ", shown(x), "; expected [..., K]");
  TORCH_CHECK(weight.dim() == 2, op, ": weight is ", shown(weight), "; expected [N, K]");
  check_operand(op, "weight", weight, "x", x);
  TORCH_CHECK(x.layout() == at::kStrided, op, ": x is ", x.layout(),
              "; only dense tensors are supported");
  TORCH_CHECK(x.sym_size(-1) == weight.sym_size(1), op, ": x is ", shown(x), " but weight is ",
              shown(weight), "; expected x: [..., K], weight: [N, K]");
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), op, ": bias is ",
              shown(*bias), " but weight is ", shown(weight), "; expected bias: [N]");
  TORCH_CHECK(bias->scalar_type() == x.scalar_type() ||
                  (bias->scalar_type() == at::kFloat && x.scalar_type() != at::kDouble),
              op, ": bias is ", shown(*bias), " but x is ", shown(x),
              "; expected x's dtype or float32");
  check_device(op, {"bias"}, *bias, {"x"}, x);
}

void check_linear_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                           const at::Tensor& saved, LinearActivation activation,
                           at::ScalarType weight_dtype, std::optional<at::ScalarType> bias_dtype) {
  constexpr const char* kOp = "linear_backward";
  check_linear(kOp, x, weight, std::nullopt);
  check_operand(kOp, "dy", dy, "x", x);
  bool same = dy.dim() == x.dim() && dy.sym_size(-1) == weight.sym_size(0);
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = dy.sym_size(i) == x.sym_size(i);
  TORCH_CHECK(same, kOp, ": dy is ", shown(dy), " but x is ", shown(x), " and weight is ",
              shown(weight));
  if (activation != LinearActivation::kNone) {
    const bool mask = activation == LinearActivation::kRelu;
    const c10::SymInt columns = mask ? mask_bytes(weight.sym_size(0)) : weight.sym_size(0);
    TORCH_CHECK(saved.scalar_type() == (mask ? at::kByte : x.scalar_type()) && saved.dim() == 2 &&
                    saved.sym_size(0) == row_count(x) && saved.sym_size(1) == columns,
                kOp, ": saved is ", shown(saved), "; expected ", mask ? at::kByte : x.scalar_type(),
                "[", row_count(x), ", ", columns, "]");
    check_device(kOp, {"saved"}, saved, {"x"}, x);
  }
  TORCH_CHECK(weight_dtype == x.scalar_type() || weight_dtype == wide_type(x.scalar_type()), kOp,
              ": weight_dtype is ", weight_dtype, " but x is ", shown(x));
  TORCH_CHECK(
      !bias_dtype || *bias_dtype == x.scalar_type() || *bias_dtype == wide_type(x.scalar_type()),
      kOp, ": bias_dtype is ", *bias_dtype, " but x is ", shown(x));
}

void check_linear_wgrad(const at::Tensor& into, const at::Tensor& dz, const at::Tensor& x) {
  constexpr const char* kOp = "linear_wgrad_";
  TORCH_CHECK(is_supported_float(x.scalar_type()), kOp, ": x is ", shown(x),
              "; expected float16, bfloat16, float32 or float64");
  check_operand(kOp, "dz", dz, "x", x);
  bool same = x.dim() >= 1 && dz.dim() == x.dim();
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = dz.sym_size(i) == x.sym_size(i);
  TORCH_CHECK(same, kOp, ": dz is ", shown(dz), " but x is ", shown(x));
  TORCH_CHECK(into.scalar_type() == wide_type(x.scalar_type()) && into.dim() == 2 &&
                  into.sym_size(0) == dz.sym_size(-1) && into.sym_size(1) == x.sym_size(-1),
              kOp, ": into is ", shown(into), "; expected ", wide_type(x.scalar_type()), "[",
              dz.sym_size(-1), ", ", x.sym_size(-1), "]");
  check_device(kOp, {"into"}, into, {"x"}, x);
}

c10::SymInt row_count(const at::Tensor& x) {
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.sym_size(i);
  return rows;
}

at::Tensor empty_output(const at::Tensor& x, const at::Tensor& weight) {
  auto sizes = x.sym_sizes().vec();
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, x.options());
}

at::Tensor empty_saved(const at::Tensor& x, const at::Tensor& weight, LinearActivation activation) {
  const c10::SymInt columns = weight.sym_size(0);
  if (activation == LinearActivation::kNone) return at::empty({0}, x.options());
  if (activation == LinearActivation::kRelu)
    return at::empty_symint({row_count(x), mask_bytes(columns)}, x.options().dtype(at::kByte));
  return at::empty_symint({row_count(x), columns}, x.options());
}

Gradients empty_gradients(const at::Tensor& x, const at::Tensor& weight, std::array<bool, 3> wanted,
                          at::ScalarType weight_dtype, std::optional<at::ScalarType> bias_dtype) {
  const auto sized = [&](bool is_wanted, c10::SymIntArrayRef sizes, at::ScalarType type) {
    const auto options = x.options().dtype(type);
    return is_wanted ? at::empty_symint(sizes, options) : at::empty({0}, options);
  };
  const at::ScalarType bias_type = bias_dtype.value_or(x.scalar_type());
  return {sized(wanted[0], x.sym_sizes(), x.scalar_type()),
          sized(wanted[1], weight.sym_sizes(), weight_dtype),
          sized(wanted[2] && bias_dtype, weight.sym_sizes().slice(0, 1), bias_type)};
}

}  // namespace halfstep::ops
