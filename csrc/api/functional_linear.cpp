#include <halfstep/functional/linear.h>

#include "calls.h"

namespace halfstep::functional {

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                  std::optional<std::string_view> activation) {
  static const auto op =
      api::find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const api::OptionalTensor&,
                              std::optional<std::string_view>)>("halfstep::linear");
  return op.call(x, weight, bias.defined() ? api::OptionalTensor(bias) : std::nullopt, activation);
}

}  // namespace halfstep::functional
