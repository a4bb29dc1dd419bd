#include <halfstep/functional/conv.h>
#include <halfstep/nn/conv.h>

#include <torch/nn/functional/padding.h>

#include <array>

namespace halfstep::nn {

namespace {

namespace F = torch::nn::functional;

/// torch's pad for padding_mode other than zeros, after which the convolution does not pad.
template <class Mode>
at::Tensor padded(const at::Tensor& input, const Mode& mode, const std::vector<int64_t>& reversed) {
  F::PadFuncOptions options(reversed);
  if (std::holds_alternative<torch::enumtype::kReflect>(mode))
    options.mode(torch::kReflect);
  else if (std::holds_alternative<torch::enumtype::kReplicate>(mode))
    options.mode(torch::kReplicate);
  else
    options.mode(torch::kCircular);
  return F::pad(input, options);
}

/// What lengthens the smallest output to `wanted`: the spatial sizes, or all of them.
template <size_t D>
torch::ExpandingArray<D> output_padding(const char* name, const at::Tensor& input,
                                        const std::optional<at::IntArrayRef>& wanted,
                                        const torch::nn::detail::ConvNdOptions<D>& o,
                                        const torch::ExpandingArray<D>& padding) {
  if (!wanted) return o.output_padding();
  TORCH_CHECK(wanted->size() == D || wanted->size() == D + 2, name, ": output_size is ", *wanted,
              "; expected ", D, " or ", D + 2, " entries");
  const at::IntArrayRef sizes = wanted->slice(wanted->size() - D);
  std::array<int64_t, D> result;
  for (size_t d = 0; d < D; ++d) {
    const int64_t kernel = (*o.dilation())[d] * ((*o.kernel_size())[d] - 1) + 1;
    const int64_t least =
        (input.size(int64_t(d) - int64_t(D)) - 1) * (*o.stride())[d] - 2 * (*padding)[d] + kernel;
    result[d] = sizes[d] - least;
    TORCH_CHECK(result[d] >= 0 && result[d] < (*o.stride())[d], name, ": output_size is ", *wanted,
                "; expected from ", least, " to ", least + (*o.stride())[d] - 1, " in dimension ",
                d);
  }
  return result;
}

/// A fresh module of the same type with copies of the parameters, their dtypes kept.
template <class Module, class Options>
std::shared_ptr<torch::nn::Module> copy_of(const Module& module, const Options& options,
                                           const std::optional<torch::Device>& device) {
  const torch::NoGradGuard no_grad;
  auto copy = std::make_shared<Module>(options);
  auto targets = copy->named_parameters(false);
  for (const auto& parameter : module.named_parameters(false)) {
    const at::Tensor& value = parameter.value();
    at::Tensor& target = targets[parameter.key()];
    target.set_data(device && value.device() != *device ? value.to(*device) : value.clone());
    target.set_requires_grad(value.requires_grad());
  }
  copy->train(module.is_training());
  return copy;
}

}  // namespace

// torch's modules hold the options of all convolutions in one type; its own constructor takes them
// one by one.
#define HALFSTEP_CONV(name, function, D)                                                           \
  at::Tensor name##Impl::forward(const at::Tensor& input) {                                        \
    F::ConvFuncOptions<D> o;                                                                       \
    o.bias(bias).stride(options.stride()).dilation(options.dilation());                            \
    o.groups(options.groups());                                                                    \
    const bool zeros = std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode());    \
    if (!zeros)                                                                                    \
      return functional::function(                                                                 \
          padded(input, options.padding_mode(), _reversed_padding_repeated_twice), weight, o);     \
    std::visit([&](const auto& padding) { o.padding(padding); }, options.padding());               \
    return functional::function(input, weight, o);                                                 \
  }                                                                                                \
  std::shared_ptr<torch::nn::Module> name##Impl::clone(const std::optional<torch::Device>& device) \
      const {                                                                                      \
    torch::nn::name##Options o(options.in_channels(), options.out_channels(),                      \
                               options.kernel_size());                                             \
    o.stride(options.stride()).dilation(options.dilation()).groups(options.groups());              \
    o.bias(options.bias()).padding_mode(options.padding_mode());                                   \
    std::visit([&](const auto& padding) { o.padding(padding); }, options.padding());               \
    return copy_of(*this, o, device);                                                              \
  }
#define HALFSTEP_CONV_TRANSPOSE(name, function, D)                                                 \
  at::Tensor name##Impl::forward(const at::Tensor& input,                                          \
                                 const std::optional<at::IntArrayRef>& output_size) {              \
    TORCH_CHECK(std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode()),           \
                #name ": padding_mode is ",                                                        \
                torch::enumtype::get_enum_name(options.padding_mode()), "; expected zeros");       \
    F::ConvTransposeFuncOptions<D> o;                                                              \
    o.bias(bias).stride(options.stride()).padding(padding()).groups(options.groups());             \
    o.dilation(options.dilation());                                                                \
    o.output_padding(output_padding<D>(#name, input, output_size, options, padding()));            \
    return functional::function(input, weight, o);                                                 \
  }                                                                                                \
  std::shared_ptr<torch::nn::Module> name##Impl::clone(const std::optional<torch::Device>& device) \
      const {                                                                                      \
    torch::nn::name##Options o(options.in_channels(), options.out_channels(),                      \
                               options.kernel_size());                                             \
    o.stride(options.stride()).padding(padding()).output_padding(options.output_padding());        \
    o.groups(options.groups()).bias(options.bias()).dilation(options.dilation());                  \
    o.padding_mode(options.padding_mode());                                                        \
    return copy_of(*this, o, device);                                                              \
  }

HALFSTEP_CONV(Conv1d, conv1d, 1)
HALFSTEP_CONV(Conv2d, conv2d, 2)
HALFSTEP_CONV(Conv3d, conv3d, 3)
HALFSTEP_CONV_TRANSPOSE(ConvTranspose1d, conv_transpose1d, 1)
HALFSTEP_CONV_TRANSPOSE(ConvTranspose2d, conv_transpose2d, 2)
HALFSTEP_CONV_TRANSPOSE(ConvTranspose3d, conv_transpose3d, 3)

}  // namespace halfstep::nn
