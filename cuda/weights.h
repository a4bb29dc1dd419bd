#pragma once

// A thread's group of consecutive elements of a parameter and its states, as numbers: read from
// what they are held in and written back. The CPU's sixteen-lane twins are csrc/cpu/isa/slots.h and
// states.h; the arithmetic of both is csrc/math. Dtypes and kinds are chosen at run time, once a
// group: all threads of a block take the same way, and one kernel serves every combination.

#include "../csrc/math/optim.h"
#include "floats.h"
#include "reduce.h"

namespace halfstep::cuda {

using math::Dtype;
using math::MasterKind;
using math::StateKind;
using math::StepTensor;

template <class T>
constexpr int kGroup = sizeof(T) == 8 ? 4 : 8;

HALFSTEP_FN float narrow(float x) { return x; }
/// FP64 to FP32 rounded to odd, so that the later rounding to 16 bits is the only one.
HALFSTEP_FN float narrow(double x) { return math::round_to_odd(x); }

template <class T>
HALFSTEP_FN bool is_computed_in(const StepTensor& tensor) {
  const bool wide = tensor.param_dtype == Dtype::kF64 || tensor.master_kind == MasterKind::kF64;
  return wide == (sizeof(T) == 8);
}
HALFSTEP_FN bool is_sixteen(Dtype dtype) { return dtype == Dtype::kF16 || dtype == Dtype::kBF16; }

/// The 16-bit weight would be infinite; false for NaN.
template <class T>
HALFSTEP_FN bool leaves_range(Dtype dtype, T x) {
  if (!is_sixteen(dtype)) return false;
  return math::abs(x) >= T(dtype == Dtype::kF16 ? math::kHalfLimit : math::kBfloatLimit);
}

HALFSTEP_FN float from_sixteen(Dtype dtype, uint16_t bits) {
  return dtype == Dtype::kF16 ? math::half_to_float(bits) : math::bfloat_to_float(bits);
}
HALFSTEP_FN uint16_t to_sixteen(Dtype dtype, float x) {
  return dtype == Dtype::kF16 ? math::float_to_half(x) : math::float_to_bfloat(x);
}

/// The weight that goes with the exact value x under a split master.
HALFSTEP_FN uint16_t split_weight(Dtype dtype, float x) {
  return dtype == Dtype::kF16 ? math::float_to_half(x) : uint16_t(math::bfloat_away(x));
}
template <bool kCoarse>
HALFSTEP_FN int32_t split_remainder(Dtype dtype, float x, uint16_t bits) {
  if (dtype == Dtype::kF16) {
    const float h = math::half_to_float(bits);
    return kCoarse ? math::remainder8_half(x, h) : math::remainder_half(x, h);
  }
  const int32_t h = int16_t(bits);
  return kCoarse ? math::remainder8_bfloat(x, h) : math::remainder_bfloat(x, h);
}
template <bool kCoarse>
HALFSTEP_FN float join_split(Dtype dtype, uint16_t bits, int32_t remainder) {
  if (dtype == Dtype::kF16) {
    const float h = math::half_to_float(bits);
    return kCoarse ? math::join8_half(h, remainder) : math::join_half(h, remainder);
  }
  const int32_t h = int16_t(bits);
  return kCoarse ? math::join8_bfloat(h, remainder) : math::join_bfloat(h, remainder);
}
/// The rounding error of the weight, short of the middle between two weights.
HALFSTEP_FN uint16_t kahan_error(Dtype dtype, float x, uint16_t bits) {
  const float weight = from_sixteen(dtype, bits), error = x - weight;
  const uint16_t kept = to_sixteen(dtype, error == error ? error : 0.0f);
  const float rounded = from_sixteen(dtype, to_sixteen(dtype, weight + from_sixteen(dtype, kept)));
  return rounded != weight && weight == weight ? uint16_t(kept - 1) : kept;
}

/// The exact weights of elements [i, i + lanes).
template <class T>
HALFSTEP_FN Group<T, kGroup<T>> read_weights(const StepTensor& t, int64_t i, int lanes) {
  constexpr int kCount = kGroup<T>;
  Group<T, kCount> x;
  const auto* bits = static_cast<const uint16_t*>(t.param);
  const auto split = [&](auto coarse, const auto* master) {
    const auto h = read_group<kCount>(bits, i, lanes);
    const auto remainder = read_group<kCount>(master, i, lanes);
    HALFSTEP_UNROLL
    for (int k = 0; k < kCount; ++k)
      x.x[k] = join_split<coarse.value>(t.param_dtype, h.x[k], remainder.x[k]);
  };
  switch (t.master_kind) {
    case MasterKind::kSplit16:
      split(std::false_type(), static_cast<const int16_t*>(t.master));
      break;
    case MasterKind::kSplit8:
      split(std::true_type(), static_cast<const int8_t*>(t.master));
      break;
    case MasterKind::kKahan: {
      const auto error = read_floats<T, kCount>(t.master, t.param_dtype, i, lanes);
      x = read_floats<T, kCount>(t.param, t.param_dtype, i, lanes);
      HALFSTEP_UNROLL
      for (int k = 0; k < kCount; ++k) x.x[k] = x.x[k] + error.x[k];
      break;
    }
    case MasterKind::kF32:
    case MasterKind::kF64:
      x = read_group<kCount>(static_cast<const T*>(t.master), i, lanes);
      break;
    default:
      x = read_floats<T, kCount>(t.param, t.param_dtype, i, lanes);
  }
  return x;
}

/// Weights rounded once from exact values.
template <class T>
HALFSTEP_FN void write_params(const StepTensor& t, int64_t i, int lanes,
                              const Group<T, kGroup<T>>& x) {
  constexpr int kCount = kGroup<T>;
  if (is_sixteen(t.param_dtype)) {
    Group<uint16_t, kCount> bits;
    HALFSTEP_UNROLL
    for (int k = 0; k < kCount; ++k) bits.x[k] = to_sixteen(t.param_dtype, narrow(x.x[k]));
    write_group<kCount>(static_cast<uint16_t*>(t.param), i, lanes, bits);
  } else {
    write_floats<T, kCount>(t.param, t.param_dtype, i, lanes, x);
  }
}

/// Weights and masters of exact values; `random`: the key of kStochastic, 0 for nearest rounding.
/// `params` false: masters only.
template <class T>
HALFSTEP_FN void write_weights(const StepTensor& t, int64_t i, int lanes,
                               const Group<T, kGroup<T>>& x, uint32_t random, bool params = true) {
  constexpr int kCount = kGroup<T>;
  Group<uint16_t, kCount> bits;
  const auto split = [&](auto coarse, auto* master) {
    Group<std::decay_t<decltype(*master)>, kCount> remainder;
    HALFSTEP_UNROLL
    for (int k = 0; k < kCount; ++k) {
      bits.x[k] = split_weight(t.param_dtype, float(x.x[k]));
      remainder.x[k] = static_cast<std::decay_t<decltype(*master)>>(
          split_remainder<coarse.value>(t.param_dtype, float(x.x[k]), bits.x[k]));
    }
    write_group<kCount>(master, i, lanes, remainder);
    if (params) write_group<kCount>(static_cast<uint16_t*>(t.param), i, lanes, bits);
  };
  switch (t.master_kind) {
    case MasterKind::kSplit16:
      return split(std::false_type(), static_cast<int16_t*>(t.master));
    case MasterKind::kSplit8:
      return split(std::true_type(), static_cast<int8_t*>(t.master));
    case MasterKind::kKahan: {
      Group<uint16_t, kCount> error;
      HALFSTEP_UNROLL
      for (int k = 0; k < kCount; ++k) {
        bits.x[k] = to_sixteen(t.param_dtype, float(x.x[k]));
        error.x[k] = kahan_error(t.param_dtype, float(x.x[k]), bits.x[k]);
      }
      write_group<kCount>(static_cast<uint16_t*>(t.master), i, lanes, error);
      if (params) write_group<kCount>(static_cast<uint16_t*>(t.param), i, lanes, bits);
      return;
    }
    case MasterKind::kStochastic: {
      if (random == 0) break;
      Group<T, kCount> rounded;
      HALFSTEP_UNROLL
      for (int k = 0; k < kCount; ++k) {
        const uint32_t dice =
            math::random_bits<uint32_t>(math::random_base(random, math::kWeightStream, i), i + k);
        rounded.x[k] = t.param_dtype == Dtype::kF16
                           ? math::round_half_at_random(float(x.x[k]), dice)
                           : math::round_bfloat_at_random(float(x.x[k]), dice);
      }
      return write_params<T>(t, i, lanes, rounded);
    }
    case MasterKind::kF32:
    case MasterKind::kF64:
      write_group<kCount>(static_cast<T*>(t.master), i, lanes, x);
      break;
    default:
      break;
  }
  if (params) write_params<T>(t, i, lanes, x);
}

/// State s of a group. A group lies in one block of an int8 state.
template <bool kSigned, class T>
HALFSTEP_FN Group<T, kGroup<T>> read_states(const StepTensor& t, int s, int64_t i, int lanes) {
  constexpr int kCount = kGroup<T>;
  if constexpr (sizeof(T) == 4) {
    if (t.state_kind == StateKind::kBF16)
      return read_floats<T, kCount>(t.state[s], Dtype::kBF16, i, lanes);
    if (t.state_kind == StateKind::kInt8) {
      using Code = std::conditional_t<kSigned, int8_t, uint8_t>;
      const auto codes = read_group<kCount>(static_cast<const Code*>(t.state[s]), i, lanes);
      const int exponent = lanes > 0 ? read_uniform(t.exponent[s] + i / math::kStateBlock) : 0;
      Group<T, kCount> x;
      HALFSTEP_UNROLL
      for (int k = 0; k < kCount; ++k)
        x.x[k] = math::decode_state<kSigned, false, float>(int32_t(codes.x[k]), exponent);
      return x;
    }
  }
  return read_group<kCount>(static_cast<const T*>(t.state[s]), i, lanes);
}

/// All 32 threads of a warp take part where the state is int8: sixteen of them share a block.
template <bool kSigned, class T>
HALFSTEP_FN void write_states(const StepTensor& t, int s, int64_t i, int lanes,
                              const Group<T, kGroup<T>>& x, uint32_t random) {
  constexpr int kCount = kGroup<T>;
  if constexpr (sizeof(T) == 4) {
    const uint32_t base = math::random_base(random, math::state_stream(s), i);
    if (t.state_kind == StateKind::kBF16) {
      Group<uint16_t, kCount> bits;
      HALFSTEP_UNROLL
      for (int k = 0; k < kCount; ++k) {
        const uint32_t dice = math::state_dice(s, math::random_bits<uint32_t>(base, i + k));
        bits.x[k] = uint16_t(math::bfloat_at_random(x.x[k], dice));
      }
      return write_group<kCount>(static_cast<uint16_t*>(t.state[s]), i, lanes, bits);
    }
    if (t.state_kind == StateKind::kInt8) {
      Group<float, kCount> coded;
      int32_t largest = 0;
      HALFSTEP_UNROLL
      for (int k = 0; k < kCount; ++k) {
        coded.x[k] = math::coded_value<kSigned>(x.x[k]);
        if (k < lanes) largest = math::max(largest, math::size_bits(coded.x[k]));
      }
      static_assert(math::kStateBlock == 16 * kCount);
      for (int distance = 1; distance < 16; distance *= 2) {
        largest = math::max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
      }
      const int exponent = math::scale_exponent<kSigned>(largest);
      Group<int8_t, kCount> codes;
      HALFSTEP_UNROLL
      for (int k = 0; k < kCount; ++k) {
        const uint32_t dice = math::block_dice<uint32_t>(s, base, i + k);
        codes.x[k] = int8_t(math::encode_state<kSigned>(coded.x[k], exponent, dice));
      }
      write_group<kCount>(static_cast<int8_t*>(t.state[s]), i, lanes, codes);
      if (i % math::kStateBlock == 0 && lanes > 0)
        write(t.exponent[s] + i / math::kStateBlock, int8_t(exponent));
      return;
    }
  }
  write_group<kCount>(static_cast<T*>(t.state[s]), i, lanes, x);
}

}  // namespace halfstep::cuda
