#include "../ops/optim.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <atomic>

#include "common.h"

namespace halfstep::cpu {

namespace {

MasterKind master_code(const at::Tensor& master) {
  if (master.numel() == 0) return MasterKind::kNone;
  if (master.scalar_type() == at::kShort) return MasterKind::kSplit16;
  return master.scalar_type() == at::kFloat ? MasterKind::kF32 : MasterKind::kF64;
}

void* data_or_null(at::TensorList list, size_t i) {
  return i < list.size() && list[i].numel() > 0 ? list[i].data_ptr() : nullptr;
}

StepTensor describe_param(const at::Tensor& param, const at::Tensor& master) {
  StepTensor t;
  t.param = param.data_ptr();
  t.param_dtype = dtype_code(param.scalar_type());
  t.master_kind = master_code(master);
  t.master = t.master_kind == MasterKind::kNone ? nullptr : master.data_ptr();
  return t;
}

/// `tensor` walked flat in the order of `like`: itself where the strides agree, else a copy.
at::Tensor in_layout_of(const at::Tensor& tensor, const at::Tensor& like) {
  if (tensor.strides() == like.strides() || (tensor.is_contiguous() && like.is_contiguous()))
    return tensor;
  at::Tensor copy = at::empty_strided(like.sizes(), like.strides(), tensor.options());
  copy.copy_(tensor);
  return copy;
}

/// The parameters of a group that have a gradient.
struct Work {
  std::vector<StepTensor> tensors;
  std::vector<size_t> index;  ///< position in the group
  std::vector<at::Tensor> keep_alive;
  Blocks blocks;

  Work(at::TensorList params, const ops::OptionalTensors& grads, at::TensorList masters,
       at::TensorList state1, at::TensorList state2, at::TensorList state3) {
    for (size_t i = 0; i < params.size(); ++i) {
      const std::optional<at::Tensor> grad = grads[i];
      if (!grad || !grad->defined()) continue;
      keep_alive.push_back(in_layout_of(*grad, params[i]));
      StepTensor t = describe_param(params[i], masters[i]);
      t.grad = keep_alive.back().const_data_ptr();
      t.grad_dtype = dtype_code(grad->scalar_type());
      t.state1 = data_or_null(state1, i);
      t.state2 = data_or_null(state2, i);
      t.state3 = data_or_null(state3, i);
      tensors.push_back(t);
      index.push_back(i);
      blocks.add(params[i].numel());
    }
  }

