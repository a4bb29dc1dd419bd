#pragma once

// exp, the logistic function and the normal distribution, for one element or sixteen. FP32: the
// same operations in the same order on every instruction set and on the device. FP64: the C
// library's, element by element; FP64 is there to check derivatives with, not to be fast.
//
//   exp: x = n ln2 + r, a polynomial of degree 6 in r, times 2^n in two factors, so that subnormal
//   results round once. Within 1.05 ULP.
//   normal: Phi(-t) = exp(-t^2/2) R(t) for t >= 0, and R(t) (1 + t) is a polynomial of degree 10 in
//   (t-3)/(t+3): relative error below 2e-8 over the whole range in which Phi(-t) is not zero.
// Coefficients: Chebyshev interpolation of the exact functions, then rounded to FP32.
// Tests: tests/cpp/functions_test.cpp.

#include "vec.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

HALFSTEP_MATH_BEGIN

namespace detail {

/// f of each lane.
template <class V, class F>
HALFSTEP_FN V each_lane(V x, const F& f) {
  if constexpr (Traits<V>::kWidth == 1) {
    return f(x);
  } else {
    typename Traits<V>::Scalar lanes[Traits<V>::kWidth];
    store_lanes(lanes, x);
    for (auto& lane : lanes) lane = f(lane);
    return load_lanes(lanes);
  }
}

template <class V>
constexpr bool kIsDouble = sizeof(typename Traits<V>::Scalar) == 8;

/// c[0] + c[1] x + … by Horner's rule.
template <class V, int kCount>
HALFSTEP_FN V polynomial(V x, const float (&c)[kCount]) {
  V sum = broadcast<V>(c[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) sum = fma(sum, x, broadcast<V>(c[i]));
  return sum;
}

/// 2^(n/2) for even and odd n: half of the factor 2^n, twice, never leaves the normal range.
template <class V, class I>
HALFSTEP_FN V times_power_of_two(V x, I n) {
  const I half = n >> 1, rest = n - half, bias = broadcast<I>(127);
  return x * from_bits((half + bias) << 23) * from_bits((rest + bias) << 23);
}

}  // namespace detail

/// e^x. exp(-inf) = 0, exp(inf) = inf, NaN stays NaN; above 88.72 the result is inf, below -103.97
/// it is 0.
template <class V>
HALFSTEP_FN V exp(V x) {
  if constexpr (detail::kIsDouble<V>) {
    return detail::each_lane(x, [](double lane) { return ::exp(lane); });
  } else {
    constexpr float kC[] = {0x1.000000p-1f, 0x1.5554dcp-3f, 0x1.55551ap-5f, 0x1.120b7cp-7f,
                            0x1.6d1116p-10f};
    const V lowest = broadcast<V>(-105.0f), highest = broadcast<V>(89.5f);
    const V above = select(x >= lowest, x, lowest);
    const V bounded = select(highest >= above, above, highest);
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    const V magic = broadcast<V>(0x1.8p23f);
    const V shifted = fma(bounded, broadcast<V>(0x1.715476p0f), magic);
    const auto n = to_bits(shifted) - to_bits(magic);
    const V whole = shifted - magic;
    const V upper = fma(whole, broadcast<V>(-0x1.62e4p-1f), bounded);  // exact: 15 bits of ln2
    const V r = fma(whole, broadcast<V>(-0x1.7f7d1cp-20f), upper);
    const V tail = fma(r * r, detail::polynomial(r, kC), r);
    const V result = detail::times_power_of_two(tail + broadcast<V>(1.0f), n);
    return select(x == x, result, x);
  }
}

/// The logistic function at x: `below` = 1 / (1 + e^-x), `above` = 1 - below. Both keep their
/// relative precision: e^-|x| does not overflow, and nothing is subtracted from one.
template <class V>
struct Logistic {
  V below, above;
};
template <class V>
HALFSTEP_FN Logistic<V> logistic(V x) {
  const V one = broadcast<V>(1), zero = broadcast<V>(0);
  const V small = exp(zero - abs(x));
  const V large = one / (one + small), rest = small * large;
  const auto positive = x >= zero;
  return {select(positive, large, rest), select(positive, rest, large)};
}
template <class V>
HALFSTEP_FN V sigmoid(V x) {
  return logistic(x).below;
}

/// The standard normal distribution at x: `below` = Phi(x), `density` = phi(x) = Phi'(x).
template <class V>
struct Normal {
  V below, density;
};
template <class V>
HALFSTEP_FN Normal<V> normal(V x) {
  if constexpr (detail::kIsDouble<V>) {
    return {detail::each_lane(
                x, [](double lane) { return 0.5 * ::erfc(-lane * 0.70710678118654752440); }),
            detail::each_lane(
                x, [](double lane) { return 0.39894228040143267794 * ::exp(-0.5 * lane * lane); })};
  } else {
    constexpr float kC[] = {0x1.f1b89cp-2f,   -0x1.8b5facp-4f, -0x1.0d3a60p-6f, 0x1.71fd1ap-5f,
                            -0x1.7459dap-6f,  0x1.2ed454p-10f, 0x1.87fdcap-9f,  -0x1.6555ecp-12f,
                            -0x1.ec1deap-12f, 0x1.a98738p-17f, 0x1.87bceap-15f};
    const V one = broadcast<V>(1), three = broadcast<V>(3);
    const V magnitude = abs(x), beyond = broadcast<V>(15.0f);
    const V t = select(magnitude >= beyond, beyond, magnitude);
    // t^2/2 with what its rounding drops, so that the exponential keeps its relative precision.
    const V square = t * t, dropped = fma(t, t, broadcast<V>(0) - square);
    const V bell = exp(square * broadcast<V>(-0.5f));
    const V exact = fma(bell * dropped, broadcast<V>(-0.5f), bell);
    const V t3 = t + three, t1 = t + one;
    const V inverse = one / (t3 * t1);  // one division for both quotients
    const V s = (t - three) * t1 * inverse;
    const V tail = exact * (detail::polynomial(s, kC) * t3 * inverse);
    const V below = select(x >= broadcast<V>(0), one - tail, tail);
    return {select(x == x, below, x),
            select(x == x, exact * broadcast<V>(0.398942280401432678f), x)};
  }
}

// The activations below do not hide what came in: an infinite x gives an infinity or, where the
// limit would be 0, NaN, and so do their slopes. (torch does the same; a -inf is an overflow
// upstream.)

/// x Phi(x), the Gaussian error linear unit (Hendrycks and Gimpel, arXiv 1606.08415).
template <class V>
HALFSTEP_FN V gelu(V x) {
  return x * normal(x).below;
}
/// Its derivative, Phi(x) + x phi(x).
template <class V>
HALFSTEP_FN V gelu_slope(V x) {
  const Normal<V> n = normal(x);
  return fma(x, n.density, n.below);
}

/// The same with Phi(x) taken as (1 + tanh u)/2 = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
template <class V>
HALFSTEP_FN Logistic<V> gelu_tanh_gate(V x) {
  using T = typename Traits<V>::Scalar;
  const V cubic = fma(x * x, broadcast<V>(T(0.044715 * 1.5957691216057307118)),
                      broadcast<V>(T(1.5957691216057307118)));
  return logistic(x * cubic);
}
template <class V>
HALFSTEP_FN V gelu_tanh(V x) {
  return x * gelu_tanh_gate(x).below;
}
template <class V>
HALFSTEP_FN V gelu_tanh_slope(V x, const Logistic<V>& gate) {
  using T = typename Traits<V>::Scalar;
  // Beyond 100 the slope is 0 or 1; there x^2 must not become infinite.
  const V far = broadcast<V>(100), bounded = select(far >= abs(x), x, far);
  const V inner = fma(bounded * bounded, broadcast<V>(T(3 * 0.044715 * 1.5957691216057307118)),
                      broadcast<V>(T(1.5957691216057307118)));
  return fma(x * gate.below * gate.above, inner, gate.below);
}
template <class V>
HALFSTEP_FN V gelu_tanh_slope(V x) {
  return gelu_tanh_slope(x, gelu_tanh_gate(x));
}

/// x sigmoid(x) and its derivative, s (1 + x (1 - s)).
template <class V>
HALFSTEP_FN V silu(V x) {
  return x * sigmoid(x);
}
template <class V>
HALFSTEP_FN V silu_slope(V x, const Logistic<V>& gate) {
  return gate.below * fma(x, gate.above, broadcast<V>(1));
}
template <class V>
HALFSTEP_FN V silu_slope(V x) {
  return silu_slope(x, logistic(x));
}

/// max(x, 0), NaN for NaN, and the derivative of torch: 0 at 0.
template <class V>
HALFSTEP_FN V relu(V x) {
  return select(broadcast<V>(0) >= x, broadcast<V>(0), x);
}
template <class V>
HALFSTEP_FN V relu_slope(V x) {
  return select(broadcast<V>(0) >= x, broadcast<V>(0), select(x == x, broadcast<V>(1), x));
}

HALFSTEP_MATH_END
