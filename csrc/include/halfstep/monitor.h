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
/// every `every`-th step one layer, the next in turn, computed once more in FP32 on the exact
/// weights (the optimizer's masters), as hs.monitor does:
///   "weight", "weight gradient"          of each of its parameters, the gradient of the whole step
///   "activation", "activation gradient"  of its results, and of what it sends back to its inputs
/// A layer is what owns parameters, "blocks.0.fc" of "blocks.0.fc.weight", and modules of libtorch
/// have no hooks: what counts is each op with one of these parameters among its arguments, in
/// whatever function it is called. A gradient must come back to it, so evaluations do not count.
/// docs/monitor.md has the details. Only the op calls of the thread that constructs it and calls
/// step() are seen; layers of which there is no sample are named in the report with the reason.
///
/// Between the end of the step before and step(), a sampled step holds the FP32 copies of one
/// layer; in other steps nothing is registered. It belongs to one thread, that of the training.
/// Model and optimizer must outlive it.
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
