#pragma once

// split16: an exact FP32 master kept as the 16-bit weight itself and an int16 remainder.
//
//   FP16  h = RNE16(master);  remainder = bits(master) - bits(float(h))      while |h| >= 2^-14
//                             remainder = rint((master - h) * 2^39)          below
//         Lossless for 2^-16 <= |master| < 65520, error <= 2^-40 below; -0.0 becomes +0.0.
//   BF16  h = master rounded half away from zero; remainder = bits(master) - (h << 16)
//         Exact for every finite master that rounds to a finite h; h differs from nearest-even on
//         exact ties only (nearest-even would need 65,537 remainders).
//
// Templates over V: float (device, emulation) or F32 (sixteen lanes); I is the matching int32.

#include "vec.h"

HALFSTEP_MATH_BEGIN

/// |master| from this value on would leave FP16: RNE16 gives inf.
constexpr float kHalfLimit = 65520.0f;
/// The same for BF16, both for nearest-even and for half-away rounding (bits 0x7f7f8000).
constexpr float kBfloatLimit = 0x1.ffp127f;

template <class V, class I>
HALFSTEP_FN V join_half(V h, I remainder) {
  const V by_bits = from_bits(to_bits(h) + remainder);
  const V by_steps = fma(to_float(remainder), broadcast<V>(0x1p-39f), h);
  return select(abs(h) >= broadcast<V>(0x1p-14f), by_bits, by_steps);
}

/// `h` is float(RNE16(master)). kNoNan, here and below: there is no NaN.
template <bool kNoNan = false, class V>
HALFSTEP_FN auto remainder_half(V master, V h) {
  using I = decltype(to_bits(h));
  const I by_bits = to_bits(master) - to_bits(h);
  const I by_steps = round_to_int((master - h) * broadcast<V>(0x1p39f));
  const I remainder = select(abs(h) >= broadcast<V>(0x1p-14f), by_bits, by_steps);
  return kNoNan ? remainder : select(master == master, remainder, broadcast<I>(0));
}

template <class I>
HALFSTEP_FN auto join_bfloat(I h, I remainder) {
  return from_bits((h << 16) + remainder);
}

/// Bits of h in the low half, rounded half away from zero; NaN stays a NaN.
template <bool kNoNan = false, class V>
HALFSTEP_FN auto bfloat_away(V master) {
  using I = decltype(to_bits(master));
  const I bits = to_bits(master);
  if constexpr (kNoNan) return (bits + broadcast<I>(0x8000)) >> 16;
  const I finite = select(master == master, bits, broadcast<I>(0));  // no overflow in the addition
  const I nan = (bits >> 16) | broadcast<I>(0x40);
  return select(master == master, (finite + broadcast<I>(0x8000)) >> 16, nan);
}

template <bool kNoNan = false, class V, class I>
HALFSTEP_FN auto remainder_bfloat(V master, I h) {
  const I remainder = to_bits(master) - (h << 16);
  return kNoNan ? remainder : select(master == master, remainder, broadcast<I>(0));
}

HALFSTEP_MATH_END
