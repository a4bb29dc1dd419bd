#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/loss.h>
#include <torch/nn/pimpl.h>

#include "../functional/loss.h"

namespace halfstep::nn {

/// torch::nn::CrossEntropyLoss for class indices, computed by functional::cross_entropy. `weight`
/// is a buffer, as there. Targets that are class probabilities go to torch's own function, where
/// there is neither z_loss nor grad_scale.
class HALFSTEP_API CrossEntropyLossImpl : public torch::nn::Cloneable<CrossEntropyLossImpl> {
 public:
  explicit CrossEntropyLossImpl(functional::CrossEntropyOptions options = {});
  /// Of torch's layer: its options and mode, and the same weight.
  explicit CrossEntropyLossImpl(const torch::nn::CrossEntropyLossImpl& stock);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& input, const at::Tensor& target,
                     const std::optional<at::Tensor>& grad_scale = {});

  functional::CrossEntropyOptions options;
  at::Tensor weight;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(CrossEntropyLoss);

struct LinearCrossEntropyLossOptions {
  LinearCrossEntropyLossOptions(int64_t in_features, int64_t num_classes)
      : in_features_(in_features), num_classes_(num_classes) {}
  int64_t in_features_, num_classes_;
  bool bias_ = false;
  functional::CrossEntropyOptions loss_;

  LinearCrossEntropyLossOptions& bias(bool x) { return bias_ = x, *this; }
  LinearCrossEntropyLossOptions& loss(functional::CrossEntropyOptions x) {
    return loss_ = std::move(x), *this;
  }
};

/// A linear layer and its cross entropy in one. Parameters as in torch::nn::Linear; `tied`, a
/// parameter [num_classes, in_features] of another module, is used instead of an own weight.
class HALFSTEP_API LinearCrossEntropyLossImpl
    : public torch::nn::Cloneable<LinearCrossEntropyLossImpl> {
 public:
  explicit LinearCrossEntropyLossImpl(LinearCrossEntropyLossOptions options,
                                      const at::Tensor& tied = {});
  LinearCrossEntropyLossImpl(int64_t in_features, int64_t num_classes)
      : LinearCrossEntropyLossImpl(LinearCrossEntropyLossOptions(in_features, num_classes)) {}
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x, const at::Tensor& target,
                     const std::optional<at::Tensor>& grad_scale = {});
  /// x weight^T + bias, for evaluation.
  at::Tensor logits(const at::Tensor& x);

  LinearCrossEntropyLossOptions options;
  at::Tensor weight, bias, class_weight;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(LinearCrossEntropyLoss);

}  // namespace halfstep::nn
