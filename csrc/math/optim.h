#pragma once

// Update rules of the optimizers, once for sixteen lanes, for one lane and for the device.
// V is the compute type: float or F32, and double or F64 where the weight or its master is FP64.
// Orders of evaluation are torch.optim's; every multiply-add that is fused is written as fma.

#include "vec.h"

namespace halfstep::math {

/// One parameter of a step; pointers to dense memory in one common layout.
struct StepTensor {
  void* param = nullptr;
  void* master = nullptr;  ///< null without a master
  const void* grad = nullptr;
  void* state1 = nullptr;  ///< exp_avg or momentum buffer (compute type), or null
  void* state2 = nullptr;  ///< exp_avg_sq, or null
  void* state3 = nullptr;  ///< max_exp_avg_sq, or null
  Dtype param_dtype = Dtype::kF32;
  MasterKind master_kind = MasterKind::kNone;
  Dtype grad_dtype = Dtype::kF32;
  int32_t unused = 0;  ///< no padding: tables are compared as bytes
};

/// What is constant over a tensor in one Adam or AdamW step.
struct AdamStep {
  double multiplier;     ///< on the gradient: clip / scale, negative when maximizing
  double l2;             ///< Adam's weight decay, added to the gradient
  double decay;          ///< AdamW's 1 - lr * weight_decay
  double blend1;         ///< 1 - beta1
  double beta2, blend2;  ///< blend2 = 1 - beta2
  double step_size;      ///< lr / (1 - beta1^t)
  double root_scale;     ///< 1 / sqrt(1 - beta2^t)
  double eps;
  bool amsgrad;
};

/// What is constant over a tensor in one SGD step.
struct SgdStep {
  double multiplier;
  double weight_decay;
  double momentum;
  double blend;  ///< 1 - dampening
  double lr;
  bool nesterov;
  bool first;  ///< the buffer is filled, not blended
};

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// beta^step by repeated squaring: the same bits on every machine, unlike pow().
HALFSTEP_FN double power(double beta, int64_t step) {
  double result = 1;
  for (double square = beta; step > 0; step >>= 1, square *= square)
    if (step & 1) result *= square;
  return result;
}

HALFSTEP_FN AdamStep adam_step_constants(bool decoupled, bool amsgrad, bool maximize, double lr,
                                         double beta1, double beta2, double eps,
                                         double weight_decay, double multiplier, int64_t step) {
  AdamStep c;
  c.multiplier = maximize ? -multiplier : multiplier;
  c.l2 = decoupled ? 0 : weight_decay;
  c.decay = decoupled ? 1 - lr * weight_decay : 1;
  c.blend1 = 1 - beta1;
  c.beta2 = beta2;
  c.blend2 = 1 - beta2;
  c.step_size = lr / (1 - power(beta1, step));
  c.root_scale = 1 / __builtin_sqrt(1 - power(beta2, step));
  c.eps = eps;
  c.amsgrad = amsgrad;
  return c;
}

HALFSTEP_FN SgdStep sgd_step_constants(bool maximize, double lr, double momentum, double dampening,
                                       double weight_decay, bool nesterov, double multiplier,
                                       int64_t step) {
  return {maximize ? -multiplier : multiplier,
          weight_decay,
          momentum,
          1 - dampening,
          lr,
          nesterov,
          step == 1};
}

/// p, m, v (and v_max with amsgrad) after one step; `g` is the gradient as stored.
template <class V>
HALFSTEP_FN void adam_update(const AdamStep& c, V g, V& p, V& m, V& v, V& v_max) {
  using T = typename Traits<V>::Scalar;
  const auto constant = [](double x) { return broadcast<V>(T(x)); };
  g = g * constant(c.multiplier);
  if (c.l2 != 0) g = fma(constant(c.l2), p, g);
  m = fma(constant(c.blend1), g - m, m);
  v = fma(constant(c.blend2) * g, g, constant(c.beta2) * v);
  V root = v;
  if (c.amsgrad) {
    v_max = select(v_max >= v, v_max, v);  // a NaN in v is kept
    root = v_max;
  }
  const V denominator = fma(sqrt(root), constant(c.root_scale), constant(c.eps));
  p = fma(constant(-c.step_size), m / denominator, p * constant(c.decay));
}

template <class V>
HALFSTEP_FN void sgd_update(const SgdStep& c, V g, V& p, V& buffer) {
  using T = typename Traits<V>::Scalar;
  const auto constant = [](double x) { return broadcast<V>(T(x)); };
  g = g * constant(c.multiplier);
  if (c.weight_decay != 0) g = fma(constant(c.weight_decay), p, g);
  if (c.momentum != 0) {
    buffer = c.first ? g : fma(constant(c.blend), g, constant(c.momentum) * buffer);
    g = c.nesterov ? fma(constant(c.momentum), buffer, g) : buffer;
  }
  p = fma(constant(-c.lr), g, p);
}

HALFSTEP_MATH_END
