#pragma once

// Sixteen lanes, whatever the registers: one zmm, two ymm or four xmm. A kernel written on Pack
// runs the same operations in the same order on every instruction set, so its results are
// bit-equal. The free functions are also defined for plain float and double: the device
// instantiates those.

#include "half.h"

#if defined(__CUDA_ARCH__) || defined(__CUDACC__)
#include <cmath>
#elif defined(__x86_64__)
#include <immintrin.h>
#endif
#if !defined(__CUDACC__)
#include <utility>
#endif

HALFSTEP_MATH_BEGIN

// ---- scalars -----------------------------------------------------------------------------------
HALFSTEP_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
HALFSTEP_FN double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
HALFSTEP_FN float sqrt(float a) { return __builtin_sqrtf(a); }
HALFSTEP_FN double sqrt(double a) { return __builtin_sqrt(a); }
HALFSTEP_FN float abs(float a) { return __builtin_fabsf(a); }
HALFSTEP_FN double abs(double a) { return __builtin_fabs(a); }
HALFSTEP_FN float select(bool mask, float a, float b) { return mask ? a : b; }
HALFSTEP_FN double select(bool mask, double a, double b) { return mask ? a : b; }
HALFSTEP_FN int32_t select(bool mask, int32_t a, int32_t b) { return mask ? a : b; }
/// The larger (smaller) of x and a bound that is no NaN; a NaN x stays.
HALFSTEP_FN float at_least(float x, float bound) { return bound >= x ? bound : x; }
HALFSTEP_FN float at_most(float x, float bound) { return x >= bound ? bound : x; }
HALFSTEP_FN int32_t join_bits(int32_t a, int32_t mask, int32_t rest) { return (a & mask) | rest; }
HALFSTEP_FN int32_t max(int32_t a, int32_t b) { return a >= b ? a : b; }
HALFSTEP_FN int32_t min(int32_t a, int32_t b) { return b >= a ? a : b; }
HALFSTEP_FN int32_t to_bits(float a) { return bit_cast<int32_t>(a); }
HALFSTEP_FN float from_bits(int32_t a) { return bit_cast<float>(a); }
HALFSTEP_FN int32_t round_to_int(float a) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(a);
#else
  return a == a ? int32_t(__builtin_rintf(a)) : INT32_MIN;
#endif
}
HALFSTEP_FN float to_float(int32_t a) { return float(a); }
HALFSTEP_FN int32_t as_signed(uint32_t a) { return bit_cast<int32_t>(a); }
HALFSTEP_FN uint32_t as_unsigned(int32_t a) { return bit_cast<uint32_t>(a); }
HALFSTEP_FN int64_t count(bool mask) { return mask; }
HALFSTEP_FN bool any(bool mask) { return mask; }

template <class V>
struct Traits {  // float, double, integers
  using Scalar = V;
  using Mask = bool;
  using Unsigned = uint32_t;
  static constexpr int kWidth = 1;
};

#if !defined(__CUDACC__)
// ---- sixteen lanes -----------------------------------------------------------------------------
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

template <class T>
struct Pack {
  typedef T Native __attribute__((vector_size(kRegister)));
  /// The same in memory, wherever it lies.
  typedef T Unaligned __attribute__((vector_size(kRegister), aligned(alignof(T)), may_alias));
  static constexpr int kPieces = int(kLanes * sizeof(T)) / kRegister;
  Native piece[kPieces > 0 ? kPieces : 1];
};
using F32 = Pack<float>;
using F64 = Pack<double>;
using I32 = Pack<int32_t>;
using I64 = Pack<int64_t>;
using U32 = Pack<uint32_t>;

template <class T>
struct MaskOf;
template <>
struct MaskOf<float> {
  using Type = I32;
};
template <>
struct MaskOf<int32_t> {
  using Type = I32;
};
template <>
struct MaskOf<uint32_t> {
  using Type = I32;
};
template <>
struct MaskOf<double> {
  using Type = I64;
};
template <>
struct MaskOf<int64_t> {
  using Type = I64;
};
template <class T>
using Mask = typename MaskOf<T>::Type;

