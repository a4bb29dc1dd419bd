// The protocol: scale, unscale, step, update. Telemetry: scaler_stats.cpp; state dicts:
// scaler_state.cpp.

#include <halfstep/grad_scaler.h>

#include <ATen/autocast_mode.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/optim/lbfgs.h>

#include <utility>

#include "scaler_state.h"

namespace halfstep {

at::Tensor vector_of(const std::array<double, 32>& numbers) {
  return at::tensor(std::vector<double>(numbers.begin(), numbers.end()),
                    at::TensorOptions(at::kDouble));
}

void GradScaler::State::make(c10::Device on) {
  policy = vector_of(rule.numbers);
  numbers = loaded.defined() ? loaded.clone() : api::init_scale_state(policy);
  policy = policy.to(on);
  numbers = numbers.to(on);
  scale = numbers[math::kStateScale].to(at::kFloat).clone();
  loss = at::zeros({1}, at::TensorOptions(at::kDouble).device(on));
  make_custom(on);
}

void GradScaler::State::require(const char* call) const {
  TORCH_CHECK(scale.defined(), call,
              ": nothing was scaled yet; call scaler.scale(loss) earlier in the iteration");
}

/// The scale of `entry`; before the first loss a copy of what it will begin with, where the device
/// was given; 1 where not enabled.
const at::Tensor& GradScaler::State::scale_of(State& entry, const char* call) {
  const auto options = at::TensorOptions(at::kFloat);
  if (!enabled) {
    const bool missing = device && device->is_cuda() && !at::hasCUDA();
    entry.early = at::ones({}, options.device(missing ? at::kCPU : device.value_or(at::kCPU)));
    return entry.early;
  }
  if (!entry.scale.defined() && device) {
    const at::Tensor numbers = entry.loaded.defined()
                                   ? entry.loaded
                                   : api::init_scale_state(vector_of(entry.rule.numbers));
    entry.early = at::full({}, numbers[math::kStateScale].item<double>(), options.device(*device));
    return entry.early;
  }
  entry.require(call);
  return entry.scale;
}

/// First call after an update: what was known of the last step is no longer asked for.
void GradScaler::State::begin() {
  if (!fresh) return;
  if (const auto open = recording()) open->begin(*this);
  fresh = false;
  last_found.clear();
  norms.clear();
  controls.clear();
  overflowed.clear();
  rows.clear();
  tables.clear();
}

at::Tensor GradScaler::State::bad_of(const std::vector<at::Tensor>& flags) const {
  return at::stack(flags).amax();  // MAX; a NaN stays and counts as found
}

GradScalerOptions& GradScalerOptions::policy(policies::Rule rule) {
  rule_ = std::move(rule);
  return *this;
}
GradScalerOptions& GradScalerOptions::policy(std::shared_ptr<policies::Policy> custom) {
  TORCH_CHECK(custom, "policy is a null pointer");
  policies::Rule rule = policies::Dynamic()
                            .init_scale(custom->init_scale)
                            .min_scale(custom->min_scale)
                            .max_scale(custom->max_scale);
  rule.numbers[math::kPolicyKind] = double(math::PolicyKind::kCustom);
  rule.custom = std::move(custom);
  rule_ = std::move(rule);
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
GradScalerOptions& GradScalerOptions::losses(int64_t count) {
  TORCH_CHECK(count >= 1, "losses is ", count, "; expected at least 1");
  losses_ = count;
  return *this;
}

GradScaler::GradScaler(GradScalerOptions options) : state_(std::make_unique<State>()) {
  for (int64_t which = 1; which < options.losses_; ++which)
    state_->rest.push_back(std::make_unique<State>());
  for (State* entry : state_->entries()) {
    entry->rule = options.rule_;
    entry->device = options.device_;
    entry->enabled = options.enabled_;
  }
}
GradScaler::~GradScaler() = default;
GradScaler::GradScaler(GradScaler&&) noexcept = default;
GradScaler& GradScaler::operator=(GradScaler&&) noexcept = default;

at::Tensor GradScaler::scale(const at::Tensor& loss, int64_t which) {
  State& s = state_->entry("scale", which);
  if (!s.enabled) return loss;
  if (!s.scale.defined()) {
    TORCH_CHECK(!s.device || s.device->type() == loss.device().type(), "GradScaler was made for ",
                *s.device, " but the loss is on ", loss.device());
    for (State* entry : state_->entries()) entry->make(loss.device());
  }
  s.scaled = true;
  {
    // One addition on the device: whether the loss was finite is read with the update's numbers.
    const at::NoGradGuard no_grad;
    const at::Tensor value = loss.detach();
    s.loss.add_((value.dim() == 0 ? value : value.sum()).to(s.loss.device()));
  }
  const auto type = loss.scalar_type();
  const at::Tensor wide = type == at::kHalf || type == at::kBFloat16 ? loss.to(at::kFloat) : loss;
  return wide * s.scale.to(loss.device());
}

namespace {

int64_t count_nonzero(const std::vector<at::Tensor>& tensors) {
  int64_t count = 0;
  for (const auto& tensor : tensors) count += at::count_nonzero(tensor).item<int64_t>();
  return count;
}

}  // namespace

void GradScaler::State::unscale(torch::optim::Optimizer& optimizer, Progress& state) {
  const at::NoGradGuard no_grad;
  const bool ours = dynamic_cast<optim::Optimizer*>(&optimizer) != nullptr;
  struct Lists {
    std::vector<at::Tensor> in_place, narrow, params;
    std::vector<at::Tensor> halves;  ///< FP16 ones among in_place
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
        if (grad.scalar_type() == at::kHalf) lists.halves.push_back(lists.in_place.back());
      }
    }
  std::vector<at::Tensor> flags;
  const at::Tensor inverse = scale.to(at::kDouble).reciprocal().to(at::kFloat);
  for (auto& [index, entry] : devices) {
    auto& [device, lists] = entry;
    const at::Tensor flag = at::zeros({}, at::TensorOptions(at::kFloat).device(device));
    const at::Tensor factor = inverse.to(device);
    // Counting reads the device, so it is done on the CPU, and until it was told once.
    const bool count = !warned_flush && device.is_cpu() && !lists.halves.empty();
    const int64_t before = count ? count_nonzero(lists.halves) : 0;
    look(lists.in_place);
    look(lists.narrow);
    if (!lists.in_place.empty()) api::unscale_(lists.in_place, factor, flag);
    for (const auto& grad : lists.in_place)  // whoever looked at it before must know
      if (!grad.is_inference()) grad.unsafeGetTensorImpl()->bump_version();
    const int64_t flushed = count ? before - count_nonzero(lists.halves) : 0;
    if (flushed > 0) {
      warned_flush = true;
      TORCH_WARN("unscaling FP16 gradients in place set ", flushed,
                 " small values to zero; use a halfstep optimizer, which unscales in FP32");
    }
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
  state.stage = Progress::kUnscaled;
}

void GradScaler::unscale_(torch::optim::Optimizer& optimizer, int64_t which) {
  State& s = state_->entry_for("unscale_", optimizer, which);
  if (!s.enabled) return;
  s.require("unscale_");
  s.begin();
  Progress& progress = s.progress[&optimizer];
  TORCH_CHECK(progress.stage != Progress::kUnscaled,
              "unscale_() has already been called on this optimizer since the last update()");
  TORCH_CHECK(progress.stage != Progress::kStepped, "unscale_() is being called after step()");
  s.show(optimizer, progress);
  s.unscale(optimizer, progress);
}

void GradScaler::State::step_ours(optim::Optimizer& optimizer, Progress& progress) {
  const GradStats stats = optimizer.gather_stats();
  TORCH_CHECK(!stats.empty(), "step: no parameter of this optimizer has a gradient");
  const bool unscaled = progress.stage == Progress::kUnscaled;
  optimizer.step_with(unscaled ? at::Tensor() : scale, progress.found_inf, progress.clip, stats,
                      true);
  progress.found_inf =
      optimizer.control_[math::kControlFoundInf].to(scale.device(), at::kFloat).clone();
  record(stats, optimizer.control_);
  if (!unscaled)
    for (const auto& entry : stats) tables.push_back(entry.second.to(scale.device()));
  if (!unscaled) return;
  const bool zeroes = optimizer.common(*optimizer.defaults_).zero_grads;
  for (const auto& room : optimizer.rooms_) {
    if (optimizer.common(room->group->options()).grad_dtype)
      continue;  // FP32 is what was asked for
    for (const auto& param : room->leaves) {
      if (!param.grad().defined() || param.grad().scalar_type() == param.scalar_type()) continue;
      const at::Tensor served = param.grad();  // FP32; zeroed ones stay, in the parameter's dtype
      at::Tensor(param).mutable_grad() = at::Tensor();
      param.set_grad_dtype(param.scalar_type());
      if (zeroes) at::Tensor(param).mutable_grad() = served.to(param.scalar_type());
    }
  }
}

namespace {

/// Thrown out of an optimizer that evaluates its closure again and meets a non-finite gradient.
struct NotFinite {};

using SavedStates =
    std::vector<std::pair<void*, std::unique_ptr<torch::optim::OptimizerParamState>>>;

/// A copy that the optimizer cannot write to: LBFGS updates tensors of its state in place.
SavedStates saved_states(const torch::optim::Optimizer& optimizer) {
  SavedStates saved;
  for (const auto& [key, state] : optimizer.state()) {
    saved.emplace_back(key, state->clone());
    auto* lbfgs = dynamic_cast<torch::optim::LBFGSParamState*>(saved.back().second.get());
    if (!lbfgs) continue;
    const auto copy = [](at::Tensor& tensor) {
      if (tensor.defined()) tensor = tensor.clone();
    };
    copy(lbfgs->d()), copy(lbfgs->H_diag()), copy(lbfgs->prev_flat_grad());
    for (auto* list : {&lbfgs->old_dirs(), &lbfgs->old_stps(), &lbfgs->ro()})
      for (auto& tensor : *list) copy(tensor);
  }
  return saved;
}

void restore_states(torch::optim::Optimizer& optimizer, SavedStates& saved) {
  optimizer.state().clear();
  for (auto& [key, state] : saved) optimizer.state()[key] = std::move(state);
}

}  // namespace

/// A stock optimizer gets the closure too: its first evaluation has been made, later ones (LBFGS)
/// are unscaled as they come. A non-finite one takes the whole step back.
at::Tensor GradScaler::State::step_other(torch::optim::Optimizer& optimizer, Progress& progress,
                                         const torch::optim::Optimizer::LossClosure& closure,
                                         const at::Tensor& loss) {
  if (progress.stage == Progress::kReady) unscale(optimizer, progress);
  TORCH_CHECK(progress.found_inf.defined(), "step: no parameter of this optimizer has a gradient");
  const GradStats stats = stats_of(optimizer);
  std::vector<at::Tensor> tables;
  for (const auto& entry : stats) tables.push_back(entry.second);
  record(stats, api::step_control(tables, std::nullopt, progress.found_inf, std::nullopt, -1.0));
  if (progress.found_inf.item<float>() != 0) return loss;
  if (!closure) return optimizer.step();
  SavedStates before = saved_states(optimizer);
  std::vector<std::pair<at::Tensor, at::Tensor>> weights;
  for (auto& group : optimizer.param_groups())
    for (auto& param : group.params()) weights.emplace_back(param, param.detach().clone());
  bool first = true;
  try {
    optimizer.step([&] {
      if (std::exchange(first, false)) return loss;
      at::Tensor value;
      {
        const at::AutoGradMode grad_mode(true);
        value = closure();
      }
      Progress again;
      unscale(optimizer, again);
      if (again.found_inf.defined() && again.found_inf.item<float>() != 0) throw NotFinite();
      return value;
    });
  } catch (const NotFinite&) {
    for (auto& [param, value] : weights) param.copy_(value);
    restore_states(optimizer, before);
    progress.found_inf.fill_(1);
  }
  return loss;
}

at::Tensor GradScaler::step(torch::optim::Optimizer& optimizer,
                            const torch::optim::Optimizer::LossClosure& closure, int64_t which) {
  State& s = state_->entry_for("step", optimizer, which);
  if (!s.enabled) {
    at::Tensor loss = optimizer.step(closure);
    at::autocast::clear_cache();
    return loss;
  }
  TORCH_CHECK(s.progress[&optimizer].stage != Progress::kStepped,
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
  s.show(optimizer, progress);
  if (auto* ours = dynamic_cast<optim::Optimizer*>(&optimizer)) {
    s.step_ours(*ours, progress);
  } else {
    const at::Tensor result = s.step_other(optimizer, progress, closure, loss);
    if (!loss.defined()) loss = result;
  }
  progress.stage = Progress::kStepped;
  s.last_found[&optimizer] = progress.found_inf;
  at::autocast::clear_cache();
  return loss;
}

at::Tensor GradScaler::clip_grad_norm_(const std::vector<torch::optim::Optimizer*>& optimizers,
                                       double max_norm, double norm_type, int64_t which) {
  State& s = state_->entry("clip_grad_norm_", which);
  TORCH_CHECK(max_norm >= 0, "clip_grad_norm_: max_norm is ", max_norm, "; expected a number >= 0");
  const at::NoGradGuard no_grad;
  if (s.enabled) s.require("clip_grad_norm_");
  for (auto* optimizer : optimizers) state_->entry_for("clip_grad_norm_", *optimizer, which);
  std::vector<at::Tensor> norms;
  for (auto* optimizer : optimizers) {
    const bool ours = dynamic_cast<optim::Optimizer*>(optimizer) != nullptr;
    if (s.enabled && !ours && s.progress[optimizer].stage == Progress::kReady)
      unscale_(*optimizer, which);
    const bool scaled = s.enabled && s.progress[optimizer].stage == Progress::kReady;
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

double GradScaler::get_scale(int64_t which) const {
  const State& s = state_->entry("get_scale", which);
  if (!s.enabled) return 1.0;
  if (s.scale.defined()) return s.scale.item<float>();
  if (s.loaded.defined()) return s.loaded[math::kStateScale].item<double>();
  return s.rule.numbers[math::kPolicyInitScale];
}

const at::Tensor& GradScaler::scale_tensor(int64_t which) const {
  return state_->scale_of(state_->entry("scale_tensor", which), "scale_tensor");
}

bool GradScaler::is_enabled() const { return state_->enabled; }

}  // namespace halfstep
