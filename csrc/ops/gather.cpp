#include "gather.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

namespace halfstep::ops {

using math::Dtype;
using math::MasterKind;
using math::StepTensor;

namespace {

MasterKind master_code(const at::Tensor& master) {
  if (master.numel() == 0) return MasterKind::kNone;
  if (master.scalar_type() == at::kShort) return MasterKind::kSplit16;
  return master.scalar_type() == at::kFloat ? MasterKind::kF32 : MasterKind::kF64;
}

void* data_or_null(at::TensorList list, size_t i) {
  return i < list.size() && list[i].numel() > 0 ? list[i].data_ptr() : nullptr;
}

}  // namespace

Dtype dtype_code(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return Dtype::kF16;
    case at::kBFloat16:
      return Dtype::kBF16;
    case at::kFloat:
      return Dtype::kF32;
    default:
      return Dtype::kF64;
  }
}

StepTensor describe_param(const at::Tensor& param, const at::Tensor& master) {
  StepTensor t;
  t.param = param.data_ptr();
  t.param_dtype = dtype_code(param.scalar_type());
  t.master_kind = master_code(master);
  t.master = t.master_kind == MasterKind::kNone ? nullptr : master.data_ptr();
  return t;
}

at::Tensor in_layout_of(const at::Tensor& tensor, const at::Tensor& like) {
  if (tensor.strides() == like.strides() || (tensor.is_contiguous() && like.is_contiguous()))
    return tensor;
  at::Tensor copy = at::empty_strided(like.sizes(), like.strides(), tensor.options());
  copy.copy_(tensor);
  return copy;
}

Gathered gather(at::TensorList params, const OptionalTensors& grads, at::TensorList masters,
                at::TensorList state1, at::TensorList state2, at::TensorList state3) {
  Gathered all;
  for (size_t i = 0; i < params.size(); ++i) {
    const std::optional<at::Tensor> grad = grads[i];
    if (!grad || !grad->defined()) continue;
    all.keep_alive.push_back(in_layout_of(*grad, params[i]));
    StepTensor t = describe_param(params[i], masters[i]);
    t.grad = all.keep_alive.back().const_data_ptr();
    t.grad_dtype = dtype_code(grad->scalar_type());
    t.state1 = data_or_null(state1, i);
    t.state2 = data_or_null(state2, i);
    t.state3 = data_or_null(state3, i);
    all.tensors.push_back(t);
    all.numels.push_back(params[i].numel());
    all.index.push_back(int64_t(i));
  }
  return all;
}

Gathered gather_masters(at::TensorList params, at::TensorList masters, at::TensorList values) {
  Gathered all;
  for (size_t i = 0; i < params.size(); ++i) {
    all.tensors.push_back(describe_param(params[i], masters[i]));
    all.tensors.back().state1 = data_or_null(values, i);
    all.numels.push_back(params[i].numel());
    all.index.push_back(int64_t(i));
  }
  return all;
}

std::vector<at::Tensor> values_for(at::TensorList values, at::TensorList params,
                                   at::TensorList masters) {
  std::vector<at::Tensor> flat;
  for (size_t i = 0; i < params.size(); ++i)
    flat.push_back(in_layout_of(values[i].to(compute_type(params[i], masters[i])), params[i]));
  return flat;
}

std::vector<at::Tensor> empty_values(at::TensorList params, at::TensorList masters) {
  std::vector<at::Tensor> values;
  for (size_t i = 0; i < params.size(); ++i)
    values.push_back(
        at::empty_like(params[i], params[i].options().dtype(compute_type(params[i], masters[i]))));
  return values;
}

std::vector<at::Tensor> dense_grads(const OptionalTensors& grads) {
  std::vector<at::Tensor> tensors;
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::optional<at::Tensor> grad = grads[i];
    const bool present = grad && grad->defined();
    tensors.push_back(!present                               ? at::Tensor()
                      : grad->is_non_overlapping_and_dense() ? *grad
                                                             : grad->contiguous());
  }
  return tensors;
}

}  // namespace halfstep::ops
