#include <halfstep/functional/linear.h>
#include <halfstep/nn/linear.h>

#include <ostream>

namespace halfstep::nn {

namespace {

void check_activation(const char* who, const std::optional<std::string>& activation) {
  const bool known =
      !activation || *activation == "relu" || *activation == "gelu" || *activation == "gelu_tanh";
  TORCH_CHECK_VALUE(known, who, ": activation is '", activation.value_or(""),
                    "'; expected none, 'relu', 'gelu' or 'gelu_tanh'");
}

}  // namespace

LinearImpl::LinearImpl(const LinearOptions& options)
    : torch::nn::LinearImpl(torch::nn::LinearOptions(options.in_features(), options.out_features())
                                .bias(options.bias())),
      activation(options.activation()) {
  check_activation("Linear", activation);
}

std::shared_ptr<torch::nn::Module> LinearImpl::clone(
    const std::optional<torch::Device>& device) const {
  // torch's clone() makes torch's layer of the copied tensors, and this one takes them over.
  const auto copy = torch::nn::LinearImpl::clone(device);
  const auto ours = std::make_shared<LinearImpl>(*copy->as<torch::nn::LinearImpl>());
  ours->activation = activation;
  return ours;
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "halfstep::nn::Linear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", bias=" << options.bias();
  if (activation) stream << ", activation=" << *activation;
  stream << ")";
}

at::Tensor LinearImpl::forward(const at::Tensor& x) {
  return functional::linear(x, weight, bias, activation);
}

MLPImpl::MLPImpl(const MLPOptions& options) : options(options) {
  check_activation("MLP", options.activation());
  MLPImpl::reset();
}

void MLPImpl::reset() {
  fc1 =
      register_module("fc1", Linear(LinearOptions(options.in_features(), options.hidden_features())
                                        .bias(options.bias())
                                        .activation(options.activation())));
  fc2 = register_module(
      "fc2",
      Linear(
          LinearOptions(options.hidden_features(), options.out_features()).bias(options.bias())));
}

at::Tensor MLPImpl::forward(const at::Tensor& x) { return fc2(fc1(x)); }

}  // namespace halfstep::nn
