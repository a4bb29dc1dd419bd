#pragma once

// exp, the logistic function and the normal distribution, for one element or sixteen. FP32: the
// same operations in the same order on every instruction set and on the device. FP64: the C
// library's, element by element; FP64 is there to check derivatives with, not to be fast.
//
//   exp: x = n ln2 + r, a polynomial of degree 6 in r, times 2^n. Within 1.05 ULP.
//   exp_negative: the same for x <= 0; kHalf: a polynomial of degree 5, within 3 ULP from -20 on
//   and 5 before.
//   normal: Phi(-t) = exp(-t^2/2) R(t) for t >= 0, and R(t) (t + 2.8) is a polynomial of degree 8
//   in t/(t + 2.8): relative error below 6e-8 up to t = 12.
//   kHalf, for results in FP16 (exp: in 16 bits): fewer terms, relative error below 2^-19 (2^-17
//   beyond 5), and 0 from t = 9.5 on, where Phi and its slope times the largest FP16 numbers, a
//   gradient's and a gated unit's, are below what FP16 holds.
// Arithmetic on subnormal numbers takes a CPU a hundred times as long, so it is met only where a
// result itself is about to be subnormal; exp is 0 from e^-86.5 = 2^-124.8 down.
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

/// e^x = `fraction` 2^n. n is `whole`, and lies in the low bits of `shifted`. NaN for NaN.
template <class V>
struct Exponential {
  V fraction, whole, shifted;
};
template <bool kHalf, class V>
HALFSTEP_FN Exponential<V> exponential(V x) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const V magic = broadcast<V>(0x1.8p23f), one = broadcast<V>(1);
  const V shifted = fma(x, broadcast<V>(0x1.715476p0f), magic);
  const V whole = shifted - magic;
  if constexpr (kHalf) {
    constexpr float kC[] = {1, 1, 0x1.fffdfcp-2f, 0x1.5557b0p-3f, 0x1.572a64p-5f, 0x1.106250p-7f};
    const V r = fma(whole, broadcast<V>(-0x1.62e430p-1f), x);
    return {polynomial(r, kC), whole, shifted};
  } else {
    constexpr float kC[] = {0x1.000000p-1f, 0x1.5554dcp-3f, 0x1.55551ap-5f, 0x1.120b7cp-7f,
                            0x1.6d1116p-10f};
    const V upper = fma(whole, broadcast<V>(-0x1.62e4p-1f), x);  // exact: 15 bits of ln2
    const V r = fma(whole, broadcast<V>(-0x1.7f7d1cp-20f), upper);
    return {fma(r * r, polynomial(r, kC), r) + one, whole, shifted};
  }
}

/// fraction 2^(n + kRaised), which is exact: the result is a normal number or infinite.
template <int kRaised = 0, class V>
HALFSTEP_FN V raise(const Exponential<V>& e) {
#if defined(__AVX512F__) && !defined(__CUDACC__)
  if constexpr (Traits<V>::kWidth > 1) {
    const V n = kRaised == 0 ? e.whole : e.whole + broadcast<V>(kRaised);
    return {(typename V::Native)_mm512_scalef_ps(e.fraction.piece[0], n.piece[0])};
  }
#endif
  using U = typename Traits<V>::Unsigned;
  // A shift makes the bits of n those of 2^(n-1), which stays finite.
  const U exponent =
      (as_unsigned(to_bits(e.shifted)) << 23) + broadcast<U>(uint32_t(126 + kRaised) << 23);
  return e.fraction * broadcast<V>(2) * from_bits(as_signed(exponent));
}

/// e^x for x in [-86.5, 89.5]: no result or intermediate one is subnormal.
template <bool kHalf = false, class V>
HALFSTEP_FN V exp_within(V x) {
  return raise(exponential<kHalf>(x));
}

/// e^x 2^64 for x in [-131, 0].
template <class V>
HALFSTEP_FN V exp_raised(V x) {
  return raise<64>(exponential<false>(x));
}

}  // namespace detail

/// e^x. exp(-inf) = 0, exp(inf) = inf, NaN stays NaN; above 88.72 the result is inf, below -86.5
/// it is 0.
template <class V>
HALFSTEP_FN V exp(V x) {
  if constexpr (detail::kIsDouble<V>) {
    return detail::each_lane(x, [](double lane) { return ::exp(lane); });
  } else {
    const V result = detail::exp_within(at_most(at_least(x, -86.5f), 89.5f));
    return select(broadcast<V>(-86.5f) >= x, broadcast<V>(0), result);
  }
}

/// The same for x <= 0, or NaN.
template <bool kHalf = false, class V>
HALFSTEP_FN V exp_negative(V x) {
  if constexpr (detail::kIsDouble<V>) {
    return exp(x);
  } else {
    const V result = detail::exp_within<kHalf>(at_least(x, -86.5f));
    return select(broadcast<V>(-86.5f) >= x, broadcast<V>(0), result);
  }
}

