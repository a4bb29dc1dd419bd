#include <halfstep/cast.h>

#include <ATen/ops/zeros.h>
#include <c10/util/Type.h>
#include <fnmatch.h>
#include <torch/nn/module.h>

#include <map>
#include <mutex>
#include <typeinfo>

#include "room.h"

namespace halfstep {

namespace {

struct Kept {
  c10::weak_intrusive_ptr<c10::TensorImpl> owner;
  at::Tensor exact;
};

std::mutex kept_mutex;
std::map<const void*, Kept>& kept_values() {
  static auto* values = new std::map<const void*, Kept>;  // outlives static tensors of the program
  return *values;
}

/// How many optimizers have a parameter, by its TensorImpl (each keeps it alive).
std::map<const void*, int>& owners() {
  static auto* counts = new std::map<const void*, int>;
  return *counts;
}

bool is_float(const at::Tensor& tensor) { return tensor.defined() && tensor.is_floating_point(); }

/// Every parameter with its name; a tied one appears under its first name only.
std::vector<std::pair<std::string, at::Tensor>> named_parameters(const torch::nn::Module& model) {
  std::vector<std::pair<std::string, at::Tensor>> all;
  std::map<const void*, bool> seen;
  for (const auto& item : model.named_parameters())
    if (seen.emplace(item.value().unsafeGetTensorImpl(), true).second)
      all.emplace_back(item.key(), item.value());
  return all;
}

/// Parameters of normalisation modules, recognised by their class name.
std::map<const void*, bool> norm_parameters(torch::nn::Module& model) {
  std::map<const void*, bool> found;
  for (const auto& module : model.modules(/*include_self=*/false))
    if (c10::demangle(typeid(*module).name()).find("Norm") != std::string::npos)
      for (const auto& param : module->parameters()) found[param.unsafeGetTensorImpl()] = true;
  return found;
}

}  // namespace

bool is_sixteen(c10::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

const char* type_name(c10::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kShort:
      return "int16";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    default:
      return c10::toString(type);
  }
}

int64_t foreign_width(const at::Tensor& tensor) {
  if (tensor.numel() == 0 || tensor.storage_offset() != 0) return 0;
  const auto held = int64_t(tensor.storage().nbytes());
  for (const int64_t width : {int64_t(4), int64_t(8)})
    if (width > int64_t(tensor.element_size()) && held == tensor.numel() * width) return width;
  return 0;
}

void own(const at::Tensor& param) {
  const std::lock_guard lock(kept_mutex);
  ++owners()[param.unsafeGetTensorImpl()];
}

void disown(const at::Tensor& param) {
  const std::lock_guard lock(kept_mutex);
  const auto count = owners().find(param.unsafeGetTensorImpl());
  if (count != owners().end() && --count->second == 0) owners().erase(count);
}

void keep_exact(const at::Tensor& param, const at::Tensor& exact) {
  const std::lock_guard lock(kept_mutex);
  auto& values = kept_values();
  std::erase_if(values, [](const auto& entry) { return entry.second.owner.expired(); });
  values.insert_or_assign(
      param.unsafeGetTensorImpl(),
      Kept{c10::weak_intrusive_ptr<c10::TensorImpl>(param.getIntrusivePtr()), exact});
}

at::Tensor take_exact(const at::Tensor& param) {
  const std::lock_guard lock(kept_mutex);
  auto& values = kept_values();
  const auto entry = values.find(param.unsafeGetTensorImpl());
  if (entry == values.end()) return {};
  const at::Tensor exact = entry->second.owner.expired() ? at::Tensor() : entry->second.exact;
  values.erase(entry);
  return exact;
}

void check_fits(const at::Tensor& value, const at::Tensor& shape_of, c10::ScalarType dtype,
                const std::string& name) {
  TORCH_CHECK(value.sizes() == shape_of.sizes(), "'", name, "' is ", shape_of.sizes(),
              " but the value is ", value.sizes());
  if (!is_sixteen(dtype)) return;
  const double limit = dtype == at::kHalf ? 65520.0 : 0x1.ffp127;
  const at::Tensor magnitude = value.detach().abs();
  const auto beyond = (magnitude >= limit).sum().item<int64_t>();
  TORCH_CHECK(beyond == 0, "'", name, "' does not fit ", type_name(dtype), ": ", beyond, " of ",
              value.numel(), " elements are at or beyond ", limit, " (largest ",
              magnitude.max().item<double>(), "); keep it in FP32");
}

struct CastAccess {
  static bool keeps(const CastOptions& options, const std::string& name, bool norm) {
    if (options.keep_norms_) return norm;
    for (const auto& glob : options.globs_)
      if (fnmatch(glob.c_str(), name.c_str(), 0) == 0) return true;
    return false;
  }
};

CastOptions& CastOptions::keep_fp32(std::vector<std::string> globs) {
  globs_ = std::move(globs);
  keep_norms_ = false;
  return *this;
}

CastReport cast_model(torch::nn::Module& model, c10::ScalarType dtype, const CastOptions& options) {
  TORCH_CHECK(is_sixteen(dtype), "cast_model: dtype is ", type_name(dtype),
              "; expected float16 or bfloat16");
  const at::NoGradGuard no_grad;
  const auto norms = norm_parameters(model);
  CastReport report;
  std::vector<at::Tensor> chosen;
  for (const auto& [name, param] : named_parameters(model)) {
    if (!is_float(param)) continue;
    if (CastAccess::keeps(options, name, norms.count(param.unsafeGetTensorImpl()) > 0)) {
      report.kept.push_back(name);
      continue;
    }
    {
      const std::lock_guard lock(kept_mutex);
      TORCH_CHECK(owners().count(param.unsafeGetTensorImpl()) == 0, "cast_model: '", name,
                  "' already belongs to an optimizer; cast the model first, then make the "
                  "optimizer");
    }
    check_fits(param, param, dtype, name);
    chosen.push_back(param);
    report.cast.push_back(name);
  }
  for (at::Tensor& param : chosen) {
    const at::Tensor exact = param.detach();
    if (param.requires_grad()) keep_exact(param, exact.alias());
    param.set_data(exact.to(dtype));
  }
  return report;
}

EvaluateIn::EvaluateIn(torch::nn::Module& model, optim::Optimizer& optimizer, c10::ScalarType dtype,
                       Weights weights)
    : model_(model), training_(model.is_training()) {
  const at::NoGradGuard no_grad;
  const auto masters =
      weights == Weights::kEma ? optimizer.ema_params() : optimizer.master_params();
  const auto owners = optimizer.distinct_parameters();
  std::map<const void*, at::Tensor> exact;
  for (size_t i = 0; i < owners.size(); ++i) exact[owners[i].unsafeGetTensorImpl()] = masters[i];
  std::map<const void*, bool> seen;
  const auto swap = [&](at::Tensor tensor) {
    if (!is_float(tensor) || !seen.emplace(tensor.unsafeGetTensorImpl(), true).second) return;
    const auto master = exact.find(tensor.unsafeGetTensorImpl());
    const at::Tensor held = tensor.tensor_data();
    saved_.emplace_back(tensor, held);
    tensor.set_data((master == exact.end() ? held : master->second).to(dtype));
  };
  for (const auto& param : model.parameters()) swap(param);
  for (const auto& buffer : model.buffers()) swap(buffer);
  model.eval();
}

EvaluateIn::~EvaluateIn() {
  for (auto& [tensor, data] : saved_) tensor.set_data(data);
  model_.train(training_);
}

torch::OrderedDict<std::string, at::Tensor> export_state_dict(torch::nn::Module& model,
                                                              optim::Optimizer& optimizer,
                                                              c10::ScalarType dtype,
                                                              Weights weights) {
  const at::NoGradGuard no_grad;
  const auto masters =
      weights == Weights::kEma ? optimizer.ema_params() : optimizer.master_params();
  const auto owners = optimizer.distinct_parameters();
  std::map<const void*, at::Tensor> exact;
  for (size_t i = 0; i < owners.size(); ++i) exact[owners[i].unsafeGetTensorImpl()] = masters[i];
  torch::OrderedDict<std::string, at::Tensor> out;
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    const auto master = exact.find(tensor.unsafeGetTensorImpl());
    const at::Tensor value = (master == exact.end() ? tensor : master->second).detach();
    out.insert(name, (is_float(value) ? value.to(dtype) : value).clone());
  };
  for (const auto& item : model.named_parameters()) add(item.key(), item.value());
  for (const auto& item : model.named_buffers()) add(item.key(), item.value());
  return out;
}

}  // namespace halfstep
