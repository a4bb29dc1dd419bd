#pragma once

// Update rules of the optimizers, once for sixteen lanes, for one lane and for the device.
// V is the compute type: float or F32, and double or F64 where the weight or its master is FP64.
// Every multiply-add that is fused is written as fma.
//
// A rule is a type with
//   Numbers             what all parameters of a step share; doubles and flags
//   Constants           what is constant over a tensor in one step; made by constants()
//   kStates             elementwise states at most, kFewestStates at least, kCommonStates mostly
//   is_signed(s)        whether state s can be negative
//   kTensorStates       states of one element a tensor, after the elementwise ones
//   states(numbers)     how many of the elementwise states a step with these numbers keeps
//   update(c, g, p, s)  one step of an element; `g` is the gradient as stored. Where the number of
//                       states is known it is the second template argument
// and, where kNeedsNorms, a read-only pass before the update:
//   norms(c, g, p, s, a, b)   two values whose squares are summed over the tensor
//   finish(c, numbers, a2, b2, step, state)  takes the two sums into the constants; `state` is the
//                              one of one element, where there is one

#include "states.h"

namespace halfstep::math {

/// One parameter of a step; pointers to dense memory in one common layout.
struct StepTensor {
  void* param = nullptr;
  void* master = nullptr;  ///< null without a master
  void* grad = nullptr;    ///< only read, but by a step that zeroes it
  /// Elementwise states, then those of one element; null where the step keeps none.
  void* state[3] = {nullptr, nullptr, nullptr};
  int8_t* exponent[3] = {nullptr, nullptr, nullptr};  ///< scales of int8 states
  void* ema = nullptr;  ///< running mean of the exact weight, in the compute type
  Dtype param_dtype = Dtype::kF32;
  MasterKind master_kind = MasterKind::kNone;
  Dtype grad_dtype = Dtype::kF32;
  StateKind state_kind = StateKind::kWide;
};

/// What every rule's constants begin with.
struct StepConstants {
  double multiplier = 1;    ///< on the gradient: clip / scale, negative when maximizing
  double ema_blend = 0;     ///< 1 - ema_decay
  uint32_t random = 0;      ///< key of the tensor in this step
  bool zero_grads = false;  ///< gradients are zeroed once they are read
};

/// Where Adam applies weight decay.
enum class Decay : int32_t {
  kGradient = 0,  ///< added to the gradient (Adam)
  kWeight = 1,    ///< p *= 1 - lr * weight_decay first (AdamW as in torch)
  kUpdate = 2,    ///< added to the update (AdamW as in apex and Transformer Engine)
};

struct AdamNumbers {
  double beta1, beta2, eps, weight_decay;
  double max_lr;  ///< > 0: decay by lr / max_lr * weight_decay, apart from the size of lr
  Decay decay;
  bool amsgrad, maximize;
};
struct AdamConstants : StepConstants {
  double l2;             ///< added to the gradient
  double decay;          ///< 1 - lr * weight_decay
  double update_decay;   ///< lr * weight_decay, added to the update
  double blend1;         ///< 1 - beta1
  double beta2, blend2;  ///< blend2 = 1 - beta2
  double step_size;      ///< lr / (1 - beta1^t)
  double root_scale;     ///< 1 / sqrt(1 - beta2^t)
  double eps;
  bool amsgrad;
  bool adds_l2, adds_decay;  ///< l2 is not 0, update_decay is not 0
};

struct SgdNumbers {
  double momentum, dampening, weight_decay;
  bool nesterov, maximize;
};
struct SgdConstants : StepConstants {
  double weight_decay, momentum;
  double blend;  ///< 1 - dampening
  double lr;
  bool nesterov;
  bool first;  ///< the buffer is filled, not blended
};

struct LionNumbers {
  double beta1, beta2, weight_decay;
  bool maximize;
};
struct LionConstants : StepConstants {
  double blend1, blend2;  ///< 1 - beta
  double decay;           ///< 1 - lr * weight_decay
  double lr;
};

struct AdagradNumbers {
  double lr_decay, eps, weight_decay;
  bool maximize;
};
struct AdagradConstants : StepConstants {
  double weight_decay, eps;
  double lr;  ///< lr / (1 + (t - 1) * lr_decay)
};

struct LambNumbers {
  double beta1, beta2, eps, weight_decay;
  bool bias_correction, grad_averaging;
  bool always_adapt;  ///< also where weight_decay is 0 (apex: use_nvlamb)
  bool maximize;
};
struct LambConstants : StepConstants {
  double beta1, take1;   ///< m = beta1 * m + take1 * g
  double beta2, blend2;  ///< blend2 = 1 - beta2
  double m_scale;        ///< 1 / (1 - beta1^t)
  double root_scale;     ///< 1 / sqrt(1 - beta2^t)
  double eps, weight_decay;
  double lr;  ///< times the trust ratio once the norms are known
  bool adapts;
};

struct NovoGradNumbers {
  double beta1, beta2, eps, weight_decay;
  bool grad_averaging, maximize;
};
struct NovoGradConstants : StepConstants {
  double beta1, take;  ///< m = beta1 * m + take * (g / denominator + weight_decay * p)
  double inverse;      ///< 1 / denominator, once the norm is known
  double weight_decay, lr;
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

template <class V>
HALFSTEP_FN V constant(double x) {
  return broadcast<V>(typename Traits<V>::Scalar(x));
}

/// -1, 0 or 1; NaN stays NaN.
template <class V>
HALFSTEP_FN V sign(V x) {
  const V zero = constant<V>(0);
  const V one = select(x >= zero, constant<V>(1), constant<V>(-1));
  return select(x == zero, zero, select(x == x, one, x));
}

/// Adam (Kingma & Ba 2015), AdamW (Loshchilov & Hutter 2019), AMSGrad; evaluated as torch.optim.
struct AdamRule {
  using Numbers = AdamNumbers;
  using Constants = AdamConstants;
  static constexpr int kStates = 3, kFewestStates = 2, kCommonStates = 2, kTensorStates = 0;
  static constexpr bool kNeedsNorms = false;
  HALFSTEP_FN static constexpr bool is_signed(int s) { return s == 0; }
  HALFSTEP_FN static int states(const Numbers& n) { return n.amsgrad ? 3 : 2; }

