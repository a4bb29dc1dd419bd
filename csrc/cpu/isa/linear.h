#pragma once

// The epilogues of a product (csrc/math/linear.h), on rows of any length.

#include "../../math/linear.h"
#include "kernels.h"

namespace halfstep::cpu {

using math::LinearActivation;

/// Strides are bytes from one row to the next.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
  Dtype dtype = Dtype::kF32;

  char* row(int64_t i) const { return static_cast<char*>(data) + i * stride; }
  explicit operator bool() const { return data != nullptr; }
};

/// y = act(product + bias) in the compute type, rounded once. The product is in the compute type,
/// or in y's own dtype, whose bytes it may share. `bias`: in the compute type, or null. `saved`: a
/// mask, or h in y's dtype; nothing is kept where it has no data.
struct LinearForward {
  Rows product, y, saved;
  const void* bias = nullptr;
  int64_t columns = 0;
  LinearActivation activation = LinearActivation::kNone;
};

/// dz = dy act'(h), in dy's dtype or the compute type, and sums of its columns before any rounding:
/// row b of `sums` (compute type) has those of rows [b kBiasRows, (b+1) kBiasRows). Both optional.
struct LinearBackward {
  Rows dy, saved, dz, sums;
  int64_t columns = 0;
  LinearActivation activation = LinearActivation::kNone;
};

struct LinearKernels {
  void (*forward)(const LinearForward& work, int64_t begin, int64_t end);
  /// begin is a multiple of kBiasRows where there are sums.
  void (*backward)(const LinearBackward& work, int64_t begin, int64_t end);
  /// Columns [begin, end) of the sum of all rows, in index order in FP64, rounded once to `out`.
  void (*add_rows)(const Rows& sums, int64_t rows, void* out, Dtype out_dtype, int64_t begin,
                   int64_t end);
};

}  // namespace halfstep::cpu

namespace halfstep::cpu::inline HALFSTEP_ISA {

extern const LinearKernels kLinear;

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
