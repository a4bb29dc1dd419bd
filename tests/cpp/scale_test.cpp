#include "math/scale_statistics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "catch.h"

using namespace halfstep::math;

namespace {

using Vector = std::array<double, kPolicyEntries>;

Vector dynamic(double init, double growth, double backoff, double interval, double low, double high,
               double hysteresis, Refill refill) {
  Vector p{};
  p[kPolicyKind] = double(PolicyKind::kDynamic);
  p[kPolicyInitScale] = init;
  p[kPolicyGrowthFactor] = growth;
  p[kPolicyBackoffFactor] = backoff;
  p[kPolicyGrowthInterval] = interval;
  p[kPolicyMinScale] = low;
  p[kPolicyMaxScale] = high;
  p[kPolicyHysteresis] = hysteresis;
  p[kPolicyRefill] = double(refill);
  return p;
}

/// Runs of bad and clean steps: random densities, then the strings that break implementations.
std::vector<std::vector<bool>> strings(int interval) {
  std::vector<std::vector<bool>> all;
  std::mt19937 random(7);
  for (const double share : {0.5, 0.1, 0.01, 0.002}) {
    std::bernoulli_distribution bad(share);
    std::vector<bool> s(100'000);
    std::generate(s.begin(), s.end(), [&] { return bad(random); });
    all.push_back(s);
  }
  all.push_back(std::vector<bool>(500, true));
  all.push_back(std::vector<bool>(5'000, false));
  std::vector<bool> alternate, before, at;
  for (int i = 0; i < 5'000; ++i) {
    alternate.push_back(i % 2);
    before.push_back(i % interval == interval - 1);  // W-1 clean steps, then a bad one
    at.push_back(i % (interval + 1) == interval);    // bad right after the growth step
  }
  all.insert(all.end(), {alternate, before, at});
  return all;
}

/// Megatron-LM's rule, restated from its description: hysteresis refilled on growth only.
struct Megatron {
  float scale = 0x1p32f;
  int tracker = 0, hysteresis = 2, interval;
  void update(bool bad) {
    if (bad) {
      tracker = 0;
      if (--hysteresis <= 0) scale = std::max(scale * 0.5f, 1.0f);
    } else if (++tracker == interval) {
      tracker = 0;
      hysteresis = 2;
      scale = scale * 2.0f;
    }
  }
};

/// apex amp: no hysteresis, ceiling 2^24.
struct Apex {
  float scale = 65536;
  int clean = 0, interval;
  void update(bool bad) {
    clean = bad ? 0 : clean + 1;
    if (bad) scale /= 2;
    if (clean == interval) {
      clean = 0;
      scale = std::min(scale * 2, 16777216.0f);
    }
  }
};

template <class Rule>
void lock_step(const Vector& policy, Rule fresh, int interval) {
  for (const auto& string : strings(interval)) {
    Rule rule = fresh;
    Vector state{};
    init_scale_state(policy.data(), state.data());
    int differs = 0;
    for (const bool bad : string) {
      rule.update(bad);
      if (!(rule.scale <= kHighestScale && rule.scale >= kLowestScale)) break;
      update_scale(policy.data(), state.data(), bad);
      differs += state[kStateScale] != rule.scale;
    }
    CHECK(differs == 0);
  }
}

}  // namespace

TEST_CASE("the megatron rule, in lock-step", "[scale]") {
  const int interval = 20;
  Megatron rule;
  rule.interval = interval;
  lock_step(dynamic(0x1p32, 2, .5, interval, 1, kHighestScale, 2, Refill::kGrowth), rule, interval);
}

TEST_CASE("the apex rule, in lock-step", "[scale]") {
  const int interval = 20;
  Apex rule;
  rule.interval = interval;
  lock_step(dynamic(65536, 2, .5, interval, 0, 16777216, 1, Refill::kClean), rule, interval);
}

TEST_CASE("hysteresis refilled on clean steps forgives single overflows", "[scale]") {
  const Vector policy = dynamic(1024, 2, .5, 1000, 1, 65536, 2, Refill::kClean);
  Vector state{};
  init_scale_state(policy.data(), state.data());
  for (int i = 0; i < 10; ++i)
    for (const bool bad : {true, false}) update_scale(policy.data(), state.data(), bad);
  CHECK(state[kStateScale] == 1024);
  update_scale(policy.data(), state.data(), true);
  update_scale(policy.data(), state.data(), true);
  CHECK(state[kStateScale] == 512);
}

TEST_CASE("the scale never leaves (0, inf), nor does its reciprocal", "[scale]") {
  const Vector policy = dynamic(65536, 2, .5, 1, 0, INFINITY, 1, Refill::kClean);
  Vector state{};
  init_scale_state(policy.data(), state.data());
  for (int i = 0; i < 400; ++i) update_scale(policy.data(), state.data(), true);
  CHECK(state[kStateScale] == kLowestScale);
  CHECK(state[kStateConsecutiveSkips] == 400);
  for (int i = 0; i < 400; ++i) update_scale(policy.data(), state.data(), false);
  CHECK(state[kStateScale] == kHighestScale);
  CHECK(std::isfinite(1.0f / float(kLowestScale)));
  CHECK(1.0f / float(kHighestScale) > 0);
  CHECK(state[kStateStepsApplied] == 400);
  CHECK(state[kStateStepsSkipped] == 400);
}

TEST_CASE("bounds of the originals, for replaying them", "[scale]") {
  const auto ends = [](Bounds bounds, double low, double high, double growth) {
    Vector policy = dynamic(65536, growth, 1 / growth, 1, low, high, 1, Refill::kClean);
    policy[kPolicyBounds] = double(bounds);
    Vector down{}, up{};
    init_scale_state(policy.data(), down.data());
    init_scale_state(policy.data(), up.data());
    for (int i = 0; i < 1200; ++i) update_scale(policy.data(), down.data(), true);
    for (int i = 0; i < 1200; ++i) update_scale(policy.data(), up.data(), false);
    return std::pair(down[kStateScale], up[kStateScale]);
  };
  CHECK(ends(Bounds::kTorch, 0, INFINITY, 2) == std::pair(0.0, 0x1p127));
  CHECK(ends(Bounds::kMegatron, 1, INFINITY, 2) == std::pair(1.0, double(INFINITY)));
  CHECK(ends(Bounds::kApex, 0, 0x1p24, 2) == std::pair(0.0, 0x1p24));
  // A growth past FP32 is refused in ours as in torch: the scale stays where it was.
  CHECK(ends(Bounds::kTorch, 0, INFINITY, 4) == std::pair(0.0, 0x1p126));
  CHECK(ends(Bounds::kOurs, 0, INFINITY, 4) == std::pair(0x1p-126, 0x1p126));
}

TEST_CASE("a static scale stays, and still counts", "[scale]") {
  Vector policy = dynamic(128, 2, .5, 1, 0, INFINITY, 1, Refill::kClean);
  policy[kPolicyKind] = double(PolicyKind::kStatic);
  Vector state{};
  init_scale_state(policy.data(), state.data());
  for (const bool bad : {true, false, true}) update_scale(policy.data(), state.data(), bad);
  CHECK(state[kStateScale] == 128);
  CHECK(state[kStateStepsSkipped] == 2);
}
