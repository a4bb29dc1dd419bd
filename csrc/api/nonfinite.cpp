#include <halfstep/nonfinite.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <ATen/record_function.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>
#include <sstream>
#include <unordered_map>
#include <unordered_set>

#include "observe.h"

namespace halfstep {

namespace {

enum class Content { kFinite, kMinusInfinity, kBad };  // in the order of what is worse

/// Ops whose result is memory that nobody has written yet.
bool is_unwritten(const std::string& op) {
  return op.starts_with("aten::empty") || op.starts_with("aten::new_empty") ||
         op.starts_with("aten::_empty") || op.starts_with("aten::resize");
}
/// Ops that exchange with other processes, and write when those are ready: during the call or after
/// it. What they bring came from outside, and the op that reads it says so.
bool is_collective(const std::string& op) {
  return op.starts_with("c10d::") || op.starts_with("_c10d_functional");
}
/// Ops that write constants: -inf is meant.
bool fills(const std::string& op) {
  static constexpr std::array kNames = {
      "aten::full",          "aten::full_like",      "aten::new_full",     "aten::fill_",
      "aten::fill",          "aten::masked_fill",    "aten::masked_fill_", "aten::where",
      "aten::scalar_tensor", "aten::lift_fresh",     "aten::index_put_",   "aten::copy_",
      "aten::_to_copy",      "aten::constant_pad_nd"};
  return std::find(kNames.begin(), kNames.end(), op) != kNames.end();
}
/// Ops that look at nothing of the tensor that they write.
bool overwrites(const std::string& op) {
  static constexpr std::array kNames = {"aten::copy_",   "aten::fill_",    "aten::zero_",
                                        "aten::normal_", "aten::uniform_", "aten::bernoulli_",
                                        "aten::random_", "aten::set_",     "halfstep::unscale_to_"};
  return std::find(kNames.begin(), kNames.end(), op) != kNames.end();
}

struct Argument {
  std::string name;
  at::Tensor tensor;
  bool written = false, read = true;
};

bool looked_at(const at::Tensor& t) {
  return t.defined() && at::isFloatingType(t.scalar_type()) && !t.is_meta() && t.numel() > 0 &&
         (t.layout() == at::kStrided || t.layout() == at::kSparse);
}
at::Tensor dense(const at::Tensor& t) { return t.is_sparse() ? t._values() : t; }

void add(std::vector<Argument>& to, const std::string& name, const c10::IValue& value, bool written,
         bool read) {
  api::each_tensor(value, [&](const at::Tensor& tensor, int64_t index) {
    const std::string at = index < 0 ? "" : "[" + std::to_string(index) + "]";
    if (looked_at(tensor)) to.push_back({name + at, tensor, written, read});
  });
}

/// Inside, nothing is recorded, observed or cast.
struct Unseen {
  api::Unobserved unobserved;
  at::NoGradGuard no_grad;
};

Content content(const at::Tensor& t) {
  const at::Tensor values = dense(t).detach();
  if (at::isfinite(values).all().item<bool>()) return Content::kFinite;
  const at::Tensor allowed = at::isfinite(values).logical_or(values.isneginf());
  return allowed.all().item<bool>() ? Content::kMinusInfinity : Content::kBad;
}
double largest(const at::Tensor& t) {
  const at::Tensor values = dense(t).detach().to(at::kDouble).abs();
  return at::where(at::isfinite(values), values, 0.0).max().item<double>();
}

/// Fills in what is known of the bad tensor itself.
void describe(NonFinite& found, const at::Tensor& tensor, bool minus_counts) {
  const at::Tensor values = dense(tensor).detach();
  at::Tensor bad = at::isfinite(values).logical_not();
  if (!minus_counts) bad = bad.logical_and(values.isneginf().logical_not());
  const at::Tensor where = bad.nonzero()[0].to(at::kCPU);
  for (int64_t d = 0; d < where.numel(); ++d) found.index.push_back(where[d].item<int64_t>());
  at::Tensor element = values;
  for (const int64_t i : found.index) element = element[i];
  const double value = element.item<double>();
  found.value = std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
  std::ostringstream dtype;
  dtype << tensor.scalar_type();
  found.dtype = tensor.scalar_type() == at::kHalf       ? "float16"
                : tensor.scalar_type() == at::kBFloat16 ? "bfloat16"
                : tensor.scalar_type() == at::kFloat    ? "float32"
                : tensor.scalar_type() == at::kDouble   ? "float64"
                                                        : dtype.str();
}

std::string owner(const std::string& parameter) {
  const size_t dot = parameter.rfind('.');
  return dot == std::string::npos ? "" : parameter.substr(0, dot);
}

struct Node {
  std::string name;
  int64_t sequence;
};
/// Autograd nodes that run in this thread now.
std::vector<Node>& nodes() {
  thread_local std::vector<Node> running;
  return running;
}
/// Ops within ops that run in this thread now.
int& depth() {
  thread_local int count = 0;
  return count;
}

/// One op or node from start to end. Both of the above go back with it, whatever ends it.
struct Seen : at::ObserverContext {
  Seen() = default;
  Seen(const Seen&) = delete;
  Seen& operator=(const Seen&) = delete;
  ~Seen() override {
    if (is_node) nodes().pop_back();
  }
  std::string op;
  std::vector<Argument> arguments;
  std::vector<std::string> returned;  // names of the schema's results, mostly empty
  Content worst = Content::kFinite;
  std::optional<api::Running> running;
  bool observed = false, is_node = false;
};

}  // namespace

struct NonFiniteFinder::State {
  std::mutex mutex;
  std::unordered_map<const void*, std::string> parameters;  // by the address of their first element
  Named named;
  std::vector<std::pair<std::string, int64_t>> entered;
  std::unordered_map<std::string, int64_t> calls;
  std::string last_module, forced_phase;
  std::unordered_map<int64_t, std::pair<std::string, int64_t>> made_by;  // sequence number: module
  std::unordered_set<const void*> gradients;
  bool after_backward = false, gradients_known = false;
  std::optional<NonFinite> produced, passed_on;
  at::Tensor bad;  // of `produced`; kept so that its memory is not used again
  at::CallbackHandle handle = 0;