  HALFSTEP_FN static Constants constants(const Numbers& n, double lr, double multiplier,
                                         int64_t step) {
    Constants c;
    const double weight_decay = n.max_lr > 0 ? n.weight_decay / n.max_lr : n.weight_decay;
    c.multiplier = n.maximize ? -multiplier : multiplier;
    c.l2 = n.decay == Decay::kGradient ? n.weight_decay : 0;
    c.decay = n.decay == Decay::kWeight ? 1 - lr * weight_decay : 1;
    c.update_decay = n.decay == Decay::kUpdate ? lr * weight_decay : 0;
    c.blend1 = 1 - n.beta1;
    c.beta2 = n.beta2;
    c.blend2 = 1 - n.beta2;
    c.step_size = lr / (1 - power(n.beta1, step));
    c.root_scale = 1 / __builtin_sqrt(1 - power(n.beta2, step));
    c.eps = n.eps;
    c.amsgrad = n.amsgrad;
    c.adds_l2 = c.l2 != 0;
    c.adds_decay = c.update_decay != 0;
    return c;
  }

  /// Whether a step with kCommonStates has none of the rarer terms, and what tells the compiler so.
  HALFSTEP_FN static bool is_common(const Constants& c) { return !c.adds_l2 && !c.adds_decay; }
  HALFSTEP_FN static void assume_common(Constants& c) { c.adds_l2 = c.adds_decay = false; }

  /// s: m, v and, with amsgrad, the largest v so far.
  template <class V, int kKept = kStates>
  HALFSTEP_FN static void update(const Constants& c, V g, V& p, V* s) {
    // Ahead of the branches, so that a loop converts them once.
    const V l2 = constant<V>(c.l2), decay = constant<V>(c.decay);
    const V update_decay = constant<V>(c.update_decay), step_size = constant<V>(c.step_size);
    const V descent = constant<V>(-c.step_size);
    g = g * constant<V>(c.multiplier);
    if (c.adds_l2) g = fma(l2, p, g);
    s[0] = fma(constant<V>(c.blend1), g - s[0], s[0]);
    s[1] = fma(constant<V>(c.blend2) * g, g, constant<V>(c.beta2) * s[1]);
    V root = s[1];
    if (kKept == 3 && c.amsgrad) {
      s[2] = select(s[2] >= root, s[2], root);  // a NaN in v is kept
      root = s[2];
    }
    const V denominator = fma(sqrt(root), constant<V>(c.root_scale), constant<V>(c.eps));
    const V update = s[0] / denominator;
    if (c.adds_decay)
      p = p - fma(step_size, update, update_decay * p);
    else
      p = fma(descent, update, p * decay);
  }
};

/// SGD with momentum, dampening and nesterov; evaluated as torch.optim.
struct SgdRule {
  using Numbers = SgdNumbers;
  using Constants = SgdConstants;
  static constexpr int kStates = 1, kFewestStates = 0, kCommonStates = 1, kTensorStates = 0;
  static constexpr bool kNeedsNorms = false;
  HALFSTEP_FN static constexpr bool is_signed(int) { return true; }
  HALFSTEP_FN static int states(const Numbers& n) { return n.momentum != 0 ? 1 : 0; }

