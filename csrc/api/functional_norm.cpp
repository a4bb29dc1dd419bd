#include <halfstep/functional/norm.h>

#include <limits>

#include "calls.h"

namespace halfstep::functional {

namespace {

using api::OptionalTensor;
using std::get;

auto call_layer_norm(const at::Tensor& x, at::IntArrayRef shape, const OptionalTensor& weight,
                     const OptionalTensor& bias, double eps, const OptionalTensor& residual) {
  static const auto op = api::find_op<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, c10::SymIntArrayRef, const OptionalTensor&, const OptionalTensor&, double,
      const OptionalTensor&)>("halfstep::layer_norm");
  return op.call(x, c10::fromIntArrayRefSlow(shape), weight, bias, eps, residual);
}

double eps_of(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return 0x1p-10;
    case at::kBFloat16:
      return 0x1p-7;
    case at::kFloat:
      return std::numeric_limits<float>::epsilon();
    default:
      return std::numeric_limits<double>::epsilon();
  }
}

auto call_rms_norm(const at::Tensor& x, at::IntArrayRef shape, const OptionalTensor& weight,
                   std::optional<double> eps, double weight_offset,
                   const OptionalTensor& residual) {
  static const auto op = api::find_op<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, c10::SymIntArrayRef, const OptionalTensor&, double, double,
      const OptionalTensor&)>("halfstep::rms_norm");
  return op.call(x, c10::fromIntArrayRefSlow(shape), weight, eps.value_or(eps_of(x.scalar_type())),
                 weight_offset, residual);
}

}  // namespace

at::Tensor layer_norm(const at::Tensor& x, at::IntArrayRef normalized_shape,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  return get<0>(call_layer_norm(x, normalized_shape, weight, bias, eps, std::nullopt));
}
std::tuple<at::Tensor, at::Tensor> layer_norm(const at::Tensor& x, at::IntArrayRef normalized_shape,
                                              const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps,
                                              const at::Tensor& residual) {
  const auto out = call_layer_norm(x, normalized_shape, weight, bias, eps, residual);
  return {get<0>(out), get<1>(out)};
}

at::Tensor rms_norm(const at::Tensor& x, at::IntArrayRef normalized_shape,
                    const OptionalTensor& weight, std::optional<double> eps, double weight_offset) {
  return get<0>(call_rms_norm(x, normalized_shape, weight, eps, weight_offset, std::nullopt));
}
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, at::IntArrayRef normalized_shape,
                                            const OptionalTensor& weight, std::optional<double> eps,
                                            const at::Tensor& residual, double weight_offset) {
  const auto out = call_rms_norm(x, normalized_shape, weight, eps, weight_offset, residual);
  return {get<0>(out), get<1>(out)};
}

}  // namespace halfstep::functional
