#pragma once

// From tensors to what a kernel walks: pointers, dtypes and one common flat order. Shared by the
// CPU and the CUDA side of the step ops.

#include <vector>

#include "../math/optim.h"
#include "optim.h"

namespace halfstep::ops {

math::Dtype dtype_code(at::ScalarType type);

/// Pointers and dtypes of a parameter and its master.
math::StepTensor describe_param(const at::Tensor& param, const at::Tensor& master);

/// `tensor` walked flat in the order of `like`: itself where the strides agree, else a copy.
at::Tensor in_layout_of(const at::Tensor& tensor, const at::Tensor& like);

/// The parameters of a group that have a gradient, in order.
struct Gathered {
  std::vector<math::StepTensor> tensors;
  std::vector<int64_t> numels;
  std::vector<int64_t> index;          ///< position in the group
  std::vector<at::Tensor> keep_alive;  ///< gradients copied into their parameter's layout
};

/// States may be empty lists.
Gathered gather(at::TensorList params, const OptionalTensors& grads, at::TensorList masters,
                at::TensorList state1, at::TensorList state2, at::TensorList state3);
inline Gathered gather(const AdamArgs& args) {
  return gather(args.params, args.grads, args.masters, args.exp_avgs, args.exp_avg_sqs,
                args.amsgrad ? args.max_exp_avg_sqs : at::TensorList());
}
inline Gathered gather(const SgdArgs& args) {
  return gather(args.params, args.grads, args.masters,
                args.momentum != 0 ? args.momentum_buffers : at::TensorList(), {}, {});
}

/// Every parameter, whether or not it has a gradient; `values` (compute type, the parameters'
/// layout) as state1, or an empty list.
Gathered gather_masters(at::TensorList params, at::TensorList masters, at::TensorList values);

/// `values` in the compute type and layout of their parameters.
std::vector<at::Tensor> values_for(at::TensorList values, at::TensorList params,
                                   at::TensorList masters);
/// Empty tensors for the exact values of `params`.
std::vector<at::Tensor> empty_values(at::TensorList params, at::TensorList masters);

/// A dense gradient as it is, another made contiguous: statistics do not depend on the order.
std::vector<at::Tensor> dense_grads(const OptionalTensors& grads);

}  // namespace halfstep::ops