template <class T>
struct Traits<Pack<T>> {
  using Scalar = T;
  using Mask = typename MaskOf<T>::Type;
  using Unsigned = U32;
  static constexpr int kWidth = kLanes;
};

#define HALFSTEP_PIECES for (int k = 0; k < Pack<T>::kPieces; ++k)
template <class T>
HALFSTEP_FN Pack<T> operator+(Pack<T> a, const Pack<T>& b) {
  HALFSTEP_PIECES a.piece[k] += b.piece[k];
  return a;
}
template <class T>
HALFSTEP_FN Pack<T> operator-(Pack<T> a, const Pack<T>& b) {
  HALFSTEP_PIECES a.piece[k] -= b.piece[k];
  return a;
}
template <class T>
HALFSTEP_FN Pack<T> operator*(Pack<T> a, const Pack<T>& b) {
  HALFSTEP_PIECES a.piece[k] *= b.piece[k];
  return a;
}
template <class T>
HALFSTEP_FN Pack<T> operator/(Pack<T> a, const Pack<T>& b) {
  HALFSTEP_PIECES a.piece[k] /= b.piece[k];
  return a;
}
template <class T>
HALFSTEP_FN Pack<T> operator&(Pack<T> a, const Pack<T>& b) {
  HALFSTEP_PIECES a.piece[k] &= b.piece[k];
  return a;
}
template <class T>
HALFSTEP_FN Pack<T> operator|(Pack<T> a, const Pack<T>& b) {
  HALFSTEP_PIECES a.piece[k] |= b.piece[k];
  return a;
}
template <class T>
HALFSTEP_FN Pack<T> operator^(Pack<T> a, const Pack<T>& b) {
  HALFSTEP_PIECES a.piece[k] ^= b.piece[k];
  return a;
}
template <class T>
HALFSTEP_FN Pack<T> operator<<(Pack<T> a, int bits) {
  HALFSTEP_PIECES a.piece[k] <<= bits;
  return a;
}
/// Sign-extending for signed T.
template <class T>
HALFSTEP_FN Pack<T> operator>>(Pack<T> a, int bits) {
  HALFSTEP_PIECES a.piece[k] >>= bits;
  return a;
}
template <class T>
HALFSTEP_FN Mask<T> operator>=(const Pack<T>& a, const Pack<T>& b) {
  Mask<T> mask;
  HALFSTEP_PIECES mask.piece[k] = a.piece[k] >= b.piece[k];
  return mask;
}
template <class T>
HALFSTEP_FN Mask<T> operator==(const Pack<T>& a, const Pack<T>& b) {
  Mask<T> mask;
  HALFSTEP_PIECES mask.piece[k] = a.piece[k] == b.piece[k];
  return mask;
}
template <class T>
HALFSTEP_FN Mask<T> operator!=(const Pack<T>& a, const Pack<T>& b) {
  Mask<T> mask;
  HALFSTEP_PIECES mask.piece[k] = a.piece[k] != b.piece[k];
  return mask;
}
template <class T>
HALFSTEP_FN Pack<T> select(const Mask<T>& mask, Pack<T> a, const Pack<T>& b) {
  HALFSTEP_PIECES a.piece[k] = mask.piece[k] ? a.piece[k] : b.piece[k];
  return a;
}
template <class T>
HALFSTEP_FN int64_t count(const Pack<T>& mask) {
  int64_t total = 0;
  for (int k = 0; k < Pack<T>::kPieces; ++k)
    for (int i = 0; i < int(kRegister / sizeof(T)); ++i) total -= mask.piece[k][i];
  return total;
}
HALFSTEP_FN bool any(Pack<int64_t>::Native mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  bool found = false;
  for (int i = 0; i < int(kRegister / 8); ++i) found |= mask[i] != 0;
  return found;
#endif
}
template <class T>
HALFSTEP_FN bool any(const Pack<T>& mask) {
  typename Pack<T>::Native all = mask.piece[0];
  for (int k = 1; k < Pack<T>::kPieces; ++k) all |= mask.piece[k];
  return any(__builtin_bit_cast(Pack<int64_t>::Native, all));
}
template <class T>
HALFSTEP_FN bool is_set(const Pack<T>& mask, int lane) {
  constexpr int kWidth = int(kRegister / sizeof(T));
  return mask.piece[lane / kWidth][lane % kWidth] != 0;
}
// One register at a time: a copy of the whole struct goes through the stack in 16-byte pieces, and
// a wider load from there waits for them.
template <class T>
HALFSTEP_FN Pack<T> load_lanes(const T* from) {
  Pack<T> a;
  HALFSTEP_PIECES {
    a.piece[k] =
        *reinterpret_cast<const typename Pack<T>::Unaligned*>(from + k * (kRegister / sizeof(T)));
  }
  return a;
}
template <class T>
HALFSTEP_FN void store_lanes(T* to, const Pack<T>& a) {
  HALFSTEP_PIECES {
    *reinterpret_cast<typename Pack<T>::Unaligned*>(to + k * (kRegister / sizeof(T))) = a.piece[k];
  }
}
#undef HALFSTEP_PIECES

