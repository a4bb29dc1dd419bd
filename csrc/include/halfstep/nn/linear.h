#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>

#include <memory>
#include <optional>
#include <string>

#include "../export.h"

namespace halfstep::nn {

struct HALFSTEP_API LinearOptions {
  LinearOptions(int64_t in_features, int64_t out_features)
      : in_features_(in_features), out_features_(out_features) {}
  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, out_features);
  TORCH_ARG(bool, bias) = true;
  /// None, "relu", "gelu" or "gelu_tanh".
  TORCH_ARG(std::optional<std::string>, activation) = std::nullopt;
};

/// torch::nn::Linear followed by an activation, in one op: functional::linear. Parameters and names
/// are torch's.
class HALFSTEP_API LinearImpl : public torch::nn::LinearImpl {
 public:
  LinearImpl(int64_t in_features, int64_t out_features)
      : LinearImpl(LinearOptions(in_features, out_features)) {}
  explicit LinearImpl(const LinearOptions& options);
  /// Of torch's layer: its options and mode, and the same tensors.
  explicit LinearImpl(const torch::nn::LinearImpl& stock) : torch::nn::LinearImpl(stock) {}
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x);

  std::optional<std::string> activation;
};
TORCH_MODULE(Linear);

struct HALFSTEP_API MLPOptions {
  MLPOptions(int64_t in_features, int64_t hidden_features)
      : in_features_(in_features), hidden_features_(hidden_features), out_features_(in_features) {}
  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, hidden_features);
  /// in_features unless given.
  TORCH_ARG(int64_t, out_features);
  TORCH_ARG(std::optional<std::string>, activation) = "gelu";
  TORCH_ARG(bool, bias) = true;
};

/// fc2(act(fc1(x))).
class HALFSTEP_API MLPImpl : public torch::nn::Cloneable<MLPImpl> {
 public:
  MLPImpl(int64_t in_features, int64_t hidden_features)
      : MLPImpl(MLPOptions(in_features, hidden_features)) {}
  explicit MLPImpl(const MLPOptions& options);
  void reset() override;
  at::Tensor forward(const at::Tensor& x);

  MLPOptions options;
  Linear fc1{nullptr}, fc2{nullptr};
};
TORCH_MODULE(MLP);

}  // namespace halfstep::nn
