#pragma once

// What a Recorder knows. The scaler holds it weakly, so that either may end first.

#include <halfstep/record.h>

#include <deque>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "arrival.h"

namespace halfstep {

struct Recorder::State {
  State(const std::string& file, int64_t updates);
  ~State();
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  // ---- what the scaler calls
  /// Another state was loaded into the scaler.
  void restart() { told = false; }
  /// Before anything of an iteration is unscaled or stepped.
  void begin(const GradScaler::State& scaler);
  /// The gradients of `optimizer`, which carry the scale, once an iteration.
  void look(torch::optim::Optimizer& optimizer);
  /// After the scaler's update; by_hand: the user set the scale instead of the policy.
  void updated(const GradScaler::State& scaler, bool by_hand);

  // ---- to the file
  bool open() const { return descriptor >= 0; }
  void close();

  std::string path;
  int64_t every, rows = 0;

 private:
  /// One update, on its way or arrived: scale, found_inf, loss, the scale after it, then for each
  /// of `tensors` a row of grad_histogram and one of grad_stats.
  struct Row {
    int64_t step;
    bool by_hand;
    std::vector<int64_t> tensors;
    Arrival sent;
  };
  void forget();
  int64_t tensor(int64_t optimizer, const std::string& name, const at::Tensor& param);
  void drain(bool wait);
  void check() const;  ///< throws where the disk did not take something
  void write(const std::string& line);
  std::string text(const Row& row) const;

  int descriptor = -1, error = 0;
  bool told = false;  ///< the policy and its state are in the file
  using Known = std::tuple<int64_t, std::string, at::ScalarType, int64_t>;
  std::map<Known, int64_t> tensors;                              ///< the number of each
  std::map<const torch::optim::Optimizer*, int64_t> optimizers;  ///< likewise, from 1
  std::deque<Row> pending;
  // Of the iteration that runs:
  at::Tensor scale;  ///< in its gradients; undefined: it is not recorded
  std::vector<int64_t> entries;
  std::set<const torch::optim::Optimizer*> seen;
  std::vector<at::Tensor> parts;
};

/// The policy in few words, as in Python: "Dynamic(init_scale=1024)", what differs from the
/// defaults. One of the user's is its class's name.
std::string text_of(const policies::Rule& rule);

}  // namespace halfstep