  HALFSTEP_FN static Constants constants(const Numbers& n, double lr, double multiplier,
                                         int64_t step) {
    Constants c;
    c.multiplier = n.maximize ? -multiplier : multiplier;
    c.weight_decay = n.weight_decay;
    c.momentum = n.momentum;
    c.blend = 1 - n.dampening;
    c.lr = lr;
    c.nesterov = n.nesterov;
    c.first = step == 1;
    return c;
  }

  template <class V, int kKept = kStates>
  HALFSTEP_FN static void update(const Constants& c, V g, V& p, V* s) {
    g = g * constant<V>(c.multiplier);
    if (c.weight_decay != 0) g = fma(constant<V>(c.weight_decay), p, g);
    if (c.momentum != 0) {
      s[0] = c.first ? g : fma(constant<V>(c.blend), g, constant<V>(c.momentum) * s[0]);
      g = c.nesterov ? fma(constant<V>(c.momentum), s[0], g) : s[0];
    }
    p = fma(constant<V>(-c.lr), g, p);
  }
};

/// Lion (Chen et al. 2023, arXiv 2302.06675): the sign of a blend; decoupled decay.
struct LionRule {
  using Numbers = LionNumbers;
  using Constants = LionConstants;
  static constexpr int kStates = 1, kFewestStates = 1, kCommonStates = 1, kTensorStates = 0;
  static constexpr bool kNeedsNorms = false;
  HALFSTEP_FN static constexpr bool is_signed(int) { return true; }
  HALFSTEP_FN static int states(const Numbers&) { return 1; }

  HALFSTEP_FN static Constants constants(const Numbers& n, double lr, double multiplier, int64_t) {
    Constants c;
    c.multiplier = n.maximize ? -multiplier : multiplier;
    c.blend1 = 1 - n.beta1;
    c.blend2 = 1 - n.beta2;
    c.decay = 1 - lr * n.weight_decay;
    c.lr = lr;
    return c;
  }

  template <class V, int kKept = kStates>
  HALFSTEP_FN static void update(const Constants& c, V g, V& p, V* s) {
    g = g * constant<V>(c.multiplier);
    const V direction = sign(fma(constant<V>(c.blend1), g - s[0], s[0]));
    p = fma(constant<V>(-c.lr), direction, p * constant<V>(c.decay));
    s[0] = fma(constant<V>(c.blend2), g - s[0], s[0]);
  }
};

/// Adagrad (Duchi et al. 2011); evaluated as torch.optim.
struct AdagradRule {
  using Numbers = AdagradNumbers;
  using Constants = AdagradConstants;
  static constexpr int kStates = 1, kFewestStates = 1, kCommonStates = 1, kTensorStates = 0;
  static constexpr bool kNeedsNorms = false;
  HALFSTEP_FN static constexpr bool is_signed(int) { return false; }
  HALFSTEP_FN static int states(const Numbers&) { return 1; }

  HALFSTEP_FN static Constants constants(const Numbers& n, double lr, double multiplier,
                                         int64_t step) {
    Constants c;
    c.multiplier = n.maximize ? -multiplier : multiplier;
    c.weight_decay = n.weight_decay;
    c.eps = n.eps;
    c.lr = lr / (1 + double(step - 1) * n.lr_decay);
    return c;
  }

  template <class V, int kKept = kStates>
  HALFSTEP_FN static void update(const Constants& c, V g, V& p, V* s) {
    g = g * constant<V>(c.multiplier);
    if (c.weight_decay != 0) g = fma(constant<V>(c.weight_decay), p, g);
    s[0] = fma(g, g, s[0]);
    p = fma(constant<V>(-c.lr), g / (sqrt(s[0]) + constant<V>(c.eps)), p);
  }
};

/// LAMB (You et al. 2020, arXiv 1904.00962): Adam's direction, scaled per tensor by |p| / |update|.
struct LambRule {
  using Numbers = LambNumbers;
  using Constants = LambConstants;
  static constexpr int kStates = 2, kFewestStates = 2, kCommonStates = 2, kTensorStates = 0;
  static constexpr bool kNeedsNorms = true;
  HALFSTEP_FN static constexpr bool is_signed(int s) { return s == 0; }
  HALFSTEP_FN static int states(const Numbers&) { return 2; }

