#include "check.h"

namespace halfstep::ops {

namespace {

const char* dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return "torch.float16";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kFloat:
      return "torch.float32";
    case at::kDouble:
      return "torch.float64";
    case at::kShort:
      return "torch.int16";
    case at::kLong:
      return "torch.int64";
    default:
      return c10::toString(type);
  }
}

bool is_sixteen(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

void check_dense(const char* op, const std::string& name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.layout() == at::kStrided, op, ": ", name, " is sparse or of another layout (",
              tensor.layout(), "); only dense tensors are supported");
}

/// Data is addressed as one flat run, so it must be one.
void check_flat(const char* op, const std::string& name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), op, ": ", name, " is ", describe(tensor),
              " with strides ", tensor.sym_strides(), ": its elements overlap or leave gaps");
}

void check_like(const char* op, const std::string& name, const at::Tensor& tensor,
                const std::string& reference_name, const at::Tensor& reference) {
  TORCH_CHECK(tensor.sym_sizes() == reference.sym_sizes(), op, ": ", name, " is ", describe(tensor),
              " but ", reference_name, " is ", describe(reference));
  TORCH_CHECK(tensor.device() == reference.device(), op, ": ", name, " is on ", tensor.device(),
              " but ", reference_name, " is on ", reference.device());
}

void check_like_flat(const char* op, const std::string& name, const at::Tensor& tensor,
                     const std::string& reference_name, const at::Tensor& reference) {
  check_like(op, name, tensor, reference_name, reference);
  TORCH_CHECK(tensor.sym_strides() == reference.sym_strides() ||
                  (tensor.is_contiguous() && reference.is_contiguous()),
              op, ": ", name, " has strides ", tensor.sym_strides(), " but ", reference_name,
              " has ", reference.sym_strides());
}

bool has_elements(const at::Tensor& tensor) { return tensor.sym_numel() != 0; }

}  // namespace

std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << dtype_name(tensor.scalar_type()) << tensor.sym_sizes();
  return text.str();
}

std::string item(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

bool is_supported_float(at::ScalarType type) {
  return is_sixteen(type) || type == at::kFloat || type == at::kDouble;
}

at::ScalarType compute_type(const at::Tensor& param, const at::Tensor& master) {
  // An empty master means none, unless the parameter is empty too.
  const bool present = has_elements(master) || !has_elements(param);
  const bool wide =
      param.scalar_type() == at::kDouble || (present && master.scalar_type() == at::kDouble);
  return wide ? at::kDouble : at::kFloat;
}

void check_same_length(const char* op, const char* list, size_t length, const char* reference,
                       size_t expected) {
  TORCH_CHECK(length == expected, op, ": ", list, " has ", length, " entries but ", reference,
              " has ", expected);
}

void check_masters(const char* op, at::TensorList params, at::TensorList masters) {
  check_same_length(op, "masters", masters.size(), "params", params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const auto& param = params[i];
    const auto& master = masters[i];
    const std::string name = item("params", i);
    check_dense(op, name, param);
    TORCH_CHECK(is_supported_float(param.scalar_type()), op, ": ", name, " is ", describe(param),
                "; expected float16, bfloat16, float32 or float64");
    check_flat(op, name, param);
    TORCH_CHECK(param.device() == params[0].device(), op, ": ", name, " is on ", param.device(),
                " but params[0] is on ", params[0].device());
    if (!has_elements(master)) continue;
    const auto type = master.scalar_type();
    const bool fits = type == at::kShort || type == at::kFloat ? is_sixteen(param.scalar_type())
                      : type == at::kDouble                    ? param.scalar_type() != at::kDouble
                                                               : false;
    TORCH_CHECK(fits, op, ": ", item("masters", i), " is ", describe(master), " but ", name, " is ",
                describe(param),
                "; a master is int16 or float32 beside a 16-bit parameter, or float64 beside a "
                "narrower one");
    check_like_flat(op, item("masters", i), master, name, param);
  }
}

void check_step_lists(const StepLists& lists) {
  const char* op = lists.op;
  check_same_length(op, "grads", lists.grads.size(), "params", lists.params.size());
  check_masters(op, lists.params, lists.masters);
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const std::optional<at::Tensor> grad = lists.grads[i];
    if (!grad || !grad->defined()) continue;
    check_dense(op, item("grads", i), *grad);
    TORCH_CHECK(is_supported_float(grad->scalar_type()), op, ": ", item("grads", i), " is ",
                describe(*grad), "; expected float16, bfloat16, float32 or float64");
    check_like(op, item("grads", i), *grad, item("params", i), lists.params[i]);
  }
}

