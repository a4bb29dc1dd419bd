#include "conv.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/add.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "check.h"
#include "dispatch.h"
#include "optional.h"

// Convolution of 1 to 3 dimensions, plain and transposed. On the CPU (csrc/cpu/conv.cpp) the result
// is rounded once, bias included; on other devices it is torch's own kernel. Both directions are
// linear in each operand, so that the derivative of the backward is made of the same two ops.

namespace halfstep::ops {

namespace {

using Tensors = std::vector<at::Tensor>;
using Three = std::array<at::Tensor, 3>;
using SymInts = c10::SymIntArrayRef;

constexpr const char* kSchemas[] = {
    // input [N, C, ...], weight [O, C / groups, ...] ([C, O / groups, ...] transposed): one of
    // float16, bfloat16, float32, float64; bias [O]: that or float32. The output has input's dtype.
    "convolution(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups) -> Tensor",
    // Those gradients of input, weight (their dtypes) and bias (bias_dtype; none without) that are
    // asked for, in this order; grad has input's dtype.
    "convolution_backward(Tensor grad, Tensor input, Tensor weight, ScalarType? bias_dtype, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] "
    "output_padding, SymInt groups, bool[2] output_mask) -> Tensor[]",
};

using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, SymInts,
                           SymInts, SymInts, bool, SymInts, c10::SymInt);
using Backward = Tensors(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         std::optional<at::ScalarType>, SymInts, SymInts, SymInts, bool, SymInts,
                         c10::SymInt, std::array<bool, 2>);

at::Tensor call(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                const ConvShape& s) {
  static const auto op = find_op<Forward>("halfstep::convolution");
  return op.call(input, weight, bias, s.stride, s.padding, s.dilation, s.transposed,
                 s.output_padding, s.groups);
}
/// `some` at the places that were asked for.
Three spread(const Tensors& some, std::array<bool, 3> wanted) {
  Three all;
  size_t next = 0;
  for (size_t i = 0; i < all.size(); ++i)
    if (wanted[i]) all[i] = some[next++];
  return all;
}
Three call_backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
                    std::optional<at::ScalarType> bias_type, const ConvShape& s,
                    std::array<bool, 2> mask) {
  static const auto op = find_op<Backward>("halfstep::convolution_backward");
  return spread(op.call(grad, input, weight, bias_type, s.stride, s.padding, s.dilation,
                        s.transposed, s.output_padding, s.groups, mask),
                {mask[0], mask[1], bias_type.has_value()});
}

// ---- checks ------------------------------------------------------------------------------------
void check_list(const char* op, const char* name, SymInts values, int64_t dims, int64_t least) {
  TORCH_CHECK(int64_t(values.size()) == dims, op, ": ", name, " is ", values, "; expected ", dims,
              " entries for an input of ", dims + 2, " dimensions");
  for (const auto& value : values)
    TORCH_CHECK(value >= least, op, ": ", name, " is ", values, "; expected entries of at least ",
                least);
}

void check_operands(const char* op, const at::Tensor& input, const at::Tensor& weight,
                    const ConvShape& s) {
  TORCH_CHECK(is_supported_float(input.scalar_type()), op, ": input is ", describe(input),
              "; expected float16, bfloat16, float32 or float64");
  TORCH_CHECK(input.dim() >= 3 && input.dim() <= 5, op, ": input is ", describe(input),
              "; expected 3 to 5 dimensions");
  TORCH_CHECK(weight.scalar_type() == input.scalar_type() && weight.dim() == input.dim(), op,
              ": weight is ", describe(weight), " but input is ", describe(input));
  check_device(op, {"weight"}, weight, {"input"}, input);
  const int64_t dims = input.dim() - 2;
  check_list(op, "stride", s.stride, dims, 1);
  check_list(op, "padding", s.padding, dims, 0);
  check_list(op, "dilation", s.dilation, dims, 1);
  check_list(op, "output_padding", s.output_padding, dims, 0);
  TORCH_CHECK(s.groups > 0, op, ": groups is ", s.groups, "; expected at least 1");
  const auto channels = s.transposed ? weight.sym_size(0) : weight.sym_size(1) * s.groups;
  TORCH_CHECK(input.sym_size(1) == channels && weight.sym_size(0) % s.groups == 0, op,
              ": input is ", describe(input), " but weight is ", describe(weight), " in ", s.groups,
              " groups", s.transposed ? ", transposed" : "");
}

