// The three optimizers: options, state names, and the op each one calls.

#include <halfstep/optim.h>

#include "room.h"

namespace halfstep::optim {

namespace {

using Groups = std::vector<torch::optim::OptimizerParamGroup>;

Groups one_group(std::vector<at::Tensor> params) {
  Groups groups;
  groups.emplace_back(std::move(params));
  return groups;
}
Groups one_group(const NamedParameters& params) { return one_group(params.values()); }

template <class Options>
const Options& options_of(const torch::optim::OptimizerOptions& options, const char* kind,
                          const std::string& where = "a parameter group") {
  const auto* own = dynamic_cast<const Options*>(&options);
  TORCH_CHECK(own, where, " has options of another optimizer; this one is ", kind);
  return *own;
}

template <class Options>
void check_common(const Options& o, const std::string& at) {
  TORCH_CHECK(o.lr() >= 0, at, "lr is ", o.lr(), "; expected a number >= 0");
  TORCH_CHECK(o.weight_decay() >= 0, at, "weight_decay is ", o.weight_decay(),
              "; expected a number >= 0");
  TORCH_CHECK(!o.grad_dtype() || *o.grad_dtype() == at::kFloat, at, "grad_dtype is ",
              type_name(o.grad_dtype().value_or(at::kFloat)),
              "; expected float32, or none for the parameter's dtype");
  TORCH_CHECK(!o.max_grad_norm() || *o.max_grad_norm() >= 0, at, "max_grad_norm is ",
              o.max_grad_norm().value_or(0), "; expected a number >= 0");
}

const char* name_of(Master master) {
  switch (master) {
    case Master::kNone:
      return "none";
    case Master::kSplit16:
      return "split16";
    case Master::kFp32:
      return "fp32";
    case Master::kFp64:
      return "fp64";
    default:
      return "auto";
  }
}

template <class Options>
void write_common(const Options& o, StateDict& out) {
  out.insert("maximize", o.maximize());
  out.insert("master", std::string(name_of(o.master())));
  out.insert("grad_dtype", std::string(o.grad_dtype() ? "fp32" : "param"));
}

// ---- hyperparameters in a saved group; one that is not there stays as it is
double number(const StateDict& saved, const char* key, double otherwise) {
  if (!saved.contains(key)) return otherwise;
  const c10::IValue value = saved.at(key);
  if (value.isTensor() && value.toTensor().numel() == 1) return value.toTensor().item<double>();
  TORCH_CHECK(value.isDouble() || value.isInt(), "optimizer state has ", key, " of type ",
              value.tagKind(), "; expected a number");
  return value.toScalar().toDouble();
}

bool flag(const StateDict& saved, const char* key, bool otherwise) {
  if (!saved.contains(key)) return otherwise;
  const c10::IValue value = saved.at(key);
  TORCH_CHECK(value.isBool(), "optimizer state has ", key, " of type ", value.tagKind(),
              "; expected True or False");
  return value.toBool();
}

std::tuple<double, double> pair(const StateDict& saved, const char* key,
                                std::tuple<double, double> otherwise) {
  if (!saved.contains(key)) return otherwise;
  const c10::IValue value = saved.at(key);
  std::vector<c10::IValue> items;
  if (value.isTuple()) items = value.toTupleRef().elements().vec();
  if (value.isList()) items = value.toListRef().vec();
  TORCH_CHECK(items.size() == 2, "optimizer state has ", key, " of type ", value.tagKind(),
              "; expected two numbers");
  StateDict two;
  two.insert("0", items[0]).insert("1", items[1]);
  return {number(two, "0", 0), number(two, "1", 0)};
}

}  // namespace

Adam::Adam(Groups groups, std::vector<std::string> names, std::unique_ptr<AdamOptions> defaults,
           bool decoupled)
    : Optimizer(std::move(groups), std::move(names), std::move(defaults),
                decoupled ? "AdamW" : "Adam"),
      decoupled_(decoupled) {
  check_options(*defaults_, "");
  make_rooms();
}

Adam::Adam(std::vector<at::Tensor> params, AdamOptions options)
    : Adam(one_group(std::move(params)), {}, std::make_unique<AdamOptions>(options), false) {}
Adam::Adam(const NamedParameters& params, AdamOptions options)
    : Adam(one_group(params), params.keys(), std::make_unique<AdamOptions>(options), false) {}
Adam::Adam(Groups groups, AdamOptions options)
    : Adam(std::move(groups), {}, std::make_unique<AdamOptions>(options), false) {}

AdamW::AdamW(std::vector<at::Tensor> params, AdamOptions options)
    : Adam(one_group(std::move(params)), {}, std::make_unique<AdamOptions>(options), true) {}
AdamW::AdamW(const NamedParameters& params, AdamOptions options)
    : Adam(one_group(params), params.keys(), std::make_unique<AdamOptions>(options), true) {}
AdamW::AdamW(Groups groups, AdamOptions options)
    : Adam(std::move(groups), {}, std::make_unique<AdamOptions>(options), true) {}

void Adam::check_options(const Options& options, const std::string& where) const {
  const auto& o = options_of<AdamOptions>(options, kind_, where);
  const std::string at = where.empty() ? "" : where + ": ";
  check_common(o, at);
  TORCH_CHECK(o.eps() >= 0, at, "eps is ", o.eps(), "; expected a number >= 0");
  const auto [beta1, beta2] = o.betas();
  TORCH_CHECK(beta1 >= 0 && beta1 < 1, at, "betas[0] is ", beta1, "; expected 0 <= beta < 1");
  TORCH_CHECK(beta2 >= 0 && beta2 < 1, at, "betas[1] is ", beta2, "; expected 0 <= beta < 1");
}

void Adam::write_options(const Options& options, StateDict& out) const {
  const auto& o = options_of<AdamOptions>(options, kind_);
  const auto [beta1, beta2] = o.betas();
  out.insert("lr", o.lr());
  out.insert("betas", c10::ivalue::Tuple::create(c10::IValue(beta1), c10::IValue(beta2)));
  out.insert("eps", o.eps());
  out.insert("weight_decay", o.weight_decay());
  out.insert("amsgrad", o.amsgrad());
  write_common(o, out);
}

std::unique_ptr<torch::optim::OptimizerOptions> Adam::read_options(const Options& options,
                                                                   const StateDict& saved) const {
  auto o = std::make_unique<AdamOptions>(options_of<AdamOptions>(options, kind_));
  o->lr(number(saved, "lr", o->lr())).eps(number(saved, "eps", o->eps()));
  o->betas(pair(saved, "betas", o->betas()));
  o->weight_decay(number(saved, "weight_decay", o->weight_decay()));
  o->amsgrad(flag(saved, "amsgrad", o->amsgrad()));
  o->maximize(flag(saved, "maximize", o->maximize()));
  return o;
}

void Adam::assign_options(Options& to, const Options& from) const {
  dynamic_cast<AdamOptions&>(to) = options_of<AdamOptions>(from, kind_);
}

std::vector<const char*> Adam::state_names(const Options& options) const {
  if (options_of<AdamOptions>(options, kind_).amsgrad())
    return {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  return {"exp_avg", "exp_avg_sq"};
}

Optimizer::Common Adam::common(const Options& options) const {
  const auto& o = options_of<AdamOptions>(options, kind_);
  return {o.master(), o.max_grad_norm(), o.skip_nonfinite(), o.grad_dtype()};
}

void Adam::apply(Room& room, const at::Tensor& control) {
  const auto& o = options_of<AdamOptions>(room.group->options(), kind_);
  const auto [beta1, beta2] = o.betas();
  if (decoupled_)
    api::step_op<double, double, double, double, double, bool, bool, bool>(
        "halfstep::adamw_step_", room.frame(state_names(o), control), beta1, beta2, o.eps(),
        o.weight_decay(), 0.0, false, o.amsgrad(), o.maximize());
  else
    api::step_op<double, double, double, double, bool, bool>(
        "halfstep::adam_step_", room.frame(state_names(o), control), beta1, beta2, o.eps(),
        o.weight_decay(), o.amsgrad(), o.maximize());
}

SGD::SGD(std::vector<at::Tensor> params, SGDOptions options)
    : SGD(one_group(std::move(params)), options) {}
SGD::SGD(const NamedParameters& params, SGDOptions options)
    : Optimizer(one_group(params), params.keys(), std::make_unique<SGDOptions>(options), "SGD") {
  check_options(*defaults_, "");
  make_rooms();
}
SGD::SGD(Groups groups, SGDOptions options)
    : Optimizer(std::move(groups), {}, std::make_unique<SGDOptions>(options), "SGD") {
  check_options(*defaults_, "");
  make_rooms();
}

void SGD::check_options(const Options& options, const std::string& where) const {
  const auto& o = options_of<SGDOptions>(options, kind_, where);
  const std::string at = where.empty() ? "" : where + ": ";
  check_common(o, at);
  TORCH_CHECK(o.momentum() >= 0, at, "momentum is ", o.momentum(), "; expected a number >= 0");
  TORCH_CHECK(!o.nesterov() || (o.momentum() > 0 && o.dampening() == 0), at,
              "nesterov needs momentum > 0 and dampening 0; momentum is ", o.momentum(),
              ", dampening is ", o.dampening());
}

void SGD::write_options(const Options& options, StateDict& out) const {
  const auto& o = options_of<SGDOptions>(options, kind_);
  out.insert("lr", o.lr());
  out.insert("momentum", o.momentum());
  out.insert("dampening", o.dampening());
  out.insert("weight_decay", o.weight_decay());
  out.insert("nesterov", o.nesterov());
  write_common(o, out);
}

std::unique_ptr<torch::optim::OptimizerOptions> SGD::read_options(const Options& options,
                                                                  const StateDict& saved) const {
  auto o = std::make_unique<SGDOptions>(options_of<SGDOptions>(options, kind_));
  o->lr(number(saved, "lr", o->lr())).momentum(number(saved, "momentum", o->momentum()));
  o->dampening(number(saved, "dampening", o->dampening()));
  o->weight_decay(number(saved, "weight_decay", o->weight_decay()));
  o->nesterov(flag(saved, "nesterov", o->nesterov()));
  o->maximize(flag(saved, "maximize", o->maximize()));
  return o;
}

void SGD::assign_options(Options& to, const Options& from) const {
  dynamic_cast<SGDOptions&>(to) = options_of<SGDOptions>(from, kind_);
}

std::vector<const char*> SGD::state_names(const Options& options) const {
  if (options_of<SGDOptions>(options, kind_).momentum() != 0) return {"momentum_buffer"};
  return {};
}

Optimizer::Common SGD::common(const Options& options) const {
  const auto& o = options_of<SGDOptions>(options, kind_);
  return {o.master(), o.max_grad_norm(), o.skip_nonfinite(), o.grad_dtype()};
}

void SGD::apply(Room& room, const at::Tensor& control) {
  const auto& o = options_of<SGDOptions>(room.group->options(), kind_);
  api::step_op<double, double, double, bool, bool>(
      "halfstep::sgd_step_", room.frame(state_names(o), control), o.momentum(), o.dampening(),
      o.weight_decay(), o.nesterov(), o.maximize());
}

}  // namespace halfstep::optim
