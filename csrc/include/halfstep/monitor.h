#pragma once

#include <torch/optim/optimizer.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "export.h"
#include "grad_scaler.h"

namespace torch::nn {
class Module;
}

namespace halfstep {

struct MonitorOptions {
  int64_t every = 50;            ///< steps between two samples, from 1
  std::string live = {};         ///< a file for `halfstep watch`, written at most once a second
  std::string tensorboard = {};  ///< a folder for events
  /// Tags of others beside ours: "megatron", "deepspeed", "fairseq".
  std::vector<std::string> aliases = {};
};

/// Watches a training run as it runs, and changes nothing of it:
///   halfstep::Monitor mon(*model, opt, {.every = 50, .live = "live.json"});
///   … scaler.step(opt); scaler.update(); mon.step(scaler); …
///   mon.write_json("monitor.json");
/// The files are those of hs.monitor in Python (docs/monitor.md): `halfstep watch` shows both.
///
/// What it sees: the counters of every step; with step(scaler) each gradient's statistics; and in
/// every `every`-th step the parameters of one layer, the next in turn, of which
///   "weight"                  is the exact weight (the optimizer's master) against FP16, and
///   "stored weight gradient"  is .grad as the step left it: what is subnormal, what is near the
///   end
///                             of FP16 and beyond.
/// What it cannot see: modules of libtorch have no hooks, so no layer can be computed once more in
/// FP32 as in Python. There is nothing about activations and their gradients; and a zero of .grad
/// may have been one or have vanished: "stored weight gradient" knows no underflow, and its
/// `underflow` and `lost` are 0. A gradient that zero_grads or zero_grad() took away before step()
/// is not sampled. A layer here is what owns parameters: "blocks.0.fc" of "blocks.0.fc.weight".
///
/// It belongs to one thread, that of the training. Model and optimizer must outlive it.
class HALFSTEP_API Monitor {
 public:
  /// Throws c10::Error that names the option, or the file that cannot be written.
  Monitor(const torch::nn::Module& model, torch::optim::Optimizer& optimizer,
          MonitorOptions options = {});
  /// close(), as failed where an exception is on its way.
  ~Monitor();
  Monitor(const Monitor&) = delete;
  Monitor& operator=(const Monitor&) = delete;

  /// After scaler.update(), once a step. Called once before the first step as well, it knows the
  /// scale of that step. On a GPU the counters may be those of a step or two before.
  void step(const ScalerStats& stats);
  /// The same with the statistics of each gradient, where they are wanted.
  void step(const GradScaler& scaler);

  /// All that is known by now, as JSON.
  std::string report() const;
  /// report() into a file, which is whole or as it was.
  void write_json(const std::string& path) const;
  /// Says in the live file that the job ended. step() does nothing from here on.
  void close();

 private:
  void step_with(const ScalerStats& stats, const GradScaler* scaler);
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace halfstep
