#include <halfstep/grad_scaler.h>

#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/serialize/archive.h>

#include <cmath>
#include <map>

#include "../math/grads.h"
#include "../math/scale.h"
#include "room.h"

namespace halfstep {

namespace {

using Stats = std::vector<std::pair<optim::Optimizer::Room*, at::Tensor>>;
enum class Stage { kReady, kUnscaled, kStepped };

/// Where one optimizer stands between two updates.
struct Progress {
  Stage stage = Stage::kReady;
  at::Tensor found_inf;  ///< 0-d float on the scale's device, once known
  at::Tensor clip;
};

/// One copy of an update's numbers: state, norm, overflow count, totals of each group.
struct Snapshot {
  int64_t updates = 0;
  at::Tensor numbers;
  std::vector<std::vector<std::string>> names;
};
constexpr int64_t kSnapshotNorm = math::kStateEntries;
constexpr int64_t kSnapshotOverflowed = kSnapshotNorm + 1;
constexpr int64_t kSnapshotRows = kSnapshotNorm + 2;

at::Tensor vector_of(const std::array<double, 16>& numbers) {
  return at::tensor(std::vector<double>(numbers.begin(), numbers.end()),
                    at::TensorOptions(at::kDouble));
}

/// The tensor with a gradient's numbers: the values of a sparse one.
at::Tensor values_of(const at::Tensor& grad) { return grad.is_sparse() ? grad._values() : grad; }

}  // namespace

struct GradScaler::State {
  policies::Rule rule;
  std::optional<c10::Device> device;
  bool enabled = true;
  at::Tensor scale, numbers, policy;  ///< on the device, once it is known
  at::Tensor loaded;                  ///< state read before the device is known
  std::map<const void*, Progress> progress;
  std::map<const void*, at::Tensor> last_found;
  bool fresh = true;
  int64_t updates = 0;
  std::vector<at::Tensor> norms, overflowed;
  std::vector<std::pair<at::Tensor, std::vector<std::string>>> rows;
  Snapshot snapshot;

