#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace halfstep::ops {

using OptionalTensor = std::optional<at::Tensor>;

/// An argument of an op from a tensor that may be undefined: autograd's saved ones, a module's
/// bias.
inline OptionalTensor given(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

}  // namespace halfstep::ops
