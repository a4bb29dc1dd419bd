#pragma once

#include <torch/nn/modules/activation.h>

#include <optional>

#include "../export.h"

namespace halfstep::nn {

struct HALFSTEP_API SoftmaxOptions : torch::nn::SoftmaxOptions {
  /* implicit */ SoftmaxOptions(int64_t dim) : torch::nn::SoftmaxOptions(dim) {}
  TORCH_ARG(double, scale) = 1;
  TORCH_ARG(bool, causal) = false;
};

/// torch::nn::Softmax with a scale and masks: functional::softmax.
class HALFSTEP_API SoftmaxImpl : public torch::nn::SoftmaxImpl {
 public:
  explicit SoftmaxImpl(const SoftmaxOptions& options);
  explicit SoftmaxImpl(int64_t dim) : SoftmaxImpl(SoftmaxOptions(dim)) {}
  /// Of torch's layer: its dimension and mode.
  explicit SoftmaxImpl(const torch::nn::SoftmaxImpl& stock);
  at::Tensor forward(const at::Tensor& x, const std::optional<at::Tensor>& mask = {});
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
  void pretty_print(std::ostream& stream) const override;

  double scale;
  bool causal;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(Softmax);

}  // namespace halfstep::nn
