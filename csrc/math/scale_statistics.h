#pragma once

// The policies that look at the gradients: LogMax, Occupancy, Underflow; and one update of any
// policy. What they look at are the tables of grad_stats that the step has made anyway.

#include "scale.h"

namespace halfstep::math {

/// What the tables of one step say, for one policy. Every entry is a maximum or a sum of whole
/// numbers, so that it does not depend on the order of the rows.
struct GradView {
  double amax = 0;  ///< largest |gradient| as stored
  double elements = 0;
  double top = 0;                       ///< upper bound of the elements in the top bin
  double top_grown = 0;                 ///< and of those that a growth would bring there
  double nonzeros = 0, subnormals = 0;  ///< of the tensors with enough non-zeros
  double worst = 0;                     ///< the largest subnormal share among them

  HALFSTEP_FN void add(const GradView& other) {
    amax = BlockStats::larger(amax, other.amax);
    elements += other.elements;
    top += other.top;
    top_grown += other.top_grown;
    nonzeros += other.nonzeros;
    subnormals += other.subnormals;
    worst = worst > other.worst ? worst : other.worst;
  }
};

/// Underflow: an isolated bad step is held against the batch, not the scale, while the largest
/// gradient was more than this factor below overflow.
constexpr double kFarBelow = 8;
/// Underflow: bad steps leak at this rate a clean step; the scale backs off above kBucketHolds.
constexpr double kBucketLeak = 1.0 / 40, kBucketHolds = 1.5;
constexpr double kPeakDecay = 0.95;

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// At most this many elements of a row lie above `edge`: none when the largest does not, and n of
/// them have a sum of squares above n * edge^2.
HALFSTEP_FN double count_above(const double* row, double edge) {
  if (!(row[kStatAmax] > edge)) return 0;
  const double nonzeros = row[kStatCount] - row[kStatZeros];
  const double bound = ::floor(row[kStatSumSquares] / (edge * edge));
  return bound < 1 ? 1 : bound < nonzeros ? bound : nonzeros;
}

/// One row of a grad_stats table.
HALFSTEP_FN GradView view_row(const double* policy, const double* row) {
  GradView view;
  view.amax = row[kStatAmax];
  view.elements = row[kStatCount];
  const double edge = policy[kPolicyEdge] * kLargestHalf;
  view.top = count_above(row, edge);
  view.top_grown = count_above(row, edge / policy[kPolicyGrowthFactor]);
  const double nonzeros = row[kStatCount] - row[kStatZeros];
  if (nonzeros > 0 && nonzeros >= policy[kPolicyLeast]) {
    view.nonzeros = nonzeros;
    view.subnormals = row[kStatSubnormals];
    view.worst = view.subnormals / nonzeros;
  }
  return view;
}

/// LogMax: log2 of the largest gradient is taken as normal; the scale puts its mean and `sigmas`
/// standard deviations below 2^log_max.
HALFSTEP_FN void update_log_max(const double* policy, double* state, bool bad,
                                const GradView& view) {
  const double scale = state[kStateScale];
  double x;
  if (bad) {
    x = ::log2(kLargestHalf / scale) + 1;  // what overflowed lay above the range of this scale
  } else {
    if (!(view.amax > 0)) return;  // nothing is known of a gradient that is zero throughout
    x = ::log2(view.amax / scale);
  }
  const double a = policy[kPolicyMeanDecay], b = policy[kPolicyVarianceDecay];
  state[kStateMean] = a * state[kStateMean] + (1 - a) * x;
  state[kStateMeanLacks] *= a;
  state[kStateSlowMean] = b * state[kStateSlowMean] + (1 - b) * x;
  state[kStateSlowSquare] = b * state[kStateSlowSquare] + (1 - b) * (x * x);
  state[kStateSlowLacks] *= b;
  const double mean = state[kStateMean] / (1 - state[kStateMeanLacks]);
  const double slow = state[kStateSlowMean] / (1 - state[kStateSlowLacks]);
  const double variance = state[kStateSlowSquare] / (1 - state[kStateSlowLacks]) - slow * slow;
  const double spread = policy[kPolicySigmas] * ::sqrt(variance > 0 ? variance : 0);
  const double wanted = double(float(::exp2(policy[kPolicyLogMax] - (mean + spread))));
  state[kStateScale] = bounded_scale(policy, wanted, scale);
}

/// Occupancy: back off when too many gradients lie in the top bin, grow when even twice as large
/// ones would not.
HALFSTEP_FN void update_occupancy(const double* policy, double* state, bool bad,
                                  const GradView& view) {
  const double elements = view.elements > 0 ? view.elements : 1;
  if (!bad) state[kStateShare] = view.top / elements;
  if (bad || state[kStateShare] > policy[kPolicyTarget]) {
    state[kStateGrowthTracker] = 0;
    return change_scale(policy, state, kPolicyBackoffFactor);
  }
  state[kStateGrowthTracker] += 1;
  if (state[kStateGrowthTracker] < policy[kPolicyGrowthInterval] || view.elements == 0) return;
  if (view.top_grown / elements > policy[kPolicyTarget]) return;
  state[kStateGrowthTracker] = 0;
  change_scale(policy, state, kPolicyGrowthFactor);
}

HALFSTEP_FN void underflow_bad(const double* policy, double* state) {
  const double peak = state[kStatePeak], scale = state[kStateScale];
  state[kStateGrowthTracker] = 0;
  state[kStateBucket] += 1;
  const bool far_below = peak > 0 && peak * scale * kFarBelow <= kLargestHalf;
  if (far_below && state[kStateBucket] <= kBucketHolds) return;
  state[kStateBucket] = 0;
  state[kStateCeiling] = scale;
  state[kStateSinceCeiling] = 0;
  change_scale(policy, state, kPolicyBackoffFactor);
}

/// Underflow: grow at once while the subnormal share is above the target, the largest gradient
/// keeps its headroom, and the scale stays below one that overflowed within the interval.
HALFSTEP_FN void update_underflow(const double* policy, double* state, bool bad,
                                  const GradView& view) {
  if (bad) return underflow_bad(policy, state);
  const double scale = state[kStateScale], bucket = state[kStateBucket] - kBucketLeak;
  state[kStateBucket] = bucket > 0 ? bucket : 0;
  const double amax = view.amax / scale, held = state[kStatePeak] * kPeakDecay;
  state[kStatePeak] = amax > held ? amax : held;
  state[kStateGrowthTracker] += 1;
  state[kStateSinceCeiling] += 1;
  if (state[kStateSinceCeiling] >= policy[kPolicyGrowthInterval]) state[kStateCeiling] = 0;
  state[kStateShare] = policy[kPolicyWeighted] == 0 ? view.worst
                       : view.nonzeros > 0          ? view.subnormals / view.nonzeros
                                                    : 0;
  if (view.amax * 2 > kLargestHalf) return change_scale(policy, state, kPolicyBackoffFactor);
  if (!(state[kStateShare] > policy[kPolicyTarget])) return;
  const double grown = scale * policy[kPolicyGrowthFactor];
  if (state[kStatePeak] * grown * policy[kPolicyHeadroom] > kLargestHalf) return;
  if (state[kStateCeiling] > 0 && grown >= state[kStateCeiling]) return;
  state[kStateGrowthTracker] = 0;
  change_scale(policy, state, kPolicyGrowthFactor);
}

/// One update. `view` is of no concern to Static and Dynamic; `proposal` is the scale that a policy
/// of the user asks for, NaN where it does not.
HALFSTEP_FN void update_scale(const double* policy, double* state, bool bad,
                              const GradView& view = {}, double proposal = __builtin_nan("")) {
  count_update(policy, state, bad);
  switch (PolicyKind(int32_t(policy[kPolicyKind]))) {
    case PolicyKind::kDynamic:
      return bad ? dynamic_bad(policy, state) : dynamic_clean(policy, state);
    case PolicyKind::kLogMax:
      return update_log_max(policy, state, bad, view);
    case PolicyKind::kOccupancy:
      return update_occupancy(policy, state, bad, view);
    case PolicyKind::kUnderflow:
      return update_underflow(policy, state, bad, view);
    case PolicyKind::kCustom:
      if (proposal > 0 && proposal <= 0x1.fffffep127)
        state[kStateScale] = bounded_scale(policy, double(float(proposal)), state[kStateScale]);
      return;
    default:
      return;
  }
}

HALFSTEP_MATH_END