std::vector<c10::SymInt> output_sizes(const char* op, const at::Tensor& input,
                                      const at::Tensor& weight, const ConvShape& s) {
  std::vector<c10::SymInt> sizes{input.sym_size(0),
                                 s.transposed ? weight.sym_size(1) * s.groups : weight.sym_size(0)};
  for (int64_t d = 0; d < input.dim() - 2; ++d) {
    const auto at = [d](SymInts values) { return values[size_t(d)]; };
    const auto kernel = at(s.dilation) * (weight.sym_size(d + 2) - 1) + 1;
    const auto size = input.sym_size(d + 2), padding = at(s.padding) * 2;
    const auto out = s.transposed
                         ? (size - 1) * at(s.stride) - padding + kernel + at(s.output_padding)
                         : (size + padding - kernel) / at(s.stride) + 1;
    const bool fits = s.transposed ? out >= 1 : size + padding >= kernel;
    TORCH_CHECK(fits && weight.sym_size(d + 2) >= 1, op, ": input is ", describe(input),
                ", padded by ", s.padding, ", too small for weight ", describe(weight),
                " with dilation ", s.dilation);
    TORCH_CHECK(
        at(s.output_padding) == 0 || (s.transposed && (at(s.output_padding) < at(s.stride) ||
                                                       at(s.output_padding) < at(s.dilation))),
        op, ": output_padding is ", s.output_padding, "; expected less than stride ", s.stride,
        " or dilation ", s.dilation, " and a transposed convolution");
    sizes.push_back(out);
  }
  return sizes;
}

}  // namespace

std::vector<c10::SymInt> check_convolution(const at::Tensor& input, const at::Tensor& weight,
                                           const OptionalTensor& bias, const ConvShape& shape) {
  constexpr const char* op = "convolution";
  check_operands(op, input, weight, shape);
  auto sizes = output_sizes(op, input, weight, shape);
  if (bias && bias->defined()) {
    const auto type = bias->scalar_type();
    TORCH_CHECK(type == input.scalar_type() || type == at::kFloat, op, ": bias is ",
                describe(*bias), " but input is ", describe(input),
                "; expected that dtype or float32");
    TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == sizes[1], op, ": bias is ",
                describe(*bias), "; expected ", sizes[1], " elements");
    check_device(op, {"bias"}, *bias, {"input"}, input);
  }
  return sizes;
}

void check_convolution_backward(const at::Tensor& grad, const at::Tensor& input,
                                const at::Tensor& weight, const ConvShape& shape) {
  constexpr const char* op = "convolution_backward";
  check_operands(op, input, weight, shape);
  const auto sizes = output_sizes(op, input, weight, shape);
  TORCH_CHECK(grad.scalar_type() == input.scalar_type() && grad.sym_sizes().equals(sizes), op,
              ": grad is ", describe(grad), " but input is ", describe(input),
              " and the output has sizes ", SymInts(sizes));
  check_device(op, {"grad"}, grad, {"input"}, input);
}

at::MemoryFormat conv_format(const at::Tensor& input, const at::Tensor& weight) {
  const auto format = [&](at::MemoryFormat last) {
    const bool either =
        input.suggest_memory_format() == last || weight.suggest_memory_format() == last;
    return either ? last : at::MemoryFormat::Contiguous;
  };
  if (weight.dim() == 4) return format(at::MemoryFormat::ChannelsLast);
  if (weight.dim() == 5) return format(at::MemoryFormat::ChannelsLast3d);
  return at::MemoryFormat::Contiguous;
}

namespace {

// ---- Meta --------------------------------------------------------------------------------------
at::Tensor convolution_meta(const at::Tensor& input, const at::Tensor& weight,
                            const OptionalTensor& bias, SymInts stride, SymInts padding,
                            SymInts dilation, bool transposed, SymInts output_padding,
                            c10::SymInt groups) {
  const auto sizes =
      check_convolution(input, weight, bias,
                        {stride, padding, dilation, transposed, output_padding, std::move(groups)});
  return at::empty_symint(sizes, input.options(), conv_format(input, weight));
}

Tensors convolution_backward_meta(const at::Tensor& grad, const at::Tensor& input,
                                  const at::Tensor& weight, std::optional<at::ScalarType> bias_type,
                                  SymInts stride, SymInts padding, SymInts dilation,
                                  bool transposed, SymInts output_padding, c10::SymInt groups,
                                  std::array<bool, 2> mask) {
  check_convolution_backward(
      grad, input, weight,
      {stride, padding, dilation, transposed, output_padding, std::move(groups)});
  const auto format = conv_format(input, weight);
  Tensors result;
  const auto like = [&](const at::Tensor& t) {
    return at::empty_symint(t.sym_sizes(), t.options(), format);
  };
  if (mask[0]) result.push_back(like(input));
  if (mask[1]) result.push_back(like(weight));
  if (bias_type)
    result.push_back(at::empty_symint({grad.sym_size(1)}, grad.options().dtype(*bias_type)));
  return result;
}

// ---- every device but the CPU ------------------------------------------------------------------
at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias, SymInts stride, SymInts padding,
                       SymInts dilation, bool transposed, SymInts output_padding,
                       c10::SymInt groups) {
  check_convolution(input, weight, bias,
                    {stride, padding, dilation, transposed, output_padding, groups});
  const bool foreign = bias && bias->defined() && bias->scalar_type() != input.scalar_type();
  const auto format = conv_format(input, weight);
  at::Tensor out =
      at::convolution_symint(input, weight, foreign ? std::nullopt : bias, stride, padding,
                             dilation, transposed, output_padding, std::move(groups))
          .contiguous(format);
  if (!foreign) return out;
  std::vector<int64_t> along(size_t(input.dim()), 1);
  along[1] = -1;
  return at::add_out(out, out, bias->view(along));
}

