#pragma once

#include <c10/core/Device.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "optim.h"
#include "policies.h"

namespace halfstep {

class HALFSTEP_API GradScalerOptions {
 public:
  GradScalerOptions& policy(policies::Rule rule);
  /// A policy of the user.
  GradScalerOptions& policy(std::shared_ptr<policies::Policy> custom);
  /// Without it: the device of the first loss.
  GradScalerOptions& device(c10::Device device);
  GradScalerOptions& enabled(bool value);
  /// So many scales of the one policy, each with a state of its own.
  GradScalerOptions& losses(int64_t count);

 private:
  friend class GradScaler;
  policies::Rule rule_ = policies::Dynamic();
  std::optional<c10::Device> device_;
  bool enabled_ = true;
  int64_t losses_ = 1;
};

/// The newest update that the device has finished, as numbers.
struct ScalerStats {
  int64_t step = 0;  ///< updates so far
  double scale = 0;
  int64_t clean_steps = 0;  ///< clean updates in a row
  int64_t steps_applied = 0;
  int64_t steps_skipped = 0;
  int64_t consecutive_skips = 0;
  bool last_found_inf = false;
  std::string first_bad_param;  ///< empty when all gradients were finite
  double grad_norm = 0;         ///< unscaled, before clipping; NaN when found_inf
  double amax = 0;              ///< largest |gradient| as stored
  double zero_share = 0;        ///< zeros / elements
  double subnormal_share = 0;   ///< FP16-subnormal / non-zero
  int64_t overflowed = 0;       ///< weights kept from leaving the 16-bit range, in all
  /// Why no step is taken any more: "loss is not finite", "gradients overflow", "scale is at its
  /// floor"; empty while steps are taken.
  std::string diagnosis;
};

/// One parameter's gradient in the newest update that the device has finished.
struct TensorStats {
  double amax = 0;             ///< largest |gradient| as stored
  double norm = 0;             ///< unscaled, before clipping
  double zero_share = 0;       ///< zeros / elements
  double subnormal_share = 0;  ///< FP16-subnormal / non-zero
  int64_t nonfinite = 0;       ///< elements that are inf or NaN
  int64_t count = 0;           ///< elements
  double scale = 1;            ///< what the gradient carried as stored
};

/// Loss scaling for LibTorch: torch.amp.GradScaler's protocol with a device-side policy.
///   scaler.scale(loss).backward();  scaler.step(opt);  scaler.update();
/// halfstep optimizers unscale inside their step and need no synchronisation; any other
/// torch::optim::Optimizer is unscaled in place, which costs one.
/// Of several losses, `which` says whose scale a loss gets, and which one the gradients of an
/// optimizer carry; update() moves those that something was unscaled or stepped with.
class HALFSTEP_API GradScaler {
 public:
  GradScaler(GradScalerOptions options = {});  // NOLINT: GradScaler scaler;
  ~GradScaler();
  GradScaler(GradScaler&&) noexcept;
  GradScaler& operator=(GradScaler&&) noexcept;

  /// loss * scale; a 16-bit loss is scaled in FP32.
  at::Tensor scale(const at::Tensor& loss, int64_t which = 0);
  /// Divides the optimizer's gradients by the scale; 16-bit gradients of halfstep optimizers become
  /// FP32.
  void unscale_(torch::optim::Optimizer& optimizer, int64_t which = 0);
  /// The optimizer's step unless a gradient is non-finite. The closure, which scales the loss that
  /// it calls backward on and returns the plain one, is evaluated before it; an optimizer of torch
  /// may evaluate it again (LBFGS), and a non-finite gradient then takes the whole step back.
  at::Tensor step(torch::optim::Optimizer& optimizer,
                  const torch::optim::Optimizer::LossClosure& closure = nullptr, int64_t which = 0);
  /// Applies the policy to what this iteration found, or sets all scales. Throws at the policy's
  /// limit, when the host learns of it, under OnLimit::kRaise.
  void update(std::optional<double> new_scale = std::nullopt);
  /// Global norm over all `optimizers`, unscaled; the factor is folded into the step of halfstep
  /// optimizers.
  at::Tensor clip_grad_norm_(const std::vector<torch::optim::Optimizer*>& optimizers,
                             double max_norm, double norm_type = 2.0, int64_t which = 0);

  int64_t losses() const;
  double get_scale(int64_t which = 0) const;
  /// float32, 0-d. Before the first loss only where the options name a device; 1 where not enabled.
  const at::Tensor& scale_tensor(int64_t which = 0) const;
  at::Tensor scales() const;                   ///< of all losses, float32 [losses] on their device
  ScalerStats stats(int64_t which = 0) const;  ///< never waits for a device
  /// By name, of the parameters that had a gradient; never waits for a device.
  std::map<std::string, TensorStats> tensor_stats(int64_t which = 0) const;
  bool step_was_skipped() const;
  bool step_was_skipped(const torch::optim::Optimizer& optimizer) const;
  bool is_enabled() const;

  /// What hs.GradScaler.state_dict() returns in Python: torch's five keys, and ours under
  /// "halfstep"; or the state of another project: "torch", "apex", "megatron", "deepspeed",
  /// "paddle", "colossalai", "fairseq", "modulus". Call it between iterations.
  StateDict state_dict(const std::string& format = "") const;
  /// Takes ours, torch's or another project's, from either language. A refused load leaves the
  /// scaler as it was.
  void load_state_dict(const StateDict& state);
  /// For torch::save and torch::load: state_dict() as an archive, which only C++ reads.
  void save(torch::serialize::OutputArchive& archive) const;
  void load(torch::serialize::InputArchive& archive);

 private:
  friend class Recorder;
  struct State;
  std::unique_ptr<State> state_;
};

/// For torch::save(scaler, path) and torch::load(scaler, path).
HALFSTEP_API torch::serialize::OutputArchive& operator<<(torch::serialize::OutputArchive& archive,
                                                         const GradScaler& scaler);
HALFSTEP_API torch::serialize::InputArchive& operator>>(torch::serialize::InputArchive& archive,
                                                        GradScaler& scaler);

}  // namespace halfstep