  HALFSTEP_FN static Constants constants(const Numbers& n, double lr, double multiplier,
                                         int64_t step) {
    Constants c;
    c.multiplier = n.maximize ? -multiplier : multiplier;
    c.beta1 = n.beta1;
    c.take1 = n.grad_averaging ? 1 - n.beta1 : 1;
    c.beta2 = n.beta2;
    c.blend2 = 1 - n.beta2;
    c.m_scale = n.bias_correction ? 1 / (1 - power(n.beta1, step)) : 1;
    c.root_scale = n.bias_correction ? 1 / __builtin_sqrt(1 - power(n.beta2, step)) : 1;
    c.eps = n.eps;
    c.weight_decay = n.weight_decay;
    c.lr = lr;
    c.adapts = n.always_adapt || n.weight_decay != 0;
    return c;
  }

  /// Moves the moments and returns the direction.
  template <class V>
  HALFSTEP_FN static V direction(const Constants& c, V g, const V& p, V* s) {
    g = g * constant<V>(c.multiplier);
    s[0] = fma(constant<V>(c.take1), g, constant<V>(c.beta1) * s[0]);
    s[1] = fma(constant<V>(c.blend2) * g, g, constant<V>(c.beta2) * s[1]);
    const V denominator = fma(sqrt(s[1]), constant<V>(c.root_scale), constant<V>(c.eps));
    return fma(constant<V>(c.weight_decay), p, s[0] * constant<V>(c.m_scale) / denominator);
  }
  template <class V>
  HALFSTEP_FN static void norms(const Constants& c, V g, V p, V* s, V& a, V& b) {
    a = p;
    b = direction(c, g, p, s);
  }
  HALFSTEP_FN static void finish(Constants& c, const Numbers&, double a2, double b2, int64_t,
                                 double&) {
    const double ratio = __builtin_sqrt(a2) / __builtin_sqrt(b2);
    if (c.adapts && a2 > 0 && b2 > 0) c.lr *= ratio;
  }
  template <class V, int kKept = kStates>
  HALFSTEP_FN static void update(const Constants& c, V g, V& p, V* s) {
    const V along = direction(c, g, p, s);
    p = fma(constant<V>(-c.lr), along, p);
  }
};

/// NovoGrad (Ginsburg et al. 2019, arXiv 1905.11286): one second moment a tensor, of the
/// gradient's norm; the normalized gradient and the decay go into the momentum.
struct NovoGradRule {
  using Numbers = NovoGradNumbers;
  using Constants = NovoGradConstants;
  static constexpr int kStates = 1, kFewestStates = 1, kCommonStates = 1, kTensorStates = 1;
  static constexpr bool kNeedsNorms = true;
  HALFSTEP_FN static constexpr bool is_signed(int) { return true; }
  HALFSTEP_FN static int states(const Numbers&) { return 1; }

  HALFSTEP_FN static Constants constants(const Numbers& n, double lr, double multiplier, int64_t) {
    Constants c;
    c.multiplier = n.maximize ? -multiplier : multiplier;
    c.beta1 = n.beta1;
    c.take = n.grad_averaging ? 1 - n.beta1 : 1;
    c.inverse = 1;
    c.weight_decay = n.weight_decay;
    c.lr = lr;
    return c;
  }
  template <class V>
  HALFSTEP_FN static void norms(const Constants& c, V g, V, V*, V& a, V& b) {
    a = g * constant<V>(c.multiplier);
    b = constant<V>(0);
  }
  /// v: the second moment of the gradient's norm.
  HALFSTEP_FN static void finish(Constants& c, const Numbers& n, double a2, double, int64_t step,
                                 double& v) {
    v = step == 1 ? a2 : n.beta2 * v + (1 - n.beta2) * a2;
    c.inverse = 1 / (__builtin_sqrt(v) + n.eps);
  }
  template <class V, int kKept = kStates>
  HALFSTEP_FN static void update(const Constants& c, V g, V& p, V* s) {
    g = g * constant<V>(c.multiplier) * constant<V>(c.inverse);
    g = fma(constant<V>(c.weight_decay), p, g);
    s[0] = fma(constant<V>(c.take), g, constant<V>(c.beta1) * s[0]);
    p = fma(constant<V>(-c.lr), s[0], p);
  }
};

/// What a step's arguments give one parameter; `step` and `index` (its place in the group) are its
/// own.
HALFSTEP_FN StepConstants common_constants(double multiplier, double ema_decay, bool zero_grads,
                                           int64_t seed, int64_t step, int64_t index) {
  return {multiplier, 1 - ema_decay, random_key(seed, step, index), zero_grads};
}

/// A step of any rule begins here.
template <class Rule>
HALFSTEP_FN typename Rule::Constants step_constants(const typename Rule::Numbers& numbers,
                                                    const StepConstants& common, double lr,
                                                    int64_t step) {
  auto c = Rule::constants(numbers, lr, common.multiplier, step);
  c.ema_blend = common.ema_blend;
  c.random = common.random;
  c.zero_grads = common.zero_grads;
  return c;
}

HALFSTEP_MATH_END
