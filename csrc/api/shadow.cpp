#include "shadow.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <map>
#include <optional>

#include "observe.h"
#include "stored_hook.h"

namespace halfstep::api {

namespace {

const c10::TensorImpl* key(const at::TensorBase& tensor) { return tensor.unsafeGetTensorImpl(); }

std::vector<at::Tensor> tensors_of(c10::ArrayRef<c10::IValue> values) {
  std::vector<at::Tensor> all;
  for (const auto& value : values)
    each_tensor(value, [&](const at::Tensor& tensor, int64_t) { all.push_back(tensor); });
  return all;
}

bool is_result(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_floating_point() && tensor.requires_grad();
}
bool is_values(const at::Tensor& tensor) { return tensor.defined() && tensor.is_floating_point(); }

at::Tensor dense(const at::Tensor& grad) {
  return grad.layout() == at::kSparse ? grad.to_dense() : grad;
}

void add(at::Tensor& sum, const at::Tensor& term) { sum = sum.defined() ? sum.add(term) : term; }

/// Where the gradient of `output` is seen even if it is edited in place later: a view that is
/// edited leaves the graph, the tensor that it shows stays in it. `given`: the op's arguments.
at::Tensor source_of(const at::Tensor& output, const std::vector<const c10::TensorImpl*>& given) {
  if (!output.is_view()) return output;
  const at::Tensor base{at::TensorBase(output._base())};
  const bool whole = base.requires_grad() && base.numel() == output.numel() &&
                     base.is_contiguous() && output.is_contiguous();
  const bool used = std::find(given.begin(), given.end(), key(base)) != given.end();
  return whole && !used ? base : output;
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

/// The modules with parameters in the order of named_parameters(); `names`: of those seen so far.
void add_layers(const std::shared_ptr<const torch::nn::Module>& module, const std::string& path,
                std::vector<Layer>& layers,
                std::unordered_map<const c10::TensorImpl*, std::string>& names) {
  const std::string prefix = path.empty() ? "" : path + ".";
  Layer layer{path.empty() ? "(model)" : path, {}, module};
  for (const auto& item : module->named_parameters(/*recurse=*/false)) {
    const auto [known, first] = names.emplace(key(item.value()), prefix + item.key());
    const bool again =
        std::any_of(layer.parameters.begin(), layer.parameters.end(),
                    [&](const auto& parameter) { return parameter.tensor.is_same(item.value()); });
    if (!again) layer.parameters.push_back({known->second, item.value(), false, first});
  }
  if (!layer.parameters.empty()) layers.push_back(std::move(layer));
  for (const auto& child : module->named_children())
    add_layers(child.value(), prefix + child.key(), layers, names);
}

}  // namespace

std::vector<Layer> layers_of(const torch::nn::Module& model) {
  std::vector<Layer> layers;
  std::unordered_map<const c10::TensorImpl*, std::string> names;
  add_layers({std::shared_ptr<void>(), &model}, "", layers, names);
  std::erase_if(layers, [](const Layer& layer) {
    return std::none_of(layer.parameters.begin(), layer.parameters.end(),
                        [](const LayerParameter& p) { return p.first; });
  });
  std::unordered_map<const c10::TensorImpl*, int> owners;
  for (const Layer& layer : layers)
    for (const auto& p : layer.parameters) ++owners[key(p.tensor)];
  for (Layer& layer : layers)
    for (auto& p : layer.parameters) p.shared = owners[key(p.tensor)] > 1;
  return layers;
}

/// One call of the layer. `version`: how often ops wrote into a result; a gradient of what it was
/// before that says nothing.
struct Shadow::Call {
  std::string op;
  std::vector<at::Tensor> outputs, inputs;  // in FP32; the inputs are leaves that want a gradient
  std::vector<int64_t> versions;
  bool counts = false;
};

/// The gradients of a call in one backward.
struct Shadow::Arrival {
  Call* call;
  std::map<size_t, at::Tensor> grads;  // by result
};

struct Shadow::Pending {
  std::string op;
  std::optional<Replay> replay;
  const LayerParameter* shown = nullptr;  // the op only shows it
  std::vector<at::Tensor> inputs;
  std::vector<Key> given;  // the arguments, and what they are views of
  Result* continued = nullptr;
};

/// Stands before a hook that was there.
class Shadow::Stored : public StoredHook {
 public:
  explicit Stored(const std::shared_ptr<Shadow>& shadow)
      : StoredHook(shadow.get()), shadow_(shadow) {}
  void operator()(const at::Tensor& parameter) override {
    if (const auto shadow = shadow_.lock()) shadow->stored(parameter);
    go_on(parameter);
  }

