#pragma once

// Where the rows of several tensors lie in memory: the dimensions before the last one, with strides
// of each tensor. A tensor that is broadcast has stride 0 there, so nothing is ever expanded.

#include "platform.h"

namespace halfstep::math {

constexpr int kRowDims = 6;

/// A division of row numbers by a size, without one: a product with the inverse is off by at most
/// one below 2^52 rows. A 64-bit division is a long program on a GPU.
struct Divisor {
  int64_t size = 1;
  double inverse = 1;
  Divisor() = default;
  explicit Divisor(int64_t n) : size(n), inverse(n > 0 ? 1.0 / double(n) : 0) {}
};

/// Sizes and strides in elements; dimension 0 is the outermost. Dimensions that all tensors walk as
/// one are merged by whoever fills this in.
template <int kTensors>
struct RowLayout {
  int dims = 0;
  Divisor size[kRowDims] = {};
  int64_t stride[kTensors][kRowDims] = {};
};

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// row / divisor.size; the remainder is left in `row`.
HALFSTEP_FN int64_t divide(int64_t& row, const Divisor& divisor) {
  int64_t quotient = int64_t(double(row) * divisor.inverse);
  row -= quotient * divisor.size;
  if (row < 0) {
    --quotient;
    row += divisor.size;
  } else if (row >= divisor.size) {
    ++quotient;
    row -= divisor.size;
  }
  return quotient;
}

/// Elements before row `row` of each tensor.
template <int kTensors>
HALFSTEP_FN void row_offsets(const RowLayout<kTensors>& layout, int64_t row,
                             int64_t (&offset)[kTensors]) {
  for (int t = 0; t < kTensors; ++t) offset[t] = 0;
  for (int d = layout.dims - 1; d >= 0; --d) {
    int64_t index = row;
    row = divide(index, layout.size[d]);
    for (int t = 0; t < kTensors; ++t) offset[t] += index * layout.stride[t][d];
  }
}

HALFSTEP_MATH_END
