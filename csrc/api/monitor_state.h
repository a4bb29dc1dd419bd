#pragma once

// What a Monitor knows: monitor.cpp sees it, monitor_report.cpp tells it.

#include <halfstep/monitor.h>
#include <halfstep/shares.h>
#include <halfstep/tensorboard.h>

#include <chrono>
#include <cmath>
#include <deque>
#include <exception>
#include <memory>
#include <optional>
#include <set>
#include <utility>

#include "shadow.h"

namespace halfstep {

namespace monitor {

using Clock = std::chrono::steady_clock;

/// Seconds since 1970.
double now();
double since(Clock::time_point start);
inline double share(int64_t part, int64_t whole) {
  return whole > 0 ? double(part) / double(whole) : 0;
}

/// The scale as change points, and the skipped steps.
struct Trajectory {
  double scale = std::nan("");  // of the next step
  int64_t steps = 0, longest = 0, row = 0, clean = 0;
  std::optional<int64_t> stable;
  std::vector<std::pair<int64_t, double>> points;
  std::deque<int64_t> skipped;

  void add(int64_t step, bool skip, double after);
  std::string json() const;
};

using Key = std::pair<std::string, const char*>;  // name, kind

struct Sample {
  int64_t step;
  double scale;
  std::vector<std::pair<size_t, Shares>> rows;  // by the number of their tensor
};

}  // namespace monitor

struct Monitor::State {
  MonitorOptions options;
  optim::Optimizer* ours = nullptr;
  std::vector<api::Layer> layers;
  size_t next = 0;
  int64_t ticks = 0, base = 0;
  bool closed = false;
  std::string state = "running";
  double started = monitor::now();
  int exceptions = std::uncaught_exceptions();

  std::optional<ScalerStats> newest;
  monitor::Trajectory trajectory;
  std::shared_ptr<api::Shadow> shadow;  // of the layer that this step samples, or null
  size_t shadowed = 0;                  // its number
  std::vector<monitor::Key> tensors;
  std::vector<Shares> totals;
  std::deque<monitor::Sample> samples;
  std::set<std::string> sampled;
  std::map<std::string, std::string> failed;       // layers, and why they cannot be sampled
  std::map<std::string, Shares> weight_gradients;  // of the newest sample of each
  std::map<std::string, TensorStats> gradients;
  std::map<std::string, double> least;  // headroom of each gradient in the run
  int64_t gradients_step = 0;

  monitor::Clock::time_point window = monitor::Clock::now(), last_live = window;
  int64_t window_ticks = 0;
  std::optional<double> rate;
  std::optional<TensorBoardWriter> writer;

  void see(const ScalerStats& stats);
  void place_skips(const ScalerStats& stats);
  void arm();
  void restart();
  void collect(double carried);
  void add(monitor::Sample& sample, const api::Counted& counted);
  void write_sample(const monitor::Sample& sample);
  void keep(std::map<std::string, TensorStats> found, double scale);
  void write_events(const ScalerStats& stats, double carried, double zeros);
  template <class Write>
  void output(const char* what, Write write);
  void tick();

  // ---- monitor_report.cpp
  std::optional<double> headroom(const TensorStats& t) const;
  std::string least_headroom() const;
  std::string most_underflow() const;
  std::string status() const;
  std::string report() const;
  void write_live() const;
};

}  // namespace halfstep