 private:
  std::weak_ptr<Shadow> shadow_;
};

// -- from the start to the end of a step ----------------------------------------------------------
Shadow::Shadow(const std::vector<Layer>& layers, size_t which, const optim::Optimizer* ours)
    : layer_(layers[which]), ours_(ours) {
  for (const auto& p : layer_.parameters) own_[key(p.tensor)] = &p;
  for (const Layer& layer : layers)
    for (const auto& p : layer.parameters)
      if (!own_.count(key(p.tensor))) others_[key(p.tensor)] = !p.shared;
}

Shadow::~Shadow() { unwatch(); }

std::shared_ptr<Shadow> Shadow::watch(const std::vector<Layer>& layers, size_t which,
                                      const optim::Optimizer* ours) {
  std::shared_ptr<Shadow> shadow(new Shadow(layers, which, ours));
  for (const auto& p : shadow->layer_.parameters) {
    if (p.shared || !p.tensor.requires_grad() || !p.tensor.is_leaf()) continue;
    StoredHook::link(p.tensor, std::make_unique<Stored>(shadow));
  }
  shadow->watching_ = true;
  show_ops(shadow);
  return shadow;
}

void Shadow::unwatch() {
  if (!watching_) return;
  watching_ = false;
  hide_ops(this);
  for (const auto& p : layer_.parameters) StoredHook::unlink(p.tensor, this);
}

void Shadow::forget() {
  arrivals_.clear();
  calls_.clear();
  results_.clear();
  followers_.clear();
  leaves_.clear();
  nonzero_.clear();
}

void Shadow::guarded(const std::string& what, const std::function<void()>& look) noexcept {
  std::string said;
  try {
    const Unobserved unobserved;
    return look();
  } catch (const c10::Error& error) {
    said = error.what_without_backtrace();
  } catch (const std::exception& error) {
    said = error.what();
  } catch (...) {
    said = "an exception that is no std::exception";
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  error_ = what + ": " + first_line(said);
  forget();
}

// -- the forward ----------------------------------------------------------------------------------
const LayerParameter* Shadow::parameter_of(const at::Tensor& tensor) const {
  if (const auto at = own_.find(key(tensor)); at != own_.end()) return at->second;
  const auto at = followers_.find(key(tensor));
  return at == followers_.end() ? nullptr : at->second.of;
}

/// An op with a parameter that two layers have belongs to the one of which it has another, else to
/// the first.
bool Shadow::is_call(const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> inputs) const {
  bool exclusive = false, first = false, foreign = false, edited = false;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool written = is_written(schema.arguments()[i]);
    each_tensor(inputs[i], [&](const at::Tensor& tensor, int64_t) {
      if (const LayerParameter* p = parameter_of(tensor)) {
        exclusive |= !p->shared;
        first |= p->first;
        edited |= written;
      } else if (const auto other = others_.find(key(tensor)); other != others_.end()) {
        foreign |= other->second;
      }
    });
  }
  return !edited && (exclusive || (first && !foreign));
}

/// The parameter that the op only shows or casts, or null.
const LayerParameter* Shadow::shown(const c10::FunctionSchema& schema,
                                    c10::ArrayRef<c10::IValue> inputs) const {
  for (size_t i = 0; i < inputs.size(); ++i)
    if (inputs[i].isTensor() && shows(schema, i))
      if (const LayerParameter* p = parameter_of(inputs[i].toTensor())) return p;
  return nullptr;
}

void Shadow::make_leaves() {
  if (!leaves_.empty()) return;
  const at::NoGradGuard no_grad;
  for (const auto& p : layer_.parameters)
    leaves_[key(p.tensor)] = exact(p.tensor).requires_grad_(p.tensor.requires_grad());
}

/// The weight without rounding, in FP32 or wider.
at::Tensor Shadow::exact(const at::Tensor& parameter) const {
  const at::NoGradGuard no_grad;
  const at::Tensor master = ours_ ? ours_->master_param(parameter) : at::Tensor();
  if (!master.defined()) return widened(parameter);
  return master.to(c10::promoteTypes(parameter.scalar_type(), at::kFloat), false, /*copy=*/true);
}

/// What the op is computed with in FP32, in the place of `tensor`.
at::Tensor Shadow::stand_in(const at::Tensor& tensor, bool written, Pending& pending) {
  if (const auto at = leaves_.find(key(tensor)); at != leaves_.end()) return at->second;
  if (const auto at = followers_.find(key(tensor)); at != followers_.end()) return at->second.wide;
  if (others_.count(key(tensor))) return exact(tensor);
  const auto result = results_.find(key(tensor));
  if (written && result != results_.end() && result->second.version == tensor._version()) {
    pending.continued = &result->second;
    return result->second.call->outputs[result->second.index].clone();
  }
  const at::Tensor copy = widened(tensor);
  if (!tensor.is_floating_point() || !tensor.requires_grad()) return copy;
  pending.inputs.push_back(copy.requires_grad_());
  return written ? copy.clone() : copy;  // a leaf cannot be written
}

std::shared_ptr<Shadow::Pending> Shadow::before(const c10::OperatorHandle& op,
                                                c10::ArrayRef<c10::IValue> inputs) noexcept {
  const auto& schema = op.schema();
  if (!error_.empty() || inputs.size() != schema.arguments().size()) return nullptr;
  std::shared_ptr<Pending> pending;
  guarded(schema.name(), [&] {
    const LayerParameter* parameter = shown(schema, inputs);
    if (!parameter && !is_call(schema, inputs)) return;
    auto made = std::make_shared<Pending>();
    made->op = schema.name();
    made->shown = parameter;
    const at::AutoGradMode grad_mode(true);
    make_leaves();
    made->replay.emplace(op, inputs, [&](const at::Tensor& tensor, bool written) {
      made->given.push_back(key(tensor));
      if (tensor.is_view()) made->given.push_back(key(tensor._base()));
      return stand_in(tensor, written, *made);
    });
    pending = std::move(made);
  });
  return pending;
}

void Shadow::behind(Pending& pending, c10::ArrayRef<c10::IValue> outputs) noexcept {
  if (!error_.empty() || !watching_) return;
  guarded(pending.op, [&] {
    const auto results = tensors_of(outputs);
    const bool trains = std::any_of(results.begin(), results.end(), is_result);
    if (!pending.shown && !trains && !layer_.module->is_training()) return;
    const auto wide = tensors_of(pending.replay->run());
    TORCH_CHECK(wide.size() == results.size(), "it has ", wide.size(), " results in FP32, not ",
                results.size());
    if (pending.shown)
      follow(pending.shown, results, wide);
    else
      add_call(pending, results, wide, trains);
  });
}

void Shadow::follow(const LayerParameter* parameter, const std::vector<at::Tensor>& outputs,
                    const std::vector<at::Tensor>& wide) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].defined() || parameter_of(outputs[i])) continue;  // a cast to its own dtype
    const at::Tensor stands = outputs[i].requires_grad() ? wide[i] : wide[i].detach();
    followers_.emplace(key(outputs[i]),
                       Follower{Weak(outputs[i].getIntrusivePtr()), stands, parameter});
  }
}