  /// run(position, begin, end) for every block; adds what was kept from overflowing.
  template <class Run>
  void run(const at::Tensor& overflowed, const Run& body) const {
    std::vector<std::atomic<int64_t>> kept(tensors.size());
    blocks.for_each([&](size_t t, int64_t, int64_t begin, int64_t end) {
      const int64_t count = body(t, begin, end);
      if (count > 0) kept[t].fetch_add(count, std::memory_order_relaxed);
    });
    auto* counts = overflowed.mutable_data_ptr<int64_t>();
    for (size_t t = 0; t < tensors.size(); ++t) counts[index[t]] += kept[t].load();
  }
};

bool skipped(const std::optional<at::Tensor>& control) {
  return control && control->const_data_ptr<double>()[math::kControlFoundInf] != 0;
}
double multiplier(const std::optional<at::Tensor>& control) {
  return control ? control->const_data_ptr<double>()[math::kControlMultiplier] : 1.0;
}

void adam(const char*, bool decoupled, const ops::AdamArgs& args) {
  if (skipped(args.control)) return;
  const Work work(args.params, args.grads, args.masters, args.exp_avgs, args.exp_avg_sqs,
                  args.amsgrad ? args.max_exp_avg_sqs : at::TensorList());
  auto* steps = args.steps.mutable_data_ptr<int64_t>();
  const double lr = *args.lr.const_data_ptr<double>();
  std::vector<math::AdamStep> constants;
  for (const size_t i : work.index)
    constants.push_back(math::adam_step_constants(
        decoupled, args.amsgrad, args.maximize, lr, args.beta1, args.beta2, args.eps,
        args.weight_decay, multiplier(args.control), ++steps[i]));
  work.run(args.overflowed, [&, &k = kernels()](size_t t, int64_t begin, int64_t end) {
    return k.adam(work.tensors[t], constants[t], begin, end);
  });
}

void sgd(const ops::SgdArgs& args) {
  if (skipped(args.control)) return;
  const Work work(args.params, args.grads, args.masters,
                  args.momentum != 0 ? args.momentum_buffers : at::TensorList(), {}, {});
  auto* steps = args.steps.mutable_data_ptr<int64_t>();
  const double factor = multiplier(args.control);
  std::vector<math::SgdStep> constants;
  for (const size_t i : work.index)
    constants.push_back({args.maximize ? -factor : factor, args.weight_decay, args.momentum,
                         1 - args.dampening, *args.lr.const_data_ptr<double>(), args.nesterov,
                         steps[i]++ == 0});
  work.run(args.overflowed, [&, &k = kernels()](size_t t, int64_t begin, int64_t end) {
    return k.sgd(work.tensors[t], constants[t], begin, end);
  });
}

/// Every parameter of the lists, whether or not it has a gradient: body(tensor, i, begin, end).
template <class Body>
void for_each_master(at::TensorList params, at::TensorList masters, const at::Tensor* counts,
                     const Body& body) {
  std::vector<StepTensor> tensors;
  Blocks blocks;
  for (size_t i = 0; i < params.size(); ++i) {
    tensors.push_back(describe_param(params[i], masters[i]));
    blocks.add(params[i].numel());
  }
  std::vector<std::atomic<int64_t>> found(params.size());
  blocks.for_each([&](size_t i, int64_t, int64_t begin, int64_t end) {
    const int64_t count = body(tensors[i], i, begin, end);
    if (count > 0) found[i].fetch_add(count, std::memory_order_relaxed);
  });
  if (!counts) return;
  for (size_t i = 0; i < params.size(); ++i)
    counts->mutable_data_ptr<int64_t>()[i] = found[i].load();
}

void write_masters_(at::TensorList values, at::TensorList params, at::TensorList masters,
                    const at::Tensor& overflowed) {
  ops::check_values("write_masters_", values, params, masters);
  ops::check_counter("write_masters_", "overflowed", overflowed, params.size(), params);
  std::vector<at::Tensor> flat;
  for (size_t i = 0; i < params.size(); ++i)
    flat.push_back(in_layout_of(values[i].to(ops::compute_type(params[i], masters[i])), params[i]));
  for_each_master(params, masters, &overflowed,
                  [&](const StepTensor& t, size_t i, int64_t begin, int64_t end) {
                    return kernels().write_masters(t, flat[i].const_data_ptr(), begin, end);
                  });
}

std::vector<at::Tensor> read_masters(at::TensorList params, at::TensorList masters) {
  ops::check_masters("read_masters", params, masters);
  std::vector<at::Tensor> values;
  for (size_t i = 0; i < params.size(); ++i)
    values.push_back(at::empty_like(
        params[i], params[i].options().dtype(ops::compute_type(params[i], masters[i]))));
  for_each_master(params, masters, nullptr,
                  [&](const StepTensor& t, size_t i, int64_t begin, int64_t end) {
                    kernels().read_masters(t, values[i].data_ptr(), begin, end);
                    return int64_t{0};
                  });
  return values;
}

void refresh_masters_(at::TensorList params, at::TensorList masters, const at::Tensor& changed,
                      bool dry_run) {
  ops::check_masters("refresh_masters_", params, masters);
  ops::check_counter("refresh_masters_", "changed", changed, params.size(), params);
  for_each_master(params, masters, &changed,
                  [&](const StepTensor& t, size_t, int64_t begin, int64_t end) {
                    return kernels().refresh_masters(t, dry_run, begin, end);
                  });
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CPU, m) {
  m.impl("adamw_step_", ops::adam_op<adam, true>);
  m.impl("adam_step_", ops::adam_op<adam, false>);
  m.impl("sgd_step_", ops::sgd_op<sgd>);
  m.impl("write_masters_", write_masters_);
  m.impl("read_masters", read_masters);
  m.impl("refresh_masters_", refresh_masters_);
}

}  // namespace halfstep::cpu
