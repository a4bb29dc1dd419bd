// aten::_convolution, in which every convolution ends, and aten::convolution_backward in FP16 (and
// BF16 where the CPU has no unit for it), computed by the stock FP32 kernel and rounded once.
//
//   The stock FP16 backward is 60 to 150 times slower than FP32 with the FP16 unit too, and its
//   forward 1.5 to 2.5 times. Both ops have only a CompositeExplicitAutograd kernel in torch, so a
//   kernel at the CPU key takes their place without an override warning. aten::convolution is left
//   alone: it is what jit.trace looks into to record _convolution.
//   The batch is taken in parts, so that the FP32 copies of activations stay below a few times
//   kPiece elements; the weight is widened whole, its gradient summed over the parts in FP32 in
//   order. Tests: tests/python/test_overrides.py.

#include <c10/core/SymIntArrayRef.h>

#include <ATen/native/ConvUtils.h>
#include <ATen/ops/_convolution_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/convolution_backward_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/convolution_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../ops/overrides.h"
#include "wide.h"

namespace halfstep::cpu {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

/// What both directions are told about the convolution.
struct Shape {
  c10::SymIntArrayRef stride, padding, dilation;
  bool transposed;
  c10::SymIntArrayRef output_padding;
  c10::SymInt groups;
};

/// The same shape and layout without the values, for an operand of which no gradient needs them.
at::Tensor wide_shell(const at::Tensor& t) {
  return at::empty_like(t, t.options().dtype(at::kFloat));
}

/// Samples in one part: input and output together have kPiece elements, or as many as the weight
/// where that is larger, since every part reorders the weight.
int64_t samples(int64_t batch, int64_t input_numel, int64_t output_numel, int64_t weight_numel) {
  const int64_t sample = (input_numel + output_numel) / batch;
  return even_part(batch, std::max(kPiece, weight_numel) / std::max<int64_t>(sample, 1));
}

int64_t output_numel(const at::Tensor& input, const at::Tensor& weight, const Shape& shape) {
  const auto at = [](c10::SymIntArrayRef values, int64_t d) {
    return values[values.size() == 1 ? 0 : size_t(d)].expect_int();
  };
  int64_t numel = input.size(0);
  numel *= shape.transposed ? weight.size(1) * shape.groups.expect_int() : weight.size(0);
  for (int64_t d = 0; d + 2 < input.dim(); ++d) {
    const int64_t kernel = at(shape.dilation, d) * (weight.size(d + 2) - 1) + 1;
    const int64_t size = input.size(d + 2), padding = 2 * at(shape.padding, d);
    numel *= shape.transposed
                 ? (size - 1) * at(shape.stride, d) - padding + kernel + at(shape.output_padding, d)
                 : (size + padding - kernel) / at(shape.stride, d) + 1;
  }
  return numel;
}

bool takes(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& third) {
  const auto fits = [&](const at::Tensor& t) { return t.scalar_type() == input.scalar_type(); };
  return ops::widens_convolution(input.scalar_type()) && fits(input) && fits(weight) &&
         fits(third) && input.dim() == weight.dim() && input.numel() != 0;
}

/// The layout that torch's 16-bit kernel would give results of four and five dimensions, which is
/// also what torch.compile expects; the FP32 kernel may choose another.
class Layout {
 public:
  Layout(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
         at::OptionalSymIntArrayRef bias_sizes, const Shape& shape) {
    if (weight.dim() < 4) return;
    const auto backend = at::native::select_conv_backend(
        input, weight, bias, shape.stride, shape.padding, shape.dilation, shape.transposed,
        shape.output_padding, shape.groups, bias_sizes);
    format_ = at::native::_determine_backend_memory_format(input, weight, backend);
  }
  at::Tensor make(at::IntArrayRef sizes, const at::Tensor& part, at::ScalarType type) const {
    if (!format_) return whole_like(part, sizes, type);
    return at::empty(sizes, part.options().dtype(type).memory_format(*format_));
  }

