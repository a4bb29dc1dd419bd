#include <halfstep/monitor.h>

#include <torch/nn/module.h>

#include <algorithm>
#include <limits>

#include "monitor_state.h"

namespace halfstep {

using namespace monitor;  // NOLINT: what a Monitor knows

namespace {

constexpr size_t kSamples = 2'000;  // of the newest; what a report sums up is of all
constexpr size_t kSkips = 10'000;
constexpr double kLiveSeconds = 1.0;
constexpr int64_t kStable = 50;  // steps in a row that were taken: the scale has settled

const std::map<std::string, std::vector<std::string>>& alias_tags() {
  static const std::map<std::string, std::vector<std::string>> tags = {
      {"megatron", {"loss-scale", "num-zeros"}},
      {"deepspeed", {"Train/Samples/loss_scale"}},
      {"fairseq", {"loss_scale"}}};
  return tags;
}

}  // namespace

// -- seeing ---------------------------------------------------------------------------------------
void Trajectory::add(int64_t step, bool skip, double after) {
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

/// Watches the next layer, if the coming step is one to sample.
void Monitor::State::arm() {
  if (closed || (ticks + 1) % options.every != 0) return;
  for (size_t tried = 0; tried < layers.size() && !shadow; ++tried) {
    shadowed = next++ % layers.size();
    if (!failed.count(layers[shadowed].name)) shadow = api::Shadow::watch(layers, shadowed, ours);
  }
}

/// What ran before the first step, or with a scaler that is disabled, is not kept.
void Monitor::State::restart() {
  if (!shadow) return;
  shadow = nullptr;
  shadow = api::Shadow::watch(layers, shadowed, ours);
}

/// What was seen of the layer in the step that ended; `carried`: the scale of its gradients.
void Monitor::State::collect(double carried) {
  if (!shadow) return;
  const auto ended = std::exchange(shadow, nullptr);
  const std::string& layer = layers[shadowed].name;
  const auto found = ended->finish();
  if (!ended->error().empty()) failed[layer] = ended->error();
  if (found.empty()) return;
  sampled.insert(layer);
  Sample sample{base + ticks, carried, {}};
  for (const auto& counted : found) add(sample, counted);
  if (writer) output("tensorboard", [&] { write_sample(sample); });
  samples.push_back(std::move(sample));
  if (samples.size() > kSamples) samples.pop_front();
}

/// The calls of a layer are one row.
void Monitor::State::add(Sample& sample, const api::Counted& counted) {
  const Key key{counted.name, counted.kind};
  const auto at = std::find(tensors.begin(), tensors.end(), key);
  const auto number = size_t(at - tensors.begin());
  if (at == tensors.end()) {
    tensors.push_back(key);
    totals.emplace_back();
  }
  totals[number] += counted.shares;
  auto row = std::find_if(sample.rows.begin(), sample.rows.end(),
                          [&](const auto& known) { return known.first == number; });
  if (row == sample.rows.end()) row = sample.rows.insert(row, {number, Shares()});
  row->second += counted.shares;
  if (key.second == std::string("weight gradient")) weight_gradients[key.first] = row->second;
}

void Monitor::State::write_sample(const Sample& sample) {
  for (const auto& [number, found] : sample.rows) {
    if (found.nonzero == 0) continue;
    auto [name, kind] = std::make_pair(tensors[number].first, std::string(tensors[number].second));
    std::replace(kind.begin(), kind.end(), ' ', '_');
    writer->scalar("amp/underflow_share/" + name + "/" + kind,
                   share(found.underflow, found.nonzero), sample.step);
  }
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
  output("live", [&] { write_live(); });
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
  s.layers = api::layers_of(model);
  if (!s.options.tensorboard.empty()) s.writer.emplace(s.options.tensorboard);
  if (!s.options.live.empty()) s.write_live();  // a path that cannot be written is told now
  s.arm();
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
  if (stats.step == 0) {
    s.restart();
    return s.see(stats);
  }
  if (s.ticks++ == 0) s.base = stats.step - 1;
  const double carried = std::isnan(s.trajectory.scale) ? stats.scale : s.trajectory.scale;
  const int64_t before = s.newest ? s.newest->step : 0;
  const bool changed = !s.trajectory.points.empty() && s.trajectory.points.back().second != carried;
  s.see(stats);
  const bool due = s.ticks % s.options.every == 0, news = s.newest->step != before;
  s.collect(carried);
  std::map<std::string, TensorStats> tensors;
  if (scaler && news && (due || (s.writer && !s.options.aliases.empty())))
    tensors = scaler->tensor_stats();
  const double zeros = zeros_of(tensors);
  if (due && scaler && news) s.keep(std::move(tensors), carried);
  if (s.writer && news && (due || changed || stats.last_found_inf || s.ticks == 1))
    s.output("tensorboard", [&] { s.write_events(stats, carried, zeros); });
  s.arm();
  s.tick();
}

void Monitor::close() {
  State& s = *state_;
  if (s.closed) return;
  s.closed = true;
  s.shadow.reset();
  if (s.state == "running") s.state = "ended";
  if (!s.options.live.empty()) s.output("live", [&] { s.write_live(); });
  if (s.writer) s.output("tensorboard", [&] { s.writer->flush(); });
  s.writer.reset();
}

}  // namespace halfstep
