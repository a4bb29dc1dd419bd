// State dicts of the scaler: torch's five keys, the rest under "halfstep".

#include "scaler_state.h"

#include <torch/serialize/archive.h>

#include <cmath>

namespace halfstep {

namespace {

double number_at(const StateDict& state, const char* key) {
  const c10::IValue value = state.at(key);
  if (value.isTensor() && value.toTensor().numel() == 1) return value.toTensor().item<double>();
  TORCH_CHECK(value.isDouble() || value.isInt(), "scaler state '", key, "' is ", value.tagKind(),
              "; expected a number");
  return value.toScalar().toDouble();
}

c10::impl::GenericList list_of(const double* numbers) {
  c10::impl::GenericList list(c10::AnyType::get());
  for (int i = 0; i < 16; ++i) list.push_back(numbers[i]);
  return list;
}

std::array<double, 16> sixteen_of(const StateDict& own, const char* key) {
  const c10::IValue value = own.at(key);
  TORCH_CHECK(value.isList() && value.toListRef().size() == 16, "scaler state '", key, "' is ",
              value.tagKind(), "; expected a list of 16 numbers");
  std::array<double, 16> numbers{};
  for (size_t i = 0; i < 16; ++i) {
    const c10::IValue& entry = value.toListRef()[i];
    TORCH_CHECK(entry.isDouble() || entry.isInt(), "scaler state '", key, "' holds ",
                entry.tagKind(), "; expected a list of 16 numbers");
    numbers[i] = entry.toScalar().toDouble();
  }
  return numbers;
}

/// Refuses numbers that no policy of this version has.
void check_rule(const std::array<double, 16>& rule) {
  const double kind = rule[math::kPolicyKind];
  TORCH_CHECK(kind == 0 || kind == 1, "scaler state is of policy kind ", kind,
              "; this halfstep knows 0 (Static) and 1 (Dynamic)");
  if (kind == 0) return;
  const double refill = rule[math::kPolicyRefill];
  TORCH_CHECK(refill == 0 || refill == 1, "scaler state has refill ", refill);
  policies::Rule(policies::Dynamic()
                     .init_scale(rule[math::kPolicyInitScale])
                     .growth_factor(rule[math::kPolicyGrowthFactor])
                     .backoff_factor(rule[math::kPolicyBackoffFactor])
                     .growth_interval(int(rule[math::kPolicyGrowthInterval]))
                     .min_scale(rule[math::kPolicyMinScale])
                     .max_scale(rule[math::kPolicyMaxScale])
                     .hysteresis(int(rule[math::kPolicyHysteresis])));
}

}  // namespace

StateDict GradScaler::state_dict() const {
  const State& s = *state_;
  StateDict out;
  if (!s.enabled) return out;
  const at::Tensor state = s.numbers.defined()  ? s.numbers.cpu()
                           : s.loaded.defined() ? s.loaded
                                                : api::init_scale_state(vector_of(s.rule.numbers));
  const double* x = state.const_data_ptr<double>();
  // A stock scaler that takes a Static policy over goes on with torch's own numbers.
  const bool dynamic = s.rule.numbers[math::kPolicyKind] == 1;
  const policies::Rule rule = dynamic ? s.rule : policies::Rule(policies::Dynamic());
  out.insert("scale", x[math::kStateScale]);
  out.insert("growth_factor", rule.numbers[math::kPolicyGrowthFactor]);
  out.insert("backoff_factor", rule.numbers[math::kPolicyBackoffFactor]);
  out.insert("growth_interval", int64_t(rule.numbers[math::kPolicyGrowthInterval]));
  out.insert("_growth_tracker", int64_t(x[math::kStateGrowthTracker]));
  StateDict own;
  own.insert("format", int64_t(1)).insert("state", list_of(x));
  own.insert("policy", list_of(s.rule.numbers.data())).insert("updates", s.updates);
  return out.insert("halfstep", own);
}

void GradScaler::load_state_dict(const StateDict& state) {
  State& s = *state_;
  if (!s.enabled) return;
  TORCH_CHECK(state.size() > 0,
              "the scaler state is empty: was it saved from a disabled GradScaler?");
  for (const char* key :
       {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"})
    if (!state.contains(key)) {
      std::string known;
      for (const auto& name : state.keys()) known += (known.empty() ? "" : ", ") + name;
      TORCH_CHECK(false, "scaler state has no '", key, "' (keys: ", known, ")");
    }
  const double scale = double(float(number_at(state, "scale")));
  TORCH_CHECK(scale >= math::kLowestScale && scale <= math::kHighestScale,
              "scaler state has scale ", scale, "; expected between 2^-126 and 2^127");
  const double tracker = number_at(state, "_growth_tracker");
  TORCH_CHECK(tracker >= 0 && std::isfinite(tracker), "scaler state has _growth_tracker ", tracker,
              "; expected a number >= 0");
  policies::Rule rule = s.rule;
  std::array<double, 16> numbers{};
  int64_t updates = s.updates;
  const bool ours = state.contains("halfstep");
  if (ours) {
    const StateDict own = state.at("halfstep");
    const double format = own.contains("format") ? number_at(own, "format") : 0;
    TORCH_CHECK(format == 1, "scaler state has format ", format, "; this halfstep reads format 1");
    rule.numbers = sixteen_of(own, "policy");
    numbers = sixteen_of(own, "state");
    updates = int64_t(number_at(own, "updates"));
  }
  if (rule.numbers[math::kPolicyKind] == 1) {
    rule.numbers[math::kPolicyGrowthFactor] = number_at(state, "growth_factor");
    rule.numbers[math::kPolicyBackoffFactor] = number_at(state, "backoff_factor");
    rule.numbers[math::kPolicyGrowthInterval] = number_at(state, "growth_interval");
  }
  check_rule(rule.numbers);
  const at::Tensor loaded =
      ours ? vector_of(numbers) : api::init_scale_state(vector_of(rule.numbers));
  loaded[math::kStateScale].fill_(scale);
  loaded[math::kStateGrowthTracker].fill_(tracker);
  // Nothing below is refused.
  s.rule = rule;
  s.loaded = loaded;
  s.updates = updates;
  s.show_loaded();
  if (!s.scale.defined()) return;
  // In place: whoever holds scale_tensor() sees the new scale.
  s.policy.copy_(vector_of(rule.numbers));
  s.numbers.copy_(loaded);
  s.scale.copy_(s.numbers[math::kStateScale]);
}

void GradScaler::save(torch::serialize::OutputArchive& archive) const {
  archive.write("halfstep_scaler", c10::IValue(state_dict()));
}

void GradScaler::load(torch::serialize::InputArchive& archive) {
  c10::IValue saved;
  TORCH_CHECK(archive.try_read("halfstep_scaler", saved), "the file holds no halfstep GradScaler");
  load_state_dict(saved);
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
