#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "export.h"

namespace halfstep {

/// What FP16 would make of the elements of a wide tensor, at a scale. Exact: x * scale is taken in
/// FP64. Counts, and the largest finite |x * scale|.
struct HALFSTEP_API Shares {
  int64_t count = 0;
  int64_t nonzero = 0;    ///< finite and not 0; -0 is 0
  int64_t underflow = 0;  ///< of these, 0 in FP16: |x * scale| <= 2^-25
  int64_t subnormal = 0;  ///< of these, subnormal in FP16
  int64_t overflow = 0;   ///< inf in FP16: |x * scale| >= 65520, or already inf or NaN
  int64_t saturated = 0;  ///< |x * scale| > 32752, overflow too
  int64_t lost = 0;       ///< of the non-zeros, those that are 0 in `stored`; 0 without it
  double amax = 0;

  Shares& operator+=(const Shares& other);
  /// log2(65504 / amax): bits between the largest magnitude and the end of FP16.
  std::optional<double> headroom() const;
};

/// Shares of a dense floating tensor. `stored`: what the 16-bit run has in its place, or, as bool,
/// where that is not 0. Waits for the device.
HALFSTEP_API Shares shares(const at::Tensor& reference, double scale = 1.0,
                           const at::Tensor& stored = {});

}  // namespace halfstep
