#pragma once

// Optimizer states as sixteen lanes of the compute type, whatever they are held in.

#include <type_traits>
#include <utility>

#include "slots.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

/// body(std::integral_constant<int, k>()) for k = 0 … kCount - 1.
template <int kCount, class Body>
HALFSTEP_FN void unrolled(const Body& body) {
  [&]<int... k>(std::integer_sequence<int, k...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, k>()), ...);
  }
  (std::make_integer_sequence<int, kCount>());
}

/// The first `count` lanes, zeros after them.
template <class V>
V first_lanes(const V& x, int64_t count) {
  typename Traits<V>::Scalar lanes[kLanes];
  store_lanes(lanes, x);
  for (int64_t i = count; i < kLanes; ++i) lanes[i] = 0;
  return load_lanes(lanes);
}

constexpr int64_t state_size(StateKind kind, int64_t compute_size) {
  return kind == StateKind::kWide ? compute_size : kind == StateKind::kBF16 ? 2 : 1;
}

template <class V>
HALFSTEP_FN V load_wide(const char* state, int64_t i) {
  return load_lanes(reinterpret_cast<const typename Traits<V>::Scalar*>(state) + i);
}
template <class V>
HALFSTEP_FN void store_wide(char* state, int64_t i, const V& x) {
  store_lanes(reinterpret_cast<typename Traits<V>::Scalar*>(state) + i, x);
}

/// Calls body(std::integral_constant<StateKind, …>) with how the states of `t` are held, which are
/// narrow only beside an update in FP32.
template <class V, class Body>
HALFSTEP_FN auto with_state_kind(const StepTensor& t, const Body& body) {
  if constexpr (sizeof(V) == sizeof(F32)) {
    if (t.state_kind == StateKind::kBF16)
      return body(std::integral_constant<StateKind, StateKind::kBF16>());
    if (t.state_kind == StateKind::kInt8)
      return body(std::integral_constant<StateKind, StateKind::kInt8>());
  }
  return body(std::integral_constant<StateKind, StateKind::kWide>());
}

template <bool kSigned, bool kFinite = false>
HALFSTEP_FN F32 load_coded(const char* codes, int64_t i, int exponent) {
  if constexpr (kSigned)
    return decode_state<true, kFinite, F32>(load_int8((const int8_t*)codes + i), exponent);
  else
    return decode_state<false, kFinite, F32>(load_uint8((const uint8_t*)codes + i), exponent);
}

/// Sixteen elements of a state; `exponents` of an int8 one, `element`: where they lie in the
/// tensor.
template <StateKind kHeld, bool kSigned, class V>
HALFSTEP_FN V load_state(const char* data, int64_t i, const int8_t* exponents, int64_t element) {
  if constexpr (kHeld == StateKind::kBF16)
    return load_bfloat(reinterpret_cast<const uint16_t*>(data) + i);
  else if constexpr (kHeld == StateKind::kInt8)
    return load_coded<kSigned>(data, i, exponents[element / kStateBlock]);
  else
    return load_wide<V>(data, i);
}

/// The same where the sign is known at run time only.
template <StateKind kHeld, class V>
HALFSTEP_FN V load_signed_state(bool is_signed, const char* data, int64_t i,
                                const int8_t* exponents, int64_t element) {
  return is_signed ? load_state<kHeld, true, V>(data, i, exponents, element)
                   : load_state<kHeld, false, V>(data, i, exponents, element);
}

/// State k, held in BF16; `bits` from random_bits().
template <int k>
HALFSTEP_FN void store_bfloat_at_random(char* data, int64_t i, const F32& x, const U32& bits) {
  store_int16(reinterpret_cast<int16_t*>(data) + i, bfloat_at_random(x, state_dice(k, bits)));
}

