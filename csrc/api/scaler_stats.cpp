// What the scaler knows of its steps, without waiting for a device.

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
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
  const at::Tensor here = control.to(scale.device());
  norms.push_back(here[math::kControlNorm]);
  controls.push_back(here);
  for (const auto& [room, table] : stats) {
    rows.push_back({table.to(scale.device()), room ? room->names : std::vector<std::string>(),
                    int64_t(controls.size()) - 1});
    if (room) overflowed.push_back(room->overflowed.sum().to(scale.device()));
  }
}

const double* Snapshot::rows(size_t i) const {
  if (!copied) return tables[i].table.const_data_ptr<double>();
  int64_t at = kControls + steps * math::kControlEntries;
  for (size_t t = 0; t < i; ++t) at += tables[t].table.numel();
  return numbers.const_data_ptr<double>() + at;
}

Arrival send(const at::Tensor& numbers) {
  if (numbers.is_cpu()) return {numbers, std::nullopt};
  // A pageable target would make the copy wait; the event says when the pinned one is filled.
  Arrival sent{at::empty(numbers.sizes(), numbers.options().device(at::kCPU).pinned_memory(true)),
               c10::Event(numbers.device().type())};
  sent.numbers.copy_(numbers, /*non_blocking=*/true);
  const c10::impl::VirtualGuardImpl device(numbers.device().type());
  sent.copied->record(device.getStream(numbers.device()));
  return sent;
}

void GradScaler::State::take_snapshot() {
  Snapshot snapshot;
  snapshot.updates = updates;
  snapshot.floor = std::max(rule.numbers[math::kPolicyMinScale], math::kLowestScale);
  snapshot.steps = int64_t(controls.size());
  snapshot.tables = rows;
  std::vector<at::Tensor> parts = {numbers};
  parts.push_back(norms.empty() ? at::full({1}, std::nan(""), numbers.options())
                                : at::linalg_vector_norm(at::stack(norms)).reshape({1}));
  parts.push_back(overflowed.empty() ? at::zeros({1}, numbers.options())
                                     : at::stack(overflowed).sum().to(at::kDouble).reshape({1}));
  parts.push_back(loss);
  parts.insert(parts.end(), controls.begin(), controls.end());
  const bool on_cpu = numbers.is_cpu();
  if (!on_cpu)
    for (const auto& entry : rows) parts.push_back(entry.table.reshape({-1}));
  static_cast<Arrival&>(snapshot) = send(at::cat(parts));
  if (on_cpu) {
    snapshots.clear();
    watch_zeros(snapshot);
  } else {
    while (snapshots.size() >= 16) snapshots.pop_front();
  }
  snapshots.push_back(std::move(snapshot));
  if (on_cpu) diagnose(snapshots.back());
}

void GradScaler::State::show_loaded() {
  Snapshot snapshot;
  snapshot.updates = updates;
  snapshot.numbers = at::cat(
      {loaded, at::full({1}, std::nan(""), loaded.options()), at::zeros({2}, loaded.options())});
  snapshots.clear();
  snapshots.push_back(std::move(snapshot));
}

/// torch's own clip_grad_norm_ on scaled FP16 gradients has an infinite norm and leaves zeros.
void GradScaler::State::watch_zeros(const Snapshot& snapshot) {
  double zeros = 0, elements = 0;
  for (size_t i = 0; i < snapshot.tables.size(); ++i) {
    zeros += snapshot.totals(i)[math::kStatZeros];
    elements += snapshot.totals(i)[math::kStatCount];
  }
  zero_steps = elements > 0 && zeros == elements ? zero_steps + 1 : 0;
  if (zero_steps == 2)
    TORCH_WARN(
        "all gradients were exactly zero in two steps running: were scaled FP16 gradients "
        "clipped? use scaler.clip_grad_norm_");
}

