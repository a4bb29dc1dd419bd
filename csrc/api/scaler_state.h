#pragma once

#include <halfstep/grad_scaler.h>

#include <deque>
#include <map>

#include "../math/grads.h"
#include "../math/scale_statistics.h"
#include "recorder.h"
#include "room.h"

namespace halfstep {

using GradStats = std::vector<std::pair<optim::Optimizer::Room*, at::Tensor>>;

/// Where one optimizer stands between two updates.
struct Progress {
  enum Stage { kReady, kUnscaled, kStepped } stage = kReady;
  at::Tensor found_inf;  ///< 0-d float on the scale's device, once known
  at::Tensor clip;
};

/// One table of grad_stats of an update, the names of its rows, and the step it belongs to.
struct StatTable {
  at::Tensor table;
  std::vector<std::string> names;
  int64_t step = 0;
};

/// One update's numbers on the host: state, norm, overflow count, loss, the controls of the steps,
/// then the tables of grad_stats (on the CPU they are read where they lie).
struct Snapshot : Arrival {
  static constexpr int64_t kNorm = math::kStateEntries;
  static constexpr int64_t kOverflowed = kNorm + 1;
  static constexpr int64_t kLoss = kNorm + 2;
  static constexpr int64_t kControls = kNorm + 3;

  int64_t updates = 0;
  double floor = 0;  ///< the lowest scale that the policy allows
  std::vector<StatTable> tables;

  /// The rows of table `i`, the totals last.
  const double* rows(size_t i) const;
  const double* totals(size_t i) const {
    return rows(i) + (tables[i].table.size(0) - 1) * math::kStatColumns;
  }
  int64_t steps = 0;
};

struct GradScaler::State {
  policies::Rule rule;
  std::optional<c10::Device> device;
  bool enabled = true;
  at::Tensor scale, numbers, policy;  ///< on the device, once it is known
  at::Tensor early;                   ///< what scale_of() gives before the first loss
  at::Tensor loaded;                  ///< state read before the device is known
  std::map<torch::optim::Optimizer*, Progress> progress;
  std::map<const torch::optim::Optimizer*, at::Tensor> last_found;
  bool fresh = true;
  int64_t updates = 0;
  at::Tensor loss;  ///< float64 [1]: sum of the losses scaled since the last update
  std::vector<at::Tensor> norms, controls, overflowed;
  std::vector<StatTable> rows;
  std::deque<Snapshot> snapshots;           ///< the newest last
  std::vector<at::Tensor> tables;           ///< of gradients that carry the scale: for the policy
  policies::Numbers custom, loaded_custom;  ///< tensors of a policy of the user
  int64_t learned = 0;                      ///< updates that the host has acted on
  double limits = 0;                        ///< times that the limit was reached, as it knows
  bool warned_flush = false;
  int zero_steps = 0;
  mutable bool told_stuck = false;
  /// This one is of loss 0; those of the others have none themselves.
  std::vector<std::unique_ptr<State>> rest;
  bool scaled = false;  ///< since the last update, where there are several losses
  bool told_alone = false;
  std::weak_ptr<Recorder::State> recorder;

  void make(c10::Device on);
  void require(const char* call) const;
  const at::Tensor& scale_of(State& entry, const char* call);
  void begin();
  at::Tensor bad_of(const std::vector<at::Tensor>& flags) const;
  void unscale(torch::optim::Optimizer& optimizer, Progress& progress);
  void step_ours(optim::Optimizer& optimizer, Progress& progress);
  at::Tensor step_other(torch::optim::Optimizer& optimizer, Progress& progress,
                        const torch::optim::Optimizer::LossClosure& closure,
                        const at::Tensor& loss);

  // ---- a recorder of the updates: record.cpp
  /// The one that is open, or null.
  std::shared_ptr<Recorder::State> recording() const;
  /// It sees the gradients while they carry the scale.
  void show(torch::optim::Optimizer& optimizer, const Progress& progress) const;

  // ---- several losses: scaler_losses.cpp
  std::vector<State*> entries();
  State& entry(const char* call, int64_t which);
  /// The same, where no other loss's gradients went through this optimizer since the last update.
  State& entry_for(const char* call, torch::optim::Optimizer& optimizer, int64_t which);
  /// Those that an update moves: something was unscaled or stepped with them.
  std::vector<State*> used();
  /// The others stay where they are, and know nothing of this iteration.
  void leave(const std::vector<State*>& moved);
  void advance(std::optional<double> new_scale);

  // ---- state dicts: scaler_state.cpp
  struct Loaded {
    policies::Rule rule;
    at::Tensor numbers;
    int64_t updates;
    double limits;
    policies::Numbers custom;
  };
  StateDict saved(const std::string& format) const;
  Loaded read(const StateDict& saved) const;  ///< every refusal comes from here
  void take(const Loaded& read);

  // ---- the policy: scaler_policy.cpp
  bool looks_at_gradients() const;
  void look(const std::vector<at::Tensor>& grads);
  void apply_policy(const at::Tensor& found_inf);
  void make_custom(c10::Device on);
  void keep_custom(const policies::Numbers& state);
  void learn();
  void set_scale(double value);

  // ---- telemetry: scaler_stats.cpp
  ScalerStats describe(const Snapshot& snapshot) const;
  GradStats stats_of(torch::optim::Optimizer& optimizer) const;
  void record(const GradStats& stats, const at::Tensor& control);
  /// Queues one copy of this update's numbers to the host; nothing waits for it.
  void take_snapshot();
  /// A snapshot of what was loaded, so that stats() goes on from there.
  void show_loaded();
  void watch_zeros(const Snapshot& snapshot);
  const Snapshot* newest() const;
  /// Why steps are skipped one after another, or empty; warned of once an episode.
  std::string diagnose(const Snapshot& snapshot) const;
};

// ---- the states of other projects: scaler_formats.cpp
StateDict exported_state(const policies::Rule& rule, const double* numbers,
                         const std::string& format);
/// Ours, of a state of another project; ours, torch's and unknown ones pass through.
StateDict imported_state(const StateDict& state, policies::Rule rule);
/// The states of a scaler of so many losses, one by one; of another count they are refused.
std::vector<StateDict> states_of_losses(const StateDict& state, size_t losses);
/// The numbers of a rule or a state.
c10::impl::GenericList list_of(const double* numbers);

/// The tensor with a gradient's numbers: the values of a sparse one.
inline at::Tensor values_of(const at::Tensor& grad) {
  return grad.is_sparse() ? grad._values() : grad;
}

/// A policy's or a state's numbers as a tensor on the CPU.
at::Tensor vector_of(const std::array<double, 32>& numbers);

}  // namespace halfstep
