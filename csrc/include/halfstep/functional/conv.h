#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/options/conv.h>

#include "../export.h"

namespace halfstep::functional {

// torch::nn::functional's signatures and options, computed by halfstep::convolution: on the CPU one
// rounding, bias included, with the overrides switched off too. input [N, C, ...] or [C, ...] and
// weight: one of float16, bfloat16, float32, float64; options.bias(): that or float32.

HALFSTEP_API at::Tensor conv1d(const at::Tensor& input, const at::Tensor& weight,
                               const torch::nn::functional::Conv1dFuncOptions& options = {});
HALFSTEP_API at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight,
                               const torch::nn::functional::Conv2dFuncOptions& options = {});
HALFSTEP_API at::Tensor conv3d(const at::Tensor& input, const at::Tensor& weight,
                               const torch::nn::functional::Conv3dFuncOptions& options = {});
HALFSTEP_API at::Tensor conv_transpose1d(
    const at::Tensor& input, const at::Tensor& weight,
    const torch::nn::functional::ConvTranspose1dFuncOptions& options = {});
HALFSTEP_API at::Tensor conv_transpose2d(
    const at::Tensor& input, const at::Tensor& weight,
    const torch::nn::functional::ConvTranspose2dFuncOptions& options = {});
HALFSTEP_API at::Tensor conv_transpose3d(
    const at::Tensor& input, const at::Tensor& weight,
    const torch::nn::functional::ConvTranspose3dFuncOptions& options = {});

}  // namespace halfstep::functional
