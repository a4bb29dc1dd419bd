#pragma once

#include <ATen/core/Tensor.h>

#include "../export.h"

namespace halfstep::functional {

/// Turns pairs of x's last dimension: (a, b) to (a cos - b sin, b cos + a sin), in FP32 (FP64 for
/// FP64) and rounded once. cos, sin: [..., pairs], broadcast to x's shape but for the last
/// dimension, without gradient. Pair i is elements i and pairs + i, or 2i and 2i + 1 where
/// `interleaved`; the elements after them pass.
HALFSTEP_API at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                             bool interleaved = false);
/// The same in place.
HALFSTEP_API void rope_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                        bool interleaved = false);

}  // namespace halfstep::functional
