#pragma once

// From tensors to what a kernel walks: pointers, dtypes and one common flat order. Shared by the
// CPU and the CUDA side of the step ops.

#include <vector>

#include "../math/optim.h"
#include "optim.h"

namespace halfstep::ops {

math::Dtype dtype_code(at::ScalarType type);
math::StateKind state_code(at::ScalarType type);

/// Pointers and dtypes of a parameter and its master.
math::StepTensor describe_param(const at::Tensor& param, const at::Tensor& master);

/// `tensor` walked flat in the order of `like`: itself where the strides agree, else a copy.
at::Tensor in_layout_of(const at::Tensor& tensor, const at::Tensor& like);

/// The parameters of a group that have a gradient, in order.
struct Gathered {
  std::vector<math::StepTensor> tensors;
  std::vector<int64_t> numels;
  std::vector<int64_t> index;  ///< position in the group
  /// Gradients that are walked as a copy in their parameter's layout: {copy, gradient}.
  std::vector<std::pair<at::Tensor, at::Tensor>> copies;
};

Gathered gather(const StepArgs& args, const RuleInfo& info);
/// Gradients that are walked as a copy in their parameter's layout are zeroed here, the others by
/// the kernel.
void zero_copied(const StepArgs& args, const Gathered& work);
/// All gradients of a step that zeroes them.
void zero_all(const StepArgs& args);

/// Every parameter, whether or not it has a gradient; `values` (compute type, the parameters'
/// layout) as state[0], or an empty list.
Gathered gather_masters(at::TensorList params, at::TensorList masters, at::TensorList values);

/// `values` in the compute type and layout of their parameters.
std::vector<at::Tensor> values_for(at::TensorList values, at::TensorList params,
                                   at::TensorList masters);
/// Empty tensors for the exact values of `params`.
std::vector<at::Tensor> empty_values(at::TensorList params, at::TensorList masters);

/// A dense gradient as it is, another made contiguous: statistics do not depend on the order.
std::vector<at::Tensor> dense_grads(const OptionalTensors& grads);

}  // namespace halfstep::ops
