// A scale for each of several losses: which of them a call is about, and which an update moves.

#include <halfstep/grad_scaler.h>

#include <ATen/ops/stack.h>

#include <algorithm>

#include "scaler_state.h"

namespace halfstep {

std::vector<GradScaler::State*> GradScaler::State::entries() {
  std::vector<State*> all = {this};
  for (const auto& entry : rest) all.push_back(entry.get());
  return all;
}

GradScaler::State& GradScaler::State::entry(const char* call, int64_t which) {
  TORCH_CHECK_INDEX(which >= 0 && which <= int64_t(rest.size()), call, ": which is ", which,
                    ", but this GradScaler has losses=", rest.size() + 1);
  return which == 0 ? *this : *rest[size_t(which) - 1];
}

GradScaler::State& GradScaler::State::entry_for(const char* call,
                                                torch::optim::Optimizer& optimizer, int64_t which) {
  State& chosen = entry(call, which);
  if (rest.empty()) return chosen;
  const std::vector<State*> all = entries();
  for (size_t other = 0; other < all.size(); ++other) {
    const auto found = all[other]->progress.find(&optimizer);
    TORCH_CHECK(all[other] == &chosen || found == all[other]->progress.end() ||
                    found->second.stage == Progress::kReady,
                call, ": which is ", which,
                ", but the gradients of this optimizer were unscaled with which=", other,
                " since the last update(): they can carry one scale only; scale all losses whose "
                "gradients it sums with one `which`");
  }
  for (State* each : all) each->begin();  // what was known of the last iteration, of all losses
  return chosen;
}

std::vector<GradScaler::State*> GradScaler::State::used() {
  std::vector<State*> found;
  for (State* each : entries())
    if (std::any_of(each->progress.begin(), each->progress.end(),
                    [](const auto& item) { return item.second.found_inf.defined(); }))
      found.push_back(each);
  return found;
}

void GradScaler::State::leave(const std::vector<State*>& moved) {
  const std::vector<State*> all = entries();
  for (size_t which = 0; which < all.size(); ++which) {
    State& entry = *all[which];
    const bool idle = std::find(moved.begin(), moved.end(), &entry) == moved.end();
    if (idle) {
      entry.progress.clear();
      entry.last_found.clear();
      entry.fresh = true;
    }
    if (idle && entry.scaled && !told_alone) {
      told_alone = true;
      TORCH_WARN("loss ", which, " was scaled with which=", which,
                 ", but nothing was unscaled or stepped with which=", which,
                 " before update(): gradients that went into an optimizer of another loss were "
                 "divided by that one's scale; scale all losses whose gradients one optimizer sums "
                 "with one `which`. A loss that accumulates over several updates may do so");
    }
    entry.scaled = false;
  }
}

void GradScaler::State::advance(std::optional<double> new_scale) {
  if (new_scale) {
    if (const auto open = recording(); open && fresh) open->begin(*this);  // nothing was stepped
    scale.fill_(*new_scale);
    numbers[math::kStateScale].fill_(double(float(*new_scale)));
  } else {
    std::vector<at::Tensor> flags;
    for (const auto& [key, progress_of] : progress)
      if (progress_of.found_inf.defined()) flags.push_back(progress_of.found_inf);
    apply_policy(bad_of(flags));
    ++updates;
    take_snapshot();
  }
  if (const auto open = recording()) open->updated(*this, new_scale.has_value());
  loss.zero_();
  progress.clear();
  fresh = true;
}

void GradScaler::update(std::optional<double> new_scale) {
  State& s = *state_;
  if (!s.enabled) return;
  s.require("update");
  const at::NoGradGuard no_grad;
  TORCH_CHECK(!new_scale || (*new_scale >= math::kLowestScale && *new_scale <= math::kHighestScale),
              "update: new_scale is ", new_scale.value_or(0),
              "; expected between 2^-126 and 2^127");
  const std::vector<State*> moved = new_scale ? s.entries() : s.used();
  TORCH_CHECK(!moved.empty(),
              "update: no inf checks were recorded; call step() or unscale_() first");
  for (State* entry : moved) entry->advance(new_scale);
  if (!s.rest.empty()) s.leave(moved);
  // Last: what it throws leaves the scaler between two iterations.
  for (State* entry : moved) entry->learn();
}

bool GradScaler::step_was_skipped() const {
  for (const State* entry : state_->entries())
    for (const auto& [key, found] : entry->last_found)
      if (found.item<float>() != 0) return true;
  return false;
}

bool GradScaler::step_was_skipped(const torch::optim::Optimizer& optimizer) const {
  for (const State* entry : state_->entries()) {
    const auto found = entry->last_found.find(&optimizer);
    if (found != entry->last_found.end() && found->second.item<float>() != 0) return true;
  }
  return false;
}

int64_t GradScaler::losses() const { return int64_t(state_->rest.size()) + 1; }

at::Tensor GradScaler::scales() const {
  std::vector<at::Tensor> all;
  for (State* entry : state_->entries()) all.push_back(state_->scale_of(*entry, "scales"));
  return at::stack(all);
}

}  // namespace halfstep
