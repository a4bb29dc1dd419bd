#include <halfstep/policies.h>

#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

#include <cmath>

#include "../math/scale_statistics.h"

namespace halfstep::policies {

namespace {

using namespace math;  // NOLINT: the entries of a rule

double positive(const char* name, double value) {
  TORCH_CHECK(value > 0 && std::isfinite(value), name, " is ", value,
              "; expected a positive finite number");
  return value;
}

double usable(const char* name, double value) {
  TORCH_CHECK(
      value >= kLowestScale && value <= kHighestScale, name, " is ", value,
      "; expected between 2^-126 and 2^127, where it and its reciprocal are finite in FP32");
  return value;
}

double at_least(const char* name, double value, double least) {
  TORCH_CHECK(value >= least, name, " is ", value, "; expected at least ", least);
  return value;
}

double fraction(const char* name, double value) {
  TORCH_CHECK(value > 0 && value < 1, name, " is ", value, "; expected between 0 and 1");
  return value;
}

/// What every policy has.
Rule rule_of(PolicyKind kind, double init, double low, double high) {
  Rule rule;
  rule.numbers[kPolicyKind] = double(kind);
  rule.numbers[kPolicyInitScale] = init;
  rule.numbers[kPolicyMinScale] = low;
  rule.numbers[kPolicyMaxScale] = high;
  rule.numbers[kPolicyGrowthFactor] = 2;
  rule.numbers[kPolicyBackoffFactor] = 0.5;
  rule.numbers[kPolicyGrowthInterval] = 2000;
  rule.numbers[kPolicyHysteresis] = 1;
  return rule;
}

Rule checked(const Rule& rule) {
  const double init = rule.numbers[kPolicyInitScale], low = rule.numbers[kPolicyMinScale],
               high = rule.numbers[kPolicyMaxScale];
  if (rule.numbers[kPolicyBounds] == 0) usable("init_scale", init);
  positive("init_scale", init);
  TORCH_CHECK(low <= high, "min_scale is ", low, " but max_scale is ", high);
  TORCH_CHECK(low <= init && init <= high, "init_scale is ", init, " but min_scale is ", low,
              " and max_scale is ", high);
  return rule;
}

at::Tensor totals(const std::vector<at::Tensor>& tables) {
  TORCH_CHECK(!tables.empty(), "no gradient statistics belong to this update");
  std::vector<at::Tensor> rows;
  for (const auto& table : tables) rows.push_back(table.select(0, -1));
  return at::stack(rows);
}

}  // namespace

at::Tensor Stats::amax() const {
  return totals(tables).select(1, kStatAmax).amax().div(scale.to(at::kDouble));
}
at::Tensor Stats::grad_norm() const {
  return totals(tables).select(1, kStatSumSquares).sum().sqrt().div(scale.to(at::kDouble));
}
at::Tensor Stats::zero_share() const {
  const at::Tensor sums = totals(tables).sum(0);
  return sums[kStatZeros].div(sums[kStatCount].clamp_min(1));
}
at::Tensor Stats::subnormal_share() const {
  const at::Tensor sums = totals(tables).sum(0);
  return sums[kStatSubnormals].div(sums[kStatCount].sub(sums[kStatZeros]).clamp_min(1));
}

Policy::~Policy() = default;
Numbers Policy::init() const { return {}; }
bool Policy::host() const { return false; }
at::Tensor Policy::update(Numbers&, const Stats&) {
  TORCH_CHECK(false, "this Policy overrides neither update() nor host() and update_host()");
}
double Policy::update_host(Numbers&, const ScalerStats&) {
  TORCH_CHECK(false, "this Policy is a host() one but does not override update_host()");
}

Static::Static(double scale) : scale_(usable("scale", positive("scale", scale))) {}
Static::operator Rule() const {
  Rule rule = rule_of(PolicyKind::kStatic, scale_, 0, kHighestScale);
  rule.numbers[kPolicyGrowthFactor] = rule.numbers[kPolicyBackoffFactor] =
      rule.numbers[kPolicyGrowthInterval] = 1;
  return rule;
}

// ---- Dynamic ------------------------------------------------------------------------------------

Dynamic::Dynamic() : rule_(rule_of(PolicyKind::kDynamic, 65536, 0x1p-14, kHighestScale)) {}

Dynamic& Dynamic::init_scale(double value) {
  at(kPolicyInitScale) = positive("init_scale", value);
  return *this;
}
Dynamic& Dynamic::growth_factor(double value) {
  TORCH_CHECK(value > 1, "growth_factor is ", value, "; expected more than 1");
  at(kPolicyGrowthFactor) = value;
  return *this;
}
Dynamic& Dynamic::backoff_factor(double value) {
  at(kPolicyBackoffFactor) = fraction("backoff_factor", value);
  return *this;
}
Dynamic& Dynamic::growth_interval(int value) {
  at(kPolicyGrowthInterval) = at_least("growth_interval", value, 1);
  return *this;
}
Dynamic& Dynamic::min_scale(double value) {
  at(kPolicyMinScale) = value;
  return *this;
}
Dynamic& Dynamic::max_scale(double value) {
  at(kPolicyMaxScale) = value;
  return *this;
}
Dynamic& Dynamic::hysteresis(int value) {
  at(kPolicyHysteresis) = at_least("hysteresis", value, 1);
  return *this;
}
Dynamic& Dynamic::refill(Refill value) {
  at(kPolicyRefill) = double(value);
  return *this;
}
Dynamic& Dynamic::tolerance(double value) {
  TORCH_CHECK(value >= 0 && value <= 1, "tolerance is ", value, "; expected from 0 to 1");
  at(kPolicyTolerance) = value;
  return *this;
}
Dynamic& Dynamic::window_follows_scale(bool value) {
  at(kPolicyWindowFollows) = value;
  return *this;
}
Dynamic& Dynamic::skip_limit(int value) {
  at_least("skip_limit", value, 0);
  at(kPolicySkipLimit) = value ? value + 1.0 : 0;
  return *this;
}
Dynamic& Dynamic::on_limit(OnLimit value) {
  at(kPolicyOnLimit) = double(value);
  rule_.on_limit = nullptr;
  return *this;
}
Dynamic& Dynamic::on_limit(LimitCallback call) {
  at(kPolicyOnLimit) = 2;
  rule_.on_limit = std::move(call);
  return *this;
}
Dynamic& Dynamic::floor(Floor value) {
  at(kPolicyFloorKeeps) = double(value);
  return *this;
}
Dynamic& Dynamic::floor_is_limit(bool value) {
  at(kPolicyFloorIsLimit) = value;
  return *this;
}
Dynamic& Dynamic::growth_delay(int first, int repeat) {
  at(kPolicyGrowthDelay) = at_least("growth_delay", first, 0);
  at(kPolicyRepeatDelay) = at_least("repeat_delay", repeat, 0);
  return *this;
}
Dynamic& Dynamic::recover(double below, int interval) {
  at(kPolicyRecoverBelow) = below;
  at(kPolicyRecoverInterval) = at_least("recover_interval", interval, 0);
  return *this;
}
Dynamic& Dynamic::arithmetic(Arithmetic value) {
  at(kPolicyArithmetic) = double(value);
  return *this;
}
Dynamic& Dynamic::faithful_to(Bounds value) {
  at(kPolicyBounds) = double(value);
  return *this;
}
Dynamic::operator Rule() const { return checked(rule_); }

// ---- statistics ---------------------------------------------------------------------------------

LogMax::LogMax() : rule_(rule_of(PolicyKind::kLogMax, 1, 1, 0x1p14)) {
  log_max(16).sigmas(3.09).decays(0.99, 0.999);
}
LogMax& LogMax::init_scale(double value) {
  rule_.numbers[kPolicyInitScale] = value;
  return *this;
}
LogMax& LogMax::min_scale(double value) {
  rule_.numbers[kPolicyMinScale] = value;
  return *this;
}
LogMax& LogMax::max_scale(double value) {
  rule_.numbers[kPolicyMaxScale] = value;
  return *this;
}
LogMax& LogMax::log_max(double value) {
  TORCH_CHECK(std::isfinite(value), "log_max is ", value, "; expected a finite number");
  rule_.numbers[kPolicyLogMax] = value;
  return *this;
}
LogMax& LogMax::sigmas(double value) {
  rule_.numbers[kPolicySigmas] = at_least("sigmas", value, 0);
  return *this;
}
LogMax& LogMax::decays(double mean, double variance) {
  rule_.numbers[kPolicyMeanDecay] = fraction("mean_decay", mean);
  rule_.numbers[kPolicyVarianceDecay] = fraction("variance_decay", variance);
  return *this;
}
LogMax::operator Rule() const { return checked(rule_); }

Occupancy::Occupancy(double target)
    : rule_(rule_of(PolicyKind::kOccupancy, 65536, 0x1p-14, kHighestScale)) {
  TORCH_CHECK(target >= 0 && target < 1, "target is ", target, "; expected from 0 to below 1");
  rule_.numbers[kPolicyTarget] = target;
  edge(0.125).growth_interval(20);
}
Occupancy& Occupancy::edge(double value) {
  rule_.numbers[kPolicyEdge] = fraction("edge", value);
  return *this;
}
Occupancy& Occupancy::init_scale(double value) {
  rule_.numbers[kPolicyInitScale] = value;
  return *this;
}
Occupancy& Occupancy::growth_interval(int value) {
  rule_.numbers[kPolicyGrowthInterval] = at_least("growth_interval", value, 1);
  return *this;
}
Occupancy& Occupancy::min_scale(double value) {
  rule_.numbers[kPolicyMinScale] = value;
  return *this;
}
Occupancy& Occupancy::max_scale(double value) {
  rule_.numbers[kPolicyMaxScale] = value;
  return *this;
}
Occupancy::operator Rule() const { return checked(rule_); }

Underflow::Underflow(double target, Reduce reduce)
    : rule_(rule_of(PolicyKind::kUnderflow, 65536, 0x1p-14, kHighestScale)) {
  TORCH_CHECK(target >= 0 && target < 1, "target is ", target, "; expected from 0 to below 1");
  rule_.numbers[kPolicyTarget] = target;
  rule_.numbers[kPolicyWeighted] = double(reduce);
  headroom(16).least(1000);
}
Underflow& Underflow::init_scale(double value) {
  rule_.numbers[kPolicyInitScale] = value;
  return *this;
}
Underflow& Underflow::growth_interval(int value) {
  rule_.numbers[kPolicyGrowthInterval] = at_least("growth_interval", value, 1);
  return *this;
}
Underflow& Underflow::headroom(double value) {
  rule_.numbers[kPolicyHeadroom] = at_least("headroom", value, 1);
  return *this;
}
Underflow& Underflow::least(int64_t nonzeros) {
  rule_.numbers[kPolicyLeast] = at_least("least", double(nonzeros), 1);
  return *this;
}
Underflow& Underflow::min_scale(double value) {
  rule_.numbers[kPolicyMinScale] = value;
  return *this;
}
Underflow& Underflow::max_scale(double value) {
  rule_.numbers[kPolicyMaxScale] = value;
  return *this;
}
Underflow::operator Rule() const { return checked(rule_); }

// ---- presets ------------------------------------------------------------------------------------

namespace {

/// Beyond the range: what the project does there. Sources: docs/policies.md.
struct Preset {
  const char* name;
  Dynamic policy;
  Bounds bounds;
};

std::vector<Preset> presets() {
  const auto base = [] { return Dynamic().min_scale(kLowestScale).max_scale(kHighestScale); };
  const auto kSingle = Arithmetic::kSingle;
  const auto kDouble = Arithmetic::kDouble;
  const Dynamic deepspeed =
      base().growth_interval(1000).min_scale(1).growth_delay(1).arithmetic(kDouble);
  const Dynamic fairseq = base().init_scale(0x1p15).floor(Floor::kKeep).arithmetic(kDouble);
  return {
      {"torch", base(), Bounds::kTorch},
      {"apex", base().max_scale(0x1p24).arithmetic(kDouble), Bounds::kApex},
      {"megatron",
       base()
           .init_scale(0x1p32)
           .growth_interval(1000)
           .min_scale(1)
           .hysteresis(2)
           .refill(Refill::kGrowth)
           .arithmetic(kSingle),
       Bounds::kMegatron},
      {"deepspeed", Dynamic(deepspeed).init_scale(0x1p32), Bounds::kApex},
      {"deepspeed_zero",
       Dynamic(deepspeed)
           .hysteresis(2)
           .refill(Refill::kGrowth)
           .floor_is_limit()
           .on_limit(OnLimit::kRaise),
       Bounds::kApex},
      {"fairseq",
       Dynamic(fairseq)
           .min_scale(std::nextafter(1e-4, 1.0))
           .floor_is_limit()
           .on_limit(OnLimit::kRaise),
       Bounds::kApex},
      {"metaseq",
       Dynamic(fairseq).init_scale(4).growth_interval(256).min_scale(0x1p-5).window_follows_scale(),
       Bounds::kApex},
      {"keras", base().init_scale(0x1p15).arithmetic(kSingle), Bounds::kMegatron},
      {"tf", base().init_scale(0x1p15).min_scale(1).arithmetic(kSingle), Bounds::kTorch},
      {"jmp", base().init_scale(0x1p15).min_scale(1).arithmetic(kSingle), Bounds::kTorch},
      {"flax", base().growth_delay(1, 1).arithmetic(kSingle), Bounds::kMegatron},
      {"paddle", base().refill(Refill::kBackoff).arithmetic(kSingle), Bounds::kMegatron},
      {"mindspore",
       base()
           .init_scale(0x1p24)
           .min_scale(1)
           .skip_limit(1000)
           .on_limit(OnLimit::kRaise)
           .arithmetic(kDouble),
       Bounds::kApex},
      {"colossalai",
       base()
           .growth_interval(1000)
           .min_scale(1)
           .max_scale(0x1p32)
           .hysteresis(2)
           .refill(Refill::kGrowth)
           .arithmetic(kSingle),
       Bounds::kMegatron},
      {"modulus", base().max_scale(0x1p30).recover(64, 100).arithmetic(kSingle), Bounds::kMegatron},
      {"openseq2seq", base().init_scale(0x1p14).min_scale(1).max_scale(0x1p14).arithmetic(kSingle),
       Bounds::kMegatron},
  };
}

}  // namespace

Dynamic preset(const std::string& name, bool faithful) {
  std::string known;
  for (const Preset& entry : presets()) {
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
    if (name != entry.name) continue;
    Dynamic policy = entry.policy;
    if (!faithful) return policy;
    const bool flax = name == "flax";  // its floor and ceiling are FP32's own
    auto& low = policy.at(kPolicyMinScale);
    auto& high = policy.at(kPolicyMaxScale);
    if (low == kLowestScale && !flax) low = 0;
    if (high == kHighestScale) high = flax ? 0x1.fffffep127 : INFINITY;
    return policy.faithful_to(entry.bounds);
  }
  C10_THROW_ERROR(Error, c10::str("policy preset '", name, "' is unknown; known: ", known));
}

}  // namespace halfstep::policies
