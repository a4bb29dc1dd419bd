#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../export.h"

namespace halfstep::functional {

/// softmax(scale * x + mask) along `dim`, in FP32 (FP64 for FP64) and rounded once to x's dtype.
/// mask, broadcast to x: bool, true takes part; or floating, added, -inf takes no part. causal: in
/// [..., queries, keys] query i sees keys 0 … i. What takes no part is an exact zero, whatever its
/// value; a row of nothing else is zeros, with zero gradient.
HALFSTEP_API at::Tensor softmax(const at::Tensor& x, int64_t dim = -1, double scale = 1,
                                const std::optional<at::Tensor>& mask = {}, bool causal = false);

}  // namespace halfstep::functional