HALFSTEP_FN I32 to_bits(const F32& a) { return __builtin_bit_cast(I32, a); }
HALFSTEP_FN F32 from_bits(const I32& a) { return __builtin_bit_cast(F32, a); }
HALFSTEP_FN I64 to_bits(const F64& a) { return __builtin_bit_cast(I64, a); }
HALFSTEP_FN F64 from_bits(const I64& a) { return __builtin_bit_cast(F64, a); }

template <class V>
HALFSTEP_FN V broadcast(typename Traits<V>::Scalar x) {
  if constexpr (Traits<V>::kWidth == 1) {
    return x;
  } else {
    V a;
    for (auto& piece : a.piece) piece = x - typename V::Native{};
    return a;
  }
}
HALFSTEP_FN I32 as_signed(const U32& a) { return __builtin_bit_cast(I32, a); }
HALFSTEP_FN U32 as_unsigned(const I32& a) { return __builtin_bit_cast(U32, a); }
/// i, i + 1, … i + 15.
template <class U>
HALFSTEP_FN U index_lanes(uint32_t i) {
  if constexpr (Traits<U>::kWidth == 1) {
    return i;
  } else {
    constexpr uint32_t kFromZero[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return broadcast<U>(i) + load_lanes(kFromZero);
  }
}
/// (a & mask) | rest.
HALFSTEP_FN I32 join_bits(const I32& a, int32_t mask, int32_t rest) {
#if defined(__AVX512F__)
  return {(I32::Native)_mm512_ternarylogic_epi32((__m512i)a.piece[0], _mm512_set1_epi32(mask),
                                                 _mm512_set1_epi32(rest), (0xf0 & 0xcc) | 0xaa)};
#else
  return (a & broadcast<I32>(mask)) | broadcast<I32>(rest);
#endif
}
HALFSTEP_FN F32 abs(const F32& a) { return from_bits(to_bits(a) & broadcast<I32>(0x7fffffff)); }
HALFSTEP_FN F64 abs(const F64& a) {
  return from_bits(to_bits(a) & broadcast<I64>(0x7fffffffffffffff));
}

/// Whether every lane is below `limit` in magnitude; NaN is not.
HALFSTEP_FN bool all_below(const F32& a, float limit) {
#if defined(__AVX512F__)
  // Without bit 30 of its bits, |x| is below 2.
  const __m512i two = _mm512_set1_epi32(0x40000000);
  if (limit >= 2 && _mm512_test_epi32_mask((__m512i)a.piece[0], two) == 0) return true;
  const __m512 bound = _mm512_set1_ps(limit);
  return _mm512_cmp_ps_mask(abs(a).piece[0], bound, _CMP_NLT_UQ) == 0;
#else
  const F32 size = abs(a);
  F32::Native bound = limit - F32::Native{};
  typename I32::Native all = size.piece[0] < bound;
  for (int k = 1; k < F32::kPieces; ++k) all &= size.piece[k] < bound;
  return !any(__builtin_bit_cast(Pack<int64_t>::Native, ~all));
#endif
}
/// The same of `count` numbers, a multiple of kLanes.
HALFSTEP_FN bool all_below(const float* from, int64_t count, float limit) {
  I32 bits = broadcast<I32>(0);
  for (int64_t i = 0; i < count; i += kLanes) bits = bits | to_bits(load_lanes(from + i));
  if (limit >= 2 && !any(bits & broadcast<I32>(0x40000000))) return true;
  bool all = true;
  for (int64_t i = 0; i < count; i += kLanes) all &= all_below(load_lanes(from + i), limit);
  return all;
}
HALFSTEP_FN bool all_below(const F64& a, double limit) {
  I64 beyond;
  for (int k = 0; k < F64::kPieces; ++k) beyond.piece[k] = ~(abs(a).piece[k] < limit);
  return !any(beyond);
}

HALFSTEP_FN F32 at_least(const F32& x, float bound) {
  F32 r;
  for (int k = 0; k < F32::kPieces; ++k) {
#if defined(__AVX512F__)
    r.piece[k] = _mm512_max_ps(_mm512_set1_ps(bound), x.piece[k]);  // the second where one is NaN
#elif defined(__AVX2__)
    r.piece[k] = _mm256_max_ps(_mm256_set1_ps(bound), x.piece[k]);
#else
    const F32::Native b = bound - F32::Native{};
    r.piece[k] = b >= x.piece[k] ? b : x.piece[k];
#endif
  }
  return r;
}
HALFSTEP_FN F32 at_most(const F32& x, float bound) {
  F32 r;
  for (int k = 0; k < F32::kPieces; ++k) {
#if defined(__AVX512F__)
    r.piece[k] = _mm512_min_ps(_mm512_set1_ps(bound), x.piece[k]);
#elif defined(__AVX2__)
    r.piece[k] = _mm256_min_ps(_mm256_set1_ps(bound), x.piece[k]);
#else
    const F32::Native b = bound - F32::Native{};
    r.piece[k] = x.piece[k] >= b ? b : x.piece[k];
#endif
  }
  return r;
}
/// The larger of x and `best`, which is no NaN; for a NaN x `best`.
HALFSTEP_FN F32 larger(const F32& x, const F32& best) {
  F32 r;
  for (int k = 0; k < F32::kPieces; ++k) {
#if defined(__AVX512F__)
    r.piece[k] = _mm512_max_ps(x.piece[k], best.piece[k]);  // the second where one is NaN
#elif defined(__AVX2__)
    r.piece[k] = _mm256_max_ps(x.piece[k], best.piece[k]);
#else
    r.piece[k] = x.piece[k] > best.piece[k] ? x.piece[k] : best.piece[k];
#endif
  }
  return r;
}
HALFSTEP_FN F64 larger(const F64& x, const F64& best) {
  F64 r;
  for (int k = 0; k < F64::kPieces; ++k)
    r.piece[k] = x.piece[k] > best.piece[k] ? x.piece[k] : best.piece[k];
  return r;
}
HALFSTEP_FN F32 fma(const F32& a, const F32& b, const F32& c) {
  F32 r;
  for (int k = 0; k < F32::kPieces; ++k) {
#if defined(__AVX512F__)
    r.piece[k] = _mm512_fmadd_ps(a.piece[k], b.piece[k], c.piece[k]);
#elif defined(__AVX2__)
    r.piece[k] = _mm256_fmadd_ps(a.piece[k], b.piece[k], c.piece[k]);
#else
    for (int i = 0; i < 4; ++i)
      r.piece[k][i] = __builtin_fmaf(a.piece[k][i], b.piece[k][i], c.piece[k][i]);
#endif
  }
  return r;
}
HALFSTEP_FN F64 fma(const F64& a, const F64& b, const F64& c) {
  F64 r;
  for (int k = 0; k < F64::kPieces; ++k) {
#if defined(__AVX512F__)
    r.piece[k] = _mm512_fmadd_pd(a.piece[k], b.piece[k], c.piece[k]);
#elif defined(__AVX2__)
    r.piece[k] = _mm256_fmadd_pd(a.piece[k], b.piece[k], c.piece[k]);
#else
    for (int i = 0; i < 2; ++i)
      r.piece[k][i] = __builtin_fma(a.piece[k][i], b.piece[k][i], c.piece[k][i]);
#endif
  }
  return r;
}
HALFSTEP_FN F32 sqrt(const F32& a) {
  F32 r;
  for (int k = 0; k < F32::kPieces; ++k) {
#if defined(__AVX512F__)
    r.piece[k] = _mm512_sqrt_ps(a.piece[k]);
#elif defined(__AVX2__)
    r.piece[k] = _mm256_sqrt_ps(a.piece[k]);
#else
    for (int i = 0; i < 4; ++i) r.piece[k][i] = __builtin_sqrtf(a.piece[k][i]);
#endif
  }
  return r;
}
HALFSTEP_FN F64 sqrt(const F64& a) {
  F64 r;
  for (int k = 0; k < F64::kPieces; ++k) {
#if defined(__AVX512F__)
    r.piece[k] = _mm512_sqrt_pd(a.piece[k]);
#elif defined(__AVX2__)
    r.piece[k] = _mm256_sqrt_pd(a.piece[k]);
#else
    for (int i = 0; i < 2; ++i) r.piece[k][i] = __builtin_sqrt(a.piece[k][i]);
#endif
  }
  return r;
}
/// Nearest even; NaN gives INT32_MIN.
HALFSTEP_FN I32 round_to_int(const F32& a) {
  I32 r;
  for (int k = 0; k < F32::kPieces; ++k) {
#if defined(__AVX512F__)
    r.piece[k] = (I32::Native)_mm512_cvtps_epi32(a.piece[k]);
#elif defined(__AVX2__)
    r.piece[k] = (I32::Native)_mm256_cvtps_epi32(a.piece[k]);
#else
    for (int i = 0; i < 4; ++i) r.piece[k][i] = round_to_int(float(a.piece[k][i]));
#endif
  }
  return r;
}
HALFSTEP_FN I32 max(const I32& a, const I32& b) {
#if defined(__AVX512F__)
  return {(I32::Native)_mm512_max_epi32((__m512i)a.piece[0], (__m512i)b.piece[0])};
#elif defined(__AVX2__)
  I32 r;
  for (int k = 0; k < I32::kPieces; ++k)
    r.piece[k] = (I32::Native)_mm256_max_epi32((__m256i)a.piece[k], (__m256i)b.piece[k]);
  return r;
#else
  return select(a >= b, a, b);
#endif
}
HALFSTEP_FN I32 min(const I32& a, const I32& b) {
#if defined(__AVX512F__)
  return {(I32::Native)_mm512_min_epi32((__m512i)a.piece[0], (__m512i)b.piece[0])};
#elif defined(__AVX2__)
  I32 r;
  for (int k = 0; k < I32::kPieces; ++k)
    r.piece[k] = (I32::Native)_mm256_min_epi32((__m256i)a.piece[k], (__m256i)b.piece[k]);
  return r;
#else
  return select(b >= a, a, b);
#endif
}
HALFSTEP_FN U32 max(const U32& a, const U32& b) {
#if defined(__AVX512F__)
  return {(U32::Native)_mm512_max_epu32((__m512i)a.piece[0], (__m512i)b.piece[0])};
#elif defined(__AVX2__)
  U32 r;
  for (int k = 0; k < U32::kPieces; ++k)
    r.piece[k] = (U32::Native)_mm256_max_epu32((__m256i)a.piece[k], (__m256i)b.piece[k]);
  return r;
#else
  return select(a >= b, a, b);
#endif
}
HALFSTEP_FN U32 min(const U32& a, const U32& b) {
#if defined(__AVX512F__)
  return {(U32::Native)_mm512_min_epu32((__m512i)a.piece[0], (__m512i)b.piece[0])};
#elif defined(__AVX2__)
  U32 r;
  for (int k = 0; k < U32::kPieces; ++k)
    r.piece[k] = (U32::Native)_mm256_min_epu32((__m256i)a.piece[k], (__m256i)b.piece[k]);
  return r;
#else
  return select(b >= a, a, b);
#endif
}
namespace detail {

/// Lane i + kStep in lane i.
template <int kStep, class Native, int... kLane>
HALFSTEP_FN Native turned(const Native& x, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, x, ((kLane + kStep) % int(sizeof...(kLane)))...);
}
template <int kWidth, class T, class Op>
HALFSTEP_FN T fold_register(const typename Pack<T>::Native& x, const Op& op) {
  if constexpr (kWidth == 1) {
    return x[0];
  } else {
    using Lanes = std::make_integer_sequence<int, int(kRegister / sizeof(T))>;
    return fold_register<kWidth / 2, T>(op(x, turned<kWidth / 2>(x, Lanes())), op);
  }
}

/// ((0 op 8) op (4 op 12)) op …: one tree on every instruction set. `op` takes registers.
template <class T, class Op>
HALFSTEP_FN T fold_lanes(const Pack<T>& a, const Op& op) {
  Pack<T> x = a;
  for (int width = Pack<T>::kPieces / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) x.piece[k] = op(x.piece[k], x.piece[k + width]);
  return fold_register<int(kRegister / sizeof(T)), T>(x.piece[0], op);
}

}  // namespace detail

