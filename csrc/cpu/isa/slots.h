#pragma once

// How a parameter and its master are stored, as types: Slot<V, parameter dtype, master kind> loads
// the exact weight as V and stores a new one. One pass over elements [begin, end), sixteen at a
// time, the last few through a padded copy, so that they go through the very same operations.

#include "../../math/optim.h"
#include "parts.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

using namespace math;

constexpr int64_t size_of_master(MasterKind kind) {
  switch (kind) {
    case MasterKind::kSplit8:
      return 1;
    case MasterKind::kSplit16:
    case MasterKind::kKahan:
      return 2;
    case MasterKind::kF32:
      return 4;
    case MasterKind::kF64:
      return 8;
    default:
      return 0;
  }
}

HALFSTEP_FN F32 narrow(const F32& x) { return x; }
/// FP64 to FP32 rounded to odd, so that the later rounding to 16 bits is the only one.
HALFSTEP_FN F32 narrow(const F64& x) {
  double wide[kLanes];
  float odd[kLanes];
  store_lanes(wide, x);
  for (int i = 0; i < kLanes; ++i) odd[i] = round_to_odd(wide[i]);
  return load_lanes(odd);
}
template <class V>
HALFSTEP_FN V widen(const F32& x) {
  if constexpr (sizeof(V) == sizeof(F32))
    return x;
  else
    return to_double(x);
}

