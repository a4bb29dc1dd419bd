#pragma once

// Activations with their slopes, and Philox: what the kernels of this family compute per element.
// Tests: tests/cpp/activation_test.cpp.

#include "functions.h"

namespace halfstep::math {

enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kSquaredRelu = 3 };

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// An activation and its derivative at one place, which share most of the work.
template <class V>
struct Curve {
  V value, slope;
};
// An activation has `value`, `gradient` (d times the slope) and, where gated units use it, `curve`.
// kHalf: for results in FP16 (functions.h).

struct Silu {
  template <bool kHalf, class V>
  HALFSTEP_FN static V value(V x) {
    return silu<kHalf>(x);
  }
  template <bool kHalf, class V>
  HALFSTEP_FN static Curve<V> curve(V x) {
    const Logistic<V> gate = logistic<kHalf>(x);
    return {x * gate.below, silu_slope(x, gate)};
  }
  template <bool kHalf, class V>
  HALFSTEP_FN static V gradient(V d, V x) {
    return d * curve<kHalf>(x).slope;
  }
};

struct Gelu {
  template <bool kHalf, class V>
  HALFSTEP_FN static V value(V x) {
    return gelu<kHalf>(x);
  }
  template <bool kHalf, class V>
  HALFSTEP_FN static Curve<V> curve(V x) {
    const Normal<V> n = normal<kHalf>(x);
    return {x * n.below, fma(x, n.density, n.below)};
  }
  template <bool kHalf, class V>
  HALFSTEP_FN static V gradient(V d, V x) {
    return d * curve<kHalf>(x).slope;
  }
};

struct GeluTanh {
  template <bool kHalf, class V>
  HALFSTEP_FN static V value(V x) {
    return gelu_tanh<kHalf>(x);
  }
  template <bool kHalf, class V>
  HALFSTEP_FN static Curve<V> curve(V x) {
    const Logistic<V> gate = gelu_tanh_gate<kHalf>(x);
    return {x * gate.below, gelu_tanh_slope(x, gate)};
  }
  template <bool kHalf, class V>
  HALFSTEP_FN static V gradient(V d, V x) {
    return d * curve<kHalf>(x).slope;
  }
};

/// max(x, 0)^2 (So et al., arXiv 2109.08668).
struct SquaredRelu {
  template <bool kHalf, class V>
  HALFSTEP_FN static V value(V x) {
    const V positive = relu(x);
    return positive * positive;
  }
  template <bool kHalf, class V>
  HALFSTEP_FN static V gradient(V d, V x) {
    const V half = d * relu(x);  // 2 x alone may be beyond the range
    return half + half;
  }
};

/// body(Silu()), … for the activation met at run time.
template <class Body>
HALFSTEP_FN auto with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kSilu:
      return body(Silu());
    case Activation::kGelu:
      return body(Gelu());
    case Activation::kGeluTanh:
      return body(GeluTanh());
    default:
      return body(SquaredRelu());
  }
}
/// Those that gated units have.
template <class Body>
HALFSTEP_FN auto with_gate(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kSilu:
      return body(Silu());
    case Activation::kGelu:
      return body(Gelu());
    default:
      return body(GeluTanh());
  }
}

/// The smallest magnitude that rounds to infinity in a dtype. Beyond the largest finite number by
/// half a step: ties go to the even neighbour, which is the infinity.
template <class T>
HALFSTEP_FN constexpr T overflow_bound(Dtype dtype) {
  return dtype == Dtype::kF16 ? T(65520.0f) : dtype == Dtype::kBF16 ? T(0x1.ffp127f) : T(INFINITY);
}

/// Lanes whose result leaves the dtype although both operands are finite. x - x is 0 for finite x
/// only.
template <class V>
HALFSTEP_FN auto overflows(V result, V a, V b, typename Traits<V>::Scalar bound) {
  const V odd = (a - a) + (b - b);
  const V judged = select(odd == broadcast<V>(0), result, broadcast<V>(0));
  return abs(judged) >= broadcast<V>(bound);
}

