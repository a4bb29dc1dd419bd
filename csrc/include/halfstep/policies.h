#pragma once

#include <array>
#include <string>

#include "export.h"

namespace halfstep::policies {

/// When hysteresis is full again: after every clean step (apex's kernel), or only when the scale
/// grows (Megatron-LM).
enum class Refill { kClean, kGrowth };

/// What a policy is to the scaler: sixteen numbers; the rule runs on the device.
struct HALFSTEP_API Rule {
  std::array<double, 16> numbers{};
};

/// A fixed scale. A step with a non-finite gradient is still skipped.
class HALFSTEP_API Static {
 public:
  explicit Static(double scale = 65536);
  operator Rule() const;  // NOLINT: a policy is given where a Rule is asked for

 private:
  double scale_;
};

/// Grow after growth_interval clean steps in a row, back off on a bad one, within [min, max] scale.
/// Defaults are torch's numbers with floor 2^-14 and ceiling 2^127.
class HALFSTEP_API Dynamic {
 public:
  Dynamic& init_scale(double value);
  Dynamic& growth_factor(double value);
  Dynamic& backoff_factor(double value);
  Dynamic& growth_interval(int value);
  Dynamic& min_scale(double value);
  Dynamic& max_scale(double value);
  Dynamic& hysteresis(int value);
  Dynamic& refill(Refill value);
  operator Rule() const;  // NOLINT

 private:
  double init_scale_ = 65536, growth_factor_ = 2, backoff_factor_ = 0.5;
  double min_scale_ = 0x1p-14, max_scale_ = 0x1p127;
  int growth_interval_ = 2000, hysteresis_ = 1;
  Refill refill_ = Refill::kClean;
};

/// "torch", "apex" or "megatron": that project's rule, within [2^-126, 2^127].
HALFSTEP_API Dynamic preset(const std::string& name);

}  // namespace halfstep::policies
