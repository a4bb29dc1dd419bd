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

/// Vectors of 1.0 hold the first sixteen numbers; a zero stands for what they meant.
constexpr size_t kShortest = 16, kNumbers = math::kPolicyEntries;

std::array<double, kNumbers> numbers_of(const StateDict& own, const char* key) {
  const c10::IValue value = own.at(key);
  const size_t size = value.isList() ? value.toListRef().size() : 0;
  TORCH_CHECK(size >= kShortest && size <= kNumbers, "scaler state '", key, "' is ",
              value.tagKind(), " of ", size, " entries; expected a list of 16 to 32 numbers");
  std::array<double, kNumbers> numbers{};
  for (size_t i = 0; i < size; ++i) {
    const c10::IValue& entry = value.toListRef()[i];
    TORCH_CHECK(entry.isDouble() || entry.isInt(), "scaler state '", key, "' holds ",
                entry.tagKind(), "; expected a list of 16 to 32 numbers");
    numbers[i] = entry.toScalar().toDouble();
  }
  return numbers;
}

double whole(const std::array<double, kNumbers>& rule, int entry, double most, const char* name) {
  const double value = rule[size_t(entry)];
  TORCH_CHECK(value >= 0 && value <= most && value == double(int64_t(value)),
              "scaler state has policy ", name, " ", value, "; this halfstep knows 0 to ", most);
  return value;
}

/// Refuses numbers that no policy of this version has.
void check_rule(const std::array<double, kNumbers>& rule) {
  const double kind = rule[math::kPolicyKind];
  TORCH_CHECK(kind >= 0 && kind <= 5 && kind == double(int(kind)),
              "scaler state is of policy kind ", kind,
              "; this halfstep knows 0 (Static), 1 (Dynamic), 2 (LogMax), 3 (Occupancy), 4 "
              "(Underflow), 5 (a Policy of yours)");
  if (kind == 0) return;
  policies::Rule(
      policies::Dynamic()
          .init_scale(rule[math::kPolicyInitScale])
          .growth_factor(rule[math::kPolicyGrowthFactor])
          .backoff_factor(rule[math::kPolicyBackoffFactor])
          .growth_interval(int(rule[math::kPolicyGrowthInterval]))
          .min_scale(rule[math::kPolicyMinScale])
          .max_scale(rule[math::kPolicyMaxScale])
          .hysteresis(int(rule[math::kPolicyHysteresis]))
          .refill(policies::Refill(int(whole(rule, math::kPolicyRefill, 2, "refill"))))
          .tolerance(rule[math::kPolicyTolerance])
          .arithmetic(
              policies::Arithmetic(int(whole(rule, math::kPolicyArithmetic, 2, "arithmetic"))))
          .faithful_to(policies::Bounds(int(whole(rule, math::kPolicyBounds, 3, "bounds")))));
  whole(rule, math::kPolicyOnLimit, 2, "on_limit");
  whole(rule, math::kPolicyFloorKeeps, 1, "floor");
}

/// The tensors of a policy of the user. A saved policy that holds code the file cannot hold (a
/// Policy, a callback) is taken only by a scaler that has its own.
policies::Numbers custom_of(const StateDict& own, policies::Rule& rule) {
  const bool here = rule.custom != nullptr;
  const bool saved = rule.numbers[math::kPolicyKind] == double(math::PolicyKind::kCustom);
  TORCH_CHECK(here == saved, "scaler state is of ",
              saved ? "a Policy of yours" : "a policy of halfstep", " but this GradScaler has ",
              here ? "a Policy of yours" : "a policy of halfstep");
  policies::Numbers loaded;
  if (rule.numbers[math::kPolicyOnLimit] != 2) rule.on_limit = nullptr;
  if (!here) return loaded;
  const StateDict tensors = own.at("policy_state");
  for (const auto& [name, tensor] : rule.custom->init()) {
    const c10::IValue value = tensors.at(name);
    TORCH_CHECK(value.isTensor() && value.toTensor().sizes() == tensor.sizes(),
                "scaler state's policy '", name, "' is ",
                value.isTensor() ? c10::str(value.toTensor().sizes()) : value.tagKind(),
                " but the policy's is ", tensor.sizes());
    loaded[name] = value.toTensor();
  }
  return loaded;
}

}  // namespace

