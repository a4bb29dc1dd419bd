#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "export.h"

namespace halfstep {
struct ScalerStats;
}

/// Loss-scaling policies. Each fills the numbers of a Rule, which runs on the device:
/// docs/policies.md.
namespace halfstep::policies {

/// When hysteresis is full again: after every clean step (apex's kernel), only when the scale grows
/// (Megatron-LM), or after every clean step and every back-off (Paddle).
enum class Refill { kClean, kGrowth, kBackoff };
/// A back-off below the floor ends at it, or is refused (fairseq, metaseq).
enum class Floor { kClamp, kKeep };
/// What happens at the skip limit: nothing, or update() throws.
enum class OnLimit { kHold, kRaise };
/// How products are formed: in double and rounded to FP32, in FP32, or in double for good.
enum class Arithmetic { kRounded, kSingle, kDouble };
/// What happens beyond [2^-126, 2^127]: ours stays there; the others do what that project does.
enum class Bounds { kOurs, kTorch, kMegatron, kApex };
/// Underflow: the worst tensor's share, or that of all tensors together.
enum class Reduce { kWorst, kWeighted };

using LimitCallback = std::function<void(const ScalerStats&)>;

/// What a policy of the user sees of one step, all on the device.
struct HALFSTEP_API Stats {
  at::Tensor found_inf;                ///< 0-d float, not 0 after a bad step
  at::Tensor scale;                    ///< 0-d float: the scale of this step
  std::vector<at::Tensor> tables;      ///< of grad_stats, one a group: csrc/math/grads.h
  at::Tensor amax() const;             ///< largest |gradient|, unscaled
  at::Tensor grad_norm() const;        ///< unscaled
  at::Tensor zero_share() const;       ///< zeros / elements
  at::Tensor subnormal_share() const;  ///< FP16-subnormal / non-zero
};

using Numbers = std::map<std::string, at::Tensor>;

/// To subclass. update() returns the scale that follows; the scaler keeps it finite and within
/// [min_scale, max_scale], and writes it only after this step's gradients were unscaled.
class HALFSTEP_API Policy {
 public:
  virtual ~Policy();
  /// Tensors that belong to the policy: moved to the device once, saved in checkpoints.
  virtual Numbers init() const;
  /// On the device: no synchronisation, so that the step can be captured. `state` holds init()'s
  /// tensors; write into them, or put new ones in their place.
  virtual at::Tensor update(Numbers& state, const Stats& stats);
  /// true: update_host() is called instead, when the host has the numbers of a step.
  virtual bool host() const;
  virtual double update_host(Numbers& state, const ScalerStats& stats);

  double init_scale = 65536, min_scale = 0x1p-14, max_scale = 0x1p127;
};

/// What a policy is to the scaler.
struct HALFSTEP_API Rule {
  std::array<double, 32> numbers{};
  LimitCallback on_limit;          ///< Dynamic's
  std::shared_ptr<Policy> custom;  ///< a policy of the user
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
  Dynamic();
  Dynamic& init_scale(double value);
  Dynamic& growth_factor(double value);
  Dynamic& backoff_factor(double value);
  Dynamic& growth_interval(int value);
  Dynamic& min_scale(double value);
  Dynamic& max_scale(double value);
  Dynamic& hysteresis(int value);
  Dynamic& refill(Refill value);
  /// Back off only when this share of the steps since the last change was bad.
  Dynamic& tolerance(double value);
  /// The interval grows and shrinks with the scale.
  Dynamic& window_follows_scale(bool value = true);
  /// More skips in a row than this reach the limit; 0: there is none.
  Dynamic& skip_limit(int value);
  Dynamic& on_limit(OnLimit value);
  Dynamic& on_limit(LimitCallback call);
  Dynamic& floor(Floor value);
  /// A bad step that finds the scale at its floor reaches the limit too.
  Dynamic& floor_is_limit(bool value = true);
  /// Clean steps beyond the interval, before the first growth and before each that follows another.
  Dynamic& growth_delay(int first, int repeat = 0);
  /// At or below this scale the interval is `interval`.
  Dynamic& recover(double below, int interval);
  Dynamic& arithmetic(Arithmetic value);
  Dynamic& faithful_to(Bounds value);
  operator Rule() const;  // NOLINT

 private:
  friend Dynamic preset(const std::string& name, bool faithful);
  double& at(int entry) { return rule_.numbers[size_t(entry)]; }
  Rule rule_;
};

/// log2 of the largest gradient is taken as normal: the scale keeps its mean and 3.09 standard
/// deviations below overflow (OpenSeq2Seq).
class HALFSTEP_API LogMax {
 public:
  LogMax();
  LogMax& init_scale(double value);
  LogMax& min_scale(double value);
  LogMax& max_scale(double value);
  LogMax& log_max(double value);
  LogMax& sigmas(double value);
  LogMax& decays(double mean, double variance);
  operator Rule() const;  // NOLINT

 private:
  Rule rule_;
};

/// Keeps the share of the gradients above edge * 65504 below the target (Graphcore).
class HALFSTEP_API Occupancy {
 public:
  explicit Occupancy(double target = 1e-7);
  Occupancy& edge(double value);
  Occupancy& init_scale(double value);
  Occupancy& growth_interval(int value);
  Occupancy& min_scale(double value);
  Occupancy& max_scale(double value);
  operator Rule() const;  // NOLINT

 private:
  Rule rule_;
};

/// Keeps the FP16-subnormal share of the non-zero gradients below the target.
class HALFSTEP_API Underflow {
 public:
  explicit Underflow(double target = 1e-3, Reduce reduce = Reduce::kWorst);
  Underflow& init_scale(double value);
  Underflow& growth_interval(int value);
  Underflow& headroom(double value);
  Underflow& least(int64_t nonzeros);
  Underflow& min_scale(double value);
  Underflow& max_scale(double value);
  operator Rule() const;  // NOLINT

 private:
  Rule rule_;
};

/// That project's rule, within [2^-126, 2^127] or, faithful, beyond: "torch", "apex", "megatron",
/// "deepspeed", "deepspeed_zero", "fairseq", "metaseq", "keras", "tf", "jmp", "flax", "paddle",
/// "mindspore", "colossalai", "modulus", "openseq2seq".
HALFSTEP_API Dynamic preset(const std::string& name, bool faithful = false);

}  // namespace halfstep::policies
