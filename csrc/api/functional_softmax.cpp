#include <halfstep/functional/softmax.h>

#include "calls.h"

namespace halfstep::functional {

at::Tensor softmax(const at::Tensor& x, int64_t dim, double scale,
                   const std::optional<at::Tensor>& mask, bool causal) {
  static const auto op =
      api::find_op<at::Tensor(const at::Tensor&, int64_t, double, const std::optional<at::Tensor>&,
                              bool)>("halfstep::softmax");
  return op.call(x, dim, scale, mask, causal);
}

}  // namespace halfstep::functional
