#pragma once

#include "check.h"

namespace halfstep::ops {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

/// Arguments of adam_step_ and adamw_step_, in schema order.
struct AdamArgs {
  at::TensorList params;
  const OptionalTensors& grads;
  at::TensorList masters, exp_avgs, exp_avg_sqs, max_exp_avg_sqs;
  const at::Tensor& steps;
  const at::Tensor& overflowed;
  const at::Tensor& lr;
  const std::optional<at::Tensor>& control;
  at::TensorList table;
  double beta1, beta2, eps, weight_decay;
  bool amsgrad, maximize;
};

/// Arguments of sgd_step_, in schema order.
struct SgdArgs {
  at::TensorList params;
  const OptionalTensors& grads;
  at::TensorList masters, momentum_buffers;
  const at::Tensor& steps;
  const at::Tensor& overflowed;
  const at::Tensor& lr;
  const std::optional<at::Tensor>& control;
  at::TensorList table;
  double momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

void check_adam(const char* op, const AdamArgs& args);
void check_sgd(const SgdArgs& args);

/// `IMPL(op name, AdamArgs)` as the kernels of both Adam ops, for one backend.
template <void (*kRun)(const char*, bool, const AdamArgs&), bool kDecoupled>
void adam_op(at::TensorList params, const OptionalTensors& grads, at::TensorList masters,
             at::TensorList exp_avgs, at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs,
             const at::Tensor& steps, const at::Tensor& overflowed, const at::Tensor& lr,
             const std::optional<at::Tensor>& control, at::TensorList table, double beta1,
             double beta2, double eps, double weight_decay, bool amsgrad, bool maximize) {
  const char* op = kDecoupled ? "adamw_step_" : "adam_step_";
  const AdamArgs args{params, grads,      masters,      exp_avgs, exp_avg_sqs, max_exp_avg_sqs,
                      steps,  overflowed, lr,           control,  table,       beta1,
                      beta2,  eps,        weight_decay, amsgrad,  maximize};
  check_adam(op, args);
  kRun(op, kDecoupled, args);
}

template <void (*kRun)(const SgdArgs&)>
void sgd_op(at::TensorList params, const OptionalTensors& grads, at::TensorList masters,
            at::TensorList momentum_buffers, const at::Tensor& steps, const at::Tensor& overflowed,
            const at::Tensor& lr, const std::optional<at::Tensor>& control, at::TensorList table,
            double momentum, double dampening, double weight_decay, bool nesterov, bool maximize) {
  const SgdArgs args{params,   grads,   masters, momentum_buffers, steps,     overflowed,
                     lr,       control, table,   momentum,         dampening, weight_decay,
                     nesterov, maximize};
  check_sgd(args);
  kRun(args);
}

}  // namespace halfstep::ops
