#include "../ops/activation.h"

#include <ATen/ops/zeros.h>

#include "common.h"

namespace halfstep::cuda {

namespace {

using ops::Launch;
using ops::OptionalTensor;

Spans spans_of(const Launch& launch) {
  Spans spans;
  spans.rows = launch.spans.rows;
  spans.width = launch.spans.width;
  std::copy(launch.spans.stride.begin(), launch.spans.stride.end(), spans.stride);
  return spans;
}

math::Dtype dtype_of(const Launch& launch) {
  return ops::dtype_code(launch.outputs[0].scalar_type());
}
const void* input(const Launch& launch, size_t i) { return launch.inputs[i].const_data_ptr(); }
void* output(const Launch& launch, size_t i) { return launch.outputs[i].mutable_data_ptr(); }

struct Backend {
  static constexpr bool kComputes = true;

  static void forward(const Launch& l) {
    const Place place(l.outputs[0]);
    check(l.op, activation_forward(l.activation, dtype_of(l), spans_of(l), input(l, 0),
                                   output(l, 0), place.stream()));
  }
  static void backward(const Launch& l) {
    const Place place(l.outputs[0]);
    check(l.op, activation_backward(l.activation, dtype_of(l), spans_of(l), input(l, 0),
                                    input(l, 1), output(l, 0), place.stream()));
  }
  static void gated(const Launch& l) {
    const Place place(l.outputs[0]);
    auto* overflowed = l.overflowed.defined() ? l.overflowed.mutable_data_ptr<int64_t>() : nullptr;
    check(l.op, cuda::gated(l.activation, dtype_of(l), spans_of(l), input(l, 0), input(l, 1),
                            output(l, 0), overflowed, place.stream()));
  }
  static void gated_backward(const Launch& l) {
    const Place place(l.outputs[0]);
    check(l.op,
          cuda::gated_backward(l.activation, dtype_of(l), spans_of(l), input(l, 0), input(l, 1),
                               input(l, 2), output(l, 0), output(l, 1), place.stream()));
  }
};

DropoutArguments arguments_of(const at::Tensor& x, const at::Tensor& y, int64_t width, double p,
                              const OptionalTensor& seed) {
  const math::Dropout dropout = math::Dropout::of(p);
  DropoutArguments arguments;
  arguments.numel = y.numel();
  arguments.width = width;
  arguments.seed = dropout.is_random ? seed->const_data_ptr<int64_t>() : nullptr;
  arguments.threshold = dropout.threshold;
  arguments.scale = dropout.scale;
  arguments.x = x.const_data_ptr();
  arguments.y = y.mutable_data_ptr();
  return arguments;
}

at::Tensor bias_dropout_add(const at::Tensor& x, const OptionalTensor& bias,
                            const at::Tensor& residual, double p, const OptionalTensor& seed) {
  ops::check_dropout_add("bias_dropout_add", x, bias, residual, p, seed);
  const at::Tensor from = x.contiguous(), beside = residual.contiguous();
  const at::Tensor added = bias ? bias->contiguous() : at::Tensor();
  const OptionalTensor numbers = seed ? OptionalTensor(seed->contiguous()) : std::nullopt;
  at::Tensor y = at::empty_like(from);
  if (y.numel() == 0) return y;
  const Place place(x);
  DropoutArguments arguments = arguments_of(from, y, bias ? added.numel() : 1, p, numbers);
  arguments.bias = bias ? added.const_data_ptr() : nullptr;
  arguments.residual = beside.const_data_ptr();
  check("bias_dropout_add",
        dropout_add(ops::dtype_code(x.scalar_type()), arguments, place.stream()));
  return y;
}

std::tuple<at::Tensor, at::Tensor> bias_dropout_add_backward(const at::Tensor& grad, double p,
                                                             const OptionalTensor& seed,
                                                             bool bias) {
  ops::check_bias_gradient("bias_dropout_add_backward", grad, p, seed, bias);
  const at::Tensor from = grad.contiguous();
  const OptionalTensor numbers = seed ? OptionalTensor(seed->contiguous()) : std::nullopt;
  at::Tensor dx = at::empty_like(from);
  const int64_t width = bias ? grad.size(-1) : 0;
  if (dx.numel() == 0) return {dx, at::zeros({width}, grad.options())};
  const Place place(grad);
  at::Tensor sums = at::empty({width}, grad.options()), bits, partials;
  DropoutArguments arguments = arguments_of(from, dx, bias ? width : 1, p, numbers);
  if (bias) {
    const int64_t numel = dx.numel(), blocks = (numel / width + kDropoutRows - 1) / kDropoutRows;
    const bool wide = grad.scalar_type() == at::kDouble;
    bits = place.scratch((numel + math::kDropoutGroup - 1) / math::kDropoutGroup * 8);
    partials = place.scratch(blocks * width * (wide ? 8 : 4));
    arguments.bias_gradient = sums.mutable_data_ptr();
    arguments.bits = static_cast<uint32_t*>(bits.mutable_data_ptr());
    arguments.partials = partials.mutable_data_ptr();
  }
  check("bias_dropout_add_backward",
        dropout_backward(ops::dtype_code(grad.scalar_type()), arguments, place.stream()));
  return {dx, sums};
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CUDA, m) {
  ops::add_activations<ops::ActivationOps<Backend>>(m);
  m.impl("bias_dropout_add", bias_dropout_add);
  m.impl("bias_dropout_add_backward", bias_dropout_add_backward);
}

}  // namespace halfstep::cuda
