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
template <class V>
HALFSTEP_FN V within(const V& x, Part part, typename Traits<V>::Scalar rest) {
  typename Traits<V>::Scalar lanes[kLanes];
  store_lanes(lanes, x);
  for (int k = part.count; k < kLanes; ++k) lanes[k] = rest;
  return load_lanes(lanes);
}

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
/// order give the same bits on every instruction set.
template <class V>
class LaneSum {
 public:
  HALFSTEP_FN void add(const V& x) {
    if constexpr (sizeof(V) == sizeof(F64)) {
      total_ = total_ + x;
    } else {
      partial_ = partial_ + x;
      if (++terms_ == 64) flush();
    }
  }
  HALFSTEP_FN void add_product(const V& a, const V& b) {
    if constexpr (sizeof(V) == sizeof(F64)) {
      total_ = fma(a, b, total_);
    } else {
      partial_ = fma(a, b, partial_);
      if (++terms_ == 64) flush();
    }
  }
  double total() {
    if constexpr (sizeof(V) != sizeof(F64)) flush();
    return sum_lanes(total_);
  }

 private:
  HALFSTEP_FN void flush() {
    if constexpr (sizeof(V) != sizeof(F64)) {
      total_ = total_ + to_double(partial_);
      partial_ = broadcast<V>(0);
      terms_ = 0;
    }
  }
  F64 total_ = broadcast<F64>(0);
  V partial_ = broadcast<V>(0);
  int terms_ = 0;
};

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
