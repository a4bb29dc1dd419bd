// halfstep::convolution and its backward, and in their place too aten::_convolution, in which every
// convolution of torch ends, and aten::convolution_backward: FP16 (and BF16 where the CPU has no
// unit for it), computed by the stock FP32 kernel and rounded once.
//
//   The stock FP16 backward is 60 to 150 times slower than FP32 with the FP16 unit too, and its
//   forward 1.5 to 2.5 times. Torch's ops have only a CompositeExplicitAutograd kernel in torch, so
//   a kernel at the CPU key takes their place without an override warning. aten::convolution is
//   left alone: it is what jit.trace looks into to record _convolution. The batch is taken in
//   parts, so that the FP32 copies of activations stay below a few times kPiece elements; the
//   weight is widened whole, its gradient summed over the parts in FP32 in order. An FP32 bias is
//   added, and its gradient summed, in FP32. Tests: tests/python/test_conv.py,
//   tests/python/test_overrides.py.

#include <c10/core/SymIntArrayRef.h>

#include <ATen/native/ConvUtils.h>
#include <ATen/ops/_convolution_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/convolution_backward_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/convolution_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "../ops/conv.h"
#include "../ops/overrides.h"
#include "wide.h"

namespace halfstep::cpu {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

using Shape = ops::ConvShape;

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

/// Whether a stock call is ours.
bool takes(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& third) {
  const auto fits = [&](const at::Tensor& t) { return t.scalar_type() == input.scalar_type(); };
  return ops::widens_convolution(input.scalar_type()) && fits(input) && fits(weight) &&
         fits(third) && input.dim() == weight.dim() && input.numel() != 0;
}

/// The layout of results; the FP32 kernel may choose another.
class Layout {
 public:
  explicit Layout(at::MemoryFormat format) : format_(format) {}
  /// The layout that torch's 16-bit kernel would give results of four and five dimensions, which is
  /// also what torch.compile expects.
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
                   const Shape& shape, const Layout& layout) {
  const bool has_bias = bias && bias->defined();
  const Plain plain;
  const at::Tensor wide_weight = weight.to(at::kFloat);
  const auto wide_bias = has_bias ? OptionalTensor(bias->to(at::kFloat)) : std::nullopt;
  const int64_t batch = input.size(0);
  const int64_t part =
      samples(batch, input.numel(), output_numel(input, weight, shape), weight.numel());
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

/// The gradient of the bias comes in FP32.
Gradients backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                   at::OptionalSymIntArrayRef bias_sizes, const Shape& shape,
                   std::array<bool, 3> mask, const Layout& layout) {
  const Plain plain;
  const auto type = input.scalar_type();
  const at::Tensor wide_weight = mask[0] ? weight.to(at::kFloat) : wide_shell(weight);
  const int64_t batch = input.size(0);
  const int64_t part = samples(batch, input.numel(), grad.numel(), weight.numel());
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
  return {grad_input, grad_weight, grad_bias};
}

// ---- torch's ops -------------------------------------------------------------------------------

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias, c10::SymIntArrayRef stride,
                       c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                       c10::SymIntArrayRef output_padding, c10::SymInt groups, bool benchmark,
                       bool deterministic, bool cudnn, bool tf32) {
  const bool has_bias = bias && bias->defined();
  if (takes(input, weight, has_bias ? *bias : weight)) {
    const Shape shape{stride, padding, dilation, transposed, output_padding, std::move(groups)};
    return forward(input, weight, bias, shape, Layout(input, weight, bias, std::nullopt, shape));
  }
  return at::compositeexplicitautograd::_convolution_symint(
      input, weight, bias, stride, padding, dilation, transposed, output_padding, std::move(groups),
      benchmark, deterministic, cudnn, tf32);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
    at::OptionalSymIntArrayRef bias_sizes, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  const Shape shape{stride, padding, dilation, transposed, output_padding, std::move(groups)};
  if (!takes(input, weight, grad))
    return backward_part(grad, input, weight, bias_sizes, shape, mask);
  auto result = backward(grad, input, weight, bias_sizes, shape, mask,
                         Layout(input, weight, std::nullopt, bias_sizes, shape));
  at::Tensor& grad_bias = std::get<2>(result);
  if (grad_bias.defined()) grad_bias = grad_bias.to(input.scalar_type());
  return result;
}

// ---- halfstep's ops ----------------------------------------------------------------------------

