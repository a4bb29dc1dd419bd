#pragma once

// CPU kernels of a 16-bit matrix times a vector. No torch here.

#include <cstdint>

#include "../../math/platform.h"

namespace halfstep::cpu {

/// FP16 or BF16, all of them; sums in FP32, of 64 terms at a time in FP64, rounded once.
struct MatrixVector {
  math::Dtype dtype = math::Dtype::kF16;
  const void* a = nullptr;  ///< [rows, columns], columns side by side
  const void* x = nullptr;
  void* y = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t stride = 0;  ///< elements from one row to the next
};

struct MatrixVectorKernels {
  /// y[r] = sum of a[r][c] x[c] over c, for the rows [begin, end).
  void (*rows)(const MatrixVector& work, int64_t begin, int64_t end);
  /// y[c] = sum of a[r][c] x[r] over r, for the columns [begin, end), begin a multiple of 16.
  void (*columns)(const MatrixVector& work, int64_t begin, int64_t end);
};

inline namespace HALFSTEP_ISA {
extern const MatrixVectorKernels kMatrixVector;
}

}  // namespace halfstep::cpu
