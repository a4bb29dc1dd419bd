#pragma once

// CPU kernels of the largest and the smallest element of FP16 rows. No torch here.

#include <cstdint>

#include "../../math/platform.h"

namespace halfstep::cpu {

struct ExtremeRows {
  const uint16_t* x = nullptr;  ///< [rows, n]
  int64_t n = 0;                ///< at least 1
  uint16_t* values = nullptr;   ///< [rows]
  int64_t* indices = nullptr;   ///< [rows]
};

/// Rows [begin, end): the first of the largest elements; where the row has a NaN, the first of
/// those. `smallest`: of the smallest.
using ExtremeKernel = void (*)(const ExtremeRows& work, bool smallest, int64_t begin, int64_t end);

inline namespace HALFSTEP_ISA {
void extreme(const ExtremeRows& work, bool smallest, int64_t begin, int64_t end);
}

}  // namespace halfstep::cpu
