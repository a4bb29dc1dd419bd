#pragma once

// Optimizer states in less than FP32, and the narrow masters.
//
//   BF16 state   rounded at random.
//   int8 state   blocks of 128 elements in memory order, one power-of-two scale 2^e a block (e as
//     int8). Signed states (momenta): code in [-127, 127], x = code * 2^e, 2^e the smallest power
//     of two with max|x| <= 127 * 2^e; -128 stands for a non-finite value. Non-negative states
//     (second moments): sqrt(x) as code * 2^e with codes 0 … 254, never 0 where x > 0; 255 is
//     non-finite. Rounded at random: with nearest rounding 0.999 * 127 is 127 again and v never
//     decays, and a v that rounds to 0 beside an m that does not divides by eps alone. Counted in
//     2^-15 of a code, a random 15-bit number added, the upper bits kept.
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
/// Exponent of a block without a non-zero element. 2^-e times 2^15 is a normal number down to it.
constexpr int kLowestExponent = -110;

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// 2^exponent for -126 <= exponent <= 127.
HALFSTEP_FN float power_of_two(int exponent) { return bit_cast<float>((exponent + 127) << 23); }

/// The smallest e >= kLowestExponent with |y| <= top * 2^e, of the bits of a finite |y|: the tops
/// are 0x1.fcp6 and 0x1.fcp7, so a greater mantissa takes the next exponent.
template <bool kSigned>
HALFSTEP_FN int scale_exponent(int32_t largest) {
  constexpr int32_t kMantissaTop = 0x7e0000;
  const int exponent = ((largest + 0x7fffff - kMantissaTop) >> 23) - 127 - (kSigned ? 6 : 7);
  return exponent < kLowestExponent ? kLowestExponent : exponent;
}

/// What is held of a state x as code * 2^e.
template <bool kSigned, class V>
HALFSTEP_FN V coded_value(V x) {
  return kSigned ? x : sqrt(x);
}
template <class V>
HALFSTEP_FN auto is_finite(V x) {
  return broadcast<V>(0x1.fffffep127f) >= abs(x);
}
/// The bits of |y|, which are in the order of |y|, and 0 where y is not finite.
template <class V>
HALFSTEP_FN auto size_bits(V y) {
  using I = decltype(to_bits(y));
  return select(is_finite(y), to_bits(abs(y)), broadcast<I>(0));
}

/// Random bits that round a code.
constexpr int kDiceBits = 15;
/// 2^23, or 1.5 * 2^23 where a code has a sign: an integer added to it lies in its low bits as long
/// as the sum is in [2^23, 2^24). It is: at most 255 * 2^15 - 1 is added, or, where there is a
/// sign, from -127 * 2^15 to 128 * 2^15 - 1.
template <bool kSigned>
constexpr int32_t kCodeZero = kSigned ? 0x4b400000 : 0x4b000000;

/// In its low byte the code of y = coded_value(x) under scale 2^exponent, which holds it, plus 128
/// where it has a sign; above it 0x96. `dice`: kDiceBits random bits below others. kPositive: no y
/// is 0.
template <bool kSigned, bool kPositive = false, class V, class U>
HALFSTEP_FN auto code_in_low_byte(V y, int exponent, U dice) {
  using I = decltype(to_bits(y));
  const I offset = join_bits(as_signed(dice), (1 << kDiceBits) - 1, kCodeZero<kSigned>);
  const V sum = fma(y, broadcast<V>(power_of_two(kDiceBits - exponent)), from_bits(offset));
  I code = to_bits(sum) >> kDiceBits;
  if constexpr (!kSigned) {  // 1 at least, unless y is 0
    constexpr int32_t kZero = kCodeZero<false>, kOne = (kZero >> kDiceBits) + 1;
    if constexpr (kPositive)
      code = max(code, broadcast<I>(kOne));
    else
      code = max(code, min(to_bits(y), broadcast<I>(kOne)));
  }
  return code;
}
/// The code itself, of any y.
template <bool kSigned, class V, class U>
HALFSTEP_FN auto encode_state(V y, int exponent, U dice) {
  using I = decltype(to_bits(y));
  const V size = select(is_finite(y), y, broadcast<V>(0.0f));
  const I code = (code_in_low_byte<kSigned>(size, exponent, dice) & broadcast<I>(0xff)) -
                 broadcast<I>(kSigned ? 128 : 0);
  return select(is_finite(y), code, broadcast<I>(kSigned ? -128 : 255));
}

/// `code` as loaded: a signed one sign-extended from 8 bits, the other zero-extended. kFinite: no
/// code stands for a non-finite value.
template <bool kSigned, bool kFinite = false, class V, class I>
HALFSTEP_FN V decode_state(I code, int exponent) {
  const V y = to_float(code) * broadcast<V>(power_of_two(exponent));
  const V x = kSigned ? y : y * y;
  return kFinite ? x
                 : select(code == broadcast<I>(kSigned ? -128 : 255),
                          broadcast<V>(__builtin_nanf("")), x);
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
