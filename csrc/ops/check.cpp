#include "check.h"

#include <sstream>

#include "../math/grads.h"
#include "../math/scale.h"
#include "optim.h"

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
    case at::kChar:
      return "torch.int8";
    case at::kByte:
      return "torch.uint8";
    case at::kLong:
      return "torch.int64";
    default:
      return c10::toString(type);
  }
}

void check_dense(const char* op, Name name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.layout() == at::kStrided, op, ": ", name, " is sparse or of another layout (",
              tensor.layout(), "); only dense tensors are supported");
}

/// Data is addressed as one flat run, so it must be one.
void check_flat(const char* op, Name name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), op, ": ", name, " is ", describe(tensor),
              " with strides ", tensor.sym_strides(), ": its elements overlap or leave gaps");
}

void check_like(const char* op, Name name, const at::Tensor& tensor, Name reference_name,
                const at::Tensor& reference) {
  TORCH_CHECK(tensor.sym_sizes() == reference.sym_sizes(), op, ": ", name, " is ", describe(tensor),
              " but ", reference_name, " is ", describe(reference));
  check_device(op, name, tensor, reference_name, reference);
}

/// Whether shape, strides and device are alike, for the thousand tensors of which that is true;
/// false where sizes are symbols.
bool is_plainly_alike(const at::Tensor& tensor, const at::Tensor& reference) {
  const auto plain = [](const at::Tensor& t) {
    return !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  return plain(tensor) && plain(reference) && tensor.sizes() == reference.sizes() &&
         tensor.strides() == reference.strides() && tensor.device() == reference.device();
}

void check_like_flat(const char* op, Name name, const at::Tensor& tensor, Name reference_name,
                     const at::Tensor& reference) {
  if (is_plainly_alike(tensor, reference)) return;
  check_like(op, name, tensor, reference_name, reference);
  TORCH_CHECK(tensor.sym_strides() == reference.sym_strides() ||
                  (tensor.is_contiguous() && reference.is_contiguous()),
              op, ": ", name, " has strides ", tensor.sym_strides(), " but ", reference_name,
              " has ", reference.sym_strides());
}

bool has_elements(const at::Tensor& tensor) { return tensor.sym_numel() != 0; }

bool is_master(at::ScalarType type, at::ScalarType param) {
  if (type == at::kDouble) return param != at::kDouble;
  return is_sixteen(param) &&
         (type == at::kShort || type == at::kChar || type == at::kFloat || type == param);
}

bool is_coded(at::ScalarType type) { return type == at::kChar || type == at::kByte; }

c10::SymInt scale_count(const at::Tensor& state) {
  return (state.sym_numel() + (math::kStateBlock - 1)) / c10::SymInt(math::kStateBlock);
}

void check_scale(const char* op, Name name, const at::Tensor& scale, const at::Tensor& state) {
  TORCH_CHECK(scale.scalar_type() == at::kChar && scale.dim() == 1 && scale.is_contiguous() &&
                  scale.sym_size(0) == scale_count(state),
              op, ": ", name, " is ", describe(scale), " but the state is ", describe(state),
              "; expected contiguous torch.int8[", scale_count(state), "]");
}

}  // namespace

std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << dtype_name(tensor.scalar_type()) << tensor.sym_sizes();
  return text.str();
}

std::ostream& operator<<(std::ostream& out, Name name) {
  out << name.list;
  return name.index < 0 ? out : out << '[' << name.index << ']';
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
    const Name name = item("params", i);
    check_dense(op, name, param);
    TORCH_CHECK(is_supported_float(param.scalar_type()), op, ": ", name, " is ", describe(param),
                "; expected float16, bfloat16, float32 or float64");
    check_flat(op, name, param);
    check_device(op, name, param, item("params", 0), params[0]);
    if (!has_elements(master)) continue;
    const auto type = master.scalar_type();
    TORCH_CHECK(is_master(type, param.scalar_type()), op, ": ", item("masters", i), " is ",
                describe(master), " but ", name, " is ", describe(param),
                "; a master is int16, int8, float32 or of the parameter's dtype beside a 16-bit "
                "parameter, or float64 beside a narrower one");
    check_like_flat(op, item("masters", i), master, name, param);
  }
}

