#pragma once

// How a parameter and its master are stored, as types: Slot<V, parameter dtype, master kind> loads
// the exact weight as V and stores a new one. One pass over elements [begin, end), sixteen at a
// time, the last few through a padded copy, so that they go through the very same operations.

#include "../../math/split16.h"
#include "parts.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

using namespace math;

template <MasterKind kMaster>
constexpr int64_t master_size() {
  return kMaster == MasterKind::kNone      ? 0
         : kMaster == MasterKind::kSplit16 ? 2
         : kMaster == MasterKind::kF32     ? 4
                                           : 8;
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

template <class V, Dtype kParam, MasterKind kMaster>
struct Slot {
  using Value = V;
  using T = typename Traits<V>::Scalar;
  static constexpr Dtype kParamDtype = kParam;
  static constexpr MasterKind kMasterKind = kMaster;
  static constexpr bool kSixteen = kParam == Dtype::kF16 || kParam == Dtype::kBF16;
  static constexpr int64_t kParamSize = dtype_size(kParam);
  static constexpr int64_t kMasterSize = master_size<kMaster>();

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

  /// Lanes whose 16-bit weight would be infinite; NaN lanes are not among them.
  HALFSTEP_FN static auto leaves_range(const V& x) {
    return abs(x) >= broadcast<V>(T(kParam == Dtype::kF16 ? kHalfLimit : kBfloatLimit));
  }

  HALFSTEP_FN static void store(char* param, char* master, int64_t i, const V& x) {
    auto* bits = reinterpret_cast<uint16_t*>(param) + i;
    if constexpr (kMaster == MasterKind::kSplit16) {
      auto* remainder = reinterpret_cast<int16_t*>(master) + i;
      if constexpr (kParam == Dtype::kF16) {
        store_half(bits, x);
        store_int16(remainder, remainder_half(x, load_half(bits)));
      } else {
        const I32 h = bfloat_away(x);
        store_int16(reinterpret_cast<int16_t*>(bits), h);
        store_int16(remainder, remainder_bfloat(x, h));
      }
    } else {
      if constexpr (kMaster == MasterKind::kF32 || kMaster == MasterKind::kF64)
        store_lanes(reinterpret_cast<T*>(master) + i, x);
      store_param(param, i, x);
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

template <Dtype kDtype>
struct DtypeConstant {
  static constexpr Dtype kValue = kDtype;
};

/// Calls `body(Slot)` with the slot type of `tensor`; false for a combination that does not exist.
template <class Body>
bool with_slot(const StepTensor& tensor, const Body& body) {
  const auto sixteen = [&](auto dtype) {
    constexpr Dtype kParam = decltype(dtype)::kValue;
    switch (tensor.master_kind) {
      case MasterKind::kNone:
        return body(Slot<F32, kParam, MasterKind::kNone>{}), true;
      case MasterKind::kSplit16:
        return body(Slot<F32, kParam, MasterKind::kSplit16>{}), true;
      case MasterKind::kF32:
        return body(Slot<F32, kParam, MasterKind::kF32>{}), true;
      case MasterKind::kF64:
        return body(Slot<F64, kParam, MasterKind::kF64>{}), true;
    }
    return false;
  };
  switch (tensor.param_dtype) {
    case Dtype::kF16:
      return sixteen(DtypeConstant<Dtype::kF16>{});
    case Dtype::kBF16:
      return sixteen(DtypeConstant<Dtype::kBF16>{});
    case Dtype::kF32:
      if (tensor.master_kind == MasterKind::kF64)
        return body(Slot<F64, Dtype::kF32, MasterKind::kF64>{}), true;
      if (tensor.master_kind != MasterKind::kNone) return false;
      return body(Slot<F32, Dtype::kF32, MasterKind::kNone>{}), true;
    default:
      if (tensor.master_kind != MasterKind::kNone) return false;
      return body(Slot<F64, Dtype::kF64, MasterKind::kNone>{}), true;
  }
}

/// Arrays that one pass walks together. An absent array has size 0 and is never touched.
template <int kArrays>
struct Arrays {
  char* data[kArrays];
  int64_t size[kArrays];  ///< bytes an element
  bool written[kArrays];
};

/// Runs `group(data, i, lanes)` over [begin, end): sixteen elements at a time; the remainder runs
/// on zero-padded copies, of which the first `lanes` elements are copied back.
template <int kArrays, class Group>
HALFSTEP_FN int64_t walk(const Arrays<kArrays>& arrays, int64_t begin, int64_t end,
                         const Group& group) {
  int64_t total = 0, i = begin;
  for (; i + kLanes <= end; i += kLanes) total += group(arrays.data, i);
  if (i == end) return total;
  alignas(64) char copy[kArrays][kLanes * 8] = {};
  char* data[kArrays];
  for (int a = 0; a < kArrays; ++a) {
    data[a] = copy[a];
    if (arrays.size[a] > 0)
      __builtin_memcpy(copy[a], arrays.data[a] + i * arrays.size[a],
                       size_t((end - i) * arrays.size[a]));
  }
  total += group(data, 0);
  for (int a = 0; a < kArrays; ++a)
    if (arrays.written[a] && arrays.size[a] > 0)
      __builtin_memcpy(arrays.data[a] + i * arrays.size[a], copy[a],
                       size_t((end - i) * arrays.size[a]));
  return total;
}

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