Tensors convolution_backward(const at::Tensor& grad, const at::Tensor& input,
                             const at::Tensor& weight, std::optional<at::ScalarType> bias_type,
                             SymInts stride, SymInts padding, SymInts dilation, bool transposed,
                             SymInts output_padding, c10::SymInt groups, std::array<bool, 2> mask) {
  check_convolution_backward(grad, input, weight,
                             {stride, padding, dilation, transposed, output_padding, groups});
  Tensors result;
  if (mask[0] || mask[1]) {
    const auto [of_input, of_weight, none] = at::convolution_backward_symint(
        grad, input, weight, at::OptionalSymIntArrayRef(), stride, padding, dilation, transposed,
        output_padding, std::move(groups), {mask[0], mask[1], false});
    const auto format = conv_format(input, weight);
    if (mask[0]) result.push_back(of_input.contiguous(format));
    if (mask[1]) result.push_back(of_weight.contiguous(format));
  }
  std::vector<int64_t> others{0};
  for (int64_t d = 2; d < grad.dim(); ++d) others.push_back(d);
  if (bias_type) result.push_back(grad.sum(others, false, bias_type));
  return result;
}

// ---- Autograd ----------------------------------------------------------------------------------
using Context = torch::autograd::AutogradContext;

/// A ConvShape that outlives the call.
class KeptShape {
 public:
  static void keep(Context* context, const ConvShape& s) {
    context->saved_data["stride"] = s.stride;
    context->saved_data["padding"] = s.padding;
    context->saved_data["dilation"] = s.dilation;
    context->saved_data["transposed"] = s.transposed;
    context->saved_data["output_padding"] = s.output_padding;
    context->saved_data["groups"] = s.groups;
  }
  explicit KeptShape(Context* context)
      : stride_(list(context, "stride")),
        padding_(list(context, "padding")),
        dilation_(list(context, "dilation")),
        output_padding_(list(context, "output_padding")),
        shape_{stride_,         padding_,
               dilation_,       context->saved_data["transposed"].toBool(),
               output_padding_, context->saved_data["groups"].toSymInt()} {}
  const ConvShape& operator*() const { return shape_; }

 private:
  static std::vector<c10::SymInt> list(Context* context, const char* name) {
    return context->saved_data[name].toSymIntVector();
  }
  std::vector<c10::SymInt> stride_, padding_, dilation_, output_padding_;
  ConvShape shape_;
};