void check_state(const char* op, const at::Tensor& state, const at::Tensor& scale, bool is_signed) {
  const auto type = state.scalar_type();
  TORCH_CHECK(type == at::kBFloat16 || type == (is_signed ? at::kChar : at::kByte), op,
              ": state is ", describe(state), "; expected torch.bfloat16 or ",
              is_signed ? "torch.int8" : "torch.uint8");
  check_flat(op, {"state"}, state);
  if (is_coded(type)) {
    check_scale(op, {"scale"}, scale, state);
    check_device(op, {"scale"}, scale, {"state"}, state);
  }
}

void check_state_value(const at::Tensor& value, const at::Tensor& state) {
  TORCH_CHECK(value.scalar_type() == at::kFloat, "write_state_: value is ", describe(value),
              "; expected torch.float32");
  check_like("write_state_", {"value"}, value, {"state"}, state);
}

void check_counter(const char* op, const char* name, const at::Tensor& counter, size_t length,
                   at::TensorList params) {
  TORCH_CHECK(counter.scalar_type() == at::kLong && counter.dim() == 1 &&
                  counter.sym_size(0) == int64_t(length) && counter.is_contiguous(),
              op, ": ", name, " is ", describe(counter), " but params has ", length,
              " entries; expected contiguous torch.int64[", length, "]");
  if (!params.empty()) check_device(op, {name}, counter, item("params", 0), params[0]);
}

void check_scalar(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.sym_numel() == 1, op, ": ", name, " is ",
              describe(tensor), "; expected one element of ", dtype_name(type));
}

void check_device(const char* op, Name name, const at::Tensor& tensor, Name reference_name,
                  const at::Tensor& reference) {
  TORCH_CHECK(tensor.device() == reference.device(), op, ": ", name, " is on ", tensor.device(),
              " but ", reference_name, " is on ", reference.device());
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
    check_device(op, item("grads", i), *grad, {"the first gradient"}, *first);
  }
}

namespace {

void check_rows(const char* op, const at::Tensor& rows) {
  TORCH_CHECK(rows.scalar_type() == at::kDouble && rows.dim() == 2 &&
                  rows.sym_size(1) == math::kStatColumns && rows.is_contiguous(),
              op, ": rows is ", describe(rows), "; expected contiguous torch.float64[n, 8]");
}

}  // namespace

void check_stats_row(const at::Tensor& grad, const at::Tensor& rows, int64_t index) {
  const char* op = "grad_stats_row_";
  check_dense(op, {"grad"}, grad);
  TORCH_CHECK(is_supported_float(grad.scalar_type()), op, ": grad is ", describe(grad),
              "; expected float16, bfloat16, float32 or float64");
  check_rows(op, rows);
  check_device(op, {"rows"}, rows, {"grad"}, grad);
  TORCH_CHECK(index >= 0 && index < rows.size(0), op, ": index is ", index, " but rows is ",
              describe(rows));
}

void check_stats_rest(const c10::List<std::optional<at::Tensor>>& grads, const at::Tensor& rows,
                      at::IntArrayRef stale) {
  const char* op = "grad_stats_rest";
  check_grads(op, grads);
  check_rows(op, rows);
  TORCH_CHECK(rows.size(0) == int64_t(grads.size()), op, ": rows is ", describe(rows),
              " but grads has ", grads.size(), " entries");
  for (const int64_t i : stale)
    TORCH_CHECK(i >= 0 && i < rows.size(0), op, ": stale holds ", i, " but grads has ",
                grads.size(), " entries");
  for (size_t i = 0; i < grads.size(); ++i)
    if (const std::optional<at::Tensor> grad = grads[i]; grad && grad->defined())
      check_device(op, item("grads", i), *grad, {"rows"}, rows);
}

