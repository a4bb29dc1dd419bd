#pragma once

#include "platform.h"

#if defined(__CUDA_ARCH__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

HALFSTEP_MATH_BEGIN

/// IEEE binary16 bits -> float, exact; a signalling NaN becomes quiet with its payload kept.
HALFSTEP_FN float half_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(h));
#else
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // inf, NaN
    const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) | quiet);
  }
  if (magnitude < 0x400u) {  // zero, subnormal: an integer times 2^-24, exact in float
    const float value = float(magnitude) * 0x1p-24f;
    return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
  }
  return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
#endif
}

/// float -> binary16 bits, round to nearest even; |x| >= 65520 becomes inf.
HALFSTEP_FN uint16_t float_to_half(float x) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and beyond
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded count of 2^-24
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
#endif
}

HALFSTEP_FN float bfloat_to_float(uint16_t b) { return bit_cast<float>(uint32_t(b) << 16); }

/// float -> bfloat16 bits, round to nearest even; NaN stays NaN.
HALFSTEP_FN uint16_t float_to_bfloat(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// double -> float rounded to odd: a second rounding to 16 bits is then the only one that counts.
HALFSTEP_FN float round_to_odd(double x) {
  const float nearest = float(x);
  const double back = nearest;
  if (back == x || x != x) return nearest;
  uint32_t bits = bit_cast<uint32_t>(nearest);
  const double magnitude = x < 0 ? -x : x;
  const double nearest_magnitude = back < 0 ? -back : back;
  if (nearest_magnitude > magnitude) bits -= 1;
  return bit_cast<float>(bits | 1u);
}

/// x rounded once to `dtype`, as element i of `to`.
HALFSTEP_FN void store_rounded(void* to, Dtype dtype, int64_t i, double x) {
  switch (dtype) {
    case Dtype::kF16:
      static_cast<uint16_t*>(to)[i] = float_to_half(round_to_odd(x));
      break;
    case Dtype::kBF16:
      static_cast<uint16_t*>(to)[i] = float_to_bfloat(round_to_odd(x));
      break;
    case Dtype::kF32:
      static_cast<float*>(to)[i] = float(x);
      break;
    default:
      static_cast<double*>(to)[i] = x;
  }
}

HALFSTEP_MATH_END
