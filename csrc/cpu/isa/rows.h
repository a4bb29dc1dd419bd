#pragma once

// Rows of elements of any dtype as packs of sixteen: what the kernels of the layer ops share. FP64
// is computed in FP64, everything else in FP32 and rounded once at the store.

#include <type_traits>

#include "../../math/vec.h"
#include "states.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

using namespace math;

/// How many lanes of a pack belong to the row: all of them, known when compiling, or fewer.
struct Whole {
  static constexpr int count = kLanes;
};
struct Part {
  int count;
};

/// body(i, lanes) for the packs of a row of n elements: Whole ones, then at most one Part.
template <class Body>
HALFSTEP_FN void for_each_pack(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Whole());
  if (i < n) body(i, Part{int(n - i)});
}

/// x with the lanes beyond the row set to `rest`.
template <class V>
HALFSTEP_FN V within(const V& x, Whole, typename Traits<V>::Scalar) {
  return x;
}
HALFSTEP_FN F32 within(const F32& x, Part part, float rest) {
  const U32 last = broadcast<U32>(uint32_t(part.count) - 1);
  return select<float>(last >= index_lanes<U32>(0), x, broadcast<F32>(rest));
}
HALFSTEP_FN F64 within(const F64& x, Part part, double rest) {
  double lanes[kLanes];
  store_lanes(lanes, x);
  for (int k = part.count; k < kLanes; ++k) lanes[k] = rest;
  return load_lanes(lanes);
}

/// Asks the cache for memory that is read, or written, a little later. Any address will do, that of
/// no memory too.
HALFSTEP_FN void fetch(const char* base, int64_t offset) {
  __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(base) + offset));
}
HALFSTEP_FN void fetch_to_write(const char* to) { __builtin_prefetch(to, 1); }

template <Dtype kDtype>
struct Elements {
  static constexpr Dtype dtype = kDtype;
  using V = std::conditional_t<kDtype == Dtype::kF64, F64, F32>;
  using T = typename Traits<V>::Scalar;
  static constexpr int64_t size = dtype_size(kDtype);

  HALFSTEP_FN static V load(const void* from, int64_t i, Whole = {}, T = 0) {
    if constexpr (kDtype == Dtype::kF16)
      return load_half(static_cast<const uint16_t*>(from) + i);
    else if constexpr (kDtype == Dtype::kBF16)
      return load_bfloat(static_cast<const uint16_t*>(from) + i);
    else
      return load_lanes(static_cast<const T*>(from) + i);
  }
  /// The lanes beyond the row are `rest`.
  HALFSTEP_FN static V load(const void* from, int64_t i, Part part, T rest = 0) {
#if defined(__AVX512F__)
    if constexpr (size == 2) {
      const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << part.count) - 1),
                                                    static_cast<const uint16_t*>(from) + i);
      F32 x;
      if constexpr (kDtype == Dtype::kF16)
        x.piece[0] = _mm512_cvtph_ps(bits);
      else
        x.piece[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
      return rest == 0 ? x : within(x, part, rest);
    }
#endif
    alignas(64) char padded[kLanes * size] = {};
    __builtin_memcpy(padded, static_cast<const char*>(from) + i * size, size_t(part.count * size));
    const V x = load(padded, 0);
    if (rest == 0) return x;
    return within(x, part, rest);
  }

  HALFSTEP_FN static void store(void* to, int64_t i, const V& x, Whole = {}) {
    if constexpr (kDtype == Dtype::kF16)
      store_half(static_cast<uint16_t*>(to) + i, x);
    else if constexpr (kDtype == Dtype::kBF16)
      store_bfloat(static_cast<uint16_t*>(to) + i, x);
    else
      store_lanes(static_cast<T*>(to) + i, x);
  }
  HALFSTEP_FN static void store(void* to, int64_t i, const V& x, Part part) {
#if defined(__AVX512F__)
    if constexpr (size == 2) {
      __m256i bits;
      if constexpr (kDtype == Dtype::kF16)
        bits = _mm512_cvtps_ph(x.piece[0], _MM_FROUND_TO_NEAREST_INT);
      else
        bits = _mm512_cvtepi32_epi16((__m512i)bfloat_bits(x).piece[0]);
      return _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + i,
                                      __mmask16((1u << part.count) - 1), bits);
    }
#endif
    alignas(64) char padded[kLanes * size];
    store(padded, 0, x);
    __builtin_memcpy(static_cast<char*>(to) + i * size, padded, size_t(part.count * size));
  }
};

/// body(Elements<…>()) for the dtype met at run time.
template <class Body>
HALFSTEP_FN auto with_elements(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kF16:
      return body(Elements<Dtype::kF16>());
    case Dtype::kBF16:
      return body(Elements<Dtype::kBF16>());
    case Dtype::kF32:
      return body(Elements<Dtype::kF32>());
    default:
      return body(Elements<Dtype::kF64>());
  }
}

/// A sum over sixteen lanes: FP32 for 64 terms of a lane, then FP64. The same terms in the same
/// order give the same bits on every instruction set. for_each_term counts the terms.
template <class V>
class LaneSum {
 public:
  HALFSTEP_FN void add(const V& x) { partial_ = partial_ + x; }
  HALFSTEP_FN void add_product(const V& a, const V& b) { partial_ = fma(a, b, partial_); }
  HALFSTEP_FN void flush() {
    if constexpr (sizeof(V) != sizeof(F64)) {
      total_ = total_ + to_double(partial_);
      partial_ = broadcast<V>(0);
    }
  }
  HALFSTEP_FN F64 lanes() {
    if constexpr (sizeof(V) == sizeof(F64)) return partial_;
    flush();
    return total_;
  }
  HALFSTEP_FN double total() { return sum_lanes(lanes()); }

 private:
  F64 total_ = broadcast<F64>(0);  // of FP32
  V partial_ = broadcast<V>(0);
};

/// body(i, lanes) as for_each_pack; what it adds to each of `sums`, one term a pack, is flushed
/// when 64 terms have come.
template <class Body, class... Sums>
HALFSTEP_FN void for_each_term(int64_t n, const Body& body, Sums&... sums) {
  constexpr int64_t kBlock = 64 * kLanes;
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int64_t j = i; j < i + kBlock; j += kLanes) body(j, Whole());
    (sums.flush(), ...);
  }
  for (; i + kLanes <= n; i += kLanes) body(i, Whole());
  if (i < n) body(i, Part{int(n - i)});
}

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