void check_histogram(const c10::List<std::optional<at::Tensor>>& grads,
                     const std::optional<at::Tensor>& scale) {
  const char* op = "grad_histogram";
  check_grads(op, grads);
  if (!scale) return;
  check_scalar(op, "scale", *scale, at::kFloat);
  for (size_t i = 0; i < grads.size(); ++i)
    if (const std::optional<at::Tensor> grad = grads[i]; grad && grad->defined())
      check_device(op, {"scale"}, *scale, item("grads", i), *grad);
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
    check_device(op, {"inv_scale"}, inv_scale, item("grads", i), grads[i]);
  }
  check_scalar(op, "inv_scale", inv_scale, at::kFloat);
  check_scalar(op, "found_inf", found_inf, at::kFloat);
  check_device(op, {"found_inf"}, found_inf, {"inv_scale"}, inv_scale);
}

void check_stats(const char* op, at::TensorList stats) {
  for (size_t i = 0; i < stats.size(); ++i)
    TORCH_CHECK(stats[i].scalar_type() == at::kDouble && stats[i].dim() == 2 &&
                    stats[i].sym_size(0) >= 1 && stats[i].sym_size(1) == math::kStatColumns &&
                    stats[i].is_contiguous(),
                op, ": ", item("stats", i), " is ", describe(stats[i]),
                "; expected torch.float64[n + 1, 8] of grad_stats");
}

void check_step_control(at::TensorList stats, const std::optional<at::Tensor>& scale,
                        const std::optional<at::Tensor>& found_inf,
                        const std::optional<at::Tensor>& clip) {
  check_stats("step_control", stats);
  if (scale) check_scalar("step_control", "scale", *scale, at::kFloat);
  if (found_inf) check_scalar("step_control", "found_inf", *found_inf, at::kFloat);
  if (clip)
    TORCH_CHECK(clip->sym_numel() == 1 &&
                    (clip->scalar_type() == at::kFloat || clip->scalar_type() == at::kDouble),
                "step_control: clip is ", describe(*clip),
                "; expected one element of torch.float32 or torch.float64");
  const at::Tensor* first = stats.empty() ? nullptr : &stats[0];
  const auto same_device = [&](Name name, const at::Tensor& tensor) {
    if (!first) first = &tensor;
    check_device("step_control", name, tensor, {"the first tensor"}, *first);
  };
  for (size_t i = 0; i < stats.size(); ++i) same_device(item("stats", i), stats[i]);
  if (scale) same_device({"scale"}, *scale);
  if (found_inf) same_device({"found_inf"}, *found_inf);
  if (clip) same_device({"clip"}, *clip);
}

void check_scale_vector(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kDouble && tensor.dim() == 1 &&
                  tensor.sym_size(0) == math::kStateEntries && tensor.is_contiguous(),
              op, ": ", name, " is ", describe(tensor), "; expected contiguous torch.float64[32]");
}

void check_update_scale(const char* op, const at::Tensor& scale, const at::Tensor& state,
                        const at::Tensor& found_inf, const at::Tensor& policy, at::TensorList stats,
                        const std::optional<at::Tensor>& proposal) {
  check_scalar(op, "scale", scale, at::kFloat);
  check_scale_vector(op, "state", state);
  TORCH_CHECK(found_inf.sym_numel() == 1 &&
                  (found_inf.scalar_type() == at::kFloat || found_inf.scalar_type() == at::kDouble),
              op, ": found_inf is ", describe(found_inf),
              "; expected one element of torch.float32 or torch.float64");
  check_scale_vector(op, "policy", policy);
  check_device(op, {"state"}, state, {"scale"}, scale);
  check_device(op, {"found_inf"}, found_inf, {"scale"}, scale);
  check_device(op, {"policy"}, policy, {"scale"}, scale);
  check_stats(op, stats);
  for (size_t i = 0; i < stats.size(); ++i)
    check_device(op, item("stats", i), stats[i], {"scale"}, scale);
  if (!proposal) return;
  TORCH_CHECK(proposal->sym_numel() == 1 &&
                  (proposal->scalar_type() == at::kFloat || proposal->scalar_type() == at::kDouble),
              op, ": proposal is ", describe(*proposal),
              "; expected one element of torch.float32 or torch.float64");
  check_device(op, {"proposal"}, *proposal, {"scale"}, scale);
}

