#pragma once

#include <torch/nn/modules/normalization.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../export.h"

namespace halfstep::nn {

/// torch::nn::LayerNorm computed by halfstep: its options, parameters and names.
class HALFSTEP_API LayerNormImpl : public torch::nn::LayerNormImpl {
 public:
  using torch::nn::LayerNormImpl::LayerNormImpl;
  /// Of torch's layer: its options and mode, and the same tensors.
  explicit LayerNormImpl(const torch::nn::LayerNormImpl& stock) : torch::nn::LayerNormImpl(stock) {}
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
  at::Tensor forward(const at::Tensor& x);
  /// (y, new residual): see functional::layer_norm.
  std::tuple<at::Tensor, at::Tensor> forward_residual(const at::Tensor& x,
                                                      const at::Tensor& residual);
};
TORCH_MODULE(LayerNorm);

struct HALFSTEP_API RMSNormOptions {
  /* implicit */ RMSNormOptions(std::vector<int64_t> normalized_shape);
  TORCH_ARG(std::vector<int64_t>, normalized_shape);
  /// That of x's dtype unless given.
  TORCH_ARG(std::optional<double>, eps) = std::nullopt;
  TORCH_ARG(bool, elementwise_affine) = true;
  /// The factor is weight + weight_offset; the weight begins at 1 - weight_offset.
  TORCH_ARG(double, weight_offset) = 0;
};

/// RMSNorm with the parameter names of Python's torch.nn.RMSNorm.
class HALFSTEP_API RMSNormImpl : public torch::nn::Cloneable<RMSNormImpl> {
 public:
  RMSNormImpl(std::vector<int64_t> normalized_shape)
      : RMSNormImpl(RMSNormOptions(std::move(normalized_shape))) {}
  explicit RMSNormImpl(RMSNormOptions options);
  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x);
  /// (y, new residual): see functional::rms_norm.
  std::tuple<at::Tensor, at::Tensor> forward_residual(const at::Tensor& x,
                                                      const at::Tensor& residual);

  RMSNormOptions options;
  at::Tensor weight;
};
TORCH_MODULE(RMSNorm);

}  // namespace halfstep::nn