 private:
  std::optional<at::MemoryFormat> format_;
};

at::Tensor forward_part(const at::Tensor& input, const at::Tensor& weight,
                        const OptionalTensor& bias, const Shape& shape) {
  return at::compositeexplicitautograd::convolution_symint(
      input, weight, bias, shape.stride, shape.padding, shape.dilation, shape.transposed,
      shape.output_padding, shape.groups);
}

at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                   const Shape& shape) {
  const bool has_bias = bias && bias->defined();
  const Plain plain;
  const at::Tensor wide_weight = weight.to(at::kFloat);
  const auto wide_bias = has_bias ? OptionalTensor(bias->to(at::kFloat)) : std::nullopt;
  const int64_t batch = input.size(0);
  const int64_t part =
      samples(batch, input.numel(), output_numel(input, weight, shape), weight.numel());
  const Layout layout(input, weight, bias, std::nullopt, shape);
  const Wide memory(input.numel() / batch * part);
  at::Tensor out;
  for (int64_t i = 0; i < batch; i += part) {
    const int64_t count = std::min(part, batch - i);
    const at::Tensor wide =
        forward_part(memory(input.narrow(0, i, count)), wide_weight, wide_bias, shape);
    if (!out.defined()) {
      auto sizes = wide.sizes().vec();
      sizes[0] = batch;
      out = layout.make(sizes, wide, input.scalar_type());
    }
    out.narrow(0, i, count).copy_(wide);
  }
  return out;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Gradients backward_part(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                        at::OptionalSymIntArrayRef bias_sizes, const Shape& shape,
                        std::array<bool, 3> mask) {
  return at::compositeexplicitautograd::convolution_backward_symint(
      grad, input, weight, bias_sizes, shape.stride, shape.padding, shape.dilation,
      shape.transposed, shape.output_padding, shape.groups, mask);
}

void add_to(at::Tensor& total, const at::Tensor& part) {
  if (!total.defined())
    total = part;
  else if (part.defined())
    total.add_(part);
}

Gradients backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                   at::OptionalSymIntArrayRef bias_sizes, const Shape& shape,
                   std::array<bool, 3> mask) {
  if (!takes(input, weight, grad))
    return backward_part(grad, input, weight, bias_sizes, shape, mask);
  const Plain plain;
  const auto type = input.scalar_type();
  const at::Tensor wide_weight = mask[0] ? weight.to(at::kFloat) : wide_shell(weight);
  const int64_t batch = input.size(0);
  const int64_t part = samples(batch, input.numel(), grad.numel(), weight.numel());
  const Layout layout(input, weight, std::nullopt, bias_sizes, shape);
  const Wide input_memory(input.numel() / batch * part), grad_memory(grad.numel() / batch * part);
  at::Tensor grad_input, grad_weight, grad_bias;
  for (int64_t i = 0; i < batch; i += part) {
    const int64_t count = std::min(part, batch - i);
    const at::Tensor part_of_input = input.narrow(0, i, count);
    const at::Tensor wide_input = mask[1] ? input_memory(part_of_input) : wide_shell(part_of_input);
    const auto [part_input, part_weight, part_bias] = backward_part(
        grad_memory(grad.narrow(0, i, count)), wide_input, wide_weight, bias_sizes, shape, mask);
    add_to(grad_weight, part_weight);
    add_to(grad_bias, part_bias);
    if (!part_input.defined()) continue;
    if (!grad_input.defined()) grad_input = layout.make(input.sizes(), part_input, type);
    grad_input.narrow(0, i, count).copy_(part_input);
  }
  if (grad_weight.defined())
    grad_weight = layout.make(weight.sizes(), grad_weight, type).copy_(grad_weight);
  if (grad_bias.defined()) grad_bias = grad_bias.to(type);
  return {grad_input, grad_weight, grad_bias};
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias, c10::SymIntArrayRef stride,
                       c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                       c10::SymIntArrayRef output_padding, c10::SymInt groups, bool benchmark,
                       bool deterministic, bool cudnn, bool tf32) {
  const bool has_bias = bias && bias->defined();
  if (takes(input, weight, has_bias ? *bias : weight))
    return forward(input, weight, bias,
                   {stride, padding, dilation, transposed, output_padding, std::move(groups)});
  return at::compositeexplicitautograd::_convolution_symint(
      input, weight, bias, stride, padding, dilation, transposed, output_padding, std::move(groups),
      benchmark, deterministic, cudnn, tf32);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
    at::OptionalSymIntArrayRef bias_sizes, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  return backward(grad, input, weight, bias_sizes,
                  {stride, padding, dilation, transposed, output_padding, std::move(groups)}, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_convolution", convolution);
  m.impl("convolution_backward", convolution_backward);
}

}  // namespace halfstep::cpu
