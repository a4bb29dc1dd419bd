#include <halfstep/functional/norm.h>
#include <halfstep/nn/norm.h>

#include <ATen/ops/empty.h>
#include <torch/nn/init.h>

#include <ostream>
#include <utility>

#include "../ops/optional.h"

namespace halfstep::nn {

std::shared_ptr<torch::nn::Module> LayerNormImpl::clone(
    const std::optional<torch::Device>& device) const {
  // torch's clone() makes torch's layer of the copied tensors, and this one takes them over.
  const auto copy = torch::nn::LayerNormImpl::clone(device);
  return std::make_shared<LayerNormImpl>(*copy->as<torch::nn::LayerNormImpl>());
}
at::Tensor LayerNormImpl::forward(const at::Tensor& x) {
  return functional::layer_norm(x, options.normalized_shape(), ops::given(weight), ops::given(bias),
                                options.eps());
}
std::tuple<at::Tensor, at::Tensor> LayerNormImpl::forward_residual(const at::Tensor& x,
                                                                   const at::Tensor& residual) {
  return functional::layer_norm(x, options.normalized_shape(), ops::given(weight), ops::given(bias),
                                options.eps(), residual);
}

RMSNormOptions::RMSNormOptions(std::vector<int64_t> normalized_shape)
    : normalized_shape_(std::move(normalized_shape)) {}

RMSNormImpl::RMSNormImpl(RMSNormOptions options) : options(std::move(options)) {
  // Not virtual here: there is no derived class yet.
  RMSNormImpl::reset();
}
void RMSNormImpl::reset() {
  if (options.elementwise_affine())
    weight = register_parameter("weight", at::empty(options.normalized_shape()));
  else
    weight = register_parameter("weight", at::Tensor(), false);
  reset_parameters();
}
void RMSNormImpl::reset_parameters() {
  if (weight.defined()) torch::nn::init::constant_(weight, 1 - options.weight_offset());
}
void RMSNormImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "halfstep::nn::RMSNorm("
         << at::IntArrayRef(options.normalized_shape()) << ", eps=";
  if (options.eps())
    stream << *options.eps();
  else
    stream << "None";
  stream << ", elementwise_affine=" << options.elementwise_affine();
  if (options.weight_offset() != 0) stream << ", weight_offset=" << options.weight_offset();
  stream << ")";
}
at::Tensor RMSNormImpl::forward(const at::Tensor& x) {
  return functional::rms_norm(x, options.normalized_shape(), ops::given(weight), options.eps(),
                              options.weight_offset());
}
std::tuple<at::Tensor, at::Tensor> RMSNormImpl::forward_residual(const at::Tensor& x,
                                                                 const at::Tensor& residual) {
  return functional::rms_norm(x, options.normalized_shape(), ops::given(weight), options.eps(),
                              residual, options.weight_offset());
}

}  // namespace halfstep::nn