/// Whether one of a block's codes stands for a non-finite value.
template <bool kSigned>
HALFSTEP_FN bool holds_nonfinite(const char* codes) {
  const auto code = int8_t(kSigned ? -128 : 255);
  static_assert(kStateBlock == 2 * 64);
  return holds_byte(codes, code) | holds_byte(codes + 64, code);
}

/// Random bits of a block, for every state that shares them: two packs of hashes (block_dice), each
/// turned by 0, 1, 2 and 3 bytes.
struct BlockBits {
  alignas(64) uint32_t turned[4][2 * kLanes];
};
HALFSTEP_FN void fill_bits(BlockBits& bits, uint32_t base, int64_t element) {
  unrolled<2>([&](auto pack) __attribute__((always_inline)) {
    const U32 word = random_bits<U32>(base, element + pack * kLanes);
    unrolled<4>([&](auto bytes) __attribute__((always_inline)) {
      store_lanes(bits.turned[bytes] + pack * kLanes, turn_bytes(word, bytes));
    });
  });
}

/// The scale of a block, and whether all of it is finite; `positive`: and none of it is 0.
struct Block {
  int exponent;
  bool finite, positive;
};
/// `values`: coded_value() of a block's elements, 0 of those that do not exist.
template <bool kSigned>
HALFSTEP_FN Block scale_of(const float* values) {
  constexpr uint32_t kInfinity = 0x7f800000;
  U32 top = broadcast<U32>(0), low = broadcast<U32>(~0u);
  unrolled<kStateBlock / kLanes>([&](auto group) __attribute__((always_inline)) {
    const F32 y = load_lanes(values + group * kLanes);
    const U32 bits = as_unsigned(to_bits(kSigned ? abs(y) : y));
    top = max(top, bits);  // a root has no sign; a NaN's bits are above infinity too
    if constexpr (!kSigned) low = min(low, bits);
  });
  const uint32_t largest = max_lane(top);
  const bool positive = !kSigned && !any(low == broadcast<U32>(0));
  if (__builtin_expect(largest < kInfinity, 1))
    return {scale_exponent<kSigned>(int32_t(largest)), true, positive};
  top = broadcast<U32>(0);
  for (int64_t i = 0; i < kStateBlock; i += kLanes)
    top = max(top, as_unsigned(size_bits(load_lanes(values + i))));
  return {scale_exponent<kSigned>(int32_t(max_lane(top))), false, false};
}

/// Codes of a block of state k, of which all is finite. kPositive: no value is 0.
template <bool kSigned, int k, bool kPositive>
HALFSTEP_FN void encode_finite(const float* values, const BlockBits& bits, int exponent,
                               int8_t* codes) {
  unrolled<2>([&](auto half) __attribute__((always_inline)) {
    I32 group[4];
    unrolled<4>([&](auto g) __attribute__((always_inline)) {
      constexpr int64_t i = half * 64 + g * kLanes;
      const U32 dice = load_lanes(bits.turned[block_turn(k, i)] + i % (2 * kLanes));
      group[g] = code_in_low_byte<kSigned, kPositive>(load_lanes(values + i), exponent, dice);
    });
    store_low_bytes(codes + half * 64, group, kSigned ? 128 : 0);
  });
}
/// Codes of a block of state k. kFinite: all of it is known to be finite.
template <bool kSigned, int k, bool kFinite>
HALFSTEP_FN void encode_block(const float* values, const BlockBits& bits, const Block& block,
                              int8_t* codes) {
  if (!kSigned && block.positive)
    return encode_finite<kSigned, k, !kSigned>(values, bits, block.exponent, codes);
  if (kFinite || block.finite)
    return encode_finite<kSigned, k, false>(values, bits, block.exponent, codes);
  for (int64_t i = 0; i < kStateBlock; i += kLanes) {
    const U32 dice = load_lanes(bits.turned[block_turn(k, i)] + i % (2 * kLanes));
    store_int8(codes + i, encode_state<kSigned>(load_lanes(values + i), block.exponent, dice));
  }
}

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