/// The sum of all lanes.
template <class T>
HALFSTEP_FN T sum_lanes(const Pack<T>& a) {
  return detail::fold_lanes(a, [](const auto& x, const auto& y) { return x + y; });
}
/// The largest lane; none is NaN.
template <class T>
HALFSTEP_FN T max_lane(const Pack<T>& a) {
  return detail::fold_lanes(a, [](const auto& x, const auto& y) { return x >= y ? x : y; });
}
HALFSTEP_FN F32 to_float(const I32& a) {
  F32 r;
  for (int k = 0; k < F32::kPieces; ++k)
    r.piece[k] = __builtin_convertvector(a.piece[k], F32::Native);
  return r;
}

HALFSTEP_FN F64 to_double(const F32& a) {
  F64 r;
  for (int k = 0; k < F32::kPieces; ++k) {
#if defined(__AVX512F__)
    r.piece[2 * k] = _mm512_cvtps_pd(_mm512_castps512_ps256(a.piece[k]));
    r.piece[2 * k + 1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.piece[k], 1));
#elif defined(__AVX2__)
    r.piece[2 * k] = _mm256_cvtps_pd(_mm256_castps256_ps128(a.piece[k]));
    r.piece[2 * k + 1] = _mm256_cvtps_pd(_mm256_extractf128_ps(a.piece[k], 1));
#else
    for (int i = 0; i < 4; ++i) r.piece[2 * k + i / 2][i % 2] = a.piece[k][i];
#endif
  }
  return r;
}
HALFSTEP_FN F32 to_single(const F64& a) {
  float lanes[kLanes];
  for (int k = 0; k < F64::kPieces; ++k)
    for (int i = 0; i < int(kRegister / 8); ++i)
      lanes[k * int(kRegister / 8) + i] = float(a.piece[k][i]);
  return load_lanes(lanes);
}