c10::impl::GenericList list_of(const double* numbers) {
  c10::impl::GenericList list(c10::AnyType::get());
  for (size_t i = 0; i < kNumbers; ++i) list.push_back(numbers[i]);
  return list;
}

StateDict GradScaler::State::saved(const std::string& format) const {
  const State& s = *this;
  StateDict out;
  const at::Tensor state = s.numbers.defined()  ? s.numbers.cpu()
                           : s.loaded.defined() ? s.loaded
                                                : api::init_scale_state(vector_of(s.rule.numbers));
  const double* x = state.const_data_ptr<double>();
  if (!format.empty()) return exported_state(s.rule, x, format);
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
  const policies::Numbers& custom = s.scale.defined() ? s.custom : s.loaded_custom;
  if (s.rule.custom) {
    StateDict tensors;
    for (const auto& [name, tensor] : custom.empty() ? s.rule.custom->init() : custom)
      tensors.insert(name, tensor.detach().cpu().clone());
    own.insert("policy_state", tensors);
  }
  return out.insert("halfstep", own);
}

StateDict GradScaler::state_dict(const std::string& format) const {
  const State& s = *state_;
  if (!s.enabled) return {};
  const StateDict out = s.saved(format);
  if (s.rest.empty()) return out;
  TORCH_CHECK(format.empty() || format == "apex", "state_dict(\"", format,
              "\"): this GradScaler has losses=", losses(), ", but the state of ", format,
              " holds one scale");
  c10::impl::GenericList others(c10::AnyType::get());
  StateDict all = format.empty() ? StateDict(out.at("halfstep")) : out;
  for (size_t i = 0; i < s.rest.size(); ++i) {
    const StateDict one = s.rest[i]->saved(format);
    if (format.empty())
      others.push_back(one);
    else
      all.insert("loss_scaler" + std::to_string(i + 1), one.at("loss_scaler0"));
  }
  if (format.empty()) all.insert("losses", others);
  return out;
}

GradScaler::State::Loaded GradScaler::State::read(const StateDict& saved) const {
  const State& s = *this;
  TORCH_CHECK(saved.size() > 0,
              "the scaler state is empty: was it saved from a disabled GradScaler?");
  const StateDict state = imported_state(saved, s.rule);
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
  policies::Numbers custom;
  std::array<double, kNumbers> numbers{};
  int64_t updates = s.updates;
  const bool ours = state.contains("halfstep");
  if (ours) {
    const StateDict own = state.at("halfstep");
    const double format = own.contains("format") ? number_at(own, "format") : 0;
    TORCH_CHECK(format == 1, "scaler state has format ", format, "; this halfstep reads format 1");
    rule.numbers = numbers_of(own, "policy");
    numbers = numbers_of(own, "state");
    updates = int64_t(number_at(own, "updates"));
    custom = custom_of(own, rule);
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
  return {rule, loaded, updates, numbers[math::kStateLimits], custom};
}

void GradScaler::State::take(const Loaded& read) {
  rule = read.rule;
  loaded = read.numbers;
  updates = learned = read.updates;
  limits = read.limits;
  loaded_custom = read.custom;
  show_loaded();
  if (const auto open = recording()) open->restart();
  if (!scale.defined()) return;
  // In place: whoever holds scale_tensor() sees the new scale.
  policy.copy_(vector_of(rule.numbers));
  numbers.copy_(loaded);
  scale.copy_(numbers[math::kStateScale]);
  for (auto& [name, tensor] : custom)
    if (loaded_custom.count(name)) tensor.copy_(loaded_custom[name]);
}

void GradScaler::load_state_dict(const StateDict& saved) {
  if (!state_->enabled) return;
  const std::vector<State*> entries = state_->entries();
  const std::vector<StateDict> states = states_of_losses(saved, entries.size());
  std::vector<State::Loaded> read;
  for (size_t i = 0; i < states.size(); ++i) read.push_back(entries[i]->read(states[i]));
  for (size_t i = 0; i < states.size(); ++i) entries[i]->take(read[i]);
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