void check_states(const char* op, const char* list, at::TensorList states, at::TensorList params,
                  at::TensorList masters) {
  check_same_length(op, list, states.size(), "params", params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const auto type = compute_type(params[i], masters[i]);
    TORCH_CHECK(states[i].scalar_type() == type, op, ": ", item(list, i), " is ",
                describe(states[i]), " but ", item("params", i), " (", describe(params[i]),
                ") is updated in ", dtype_name(type));
    check_like_flat(op, item(list, i), states[i], item("params", i), params[i]);
  }
}

void check_counter(const char* op, const char* name, const at::Tensor& counter, size_t length,
                   at::TensorList params) {
  TORCH_CHECK(counter.scalar_type() == at::kLong && counter.dim() == 1 &&
                  counter.sym_size(0) == int64_t(length) && counter.is_contiguous(),
              op, ": ", name, " is ", describe(counter), " but params has ", length,
              " entries; expected contiguous torch.int64[", length, "]");
  TORCH_CHECK(params.empty() || counter.device() == params[0].device(), op, ": ", name, " is on ",
              counter.device(), " but params[0] is on ", params[0].device());
}

void check_scalar(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.sym_numel() == 1, op, ": ", name, " is ",
              describe(tensor), "; expected one element of ", dtype_name(type));
}

void check_control(const char* op, const std::optional<at::Tensor>& control) {
  if (!control) return;
  TORCH_CHECK(control->scalar_type() == at::kDouble && control->sym_numel() == 4 &&
                  control->is_contiguous(),
              op, ": control is ", describe(*control),
              "; expected torch.float64[4] of step_control");
}

void check_values(const char* op, at::TensorList values, at::TensorList params,
                  at::TensorList masters) {
  check_same_length(op, "values", values.size(), "params", params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(is_supported_float(values[i].scalar_type()), op, ": ", item("values", i), " is ",
                describe(values[i]), "; expected a floating dtype");
    check_like(op, item("values", i), values[i], item("params", i), params[i]);
  }
  check_masters(op, params, masters);
}

void check_grads(const char* op, const c10::List<std::optional<at::Tensor>>& grads) {
  std::optional<at::Tensor> first;
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::optional<at::Tensor> grad = grads[i];
    if (!grad || !grad->defined()) continue;
    check_dense(op, item("grads", i), *grad);
    TORCH_CHECK(is_supported_float(grad->scalar_type()), op, ": ", item("grads", i), " is ",
                describe(*grad), "; expected float16, bfloat16, float32 or float64");
    if (!first) first = grad;
    TORCH_CHECK(grad->device() == first->device(), op, ": ", item("grads", i), " is on ",
                grad->device(), " but the first gradient is on ", first->device());
  }
}

void check_unscale(const char* op, at::TensorList grads, at::TensorList outputs,
                   const at::Tensor& inv_scale, const at::Tensor& found_inf) {
  check_same_length(op, "outputs", outputs.size(), "grads", grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    check_dense(op, item("grads", i), grads[i]);
    for (const auto* tensor : {&grads[i], &outputs[i]})
      TORCH_CHECK(is_supported_float(tensor->scalar_type()), op, ": ",
                  item(tensor == &grads[i] ? "grads" : "outputs", i), " is ", describe(*tensor),
                  "; expected float16, bfloat16, float32 or float64");
    check_like(op, item("outputs", i), outputs[i], item("grads", i), grads[i]);
    check_flat(op, item("outputs", i), outputs[i]);
    TORCH_CHECK(grads[i].device() == inv_scale.device(), op, ": inv_scale is on ",
                inv_scale.device(), " but ", item("grads", i), " is on ", grads[i].device());
  }
  check_scalar(op, "inv_scale", inv_scale, at::kFloat);
  check_scalar(op, "found_inf", found_inf, at::kFloat);
}

}  // namespace halfstep::ops