// ---- 16-bit memory -----------------------------------------------------------------------------
HALFSTEP_FN F32 load_half(const uint16_t* from) {
  F32 r;
#if defined(__AVX512F__)
  r.piece[0] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  for (int k = 0; k < 2; ++k)
    r.piece[k] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 8 * k)));
#else
  for (int i = 0; i < kLanes; ++i) r.piece[i / 4][i % 4] = half_to_float(from[i]);
#endif
  return r;
}
HALFSTEP_FN void store_half(uint16_t* to, const F32& a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(a.piece[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  for (int k = 0; k < 2; ++k)
    _mm_storeu_si128((__m128i*)(to + 8 * k),
                     _mm256_cvtps_ph(a.piece[k], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = float_to_half(a.piece[i / 4][i % 4]);
#endif
}
/// Sign-extends.
HALFSTEP_FN I32 load_int16(const int16_t* from) {
  I32 r;
#if defined(__AVX512F__)
  r.piece[0] = (I32::Native)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  for (int k = 0; k < 2; ++k)
    r.piece[k] =
        (I32::Native)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)(from + 8 * k)));
#else
  for (int i = 0; i < kLanes; ++i) r.piece[i / 4][i % 4] = from[i];
#endif
  return r;
}
/// Keeps the low 16 bits.
HALFSTEP_FN void store_int16(int16_t* to, const I32& a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)a.piece[0]));
#elif defined(__AVX2__)
  // packus saturates, so the high halves go first; it packs within 128-bit halves, hence the
  // permute.
  const __m256i low = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256((__m256i)a.piece[0], low),
                                             _mm256_and_si256((__m256i)a.piece[1], low));
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(packed, 0xd8));
#else
  int32_t lanes[kLanes];
  store_lanes(lanes, a);
  for (int i = 0; i < kLanes; ++i) to[i] = int16_t(lanes[i]);