/// `trains`: gradients may come. Behind frozen weights and inputs none does, and what runs in
/// training mode counts at once.
void Shadow::add_call(Pending& pending, const std::vector<at::Tensor>& outputs,
                      const std::vector<at::Tensor>& wide, bool trains) {
  const auto call = pending.continued ? pending.continued->call : std::make_shared<Call>();
  const size_t written = pending.continued ? pending.continued->index : SIZE_MAX;
  const Key edited = pending.continued ? pending.continued->tensor._unsafe_get_target() : nullptr;
  if (!pending.continued) {
    call->op = pending.op;
    calls_.push_back(call);
  }
  call->counts |= !trains;
  call->inputs.insert(call->inputs.end(), pending.inputs.begin(), pending.inputs.end());
  for (size_t i = 0; i < outputs.size(); ++i) {
    const at::Tensor& output = outputs[i];
    if (!(trains ? is_result(output) : is_values(output))) continue;
    TORCH_CHECK(output.sizes() == wide[i].sizes(), "its FP32 result is ", wide[i].sizes(), ", not ",
                output.sizes());
    const size_t index = key(output) == edited ? written : call->outputs.size();
    call->outputs.resize(std::max(index + 1, call->outputs.size()));
    call->versions.resize(call->outputs.size());
    call->outputs[index] = wide[i];
    ++call->versions[index];
    results_.insert_or_assign(key(output), Result{Weak(output.getIntrusivePtr()),
                                                  uint32_t(output._version()), call, index});
    if (trains) listen(call, index, source_of(output, pending.given));
  }
}

