#include <halfstep/functional/scale_gradient.h>

#include <ATen/ops/full.h>

#include "calls.h"

namespace halfstep::functional {

at::Tensor scale_gradient(const at::Tensor& x, const at::Tensor& scale) {
  static const auto op =
      api::find_op<at::Tensor(const at::Tensor&, const at::Tensor&)>("halfstep::scale_gradient");
  return op.call(x, scale);
}

at::Tensor scale_gradient(const at::Tensor& x, double scale) {
  return scale_gradient(x,
                        at::full({}, scale, x.options().dtype(at::kDouble).requires_grad(false)));
}

}  // namespace halfstep::functional
