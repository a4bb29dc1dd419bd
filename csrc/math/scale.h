#pragma once

// The loss scale as one small state machine. A policy is sixteen numbers, a state is sixteen
// numbers; both live in float64 tensors on the device, so a captured step replays with changed
// contents. Rules: torch/amp (_amp_update_scale_), NVIDIA/Megatron-LM DynamicGradScaler,
// NVIDIA/apex amp and update_scale_hysteresis.

#include "platform.h"

namespace halfstep::math {

enum class PolicyKind : int32_t { kStatic = 0, kDynamic = 1 };

/// When hysteresis is refilled.
enum class Refill : int32_t {
  kClean = 0,   ///< on every clean step (apex update_scale_hysteresis)
  kGrowth = 1,  ///< only when the scale grows (Megatron-LM)
};

/// What keeps the scale in bounds. Only kOurs is for training; the others reproduce what the named
/// project does beyond [2^-126, 2^127] too, so that its runs can be replayed.
enum class Bounds : int32_t {
  kOurs = 0,      ///< within [min, max] and [2^-126, 2^127]
  kTorch = 1,     ///< no floor; a growth to infinity is refused
  kMegatron = 2,  ///< at least min; infinity is reached and kept
  kApex = 3,      ///< at most max; held as a double, so that it falls below FP32
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
  kPolicyEntries = 16,
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
  kStateEntries = 16,
};

/// Smallest and largest scale that any policy may hold: both the scale and its reciprocal are
/// finite in FP32.
constexpr double kLowestScale = 0x1p-126;
constexpr double kHighestScale = 0x1p127;

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// The scale for `product`, the exact result of a back-off or growth of `old`. A growth past FP32
/// is refused, as torch does.
HALFSTEP_FN double bounded_scale(const double* policy, double product, double old) {
  const Bounds bounds = Bounds(int32_t(policy[kPolicyBounds]));
  double scale = bounds == Bounds::kApex ? product : double(float(product));
  if ((bounds == Bounds::kOurs || bounds == Bounds::kTorch) && scale > 0x1.fffffep127) scale = old;
  double low = policy[kPolicyMinScale], high = policy[kPolicyMaxScale];
  if (bounds == Bounds::kOurs) {
    low = low > kLowestScale ? low : kLowestScale;
    high = high < kHighestScale ? high : kHighestScale;
  }
  if (!(scale >= low)) return low;  // NaN too
  return scale > high ? high : scale;
}

HALFSTEP_FN void init_scale_state(const double* policy, double* state) {
  for (int i = 0; i < kStateEntries; ++i) state[i] = 0;
  state[kStateScale] = bounded_scale(policy, policy[kPolicyInitScale], policy[kPolicyInitScale]);
  state[kStateHysteresisLeft] = policy[kPolicyHysteresis];
}

/// One update. Products are formed in double and rounded to FP32, as torch does.
///   bad:    tracker = 0; hysteresis -= 1; when it is used up: S = max(S * backoff, min)
///   clean:  tracker += 1; at the interval: S = min(S * growth, max), tracker = 0
HALFSTEP_FN void update_scale(const double* policy, double* state, bool bad) {
  state[kStateLastFoundInf] = bad ? 1 : 0;
  const bool dynamic = PolicyKind(int32_t(policy[kPolicyKind])) == PolicyKind::kDynamic;
  const bool refill_clean = Refill(int32_t(policy[kPolicyRefill])) == Refill::kClean;
  double scale = state[kStateScale];
  if (bad) {
    state[kStateStepsSkipped] += 1;
    state[kStateConsecutiveSkips] += 1;
    state[kStateCleanSteps] = 0;
    state[kStateGrowthTracker] = 0;
    if (!dynamic) return;
    if (state[kStateHysteresisLeft] > 0) state[kStateHysteresisLeft] -= 1;
    if (state[kStateHysteresisLeft] > 0) return;
    scale *= policy[kPolicyBackoffFactor];
  } else {
    state[kStateStepsApplied] += 1;
    state[kStateConsecutiveSkips] = 0;
    state[kStateCleanSteps] += 1;
    if (!dynamic) return;
    state[kStateGrowthTracker] += 1;
    if (refill_clean) state[kStateHysteresisLeft] = policy[kPolicyHysteresis];
    if (state[kStateGrowthTracker] < policy[kPolicyGrowthInterval]) return;
    state[kStateGrowthTracker] = 0;
    state[kStateHysteresisLeft] = policy[kPolicyHysteresis];
    scale *= policy[kPolicyGrowthFactor];
  }
  state[kStateScale] = bounded_scale(policy, scale, state[kStateScale]);
}

HALFSTEP_MATH_END
