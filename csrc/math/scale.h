#pragma once

// The loss scale as one small state machine. A policy is 32 numbers, a state is 32 numbers; both
// live in float64 tensors on the device, so a captured step replays with changed contents. A zero
// entry means what a shorter vector, saved before the entry existed, meant.
// Rules: docs/policies.md; the projects that they come from are named at each entry.

#include <cmath>

#include "grads.h"
#include "platform.h"

namespace halfstep::math {

enum class PolicyKind : int32_t {
  kStatic = 0,
  kDynamic = 1,
  kLogMax = 2,  ///< scale_statistics.h, as the next two
  kOccupancy = 3,
  kUnderflow = 4,
  kCustom = 5,  ///< the user's: the scale is proposed from outside, bounds and counters are ours
};

/// When hysteresis is refilled.
enum class Refill : int32_t {
  kClean = 0,    ///< on every clean step (apex update_scale_hysteresis)
  kGrowth = 1,   ///< only when the scale grows (Megatron-LM, ColossalAI, DeepSpeed)
  kBackoff = 2,  ///< on every clean step and at each back-off (Paddle)
};

/// What keeps the scale in bounds. Only kOurs is for training; the others reproduce what the named
/// project does beyond [2^-126, 2^127] too, so that its runs can be replayed.
enum class Bounds : int32_t {
  kOurs = 0,      ///< within [min, max] and [2^-126, 2^127]
  kTorch = 1,     ///< at least min; a growth to infinity is refused
  kMegatron = 2,  ///< within [min, max], infinity included, which is kept
  kApex = 3,      ///< within [min, max], held as a double, so that it leaves FP32
};

/// How the product with a factor is formed.
enum class Arithmetic : int32_t {
  kRounded = 0,  ///< in double, rounded to FP32 (torch)
  kSingle = 1,   ///< in FP32 with an FP32 factor (a tensor times a Python number)
  kDouble = 2,   ///< in double and left there (a Python number)
};

enum PolicyEntry : int {
  kPolicyKind = 0,
  kPolicyInitScale = 1,
  kPolicyGrowthFactor = 2,
  kPolicyBackoffFactor = 3,
  kPolicyGrowthInterval = 4,
  kPolicyMinScale = 5,
  kPolicyMaxScale = 6,
  kPolicyHysteresis = 7,  ///< bad steps until the scale backs off; 1 = at once
  kPolicyRefill = 8,
  kPolicyBounds = 9,
  kPolicyArithmetic = 10,
  kPolicyGrowthDelay = 11,      ///< clean steps beyond the interval before the first growth
  kPolicyRepeatDelay = 12,      ///< and before each growth that follows another
  kPolicyTolerance = 13,        ///< share of bad steps since the last change below which it stays
  kPolicyWindowFollows = 14,    ///< 1: the interval grows and shrinks with the scale (metaseq)
  kPolicySkipLimit = 15,        ///< skips in a row from which the limit counts; 0 = no limit
  kPolicyOnLimit = 16,          ///< for the host: 0 hold, 1 raise, 2 call
  kPolicyFloorKeeps = 17,       ///< 1: a back-off below the floor is refused; 0: it ends there
  kPolicyFloorIsLimit = 18,     ///< 1: a back-off that changes nothing counts as the limit
  kPolicyRecoverBelow = 19,     ///< at or below this scale the next entry is the interval (Modulus)
  kPolicyRecoverInterval = 20,  ///< 0: none
  kPolicyTarget = 21,           ///< share that a statistics policy keeps
  kPolicyWeighted = 22,         ///< Underflow: 0 the worst tensor's share, 1 that of all together
  kPolicyHeadroom = 23,         ///< Underflow: largest gradient to overflow, after a growth
  kPolicyEdge = 24,             ///< Occupancy: where the top bin begins, in units of 65504
  kPolicyLeast = 25,            ///< Underflow: non-zeros that a tensor needs to be heard
  kPolicyMeanDecay = 26,        ///< LogMax
  kPolicyVarianceDecay = 27,
  kPolicySigmas = 28,
  kPolicyLogMax = 29,
  kPolicyEntries = 32,
};

enum StateEntry : int {
  kStateScale = 0,
  kStateGrowthTracker = 1,  ///< clean steps since the last growth, back-off or bad step
  kStateHysteresisLeft = 2,
  kStateCleanSteps = 3,    ///< clean steps in a row
  kStateStepsApplied = 4,  ///< clean updates in all
  kStateStepsSkipped = 5,  ///< bad updates in all
  kStateConsecutiveSkips = 6,
  kStateLastFoundInf = 7,  ///< 1 when the last update was bad
  kStateLimits = 8,        ///< times that the limit was reached
  kStateWindow = 9,        ///< the interval where it follows the scale; 0: the policy's
  kStateBadSinceChange = 10,
  kStateSinceChange = 11,   ///< updates since the scale last changed
  kStateHasGrown = 12,      ///< 1 when the scale has grown since the last bad step
  kStatePeak = 13,          ///< Underflow: largest unscaled gradient, slowly forgotten
  kStateBucket = 14,        ///< Underflow: bad steps, leaking
  kStateCeiling = 15,       ///< Underflow: the scale that overflowed; 0: none
  kStateSinceCeiling = 16,  ///< clean steps since then
  kStateMean = 17,          ///< LogMax: sums of x and x^2, and the weight that they lack
  kStateMeanLacks = 18,
  kStateSlowMean = 19,
  kStateSlowSquare = 20,
  kStateSlowLacks = 21,
  kStateShare = 22,  ///< share that a statistics policy saw last
  kStateEntries = 32,
};

/// Smallest and largest scale that any policy may hold: both the scale and its reciprocal are
/// finite in FP32.
constexpr double kLowestScale = 0x1p-126;
constexpr double kHighestScale = 0x1p127;
/// Largest finite FP16 number.
constexpr double kLargestHalf = 65504;

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// `scale * factor` in the policy's arithmetic.
HALFSTEP_FN double scale_product(const double* policy, double scale, double factor) {
  const auto arithmetic = Arithmetic(int32_t(policy[kPolicyArithmetic]));
  if (arithmetic == Arithmetic::kDouble || Bounds(int32_t(policy[kPolicyBounds])) == Bounds::kApex)
    return scale * factor;
  if (arithmetic == Arithmetic::kSingle) return double(float(scale) * float(factor));
  return double(float(scale * factor));
}

/// The scale for `scale`, a back-off or growth of `old`. A growth past FP32 is refused, as torch
/// does.
HALFSTEP_FN double bounded_scale(const double* policy, double scale, double old) {
  const Bounds bounds = Bounds(int32_t(policy[kPolicyBounds]));
  if ((bounds == Bounds::kOurs || bounds == Bounds::kTorch) && scale > 0x1.fffffep127) scale = old;
  double low = policy[kPolicyMinScale], high = policy[kPolicyMaxScale];
  if (bounds == Bounds::kOurs) {
    low = low > kLowestScale ? low : kLowestScale;
    high = high < kHighestScale ? high : kHighestScale;
  }
  if (policy[kPolicyFloorKeeps] != 0 && scale < low && old >= low) return old;
  if (!(scale >= low)) return low;  // NaN too
  return scale > high ? high : scale;
}

HALFSTEP_FN void init_scale_state(const double* policy, double* state) {
  for (int i = 0; i < kStateEntries; ++i) state[i] = 0;
  const double start = scale_product(policy, policy[kPolicyInitScale], 1);
  state[kStateScale] = bounded_scale(policy, start, start);
  state[kStateHysteresisLeft] = policy[kPolicyHysteresis];
  state[kStateMeanLacks] = state[kStateSlowLacks] = 1;
}

/// The interval in force.
HALFSTEP_FN double scale_window(const double* policy, const double* state) {
  if (policy[kPolicyRecoverInterval] > 0 && state[kStateScale] <= policy[kPolicyRecoverBelow])
    return policy[kPolicyRecoverInterval];
  const bool follows = policy[kPolicyWindowFollows] != 0 && state[kStateWindow] > 0;
  return follows ? state[kStateWindow] : policy[kPolicyGrowthInterval];
}

/// Multiplies the scale by a factor of the policy, within its bounds.
HALFSTEP_FN void change_scale(const double* policy, double* state, int factor) {
  const double product = scale_product(policy, state[kStateScale], policy[factor]);
  state[kStateScale] = bounded_scale(policy, product, state[kStateScale]);
}

/// A bad step: the scale backs off once hysteresis is used up and the share of bad steps since the
/// last change has reached the tolerance.
HALFSTEP_FN void dynamic_bad(const double* policy, double* state) {
  state[kStateGrowthTracker] = 0;
  state[kStateHasGrown] = 0;
  state[kStateSinceChange] += 1;
  state[kStateBadSinceChange] += 1;
  if (state[kStateHysteresisLeft] > 0) state[kStateHysteresisLeft] -= 1;
  if (state[kStateHysteresisLeft] > 0) return;
  if (state[kStateBadSinceChange] / state[kStateSinceChange] < policy[kPolicyTolerance]) return;
  state[kStateSinceChange] = 0;
  state[kStateBadSinceChange] = 0;
  if (Refill(int32_t(policy[kPolicyRefill])) == Refill::kBackoff)
    state[kStateHysteresisLeft] = policy[kPolicyHysteresis];
  if (policy[kPolicyWindowFollows] != 0) {
    const double shorter =
        double(int64_t(scale_window(policy, state) / policy[kPolicyGrowthFactor]));
    state[kStateWindow] = shorter > 1 ? shorter : 1;
  }
  const double old = state[kStateScale];
  change_scale(policy, state, kPolicyBackoffFactor);
  if (policy[kPolicyFloorIsLimit] != 0 && state[kStateScale] == old) state[kStateLimits] += 1;
}

/// A clean step: the scale grows at the end of the interval. An interval that follows the scale is
/// counted from the last bad step, in multiples (metaseq).
HALFSTEP_FN void dynamic_clean(const double* policy, double* state) {
  state[kStateGrowthTracker] += 1;
  state[kStateSinceChange] += 1;
  if (Refill(int32_t(policy[kPolicyRefill])) != Refill::kGrowth)
    state[kStateHysteresisLeft] = policy[kPolicyHysteresis];
  const double window = scale_window(policy, state);
  const bool follows = policy[kPolicyWindowFollows] != 0;
  if (follows) {
    if (int64_t(state[kStateCleanSteps]) % int64_t(window) != 0) return;
  } else {
    const double delay =
        policy[state[kStateHasGrown] != 0 ? kPolicyRepeatDelay : kPolicyGrowthDelay];
    if (state[kStateGrowthTracker] < window + delay) return;
  }
  state[kStateGrowthTracker] = 0;
  state[kStateSinceChange] = 0;
  state[kStateHasGrown] = 1;
  state[kStateHysteresisLeft] = policy[kPolicyHysteresis];
  if (follows) {
    const double longer = double(int64_t(window * policy[kPolicyGrowthFactor]));
    state[kStateWindow] = longer < 0x1p53 ? longer : 0x1p53;
  }
  change_scale(policy, state, kPolicyGrowthFactor);
}

/// What every update counts, whatever the policy.
HALFSTEP_FN void count_update(const double* policy, double* state, bool bad) {
  state[kStateLastFoundInf] = bad ? 1 : 0;
  state[bad ? kStateStepsSkipped : kStateStepsApplied] += 1;
  state[kStateConsecutiveSkips] = bad ? state[kStateConsecutiveSkips] + 1 : 0;
  state[kStateCleanSteps] = bad ? 0 : state[kStateCleanSteps] + 1;
  if (bad && policy[kPolicySkipLimit] > 0 &&
      state[kStateConsecutiveSkips] >= policy[kPolicySkipLimit])
    state[kStateLimits] += 1;
}

HALFSTEP_MATH_END
