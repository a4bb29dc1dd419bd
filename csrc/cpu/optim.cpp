#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "../ops/gather.h"

#include "common.h"

namespace halfstep::cpu {

namespace {

/// Runs body(tensor, position, begin, end) for every block in parallel; adds up what it returns.
template <class Body>
std::vector<int64_t> run_blocks(const ops::Gathered& work, const Body& body) {
  Blocks blocks;
  for (const int64_t numel : work.numels) blocks.add(numel);
  std::vector<std::atomic<int64_t>> found(work.tensors.size());
  blocks.for_each([&](size_t t, int64_t, int64_t begin, int64_t end) {
    const int64_t count = body(work.tensors[t], t, begin, end);
    if (count > 0) found[t].fetch_add(count, std::memory_order_relaxed);
  });
  return {found.begin(), found.end()};
}

/// The same for a step; what was kept from overflowing is added to `overflowed`.
template <class Body>
void run_step(const ops::Gathered& work, const at::Tensor& overflowed, const Body& body) {
  const std::vector<int64_t> kept = run_blocks(work, body);
  auto* counts = overflowed.mutable_data_ptr<int64_t>();
  for (size_t t = 0; t < kept.size(); ++t) counts[work.index[t]] += kept[t];
}

bool skipped(const std::optional<at::Tensor>& control) {
  return control && control->const_data_ptr<double>()[math::kControlFoundInf] != 0;
}
double multiplier(const std::optional<at::Tensor>& control) {
  return control ? control->const_data_ptr<double>()[math::kControlMultiplier] : 1.0;
}

void adam(const char*, bool decoupled, const ops::AdamArgs& args) {
  if (skipped(args.control)) return;
  const ops::Gathered work = ops::gather(args);
  auto* steps = args.steps.mutable_data_ptr<int64_t>();
  const double lr = *args.lr.const_data_ptr<double>();
  std::vector<math::AdamStep> constants;
  for (const int64_t i : work.index)
    constants.push_back(math::adam_step_constants(
        decoupled, args.amsgrad, args.maximize, lr, args.beta1, args.beta2, args.eps,
        args.weight_decay, multiplier(args.control), ++steps[i]));
  run_step(work, args.overflowed,
           [&, &k = kernels()](const StepTensor& tensor, size_t t, int64_t begin, int64_t end) {
             return k.adam(tensor, constants[t], begin, end);
           });
}

void sgd(const ops::SgdArgs& args) {
  if (skipped(args.control)) return;
  const ops::Gathered work = ops::gather(args);
  auto* steps = args.steps.mutable_data_ptr<int64_t>();
  const double lr = *args.lr.const_data_ptr<double>();
  std::vector<math::SgdStep> constants;
  for (const int64_t i : work.index)
    constants.push_back(math::sgd_step_constants(args.maximize, lr, args.momentum, args.dampening,
                                                 args.weight_decay, args.nesterov,
                                                 multiplier(args.control), ++steps[i]));
  run_step(work, args.overflowed,
           [&, &k = kernels()](const StepTensor& tensor, size_t t, int64_t begin, int64_t end) {
             return k.sgd(tensor, constants[t], begin, end);
           });
}

void write_counts(const at::Tensor& counts, const std::vector<int64_t>& found) {
  std::copy(found.begin(), found.end(), counts.mutable_data_ptr<int64_t>());
}

void write_masters_(at::TensorList values, at::TensorList params, at::TensorList masters,
                    const at::Tensor& overflowed) {
  ops::check_write_masters(values, params, masters, overflowed);
  const std::vector<at::Tensor> flat = ops::values_for(values, params, masters);
  write_counts(overflowed, run_blocks(ops::gather_masters(params, masters, flat),
                                      [](const StepTensor& t, size_t, int64_t begin, int64_t end) {
                                        return kernels().write_masters(t, t.state1, begin, end);
                                      }));
}

std::vector<at::Tensor> read_masters(at::TensorList params, at::TensorList masters) {
  ops::check_masters("read_masters", params, masters);
  std::vector<at::Tensor> values = ops::empty_values(params, masters);
  run_blocks(ops::gather_masters(params, masters, values),
             [](const StepTensor& t, size_t, int64_t begin, int64_t end) {
               kernels().read_masters(t, t.state1, begin, end);
               return int64_t{0};
             });
  return values;
}

void refresh_masters_(at::TensorList params, at::TensorList masters, const at::Tensor& changed,
                      bool dry_run) {
  ops::check_refresh_masters(params, masters, changed);
  write_counts(changed, run_blocks(ops::gather_masters(params, masters, {}),
                                   [&](const StepTensor& t, size_t, int64_t begin, int64_t end) {
                                     return kernels().refresh_masters(t, dry_run, begin, end);
                                   }));
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
