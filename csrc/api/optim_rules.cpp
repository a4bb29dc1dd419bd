// The optimizers: options, state names, and the op each one calls. What differs between them is in
// one struct a type of options, Of<Options>; Rule<Options> calls it.

#include <halfstep/optim.h>

#include <string_view>

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

void check_not_negative(const std::string& at, const char* name, double value) {
  TORCH_CHECK(value >= 0, at, name, " is ", value, "; expected a number >= 0");
}

template <class Options>
void check_common(const Options& o, const std::string& at) {
  check_not_negative(at, "lr", o.lr());
  check_not_negative(at, "weight_decay", o.weight_decay());
  TORCH_CHECK(!o.grad_dtype() || *o.grad_dtype() == at::kFloat, at, "grad_dtype is ",
              type_name(o.grad_dtype().value_or(at::kFloat)),
              "; expected float32, or none for the parameter's dtype");
  if (o.max_grad_norm()) check_not_negative(at, "max_grad_norm", *o.max_grad_norm());
  const double decay = o.ema_decay().value_or(0);
  TORCH_CHECK(decay >= 0 && decay <= 1, at, "ema_decay is ", decay,
              "; expected a number from 0 to 1");
  TORCH_CHECK(o.seed() >= 0 && o.seed() < int64_t(1) << 32, at, "seed is ", o.seed(),
              "; expected an integer from 0 to 2^32 - 1");
}

void check_betas(const std::string& at, const Betas& betas) {
  const auto [beta1, beta2] = betas;
  TORCH_CHECK(beta1 >= 0 && beta1 < 1, at, "betas[0] is ", beta1, "; expected 0 <= beta < 1");
  TORCH_CHECK(beta2 >= 0 && beta2 < 1, at, "betas[1] is ", beta2, "; expected 0 <= beta < 1");
}

const char* name_of(Master master) {
  constexpr const char* kNames[] = {"auto", "none",   "split16", "fp32",
                                    "fp64", "split8", "kahan",   "stochastic"};
  return kNames[int(master)];
}
const char* name_of(States states) {
  constexpr const char* kNames[] = {"fp32", "bf16", "int8"};
  return kNames[int(states)];
}

template <class Options>
void write_common(const Options& o, StateDict& out) {
  out.insert("maximize", o.maximize());
  out.insert("master", std::string(name_of(o.master())));
  out.insert("states", std::string(name_of(o.states())));
  out.insert("grad_dtype", std::string(o.grad_dtype() ? "fp32" : "param"));
  out.insert("ema_decay", o.ema_decay() ? c10::IValue(*o.ema_decay()) : c10::IValue());
  out.insert("seed", o.seed());
}

