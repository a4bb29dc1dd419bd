#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "export.h"

namespace torch::nn {
class Module;
}

namespace halfstep {

/// Where the first inf or NaN of a run came from.
struct HALFSTEP_API NonFinite {
  bool producer = false;  ///< the op's inputs were finite; else it passed on what came from outside
  std::string phase;      ///< "forward", "backward", "optimizer"
  std::string module;     ///< path of the module, "layers.3.fc"; empty where it is not known
  int64_t call = 0;       ///< which call of that module in the run, from 0
  std::string op;         ///< "aten::addmm", "halfstep::adamw_step_"
  std::string node;       ///< backward only: the autograd node, "AddmmBackward0"
  std::string role;       ///< "activation", "activation gradient", "weight gradient", "weight",
                          ///< "optimizer state", or of what came from outside "input", "weight"
  std::string tensor;     ///< parameter, or argument of the op such as "states[1]"; may be empty
  std::vector<int64_t> index;   ///< of the first bad element
  std::string value;            ///< "inf", "-inf", "nan"
  std::string dtype;            ///< of the tensor, "float16"
  double largest_input = 0;     ///< largest finite magnitude among the op's inputs
  std::string swallowed_by;     ///< a later op that made it finite again; empty where none did
  std::string message() const;  ///< all of it in one sentence
};

/// Looks at every op that runs while it lives, on every thread, forward, backward and in
/// optimizers, and keeps the first whose result is not finite. Slow (each tensor is read), so it is
/// for one iteration run again. -inf made by fills and masks is taken as meant. One at a time in a
/// process.
class HALFSTEP_API NonFiniteFinder {
 public:
  using Named = std::vector<std::pair<std::string, at::Tensor>>;
  /// `parameters`: names for what is found; an op that reads `layers.3.fc.weight` belongs to
  /// `layers.3.fc`, and what follows it to that module too, unless enter() and leave() say better.
  explicit NonFiniteFinder(const Named& parameters);
  ~NonFiniteFinder();
  NonFiniteFinder(const NonFiniteFinder&) = delete;
  NonFiniteFinder& operator=(const NonFiniteFinder&) = delete;

  /// The module whose forward runs now, for callers that know.
  void enter(const std::string& module);
  void leave();
  /// Forces "optimizer" (or another phase) until the empty string is given.
  void set_phase(const std::string& phase);

  /// Ends the search. An op of which all inputs were finite goes before one that passed something
  /// on; none where all was finite.
  std::optional<NonFinite> finish();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// Runs `run` (forward, backward, and the step where that is in doubt) once under a
/// NonFiniteFinder over the module's parameters.
HALFSTEP_API std::optional<NonFinite> find_nonfinite(const torch::nn::Module& module,
                                                     const std::function<void()>& run);

}  // namespace halfstep
