#pragma once

#include <torch/nn/modules/conv.h>

#include <memory>
#include <optional>
#include <vector>

#include "../export.h"

namespace halfstep::nn {

// torch::nn's modules with another forward: the same options, parameters and names. A bias may stay
// FP32 beside 16-bit weights. clone() gives the same type; made of torch's layer, it has that one's
// options, mode and the same tensors.
#define HALFSTEP_CONV(name)                                                                   \
  class HALFSTEP_API name##Impl : public torch::nn::name##Impl {                              \
   public:                                                                                    \
    using torch::nn::name##Impl::name##Impl;                                                  \
    explicit name##Impl(const torch::nn::name##Impl& stock) : torch::nn::name##Impl(stock) {} \
    at::Tensor forward(const at::Tensor& input);                                              \
    std::shared_ptr<torch::nn::Module> clone(                                                 \
        const std::optional<torch::Device>& device = std::nullopt) const override;            \
  };                                                                                          \
  TORCH_MODULE(name)
#define HALFSTEP_CONV_TRANSPOSE(name)                                                         \
  class HALFSTEP_API name##Impl : public torch::nn::name##Impl {                              \
   public:                                                                                    \
    using torch::nn::name##Impl::name##Impl;                                                  \
    explicit name##Impl(const torch::nn::name##Impl& stock) : torch::nn::name##Impl(stock) {} \
    at::Tensor forward(const at::Tensor& input,                                               \
                       const std::optional<at::IntArrayRef>& output_size = std::nullopt);     \
    std::shared_ptr<torch::nn::Module> clone(                                                 \
        const std::optional<torch::Device>& device = std::nullopt) const override;            \
  };                                                                                          \
  TORCH_MODULE(name)

HALFSTEP_CONV(Conv1d);
HALFSTEP_CONV(Conv2d);
HALFSTEP_CONV(Conv3d);
HALFSTEP_CONV_TRANSPOSE(ConvTranspose1d);
HALFSTEP_CONV_TRANSPOSE(ConvTranspose2d);
HALFSTEP_CONV_TRANSPOSE(ConvTranspose3d);

#undef HALFSTEP_CONV
#undef HALFSTEP_CONV_TRANSPOSE

}  // namespace halfstep::nn