  /// The module of an op in the forward, and which call of it.
  std::pair<std::string, int64_t> place(const std::vector<Argument>& arguments) {
    if (!entered.empty()) return entered.back();
    for (const Argument& a : arguments) {
      const auto it = parameters.find(dense(a.tensor).const_data_ptr());
      if (it != parameters.end()) last_module = owner(it->second);
    }
    return {last_module, 0};
  }

  bool belongs_to_optimizer(const std::string& op, const std::vector<Argument>& arguments) {
    if (!forced_phase.empty()) return forced_phase == "optimizer";
    if (op.starts_with("halfstep::") && op.ends_with("_step_")) return true;
    if (!after_backward) return false;
    if (!gradients_known) {
      gradients_known = true;
      for (const auto& [_, p] : named)
        if (p.grad().defined() && looked_at(p.grad()))
          gradients.insert(dense(p.grad()).const_data_ptr());
    }
    return std::any_of(arguments.begin(), arguments.end(), [&](const Argument& a) {
      const void* address = dense(a.tensor).const_data_ptr();
      return gradients.count(address) > 0 || (a.written && parameters.count(address) > 0);
    });
  }

  void start(const at::RecordFunction& fn, Seen& seen) {
    if (fn.scope() == at::RecordScope::BACKWARD_FUNCTION) {
      nodes().push_back({fn.name(), fn.seqNr()});
      seen.is_node = true;
      const std::lock_guard<std::mutex> lock(mutex);
      after_backward = true;
      gradients_known = false;
      gradients.clear();
      return;
    }
    const auto name = fn.operator_name();
    if (!name) {  // an autograd function written in Python or C++ makes its node here
      const std::lock_guard<std::mutex> lock(mutex);
      if (nodes().empty() && fn.seqNr() >= 0) made_by[fn.seqNr()] = place({});
      return;
    }
    seen.running.emplace(depth());
    // Ops within an op are its own affair: memory is handed on there before it is written.
    if (depth() > 1) return;
    const auto handle_of_op = c10::Dispatcher::singleton().findSchema(*name);
    if (!handle_of_op) return;
    seen.op = name->name;
    if (is_unwritten(seen.op)) return;
    const Unseen unseen;
    const auto& schema = handle_of_op->schema();
    const auto inputs = fn.inputs();
    for (size_t i = 0; i < schema.arguments().size() && i < inputs.size(); ++i) {
      const auto& argument = schema.arguments()[i];
      const bool written = api::is_written(argument);
      const bool read = !argument.is_out() && !(written && overwrites(seen.op));
      add(seen.arguments, argument.name(), inputs[i], written, read);
    }
    for (const auto& result : schema.returns()) seen.returned.push_back(result.name());
    seen.observed = !is_collective(seen.op);
    for (const Argument& a : seen.arguments)
      if (seen.observed && a.read) seen.worst = std::max(seen.worst, content(a.tensor));
    const std::lock_guard<std::mutex> lock(mutex);
    if (!nodes().empty() || fn.seqNr() < 0) return;
    after_backward = false;  // recorded for autograd: another forward
    made_by[fn.seqNr()] = place(seen.arguments);
  }