#endif
}
/// Two packs of numbers that 16 bits hold.
HALFSTEP_FN void store_int16(int16_t* to, const I32& a, const I32& b) {
#if defined(__AVX512F__)
  const __m512i words = _mm512_packs_epi32((__m512i)a.piece[0], (__m512i)b.piece[0]);
  const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, words));
#elif defined(__AVX2__)
  for (int k = 0; k < 2; ++k) {
    const I32& x = k == 0 ? a : b;
    const __m256i words = _mm256_packs_epi32((__m256i)x.piece[0], (__m256i)x.piece[1]);
    _mm256_storeu_si256((__m256i*)(to + k * kLanes), _mm256_permute4x64_epi64(words, 0xd8));
  }
#else
  store_int16(to, a);
  store_int16(to + kLanes, b);
#endif
}
HALFSTEP_FN F32 load_bfloat(const uint16_t* from) {
  return from_bits(load_int16((const int16_t*)from) << 16);
}
HALFSTEP_FN I32 bfloat_bits(const F32& a) {
  const I32 bits = to_bits(a);
  const I32 rounded = (bits + broadcast<I32>(0x7fff) + ((bits >> 16) & broadcast<I32>(1))) >> 16;
  const I32 nan = (bits >> 16) | broadcast<I32>(0x40);
  return select<int32_t>(a == a, rounded, nan);
}
HALFSTEP_FN void store_bfloat(uint16_t* to, const F32& a) {
  store_int16((int16_t*)to, bfloat_bits(a));
}
/// Sign-extends.
HALFSTEP_FN I32 load_int8(const int8_t* from) {
  I32 r;
#if defined(__AVX512F__)
  r.piece[0] = (I32::Native)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  for (int k = 0; k < 2; ++k)
    r.piece[k] = (I32::Native)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8 * k)));
