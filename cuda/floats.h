#pragma once

// Groups of elements of any dtype as the compute type T (float or double).

#include "../csrc/math/vec.h"
#include "memory.h"

namespace halfstep::cuda {

template <class T, int kCount>
HALFSTEP_FN Group<T, kCount> read_floats(const void* from, math::Dtype dtype, int64_t i,
                                         int lanes) {
  Group<T, kCount> out;
  const auto convert = [&](const auto& group) {
    HALFSTEP_UNROLL
    for (int k = 0; k < kCount; ++k) out.x[k] = math::load_scalar<T>(group.x, dtype, k);
  };
  switch (dtype) {
    case math::Dtype::kF16:
    case math::Dtype::kBF16:
      convert(read_group<kCount>(static_cast<const uint16_t*>(from), i, lanes));
      break;
    case math::Dtype::kF32:
      convert(read_group<kCount>(static_cast<const float*>(from), i, lanes));
      break;
    default:
      convert(read_group<kCount>(static_cast<const double*>(from), i, lanes));
  }
  return out;
}

/// Stores `x` rounded to `dtype` and returns what was stored.
template <class T, int kCount>
HALFSTEP_FN Group<T, kCount> write_floats(void* to, math::Dtype dtype, int64_t i, int lanes,
                                          const Group<T, kCount>& x) {
  Group<T, kCount> stored;
  const auto convert = [&](auto* array, const auto& round) {
    Group<std::decay_t<decltype(*array)>, kCount> group = {};
    HALFSTEP_UNROLL
    for (int k = 0; k < kCount; ++k) {
      group.x[k] = round(x.x[k]);
      stored.x[k] = math::load_scalar<T>(group.x, dtype, k);
    }
    write_group<kCount>(array, i, lanes, group);
  };
  switch (dtype) {
    case math::Dtype::kF16:
      convert(static_cast<uint16_t*>(to), [](T v) { return math::float_to_half(float(v)); });
      break;
    case math::Dtype::kBF16:
      convert(static_cast<uint16_t*>(to), [](T v) { return math::float_to_bfloat(float(v)); });
      break;
    case math::Dtype::kF32:
      convert(static_cast<float*>(to), [](T v) { return float(v); });
      break;
    default:
      convert(static_cast<double*>(to), [](T v) { return double(v); });
  }
  return stored;
}

}  // namespace halfstep::cuda
