#pragma once

// Random bits that depend on (key, index) and nothing else: a step can be replayed to the bit, on
// any instruction set and on the device. And rounding by them: up with the probability of the part
// that nearest rounding would drop, so that the expected value is kept.
// The mixer is the two-round xorshift-multiply hash "lowbias32" (C. Wellons, hash-prospector).

#include <type_traits>

#include "vec.h"

HALFSTEP_MATH_BEGIN

template <class U>
HALFSTEP_FN U mix(U x) {
  x = x ^ (x >> 16);
  x = x * broadcast<U>(0x7feb352du);
  x = x ^ (x >> 15);
  x = x * broadcast<U>(0x846ca68bu);
  return x ^ (x >> 16);
}

/// The key of one tensor in one step; never 0.
HALFSTEP_FN uint32_t random_key(int64_t seed, int64_t step, int64_t tensor) {
  uint32_t key = 0x9e3779b9u;
  const int64_t parts[] = {seed, step, tensor};
  for (const int64_t part : parts) {
    key = mix(key ^ uint32_t(part));
    key = mix(key ^ uint32_t(part >> 32));
  }
  return key == 0 ? 1 : key;
}

/// What the bits of the elements [k * 2^32, (k + 1) * 2^32) around i begin with. `stream` keeps the
/// uses within one step apart.
HALFSTEP_FN uint32_t random_base(uint32_t key, uint32_t stream, int64_t i) {
  return mix(key + stream * 0x9e3779b9u) ^ mix(uint32_t(i >> 32) + 1u);
}
/// 32 bits of element i, or of the sixteen from i on.
template <class U>
HALFSTEP_FN U random_bits(uint32_t base, int64_t i) {
  return mix(index_lanes<U>(uint32_t(i)) ^ broadcast<U>(base));
}

// The uses of a step: stream 0 rounds the weight; state s takes 16 bits of stream 1 + s / 2, the
// lower half for an even s, the upper for an odd one, so that two moments cost one hash; 15 bits
// and a quarter of a hash where they are int8 (block_dice).
constexpr uint32_t kWeightStream = 0;
HALFSTEP_FN constexpr uint32_t state_stream(int s) { return 1 + uint32_t(s) / 2; }
template <class U>
HALFSTEP_FN U state_dice(int s, U bits) {
  return s % 2 == 0 ? bits & broadcast<U>(0xffffu) : bits >> 16;
}

/// `bits` turned left by `bytes` bytes.
template <class U>
HALFSTEP_FN U turn_bytes(U bits, int bytes) {
  return bytes == 0 ? bits : bits << 8 * bytes | bits >> (32 - 8 * bytes);
}

/// By how many bytes the hash of element i of a block is turned for state s. Four elements, 32
/// apart, share a hash. A code takes the low 15 bits of the turned hash: 7 of one byte, which
/// decide nearly always, and below them another byte, which leads for a neighbour. The two states
/// of an element share no bit; elements 64 apart have the same numbers, crosswise.
HALFSTEP_FN constexpr int block_turn(int s, int64_t i) {
  return int(i >> 5 & 3) ^ (s % 2 == 0 ? 0 : 2);
}
/// What rounds int8 state s of element i: its low 15 bits.
template <class U>
HALFSTEP_FN U block_dice(int s, uint32_t base, int64_t i) {
  return turn_bytes(random_bits<U>(base, i & ~int64_t{96}), block_turn(s, i));
}

/// The magnitude of `magnitude`, which is not negative, with the sign of x.
template <class V>
HALFSTEP_FN V with_sign_of(V x, V magnitude) {
  using I = decltype(to_bits(x));
  return from_bits(to_bits(magnitude) | (to_bits(x) & broadcast<I>(INT32_MIN)));
}

/// The largest integer not above x, for 0 <= x < 2^31.
template <class V>
HALFSTEP_FN auto floor_to_int(V x) {
  const auto nearest = round_to_int(x);
  const auto bits = as_unsigned(nearest);  // a NaN's integer has no predecessor
  const auto below = as_signed(bits - broadcast<std::decay_t<decltype(bits)>>(1u));
  return select(x >= to_float(nearest), nearest, below);
}

/// `bits` of [0, 1), from the low 24 of them.
template <class V, class U>
HALFSTEP_FN V unit_interval(U bits) {
  return to_float(as_signed(bits & broadcast<U>(0xffffffu))) * broadcast<V>(0x1p-24f);
}

/// Drops the low `kBits` of the bits of x, upwards in magnitude with the probability of what is
/// dropped; a NaN or an infinity stays what it is.
template <int kBits, class V, class U>
HALFSTEP_FN V round_bits_at_random(V x, U random) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const U added = as_unsigned(to_bits(x)) + (random & broadcast<U>(kMask));
  const V rounded = from_bits(as_signed(added & broadcast<U>(~kMask)));
  return select(abs(x) >= broadcast<V>(__builtin_inff()), x, select(x == x, rounded, x));
}

/// x rounded at random to a value that FP16 holds, at most 65504 in magnitude where x is finite.
template <class V, class U>
HALFSTEP_FN V round_half_at_random(V x, U random) {
  const V magnitude = abs(x), largest = broadcast<V>(65504.0f);
  V normal = round_bits_at_random<13>(magnitude, random);
  normal = select(magnitude >= broadcast<V>(65536.0f), normal,
                  select(normal >= largest, largest, normal));
  // Below 2^-14 FP16 counts in steps of 2^-24.
  const V steps = magnitude * broadcast<V>(0x1p24f);
  const V small = select(steps >= broadcast<V>(1024.0f), broadcast<V>(0.0f), steps);
  const V counted =
      to_float(floor_to_int(small + unit_interval<V>(random >> 8))) * broadcast<V>(0x1p-24f);
  const V rounded = select(magnitude >= broadcast<V>(0x1p-14f), normal, counted);
  return select(x == x, with_sign_of(x, rounded), x);
}

/// The bits of x rounded at random to BF16, in the low half; `dice` are 16 random bits. From the
/// largest BF16 number on what does not fit is dropped, so that finite stays finite. A NaN must be
/// quiet, as arithmetic leaves it, to stay one.
template <class V, class U>
HALFSTEP_FN auto bfloat_at_random(V x, U dice) {
  using I = decltype(to_bits(x));
  const I added = select(broadcast<V>(0x1.fdfffep127f) >= abs(x), as_signed(dice), broadcast<I>(0));
  return (to_bits(x) + added) >> 16;
}
template <class V>
HALFSTEP_FN V quiet(V x) {
  using I = decltype(to_bits(x));
  return select(x == x, x, from_bits(to_bits(x) | broadcast<I>(0x400000)));
}
template <class V, class U>
HALFSTEP_FN V round_bfloat_at_random(V x, U random) {
  return from_bits(bfloat_at_random(quiet(x), random & broadcast<U>(0xffffu)) << 16);
}

HALFSTEP_MATH_END