/// FP16 always, BF16 without a unit for it or where an FP32 bias has to be added before rounding.
bool widens(const at::Tensor& input, bool foreign_bias) {
  const auto type = input.scalar_type();
  return type == at::kHalf || (type == at::kBFloat16 && (foreign_bias || !ops::has_unit(type)));
}

at::Tensor along_channels(const at::Tensor& bias, int64_t dims) {
  std::vector<int64_t> sizes(size_t(dims), 1);
  sizes[1] = -1;
  return bias.view(sizes);
}

at::Tensor own_convolution(const at::Tensor& input, const at::Tensor& weight,
                           const OptionalTensor& bias, c10::SymIntArrayRef stride,
                           c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                           bool transposed, c10::SymIntArrayRef output_padding,
                           c10::SymInt groups) {
  const Plain plain;
  const Shape shape{stride, padding, dilation, transposed, output_padding, std::move(groups)};
  const auto sizes = ops::check_convolution(input, weight, bias, shape);
  const auto type = input.scalar_type();
  const auto format = ops::conv_format(input, weight);
  const bool has_bias = bias && bias->defined();
  if (input.numel() == 0) {
    at::Tensor out = at::empty(C10_AS_INTARRAYREF_SLOW(sizes), input.options(), format).zero_();
    return has_bias ? out.add_(along_channels(*bias, input.dim())) : out;
  }
  if (widens(input, has_bias && bias->scalar_type() != type))
    return forward(input, weight, bias, shape, Layout(format));
  const auto same = has_bias ? OptionalTensor(bias->to(type)) : std::nullopt;
  return forward_part(input, weight, same, shape).contiguous(format);
}

at::Tensor sum_over_pixels(const at::Tensor& grad, at::ScalarType type) {
  std::vector<int64_t> others{0};
  for (int64_t d = 2; d < grad.dim(); ++d) others.push_back(d);
  return at::sum(grad, others, false, type);
}

/// The stock kernel may also give gradients that nobody asked for.
std::vector<at::Tensor> those_of(const Gradients& gradients, std::array<bool, 3> wanted) {
  std::vector<at::Tensor> result;
  if (wanted[0]) result.push_back(std::get<0>(gradients));
  if (wanted[1]) result.push_back(std::get<1>(gradients));
  if (wanted[2]) result.push_back(std::get<2>(gradients));
  return result;
}

std::vector<at::Tensor> own_convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
    std::optional<at::ScalarType> bias_type, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
    c10::SymIntArrayRef output_padding, c10::SymInt groups, std::array<bool, 2> mask) {
  const Plain plain;
  const Shape shape{stride, padding, dilation, transposed, output_padding, std::move(groups)};
  ops::check_convolution_backward(grad, input, weight, shape);
  const auto type = input.scalar_type();
  const auto format = ops::conv_format(input, weight);
  const bool empty = input.numel() == 0;
  const bool foreign = bias_type && *bias_type != type;
  const std::array<bool, 3> all{mask[0], mask[1], bias_type.has_value()};
  Gradients result;
  auto& [grad_input, grad_weight, grad_bias] = result;
  if (empty) {
    if (mask[0]) grad_input = at::empty(input.sizes(), input.options(), format);
    if (mask[1]) grad_weight = at::empty(weight.sizes(), weight.options(), format).zero_();
    if (bias_type) grad_bias = sum_over_pixels(grad, *bias_type);
    return those_of(result, all);
  }
  const std::vector<c10::SymInt> bias_sizes{grad.size(1)};
  const auto sizes = bias_type ? at::OptionalSymIntArrayRef(bias_sizes) : std::nullopt;
  if (widens(input, foreign)) {
    result = backward(grad, input, weight, sizes, shape, all, Layout(format));
  } else {
    result = backward_part(grad, input, weight, sizes, shape, all);
    for (at::Tensor* t : {&grad_input, &grad_weight})
      if (t->defined()) *t = t->contiguous(format);
  }
  if (bias_type) grad_bias = grad_bias.to(*bias_type);
  return those_of(result, all);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_convolution", convolution);
  m.impl("convolution_backward", convolution_backward);
}
TORCH_LIBRARY_IMPL(halfstep, CPU, m) {
  m.impl("convolution", own_convolution);
  m.impl("convolution_backward", own_convolution_backward);
}

}  // namespace halfstep::cpu
