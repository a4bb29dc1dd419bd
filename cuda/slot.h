#pragma once

// How a parameter and its master are stored, one element at a time: Slot<T, parameter dtype, master
// kind> joins both into the exact weight and splits a new one. The CPU's sixteen-lane twin is in
// csrc/cpu/isa/slots.h; the arithmetic of both is csrc/math/split16.h.

#include <type_traits>

#include "../csrc/math/split16.h"
#include "memory.h"

namespace halfstep::cuda {

using math::Dtype;
using math::MasterKind;

HALFSTEP_FN float narrow(float x) { return x; }
/// FP64 to FP32 rounded to odd, so that the later rounding to 16 bits is the only one.
HALFSTEP_FN float narrow(double x) { return math::round_to_odd(x); }

template <Dtype kDtype>
using Stored = std::conditional_t<kDtype == Dtype::kF64, double,
                                  std::conditional_t<kDtype == Dtype::kF32, float, uint16_t>>;
template <MasterKind kKind>
using StoredMaster =
    std::conditional_t<kKind == MasterKind::kF64, double,
                       std::conditional_t<kKind == MasterKind::kF32, float, int16_t>>;

template <class Compute, Dtype kParamDtype, MasterKind kKind>
struct Slot {
  using T = Compute;
  using Param = Stored<kParamDtype>;
  using Master = StoredMaster<kKind>;  ///< unused without a master
  static constexpr bool kSixteen = kParamDtype == Dtype::kF16 || kParamDtype == Dtype::kBF16;
  static constexpr bool kHasMaster = kKind != MasterKind::kNone;

  HALFSTEP_FN static T weight(Param param) { return math::load_scalar<T>(&param, kParamDtype, 0); }
  HALFSTEP_FN static T join(Param param, Master master) {
    if constexpr (kKind == MasterKind::kSplit16) {
      if constexpr (kParamDtype == Dtype::kF16)
        return math::join_half(math::half_to_float(param), int32_t(master));
      else
        return math::join_bfloat(int32_t(int16_t(param)), int32_t(master));
    } else if constexpr (kHasMaster) {
      return T(master);
    } else {
      return weight(param);
    }
  }
  HALFSTEP_FN static void split(T x, Param& param, Master& master) {
    if constexpr (kKind == MasterKind::kSplit16) {
      if constexpr (kParamDtype == Dtype::kF16) {
        param = math::float_to_half(x);
        master = int16_t(math::remainder_half(x, math::half_to_float(param)));
      } else {
        const int32_t h = math::bfloat_away(x);
        param = uint16_t(h);
        master = int16_t(math::remainder_bfloat(x, h));
      }
    } else {
      if constexpr (kHasMaster) master = Master(x);
      if constexpr (kParamDtype == Dtype::kF16)
        param = math::float_to_half(narrow(x));
      else if constexpr (kParamDtype == Dtype::kBF16)
        param = math::float_to_bfloat(narrow(x));
      else
        param = Param(x);
    }
  }
  /// The 16-bit weight would be infinite; false for NaN.
  HALFSTEP_FN static bool leaves_range(T x) {
    if constexpr (!kSixteen) return false;
    return math::abs(x) >= T(kParamDtype == Dtype::kF16 ? math::kHalfLimit : math::kBfloatLimit);
  }
};

template <class T>
HALFSTEP_FN bool is_computed_in(const math::StepTensor& tensor) {
  const bool wide = tensor.param_dtype == Dtype::kF64 || tensor.master_kind == MasterKind::kF64;
  return wide == (sizeof(T) == 8);
}

/// Calls `body(Slot)` with the slot type of `tensor`, which is_computed_in<T>. The host has checked
/// that the combination exists.
template <class T, class Body>
HALFSTEP_FN void with_slot(const math::StepTensor& tensor, const Body& body) {
  if constexpr (sizeof(T) == 4) {
    if (tensor.param_dtype == Dtype::kF32)
      body(Slot<T, Dtype::kF32, MasterKind::kNone>{});
    else if (tensor.param_dtype == Dtype::kF16 && tensor.master_kind == MasterKind::kSplit16)
      body(Slot<T, Dtype::kF16, MasterKind::kSplit16>{});
    else if (tensor.param_dtype == Dtype::kF16 && tensor.master_kind == MasterKind::kF32)
      body(Slot<T, Dtype::kF16, MasterKind::kF32>{});
    else if (tensor.param_dtype == Dtype::kF16)
      body(Slot<T, Dtype::kF16, MasterKind::kNone>{});
    else if (tensor.master_kind == MasterKind::kSplit16)
      body(Slot<T, Dtype::kBF16, MasterKind::kSplit16>{});
    else if (tensor.master_kind == MasterKind::kF32)
      body(Slot<T, Dtype::kBF16, MasterKind::kF32>{});
    else
      body(Slot<T, Dtype::kBF16, MasterKind::kNone>{});
  } else {
    if (tensor.param_dtype == Dtype::kF64)
      body(Slot<T, Dtype::kF64, MasterKind::kNone>{});
    else if (tensor.param_dtype == Dtype::kF32)
      body(Slot<T, Dtype::kF32, MasterKind::kF64>{});
    else if (tensor.param_dtype == Dtype::kF16)
      body(Slot<T, Dtype::kF16, MasterKind::kF64>{});
    else
      body(Slot<T, Dtype::kBF16, MasterKind::kF64>{});
  }
}

}  // namespace halfstep::cuda
