// The scaler states of other projects, to and from ours: docs/policies.md.

#include <halfstep/grad_scaler.h>

#include <ATen/ops/full.h>

#include <cmath>

#include "scaler_state.h"

namespace halfstep {

namespace {

using namespace math;  // NOLINT: the entries of a rule

struct Format {
  const char* name;
  std::vector<const char*> keys;  ///< that tell it
  std::vector<int> free;          ///< entries of the rule that are the user's there
};

const std::vector<Format>& formats() {
  static const std::vector<Format> all = {
      {"modulus",
       {"scale", "_growth_tracker", "max_scale", "recover_threshold", "recover_growth_interval"},
       {kPolicyRecoverInterval}},
      {"torch",
       {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"},
       {}},
      {"apex", {"loss_scaler0"}, {}},
      {"megatron", {"scale", "growth_tracker", "hysteresis_tracker"}, {kPolicyHysteresis}},
      {"deepspeed",
       {"cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window"},
       {}},
      {"paddle",
       {"scale", "incr_ratio", "decr_ratio", "incr_every_n_steps", "decr_every_n_nan_or_inf",
        "incr_count", "decr_count", "use_dynamic_loss_scaling"},
       {kPolicyHysteresis}},
      {"colossalai",
       {"scale", "growth_factor", "backoff_factor", "hysteresis"},
       {kPolicyHysteresis}},
      {"fairseq", {"loss_scale"}, {kPolicyTolerance, kPolicyFloorKeeps}},
  };
  return all;
}

const Format& format_of(const std::string& name) {
  std::string known;
  for (const Format& format : formats()) {
    if (name == format.name) return format;
    known += (known.empty() ? "" : ", ") + std::string(format.name);
  }
  TORCH_CHECK(false, "format is '", name, "'; expected one of ", known);
}

/// Refuses a rule that is not of the format's kind.
void check_fits(const policies::Rule& rule, const Format& format) {
  const policies::Rule project = policies::preset(format.name);
  TORCH_CHECK(rule.numbers[kPolicyKind] == 1, "the policy is not a Dynamic one, as the state of ",
              format.name, " is: policies::preset(\"", format.name, "\")");
  const std::pair<int, const char*> shape[] = {{kPolicyRefill, "refill"},
                                               {kPolicyHysteresis, "hysteresis"},
                                               {kPolicyTolerance, "tolerance"},
                                               {kPolicyWindowFollows, "window_follows_scale"},
                                               {kPolicyGrowthDelay, "growth_delay"},
                                               {kPolicyRepeatDelay, "repeat_delay"},
                                               {kPolicyRecoverInterval, "recover_interval"},
                                               {kPolicyFloorKeeps, "floor"}};
  for (const auto& [entry, name] : shape) {
    bool free = false;
    for (const int other : format.free) free |= other == entry;
    const bool nothing_to_refill = entry == kPolicyRefill && rule.numbers[kPolicyHysteresis] == 1 &&
                                   std::string(format.name) != "paddle";
    if (free || nothing_to_refill) continue;
    TORCH_CHECK(rule.numbers[size_t(entry)] == project.numbers[size_t(entry)], "the policy has ",
                name, " ", rule.numbers[size_t(entry)], " but ", format.name, "'s is ",
                project.numbers[size_t(entry)], ": policies::preset(\"", format.name, "\")");
  }
  const std::string name = format.name;
  if (name == "apex" || name == "deepspeed" || name == "fairseq")
    TORCH_CHECK(rule.numbers[kPolicyGrowthFactor] * rule.numbers[kPolicyBackoffFactor] == 1,
                "the policy has two factors, but ", name, " has one and its inverse");
}

double number_in(const StateDict& state, const char* key, const char* format, double least = 0) {
  const c10::IValue value = state.at(key);
  double number = std::nan("");
  if (value.isTensor() && value.toTensor().numel() == 1)
    number = value.toTensor().item<double>();
  else if (value.isDouble() || value.isInt())
    number = value.toScalar().toDouble();
  TORCH_CHECK(number >= least && std::isfinite(number), "the ", format, " state's '", key, "' is ",
              number, "; expected a finite number of at least ", least);
  return number;
}

StateDict torch_state(const double* p, const double* x) {
  StateDict out;
  out.insert("scale", x[kStateScale]);
  out.insert("growth_factor", p[kPolicyGrowthFactor]);
  out.insert("backoff_factor", p[kPolicyBackoffFactor]);
  out.insert("growth_interval", int64_t(p[kPolicyGrowthInterval]));
  return out.insert("_growth_tracker", int64_t(x[kStateGrowthTracker]));
}

StateDict written(const std::string& name, const double* p, const double* x) {
  const at::Tensor scale = at::full({1}, x[kStateScale], at::TensorOptions(at::kFloat));
  const auto tracker = int64_t(x[kStateGrowthTracker]);
  const auto interval = int64_t(p[kPolicyGrowthInterval]);
  StateDict out;
  if (name == "torch") return torch_state(p, x);
  if (name == "modulus") {
    out = torch_state(p, x);
    out.insert("max_scale", p[kPolicyMaxScale]);
    out.insert("recover_threshold", p[kPolicyRecoverBelow]);
    return out.insert("recover_growth_interval", int64_t(p[kPolicyRecoverInterval]));
  }
  if (name == "apex") {
    StateDict first;
    first.insert("loss_scale", x[kStateScale]).insert("unskipped", tracker);
    return out.insert("loss_scaler0", first);
  }
  if (name == "megatron") {
    out.insert("scale", scale).insert("growth_tracker", tracker);
    return out.insert("hysteresis_tracker", int64_t(x[kStateHysteresisLeft]));
  }
  if (name == "deepspeed") {
    const int64_t whole = x[kStateHasGrown] != 0 ? interval + int64_t(p[kPolicyGrowthDelay]) : 0;
    out.insert("dynamic_loss_scale", true).insert("cur_scale", x[kStateScale]);
    out.insert("cur_iter", tracker + whole).insert("last_overflow_iter", int64_t(-1));
    return out.insert("scale_factor", p[kPolicyGrowthFactor]).insert("scale_window", interval);
  }
  const auto hysteresis = int64_t(p[kPolicyHysteresis]);
  if (name == "paddle") {
    out.insert("scale", scale).insert("incr_ratio", p[kPolicyGrowthFactor]);
    out.insert("decr_ratio", p[kPolicyBackoffFactor]).insert("incr_every_n_steps", interval);
    out.insert("decr_every_n_nan_or_inf", hysteresis).insert("incr_count", tracker);
    out.insert("decr_count", hysteresis - int64_t(x[kStateHysteresisLeft]));
    return out.insert("use_dynamic_loss_scaling", true);
  }
  if (name == "colossalai") {
    out.insert("scale", scale).insert("growth_factor", p[kPolicyGrowthFactor]);
    out.insert("backoff_factor", p[kPolicyBackoffFactor]);
    return out.insert("hysteresis", hysteresis);
  }
  return out.insert("loss_scale", x[kStateScale]);
}

/// What the file holds goes into the rule and the state.
void read(const StateDict& state, const char* name, policies::Rule& rule, double* x) {
  const auto number = [&](const char* key, double least = 0) {
    return number_in(state, key, name, least);
  };
  auto& p = rule.numbers;
  const std::string format = name;
  if (format == "modulus" || format == "colossalai") {
    p[kPolicyGrowthFactor] = number("growth_factor");
    p[kPolicyBackoffFactor] = number("backoff_factor");
  }
  if (format == "modulus") {
    p[kPolicyGrowthInterval] = number("growth_interval", 1);
    p[kPolicyMaxScale] = number("max_scale");
    p[kPolicyRecoverBelow] = number("recover_threshold");
    p[kPolicyRecoverInterval] = number("recover_growth_interval");
    x[kStateGrowthTracker] = number("_growth_tracker");
  } else if (format == "megatron") {
    x[kStateGrowthTracker] = number("growth_tracker");
    const double left = number("hysteresis_tracker", -INFINITY);
    x[kStateHysteresisLeft] = left > 0 ? left : 0;
  } else if (format == "deepspeed") {
    const double factor = number("scale_factor", 1), window = number("scale_window", 1);
    p[kPolicyGrowthFactor] = factor;
    p[kPolicyBackoffFactor] = 1 / factor;
    p[kPolicyGrowthInterval] = window;
    const double since = number("cur_iter") - number("last_overflow_iter", -1) - 1;
    const bool grown = since > window;
    x[kStateGrowthTracker] = grown ? double(int64_t(since - 1) % int64_t(window)) : since;
    x[kStateCleanSteps] = since;
    x[kStateHasGrown] = grown;
  } else if (format == "paddle") {
    const c10::IValue on = state.at("use_dynamic_loss_scaling");
    TORCH_CHECK(on.isBool() && on.toBool(),
                "the paddle state's 'use_dynamic_loss_scaling' is False: use policies::Static");
    p[kPolicyGrowthFactor] = number("incr_ratio");
    p[kPolicyBackoffFactor] = number("decr_ratio");
    p[kPolicyGrowthInterval] = number("incr_every_n_steps", 1);
    p[kPolicyHysteresis] = number("decr_every_n_nan_or_inf", 1);
    x[kStateGrowthTracker] = number("incr_count");
    x[kStateHysteresisLeft] = p[kPolicyHysteresis] - number("decr_count");
  } else if (format == "colossalai") {
    p[kPolicyHysteresis] = x[kStateHysteresisLeft] = number("hysteresis", 1);
  }
}

}  // namespace

StateDict exported_state(const policies::Rule& rule, const double* numbers,
                         const std::string& format) {
  check_fits(rule, format_of(format));
  return written(format, rule.numbers.data(), numbers);
}

std::vector<StateDict> states_of_losses(const StateDict& state, size_t losses) {
  std::vector<StateDict> states = {state};
  if (state.size() == 0) return states;  // refused as such
  if (state.contains("halfstep")) {
    const StateDict own = state.at("halfstep");
    const c10::IValue more = own.contains("losses") ? own.at("losses") : c10::IValue();
    TORCH_CHECK(more.isNone() || more.isList(), "scaler state 'losses' is ", more.tagKind(),
                "; expected a list of the states of the losses from 1 on");
    if (more.isList())
      for (const c10::IValue& one : more.toListRef()) states.emplace_back(one);
  } else if (state.contains("loss_scaler0") && losses > 1) {
    states.clear();
    for (size_t i = 0; i < state.size(); ++i) {
      StateDict one;
      states.push_back(one.insert("loss_scaler0", state.at("loss_scaler" + std::to_string(i))));
    }
  }
  TORCH_CHECK(states.size() == losses, "scaler state is of ", states.size(), " loss",
              states.size() > 1 ? "es" : "", " but this GradScaler has losses=", losses);
  return states;
}

StateDict imported_state(const StateDict& state, policies::Rule rule) {
  if (state.contains("halfstep")) return state;
  for (const Format& format : formats()) {
    bool all = true;
    for (const char* key : format.keys) all &= state.contains(key);
    if (!all) continue;
    if (std::string(format.name) == "torch") return state;
    check_fits(rule, format);
    const at::Tensor fresh = api::init_scale_state(vector_of(rule.numbers));
    std::vector<double> x(fresh.const_data_ptr<double>(),
                          fresh.const_data_ptr<double>() + kStateEntries);
    if (std::string(format.name) == "apex") {
      TORCH_CHECK(state.size() == 1, "the apex state has ", state.size(),
                  " scalers, but this GradScaler has one scale");
      const StateDict first = state.at("loss_scaler0");
      x[kStateScale] = number_in(first, "loss_scale", "apex");
      x[kStateGrowthTracker] = number_in(first, "unskipped", "apex");
    } else {
      const char* key = state.contains("cur_scale")    ? "cur_scale"
                        : state.contains("loss_scale") ? "loss_scale"
                                                       : "scale";
      x[kStateScale] = number_in(state, key, format.name);
      read(state, format.name, rule, x.data());
    }
    StateDict own;
    own.insert("format", int64_t(1)).insert("state", list_of(x.data()));
    own.insert("policy", list_of(rule.numbers.data())).insert("updates", int64_t(0));
    return torch_state(rule.numbers.data(), x.data()).insert("halfstep", own);
  }
  return state;  // refused by its keys
}

}  // namespace halfstep