struct Convolution : torch::autograd::Function<Convolution> {
  static at::Tensor forward(Context* context, const at::Tensor& input, const at::Tensor& weight,
                            const OptionalTensor& bias, const ConvShape& shape) {
    context->save_for_backward({input, weight});
    KeptShape::keep(context, shape);
    if (bias && bias->defined()) context->saved_data["bias_type"] = int64_t(bias->scalar_type());
    const at::AutoDispatchBelowADInplaceOrView below;
    return call(input, weight, bias, shape);
  }
  static Tensors backward(Context* context, const Tensors& grads) {
    const auto saved = context->get_saved_variables();
    const KeptShape shape(context);
    std::optional<at::ScalarType> bias_type;
    const auto type = context->saved_data.find("bias_type");  // a missing bias has no edge
    if (type != context->saved_data.end() && context->needs_input_grad(2))
      bias_type = at::ScalarType(type->second.toInt());
    if (!grads[0].defined()) return {at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
    const auto [input, weight, bias] =
        call_backward(grads[0], saved[0], saved[1], bias_type, *shape,
                      {context->needs_input_grad(0), context->needs_input_grad(1)});
    return {input, weight, bias, at::Tensor()};
  }
};

struct ConvolutionBackward : torch::autograd::Function<ConvolutionBackward> {
  static Tensors forward(Context* context, const at::Tensor& grad, const at::Tensor& input,
                         const at::Tensor& weight, std::optional<at::ScalarType> bias_type,
                         const ConvShape& shape, std::array<bool, 2> mask) {
    context->save_for_backward({grad, input, weight});
    context->set_materialize_grads(false);
    KeptShape::keep(context, shape);
    const at::AutoDispatchBelowADInplaceOrView below;
    context->saved_data["wanted"] =
        int64_t(mask[0]) | int64_t(mask[1]) << 1 | int64_t(bias_type.has_value()) << 2;
    Tensors wanted;
    for (const auto& t : call_backward(grad, input, weight, bias_type, shape, mask))
      if (t.defined()) wanted.push_back(t);
    return wanted;
  }
  /// With y = C(x, w): <h, grad_x> = <g, C(h, w)> and <h, grad_w> = <g, C(x, h)>.
  static Tensors backward(Context* context, const Tensors& grads) {
    const auto saved = context->get_saved_variables();
    const int64_t wanted = context->saved_data["wanted"].toInt();
    const Three seconds = spread(grads, {(wanted & 1) != 0, (wanted & 2) != 0, (wanted & 4) != 0});
    const at::Tensor &grad = saved[0], &input = saved[1], &weight = saved[2];
    const KeptShape shape(context);
    at::Tensor of_grad, of_input, of_weight;
    const auto add = [&](const at::Tensor& t) { of_grad = of_grad.defined() ? of_grad + t : t; };
    if (context->needs_input_grad(0)) {
      if (seconds[0].defined()) add(call(seconds[0], weight, std::nullopt, *shape));
      if (seconds[1].defined()) add(call(input, seconds[1], std::nullopt, *shape));
      if (seconds[2].defined()) {
        std::vector<int64_t> along(size_t(grad.dim()), 1);
        along[1] = -1;
        add(seconds[2].to(grad.scalar_type()).view(along).expand_as(grad));
      }
    }
    if (context->needs_input_grad(1) && seconds[1].defined())
      of_input =
          std::get<0>(call_backward(grad, input, seconds[1], std::nullopt, *shape, {true, false}));
    if (context->needs_input_grad(2) && seconds[0].defined())
      of_weight =
          std::get<1>(call_backward(grad, seconds[0], weight, std::nullopt, *shape, {false, true}));
    return {of_grad, of_input, of_weight, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor convolution_autograd(const at::Tensor& input, const at::Tensor& weight,
                                const OptionalTensor& bias, SymInts stride, SymInts padding,
                                SymInts dilation, bool transposed, SymInts output_padding,
                                c10::SymInt groups) {
  return Convolution::apply(
      input, weight, bias,
      ConvShape{stride, padding, dilation, transposed, output_padding, std::move(groups)});
}

Tensors convolution_backward_autograd(const at::Tensor& grad, const at::Tensor& input,
                                      const at::Tensor& weight,
                                      std::optional<at::ScalarType> bias_type, SymInts stride,
                                      SymInts padding, SymInts dilation, bool transposed,
                                      SymInts output_padding, c10::SymInt groups,
                                      std::array<bool, 2> mask) {
  if (!mask[0] && !mask[1] && !bias_type) return {};
  return ConvolutionBackward::apply(
      grad, input, weight, bias_type,
      ConvShape{stride, padding, dilation, transposed, output_padding, std::move(groups)}, mask);
}

// ---- Autocast ----------------------------------------------------------------------------------
/// The bias stays as it is: an FP32 one is added before the rounding.
template <at::DeviceType kDevice>
at::Tensor convolution_autocast(const at::Tensor& input, const at::Tensor& weight,
                                const OptionalTensor& bias, SymInts stride, SymInts padding,
                                SymInts dilation, bool transposed, SymInts output_padding,
                                c10::SymInt groups) {
  const NoAutocast off;
  return call(autocast_to_lower(input, kDevice), autocast_to_lower(weight, kDevice), bias,
              {stride, padding, dilation, transposed, output_padding, std::move(groups)});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  m.impl("convolution", convolution_meta);
  m.impl("convolution_backward", convolution_backward_meta);
}
TORCH_LIBRARY_IMPL(halfstep, CompositeExplicitAutograd, m) {
  m.impl("convolution", convolution);
  m.impl("convolution_backward", convolution_backward);
}
TORCH_LIBRARY_IMPL(halfstep, Autograd, m) {
  m.impl("convolution", convolution_autograd);
  m.impl("convolution_backward", convolution_backward_autograd);
}
TORCH_LIBRARY_IMPL(halfstep, AutocastCPU, m) {
  m.impl("convolution", convolution_autocast<at::kCPU>);
}
TORCH_LIBRARY_IMPL(halfstep, AutocastCUDA, m) {
  m.impl("convolution", convolution_autocast<at::kCUDA>);
}

}  // namespace halfstep::ops