  void make(c10::Device on) {
    policy = vector_of(rule.numbers);
    numbers = loaded.defined() ? loaded.clone() : api::init_scale_state(policy);
    policy = policy.to(on);
    numbers = numbers.to(on);
    scale = numbers[math::kStateScale].to(at::kFloat).clone();
  }
  void require(const char* call) const {
    TORCH_CHECK(scale.defined(), call,
                ": nothing was scaled yet; call scaler.scale(loss) earlier in the iteration");
  }
  void begin() {
    if (!fresh) return;
    fresh = false;
    last_found.clear();
    norms.clear();
    overflowed.clear();
    rows.clear();
  }
  at::Tensor bad_of(const std::vector<at::Tensor>& flags) const {
    return at::stack(flags).amax();  // MAX; a NaN stays and counts as found
  }
  void record(const Stats& stats, const at::Tensor& control) {
    norms.push_back(control[math::kControlNorm].to(scale.device()));
    for (const auto& [room, table] : stats) {
      rows.emplace_back(table.select(0, -1).to(scale.device()),
                        room ? room->names : std::vector<std::string>());
      if (room) overflowed.push_back(room->overflowed.sum().to(scale.device()));
    }
  }
  void take_snapshot() {
    std::vector<at::Tensor> parts = {numbers};
    snapshot.names.clear();
    parts.push_back(at::linalg_vector_norm(at::stack(norms)).reshape({1}));
    parts.push_back(overflowed.empty() ? at::zeros({1}, numbers.options())
                                       : at::stack(overflowed).sum().to(at::kDouble).reshape({1}));
    for (const auto& [row, names] : rows) {
      parts.push_back(row);
      snapshot.names.push_back(names);
    }
    snapshot.numbers = at::cat(parts);
    snapshot.updates = updates;
  }
  Stats stock_stats(torch::optim::Optimizer& optimizer) const;
  void unscale(torch::optim::Optimizer& optimizer, Progress& progress);
};

GradScalerOptions& GradScalerOptions::policy(policies::Rule rule) {
  rule_ = rule;
  return *this;
}
GradScalerOptions& GradScalerOptions::device(c10::Device device) {
  device_ = device;
  return *this;
}
GradScalerOptions& GradScalerOptions::enabled(bool value) {
  enabled_ = value;
  return *this;
}

GradScaler::GradScaler(GradScalerOptions options) : state_(std::make_unique<State>()) {
  state_->rule = options.rule_;
  state_->device = options.device_;
  state_->enabled = options.enabled_;
}
GradScaler::~GradScaler() = default;
GradScaler::GradScaler(GradScaler&&) noexcept = default;
GradScaler& GradScaler::operator=(GradScaler&&) noexcept = default;

at::Tensor GradScaler::scale(const at::Tensor& loss) {
  State& s = *state_;
  if (!s.enabled) return loss;
  if (!s.scale.defined()) {
    TORCH_CHECK(!s.device || s.device->type() == loss.device().type(), "GradScaler was made for ",
                *s.device, " but the loss is on ", loss.device());
    s.make(loss.device());
  }
  const auto type = loss.scalar_type();
  const at::Tensor wide = type == at::kHalf || type == at::kBFloat16 ? loss.to(at::kFloat) : loss;
  return wide * s.scale.to(loss.device());
}

void GradScaler::State::unscale(torch::optim::Optimizer& optimizer, Progress& state) {
  const at::NoGradGuard no_grad;
  const bool ours = dynamic_cast<optim::Optimizer*>(&optimizer) != nullptr;
  struct Lists {
    std::vector<at::Tensor> in_place, narrow, params;
  };
  std::map<int, std::pair<c10::Device, Lists>> devices;
  for (auto& group : optimizer.param_groups())
    for (auto& param : group.params()) {
      at::Tensor grad = param.grad();
      if (!grad.defined()) continue;
      const bool sixteen = grad.scalar_type() == at::kHalf || grad.scalar_type() == at::kBFloat16;
      if (grad.is_sparse() && sixteen) param.mutable_grad() = grad = grad.coalesce();
      const auto device = grad.device();
      auto& lists = devices.try_emplace(device.has_index() ? device.index() : -1, device, Lists{})
                        .first->second.second;
      if (ours && sixteen && !grad.is_sparse()) {
        lists.narrow.push_back(grad);
        lists.params.push_back(param);
      } else {
        lists.in_place.push_back(values_of(grad));
      }
    }
  std::vector<at::Tensor> flags;
  const at::Tensor inverse = scale.to(at::kDouble).reciprocal().to(at::kFloat);
  for (auto& [index, entry] : devices) {
    auto& [device, lists] = entry;
    const at::Tensor flag = at::zeros({}, at::TensorOptions(at::kFloat).device(device));
    const at::Tensor factor = inverse.to(device);
    if (!lists.in_place.empty()) api::unscale_(lists.in_place, factor, flag);
    if (!lists.narrow.empty()) {
      std::vector<at::Tensor> outputs;
      for (const auto& grad : lists.narrow)
        outputs.push_back(at::empty_like(grad, grad.options().dtype(at::kFloat)));
      api::unscale_to_(outputs, lists.narrow, factor, flag);
      for (size_t i = 0; i < outputs.size(); ++i) {
        lists.params[i].mutable_grad() = at::Tensor();
        lists.params[i].set_grad_dtype(at::kFloat);
        lists.params[i].mutable_grad() = outputs[i];
      }
    }
    flags.push_back(flag.to(scale.device()));
  }
  if (!flags.empty()) state.found_inf = bad_of(flags);
  state.stage = Stage::kUnscaled;
}

void GradScaler::unscale_(torch::optim::Optimizer& optimizer) {
  State& s = *state_;
  if (!s.enabled) return;
  s.require("unscale_");
  s.begin();
  Progress& progress = s.progress[&optimizer];
  TORCH_CHECK(progress.stage != Stage::kUnscaled,
              "unscale_() has already been called on this optimizer since the last update()");
  TORCH_CHECK(progress.stage != Stage::kStepped, "unscale_() is being called after step()");
  s.unscale(optimizer, progress);
}

Stats GradScaler::State::stock_stats(torch::optim::Optimizer& optimizer) const {
  std::map<int, api::OptionalTensors> devices;
  for (auto& group : optimizer.param_groups())
    for (auto& param : group.params())
      if (param.grad().defined()) {
        const auto device = param.grad().device();
        devices[device.has_index() ? device.index() : -1].push_back(values_of(param.grad()));
      }
  Stats stats;
  for (auto& [index, grads] : devices)
    stats.emplace_back(nullptr, api::grad_stats(grads).to(scale.device()));
  return stats;
}

at::Tensor GradScaler::step(torch::optim::Optimizer& optimizer,
                            const torch::optim::Optimizer::LossClosure& closure) {
  State& s = *state_;
  if (!s.enabled) return optimizer.step(closure);
  TORCH_CHECK(s.progress[&optimizer].stage != Stage::kStepped,
              "step() has already been called on this optimizer since the last update()");
  at::Tensor loss;
  if (closure) {
    const at::AutoGradMode grad_mode(true);
    loss = closure();
  }
  const at::NoGradGuard no_grad;
  s.require("step");
  s.begin();
  Progress& progress = s.progress[&optimizer];
  if (auto* ours = dynamic_cast<optim::Optimizer*>(&optimizer)) {
    const Stats stats = ours->gather_stats();
    TORCH_CHECK(!stats.empty(), "step: no parameter of this optimizer has a gradient");
    const bool unscaled = progress.stage == Stage::kUnscaled;
    ours->step_with(unscaled ? at::Tensor() : s.scale, progress.found_inf, progress.clip, stats,
                    true);
    progress.found_inf =
        ours->control_[math::kControlFoundInf].to(s.scale.device(), at::kFloat).clone();
    s.record(stats, ours->control_);
    if (unscaled)
      for (const auto& param : ours->distinct_parameters())
        if (param.grad().defined() && param.grad().scalar_type() != param.scalar_type()) {
          at::Tensor(param).mutable_grad() = at::Tensor();  // the FP32 gradient has served
          param.set_grad_dtype(param.scalar_type());
        }
  } else {
    if (progress.stage == Stage::kReady) s.unscale(optimizer, progress);
    TORCH_CHECK(progress.found_inf.defined(),
                "step: no parameter of this optimizer has a gradient");
    const Stats stats = s.stock_stats(optimizer);
    std::vector<at::Tensor> tables;
    for (const auto& entry : stats) tables.push_back(entry.second);
    s.record(stats,
             api::step_control(tables, std::nullopt, progress.found_inf, std::nullopt, -1.0));
    if (progress.found_inf.item<float>() == 0) {
      at::Tensor result = optimizer.step();
      if (!loss.defined()) loss = result;
    }
  }
  progress.stage = Stage::kStepped;
  s.last_found[&optimizer] = progress.found_inf;
  at::autocast::clear_cache();
  return loss;
}

void GradScaler::update(std::optional<double> new_scale) {
  State& s = *state_;
  if (!s.enabled) return;
  s.require("update");
  const at::NoGradGuard no_grad;
  if (new_scale) {
    TORCH_CHECK(*new_scale >= math::kLowestScale && *new_scale <= math::kHighestScale,
                "update: new_scale is ", *new_scale, "; expected between 2^-126 and 2^127");
    s.scale.fill_(*new_scale);
    s.numbers[math::kStateScale].fill_(double(float(*new_scale)));
  } else {
    std::vector<at::Tensor> flags;
    for (const auto& [key, progress] : s.progress)
      if (progress.found_inf.defined()) flags.push_back(progress.found_inf);
    TORCH_CHECK(!flags.empty(),
                "update: no inf checks were recorded; call step() or unscale_() first");
    api::update_scale_(s.scale, s.numbers, s.bad_of(flags), s.policy);
    ++s.updates;
    if (!s.norms.empty()) s.take_snapshot();
  }
  s.progress.clear();
  s.fresh = true;
}

at::Tensor GradScaler::clip_grad_norm_(const std::vector<torch::optim::Optimizer*>& optimizers,
                                       double max_norm, double norm_type) {
  State& s = *state_;
  TORCH_CHECK(max_norm >= 0, "clip_grad_norm_: max_norm is ", max_norm, "; expected a number >= 0");
  const at::NoGradGuard no_grad;
  if (s.enabled) s.require("clip_grad_norm_");
  std::vector<at::Tensor> norms;
  for (auto* optimizer : optimizers) {
    const bool ours = dynamic_cast<optim::Optimizer*>(optimizer) != nullptr;
    if (s.enabled && !ours && s.progress[optimizer].stage == Stage::kReady) unscale_(*optimizer);
    const bool scaled = s.enabled && s.progress[optimizer].stage == Stage::kReady;
    for (auto& group : optimizer->param_groups())
      for (auto& param : group.params()) {
        if (!param.grad().defined()) continue;
        const at::Tensor grad = values_of(param.grad());
        at::Tensor norm = norm_type == 2.0
                              ? api::grad_stats(api::OptionalTensors({grad}))[-1][1].sqrt()
                              : at::linalg_vector_norm(grad.to(at::kDouble), norm_type);
        if (scaled) norm = norm / s.scale.to(norm.device(), at::kDouble);
        norms.push_back(norm.to(s.scale.defined() ? s.scale.device() : norm.device()));
      }
  }
  if (norms.empty()) return at::zeros({}, at::TensorOptions(at::kFloat));
  const at::Tensor norm = at::linalg_vector_norm(at::stack(norms), norm_type);
  const at::Tensor factor = (max_norm / (norm + 1e-6)).clamp_max(1.0);
  for (auto* optimizer : optimizers) {
    if (s.enabled && dynamic_cast<optim::Optimizer*>(optimizer)) {
      s.progress[optimizer].clip = factor;
      continue;
    }
    for (auto& group : optimizer->param_groups())
      for (auto& param : group.params())
        if (param.grad().defined())
          param.mutable_grad().mul_(factor.to(param.grad().device(), param.grad().scalar_type()));
  }
  return norm.to(at::kFloat);
}

double GradScaler::get_scale() const {
  const State& s = *state_;
  if (!s.enabled) return 1.0;
  if (s.scale.defined()) return s.scale.item<float>();
  if (s.loaded.defined()) return s.loaded[math::kStateScale].item<double>();
  return s.rule.numbers[math::kPolicyInitScale];
}

const at::Tensor& GradScaler::scale_tensor() const {
  state_->require("scale_tensor");
  return state_->scale;
}

bool GradScaler::is_enabled() const { return state_->enabled; }

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
  ScalerStats out;
  out.scale = s.rule.numbers[math::kPolicyInitScale];
  out.grad_norm = std::nan("");
  if (!s.snapshot.numbers.defined()) return out;
  const at::Tensor host = s.snapshot.numbers.cpu();
  const double* x = host.const_data_ptr<double>();
  out.step = s.snapshot.updates;
  out.scale = x[math::kStateScale];
  out.clean_steps = int64_t(x[math::kStateCleanSteps]);
  out.steps_applied = int64_t(x[math::kStateStepsApplied]);
  out.steps_skipped = int64_t(x[math::kStateStepsSkipped]);
  out.consecutive_skips = int64_t(x[math::kStateConsecutiveSkips]);
  out.last_found_inf = x[math::kStateLastFoundInf] != 0;
  out.grad_norm = x[kSnapshotNorm];
  out.overflowed = int64_t(x[kSnapshotOverflowed]);
  double zeros = 0, subnormals = 0, elements = 0;
  for (size_t i = 0; i < s.snapshot.names.size(); ++i) {
    const double* row = x + kSnapshotRows + int64_t(i) * math::kStatColumns;
    zeros += row[math::kStatZeros];
    subnormals += row[math::kStatSubnormals];
    elements += row[math::kStatCount];
    out.amax = math::BlockStats::larger(out.amax, row[math::kStatAmax]);
    const auto bad = int64_t(row[math::kStatFirstBad]);
    if (bad < 0 || !out.first_bad_param.empty()) continue;
    const auto& names = s.snapshot.names[i];
    out.first_bad_param =
        size_t(bad) < names.size() ? names[size_t(bad)] : "parameter " + std::to_string(bad);
  }
  out.zero_share = elements > 0 ? zeros / elements : 0;
  out.subnormal_share = elements > zeros ? subnormals / (elements - zeros) : 0;
  return out;
}

