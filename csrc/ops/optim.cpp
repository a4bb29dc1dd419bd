#include <ATen/autocast_mode.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <string>

#include "gather.h"

// One step of an optimizer over all parameters of a group, and the conversions between exact
// weights and what is held for them. Update rules: csrc/math/optim.h; split16: csrc/math/split16.h.
//
// Common to the steps. Lists have one entry a parameter; grads[i] None: the parameter is not
// touched. masters[i]: empty (none), int16 (split16), int8 (split8), the parameter's own 16-bit
// dtype (kahan), or float32/float64. states: state-major in one list; in the compute type (float32,
// or float64 where the parameter or its master is), bfloat16, or int8 (second moments uint8) with
// the scales after all states, int8 [ceil(numel / 128)]. emas: [] or running means in the compute
// type, ema += (1 - ema_decay) * (p - ema). zeroed: [] or, instead of grads, gradients that are
// zeroed in the same pass, on a skipped step too; an empty tensor is none. steps, overflowed: int64
// [n]; lr: one float64; control: float64 [4] of step_control, None to apply the gradients as they
// are. With control[0] != 0 nothing but `zeroed` is written. stochastic: 16-bit parameters without
// a master are rounded at random; seed: of that and of the rounding of narrow states.

namespace halfstep::ops {

namespace {

constexpr const char* kFrame =
    "(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] masters, Tensor(c!)[] states, "
    "Tensor(d!)[] emas, Tensor(e!)[] zeroed, Tensor(f!) steps, Tensor(g!) overflowed, Tensor lr, "
    "Tensor? control, Tensor(t!)[] table, *, float ema_decay, bool stochastic, int seed, ";

constexpr const char* kSchemas[] = {
    // values (any float dtype) -> weights and masters; overflowed[i] counts the elements that do
    // not fit the 16-bit range, which keep what they were.
    "write_masters_(Tensor[] values, Tensor(a!)[] params, Tensor(b!)[] masters, "
    "Tensor(c!) overflowed) -> ()",
    // The exact weights in the compute type.
    "read_masters(Tensor[] params, Tensor[] masters) -> Tensor[]",
    // float32 values of a bfloat16 or int8 state: `scale` as in a step, or an empty tensor.
    // is_signed:
    // a momentum, not a second moment.
    "read_state(Tensor state, Tensor scale, bool is_signed) -> Tensor",
    "write_state_(Tensor value, Tensor(a!) state, Tensor(b!) scale, bool is_signed, int seed) -> "
    "()",
    // Masters that do not round to their weight take the weight's value; changed[i] counts them.
    // dry_run counts only.
    "refresh_masters_(Tensor[] params, Tensor(a!)[] masters, Tensor(b!) changed, bool dry_run) -> "
    "()",
    // Stands in a graph before an op that writes the tensors, and writes nothing: inductor of torch
    // 2.11 schedules a pointwise value that reads them, but is not stored yet, behind the op that
    // makes it store the value, which would read what was written. Behind this one it reads the
    // same. And the thread forgets its autocast casts, which the op behind makes out of date.
    "fence_(Tensor(a!)[] tensors) -> ()",
};

void fence_(at::TensorList) { at::autocast::clear_cache(); }

struct Nothing {
  template <class Rule>
  static void run(const StepArgs&, const RuleInfo&, const typename Rule::Numbers&) {}
};

void write_masters_meta(at::TensorList values, at::TensorList params, at::TensorList masters,
                        const at::Tensor& overflowed) {
  check_write_masters(values, params, masters, overflowed);
}

std::vector<at::Tensor> read_masters_meta(at::TensorList params, at::TensorList masters) {
  check_masters("read_masters", params, masters);
  return empty_values(params, masters);
}

void refresh_masters_meta(at::TensorList params, at::TensorList masters, const at::Tensor& changed,
                          bool) {
  check_refresh_masters(params, masters, changed);
}

at::Tensor read_state_meta(const at::Tensor& state, const at::Tensor& scale, bool is_signed) {
  check_state("read_state", state, scale, is_signed);
  return at::empty_like(state, state.options().dtype(at::kFloat));
}

void write_state_meta(const at::Tensor& value, const at::Tensor& state, const at::Tensor& scale,
                      bool is_signed, int64_t) {
  check_state("write_state_", state, scale, is_signed);
  check_state_value(value, state);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
  for_each_step_op([&](auto op) {
    using Op = decltype(op);
    const std::string schema = std::string(Op::kName) + kFrame + Op::kSchema + ") -> ()";
    m.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  });
}

TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  register_steps<Nothing>(m);
  m.impl("write_masters_", write_masters_meta);
  m.impl("read_masters", read_masters_meta);
  m.impl("refresh_masters_", refresh_masters_meta);
  m.impl("read_state", read_state_meta);
  m.impl("write_state_", write_state_meta);
}

TORCH_LIBRARY_IMPL(halfstep, CompositeExplicitAutograd, m) { m.impl("fence_", fence_); }

// A sparse argument is refused by its name and index, by the same checks, not by the dispatcher.
TORCH_LIBRARY_IMPL(halfstep, SparseCPU, m) { register_steps<Nothing>(m); }
TORCH_LIBRARY_IMPL(halfstep, SparseCUDA, m) { register_steps<Nothing>(m); }

}  // namespace halfstep::ops
