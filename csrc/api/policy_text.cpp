// A policy in words: python/halfstep/_recording.py has the same of its dataclasses.

#include <c10/util/Type.h>

#include <cstdio>
#include <typeinfo>

#include "scaler_state.h"

namespace halfstep {

namespace {

using Names = std::vector<const char*>;

enum class Kind { kReal, kWhole, kLimit, kName };

struct Field {
  const char* name;
  int entry;
  Kind kind = Kind::kReal;
  Names names = {};  ///< of the values 0, 1, …
};

struct Class {
  const char* name;
  policies::Rule defaults;
  std::vector<Field> fields;  ///< in the order of the Python class
};

Class class_of(math::PolicyKind kind) {
  using namespace math;  // NOLINT: the entries of a rule
  const Field init{"init_scale", kPolicyInitScale}, low{"min_scale", kPolicyMinScale},
      high{"max_scale", kPolicyMaxScale}, growth{"growth_factor", kPolicyGrowthFactor},
      backoff{"backoff_factor", kPolicyBackoffFactor}, target{"target", kPolicyTarget},
      interval{"growth_interval", kPolicyGrowthInterval, Kind::kWhole};
  const Names flag = {"False", "True"};
  switch (kind) {
    case PolicyKind::kStatic:
      return {"Static", policies::Static(), {{"scale", kPolicyInitScale}}};
    case PolicyKind::kLogMax:
      return {"LogMax",
              policies::LogMax(),
              {init,
               low,
               high,
               {"log_max", kPolicyLogMax},
               {"sigmas", kPolicySigmas},
               {"mean_decay", kPolicyMeanDecay},
               {"variance_decay", kPolicyVarianceDecay}}};
    case PolicyKind::kOccupancy:
      return {"Occupancy",
              policies::Occupancy(),
              {target, {"edge", kPolicyEdge}, init, growth, backoff, interval, low, high}};
    case PolicyKind::kUnderflow:
      return {"Underflow",
              policies::Underflow(),
              {target,
               {"reduce", kPolicyWeighted, Kind::kName, {"'worst'", "'weighted'"}},
               init,
               growth,
               backoff,
               interval,
               {"headroom", kPolicyHeadroom},
               {"least", kPolicyLeast, Kind::kWhole},
               low,
               high}};
    default:
      return {
          "Dynamic",
          policies::Dynamic(),
          {init,
           growth,
           backoff,
           interval,
           low,
           high,
           {"hysteresis", kPolicyHysteresis, Kind::kWhole},
           {"refill", kPolicyRefill, Kind::kName, {"'clean'", "'growth'", "'backoff'"}},
           {"tolerance", kPolicyTolerance},
           {"window_follows_scale", kPolicyWindowFollows, Kind::kName, flag},
           {"skip_limit", kPolicySkipLimit, Kind::kLimit},
           {"on_limit", kPolicyOnLimit, Kind::kName, {"'hold'", "'raise'", "callback"}},
           {"faithful_to", kPolicyBounds, Kind::kName, {"None", "'torch'", "'megatron'", "'apex'"}},
           {"growth_delay", kPolicyGrowthDelay, Kind::kWhole},
           {"repeat_delay", kPolicyRepeatDelay, Kind::kWhole},
           {"recover_below", kPolicyRecoverBelow},
           {"recover_interval", kPolicyRecoverInterval, Kind::kWhole},
           {"floor", kPolicyFloorKeeps, Kind::kName, {"'clamp'", "'keep'"}},
           {"floor_is_limit", kPolicyFloorIsLimit, Kind::kName, flag},
           {"arithmetic", kPolicyArithmetic, Kind::kName, {"'rounded'", "'single'", "'double'"}}}};
  }
}

std::string text_of(const Field& field, double value) {
  switch (field.kind) {
    case Kind::kReal: {
      char text[32];
      std::snprintf(text, sizeof text, "%g", value);
      return text;
    }
    case Kind::kWhole:
      return std::to_string(int64_t(value));
    case Kind::kLimit:
      return value == 0 ? "None" : std::to_string(int64_t(value) - 1);
    default:
      return size_t(value) < field.names.size() ? field.names[size_t(value)] : "?";
  }
}

}  // namespace

std::string text_of(const policies::Rule& rule) {
  if (const policies::Policy* custom = rule.custom.get()) {
    const std::string name = c10::demangle(typeid(*custom).name());
    const size_t scope = name.rfind("::", name.find('<'));
    return scope == std::string::npos ? name : name.substr(scope + 2);
  }
  const Class known = class_of(math::PolicyKind(int(rule.numbers[math::kPolicyKind])));
  std::string out;
  for (const Field& field : known.fields) {
    const double value = rule.numbers[size_t(field.entry)];
    if (value == known.defaults.numbers[size_t(field.entry)]) continue;
    out += (out.empty() ? "" : ", ") + std::string(field.name) + "=" + text_of(field, value);
  }
  return std::string(known.name) + "(" + out + ")";
}

}  // namespace halfstep
