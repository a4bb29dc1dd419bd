#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <optional>
#include <vector>

namespace halfstep::ops {

/// What both directions are told about a convolution; one entry for each spatial dimension.
struct ConvShape {
  c10::SymIntArrayRef stride, padding, dilation;
  bool transposed;
  c10::SymIntArrayRef output_padding;
  c10::SymInt groups;
};

/// Dtypes, devices and sizes of halfstep::convolution; gives the sizes of the output.
std::vector<c10::SymInt> check_convolution(const at::Tensor& input, const at::Tensor& weight,
                                           const std::optional<at::Tensor>& bias,
                                           const ConvShape& shape);
/// The same for halfstep::convolution_backward, whose `grad` has the output's dtype and sizes.
void check_convolution_backward(const at::Tensor& grad, const at::Tensor& input,
                                const at::Tensor& weight, const ConvShape& shape);

/// The layout of results of four and five dimensions: channels_last where an operand has it.
at::MemoryFormat conv_format(const at::Tensor& input, const at::Tensor& weight);

}  // namespace halfstep::ops