void GradScaler::save(torch::serialize::OutputArchive& archive) const {
  const State& s = *state_;
  const at::Tensor policy = vector_of(s.rule.numbers);
  const at::Tensor state = s.numbers.defined()  ? s.numbers.cpu()
                           : s.loaded.defined() ? s.loaded
                                                : api::init_scale_state(policy);
  archive.write("halfstep_scaler_format", c10::IValue(int64_t(1)));
  archive.write("policy", c10::IValue(policy));
  archive.write("state", c10::IValue(state));
  archive.write("updates", c10::IValue(s.updates));
}

void GradScaler::load(torch::serialize::InputArchive& archive) {
  State& s = *state_;
  c10::IValue format, policy, state, updates;
  TORCH_CHECK(archive.try_read("halfstep_scaler_format", format) &&
                  archive.try_read("policy", policy) && archive.try_read("state", state) &&
                  archive.try_read("updates", updates),
              "the file holds no halfstep GradScaler");
  TORCH_CHECK(format.toInt() == 1, "scaler state has format ", format.toInt(),
              "; this halfstep reads format 1");
  const at::Tensor numbers = state.toTensor(), rule = policy.toTensor();
  for (const at::Tensor& vector : {numbers, rule})
    TORCH_CHECK(vector.scalar_type() == at::kDouble && vector.numel() == 16, "scaler state holds ",
                vector.numel(), " numbers of ", vector.scalar_type(), "; expected 16 of float64");
  const double scale = numbers[math::kStateScale].item<double>();
  TORCH_CHECK(scale >= math::kLowestScale && scale <= math::kHighestScale,
              "scaler state has scale ", scale, "; expected between 2^-126 and 2^127");
  for (int i = 0; i < math::kPolicyEntries; ++i) s.rule.numbers[size_t(i)] = rule[i].item<double>();
  s.loaded = numbers.clone();
  s.updates = updates.toInt();
  if (s.scale.defined()) s.make(s.scale.device());
}

torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive,
                                            const GradScaler& scaler) {
  scaler.save(archive);
  return archive;
}
torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive,
                                           GradScaler& scaler) {
  scaler.load(archive);
  return archive;
}

}  // namespace halfstep
