#include "dispatch.h"

#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <memory>

namespace halfstep::ops {

void differentiable_once(const char* op, std::initializer_list<const at::Tensor*> inputs,
                         std::initializer_list<at::Tensor*> outputs) {
  const auto wants = [](const at::Tensor* t) { return t->defined() && t->requires_grad(); };
  if (!c10::GradMode::is_enabled() || !std::any_of(inputs.begin(), inputs.end(), wants)) return;
  torch::autograd::variable_list results;
  for (const at::Tensor* output : outputs)
    if (output->defined()) results.push_back(output->detach().set_requires_grad(true));
  const auto error = std::make_shared<torch::autograd::DelayedError>(
      std::string("halfstep::") + op + " is differentiable once; it has no second derivative",
      int64_t(results.size()));
  torch::autograd::variable_list marked = (*error)(std::move(results));
  size_t next = 0;
  for (at::Tensor* output : outputs)
    if (output->defined()) *output = marked[next++];
}

at::Tensor autocast_to_lower(const at::Tensor& tensor, at::DeviceType device) {
  if (!tensor.defined()) return tensor;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

std::optional<at::Tensor> autocast_to_lower(const std::optional<at::Tensor>& tensor,
                                            at::DeviceType device) {
  if (!tensor) return tensor;
  return autocast_to_lower(*tensor, device);
}

}  // namespace halfstep::ops
