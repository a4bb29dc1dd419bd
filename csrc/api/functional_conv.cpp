#include <halfstep/functional/conv.h>

#include <ATen/ops/constant_pad_nd.h>

#include <array>

#include "calls.h"

namespace halfstep::functional {

namespace {

namespace options = torch::nn::functional;

at::Tensor call(size_t dims, const at::Tensor& input, const at::Tensor& weight,
                const at::Tensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                int64_t groups) {
  using Ints = c10::SymIntArrayRef;
  static const auto op =
      api::find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const api::OptionalTensor&,
                              Ints, Ints, Ints, bool, Ints, c10::SymInt)>("halfstep::convolution");
  const bool one = size_t(input.dim()) == dims + 1;  // a sample without a batch dimension
  const auto ints = [](at::IntArrayRef values) { return c10::fromIntArrayRefSlow(values); };
  const at::Tensor out =
      op.call(one ? input.unsqueeze(0) : input, weight,
              bias.defined() ? api::OptionalTensor(bias) : std::nullopt, ints(stride),
              ints(padding), ints(dilation), transposed, ints(output_padding), groups);
  return one ? out.squeeze(0) : out;
}

template <size_t D>
at::Tensor plain(const char* name, const at::Tensor& input, const at::Tensor& weight,
                 const options::ConvFuncOptions<D>& o) {
  const std::array<int64_t, D> none{};
  const auto with = [&](const at::Tensor& x, at::IntArrayRef padding) {
    return call(D, x, weight, o.bias(), *o.stride(), padding, *o.dilation(), false, none,
                o.groups());
  };
  if (std::holds_alternative<torch::enumtype::kValid>(o.padding())) return with(input, none);
  if (const auto* padding = std::get_if<torch::ExpandingArray<D>>(&o.padding()))
    return with(input, **padding);
  TORCH_CHECK(weight.dim() == int64_t(D) + 2, name, ": weight has ", weight.dim(),
              " dimensions; expected ", D + 2);
  std::array<int64_t, D> padding;
  std::array<int64_t, 2 * D> behind{};  // as in torch, one more behind than in front
  for (size_t d = 0; d < D; ++d) {
    TORCH_CHECK((*o.stride())[d] == 1, name, ": padding is 'same' but stride is ",
                at::IntArrayRef(*o.stride()), "; expected 1");
    const int64_t total = (*o.dilation())[d] * (weight.size(int64_t(d) + 2) - 1);
    padding[d] = total / 2;
    behind[2 * (D - 1 - d) + 1] = total % 2;
  }
  return with(behind == std::array<int64_t, 2 * D>{} ? input : at::constant_pad_nd(input, behind),
              padding);
}

template <size_t D>
at::Tensor transposed(const at::Tensor& input, const at::Tensor& weight,
                      const options::ConvTransposeFuncOptions<D>& o) {
  return call(D, input, weight, o.bias(), *o.stride(), *o.padding(), *o.dilation(), true,
              *o.output_padding(), o.groups());
}

}  // namespace

at::Tensor conv1d(const at::Tensor& input, const at::Tensor& weight,
                  const options::Conv1dFuncOptions& o) {
  return plain<1>("conv1d", input, weight, o);
}
at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight,
                  const options::Conv2dFuncOptions& o) {
  return plain<2>("conv2d", input, weight, o);
}
at::Tensor conv3d(const at::Tensor& input, const at::Tensor& weight,
                  const options::Conv3dFuncOptions& o) {
  return plain<3>("conv3d", input, weight, o);
}
at::Tensor conv_transpose1d(const at::Tensor& input, const at::Tensor& weight,
                            const options::ConvTranspose1dFuncOptions& o) {
  return transposed<1>(input, weight, o);
}
at::Tensor conv_transpose2d(const at::Tensor& input, const at::Tensor& weight,
                            const options::ConvTranspose2dFuncOptions& o) {
  return transposed<2>(input, weight, o);
}
at::Tensor conv_transpose3d(const at::Tensor& input, const at::Tensor& weight,
                            const options::ConvTranspose3dFuncOptions& o) {
  return transposed<3>(input, weight, o);
}

}  // namespace halfstep::functional