/// The logistic function at x: `below` = 1 / (1 + e^-x), `above` = 1 - below = e^-x below. Both
/// keep their relative precision; with kHalf `above` is within 2^-22.
template <class V>
struct Logistic {
  V below, above;
};
template <bool kHalf = false, class V>
HALFSTEP_FN Logistic<V> logistic(V x) {
  const V one = broadcast<V>(1), zero = broadcast<V>(0);
  if constexpr (kHalf) {
    const V e = detail::exp_within<true>(at_most(at_least(zero - x, -86.5f), 86.5f));
    const V share = one / (one + e);
    return {select(broadcast<V>(-86.5f) >= x, zero, share), one - share};
  } else {
    V small;
    if constexpr (detail::kIsDouble<V>) {
      small = exp(zero - abs(x));
    } else {
      // Lanes that end as 0 pass through nothing subnormal on the way.
      const V size = abs(x), end = broadcast<V>(104.0f);
      const auto gone = size >= end;
      const V raised = detail::exp_raised(zero - select(gone, zero, size));
      small = select(gone, zero, raised * broadcast<V>(0x1p-64f));
    }
    const V large = one / (one + small), rest = small * large;
    const auto positive = x >= zero;
    return {select(positive, large, rest), select(positive, rest, large)};
  }
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
template <bool kHalf = false, class V>
HALFSTEP_FN Normal<V> normal(V x) {
  if constexpr (detail::kIsDouble<V>) {
    return {detail::each_lane(
                x, [](double lane) { return 0.5 * ::erfc(-lane * 0.70710678118654752440); }),
            detail::each_lane(
                x, [](double lane) { return 0.39894228040143267794 * ::exp(-0.5 * lane * lane); })};
  } else {
    const V one = broadcast<V>(1), zero = broadcast<V>(0);
    const V magnitude = abs(x), minus_half = broadcast<V>(-0.5f);
    V bell, ratio, factor;  // exp(-t^2/2) / factor, R(t)
    if constexpr (kHalf) {
      constexpr float kC[] = {0x1.400000p+0f, -0x1.3e4e64p+0f, 0x1.5a9c2ap-3f,  0x1.305186p-2f,
                              0x1.34942ap-6f, -0x1.cd37fep-8f, -0x1.6eb198p-3f, 0x1.7eb41cp-4f};
      const V t = at_most(magnitude, 9.5f), s = one / (t + broadcast<V>(2.5f));
      ratio = detail::polynomial(t * s, kC) * s;
      const V near = detail::exp_within<true>(t * t * minus_half);
      bell = select(magnitude >= broadcast<V>(9.5f), zero, near);
      factor = one;
    } else {
      constexpr float kC[] = {0x1.666666p+0f,  -0x1.ba4a1ap+0f, 0x1.43a85cp-1f,
                              0x1.3ff46ep-2f,  -0x1.3ad190p-3f, -0x1.3b6e18p-6f,
                              -0x1.e304acp-3f, 0x1.182ee0p-2f,  -0x1.52f5d6p-4f};
      // Lanes that end as 0 pass through nothing subnormal on the way.
      const auto gone = magnitude >= broadcast<V>(14.5f);
      const V t = select(gone, zero, magnitude), s = one / (t + broadcast<V>(2.8f));
      ratio = detail::polynomial(t * s, kC) * s;
      // t^2/2 with what its rounding drops, so that the exponential keeps its relative precision.
      const V square = t * t, dropped = fma(t, t, zero - square);
      const V near = detail::exp_raised(square * minus_half);
      bell = select(gone, zero, fma(near * dropped, minus_half, near));
      factor = broadcast<V>(0x1p-64f);
    }
    const V tail = bell * ratio * factor;
    return {select(x >= zero, one - tail, tail),
            bell * (factor * broadcast<V>(0.398942280401432678f))};
  }
}

// The activations below do not hide what came in: an infinite x gives an infinity or, where the
// limit would be 0, NaN, and so do their slopes. (torch does the same; a -inf is an overflow
// upstream.)

/// x Phi(x), the Gaussian error linear unit (Hendrycks and Gimpel, arXiv 1606.08415).
template <bool kHalf = false, class V>
HALFSTEP_FN V gelu(V x) {
  return x * normal<kHalf>(x).below;
}
/// Its derivative, Phi(x) + x phi(x).
template <bool kHalf = false, class V>
HALFSTEP_FN V gelu_slope(V x) {
  const Normal<V> n = normal<kHalf>(x);
  return fma(x, n.density, n.below);
}

/// The same with Phi(x) taken as (1 + tanh u)/2 = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
template <bool kHalf = false, class V>
HALFSTEP_FN Logistic<V> gelu_tanh_gate(V x) {
  using T = typename Traits<V>::Scalar;
  const V cubic = fma(x * x, broadcast<V>(T(0.044715 * 1.5957691216057307118)),
                      broadcast<V>(T(1.5957691216057307118)));
  return logistic<kHalf>(x * cubic);
}
template <bool kHalf = false, class V>
HALFSTEP_FN V gelu_tanh(V x) {
  return x * gelu_tanh_gate<kHalf>(x).below;
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
template <bool kHalf = false, class V>
HALFSTEP_FN V gelu_tanh_slope(V x) {
  return gelu_tanh_slope(x, gelu_tanh_gate<kHalf>(x));
}

/// x sigmoid(x) and its derivative, s (1 + x (1 - s)).
template <bool kHalf = false, class V>
HALFSTEP_FN V silu(V x) {
  return x * logistic<kHalf>(x).below;
}
template <class V>
HALFSTEP_FN V silu_slope(V x, const Logistic<V>& gate) {
  return gate.below * fma(x, gate.above, broadcast<V>(1));
}
template <bool kHalf = false, class V>
HALFSTEP_FN V silu_slope(V x) {
  return silu_slope(x, logistic<kHalf>(x));
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
