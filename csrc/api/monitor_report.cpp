#include <sys/time.h>
#include <torch/version.h>
#include <unistd.h>

#include "file.h"
#include "json.h"
#include "monitor_state.h"

namespace halfstep {

using api::Json;
using namespace monitor;  // NOLINT: what a Monitor knows

double monitor::now() {
  timeval time{};
  ::gettimeofday(&time, nullptr);
  return double(time.tv_sec) + 1e-6 * double(time.tv_usec);
}

double monitor::since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::string Trajectory::json() const {
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

std::optional<double> Monitor::State::headroom(const TensorStats& t) const {
  Shares found;
  found.amax = t.nonfinite > 0 ? 0 : t.amax;
  return found.headroom();
}

std::string Monitor::State::least_headroom() const {
  std::optional<std::pair<double, std::string>> worst;
  for (const auto& [name, t] : gradients)
    if (const auto bits = headroom(t); bits && (!worst || *bits < worst->first))
      worst.emplace(*bits, name);
  return worst ? Json('{').add("name", worst->second).add("bits", worst->first).end() : "null";
}

/// The weight gradient of which FP16 loses the largest share.
std::string Monitor::State::most_underflow() const {
  std::optional<std::pair<double, std::string>> worst;
  for (const auto& [name, found] : weight_gradients)
    if (found.nonzero > 0)
      worst = std::max(
          worst, std::make_optional(std::make_pair(share(found.underflow, found.nonzero), name)));
  return worst ? Json('{').add("name", worst->second).add("share", worst->first).end() : "null";
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
  return out.raw("headroom", least_headroom()).raw("underflow", most_underflow()).end();
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
  for (const auto& layer : layers) {
    if (sampled.count(layer.name)) continue;
    const auto why = failed.find(layer.name);
    missing.raw(Json::of(layer.name) + ":" +
                Json::of(why == failed.end() ? "not called in a sampled step" : why->second));
  }
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

void Monitor::State::write_live() const {
  Json data('{');
  data.add("format", std::string("halfstep-monitor")).add("version", int64_t(1));
  data.add("every", options.every).raw("status", status());
  write_text(options.live, data.end(), false);
}

std::string Monitor::report() const { return state_->report(); }

void Monitor::write_json(const std::string& path) const {
  write_text(path, state_->report(), true);
}

}  // namespace halfstep
