#include <halfstep/monitor.h>

#include <ATen/core/grad_mode.h>
#include <halfstep/shares.h>
#include <halfstep/tensorboard.h>
#include <sys/time.h>
#include <torch/nn/module.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <exception>
#include <limits>
#include <optional>
#include <set>
#include <utility>

#include "file.h"
#include "json.h"

namespace halfstep {

namespace {

using api::Json;
using Clock = std::chrono::steady_clock;

constexpr size_t kSamples = 2'000;  // of the newest; what a report sums up is of all
constexpr size_t kSkips = 10'000;
constexpr double kLiveSeconds = 1.0;
constexpr int64_t kStable = 50;  // steps in a row that were taken: the scale has settled
constexpr const char* kWeight = "weight";
constexpr const char* kGradient = "stored weight gradient";

const std::map<std::string, std::vector<std::string>>& alias_tags() {
  static const std::map<std::string, std::vector<std::string>> tags = {
      {"megatron", {"loss-scale", "num-zeros"}},
      {"deepspeed", {"Train/Samples/loss_scale"}},
      {"fairseq", {"loss_scale"}}};
  return tags;
}

double now() {
  timeval time{};
  ::gettimeofday(&time, nullptr);
  return double(time.tv_sec) + 1e-6 * double(time.tv_usec);
}
double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}
double share(int64_t part, int64_t whole) { return whole > 0 ? double(part) / double(whole) : 0; }

/// The scale as change points, and the skipped steps.
struct Trajectory {
  double scale = std::nan("");  // of the next step
  int64_t steps = 0, longest = 0, row = 0, clean = 0;
  std::optional<int64_t> stable;
  std::vector<std::pair<int64_t, double>> points;
  std::deque<int64_t> skipped;

  void add(int64_t step, bool skip, double after) {
    if (step <= steps) {  // an earlier state was loaded
      while (!points.empty() && points.back().first >= step) points.pop_back();
      while (!skipped.empty() && skipped.back() >= step) skipped.pop_back();
    }
    steps = step;
    const double carried = std::isnan(scale) ? after : scale;
    if (points.empty() || points.back().second != carried) points.emplace_back(step, carried);
    if (skip) skipped.push_back(step);
    if (skipped.size() > kSkips) skipped.pop_front();
    row = skip ? row + 1 : 0;
    clean = skip ? 0 : clean + 1;
    longest = std::max(longest, row);
    if (clean == kStable && !stable) stable = step - kStable + 1;
    scale = after;
  }

  std::string json() const {
    if (points.empty()) return "null";
    Json changes('['), skips('[');
    for (const auto& [step, value] : points) changes.raw(Json('[').add(step).add(value).end());
    for (const int64_t step : skipped) skips.add(step);
    return Json('{')
        .add("steps", steps)
        .raw("points", changes.end())
        .raw("skipped", skips.end())
        .add("longest", longest)
        .raw("stable_from", stable ? Json::of(*stable) : "null")
        .end();
  }
};

using Key = std::pair<std::string, const char*>;  // name, kind

struct Sample {
  int64_t step;
  double scale;
  std::vector<std::pair<size_t, Shares>> rows;  // by the number of their tensor
};

}  // namespace

struct Monitor::State {
  using Layer = std::pair<std::string, std::vector<std::pair<std::string, at::Tensor>>>;

  MonitorOptions options;
  optim::Optimizer* ours = nullptr;
  std::vector<Layer> layers;
  size_t next = 0;
  int64_t ticks = 0, base = 0;
  bool closed = false;
  std::string state = "running";
  double started = now();
  int exceptions = std::uncaught_exceptions();

  std::optional<ScalerStats> newest;
  Trajectory trajectory;
  std::vector<Key> tensors;
  std::vector<Shares> totals;
  std::deque<Sample> samples;
  std::set<std::string> sampled;
  std::map<std::string, TensorStats> gradients;
  std::map<std::string, double> least;  // headroom of each gradient in the run
  int64_t gradients_step = 0;

  Clock::time_point window = Clock::now(), last_live = window;
  int64_t window_ticks = 0;
  std::optional<double> rate;
  std::optional<TensorBoardWriter> writer;

  void see(const ScalerStats& stats);
  void place_skips(const ScalerStats& stats);
  void sample(double carried);
  void add(Sample& sample, const std::string& name, const char* kind, const Shares& found);
  void keep(std::map<std::string, TensorStats> found, double scale);
  std::optional<double> headroom(const TensorStats& t) const;
  void write_events(const ScalerStats& stats, double carried, double zeros);
  template <class Write>
  void output(const char* what, Write write);
  void tick();
  void write_live(bool first);
  std::string status() const;
  std::string report() const;
  std::string least_headroom() const;
};

