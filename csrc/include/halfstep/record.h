#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "export.h"
#include "grad_scaler.h"

namespace halfstep {

/// Writes down what the loss scale and the gradients do, a line for each update of the scaler, and
/// changes nothing of the training:
///   halfstep::Recorder recorder(scaler, "run.trace", /*every=*/10);
///   … scaler.step(opt); scaler.update(); …
///   recorder.close();
/// The file is that of hs.record in Python (docs/telemetry.md): `halfstep simulate run.trace`
/// replays it under any policy.
///
/// A line has step, scale, loss and whether a gradient was not finite; at each `every`-th update,
/// the first among them, also a histogram of each gradient of every optimizer that the scaler
/// steps, by the names of named_parameters(). Each line is one write, made when the device has
/// finished its update. Updates wait for the device only where a tensor, or the state of the
/// policy, is recorded for the first time, and for sparse gradients. Steps of a captured CUDA graph
/// cannot be recorded: its replays do not run this code.
///
/// One that is made within an iteration begins with the next. Scaler and recorder may end in any
/// order; both belong to one thread, that of the training.
class HALFSTEP_API Recorder {
 public:
  /// `every`: updates from one histogram to the next, from 1. A file that is there is overwritten.
  /// Throws c10::Error where the scaler is disabled, has several losses or is being recorded
  /// already, and with `every` or `path` and its value; nothing was changed then.
  Recorder(GradScaler& scaler, const std::string& path, int64_t every = 1);
  /// close(), without the exception.
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  /// Waits for what the device has not finished, writes it and ends the recording. Throws
  /// c10::Error, with the path, where the disk did not take a line: the first that it did not take
  /// ended the file, with one warning, and not the training. A second call does nothing.
  void close();
  const std::string& path() const;
  int64_t rows() const;  ///< updates recorded so far

 private:
  friend class GradScaler;
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace halfstep
