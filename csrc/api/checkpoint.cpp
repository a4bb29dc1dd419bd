// Files, and the weights of modules. Optimizers: optim_state.cpp; the scaler: scaler_state.cpp.

#include <halfstep/checkpoint.h>

#include <ATen/ops/empty_like.h>
#include <torch/nn/module.h>
#include <torch/serialize/archive.h>

#include <map>
#include <set>

#include "file.h"
#include "room.h"

namespace halfstep {

namespace {

struct Loaded {
  std::string name;
  at::Tensor target, value;
};

void check_value(const std::string& name, const at::Tensor& target, const at::Tensor& value) {
  TORCH_CHECK(value.defined(), "load: '", name, "' is None");
  TORCH_CHECK(value.is_floating_point() == target.is_floating_point(), "load: '", name, "' is ",
              type_name(target.scalar_type()), " but the value is ",
              type_name(value.scalar_type()));
  check_fits(value, target, target.scalar_type(), name);
}

/// Parameters and buffers by name; a tied one under each of its names.
std::vector<std::pair<std::string, at::Tensor>> named_tensors(const torch::nn::Module& model) {
  std::vector<std::pair<std::string, at::Tensor>> all;
  for (const auto& item : model.named_parameters()) all.emplace_back(item.key(), item.value());
  for (const auto& item : model.named_buffers())
    if (item.value().defined()) all.emplace_back(item.key(), item.value());
  return all;
}

/// Converts into the target; the low bits of a wider value wait for the first optimizer.
void assign(const Loaded& loaded) {
  at::Tensor target = loaded.target;
  if (foreign_width(target) != 0) target.set_data(at::empty_like(target));
  target.copy_(loaded.value);
  if (target.requires_grad() && is_sixteen(target.scalar_type()) &&
      !is_sixteen(loaded.value.scalar_type()))
    keep_exact(target, loaded.value.detach().to(target.device(), at::kFloat, false, true));
}

void read_module(torch::serialize::InputArchive& archive, const torch::nn::Module& module,
                 const std::string& prefix, std::vector<Loaded>& found) {
  const auto read = [&](const std::string& key, const at::Tensor& target, bool is_buffer) {
    at::Tensor value;
    TORCH_CHECK(archive.try_read(key, value, is_buffer), "load: the file has no '", prefix, key,
                "'");
    if (!target.defined()) return;
    check_value(prefix + key, target, value);
    found.push_back({prefix + key, target, value});
  };
  for (const auto& item : module.named_parameters(false)) read(item.key(), item.value(), false);
  for (const auto& item : module.named_buffers(false)) read(item.key(), item.value(), true);
  for (const auto& child : module.named_children()) {
    torch::serialize::InputArchive inner;
    const bool present = archive.try_read(child.key(), inner);
    const bool empty = child.value()->parameters().empty() && child.value()->buffers().empty();
    TORCH_CHECK(present || empty, "load: the file has no module '", prefix, child.key(), "'");
    if (present) read_module(inner, *child.value(), prefix + child.key() + ".", found);
  }
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "'" : ", '") + name + "'";
  return text.empty() ? "nothing" : text;
}

/// The entries of `state` beside the tensors of `model`; every refusal comes from here.
std::vector<Loaded> match(const torch::nn::Module& model, const StateDict& state) {
  const auto own = named_tensors(model);
  std::set<std::string> names;
  std::vector<std::string> missing, unknown;
  for (const auto& [name, tensor] : own) {
    names.insert(name);
    if (!state.contains(name)) missing.push_back(name);
  }
  for (const auto& key : state.keys())
    if (names.count(key) == 0) unknown.push_back(key);
  TORCH_CHECK(missing.empty() && unknown.empty(), "load: missing ", listed(missing),
              ", not in the model ", listed(unknown));
  std::vector<Loaded> found;
  for (const auto& [name, target] : own) {
    const c10::IValue value = state.at(name);
    TORCH_CHECK(value.isTensor(), "load: '", name, "' is ", value.tagKind(), "; expected a tensor");
    check_value(name, target, value.toTensor());
    found.push_back({name, target, value.toTensor()});
  }
  return found;
}

}  // namespace

void save(const StateDict& state, const std::string& path) { api::write_file(state, path); }

StateDict load(const std::string& path) {
  const c10::IValue value = api::read_file(path);
  TORCH_CHECK(value.isGenericDict(), "cannot read '", path, "' as a checkpoint: it holds ",
              value.tagKind(), "; expected a dict");
  return value;
}

StateDict state_dict(const torch::nn::Module& model) {
  StateDict state;
  std::map<const void*, at::Tensor> copies;  // tied tensors stay tied in the file
  for (const auto& [name, tensor] : named_tensors(model)) {
    auto& copy = copies[tensor.unsafeGetTensorImpl()];
    if (!copy.defined()) copy = tensor.detach().clone();
    state.insert(name, copy);
  }
  return state;
}

void load_state_dict(torch::nn::Module& model, const StateDict& state) {
  load_state_dict(model, {}, state);
}

void load_state_dict(torch::nn::Module& model, const std::vector<optim::Optimizer*>& optimizers,
                     const StateDict& state) {
  const at::NoGradGuard no_grad;
  const auto found = match(model, state);
  std::map<const void*, at::Tensor> values;
  for (const auto& loaded : found) values[loaded.target.unsafeGetTensorImpl()] = loaded.value;
  std::vector<std::vector<at::Tensor>> exact;
  std::set<const void*> owned;
  for (auto* optimizer : optimizers) {
    exact.emplace_back();
    for (const auto& param : optimizer->distinct_parameters()) {
      const auto value = values.find(param.unsafeGetTensorImpl());
      TORCH_CHECK(value != values.end(),
                  "load: the optimizer has a parameter that is not in the model");
      exact.back().push_back(value->second);
      owned.insert(param.unsafeGetTensorImpl());
    }
  }
  for (size_t i = 0; i < optimizers.size(); ++i) optimizers[i]->set_master_params(exact[i]);
  for (const auto& loaded : found)
    if (owned.count(loaded.target.unsafeGetTensorImpl()) == 0) assign(loaded);
}

void load(torch::nn::Module& model, const std::string& path) {
  if (!api::is_archive(path)) {
    load_state_dict(model, load(path));
    return;
  }
  const at::NoGradGuard no_grad;
  torch::serialize::InputArchive archive;
  archive.load_from(path, c10::Device(c10::kCPU));
  std::vector<Loaded> found;
  read_module(archive, model, "", found);
  for (const auto& loaded : found) assign(loaded);
}

}  // namespace halfstep