// -- seeing ---------------------------------------------------------------------------------------
/// Each step between two calls is one of the trajectory. Where several updates came at once (on a
/// GPU), their skips are the newest ones: those in a row first.
void Monitor::State::place_skips(const ScalerStats& stats) {
  const int64_t before = newest ? newest->step : stats.step - 1;
  const int64_t skips =
      stats.steps_skipped -
      (newest ? newest->steps_skipped : stats.steps_skipped - int64_t(stats.last_found_inf));
  const int64_t first = stats.step > before ? before + 1 : stats.step;
  for (int64_t step = first; step <= stats.step; ++step) {
    const int64_t left = stats.step - step;
    const bool skip =
        stats.last_found_inf ? left < std::max<int64_t>(skips, 1) : left > 0 && left <= skips;
    trajectory.add(step, skip, step == stats.step ? stats.scale : trajectory.scale);
  }
}

void Monitor::State::see(const ScalerStats& stats) {
  if (stats.step == 0) {  // before the first step
    trajectory.scale = stats.scale;
    newest = stats;
    return;
  }
  if (newest && stats.step == newest->step) return;  // nothing new has arrived
  place_skips(stats);
  newest = stats;
}

/// A disk that is full ends this output, not the training.
template <class Write>
void Monitor::State::output(const char* what, Write write) {
  try {
    write();
  } catch (const c10::Error& error) {
    TORCH_WARN("Monitor: ", what, " cannot be written any more (", error.what_without_backtrace(),
               "); the training and the monitor go on without it");
    if (what == std::string("live"))
      options.live.clear();
    else
      writer.reset();
  }
}

void Monitor::State::add(Sample& sample, const std::string& name, const char* kind,
                         const Shares& found) {
  const Key key{name, kind};
  auto at = std::find(tensors.begin(), tensors.end(), key);
  if (at == tensors.end()) {
    at = tensors.insert(at, key);
    totals.emplace_back();
  }
  const auto number = size_t(at - tensors.begin());
  totals[number] += found;
  sample.rows.emplace_back(number, found);
  if (writer && kind == kWeight && found.nonzero > 0)
    writer->scalar("amp/underflow_share/" + name + "/weight", share(found.underflow, found.nonzero),
                   sample.step);
}

/// The parameters of the next layer; `carried`: what gradients carry that are unscaled in place.
void Monitor::State::sample(double carried) {
  if (layers.empty()) return;
  const at::NoGradGuard no_grad;
  const auto& [layer, parameters] = layers[next++ % layers.size()];
  Sample found{base + ticks, carried, {}};
  for (const auto& [name, parameter] : parameters) {
    if (!parameter.is_floating_point() || parameter.layout() != at::kStrided) continue;
    const at::Tensor exact = ours ? ours->master_param(parameter) : at::Tensor();
    add(found, name, kWeight, shares(exact.defined() ? exact : parameter.detach().to(at::kFloat)));
    const at::Tensor& grad = parameter.grad();
    if (grad.defined() && grad.numel() > 0 && grad.layout() == at::kStrided)
      add(found, name, kGradient, shares(grad.to(at::kFloat), ours ? 1.0 : carried));
  }
  if (found.rows.empty()) return;
  sampled.insert(layer);
  samples.push_back(std::move(found));
  if (samples.size() > kSamples) samples.pop_front();
}

std::optional<double> Monitor::State::headroom(const TensorStats& t) const {
  Shares found;
  found.amax = t.nonfinite > 0 ? 0 : t.amax;
  return found.headroom();
}

/// Statistics of gradients, with the largest magnitudes as they are at the loss scale.
void Monitor::State::keep(std::map<std::string, TensorStats> found, double scale) {
  gradients = std::move(found);
  gradients_step = newest ? newest->step : 0;
  for (auto& [name, t] : gradients) {
    if (t.scale > 0 && std::isfinite(t.scale) && std::isfinite(scale)) t.amax *= scale / t.scale;
    const auto bits = headroom(t);
    if (!bits) continue;
    const auto at = least.emplace(name, *bits).first;
    at->second = std::min(at->second, *bits);
    if (writer) writer->scalar("amp/headroom_bits/" + name, *bits, gradients_step);
  }
}

void Monitor::State::write_events(const ScalerStats& stats, double carried, double zeros) {
  const auto put = [&](const std::string& tag, double value) {
    writer->scalar(tag, value, stats.step);
  };
  put("amp/loss_scale", carried);
  put("amp/loss_scale_log2", std::log2(carried));
  put("amp/skipped_total", double(stats.steps_skipped));
  put("amp/consecutive_skips", double(stats.consecutive_skips));
  put("amp/found_inf", double(stats.last_found_inf));
  put("amp/grad_norm_unscaled", stats.grad_norm);
  for (const auto& alias : options.aliases)
    for (const auto& tag : alias_tags().at(alias)) {
      if (tag != "num-zeros")
        put(tag, carried);
      else if (zeros >= 0)
        put(tag, zeros);
    }
  writer->flush();
}

