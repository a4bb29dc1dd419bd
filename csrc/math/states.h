#pragma once

// Optimizer states in less than FP32, and the narrow masters.
//
//   BF16 state   rounded at random.
//   int8 state   blocks of 128 elements in memory order, one power-of-two scale 2^e a block (e as
//     int8). Signed states (momenta): code in [-127, 127], x = code * 2^e, 2^e the smallest power
//     of two with max|x| <= 127 * 2^e; -128 stands for a non-finite value. Non-negative states
//     (second moments): sqrt(x) as code * 2^e with codes 0 … 254, never 0 where x > 0; 255 is
//     non-finite. Rounded at random: with nearest rounding 0.999 * 127 is 127 again and v never
//     decays, and a v that rounds to 0 beside an m that does not divides by eps alone.
//   split8   the int16 remainder of split16 rounded to its upper byte: the weight to about 8 bits
//     more than its 16-bit dtype has.
//   kahan    the rounding error of the weight in the weight's own dtype.

#include "random.h"
#include "split16.h"

namespace halfstep::math {

/// How the elementwise states of an optimizer are held.
enum class StateKind : int32_t {
  kWide = 0,  ///< the compute type, FP32 or FP64
  kBF16 = 1,
  kInt8 = 2,
};

/// Elements under one scale of an int8 state.
constexpr int64_t kStateBlock = 128;
/// Exponent of a block without a non-zero element.
constexpr int kLowestExponent = -126;

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// 2^exponent for -126 <= exponent <= 127.
HALFSTEP_FN float power_of_two(int exponent) { return bit_cast<float>((exponent + 127) << 23); }

/// The smallest e >= -126 with largest <= top * 2^e; `largest` is finite and not negative.
HALFSTEP_FN int scale_exponent(float largest, float top) {
  int exponent = int((bit_cast<uint32_t>(largest / top) >> 23) & 0xffu) - 127;
  exponent = exponent < kLowestExponent ? kLowestExponent : exponent;
  return largest > top * power_of_two(exponent) ? exponent + 1 : exponent;
}

/// What the block's scale must hold of x: |x| or sqrt(x); 0 for a non-finite element.
template <bool kSigned, class V>
HALFSTEP_FN V coded_size(V x) {
  const V size = kSigned ? abs(x) : sqrt(x);
  return select(broadcast<V>(0x1.fffffep127f) >= size, size, broadcast<V>(0.0f));
}

constexpr float kSignedTop = 127.0f, kUnsignedTop = 254.0f;

/// The code of x under scale 2^exponent; `random` from random_bits.
template <bool kSigned, class V, class U>
HALFSTEP_FN auto encode_state(V x, int exponent, U random) {
  using I = decltype(to_bits(x));
  // In two factors: 2^126 and more has no reciprocal that is a normal number.
  const int half = exponent / 2;
  const auto scaled = [&](V size) {
    return size * broadcast<V>(power_of_two(-half)) * broadcast<V>(power_of_two(half - exponent));
  };
  const V size = coded_size<kSigned>(x);
  I code = floor_to_int(scaled(size) + unit_interval<V>(random >> 8));
  const I top = broadcast<I>(kSigned ? 127 : 254);
  code = select(code >= top, top, code);
  if constexpr (kSigned) {
    code = select(x >= broadcast<V>(0.0f), code, broadcast<I>(0) - code);
    return select(broadcast<V>(0x1.fffffep127f) >= abs(x), code, broadcast<I>(-128));
  } else {
    const I one = broadcast<I>(1), zero = broadcast<I>(0);
    code = select(x == broadcast<V>(0.0f), zero, select(code >= one, code, one));
    return select(broadcast<V>(0x1.fffffep127f) >= x, code, broadcast<I>(255));
  }
}

/// `code` as loaded, sign-extended from 8 bits.
template <bool kSigned, class V, class I>
HALFSTEP_FN V decode_state(I code, int exponent) {
  if constexpr (kSigned) {
    const V x = to_float(code) * broadcast<V>(power_of_two(exponent));
    return select(code == broadcast<I>(-128), broadcast<V>(__builtin_nanf("")), x);
  } else {
    const I byte = code & broadcast<I>(255);
    const V root = to_float(byte) * broadcast<V>(power_of_two(exponent));
    return select(byte == broadcast<I>(255), broadcast<V>(__builtin_nanf("")), root * root);
  }
}

// ---- split8
// --------------------------------------------------------------------------------------
/// A remainder of split16 in units of 2^kBits, between -127 and 127: it never reaches the tie, so
/// that the weight stays the rounding of what both make.
template <int kBits, class I>
HALFSTEP_FN I coarse_remainder(I remainder) {
  const I rounded = (remainder + broadcast<I>(1 << (kBits - 1))) >> kBits;
  const I low = select(rounded >= broadcast<I>(-127), rounded, broadcast<I>(-127));
  return select(broadcast<I>(127) >= low, low, broadcast<I>(127));
}

/// By bits above 2^-14, by steps from there on: weights below 2^-14 lie as far apart as those
/// above, while the bits of their masters count twice as fine.
template <class V>
HALFSTEP_FN auto remainder8_half(V master, V h) {
  using I = decltype(to_bits(h));
  const I by_bits = coarse_remainder<5>(to_bits(master) - to_bits(h));
  const I by_steps = coarse_remainder<7>(round_to_int((master - h) * broadcast<V>(0x1p39f)));
  const I remainder = select(broadcast<V>(0x1p-14f) >= abs(h), by_steps, by_bits);
  return select(master == master, remainder, broadcast<I>(0));
}
template <class V, class I>
HALFSTEP_FN V join8_half(V h, I remainder) {
  const V by_bits = from_bits(to_bits(h) + (remainder << 5));
  const V by_steps = fma(to_float(remainder), broadcast<V>(0x1p-32f), h);
  return select(broadcast<V>(0x1p-14f) >= abs(h), by_steps, by_bits);
}
template <class V, class I>
HALFSTEP_FN auto remainder8_bfloat(V master, I h) {
  return coarse_remainder<8>(remainder_bfloat(master, h));
}
template <class I>
HALFSTEP_FN auto join8_bfloat(I h, I remainder) {
  return join_bfloat(h, remainder << 8);
}

HALFSTEP_MATH_END