void check_simulate_scale(const at::Tensor& found_inf, const at::Tensor& policy,
                          const at::Tensor& state) {
  TORCH_CHECK(
      found_inf.dim() == 1 && found_inf.scalar_type() == at::kFloat && found_inf.is_contiguous(),
      "simulate_scale: found_inf is ", describe(found_inf),
      "; expected contiguous torch.float32[T]");
  check_scale_vector("simulate_scale", "policy", policy);
  check_scale_vector("simulate_scale", "state", state);
  check_device("simulate_scale", {"policy"}, policy, {"found_inf"}, found_inf);
  check_device("simulate_scale", {"state"}, state, {"found_inf"}, found_inf);
}

/// lr and control, on the parameters' device.
void check_step_numbers(const char* op, const at::Tensor& lr,
                        const std::optional<at::Tensor>& control, at::TensorList params) {
  check_scalar(op, "lr", lr, at::kDouble);
  check_control(op, control);
  if (params.empty()) return;
  check_device(op, {"lr"}, lr, item("params", 0), params[0]);
  if (control) check_device(op, {"control"}, *control, item("params", 0), params[0]);
}

namespace {

void check_step_grads(const StepArgs& args) {
  const char* op = args.op;
  const bool zeroes = !args.zeroed.empty();
  const char* list = zeroes ? "zeroed" : "grads";
  TORCH_CHECK(!zeroes || args.grads.empty(), op, ": grads has ", args.grads.size(),
              " entries and zeroed has ", args.zeroed.size(), "; expected one of the two");
  check_same_length(op, list, zeroes ? args.zeroed.size() : args.grads.size(), "params",
                    args.params.size());
  for (size_t i = 0; i < args.params.size(); ++i) {
    const at::Tensor grad = args.grad(i);
    if (!grad.defined()) continue;
    check_dense(op, item(list, i), grad);
    TORCH_CHECK(is_supported_float(grad.scalar_type()), op, ": ", item(list, i), " is ",
                describe(grad), "; expected float16, bfloat16, float32 or float64");
    if (!is_plainly_alike(grad, args.params[i]))
      check_like(op, item(list, i), grad, item("params", i), args.params[i]);
  }
}

/// State `s` of parameter `i`; a parameter without a gradient is not touched, so it may be empty.
void check_step_state(const StepArgs& args, const RuleInfo& info, size_t s, size_t i) {
  const size_t n = args.params.size();
  const at::Tensor &param = args.params[i], &state = args.states[s * n + i];
  const Name name = item(info.names[s], i);
  if (!has_elements(state) && !args.grad(i).defined()) return;
  const auto type = compute_type(param, args.masters[i]), held = state.scalar_type();
  if (s >= size_t(info.elementwise)) {
    TORCH_CHECK(held == type && state.sym_numel() == 1, args.op, ": ", name, " is ",
                describe(state), "; expected one element of ", dtype_name(type));
    return check_device(args.op, name, state, item("params", i), param);
  }
  const bool narrow = type == at::kFloat && (held == at::kBFloat16 || is_coded(held));
  TORCH_CHECK(held == type || narrow, args.op, ": ", name, " is ", describe(state), " but ",
              item("params", i), " (", describe(param), ") is updated in ", dtype_name(type));
  TORCH_CHECK(held == args.states[i].scalar_type() || (is_coded(held) && narrow), args.op, ": ",
              name, " is ", describe(state), " but ", item(info.names[0], i), " is ",
              describe(args.states[i]), "; the states of a parameter are held alike");
  check_like_flat(args.op, name, state, item("params", i), param);
  if (is_coded(held)) {
    TORCH_CHECK(has_scales(args, info), args.op, ": ", name, " is ", describe(state),
                " but states has no scales after it");
    const size_t row = size_t(info.elementwise + info.per_tensor) + s;
    check_scale(args.op, name, args.states[row * n + i], state);
  }
}

void check_step_states(const StepArgs& args, const RuleInfo& info) {
  const size_t n = args.params.size(), rows = size_t(info.elementwise + info.per_tensor);
  if (n == 0) return;
  TORCH_CHECK(
      args.states.size() == rows * n || args.states.size() == (rows + size_t(info.elementwise)) * n,
      args.op, ": states has ", args.states.size(), " entries but params has ", n, "; expected ",
      rows, " states a parameter, and for int8 states ", info.elementwise, " scales");
  for (size_t s = 0; s < rows; ++s)
    for (size_t i = 0; i < n; ++i) check_step_state(args, info, s, i);
}

}  // namespace