  void end(const at::RecordFunction& fn, Seen& seen) {
    if (!seen.observed) return;
    const Unseen unseen;
    std::vector<Argument> results;
    const auto& outputs = fn.outputs();
    for (size_t i = 0; i < outputs.size(); ++i) {
      const std::string name = i < seen.returned.size() ? seen.returned[i] : "";
      add(results, name, outputs[i], false, true);
    }
    for (const Argument& a : seen.arguments)
      if (a.written) results.push_back(a);
    Content worst = Content::kFinite;
    const Argument* bad_result = nullptr;
    for (const Argument& r : results) {
      const Content c = content(r.tensor);
      if (c > worst) {
        worst = c;
        bad_result = &r;
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (seen.worst == Content::kBad && worst != Content::kBad && !results.empty()) swallow(seen);
    if (!bad_result) return;
    if (worst == Content::kMinusInfinity && (seen.worst != Content::kFinite || fills(seen.op)))
      return;
    report(seen, *bad_result, worst);
  }

  /// A later op took the bad tensor itself and gave something finite.
  void swallow(const Seen& seen) {
    std::optional<NonFinite>& found = produced ? produced : passed_on;
    if (!found || !found->swallowed_by.empty() || !bad.defined()) return;
    for (const Argument& a : seen.arguments)
      if (a.read && a.tensor.is_alias_of(bad)) found->swallowed_by = seen.op;
  }

  void report(Seen& seen, const Argument& result, Content worst) {
    const bool producer = seen.worst != Content::kBad;
    std::optional<NonFinite>& place_of_it = producer ? produced : passed_on;
    if (place_of_it) return;
    NonFinite found;
    found.producer = producer;
    found.op = seen.op;
    const Argument* source = &result;
    if (!producer)  // what came in says more than what went out
      for (const Argument& a : seen.arguments)
        if (a.read && content(a.tensor) == Content::kBad) source = &a;
    found.tensor = source->name;
    describe(found, source->tensor, worst == Content::kMinusInfinity);
    for (const Argument& a : seen.arguments)
      if (a.read) found.largest_input = std::max(found.largest_input, largest(a.tensor));
    locate(found, seen, *source);
    if (producer || !bad.defined()) bad = result.tensor;
    place_of_it = std::move(found);
  }

  void locate(NonFinite& found, const Seen& seen, const Argument& source) {
    const auto parameter = parameters.find(dense(source.tensor).const_data_ptr());
    const bool is_parameter = parameter != parameters.end();
    if (!nodes().empty()) {
      found.phase = "backward";
      found.node = nodes().back().name;
      const auto made = made_by.find(nodes().back().sequence);
      if (made != made_by.end()) std::tie(found.module, found.call) = made->second;
      found.role = "activation gradient";  // or, once the run is over, that of a weight
    } else if (belongs_to_optimizer(seen.op, seen.arguments)) {
      found.phase = "optimizer";
      found.role = is_parameter ? "weight" : "optimizer state";
    } else {
      // Behind a backward and of no module: what gathers gradients of other processes, for one.
      const char* phase = after_backward && entered.empty() ? "backward" : "forward";
      found.phase = forced_phase.empty() ? phase : forced_phase;
      std::tie(found.module, found.call) = place(seen.arguments);
      found.role = found.producer ? "activation" : is_parameter ? "weight" : "input";
    }
    if (is_parameter) {
      found.tensor = parameter->second;
      if (found.module.empty()) found.module = owner(parameter->second);
    }
  }

  /// A bad gradient that ended in a parameter is that parameter's.
  void name_gradient(NonFinite& found) const {
    if (found.phase != "backward" || !bad.defined()) return;
    for (const auto& [name, p] : named)
      if (p.grad().defined() && looked_at(p.grad()) &&
          (p.grad().is_alias_of(bad) || (p.sizes() == bad.sizes() && owner(name) == found.module &&
                                         content(p.grad()) != Content::kFinite))) {
        found.role = "weight gradient";
        found.tensor = name;
        return;
      }
  }
};

namespace {

std::mutex& only_one() {
  static std::mutex mutex;
  return mutex;
}
/// The finder that runs, kept alive by the callbacks that are on their way.
std::shared_ptr<void>& active() {
  static std::shared_ptr<void> state;
  return state;
}
template <class State>
std::shared_ptr<State> running() {
  const std::lock_guard<std::mutex> lock(only_one());
  return std::static_pointer_cast<State>(active());
}

}  // namespace

NonFiniteFinder::NonFiniteFinder(const Named& parameters) : state_(std::make_shared<State>()) {
  {
    const std::lock_guard<std::mutex> lock(only_one());
    TORCH_CHECK(!active(), "NonFiniteFinder: another one is at work in this process");
    active() = state_;
  }
  state_->named = parameters;
  for (const auto& [name, p] : parameters)
    if (looked_at(p)) state_->parameters[dense(p).const_data_ptr()] = name;
  // Plain functions: the finder is looked up when they are called.
  state_->handle = at::addGlobalCallback(
      at::RecordFunctionCallback(
          [](const at::RecordFunction& fn) -> std::unique_ptr<at::ObserverContext> {
            auto seen = std::make_unique<Seen>();
            if (const auto state = running<State>()) state->start(fn, *seen);
            return seen;
          },
          [](const at::RecordFunction& fn, at::ObserverContext* context) {
            const auto state = running<State>();
            if (state && context) state->end(fn, *static_cast<Seen*>(context));
          })
          .needsInputs(true)
          .needsOutputs(true)
          .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION}));
}

NonFiniteFinder::~NonFiniteFinder() { finish(); }

void NonFiniteFinder::enter(const std::string& module) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->entered.emplace_back(module, state_->calls[module]++);
}

