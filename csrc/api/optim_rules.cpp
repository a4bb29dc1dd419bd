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
const Options& options_of(const torch::optim::OptimizerOptions& options, const char* kind) {
  const auto* own = dynamic_cast<const Options*>(&options);
  TORCH_CHECK(own, "a parameter group of ", kind, " has options of another optimizer");
  return *own;
}

api::OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? api::OptionalTensor(tensor) : std::nullopt;
}

void check_common(double lr, double weight_decay) {
  TORCH_CHECK(lr >= 0, "lr is ", lr, "; expected a number >= 0");
  TORCH_CHECK(weight_decay >= 0, "weight_decay is ", weight_decay, "; expected a number >= 0");
}

void check_options(const AdamOptions& o) {
  check_common(o.lr(), o.weight_decay());
  TORCH_CHECK(o.eps() >= 0, "eps is ", o.eps(), "; expected a number >= 0");
  const auto [beta1, beta2] = o.betas();
  TORCH_CHECK(beta1 >= 0 && beta1 < 1, "betas[0] is ", beta1, "; expected 0 <= beta < 1");
  TORCH_CHECK(beta2 >= 0 && beta2 < 1, "betas[1] is ", beta2, "; expected 0 <= beta < 1");
}

void check_options(const SGDOptions& o) {
  check_common(o.lr(), o.weight_decay());
  TORCH_CHECK(o.momentum() >= 0, "momentum is ", o.momentum(), "; expected a number >= 0");
  TORCH_CHECK(!o.nesterov() || (o.momentum() > 0 && o.dampening() == 0),
              "nesterov needs momentum > 0 and dampening 0; momentum is ", o.momentum(),
              ", dampening is ", o.dampening());
}

}  // namespace

Adam::Adam(Groups groups, std::vector<std::string> names, std::unique_ptr<AdamOptions> defaults,
           bool decoupled)
    : Optimizer(std::move(groups), std::move(names), std::move(defaults),
                decoupled ? "AdamW" : "Adam"),
      decoupled_(decoupled) {
  for (const auto& group : param_groups())
    check_options(options_of<AdamOptions>(group.options(), kind_));
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

std::vector<const char*> Adam::state_names(const torch::optim::OptimizerOptions& options) const {
  if (options_of<AdamOptions>(options, kind_).amsgrad())
    return {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  return {"exp_avg", "exp_avg_sq"};
}

Optimizer::Common Adam::common(const torch::optim::OptimizerOptions& options) const {
  const auto& o = options_of<AdamOptions>(options, kind_);
  return {o.master(), o.max_grad_norm(), o.skip_nonfinite()};
}

void Adam::apply(Room& room, const at::Tensor& control) {
  using Op =
      void(api::Tensors, const api::OptionalTensors&, api::Tensors, api::Tensors, api::Tensors,
           api::Tensors, const at::Tensor&, const at::Tensor&, const at::Tensor&,
           const api::OptionalTensor&, api::Tensors, double, double, double, double, bool, bool);
  static const auto adamw = api::find_op<Op>("halfstep::adamw_step_");
  static const auto adam = api::find_op<Op>("halfstep::adam_step_");
  const auto& o = options_of<AdamOptions>(room.group->options(), kind_);
  const auto [beta1, beta2] = o.betas();
  (decoupled_ ? adamw : adam)
      .call(room.params, room.grads(), room.masters, room.states["exp_avg"],
            room.states["exp_avg_sq"],
            o.amsgrad() ? api::Tensors(room.states["max_exp_avg_sq"]) : api::Tensors(), room.steps,
            room.overflowed, room.device_lr(), optional(control), {}, beta1, beta2, o.eps(),
            o.weight_decay(), o.amsgrad(), o.maximize());
}

SGD::SGD(std::vector<at::Tensor> params, SGDOptions options)
    : SGD(one_group(std::move(params)), options) {}
SGD::SGD(const NamedParameters& params, SGDOptions options)
    : Optimizer(one_group(params), params.keys(), std::make_unique<SGDOptions>(options), "SGD") {
  check_options(options);
  make_rooms();
}
SGD::SGD(Groups groups, SGDOptions options)
    : Optimizer(std::move(groups), {}, std::make_unique<SGDOptions>(options), "SGD") {
  for (const auto& group : param_groups())
    check_options(options_of<SGDOptions>(group.options(), kind_));
  make_rooms();
}

std::vector<const char*> SGD::state_names(const torch::optim::OptimizerOptions& options) const {
  if (options_of<SGDOptions>(options, kind_).momentum() != 0) return {"momentum_buffer"};
  return {};
}

Optimizer::Common SGD::common(const torch::optim::OptimizerOptions& options) const {
  const auto& o = options_of<SGDOptions>(options, kind_);
  return {o.master(), o.max_grad_norm(), o.skip_nonfinite()};
}

void SGD::apply(Room& room, const at::Tensor& control) {
  static const auto op = api::find_op<void(
      api::Tensors, const api::OptionalTensors&, api::Tensors, api::Tensors, const at::Tensor&,
      const at::Tensor&, const at::Tensor&, const api::OptionalTensor&, api::Tensors, double,
      double, double, bool, bool)>("halfstep::sgd_step_");
  const auto& o = options_of<SGDOptions>(room.group->options(), kind_);
  op.call(room.params, room.grads(), room.masters,
          o.momentum() != 0 ? api::Tensors(room.states["momentum_buffer"]) : api::Tensors(),
          room.steps, room.overflowed, room.device_lr(), optional(control), {}, o.momentum(),
          o.dampening(), o.weight_decay(), o.nesterov(), o.maximize());
}

}  // namespace halfstep::optim