/// Writes the halves of x and gives the remainders. kNoNan: there is no NaN in x.
template <bool kNoNan>
HALFSTEP_FN I32 split_halves(uint16_t* halves, const F32& x) {
#if defined(__AVX512F__)
  if constexpr (kNoNan) {  // as remainder_half; an exponent above 0 says that |h| >= 2^-14
    const __m256i bits = _mm512_cvtps_ph(x.piece[0], _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256((__m256i*)halves, bits);
    const __mmask16 normal = _mm256_test_epi16_mask(bits, _mm256_set1_epi16(0x7c00));
    const F32 h = {_mm512_cvtph_ps(bits)};
    const I32 by_steps = round_to_int((x - h) * broadcast<F32>(0x1p39f));
    return {(I32::Native)_mm512_mask_sub_epi32((__m512i)by_steps.piece[0], normal,
                                               (__m512i)x.piece[0], (__m512i)h.piece[0])};
  }
#endif
  store_half(halves, x);
  return remainder_half<kNoNan>(x, load_half(halves));
}

template <class V, Dtype kParam, MasterKind kMaster>
struct Slot {
  using Value = V;
  using T = typename Traits<V>::Scalar;
  static constexpr bool kAny = false;
  static constexpr Dtype kDtype = kParam;
  static constexpr bool sixteen() { return kParam == Dtype::kF16 || kParam == Dtype::kBF16; }
  static constexpr int64_t param_size() { return dtype_size(kParam); }
  static constexpr int64_t master_size() { return size_of_master(kMaster); }

  HALFSTEP_FN static V load(const char* param, const char* master, int64_t i) {
    const auto* bits = reinterpret_cast<const uint16_t*>(param) + i;
    if constexpr (kMaster == MasterKind::kSplit16) {
      const I32 remainder = load_int16(reinterpret_cast<const int16_t*>(master) + i);
      if constexpr (kParam == Dtype::kF16)
        return join_half(load_half(bits), remainder);
      else
        return join_bfloat(load_int16(reinterpret_cast<const int16_t*>(bits)), remainder);
    } else if constexpr (kMaster == MasterKind::kF32) {
      return widen<V>(load_lanes(reinterpret_cast<const float*>(master) + i));
    } else if constexpr (kMaster == MasterKind::kF64) {
      return load_lanes(reinterpret_cast<const double*>(master) + i);
    } else {
      return load_any<V>(param, kParam, i);
    }
  }

  /// From here on a 16-bit weight would be infinite.
  static constexpr T limit() { return kParam == Dtype::kF16 ? kHalfLimit : kBfloatLimit; }

  /// kNoNan: there is no NaN in x.
  template <bool kNoNan = false>
  HALFSTEP_FN static void store(char* param, char* master, int64_t i, const V& x, int64_t = 0) {
    auto* bits = reinterpret_cast<uint16_t*>(param) + i;
    if constexpr (kMaster == MasterKind::kSplit16) {
      auto* remainder = reinterpret_cast<int16_t*>(master) + i;
      if constexpr (kParam == Dtype::kF16) {
        store_int16(remainder, split_halves<kNoNan>(bits, x));
      } else {
        const I32 h = bfloat_away<kNoNan>(x);
        store_int16(reinterpret_cast<int16_t*>(bits), h);
        store_int16(remainder, remainder_bfloat<kNoNan>(x, h));
      }
    } else {
      if constexpr (kMaster == MasterKind::kF32 || kMaster == MasterKind::kF64)
        store_lanes(reinterpret_cast<T*>(master) + i, x);
      store_param(param, i, x);
    }
  }

  /// 2 * kLanes elements, among them no NaN; quicker than two stores.
  HALFSTEP_FN static void store_two(char* param, char* master, int64_t i, const V& x, const V& y,
                                    int64_t = 0) {
    static_assert(kMaster == MasterKind::kSplit16);
    auto* bits = reinterpret_cast<uint16_t*>(param) + i;
    auto* remainder = reinterpret_cast<int16_t*>(master) + i;
    if constexpr (kParam == Dtype::kF16) {
      const I32 first = split_halves<true>(bits, x);
      store_int16(remainder, first, split_halves<true>(bits + kLanes, y));
    } else {
      const I32 h = bfloat_away<true>(x), k = bfloat_away<true>(y);
      store_int16(reinterpret_cast<int16_t*>(bits), h, k);
      store_int16(remainder, remainder_bfloat<true>(x, h), remainder_bfloat<true>(y, k));
    }
  }

  /// The weight rounded once from the exact value.
  HALFSTEP_FN static void store_param(char* param, int64_t i, const V& x) {
    if constexpr (kParam == Dtype::kF16)
      store_half(reinterpret_cast<uint16_t*>(param) + i, narrow(x));
    else if constexpr (kParam == Dtype::kBF16)
      store_bfloat(reinterpret_cast<uint16_t*>(param) + i, narrow(x));
    else if constexpr (kParam == Dtype::kF32 && sizeof(T) == 8)
      store_lanes(reinterpret_cast<float*>(param) + i, to_single(x));
    else
      store_lanes(reinterpret_cast<T*>(param) + i, x);
  }
};

/// The same for any parameter computed in V, chosen at run time: one copy of the code instead of
/// one for each dtype and kind of master.
template <class V>
struct AnySlot {
  using Value = V;
  using T = typename Traits<V>::Scalar;
  const Dtype dtype;
  const MasterKind kind;
  const uint32_t key;  ///< of kStochastic
  static constexpr bool kAny = true;
  explicit AnySlot(const StepTensor& tensor, uint32_t key = 0)
      : dtype(tensor.param_dtype), kind(tensor.master_kind), key(key) {}

  bool sixteen() const { return dtype == Dtype::kF16 || dtype == Dtype::kBF16; }
  int64_t param_size() const { return dtype_size(dtype); }
  int64_t master_size() const { return size_of_master(kind); }
  T limit() const { return dtype == Dtype::kF16 ? kHalfLimit : kBfloatLimit; }

  V load(const char* param, const char* master, int64_t i) const {
    if (kind == MasterKind::kF32) return widen<V>(load_lanes((const float*)master + i));
    if constexpr (sizeof(T) == 8) {
      if (kind == MasterKind::kF64) return load_lanes((const double*)master + i);
    } else {
      const auto* bits = (const uint16_t*)param + i;
      const bool half = dtype == Dtype::kF16;
      const auto bfloat = [&] { return load_int16((const int16_t*)bits); };
      if (kind == MasterKind::kSplit16) {
        const I32 remainder = load_int16((const int16_t*)master + i);
        return half ? join_half(load_half(bits), remainder) : join_bfloat(bfloat(), remainder);
      }
      if (kind == MasterKind::kSplit8) {
        const I32 remainder = load_int8((const int8_t*)master + i);
        return half ? join8_half(load_half(bits), remainder) : join8_bfloat(bfloat(), remainder);
      }
      if (kind == MasterKind::kKahan)
        return load_any<V>(param, dtype, i) + load_any<V>(master, dtype, i);
    }
    return load_any<V>(param, dtype, i);
  }

  /// `element`: position of i in the tensor, which i is not in a padded copy.
  template <bool = false>
  void store(char* param, char* master, int64_t i, const V& x, int64_t element = 0) const {
    if constexpr (sizeof(T) == 8) {
      if (kind == MasterKind::kF64) store_lanes((double*)master + i, x);
      store_param(param, i, x);
    } else {
      switch (kind) {
        case MasterKind::kSplit16:
        case MasterKind::kSplit8:
          return store_split(param, master, i, x);
        case MasterKind::kKahan:
          return store_kahan(param, master, i, x);
        case MasterKind::kStochastic: {
          const U32 random = random_bits<U32>(random_base(key, kWeightStream, element), element);
          return store_param(param, i,
                             dtype == Dtype::kF16 ? round_half_at_random(x, random)
                                                  : round_bfloat_at_random(x, random));
        }
        case MasterKind::kF32:
          store_lanes((float*)master + i, x);
          [[fallthrough]];
        default:
          store_param(param, i, x);
      }
    }
  }

  void store_two(char* param, char* master, int64_t i, const V& x, const V& y,
                 int64_t element) const {
    store(param, master, i, x, element);
    store(param, master, i + kLanes, y, element + kLanes);
  }

  /// As store(), never at random.
  void store_nearest(char* param, char* master, int64_t i, const V& x) const {
    if (kind == MasterKind::kStochastic)
      store_param(param, i, x);
    else
      store(param, master, i, x);
  }

  /// The weight rounded once from the exact value.
  void store_param(char* param, int64_t i, const V& x) const {
    switch (dtype) {
      case Dtype::kF16:
        return store_half((uint16_t*)param + i, narrow(x));
      case Dtype::kBF16:
        return store_bfloat((uint16_t*)param + i, narrow(x));
      case Dtype::kF32:
        if constexpr (sizeof(T) == 8)
          return store_lanes((float*)param + i, to_single(x));
        else
          return store_lanes((float*)param + i, x);
      default:
        if constexpr (sizeof(T) == 8) store_lanes((double*)param + i, x);
    }
  }

 private:
  void store_split(char* param, char* master, int64_t i, const F32& x) const {
    auto* bits = (uint16_t*)param + i;
    const bool coarse = kind == MasterKind::kSplit8;
    I32 remainder;
    if (dtype == Dtype::kF16) {
      store_half(bits, x);
      const F32 h = load_half(bits);
      remainder = coarse ? remainder8_half(x, h) : remainder_half(x, h);
    } else {
      const I32 h = bfloat_away(x);
      store_int16((int16_t*)bits, h);
      remainder = coarse ? remainder8_bfloat(x, h) : remainder_bfloat(x, h);
    }
    if (coarse)
      store_int8((int8_t*)master + i, remainder);
    else
      store_int16((int16_t*)master + i, remainder);
  }

  /// What is kept must not reach the middle between two weights, or the sum would round to another
  /// one: there it is taken one step nearer to zero.
  void store_kahan(char* param, char* master, int64_t i, const F32& x) const {
    store_param(param, i, x);
    const F32 weight = load_any<F32>(param, dtype, i);
    F32 error = x - weight;
    error = select(error == error, error, broadcast<F32>(0));
    store_param(master, i, error);
    alignas(64) char rounded[kLanes * 8];
    store_param(rounded, 0, weight + load_any<F32>(master, dtype, i));
    const I32 crosses = load_any<F32>(rounded, dtype, 0) != weight;
    const I32 bits = load_int16((const int16_t*)master + i);
    store_int16((int16_t*)master + i, bits + (crosses & (weight == weight)));
  }
};

/// Calls `body(AnySlot)` with the compute type of `tensor`.
template <class Body>
auto with_any_slot(const StepTensor& tensor, uint32_t key, const Body& body) {
  const bool wide = tensor.param_dtype == Dtype::kF64 || tensor.master_kind == MasterKind::kF64;
  return wide ? body(AnySlot<F64>(tensor, key)) : body(AnySlot<F32>(tensor, key));
}

/// Calls `body(Slot)` for the combinations that most training runs in, and returns true; false for
/// the others, which AnySlot serves. Beside narrow states those with split16. Not on the x86 CPUs
/// without AVX2, too few for what it costs to compile.
template <StateKind kHeld, class Body>
HALFSTEP_FN bool with_common_slot([[maybe_unused]] const StepTensor& tensor,
                                  [[maybe_unused]] const Body& body) {
#if !defined(__x86_64__) || defined(__AVX2__)
  const Dtype dtype = tensor.param_dtype;
  const MasterKind kind = tensor.master_kind;
  if (kind == MasterKind::kSplit16) {
    if (dtype == Dtype::kF16) return body(Slot<F32, Dtype::kF16, MasterKind::kSplit16>()), true;
    return body(Slot<F32, Dtype::kBF16, MasterKind::kSplit16>()), true;
  }
  if constexpr (kHeld == StateKind::kWide) {
    if (dtype == Dtype::kF16 && kind == MasterKind::kF32)
      return body(Slot<F32, Dtype::kF16, MasterKind::kF32>()), true;
    if (kind != MasterKind::kNone) return false;
    if (dtype == Dtype::kF16) return body(Slot<F32, Dtype::kF16, MasterKind::kNone>()), true;
    if (dtype == Dtype::kBF16) return body(Slot<F32, Dtype::kBF16, MasterKind::kNone>()), true;
    if (dtype == Dtype::kF32) return body(Slot<F32, Dtype::kF32, MasterKind::kNone>()), true;
  }
#endif
  return false;
}

/// Arrays that one pass walks together. An absent array has size 0 and is never touched.
template <int kArrays>
struct Arrays {
  char* data[kArrays];
  int64_t size[kArrays];  ///< bytes an element
  bool written[kArrays];

  void set(int a, const void* memory, int64_t element_size, bool is_written) {
    data[a] = static_cast<char*>(const_cast<void*>(memory));
    size[a] = element_size;
    written[a] = is_written;
  }
};

/// Runs `group(data, i, element)` over [begin, end), kStride elements at a time; the remainder runs
/// on zero-padded copies (i = 0), of which the elements that exist are copied back. `element` is
/// where the group lies in the tensor.
template <int kArrays, int kStride = kLanes, class Group>
HALFSTEP_FN int64_t walk(const Arrays<kArrays>& arrays, int64_t begin, int64_t end,
                         const Group& group) {
  int64_t total = 0, i = begin;
  for (; i + kStride <= end; i += kStride) total += group(arrays.data, i, i);
  if (i == end) return total;
  alignas(64) char copy[kArrays][kStride * 8] = {};
  char* data[kArrays];
  for (int a = 0; a < kArrays; ++a) {
    data[a] = copy[a];
    if (arrays.size[a] > 0)
      __builtin_memcpy(copy[a], arrays.data[a] + i * arrays.size[a],
                       size_t((end - i) * arrays.size[a]));
  }
  total += group(data, 0, i);
  for (int a = 0; a < kArrays; ++a)
    if (arrays.written[a] && arrays.size[a] > 0)
      __builtin_memcpy(arrays.data[a] + i * arrays.size[a], copy[a],
                       size_t((end - i) * arrays.size[a]));
  return total;
}

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
