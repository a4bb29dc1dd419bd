#include <halfstep/nn/loss.h>

#include <ATen/core/Reduction.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <ostream>

#include "../ops/optional.h"

namespace halfstep::nn {

namespace {

functional::CrossEntropyOptions with(functional::CrossEntropyOptions options,
                                     const at::Tensor& weight,
                                     const std::optional<at::Tensor>& grad_scale) {
  options.weight_ = ops::given(weight);
  if (grad_scale) options.grad_scale_ = grad_scale;
  return options;
}

using TorchReduction = torch::nn::CrossEntropyLossOptions::reduction_t;

functional::CrossEntropyOptions options_of(const torch::nn::CrossEntropyLossImpl& stock) {
  const TorchReduction& reduction = stock.options.reduction();
  functional::CrossEntropyOptions options;
  options.weight_ = ops::given(stock.weight);
  options.ignore_index(stock.options.ignore_index());
  options.label_smoothing(stock.options.label_smoothing());
  return options.reduction(std::holds_alternative<torch::enumtype::kNone>(reduction)  ? "none"
                           : std::holds_alternative<torch::enumtype::kSum>(reduction) ? "sum"
                                                                                      : "mean");
}

at::Reduction::Reduction reduction_of(const std::string& name) {
  return name == "none"  ? at::Reduction::None
         : name == "sum" ? at::Reduction::Sum
                         : at::Reduction::Mean;
}

}  // namespace

CrossEntropyLossImpl::CrossEntropyLossImpl(functional::CrossEntropyOptions o)
    : options(std::move(o)) {
  CrossEntropyLossImpl::reset();
}
CrossEntropyLossImpl::CrossEntropyLossImpl(const torch::nn::CrossEntropyLossImpl& stock)
    : CrossEntropyLossImpl(options_of(stock)) {
  train(stock.is_training());
}
void CrossEntropyLossImpl::reset() {
  weight = register_buffer("weight", options.weight_.value_or(at::Tensor()));
}
void CrossEntropyLossImpl::pretty_print(std::ostream& stream) const {
  stream << "halfstep::nn::CrossEntropyLoss()";
}
at::Tensor CrossEntropyLossImpl::forward(const at::Tensor& input, const at::Tensor& target,
                                         const std::optional<at::Tensor>& grad_scale) {
  const auto o = with(options, weight, grad_scale);
  if (target.is_floating_point() && o.z_loss_ == 0 && !o.grad_scale_)
    return at::cross_entropy_loss(input, target, o.weight_, reduction_of(o.reduction_),
                                  o.ignore_index_, o.label_smoothing_);
  return functional::cross_entropy(input, target, o);
}

LinearCrossEntropyLossImpl::LinearCrossEntropyLossImpl(LinearCrossEntropyLossOptions o,
                                                       const at::Tensor& tied)
    : options(std::move(o)) {
  if (tied.defined()) {
    TORCH_CHECK(tied.dim() == 2 && tied.size(0) == options.num_classes_ &&
                    tied.size(1) == options.in_features_,
                "LinearCrossEntropyLoss: tied is ", tied.toString(), tied.sizes(), "; expected [",
                options.num_classes_, ", ", options.in_features_, "]");
    weight = register_parameter("weight", tied, tied.requires_grad());
    if (options.bias_)
      bias = register_parameter(
          "bias", at::empty({options.num_classes_}, tied.options().requires_grad(false)).zero_());
    class_weight = register_buffer("class_weight", options.loss_.weight_.value_or(at::Tensor()));
  } else {
    LinearCrossEntropyLossImpl::reset();
  }
}
void LinearCrossEntropyLossImpl::reset() {
  // torch::nn::Linear's: uniform within 1 / sqrt(in_features).
  const double bound = options.in_features_ > 0 ? 1 / std::sqrt(double(options.in_features_)) : 0;
  weight = register_parameter(
      "weight", at::empty({options.num_classes_, options.in_features_}).uniform_(-bound, bound));
  if (options.bias_)
    bias = register_parameter("bias", at::empty({options.num_classes_}).uniform_(-bound, bound));
  class_weight = register_buffer("class_weight", options.loss_.weight_.value_or(at::Tensor()));
}
void LinearCrossEntropyLossImpl::pretty_print(std::ostream& stream) const {
  stream << "halfstep::nn::LinearCrossEntropyLoss(in_features=" << options.in_features_
         << ", num_classes=" << options.num_classes_ << ", bias=" << options.bias_ << ")";
}
at::Tensor LinearCrossEntropyLossImpl::forward(const at::Tensor& x, const at::Tensor& target,
                                               const std::optional<at::Tensor>& grad_scale) {
  return functional::linear_cross_entropy(x, weight, target, ops::given(bias),
                                          with(options.loss_, class_weight, grad_scale));
}
at::Tensor LinearCrossEntropyLossImpl::logits(const at::Tensor& x) {
  return at::linear(x, weight, ops::given(bias));
}

}  // namespace halfstep::nn