// -- the backward ---------------------------------------------------------------------------------
void Shadow::listen(const std::shared_ptr<Call>& call, size_t index, const at::Tensor& source) {
  source.register_hook([shadow = weak_from_this(), of = std::weak_ptr<Call>(call), index,
                        version = call->versions[index]](const at::Tensor& grad) {
    const auto here = shadow.lock();
    const auto call = of.lock();
    if (here && call && grad.defined()) here->came(*call, index, version, grad);
  });
}

/// A copy is kept: what came may be written into.
void Shadow::came(Call& call, size_t index, int64_t version, const at::Tensor& grad) noexcept {
  guarded(call.op, [&] {
    const at::NoGradGuard no_grad;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!watching_ || !error_.empty() || version != call.versions[index]) return;
    call.counts = true;
    const at::Tensor& output = call.outputs[index];
    if (!output.requires_grad()) return;
    const auto last = std::find_if(arrivals_.rbegin(), arrivals_.rend(),
                                   [&](const Arrival& arrival) { return arrival.call == &call; });
    const bool another = last == arrivals_.rend() || last->grads.count(index) > 0;
    Arrival& arrival = another ? arrivals_.emplace_back(Arrival{&call, {}}) : *last;
    arrival.grads[index] =
        grad.detach().to(output.scalar_type(), false, /*copy=*/true).reshape(output.sizes());
  });
}

void Shadow::stored(const at::Tensor& parameter) noexcept {
  guarded(layer_.name, [&] {
    const at::NoGradGuard no_grad;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (watching_ && error_.empty() && leaves_.count(key(parameter)))
      nonzero_[key(parameter)] = dense(parameter.grad()).ne(0);
  });
}

// -- the end of the step --------------------------------------------------------------------------
std::vector<Counted> Shadow::counted() {
  std::vector<Counted> found;
  for (const auto& call : calls_)
    for (const auto& output : call->outputs)
      if (call->counts) found.push_back({layer_.name, "activation", shares(output)});
  if (found.empty()) return found;
  std::vector<at::Tensor> weights;
  for (const auto& p : layer_.parameters)
    if (leaves_[key(p.tensor)].requires_grad()) weights.push_back(leaves_[key(p.tensor)]);
  std::vector<at::Tensor> sums(weights.size());
  for (const auto& [call, grads] : arrivals_) {
    std::vector<at::Tensor> outputs, back, leaves = call->inputs;
    for (const auto& [index, grad] : grads) {
      outputs.push_back(call->outputs[index]);
      back.push_back(grad);
    }
    leaves.insert(leaves.end(), weights.begin(), weights.end());
    if (leaves.empty()) continue;
    const auto got = torch::autograd::grad(outputs, leaves, back, /*retain_graph=*/true,
                                           /*create_graph=*/false, /*allow_unused=*/true);
    const size_t inputs = call->inputs.size();
    for (size_t i = 0; i < got.size(); ++i) {
      if (!got[i].defined()) continue;
      if (i < inputs)
        found.push_back({layer_.name, "activation gradient", shares(dense(got[i]))});
      else
        add(sums[i - inputs], dense(got[i]));
    }
  }
  size_t next = 0;
  for (const auto& p : layer_.parameters) {
    const at::Tensor& leaf = leaves_[key(p.tensor)];
    if (leaf.is_floating_point()) found.push_back({p.name, "weight", shares(leaf)});
    if (!leaf.requires_grad()) continue;
    const at::Tensor& sum = sums[next++];
    if (sum.defined())
      found.push_back({p.name, "weight gradient", shares(sum, 1.0, nonzero_[key(p.tensor)])});
  }
  return found;
}

std::vector<Counted> Shadow::finish() {
  unwatch();
  std::vector<Counted> found;
  if (error_.empty()) guarded("gradients", [&] { found = counted(); });
  forget();
  return error_.empty() ? found : std::vector<Counted>();
}

}  // namespace halfstep::api