namespace {

std::string name_at(const StatTable& table, size_t row) {
  return row < table.names.size() ? table.names[row] : "parameter " + std::to_string(row);
}

/// The first parameter with a non-finite gradient, or empty.
std::string first_bad(const Snapshot& snapshot) {
  for (size_t i = 0; i < snapshot.tables.size(); ++i) {
    const auto bad = int64_t(snapshot.totals(i)[math::kStatFirstBad]);
    if (bad >= 0) return name_at(snapshot.tables[i], size_t(bad));
  }
  return {};
}

constexpr double kStuck = 20;        ///< skips in a row before a diagnosis
constexpr double kStuckAtFloor = 3;  ///< and where the scale can fall no further

void warn_stuck(const std::string& diagnosis, double skips, double scale, const std::string& name) {
  const std::string start = std::to_string(int64_t(skips)) + " steps in a row were skipped ";
  if (diagnosis == "loss is not finite") {
    TORCH_WARN(
        start,
        "and the loss itself is inf or NaN, which no scale can mend: look at the inputs, the "
        "forward pass and the weights, or go back to a checkpoint");
  } else if (diagnosis == "gradients overflow") {
    TORCH_WARN(start, "though the loss is finite: gradients overflow at scale ", scale, ", '", name,
               "' first. A fixed scale must be lower; under another policy keep that layer in "
               "FP32, or look for an inf that its backward makes");
  } else {
    TORCH_WARN(start, "and the scale is at its floor ", scale,
               ": gradients overflow whatever the scale, '", name,
               "' first. Keep that layer in FP32, look for an inf that its backward makes, or "
               "lower the policy's min_scale");
  }
}

}  // namespace

std::string GradScaler::State::diagnose(const Snapshot& snapshot) const {
  const double* x = snapshot.numbers.const_data_ptr<double>();
  const double skips = x[math::kStateConsecutiveSkips], at = x[math::kStateScale];
  const bool at_floor = at <= snapshot.floor;
  std::string diagnosis;
  if (x[math::kStateLastFoundInf] != 0 && skips >= (at_floor ? kStuckAtFloor : kStuck))
    diagnosis = !std::isfinite(x[Snapshot::kLoss]) ? "loss is not finite"
                : at_floor                         ? "scale is at its floor"
                                                   : "gradients overflow";
  if (!diagnosis.empty() && !told_stuck) warn_stuck(diagnosis, skips, at, first_bad(snapshot));
  told_stuck = !diagnosis.empty();
  return diagnosis;
}

const Snapshot* GradScaler::State::newest() const {
  const Snapshot* newest = nullptr;
  for (const Snapshot& snapshot : snapshots)  // a stream finishes them in their order
    if (snapshot.here()) newest = &snapshot;
  return newest;
}

ScalerStats GradScaler::stats(int64_t which) const {
  const State& s = state_->entry("stats", which);
  if (const Snapshot* newest = s.newest()) return s.describe(*newest);
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
  for (size_t i = 0; i < snapshot.tables.size(); ++i) {
    const double* row = snapshot.totals(i);
    zeros += row[math::kStatZeros];
    subnormals += row[math::kStatSubnormals];
    elements += row[math::kStatCount];
    out.amax = math::BlockStats::larger(out.amax, row[math::kStatAmax]);
  }
  out.first_bad_param = first_bad(snapshot);
  out.zero_share = elements > 0 ? zeros / elements : 0;
  out.subnormal_share = elements > zeros ? subnormals / (elements - zeros) : 0;
  if (!snapshot.tables.empty()) out.diagnosis = diagnose(snapshot);
  return out;
}

std::map<std::string, TensorStats> GradScaler::tensor_stats(int64_t which) const {
  std::map<std::string, TensorStats> out;
  const Snapshot* newest = state_->entry("tensor_stats", which).newest();
  if (!newest) return out;
  const double* x = newest->numbers.const_data_ptr<double>() + Snapshot::kControls;
  for (size_t i = 0; i < newest->tables.size(); ++i) {
    const StatTable& table = newest->tables[i];
    const double* control = x + table.step * math::kControlEntries;
    const double scale = control[math::kControlClip] / control[math::kControlMultiplier];
    for (int64_t r = 0; r + 1 < table.table.size(0); ++r) {
      const double* row = newest->rows(i) + r * math::kStatColumns;
      const double count = row[math::kStatCount], zeros = row[math::kStatZeros];
      if (count == 0) continue;
      std::string name = name_at(table, size_t(r));
      // Optimizers without names call their parameters alike.
      for (int other = 2; out.count(name); ++other)
        name = name_at(table, size_t(r)) + " (" + std::to_string(other) + ")";
      out[name] = {row[math::kStatAmax],
                   std::sqrt(row[math::kStatSumSquares]) / scale,
                   zeros / count,
                   count > zeros ? row[math::kStatSubnormals] / (count - zeros) : 0,
                   int64_t(row[math::kStatNonfinite]),
                   int64_t(count),
                   scale};
    }
  }
  return out;
}

}  // namespace halfstep
