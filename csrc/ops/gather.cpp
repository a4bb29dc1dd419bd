#include "gather.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

namespace halfstep::ops {

using math::Dtype;
using math::MasterKind;
using math::StateKind;
using math::StepTensor;

namespace {

MasterKind master_code(const at::Tensor& master) {
  if (master.numel() == 0) return MasterKind::kNone;
  switch (master.scalar_type()) {
    case at::kShort:
      return MasterKind::kSplit16;
    case at::kChar:
      return MasterKind::kSplit8;
    case at::kFloat:
      return MasterKind::kF32;
    case at::kDouble:
      return MasterKind::kF64;
    default:
      return MasterKind::kKahan;
  }
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

StateKind state_code(at::ScalarType type) {
  if (type == at::kBFloat16) return StateKind::kBF16;
  return type == at::kChar || type == at::kByte ? StateKind::kInt8 : StateKind::kWide;
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

Gathered gather(const StepArgs& args, const RuleInfo& info) {
  Gathered all;
  const size_t n = args.params.size(), rows = size_t(info.elementwise + info.per_tensor);
  const bool scales = has_scales(args, info);
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor grad = args.grad(i);
    if (!grad.defined()) continue;
    const at::Tensor& param = args.params[i];
    const at::Tensor walked = in_layout_of(grad, param);
    StepTensor t = describe_param(param, args.masters[i]);
    if (args.stochastic && t.master_kind == MasterKind::kNone && dtype_size(t.param_dtype) == 2)
      t.master_kind = MasterKind::kStochastic;
    t.grad = const_cast<void*>(walked.const_data_ptr());
    t.grad_dtype = dtype_code(grad.scalar_type());
    for (size_t s = 0; s < rows; ++s) t.state[s] = data_or_null(args.states, s * n + i);
    if (info.elementwise > 0) t.state_kind = state_code(args.states[i].scalar_type());
    if (scales && t.state_kind == StateKind::kInt8)
      for (size_t s = 0; s < size_t(info.elementwise); ++s)
        t.exponent[s] = static_cast<int8_t*>(data_or_null(args.states, (rows + s) * n + i));
    t.ema = data_or_null(args.emas, i);
    all.tensors.push_back(t);
    all.numels.push_back(param.numel());
    all.index.push_back(int64_t(i));
    if (!walked.is_same(grad)) all.copies.emplace_back(walked, grad);
  }
  return all;
}

void zero_copied(const StepArgs& args, const Gathered& work) {
  if (args.zeroed.empty()) return;
  for (const auto& [copy, grad] : work.copies) grad.zero_();
}

void zero_all(const StepArgs& args) {
  for (const at::Tensor& grad : args.zeroed) grad.zero_();
}

Gathered gather_masters(at::TensorList params, at::TensorList masters, at::TensorList values) {
  Gathered all;
  for (size_t i = 0; i < params.size(); ++i) {
    all.tensors.push_back(describe_param(params[i], masters[i]));
    all.tensors.back().state[0] = data_or_null(values, i);
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