void check_step(const StepArgs& args, const RuleInfo& info) {
  const char* op = args.op;
  check_masters(op, args.params, args.masters);
  check_step_grads(args);
  check_step_states(args, info);
  if (!args.emas.empty()) {
    check_same_length(op, "emas", args.emas.size(), "params", args.params.size());
    TORCH_CHECK(args.ema_decay >= 0 && args.ema_decay <= 1, op, ": ema_decay is ", args.ema_decay,
                "; expected between 0 and 1");
    for (size_t i = 0; i < args.emas.size(); ++i) {
      if (!has_elements(args.emas[i]) && !args.grad(i).defined()) continue;
      const auto type = compute_type(args.params[i], args.masters[i]);
      TORCH_CHECK(args.emas[i].scalar_type() == type, op, ": ", item("emas", i), " is ",
                  describe(args.emas[i]), "; expected ", dtype_name(type));
      check_like_flat(op, item("emas", i), args.emas[i], item("params", i), args.params[i]);
    }
  }
  check_counter(op, "steps", args.steps, args.params.size(), args.params);
  check_counter(op, "overflowed", args.overflowed, args.params.size(), args.params);
  check_step_numbers(op, args.lr, args.control, args.params);
}

void check_write_masters(at::TensorList values, at::TensorList params, at::TensorList masters,
                         const at::Tensor& overflowed) {
  check_values("write_masters_", values, params, masters);
  check_counter("write_masters_", "overflowed", overflowed, params.size(), params);
}

void check_refresh_masters(at::TensorList params, at::TensorList masters,
                           const at::Tensor& changed) {
  check_masters("refresh_masters_", params, masters);
  check_counter("refresh_masters_", "changed", changed, params.size(), params);
}

void check_table(const char* op, at::TensorList table, const at::Tensor& reference, size_t rows,
                 size_t row_bytes) {
  if (table.empty()) return;
  TORCH_CHECK(table.size() == 2, op, ": table has ", table.size(),
              " entries; expected none, or device bytes and their CPU mirror");
  for (size_t i = 0; i < 2; ++i) {
    TORCH_CHECK(table[i].scalar_type() == at::kByte && table[i].is_contiguous() &&
                    table[i].numel() >= int64_t(rows * row_bytes),
                op, ": ", item("table", i), " is ", describe(table[i]), " but ", rows,
                " tensors need ", rows * row_bytes, " contiguous bytes of torch.uint8");
  }
  check_device(op, item("table", 0), table[0], {"the first tensor"}, reference);
  TORCH_CHECK(table[1].device().is_cpu(), op, ": table[1] is on ", table[1].device(),
              "; expected the CPU");
}

}  // namespace halfstep::ops
