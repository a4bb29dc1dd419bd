#include <halfstep/functional/softmax.h>
#include <halfstep/nn/softmax.h>

namespace halfstep::nn {

SoftmaxImpl::SoftmaxImpl(const SoftmaxOptions& options)
    : torch::nn::SoftmaxImpl(options), scale(options.scale()), causal(options.causal()) {}
SoftmaxImpl::SoftmaxImpl(const torch::nn::SoftmaxImpl& stock)
    : torch::nn::SoftmaxImpl(stock), scale(1), causal(false) {}

at::Tensor SoftmaxImpl::forward(const at::Tensor& x, const std::optional<at::Tensor>& mask) {
  return functional::softmax(x, options.dim(), scale, mask, causal);
}

std::shared_ptr<torch::nn::Module> SoftmaxImpl::clone(const std::optional<torch::Device>&) const {
  return std::make_shared<SoftmaxImpl>(*this);  // it holds no tensors
}

void SoftmaxImpl::pretty_print(std::ostream& stream) const {
  stream << "halfstep::nn::Softmax(dim=" << options.dim() << ", scale=" << scale
         << ", causal=" << std::boolalpha << causal << ")";
}

}  // namespace halfstep::nn
