// Traces: what the loss scale and the gradients did, written down as they did it. The file:
// docs/telemetry.md; python/halfstep/_recording.py writes the same.

#include <halfstep/record.h>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>

#include "file.h"
#include "json.h"
#include "scaler_state.h"

namespace halfstep {

using api::Json;

namespace {

constexpr int64_t kHead = 4, kWidth = int64_t(math::kHistColumns) + math::kStatColumns;  // of a Row

std::string list(const double* numbers, int64_t size) {
  Json out('[');
  for (int64_t i = 0; i < size; ++i) out.add(numbers[i]);
  return out.end();
}

/// One tensor's entry of "grads": bins from the first that is not empty to the last.
std::string packed(int64_t tensor, const double* x) {
  const double *bins = x + math::kHistUnder, *end = x + math::kHistColumns;
  const auto filled = [](double count) { return count != 0; };
  const double* first = std::find_if(bins, end, filled);
  while (end > first && end[-1] == 0) --end;
  if (first == end) first = end = bins;
  Json counts('[');
  for (const double* bin = first; bin < end; ++bin) counts.add(int64_t(*bin));
  const double* stats = x + math::kHistColumns;
  return Json('[')
      .add(tensor)
      .add(int64_t(x[math::kHistCount]))
      .add(int64_t(x[math::kHistZeros]))
      .add(int64_t(x[math::kHistNonfinite]))
      .add(x[math::kHistAmax])
      .add(int64_t(stats[math::kStatSubnormals]))
      .add(stats[math::kStatAmax])
      .add(stats[math::kStatSumSquares])
      .add(int64_t(first - bins))
      .raw(counts.end())
      .end();
}

}  // namespace

// ---- what the scaler calls ----------------------------------------------------------------------
std::shared_ptr<Recorder::State> GradScaler::State::recording() const {
  auto held = recorder.lock();
  return held && held->open() ? held : nullptr;
}

void GradScaler::State::show(torch::optim::Optimizer& optimizer, const Progress& progress) const {
  if (progress.stage != Progress::kReady) return;
  if (const auto open = recording()) open->look(optimizer);
}

void Recorder::State::forget() {
  scale = at::Tensor();
  entries.clear();
  seen.clear();
  parts.clear();
}

void Recorder::State::begin(const GradScaler::State& scaler) {
  forget();
  const at::NoGradGuard no_grad;
  if (!told) {
    drain(true);
    const at::Tensor state = scaler.numbers.cpu();
    write(Json('{')
              .add("policy", text_of(scaler.rule))
              .raw("vector", list(scaler.rule.numbers.data(), math::kPolicyEntries))
              .raw("state", list(state.const_data_ptr<double>(), state.numel()))
              .end());
    told = true;
  }
  scale = scaler.numbers[math::kStateScale].clone();
}

void Recorder::State::look(torch::optim::Optimizer& optimizer) {
  if (!scale.defined() || !seen.insert(&optimizer).second) return;
  const auto number = optimizers.try_emplace(&optimizer, int64_t(optimizers.size()) + 1);
  if (rows % every != 0) return;
  const at::NoGradGuard no_grad;
  struct Device {
    c10::Device device;
    std::vector<int64_t> tensors;
    api::OptionalTensors grads;
  };
  std::vector<Device> devices;  // in the order of their first gradients
  const auto* ours = dynamic_cast<const optim::Optimizer*>(&optimizer);
  const std::vector<std::string> names = ours ? ours->names_ : std::vector<std::string>();
  std::set<const void*> listed;  // tied parameters are listed twice
  const auto& groups = optimizer.param_groups();
  for (size_t g = 0; g < groups.size(); ++g)
    for (size_t i = 0; i < groups[g].params().size(); ++i) {
      const at::Tensor &param = groups[g].params()[i], &grad = param.grad();
      if (!grad.defined() || !listed.insert(param.unsafeGetTensorImpl()).second) continue;
      auto on = std::find_if(devices.begin(), devices.end(),
                             [&](const Device& known) { return known.device == grad.device(); });
      if (on == devices.end())
        on = devices.insert(on, Device{grad.device(), {}, api::OptionalTensors()});
      on->tensors.push_back(tensor(number.first->second, optim::name_of(names, g, i), param));
      on->grads.push_back(values_of(grad.is_sparse() ? grad.coalesce() : grad));
    }
  for (const Device& on : devices) {
    const at::Tensor factor = api::to_device(scale, on.device, at::kFloat);
    entries.insert(entries.end(), on.tensors.begin(), on.tensors.end());
    parts.push_back(at::cat(
        {api::grad_histogram(on.grads, factor), api::grad_stats(on.grads).slice(0, 0, -1)}, 1));
  }
}

/// The number of a tensor, which is told before the first row that has it. Another optimizer may
/// come to lie where one was that ended.
int64_t Recorder::State::tensor(int64_t optimizer, const std::string& name,
                                const at::Tensor& param) {
  const auto number = int64_t(tensors.size());
  const auto [known, fresh] =
      tensors.try_emplace({optimizer, name, param.scalar_type(), param.numel()}, number);
  if (!fresh) return known->second;
  drain(true);
  write(Json('{')
            .add("tensor", number)
            .add("name", name)
            .add("optimizer", optimizer)
            .add("dtype", std::string(type_name(param.scalar_type())))
            .add("numel", param.numel())
            .end());
  return number;
}

void Recorder::State::updated(const GradScaler::State& scaler, bool by_hand) {
  if (!scale.defined()) return;
  const at::TensorOptions there = scaler.numbers.options();
  at::Tensor found = scaler.numbers[math::kStateLastFoundInf];
  if (by_hand) {
    std::vector<at::Tensor> flags;
    if (!scaler.fresh)  // else they are of the iteration before
      for (const auto& [optimizer, flag] : scaler.last_found) flags.push_back(flag);
    found = flags.empty() ? at::zeros({1}, there) : scaler.bad_of(flags);
  }
  std::vector<at::Tensor> all = {scale, found, scaler.loss, scaler.numbers[math::kStateScale]};
  all.insert(all.end(), parts.begin(), parts.end());
  for (at::Tensor& part : all)
    part = api::to_device(part.reshape({-1}), there.device(), at::kDouble);
  pending.push_back({++rows, by_hand, std::move(entries), send(at::cat(all))});
  forget();
  drain(false);
}

// ---- to the file --------------------------------------------------------------------------------
Recorder::State::State(const std::string& file, int64_t updates) : path(file), every(updates) {
  const std::string head = Json('{')
                               .add("format", std::string("halfstep-trace"))
                               .add("version", int64_t(1))
                               .add("every", every)
                               .end() +
                           "\n";
  descriptor = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  error = open() ? api::write_all(descriptor, head.data(), head.size()) : errno;
  if (error != 0 && open()) ::close(descriptor);
  check();
}

Recorder::State::~State() {
  if (open()) ::close(descriptor);
}

void Recorder::State::check() const {
  TORCH_CHECK(error == 0, "Recorder: path is '", path,
              "', which cannot be written: ", std::strerror(error));
}

/// One write of one line: a process that is killed leaves whole lines, and at most one part of one.
/// Nothing follows a part.
void Recorder::State::write(const std::string& line) {
  if (error != 0) return;
  const std::string whole = line + "\n";
  error = api::write_all(descriptor, whole.data(), whole.size());
  if (error != 0)
    TORCH_WARN("Recorder: '", path, "' cannot be written any more (", std::strerror(error),
               "); the training goes on without it");
}

std::string Recorder::State::text(const Row& row) const {
  const double* x = row.sent.numbers.const_data_ptr<double>();
  Json line('{');
  line.add("step", row.step).add("scale", x[0]).add("loss", x[2]);
  line.add("found_inf", int64_t(x[1] != 0));
  if (row.by_hand) line.add("set", x[3]);
  if ((row.step - 1) % every == 0) {
    Json grads('[');
    for (size_t i = 0; i < row.tensors.size(); ++i)
      grads.raw(packed(row.tensors[i], x + kHead + int64_t(i) * kWidth));
    line.raw("grads", grads.end());
  }
  return line.end();
}

void Recorder::State::drain(bool wait) {
  while (!pending.empty() && (wait || pending.front().sent.here())) {
    const Row row = std::move(pending.front());
    pending.pop_front();
    row.sent.wait();
    write(text(row));
  }
}

void Recorder::State::close() {
  if (!open()) return;
  std::exception_ptr failed;
  try {
    drain(true);
  } catch (...) {  // of the device; the file is closed all the same
    failed = std::current_exception();
  }
  if (::close(std::exchange(descriptor, -1)) != 0 && error == 0) error = errno;
  if (failed) std::rethrow_exception(failed);
  check();
}

// ---- the class ----------------------------------------------------------------------------------
Recorder::Recorder(GradScaler& scaler, const std::string& path, int64_t every) {
  GradScaler::State& s = *scaler.state_;
  TORCH_CHECK(s.enabled, "Recorder: the GradScaler is disabled, so there is no scale to record");
  TORCH_CHECK(every >= 1, "Recorder: every is ", every, "; expected a whole number from 1");
  TORCH_CHECK(s.rest.empty(), "Recorder: the GradScaler has losses=", s.rest.size() + 1,
              "; a trace holds the scale of one");
  if (const auto open = s.recording())
    TORCH_CHECK(false, "Recorder: the GradScaler is being recorded into '", open->path,
                "' already; close that first");
  state_ = std::make_shared<State>(path, every);
  s.recorder = state_;
}

Recorder::~Recorder() {
  try {
    close();
  } catch (const std::exception&) {  // a warning has said it, or the device will at its next call
  }
}

void Recorder::close() { state_->close(); }
const std::string& Recorder::path() const { return state_->path; }
int64_t Recorder::rows() const { return state_->rows; }

}  // namespace halfstep