void Monitor::State::tick() {
  if (const double seconds = since(window); seconds >= kLiveSeconds) {
    rate = double(ticks - window_ticks) / seconds;
    window = Clock::now();
    window_ticks = ticks;
  }
  if (options.live.empty() || since(last_live) < kLiveSeconds) return;
  last_live = Clock::now();
  write_live(false);
}

// -- telling --------------------------------------------------------------------------------------
std::string Monitor::State::least_headroom() const {
  std::optional<std::pair<double, std::string>> worst;
  for (const auto& [name, t] : gradients)
    if (const auto bits = headroom(t); bits && (!worst || *bits < worst->first))
      worst.emplace(*bits, name);
  return worst ? Json('{').add("name", worst->second).add("bits", worst->first).end() : "null";
}

std::string Monitor::State::status() const {
  char host[256] = "";
  ::gethostname(host, sizeof host - 1);
  Json out('{');
  out.add("state", state).add("pid", int64_t(::getpid())).add("host", std::string(host));
  out.add("started", started).add("time", now());
  out.add("step", newest ? newest->step : int64_t(0));
  if (newest) {
    out.add("scale", newest->scale).add("skipped", newest->steps_skipped);
    out.add("consecutive_skips", newest->consecutive_skips);
    if (newest->step > 0) out.add("grad_norm", newest->grad_norm);
    if (!newest->diagnosis.empty()) out.add("diagnosis", newest->diagnosis);
    if (!newest->first_bad_param.empty()) out.add("first_bad_param", newest->first_bad_param);
  }
  const double seconds = since(window);
  if (rate || (ticks > 0 && seconds > 0))
    out.add("steps_per_second", rate ? *rate : double(ticks) / seconds);
  return out.raw("headroom", least_headroom()).end();
}

namespace {

std::string row_of(size_t number, const Shares& s) {
  Json row('[');
  row.add(int64_t(number)).add(s.count).add(s.nonzero).add(s.underflow).add(s.subnormal);
  return row.add(s.overflow).add(s.saturated).add(s.lost).add(s.amax).end();
}

std::string layer_of(const Key& key, const Shares& s) {
  Json row('{');
  row.add("name", key.first).add("kind", std::string(key.second)).add("nonzero", s.nonzero);
  row.add("underflow", share(s.underflow, s.nonzero));
  row.add("subnormal", share(s.subnormal, s.nonzero));
  row.add("overflow", share(s.overflow, s.count)).add("saturated", share(s.saturated, s.count));
  row.add("lost", share(s.lost, s.nonzero));
  return row.raw("headroom", s.headroom() ? Json::of(*s.headroom()) : "null").end();
}

}  // namespace

std::string Monitor::State::report() const {
  Json names('['), taken('['), summed('['), missing('{'), tables('[');
  for (const auto& [name, kind] : tensors)
    names.raw(Json('{').add("name", name).add("kind", std::string(kind)).end());
  for (const Sample& sample : samples) {
    Json rows('[');
    for (const auto& [number, found] : sample.rows) rows.raw(row_of(number, found));
    taken.raw(Json('{')
                  .add("step", sample.step)
                  .add("scale", sample.scale)
                  .raw("rows", rows.end())
                  .end());
  }
  for (size_t i = 0; i < tensors.size(); ++i) summed.raw(layer_of(tensors[i], totals[i]));
  for (const auto& [layer, parameters] : layers)
    if (!sampled.count(layer))
      missing.raw(Json::of(layer) + ":" + Json::of(std::string("no sample came to it yet")));
  for (const auto& [name, t] : gradients) {
    Json row('{');
    row.add("name", name).add("amax", t.amax).add("norm", t.norm).add("zero_share", t.zero_share);
    row.add("subnormal_share", t.subnormal_share).add("nonfinite", t.nonfinite);
    row.raw("headroom", headroom(t) ? Json::of(*headroom(t)) : "null");
    const auto at = least.find(name);
    tables.raw(row.raw("least_headroom", at == least.end() ? "null" : Json::of(at->second)).end());
  }
  Json out('{');
  out.add("format", std::string("halfstep-monitor")).add("version", int64_t(1));
  out.add("every", options.every).raw("status", status()).raw("scale", trajectory.json());
  if (gradients_step > 0)
    out.raw("gradients", Json('{').add("step", gradients_step).raw("tensors", tables.end()).end());
  out.raw("layers", summed.end());
  if (!samples.empty())
    out.raw("shares", Json('{')
                          .add("every", options.every)
                          .raw("tensors", names.end())
                          .raw("samples", taken.end())
                          .end());
  out.raw("unsampled", missing.end());
  out.raw("environment", Json('{').add("libtorch", std::string(TORCH_VERSION)).end());
  return out.end();
}

