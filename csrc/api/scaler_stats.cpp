// What the scaler knows of its steps, without waiting for a device.

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cmath>

#include "scaler_state.h"

namespace halfstep {

GradStats GradScaler::State::stats_of(torch::optim::Optimizer& optimizer) const {
  std::map<int, api::OptionalTensors> devices;
  for (auto& group : optimizer.param_groups())
    for (auto& param : group.params())
      if (param.grad().defined()) {
        const auto device = param.grad().device();
        devices[device.has_index() ? device.index() : -1].push_back(values_of(param.grad()));
      }
  GradStats stats;
  for (auto& [index, grads] : devices)
    stats.emplace_back(nullptr, api::grad_stats(grads).to(scale.device()));
  return stats;
}

void GradScaler::State::record(const GradStats& stats, const at::Tensor& control) {
  norms.push_back(control[math::kControlNorm].to(scale.device()));
  for (const auto& [room, table] : stats) {
    rows.emplace_back(table.select(0, -1).to(scale.device()),
                      room ? room->names : std::vector<std::string>());
    if (room) overflowed.push_back(room->overflowed.sum().to(scale.device()));
  }
}

void GradScaler::State::take_snapshot() {
  Snapshot snapshot;
  std::vector<at::Tensor> parts = {numbers};
  parts.push_back(norms.empty() ? at::full({1}, std::nan(""), numbers.options())
                                : at::linalg_vector_norm(at::stack(norms)).reshape({1}));
  parts.push_back(overflowed.empty() ? at::zeros({1}, numbers.options())
                                     : at::stack(overflowed).sum().to(at::kDouble).reshape({1}));
  for (const auto& [row, names] : rows) {
    parts.push_back(row);
    snapshot.names.push_back(names);
  }
  snapshot.updates = updates;
  const at::Tensor here = at::cat(parts);
  if (here.is_cpu()) {
    snapshot.numbers = here;
    snapshots.clear();
    watch_zeros(here);
  } else {
    // A pageable target would make the copy wait; the event says when the pinned one is filled.
    snapshot.numbers = at::empty(here.sizes(), at::TensorOptions(at::kDouble).pinned_memory(true));
    snapshot.numbers.copy_(here, /*non_blocking=*/true);
    const c10::impl::VirtualGuardImpl device(here.device().type());
    snapshot.copied.emplace(here.device().type());
    snapshot.copied->record(device.getStream(here.device()));
    while (snapshots.size() >= 16) snapshots.pop_front();
  }
  snapshots.push_back(std::move(snapshot));
}

void GradScaler::State::show_loaded() {
  Snapshot snapshot;
  snapshot.updates = updates;
  snapshot.numbers = at::cat(
      {loaded, at::full({1}, std::nan(""), loaded.options()), at::zeros({1}, loaded.options())});
  snapshots.clear();
  snapshots.push_back(std::move(snapshot));
}

/// torch's own clip_grad_norm_ on scaled FP16 gradients has an infinite norm and leaves zeros.
void GradScaler::State::watch_zeros(const at::Tensor& here) {
  const double* x = here.const_data_ptr<double>();
  double zeros = 0, elements = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const double* row = x + Snapshot::kRows + int64_t(i) * math::kStatColumns;
    zeros += row[math::kStatZeros];
    elements += row[math::kStatCount];
  }
  zero_steps = elements > 0 && zeros == elements ? zero_steps + 1 : 0;
  if (zero_steps == 2)
    TORCH_WARN(
        "all gradients were exactly zero in two steps running: were scaled FP16 gradients "
        "clipped? use scaler.clip_grad_norm_");
}

bool GradScaler::step_was_skipped() const {
  for (const auto& [key, found] : state_->last_found)
    if (found.item<float>() != 0) return true;
  return false;
}

bool GradScaler::step_was_skipped(const torch::optim::Optimizer& optimizer) const {
  const auto found = state_->last_found.find(&optimizer);
  return found != state_->last_found.end() && found->second.item<float>() != 0;
}

ScalerStats GradScaler::stats() const {
  const State& s = *state_;
  const Snapshot* newest = nullptr;
  for (const Snapshot& snapshot : s.snapshots)  // a stream finishes them in their order
    if (!snapshot.copied || snapshot.copied->query()) newest = &snapshot;
  if (newest) return s.describe(*newest);
  ScalerStats out;
  const bool readable = s.enabled && s.scale.defined() && s.scale.is_cpu();
  out.scale = readable ? s.scale.item<float>() : s.rule.numbers[math::kPolicyInitScale];
  out.grad_norm = std::nan("");
  return out;
}

ScalerStats GradScaler::State::describe(const Snapshot& snapshot) const {
  ScalerStats out;
  const double* x = snapshot.numbers.const_data_ptr<double>();
  out.step = snapshot.updates;
  out.scale = x[math::kStateScale];
  out.clean_steps = int64_t(x[math::kStateCleanSteps]);
  out.steps_applied = int64_t(x[math::kStateStepsApplied]);
  out.steps_skipped = int64_t(x[math::kStateStepsSkipped]);
  out.consecutive_skips = int64_t(x[math::kStateConsecutiveSkips]);
  out.last_found_inf = x[math::kStateLastFoundInf] != 0;
  out.grad_norm = x[Snapshot::kNorm];
  out.overflowed = int64_t(x[Snapshot::kOverflowed]);
  double zeros = 0, subnormals = 0, elements = 0;
  for (size_t i = 0; i < snapshot.names.size(); ++i) {
    const double* row = x + Snapshot::kRows + int64_t(i) * math::kStatColumns;
    zeros += row[math::kStatZeros];
    subnormals += row[math::kStatSubnormals];
    elements += row[math::kStatCount];
    out.amax = math::BlockStats::larger(out.amax, row[math::kStatAmax]);
    const auto bad = int64_t(row[math::kStatFirstBad]);
    if (bad < 0 || !out.first_bad_param.empty()) continue;
    const auto& names = snapshot.names[i];
    out.first_bad_param =
        size_t(bad) < names.size() ? names[size_t(bad)] : "parameter " + std::to_string(bad);
  }
  out.zero_share = elements > 0 ? zeros / elements : 0;
  out.subnormal_share = elements > zeros ? subnormals / (elements - zeros) : 0;
  return out;
}

}  // namespace halfstep