// ---- dropout -----------------------------------------------------------------------------------

/// The full product of two 32-bit numbers.
template <class U>
struct Product {
  U high, low;
};
HALFSTEP_FN Product<uint32_t> wide_product(uint32_t a, uint32_t b) {
  const uint64_t product = uint64_t(a) * b;
  return {uint32_t(product >> 32), uint32_t(product)};
}
#if !defined(__CUDACC__)
HALFSTEP_FN Product<U32> wide_product(const U32& a, uint32_t b) {
  Product<U32> product;
  for (int k = 0; k < U32::kPieces; ++k) {
#if defined(__AVX512F__)
    const __m512i x = (__m512i)a.piece[k], y = _mm512_set1_epi32(int(b));
    const __m512i even = _mm512_mul_epu32(x, y);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
    product.high.piece[k] =
        (U32::Native)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    product.low.piece[k] =
        (U32::Native)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
    const __m256i x = (__m256i)a.piece[k], y = _mm256_set1_epi32(int(b));
    const __m256i even = _mm256_mul_epu32(x, y);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
    product.high.piece[k] = (U32::Native)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    product.low.piece[k] = (U32::Native)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
    for (int i = 0; i < kRegister / 4; ++i) {
      const Product<uint32_t> lane = wide_product(uint32_t(a.piece[k][i]), b);
      product.high.piece[k][i] = lane.high;
      product.low.piece[k][i] = lane.low;
    }
#endif
  }
  return product;
}
#endif

template <class U>
struct Words {
  U x[4];
};

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
template <class U>
HALFSTEP_FN Words<U> philox(uint64_t key, Words<U> counter) {
  uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product<U> a = wide_product(counter.x[0], 0xD2511F53u);
    const Product<U> b = wide_product(counter.x[2], 0xCD9E8D57u);
    counter = {{b.high ^ counter.x[1] ^ broadcast<U>(low), b.low,
                a.high ^ counter.x[3] ^ broadcast<U>(high), a.low}};
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return counter;
}

/// Elements are numbered in row-major order. Sixty-four of them share sixteen counters: element i
/// is word (i / 16) % 4 of counter (i / 64) * 16 + i % 16, so that sixteen lanes, or a thread with
/// four runs, use every word.
constexpr int kDropoutGroup = 64;

/// The words of element i (a multiple of 16 within its group: of the sixteen from there on).
template <class U>
HALFSTEP_FN Words<U> dropout_words(uint64_t key, uint64_t offset, int64_t i) {
  const uint64_t counter = uint64_t(i / kDropoutGroup) * 16 + uint64_t(i % 16);
  return philox<U>(key, {{index_lanes<U>(uint32_t(counter)), broadcast<U>(uint32_t(counter >> 32)),
                          broadcast<U>(uint32_t(offset)), broadcast<U>(uint32_t(offset >> 32))}});
}

/// What dropout does with a probability: an element is kept when its word is at least `threshold`.
/// p = 0 keeps all and p = 1 none (scale is 0).
struct Dropout {
  bool is_random = false;
  uint32_t threshold = 0;
  double scale = 1;

  static Dropout of(double p) {
    Dropout dropout;
    dropout.is_random = p > 0 && p < 1;
    dropout.scale = p < 1 ? 1 / (1 - p) : 0;
    const double steps = p * 4294967296.0 + 0.5;
    dropout.threshold = steps < 4294967295.0 ? uint32_t(steps) : 4294967295u;
    return dropout;
  }
};

/// residual + (x + bias) * factor. A dropped NaN or infinity stays seen: its factor is 0.
template <class V>
HALFSTEP_FN V dropout_add(V x, V bias, V residual, V factor) {
  return fma(x + bias, factor, residual);
}

HALFSTEP_MATH_END