namespace {

void write_text(const std::string& path, const std::string& text, bool sync) {
  api::AtomicFile file(path);
  file.write(text.data(), text.size());
  file.write("\n", 1);
  file.commit(sync);
}

}  // namespace

void Monitor::State::write_live(bool first) {
  Json data('{');
  data.add("format", std::string("halfstep-monitor")).add("version", int64_t(1));
  data.add("every", options.every).raw("status", status());
  if (first)
    write_text(options.live, data.end(), false);
  else
    output("live", [&] { write_text(options.live, data.end(), false); });
}

// -- the class ------------------------------------------------------------------------------------
Monitor::Monitor(const torch::nn::Module& model, torch::optim::Optimizer& optimizer,
                 MonitorOptions options)
    : state_(std::make_unique<State>()) {
  TORCH_CHECK(options.every >= 1, "Monitor: every is ", options.every,
              "; expected a whole number from 1");
  for (const auto& alias : options.aliases)
    TORCH_CHECK(alias_tags().count(alias), "Monitor: aliases has '", alias,
                "'; expected of megatron, deepspeed, fairseq");
  State& s = *state_;
  s.options = std::move(options);
  s.ours = dynamic_cast<optim::Optimizer*>(&optimizer);
  std::set<const void*> seen;
  for (const auto& item : model.named_parameters()) {
    if (!seen.insert(item.value().unsafeGetTensorImpl()).second) continue;  // tied
    const size_t dot = item.key().rfind('.');
    const std::string layer = dot == std::string::npos ? "(model)" : item.key().substr(0, dot);
    auto at = std::find_if(s.layers.begin(), s.layers.end(),
                           [&](const auto& known) { return known.first == layer; });
    if (at == s.layers.end()) at = s.layers.insert(at, {layer, {}});
    at->second.emplace_back(item.key(), item.value());
  }
  if (!s.options.tensorboard.empty()) s.writer.emplace(s.options.tensorboard);
  if (!s.options.live.empty()) s.write_live(true);
}

Monitor::~Monitor() {
  if (std::uncaught_exceptions() > state_->exceptions) state_->state = "failed";
  close();
}

namespace {
/// Zeros among all gradients; below 0 where they are not known.
double zeros_of(const std::map<std::string, TensorStats>& tensors) {
  double zeros = 0;
  for (const auto& [name, t] : tensors) zeros += t.zero_share * double(t.count);
  return tensors.empty() ? -1 : std::round(zeros);
}
}  // namespace

void Monitor::step(const ScalerStats& stats) { step_with(stats, nullptr); }

void Monitor::step(const GradScaler& scaler) { step_with(scaler.stats(), &scaler); }

void Monitor::step_with(const ScalerStats& stats, const GradScaler* scaler) {
  State& s = *state_;
  if (s.closed) return;
  if (stats.step == 0) return s.see(stats);
  if (s.ticks++ == 0) s.base = stats.step - 1;
  const double carried = std::isnan(s.trajectory.scale) ? stats.scale : s.trajectory.scale;
  const int64_t before = s.newest ? s.newest->step : 0;
  const bool changed = !s.trajectory.points.empty() && s.trajectory.points.back().second != carried;
  s.see(stats);
  const bool due = s.ticks % s.options.every == 0, news = s.newest->step != before;
  if (due) s.sample(carried);
  std::map<std::string, TensorStats> tensors;
  if (scaler && news && (due || (s.writer && !s.options.aliases.empty())))
    tensors = scaler->tensor_stats();
  const double zeros = zeros_of(tensors);
  if (due && scaler && news) s.keep(std::move(tensors), carried);
  if (s.writer && news && (due || changed || stats.last_found_inf || s.ticks == 1))
    s.output("tensorboard", [&] { s.write_events(stats, carried, zeros); });
  s.tick();
}

std::string Monitor::report() const { return state_->report(); }

void Monitor::write_json(const std::string& path) const {
  write_text(path, state_->report(), true);
}

void Monitor::close() {
  State& s = *state_;
  if (s.closed) return;
  s.closed = true;
  if (s.state == "running") s.state = "ended";
  if (!s.options.live.empty()) s.write_live(false);
  if (s.writer) s.output("tensorboard", [&] { s.writer->flush(); });
  s.writer.reset();
}

}  // namespace halfstep
