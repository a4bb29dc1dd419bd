#pragma once

#include <ATen/core/Tensor.h>

#include "../export.h"

namespace halfstep::functional {

/// x, with a gradient that is multiplied by `scale` on its way back, in FP32 and rounded once to
/// its dtype. `scale`: one floating-point element on x's device, which is read there.
HALFSTEP_API at::Tensor scale_gradient(const at::Tensor& x, const at::Tensor& scale);
HALFSTEP_API at::Tensor scale_gradient(const at::Tensor& x, double scale);

}  // namespace halfstep::functional
