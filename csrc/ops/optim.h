#pragma once

// The step ops. Each is one rule of csrc/math/optim.h in one common frame of arguments; here are
// the frame, the list of ops, and how a backend registers all of them at once.

#include <torch/library.h>

#include "../math/optim.h"
#include "check.h"

namespace halfstep::ops {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

/// What all step ops take, in schema order.
struct StepArgs {
  const char* op;
  at::TensorList params;
  const OptionalTensors& grads;
  at::TensorList masters;
  /// State-major, [s * n + i]: elementwise states, states of one element, then, for int8 states,
  /// the scales of the elementwise ones.
  at::TensorList states;
  at::TensorList emas;    ///< running means of the exact weights, or an empty list
  at::TensorList zeroed;  ///< gradients instead of `grads`; they are zeroed, on a skip too
  const at::Tensor& steps;
  const at::Tensor& overflowed;
  const at::Tensor& lr;
  const std::optional<at::Tensor>& control;
  at::TensorList table;
  double ema_decay;
  bool stochastic;
  int64_t seed;

  /// The gradient of parameter i; undefined where there is none.
  at::Tensor grad(size_t i) const {
    if (!zeroed.empty()) return zeroed[i].sym_numel() != 0 ? zeroed[i] : at::Tensor();
    const std::optional<at::Tensor> grad = grads[i];
    return grad ? *grad : at::Tensor();
  }
};

/// What the checks and the gathering of pointers need to know of a rule.
struct RuleInfo {
  int elementwise;           ///< states with an element for each of the parameter
  int per_tensor;            ///< states of one element
  const char* const* names;  ///< how errors call their lists
};

/// All checks of a step; nothing is written before them.
void check_step(const StepArgs& args, const RuleInfo& info);
/// Rows of `states` that hold scales of int8 states.
inline bool has_scales(const StepArgs& args, const RuleInfo& info) {
  return args.states.size() > args.params.size() * size_t(info.elementwise + info.per_tensor);
}

// ---- the ops: name, rule, and how the numbers of the schema become the rule's ------------------
struct AdamOp {
  using Rule = math::AdamRule;
  static constexpr const char* kName = "adam_step_";
  static constexpr const char* kSchema =
      "float beta1, float beta2, float eps, float weight_decay, bool amsgrad, bool maximize";
  static constexpr const char* kStates[] = {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"};
  static math::AdamNumbers numbers(double beta1, double beta2, double eps, double weight_decay,
                                   bool amsgrad, bool maximize) {
    return {beta1, beta2, eps, weight_decay, 0, math::Decay::kGradient, amsgrad, maximize};
  }
};
struct AdamWOp {
  using Rule = math::AdamRule;
  static constexpr const char* kName = "adamw_step_";
  static constexpr const char* kSchema =
      "float beta1, float beta2, float eps, float weight_decay, float max_lr, bool decay_in_update,"
      " bool amsgrad, bool maximize";
  static constexpr const char* kStates[] = {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"};
  static math::AdamNumbers numbers(double beta1, double beta2, double eps, double weight_decay,
                                   double max_lr, bool decay_in_update, bool amsgrad,
                                   bool maximize) {
    const auto decay = decay_in_update ? math::Decay::kUpdate : math::Decay::kWeight;
    return {beta1, beta2, eps, weight_decay, max_lr, decay, amsgrad, maximize};
  }
};
struct SgdOp {
  using Rule = math::SgdRule;
  static constexpr const char* kName = "sgd_step_";
  static constexpr const char* kSchema =
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize";
  static constexpr const char* kStates[] = {"momentum_buffers"};
  static math::SgdNumbers numbers(double momentum, double dampening, double weight_decay,
                                  bool nesterov, bool maximize) {
    return {momentum, dampening, weight_decay, nesterov, maximize};
  }
};
struct LionOp {
  using Rule = math::LionRule;
  static constexpr const char* kName = "lion_step_";
  static constexpr const char* kSchema =
      "float beta1, float beta2, float weight_decay, bool maximize";
  static constexpr const char* kStates[] = {"exp_avgs"};
  static math::LionNumbers numbers(double beta1, double beta2, double weight_decay, bool maximize) {
    return {beta1, beta2, weight_decay, maximize};
  }
};
struct AdagradOp {
  using Rule = math::AdagradRule;
  static constexpr const char* kName = "adagrad_step_";
  static constexpr const char* kSchema =
      "float lr_decay, float eps, float weight_decay, bool maximize";
  static constexpr const char* kStates[] = {"sums"};
  static math::AdagradNumbers numbers(double lr_decay, double eps, double weight_decay,
                                      bool maximize) {
    return {lr_decay, eps, weight_decay, maximize};
  }
};
struct LambOp {
  using Rule = math::LambRule;
  static constexpr const char* kName = "lamb_step_";
  static constexpr const char* kSchema =
      "float beta1, float beta2, float eps, float weight_decay, bool bias_correction, "
      "bool grad_averaging, bool always_adapt, bool maximize";
  static constexpr const char* kStates[] = {"exp_avgs", "exp_avg_sqs"};
  static math::LambNumbers numbers(double beta1, double beta2, double eps, double weight_decay,
                                   bool bias_correction, bool grad_averaging, bool always_adapt,
                                   bool maximize) {
    return {beta1,           beta2,          eps,          weight_decay,
            bias_correction, grad_averaging, always_adapt, maximize};
  }
};
struct NovoGradOp {
  using Rule = math::NovoGradRule;
  static constexpr const char* kName = "novograd_step_";
  static constexpr const char* kSchema =
      "float beta1, float beta2, float eps, float weight_decay, bool grad_averaging, bool maximize";
  static constexpr const char* kStates[] = {"exp_avgs", "exp_avg_sqs"};
  static math::NovoGradNumbers numbers(double beta1, double beta2, double eps, double weight_decay,
                                       bool grad_averaging, bool maximize) {
    return {beta1, beta2, eps, weight_decay, grad_averaging, maximize};
  }
};

template <class Op>
RuleInfo info_of(const typename Op::Rule::Numbers& numbers) {
  return {Op::Rule::states(numbers), Op::Rule::kTensorStates, Op::kStates};
}

/// The kernel of one op for one backend: Backend::run<Rule>(args, info, numbers) after the checks.
template <class Op, class Backend, class Numbers = decltype(&Op::numbers)>
struct StepOp;
template <class Op, class Backend, class... N>
struct StepOp<Op, Backend, typename Op::Rule::Numbers (*)(N...)> {
  static void call(at::TensorList params, const OptionalTensors& grads, at::TensorList masters,
                   at::TensorList states, at::TensorList emas, at::TensorList zeroed,
                   const at::Tensor& steps, const at::Tensor& overflowed, const at::Tensor& lr,
                   const std::optional<at::Tensor>& control, at::TensorList table, double ema_decay,
                   bool stochastic, int64_t seed, N... n) {
    const StepArgs args{Op::kName,  params, grads,   masters, states,    emas,       zeroed, steps,
                        overflowed, lr,     control, table,   ema_decay, stochastic, seed};
    const typename Op::Rule::Numbers numbers = Op::numbers(n...);
    const RuleInfo info = info_of<Op>(numbers);
    check_step(args, info);
    Backend::template run<typename Op::Rule>(args, info, numbers);
  }
};

template <class F>
void for_each_step_op(const F& f) {
  f(AdamOp());
  f(AdamWOp());
  f(SgdOp());
  f(LionOp());
  f(AdagradOp());
  f(LambOp());
  f(NovoGradOp());
}

template <class Backend>
void register_steps(torch::Library& m) {
  for_each_step_op(
      [&](auto op) { m.impl(decltype(op)::kName, &StepOp<decltype(op), Backend>::call); });
}

}  // namespace halfstep::ops