c10::IValue ivalue(const Betas& betas) {
  return c10::ivalue::Tuple::create(c10::IValue(std::get<0>(betas)),
                                    c10::IValue(std::get<1>(betas)));
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

/// The hyperparameters of every rule. How masters, states and gradients are kept is the optimizer's
/// own; a running mean that only one side has stays as it is here.
template <class Options>
void read_common(Options& o, const StateDict& saved) {
  o.lr(number(saved, "lr", o.lr()));
  o.weight_decay(number(saved, "weight_decay", o.weight_decay()));
  o.maximize(flag(saved, "maximize", o.maximize()));
  if (o.ema_decay() && saved.contains("ema_decay") && !saved.at("ema_decay").isNone())
    o.ema_decay(number(saved, "ema_decay", 0));
  o.seed(int64_t(number(saved, "seed", double(o.seed()))));
}

/// Names, options and op of the rule with these options.
template <class Options>
struct Of;

double max_lr_of(const AdamOptions& o) { return o.max_lr().value_or(o.lr()); }

template <>
struct Of<AdamOptions> {
  using O = AdamOptions;
  static constexpr const char* kTensorState = nullptr;
  static std::vector<const char*> states(const O& o) {
    if (o.amsgrad()) return {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
    return {"exp_avg", "exp_avg_sq"};
  }
  static void check(const O& o, const std::string& at, std::string_view kind) {
    check_not_negative(at, "eps", o.eps());
    check_betas(at, o.betas());
    TORCH_CHECK(kind == "AdamW" || !(o.decouple_lr() || o.decay_in_update()), at,
                o.decouple_lr() ? "decouple_lr" : "decay_in_update", " is an option of AdamW, not ",
                kind);
    TORCH_CHECK(!o.decouple_lr() || max_lr_of(o) > 0, at,
                "decouple_lr divides by max_lr, which is ", max_lr_of(o),
                "; pass the largest lr of the schedule as max_lr");
  }
  static void write(const O& o, StateDict& out, std::string_view kind) {
    out.insert("lr", o.lr()).insert("betas", ivalue(o.betas())).insert("eps", o.eps());
    out.insert("weight_decay", o.weight_decay()).insert("amsgrad", o.amsgrad());
    if (kind != "AdamW") return;
    out.insert("decouple_lr", o.decouple_lr());
    out.insert("max_lr", o.max_lr() ? c10::IValue(*o.max_lr()) : c10::IValue());
    out.insert("decay_order", std::string(o.decay_in_update() ? "apex" : "torch"));
  }
  static void read(O& o, const StateDict& saved) {
    o.eps(number(saved, "eps", o.eps())).betas(pair(saved, "betas", o.betas()));
    o.amsgrad(flag(saved, "amsgrad", o.amsgrad()));
    o.decouple_lr(flag(saved, "decouple_lr", o.decouple_lr()));
    if (saved.contains("max_lr") && !saved.at("max_lr").isNone())
      o.max_lr(number(saved, "max_lr", 0));
    if (!saved.contains("decay_order")) return;
    const c10::IValue order = saved.at("decay_order");
    TORCH_CHECK(
        order.isString() && (order.toStringRef() == "apex" || order.toStringRef() == "torch"),
        "optimizer state has decay_order ", order, "; expected 'torch' or 'apex'");
    o.decay_in_update(order.toStringRef() == "apex");
  }
  static void apply(const O& o, const api::StepFrame& frame, std::string_view kind) {
    const auto [beta1, beta2] = o.betas();
    if (kind == "AdamW")
      api::step_op("halfstep::adamw_step_", frame, beta1, beta2, o.eps(), o.weight_decay(),
                   o.decouple_lr() ? max_lr_of(o) : 0.0, o.decay_in_update(), o.amsgrad(),
                   o.maximize());
    else
      api::step_op("halfstep::adam_step_", frame, beta1, beta2, o.eps(), o.weight_decay(),
                   o.amsgrad(), o.maximize());
  }
};

template <>
struct Of<SGDOptions> {
  using O = SGDOptions;
  static constexpr const char* kTensorState = nullptr;
  static std::vector<const char*> states(const O& o) {
    if (o.momentum() != 0) return {"momentum_buffer"};
    return {};
  }
  static void check(const O& o, const std::string& at, std::string_view) {
    check_not_negative(at, "momentum", o.momentum());
    TORCH_CHECK(!o.nesterov() || (o.momentum() > 0 && o.dampening() == 0), at,
                "nesterov needs momentum > 0 and dampening 0; momentum is ", o.momentum(),
                ", dampening is ", o.dampening());
  }
  static void write(const O& o, StateDict& out, std::string_view) {
    out.insert("lr", o.lr()).insert("momentum", o.momentum()).insert("dampening", o.dampening());
    out.insert("weight_decay", o.weight_decay()).insert("nesterov", o.nesterov());
  }
  static void read(O& o, const StateDict& saved) {
    o.momentum(number(saved, "momentum", o.momentum()));
    o.dampening(number(saved, "dampening", o.dampening()));
    o.nesterov(flag(saved, "nesterov", o.nesterov()));
  }
  static void apply(const O& o, const api::StepFrame& frame, std::string_view) {
    api::step_op("halfstep::sgd_step_", frame, o.momentum(), o.dampening(), o.weight_decay(),
                 o.nesterov(), o.maximize());
  }
};

template <>
struct Of<LionOptions> {
  using O = LionOptions;
  static constexpr const char* kTensorState = nullptr;
  static std::vector<const char*> states(const O&) { return {"exp_avg"}; }
  static void check(const O& o, const std::string& at, std::string_view) {
    check_betas(at, o.betas());
  }
  static void write(const O& o, StateDict& out, std::string_view) {
    out.insert("lr", o.lr()).insert("betas", ivalue(o.betas()));
    out.insert("weight_decay", o.weight_decay());
  }
  static void read(O& o, const StateDict& saved) { o.betas(pair(saved, "betas", o.betas())); }
  static void apply(const O& o, const api::StepFrame& frame, std::string_view) {
    const auto [beta1, beta2] = o.betas();
    api::step_op("halfstep::lion_step_", frame, beta1, beta2, o.weight_decay(), o.maximize());
  }
};

template <>
struct Of<AdagradOptions> {
  using O = AdagradOptions;
  static constexpr const char* kTensorState = nullptr;
  static std::vector<const char*> states(const O&) { return {"sum"}; }
  static void check(const O& o, const std::string& at, std::string_view) {
    check_not_negative(at, "eps", o.eps());
    check_not_negative(at, "lr_decay", o.lr_decay());
    check_not_negative(at, "initial_accumulator_value", o.initial_accumulator_value());
  }
  static void write(const O& o, StateDict& out, std::string_view) {
    out.insert("lr", o.lr()).insert("lr_decay", o.lr_decay());
    out.insert("weight_decay", o.weight_decay());
    out.insert("initial_accumulator_value", o.initial_accumulator_value()).insert("eps", o.eps());
  }
  static void read(O& o, const StateDict& saved) {
    o.lr_decay(number(saved, "lr_decay", o.lr_decay())).eps(number(saved, "eps", o.eps()));
    o.initial_accumulator_value(
        number(saved, "initial_accumulator_value", o.initial_accumulator_value()));
  }
  static void apply(const O& o, const api::StepFrame& frame, std::string_view) {
    api::step_op("halfstep::adagrad_step_", frame, o.lr_decay(), o.eps(), o.weight_decay(),
                 o.maximize());
  }
};

template <>
struct Of<LambOptions> {
  using O = LambOptions;
  static constexpr const char* kTensorState = nullptr;
  static std::vector<const char*> states(const O&) { return {"exp_avg", "exp_avg_sq"}; }
  static void check(const O& o, const std::string& at, std::string_view) {
    check_not_negative(at, "eps", o.eps());
    check_betas(at, o.betas());
  }
  static void write(const O& o, StateDict& out, std::string_view) {
    out.insert("lr", o.lr()).insert("betas", ivalue(o.betas())).insert("eps", o.eps());
    out.insert("weight_decay", o.weight_decay()).insert("bias_correction", o.bias_correction());
    out.insert("grad_averaging", o.grad_averaging()).insert("always_adapt", o.always_adapt());
  }
  static void read(O& o, const StateDict& saved) {
    o.eps(number(saved, "eps", o.eps())).betas(pair(saved, "betas", o.betas()));
    o.bias_correction(flag(saved, "bias_correction", o.bias_correction()));
    o.grad_averaging(flag(saved, "grad_averaging", o.grad_averaging()));
    o.always_adapt(flag(saved, "always_adapt", o.always_adapt()));
  }
  static void apply(const O& o, const api::StepFrame& frame, std::string_view) {
    const auto [beta1, beta2] = o.betas();
    api::step_op("halfstep::lamb_step_", frame, beta1, beta2, o.eps(), o.weight_decay(),
                 o.bias_correction(), o.grad_averaging(), o.always_adapt(), o.maximize());
  }
};

template <>
struct Of<NovoGradOptions> {
  using O = NovoGradOptions;
  static constexpr const char* kTensorState = "exp_avg_sq";
  static std::vector<const char*> states(const O&) { return {"exp_avg", "exp_avg_sq"}; }
  static void check(const O& o, const std::string& at, std::string_view) {
    check_not_negative(at, "eps", o.eps());
    check_betas(at, o.betas());
  }
  static void write(const O& o, StateDict& out, std::string_view) {
    out.insert("lr", o.lr()).insert("betas", ivalue(o.betas())).insert("eps", o.eps());
    out.insert("weight_decay", o.weight_decay()).insert("grad_averaging", o.grad_averaging());
  }
  static void read(O& o, const StateDict& saved) {
    o.eps(number(saved, "eps", o.eps())).betas(pair(saved, "betas", o.betas()));
    o.grad_averaging(flag(saved, "grad_averaging", o.grad_averaging()));
  }
  static void apply(const O& o, const api::StepFrame& frame, std::string_view) {
    const auto [beta1, beta2] = o.betas();
    api::step_op("halfstep::novograd_step_", frame, beta1, beta2, o.eps(), o.weight_decay(),
                 o.grad_averaging(), o.maximize());
  }
};

}  // namespace

template <class O>
Rule<O>::Rule(Groups groups, std::vector<std::string> names, O options, const char* kind)
    : Optimizer(std::move(groups), std::move(names), std::make_unique<O>(std::move(options)),
                kind) {
  check_options(*defaults_, "");
  make_rooms();
}
template <class O>
Rule<O>::Rule(std::vector<at::Tensor> params, O options, const char* kind)
    : Rule(one_group(std::move(params)), {}, std::move(options), kind) {}
template <class O>
Rule<O>::Rule(const NamedParameters& params, O options, const char* kind)
    : Rule(one_group(params), params.keys(), std::move(options), kind) {}
template <class O>
Rule<O>::Rule(Groups groups, O options, const char* kind)
    : Rule(std::move(groups), {}, std::move(options), kind) {}

template <class O>
void Rule<O>::check_options(const Options& options, const std::string& where) const {
  const O& o = options_of<O>(options, kind_, where);
  const std::string at = where.empty() ? "" : where + ": ";
  check_common(o, at);
  Of<O>::check(o, at, kind_);
}

template <class O>
void Rule<O>::complete(Options& options) const {
  if constexpr (std::is_same_v<O, AdamOptions>) {
    auto* o = dynamic_cast<AdamOptions*>(&options);
    if (o && o->decouple_lr() && !o->max_lr()) o->max_lr(o->lr());
  }
}

template <class O>
std::vector<const char*> Rule<O>::state_names(const Options& options) const {
  return Of<O>::states(options_of<O>(options, kind_));
}
template <class O>
const char* Rule<O>::tensor_state() const {
  return Of<O>::kTensorState;
}

template <class O>
double Rule<O>::initial(const Options& options, const std::string&) const {
  if constexpr (std::is_same_v<O, AdagradOptions>)
    return options_of<O>(options, kind_).initial_accumulator_value();
  return 0;
}

template <class O>
void Rule<O>::apply(Room& room, const at::Tensor& control) {
  Of<O>::apply(options_of<O>(room.group->options(), kind_), room.frame(control), kind_);
}

template <class O>
const CommonOptions& Rule<O>::common(const Options& options) const {
  return options_of<O>(options, kind_).common();
}

template <class O>
void Rule<O>::write_options(const Options& options, StateDict& out) const {
  const O& o = options_of<O>(options, kind_);
  Of<O>::write(o, out, kind_);
  write_common(o, out);
}

template <class O>
std::unique_ptr<torch::optim::OptimizerOptions> Rule<O>::read_options(
    const Options& options, const StateDict& saved) const {
  auto o = std::make_unique<O>(options_of<O>(options, kind_));
  read_common(*o, saved);
  Of<O>::read(*o, saved);
  return o;
}

template <class O>
void Rule<O>::assign_options(Options& to, const Options& from) const {
  dynamic_cast<O&>(to) = options_of<O>(from, kind_);
}

template class Rule<AdamOptions>;
template class Rule<SGDOptions>;
template class Rule<LionOptions>;
template class Rule<AdagradOptions>;
template class Rule<LambOptions>;
template class Rule<NovoGradOptions>;

}  // namespace halfstep::optim
