#include <halfstep/functional/rope.h>

#include "calls.h"

namespace halfstep::functional {

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                bool interleaved) {
  static const auto op =
      api::find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool)>(
          "halfstep::rope");
  return op.call(x, cos, sin, interleaved, false);
}

void rope_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool interleaved) {
  static const auto op =
      api::find_op<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool)>(
          "halfstep::rope_");
  op.call(x, cos, sin, interleaved, false);
}

}  // namespace halfstep::functional
