#pragma once

// Optimizer states as sixteen lanes of the compute type, whatever they are held in.

#include "slots.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

/// Sixteen FP64 lanes added as ((0+8)+(4+12))+…: one tree on every instruction set.
inline double sum_lanes(const F64& lanes) {
  double x[kLanes];
  store_lanes(x, lanes);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

/// The first `count` lanes, zeros after them.
template <class V>
V first_lanes(const V& x, int64_t count) {
  typename Traits<V>::Scalar lanes[kLanes];
  store_lanes(lanes, x);
  for (int64_t i = count; i < kLanes; ++i) lanes[i] = 0;
  return load_lanes(lanes);
}

HALFSTEP_FN int64_t state_size(const StepTensor& tensor, int64_t compute_size) {
  return tensor.state_kind == StateKind::kWide   ? compute_size
         : tensor.state_kind == StateKind::kBF16 ? 2
                                                 : 1;
}

template <class V>
HALFSTEP_FN V load_wide(const char* state, int64_t i) {
  return load_lanes(reinterpret_cast<const typename Traits<V>::Scalar*>(state) + i);
}
template <class V>
HALFSTEP_FN void store_wide(char* state, int64_t i, const V& x) {
  store_lanes(reinterpret_cast<typename Traits<V>::Scalar*>(state) + i, x);
}

/// State s of sixteen elements; `element` is where they lie in the tensor.
template <class R, class V>
V load_state(const StepTensor& t, int s, const char* data, int64_t i, int64_t element) {
  if constexpr (sizeof(V) == sizeof(F32)) {
    if (t.state_kind == StateKind::kBF16)
      return load_bfloat(reinterpret_cast<const uint16_t*>(data) + i);
    if (t.state_kind == StateKind::kInt8) {
      const I32 codes = load_int8(reinterpret_cast<const int8_t*>(data) + i);
      const int exponent = t.exponent[s][element / kStateBlock];
      return R::is_signed(s) ? decode_state<true, V>(codes, exponent)
                             : decode_state<false, V>(codes, exponent);
    }
  }
  return load_wide<V>(data, i);
}

/// For states that are stored sixteen elements at a time; `key` as in StepConstants.
template <class V>
void store_state(const StepTensor& t, int s, char* data, int64_t i, const V& x, uint32_t key,
                 int64_t element) {
  if constexpr (sizeof(V) == sizeof(F32)) {
    if (t.state_kind == StateKind::kBF16) {
      const auto random = random_bits<V>(key, uint32_t(s) + 1, element);
      return store_bfloat(reinterpret_cast<uint16_t*>(data) + i, round_bfloat_at_random(x, random));
    }
  }
  store_wide(data, i, x);
}

/// Codes and scale of one block of an int8 state: `count` of `fresh` are elements of the tensor.
template <bool kSigned>
void store_block(float* fresh, int64_t count, int8_t* codes, int8_t* exponent, uint32_t key,
                 uint32_t stream, int64_t element) {
  for (int64_t i = count; i < kStateBlock; ++i) fresh[i] = 0;
  F32 largest = broadcast<F32>(0);
  for (int64_t i = 0; i < kStateBlock; i += kLanes) {
    const F32 size = coded_size<kSigned>(load_lanes(fresh + i));
    largest = select(size >= largest, size, largest);
  }
  float lanes[kLanes];
  store_lanes(lanes, largest);
  float top = 0;
  for (const float lane : lanes) top = lane > top ? lane : top;
  const int scale = scale_exponent(top, kSigned ? kSignedTop : kUnsignedTop);
  *exponent = int8_t(scale);
  for (int64_t i = 0; i < kStateBlock; i += kLanes) {
    const auto random = random_bits<F32>(key, stream, element + i);
    store_int8(codes + i, encode_state<kSigned>(load_lanes(fresh + i), scale, random));
  }
}

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
