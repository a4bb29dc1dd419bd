// aten::convolution and aten::convolution_backward in FP16 (and BF16 where the CPU has no unit for
// it): widened to FP32, computed by the stock FP32 kernel, rounded once. The stock FP16 backward is
// 60 to 100 times slower than FP32, with the FP16 unit too. Both have only a
// CompositeExplicitAutograd kernel in torch, so a kernel at the CPU key takes their place without
// an override warning. Tests: tests/python/test_overrides.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/convolution_backward_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/convolution_compositeexplicitautograd_dispatch.h>
#include <torch/library.h>

#include "../ops/overrides.h"

namespace halfstep::cpu {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias, c10::SymIntArrayRef stride,
                       c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                       c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  const auto type = input.scalar_type();
  if (type != weight.scalar_type() || !ops::widens_convolution(type))
    return at::compositeexplicitautograd::convolution_symint(
        input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
  const auto wide_bias = bias && bias->defined() ? OptionalTensor(bias->to(at::kFloat)) : bias;
  return at::compositeexplicitautograd::convolution_symint(
             input.to(at::kFloat), weight.to(at::kFloat), wide_bias, stride, padding, dilation,
             transposed, output_padding, groups)
      .to(type);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
    at::OptionalSymIntArrayRef bias_sizes, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  const auto type = input.scalar_type();
  const bool widens =
      type == weight.scalar_type() && type == grad.scalar_type() && ops::widens_convolution(type);
  const auto to = [&](const at::Tensor& t) { return widens ? t.to(at::kFloat) : t; };
  auto result = at::compositeexplicitautograd::convolution_backward_symint(
      to(grad), to(input), to(weight), bias_sizes, stride, padding, dilation, transposed,
      output_padding, groups, mask);
  if (!widens) return result;
  const auto back = [&](at::Tensor& t) {
    if (t.defined()) t = t.to(type);
  };
  std::apply([&](auto&... t) { (back(t), ...); }, result);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("convolution", convolution);
  m.impl("convolution_backward", convolution_backward);
}

}  // namespace halfstep::cpu
