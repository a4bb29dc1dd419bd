#include <halfstep/policies.h>

#include <c10/util/Exception.h>

#include <cmath>

#include "../math/scale.h"

namespace halfstep::policies {

namespace {

double positive(const char* name, double value) {
  TORCH_CHECK(value > 0 && std::isfinite(value), name, " is ", value,
              "; expected a positive finite number");
  return value;
}

}  // namespace

Static::Static(double scale) : scale_(positive("scale", scale)) {}
Static::operator Rule() const {
  Rule rule;
  rule.numbers[math::kPolicyKind] = double(math::PolicyKind::kStatic);
  rule.numbers[math::kPolicyInitScale] = scale_;
  rule.numbers[math::kPolicyMaxScale] = math::kHighestScale;
  rule.numbers[math::kPolicyHysteresis] = 1;
  return rule;
}

Dynamic& Dynamic::init_scale(double value) {
  init_scale_ = positive("init_scale", value);
  return *this;
}
Dynamic& Dynamic::growth_factor(double value) {
  TORCH_CHECK(value > 1, "growth_factor is ", value, "; expected more than 1");
  growth_factor_ = value;
  return *this;
}
Dynamic& Dynamic::backoff_factor(double value) {
  TORCH_CHECK(value > 0 && value < 1, "backoff_factor is ", value, "; expected between 0 and 1");
  backoff_factor_ = value;
  return *this;
}
Dynamic& Dynamic::growth_interval(int value) {
  TORCH_CHECK(value >= 1, "growth_interval is ", value, "; expected at least 1");
  growth_interval_ = value;
  return *this;
}
Dynamic& Dynamic::min_scale(double value) {
  min_scale_ = value;
  return *this;
}
Dynamic& Dynamic::max_scale(double value) {
  max_scale_ = value;
  return *this;
}
Dynamic& Dynamic::hysteresis(int value) {
  TORCH_CHECK(value >= 1, "hysteresis is ", value, "; expected at least 1");
  hysteresis_ = value;
  return *this;
}
Dynamic& Dynamic::refill(Refill value) {
  refill_ = value;
  return *this;
}

Dynamic::operator Rule() const {
  TORCH_CHECK(min_scale_ <= max_scale_, "min_scale is ", min_scale_, " but max_scale is ",
              max_scale_);
  TORCH_CHECK(min_scale_ <= init_scale_ && init_scale_ <= max_scale_, "init_scale is ", init_scale_,
              " but min_scale is ", min_scale_, " and max_scale is ", max_scale_);
  Rule rule;
  rule.numbers[math::kPolicyKind] = double(math::PolicyKind::kDynamic);
  rule.numbers[math::kPolicyInitScale] = init_scale_;
  rule.numbers[math::kPolicyGrowthFactor] = growth_factor_;
  rule.numbers[math::kPolicyBackoffFactor] = backoff_factor_;
  rule.numbers[math::kPolicyGrowthInterval] = growth_interval_;
  rule.numbers[math::kPolicyMinScale] = min_scale_;
  rule.numbers[math::kPolicyMaxScale] = max_scale_;
  rule.numbers[math::kPolicyHysteresis] = hysteresis_;
  rule.numbers[math::kPolicyRefill] =
      double(refill_ == Refill::kClean ? math::Refill::kClean : math::Refill::kGrowth);
  return rule;
}

Dynamic preset(const std::string& name) {
  Dynamic policy;
  policy.min_scale(math::kLowestScale).max_scale(math::kHighestScale);
  if (name == "torch") return policy;
  if (name == "apex") return policy.max_scale(0x1p24);
  TORCH_CHECK(name == "megatron", "policy preset '", name,
              "' is unknown; known: apex, megatron, torch");
  return policy.init_scale(0x1p32).growth_interval(1000).min_scale(1).hysteresis(2).refill(
      Refill::kGrowth);
}

}  // namespace halfstep::policies
