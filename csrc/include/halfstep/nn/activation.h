#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/pimpl.h>

#include <string>

#include "../functional/activation.h"

namespace halfstep::nn {

/// torch::nn::GELU, computed by functional::gelu.
class HALFSTEP_API GELUImpl : public torch::nn::Cloneable<GELUImpl> {
 public:
  explicit GELUImpl(torch::nn::GELUOptions options = {});
  /// Of torch's layer: its options and mode.
  explicit GELUImpl(const torch::nn::GELUImpl& stock);
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x);

  torch::nn::GELUOptions options;
};
TORCH_MODULE(GELU);

/// torch::nn::SiLU, computed by functional::silu.
class HALFSTEP_API SiLUImpl : public torch::nn::Cloneable<SiLUImpl> {
 public:
  SiLUImpl() = default;
  /// Of torch's layer: its mode.
  explicit SiLUImpl(const torch::nn::SiLUImpl& stock);
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x);
};
TORCH_MODULE(SiLU);

class HALFSTEP_API SquaredReLUImpl : public torch::nn::Cloneable<SquaredReLUImpl> {
 public:
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x);
};
TORCH_MODULE(SquaredReLU);

struct GatedOptions {
  /// "none" or "tanh", for GeGLU.
  std::string approximate_ = "none";
  bool count_overflow_ = false;

  GatedOptions& approximate(std::string x) { return approximate_ = std::move(x), *this; }
  /// Keep a count of the results that left the dtype's range although gate and up are finite.
  GatedOptions& count_overflow(bool x) { return count_overflow_ = x, *this; }
};

/// functional::swiglu of (gate, up), or of one tensor [..., 2F] that holds both.
class HALFSTEP_API SwiGLUImpl : public torch::nn::Cloneable<SwiGLUImpl> {
 public:
  explicit SwiGLUImpl(GatedOptions options = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& gate, const std::optional<at::Tensor>& up = {});

  GatedOptions options;
  at::Tensor overflowed;  ///< a buffer, int64; undefined unless it is counted

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(SwiGLU);

/// functional::geglu, likewise.
class HALFSTEP_API GeGLUImpl : public torch::nn::Cloneable<GeGLUImpl> {
 public:
  explicit GeGLUImpl(GatedOptions options = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& gate, const std::optional<at::Tensor>& up = {});

  GatedOptions options;
  at::Tensor overflowed;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(GeGLU);

/// residual + dropout(x + bias): functional::bias_dropout_add; in evaluation mode nothing is
/// dropped.
class HALFSTEP_API BiasDropoutAddImpl : public torch::nn::Cloneable<BiasDropoutAddImpl> {
 public:
  explicit BiasDropoutAddImpl(double p = 0.5);
  void reset() override {}
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                     const at::Tensor& residual, const std::optional<at::Tensor>& seed = {});

  double p;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(BiasDropoutAdd);

}  // namespace halfstep::nn
