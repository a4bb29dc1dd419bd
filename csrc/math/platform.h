#pragma once

// What every formula header stands on: no torch, no CUDA runtime, the standard library's types
// only.

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define HALFSTEP_FN __host__ __device__ __forceinline__
#else
#define HALFSTEP_FN inline __attribute__((always_inline))
#endif

// The CPU kernels are compiled once per instruction set. Each compilation lives in a namespace of
// its own, so that the linker can never keep an AVX-512 copy of a function that a plain CPU then
// calls.
#ifndef HALFSTEP_ISA
#define HALFSTEP_ISA isa_generic
#endif

#define HALFSTEP_MATH_BEGIN  \
  namespace halfstep::math { \
  inline namespace HALFSTEP_ISA {
#define HALFSTEP_MATH_END \
  }                       \
  }

// Plain data types are the same in every compilation and stay outside that namespace.
namespace halfstep::math {

/// Element types a kernel meets. The numbers go through descriptor tables to the device.
enum class Dtype : int32_t { kF16 = 0, kBF16 = 1, kF32 = 2, kF64 = 3 };

/// How the exact weight behind a parameter is kept.
enum class MasterKind : int32_t {
  kNone = 0,     ///< in the parameter itself
  kSplit16 = 1,  ///< an int16 remainder beside a 16-bit parameter
  kF32 = 2,      ///< a full copy
  kF64 = 3,
  kSplit8 = 4,      ///< an int8 remainder beside a 16-bit parameter
  kKahan = 5,       ///< the rounding error, in the parameter's own 16-bit dtype
  kStochastic = 6,  ///< in the 16-bit parameter, rounded at random
};

/// Reductions run over blocks of this many elements, summed in index order.
constexpr int64_t kBlock = 4096;
/// Virtual lanes of a reduction, whatever the width of the registers.
constexpr int kLanes = 16;

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

template <class To, class From>
HALFSTEP_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
#if defined(__CUDA_ARCH__)
  union {
    From from;
    To to;
  } pun{from};
  return pun.to;
#else
  return __builtin_bit_cast(To, from);
#endif
}

HALFSTEP_FN constexpr int64_t dtype_size(Dtype dtype) {
  return dtype == Dtype::kF64 ? 8 : dtype == Dtype::kF32 ? 4 : 2;
}

HALFSTEP_MATH_END