#else
  for (int i = 0; i < kLanes; ++i) r.piece[i / 4][i % 4] = from[i];
#endif
  return r;
}
/// Zero-extends.
HALFSTEP_FN I32 load_uint8(const uint8_t* from) {
  I32 r;
#if defined(__AVX512F__)
  r.piece[0] = (I32::Native)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  for (int k = 0; k < 2; ++k)
    r.piece[k] = (I32::Native)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8 * k)));
#else
  for (int i = 0; i < kLanes; ++i) r.piece[i / 4][i % 4] = from[i];
#endif
  return r;
}
/// Keeps the low 8 bits.
HALFSTEP_FN void store_int8(int8_t* to, const I32& a) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)a.piece[0]));
#elif defined(__AVX2__)
  // As store_int16: packing saturates and works within 128-bit halves.
  const __m256i low = _mm256_set1_epi32(0xff);
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256((__m256i)a.piece[0], low),
                                            _mm256_and_si256((__m256i)a.piece[1], low));
  const __m256i order = _mm256_permute4x64_epi64(words, 0xd8);
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi16(_mm256_castsi256_si128(order),
                                                  _mm256_extracti128_si256(order, 1)));
#else
  int32_t lanes[kLanes];
  store_lanes(lanes, a);
  for (int i = 0; i < kLanes; ++i) to[i] = int8_t(lanes[i]);
