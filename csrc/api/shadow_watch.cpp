// The ops of a thread, shown to the shadows that watch it.

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <optional>

#include "observe.h"
#include "shadow.h"

namespace halfstep::api {

namespace {

/// Callbacks of RecordFunction are plain functions: what they are for is found here.
struct Watched {
  std::vector<std::weak_ptr<Shadow>> shadows;
  at::CallbackHandle handle = 0;
  int ops = 0;             // ops within ops that run now
  int differentiated = 0;  // nodes of a backward that is itself recorded for autograd
};
Watched& watched() {
  thread_local Watched of_this_thread;
  return of_this_thread;
}

struct Seen : at::ObserverContext {
  std::optional<Running> running;
  std::vector<std::pair<std::shared_ptr<Shadow>, std::shared_ptr<Shadow::Pending>>> pending;
};

void start(const at::RecordFunction& fn, Seen& seen) {
  Watched& here = watched();
  if (here.shadows.empty()) return;  // another thread's callback, which autograd took along
  if (fn.scope() == at::RecordScope::BACKWARD_FUNCTION) {
    // Its ops are the gradient's, not the layer's. A forward that is computed again in a backward
    // (checkpointing) turns the recording on itself, and is one of the layer.
    if (at::GradMode::is_enabled()) seen.running.emplace(here.differentiated);
    return;
  }
  const auto name = fn.operator_name();
  if (!name) return;
  seen.running.emplace(here.ops);
  if (here.ops > 1 || here.differentiated > 0 || !at::GradMode::is_enabled()) return;
  const auto op = c10::Dispatcher::singleton().findSchema(*name);
  if (!op) return;
  for (const auto& watching : here.shadows)
    if (auto shadow = watching.lock())
      if (auto pending = shadow->before(*op, fn.inputs()))
        seen.pending.emplace_back(std::move(shadow), std::move(pending));
}

std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& fn) {
  auto seen = std::make_unique<Seen>();
  start(fn, *seen);
  return seen;
}

void on_end(const at::RecordFunction& fn, at::ObserverContext* context) {
  if (!context || fn.outputs().empty()) return;  // an op that throws ends without a result
  for (auto& [shadow, pending] : static_cast<Seen*>(context)->pending)
    shadow->behind(*pending, fn.outputs());
}

}  // namespace

void show_ops(const std::shared_ptr<Shadow>& shadow) {
  Watched& here = watched();
  here.shadows.push_back(shadow);
  if (here.handle != 0) return;
  here.handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(on_start, on_end)
          .needsInputs(true)
          .needsOutputs(true)
          .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION}));
}

void hide_ops(const Shadow* shadow) {
  Watched& here = watched();
  std::erase_if(here.shadows, [&](const std::weak_ptr<Shadow>& watching) {
    const auto known = watching.lock();
    return !known || known.get() == shadow;
  });
  if (!here.shadows.empty() || here.handle == 0) return;
  at::removeCallback(here.handle);
  here.handle = 0;
}

}  // namespace halfstep::api
