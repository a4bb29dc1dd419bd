#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "gather.h"

// One step of an optimizer over all parameters of a group, and the conversions between exact
// weights and what is held for them. Update rules: csrc/math/optim.h; split16: csrc/math/split16.h.
//
// Common to the steps. Lists have one entry a parameter; grads[i] None: the parameter is not
// touched; masters[i]: empty (none), int16 (split16) or float32/float64. States are in the compute
// type: float32, or float64 where the parameter or its master is. steps, overflowed: int64 [n]; lr:
// one float64; control: float64 [4] of step_control, None to apply the gradients as they are. With
// control[0] != 0 nothing is written at all.

namespace halfstep::ops {

namespace {

constexpr const char* kSchemas[] = {
    "adamw_step_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] masters, "
    "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, "
    "Tensor(f!) steps, Tensor(g!) overflowed, Tensor lr, Tensor? control, Tensor(t!)[] table, *, "
    "float beta1, float beta2, float eps, float weight_decay, bool amsgrad, bool maximize) -> ()",
    "adam_step_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] masters, "
    "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, "
    "Tensor(f!) steps, Tensor(g!) overflowed, Tensor lr, Tensor? control, Tensor(t!)[] table, *, "
    "float beta1, float beta2, float eps, float weight_decay, bool amsgrad, bool maximize) -> ()",
    "sgd_step_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] masters, "
    "Tensor(c!)[] momentum_buffers, Tensor(d!) steps, Tensor(e!) overflowed, Tensor lr, "
    "Tensor? control, Tensor(t!)[] table, *, float momentum, float dampening, float weight_decay, "
    "bool nesterov, bool maximize) -> ()",
    // values (any float dtype) -> weights and masters; overflowed[i] counts the elements that do
    // not fit the 16-bit range, which keep what they were.
    "write_masters_(Tensor[] values, Tensor(a!)[] params, Tensor(b!)[] masters, "
    "Tensor(c!) overflowed) -> ()",
    // The exact weights in the compute type.
    "read_masters(Tensor[] params, Tensor[] masters) -> Tensor[]",
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

void nothing_adam(const char*, bool, const AdamArgs&) {}
void nothing_sgd(const SgdArgs&) {}

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

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  m.impl("adamw_step_", adam_op<nothing_adam, true>);
  m.impl("adam_step_", adam_op<nothing_adam, false>);
  m.impl("sgd_step_", sgd_op<nothing_sgd>);
  m.impl("write_masters_", write_masters_meta);
  m.impl("read_masters", read_masters_meta);
  m.impl("refresh_masters_", refresh_masters_meta);
}

TORCH_LIBRARY_IMPL(halfstep, CompositeExplicitAutograd, m) { m.impl("fence_", fence_); }

// A sparse argument is refused by its name and index, by the same checks, not by the dispatcher.
void refuse_sparse(torch::Library& m) {
  m.impl("adamw_step_", adam_op<nothing_adam, true>);
  m.impl("adam_step_", adam_op<nothing_adam, false>);
  m.impl("sgd_step_", sgd_op<nothing_sgd>);
}
TORCH_LIBRARY_IMPL(halfstep, SparseCPU, m) { refuse_sparse(m); }
TORCH_LIBRARY_IMPL(halfstep, SparseCUDA, m) { refuse_sparse(m); }

}  // namespace halfstep::ops
