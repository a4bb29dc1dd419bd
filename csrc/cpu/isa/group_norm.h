#pragma once

// CPU kernels of GroupNorm in FP16. A row is one group of one sample: `channels` runs of `pixels`
// elements, one after the other; pixels is at least 16. No torch here.

#include <cstdint>

#include "../../math/platform.h"

namespace halfstep::cpu {

struct GroupNorm {
  const uint16_t* x = nullptr;    ///< [samples * groups, channels * pixels]
  const float* weight = nullptr;  ///< [groups * channels], or null for ones
  const float* bias = nullptr;    ///< the same, or null for zeros
  int64_t groups = 0, channels = 0, pixels = 0;
};

struct GroupNormKernels {
  /// y, and the mean and rstd of each row in [begin, end).
  void (*forward)(const GroupNorm& work, double eps, uint16_t* y, uint16_t* mean, uint16_t* rstd,
                  int64_t begin, int64_t end);
  /// dx (or null) of the rows in [begin, end), from dy and what the forward gave; and each
  /// channel's share of the gradients of weight and bias in [samples * groups * channels].
  void (*backward)(const GroupNorm& work, const uint16_t* dy, const uint16_t* mean,
                   const uint16_t* rstd, uint16_t* dx, double* weight_shares, double* bias_shares,
                   int64_t begin, int64_t end);
};

inline namespace HALFSTEP_ISA {
extern const GroupNormKernels kGroupNorm;
}

}  // namespace halfstep::cpu