#endif
}
/// The low bytes of 64 lanes, each the low 16 bits of its lane, with the bits of `flip` turned
/// over.
HALFSTEP_FN void store_low_bytes(int8_t* to, const I32 (&a)[4], uint8_t flip) {
#if defined(__AVX512F__)
  // Packing works within 128-bit parts: dword 4 * part + vector holds four bytes of its vector.
  const __m512i low = _mm512_set1_epi16(0xff), turned = _mm512_set1_epi16(flip);
  const auto words = [&](int k) {
    const __m512i x = _mm512_packus_epi32((__m512i)a[k].piece[0], (__m512i)a[k + 1].piece[0]);
    return _mm512_ternarylogic_epi32(x, low, turned, (0xf0 & 0xcc) ^ 0xaa);
  };
  const __m512i bytes = _mm512_packus_epi16(words(0), words(2));
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, bytes));
#elif defined(__AVX2__)
  const __m256i low = _mm256_set1_epi16(0xff), turned = _mm256_set1_epi16(flip);
  const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  for (int k = 0; k < 4; k += 2) {
    const auto words = [&](int v) {
      const __m256i x = _mm256_packus_epi32((__m256i)a[v].piece[0], (__m256i)a[v].piece[1]);
      return _mm256_xor_si256(_mm256_and_si256(x, low), turned);
    };
    const __m256i bytes = _mm256_packus_epi16(words(k), words(k + 1));
    _mm256_storeu_si256((__m256i*)(to + k * kLanes), _mm256_permutevar8x32_epi32(bytes, order));
  }
#else
  for (int k = 0; k < 4; ++k) store_int8(to + k * kLanes, a[k] ^ broadcast<I32>(flip));
#endif
}
/// Whether one of 64 bytes is `value`.
HALFSTEP_FN bool holds_byte(const char* from, int8_t value) {
  using Bytes = Pack<int8_t>;
  Bytes::Native found = {};
  for (int i = 0; i < 64; i += kRegister)
    found |= *reinterpret_cast<const Bytes::Unaligned*>(from + i) == value;
  return any(__builtin_bit_cast(Pack<int64_t>::Native, found));
}
#else   // nvcc sees scalars only
template <class V>
HALFSTEP_FN V broadcast(V x) {
  return x;
}
template <class U>
HALFSTEP_FN U index_lanes(uint32_t i) {
  return i;
}
#endif  // !__CUDACC__

// ---- the same memory accesses, one element at a time
// ---------------------------------------------
/// Reads element `i` of a tensor of any dtype as the compute type.
template <class T>
HALFSTEP_FN T load_scalar(const void* from, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kF16:
      return T(half_to_float(static_cast<const uint16_t*>(from)[i]));
    case Dtype::kBF16:
      return T(bfloat_to_float(static_cast<const uint16_t*>(from)[i]));
    case Dtype::kF32:
      return T(static_cast<const float*>(from)[i]);
    default:
      return T(static_cast<const double*>(from)[i]);
  }
}

#if !defined(__CUDACC__)
/// Reads elements i … i+15 as the compute type.
template <class V>
HALFSTEP_FN V load_any(const void* from, Dtype dtype, int64_t i) {
  using T = typename Traits<V>::Scalar;
  if constexpr (Traits<V>::kWidth == 1) {
    return load_scalar<T>(from, dtype, i);
  } else if constexpr (sizeof(T) == 4) {
    switch (dtype) {
      case Dtype::kF16:
        return load_half(static_cast<const uint16_t*>(from) + i);
      case Dtype::kBF16:
        return load_bfloat(static_cast<const uint16_t*>(from) + i);
      case Dtype::kF32:
        return load_lanes(static_cast<const float*>(from) + i);
      default:
        return to_single(load_lanes(static_cast<const double*>(from) + i));
    }
  } else {
    if (dtype == Dtype::kF64) return load_lanes(static_cast<const double*>(from) + i);
    return to_double(load_any<F32>(from, dtype, i));
  }
}
#endif

HALFSTEP_MATH_END