void NonFiniteFinder::leave() {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (!state_->entered.empty()) state_->entered.pop_back();
}

void NonFiniteFinder::set_phase(const std::string& phase) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->forced_phase = phase;
}

std::optional<NonFinite> NonFiniteFinder::finish() {
  if (state_->handle != 0) {
    at::removeCallback(state_->handle);
    state_->handle = 0;
    const std::lock_guard<std::mutex> lock(only_one());
    active().reset();
  }
  const std::lock_guard<std::mutex> lock(state_->mutex);
  const Unseen unseen;
  if (state_->produced) state_->name_gradient(*state_->produced);
  return state_->produced ? state_->produced : state_->passed_on;
}

std::string NonFinite::message() const {
  std::ostringstream out;
  out << value << " in " << phase << ": " << (producer ? "made by " : "passed on by ") << op;
  if (!node.empty()) out << " of " << node;
  if (!module.empty()) out << " in '" << module << "'";
  if (call > 0) out << " (call " << call << ")";
  out << ", " << role;
  if (!tensor.empty()) out << " '" << tensor << "'";
  out << " (" << dtype << ") at [";
  for (size_t i = 0; i < index.size(); ++i) out << (i ? ", " : "") << index[i];
  out << "]; ";
  if (producer)
    out << "its inputs were finite, at most " << largest_input;
  else
    out << "it came from outside";
  if (!swallowed_by.empty()) out << "; " << swallowed_by << " made it finite again";
  return out.str();
}

std::optional<NonFinite> find_nonfinite(const torch::nn::Module& module,
                                        const std::function<void()>& run) {
  NonFiniteFinder::Named named;
  for (const auto& item : module.named_parameters()) named.emplace_back(item.key(), item.value());
  NonFiniteFinder finder(named);
  run();
  return finder.finish();
}

}  // namespace halfstep
