// Between the scaler and its policy: what the policy is shown, and what the host does once it has
// the numbers of a step.

#include <halfstep/grad_scaler.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <cmath>

#include "scaler_state.h"

namespace halfstep {

bool GradScaler::State::looks_at_gradients() const {
  return math::PolicyKind(int(rule.numbers[math::kPolicyKind])) > math::PolicyKind::kDynamic;
}

/// Statistics of gradients that unscale() is about to divide; steps bring their own.
void GradScaler::State::look(const std::vector<at::Tensor>& grads) {
  if (!looks_at_gradients() || grads.empty()) return;
  api::OptionalTensors list;
  for (const auto& grad : grads) list.push_back(grad);
  tables.push_back(api::grad_stats(list).to(scale.device()));
}

void GradScaler::State::apply_policy(const at::Tensor& found_inf) {
  api::OptionalTensor proposal;
  if (rule.custom && !rule.custom->host()) {
    const policies::Stats stats{found_inf, scale.clone(), tables};
    policies::Numbers state = custom;
    proposal = rule.custom->update(state, stats);
    TORCH_CHECK(proposal->defined() && proposal->numel() == 1 &&
                    at::isFloatingType(proposal->scalar_type()),
                "Policy::update returned ",
                proposal->defined() ? c10::str(proposal->toString(), proposal->sizes()) : "nothing",
                "; expected the scale as one floating-point element");
    proposal = proposal->to(scale.device(), at::kDouble);
    keep_custom(state);
  }
  const bool looks = looks_at_gradients() && !rule.custom;
  api::advance_scale_(scale, numbers, found_inf, policy, looks ? tables : std::vector<at::Tensor>(),
                      proposal);
}

/// A policy may put new tensors in its state; the scaler's stay, so that a replayed graph finds
/// them.
void GradScaler::State::keep_custom(const policies::Numbers& state) {
  for (auto& [name, tensor] : custom) {
    const auto entry = state.find(name);
    TORCH_CHECK(entry != state.end(), "the policy's update removed '", name, "' from its state");
    if (!entry->second.is_same(tensor)) tensor.copy_(entry->second);
  }
}

void GradScaler::State::make_custom(c10::Device on) {
  custom.clear();
  if (!rule.custom) return;
  for (const auto& [name, tensor] : rule.custom->init()) {
    const auto saved = loaded_custom.find(name);
    custom[name] = (saved == loaded_custom.end() ? tensor : saved->second).to(on).clone();
  }
}

namespace {

std::string limit_message(const policies::Rule& rule, const double* x) {
  const double limit = rule.numbers[math::kPolicySkipLimit];
  const std::string scale = c10::str("the loss scale is ", x[math::kStateScale]);
  if (limit > 0 && x[math::kStateConsecutiveSkips] >= limit)
    return c10::str(scale, " after ", int64_t(x[math::kStateConsecutiveSkips]),
                    " skipped steps in a row (skip_limit is ", int64_t(limit) - 1, ")");
  return c10::str(scale, ", its floor, and the gradients still overflow");
}

}  // namespace

/// Takes in, in their order, the snapshots that the host has by now.
void GradScaler::State::learn() {
  for (size_t i = 0; i < snapshots.size(); ++i) {
    const Snapshot& snapshot = snapshots[i];
    if (snapshot.updates <= learned) continue;
    if (!snapshot.here()) break;
    learned = snapshot.updates;
    const double* x = snapshot.numbers.const_data_ptr<double>();
    if (rule.custom && rule.custom->host()) {
      policies::Numbers state = custom;
      for (auto& [name, tensor] : state) tensor = tensor.cpu();
      const double asked = rule.custom->update_host(state, describe(snapshot));
      keep_custom(state);
      if (std::isfinite(asked) && asked > 0) set_scale(asked);
    }
    const bool reached = x[math::kStateLimits] > limits;
    limits = x[math::kStateLimits];
    if (!reached) continue;
    if (rule.on_limit) {
      rule.on_limit(describe(snapshot));
    } else {
      TORCH_CHECK(rule.numbers[math::kPolicyOnLimit] != 1, limit_message(rule, x));
    }
  }
}

/// Within the policy's bounds.
void GradScaler::State::set_scale(double value) {
  const double bounded = math::bounded_scale(rule.numbers.data(), double(float(value)), value);
  scale.fill_(bounded);
  numbers[math::kStateScale].fill_(bounded);
}

}  // namespace halfstep
