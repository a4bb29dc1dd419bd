#include <halfstep/functional/loss.h>

#include "calls.h"

namespace halfstep::functional {

using api::OptionalTensor;

at::Tensor cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                         const CrossEntropyOptions& o) {
  static const auto op =
      api::find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                              std::string_view, double, double, const OptionalTensor&)>(
          "halfstep::cross_entropy");
  return op.call(logits, target, o.weight_, o.ignore_index_, o.reduction_, o.label_smoothing_,
                 o.z_loss_, o.grad_scale_);
}

at::Tensor linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& target, const OptionalTensor& bias,
                                const CrossEntropyOptions& o) {
  static const auto op = api::find_op<at::Tensor(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
      const OptionalTensor&, int64_t, std::string_view, double, double, const OptionalTensor&)>(
      "halfstep::linear_cross_entropy");
  return op.call(x, weight, target, bias, o.weight_, o.ignore_index_, o.reduction_,
                 o.label_smoothing_, o.z_loss_, o.grad_scale_);
}

}  // namespace halfstep::functional
