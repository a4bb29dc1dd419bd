#include "../math/grads.h"

#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <optional>

#include "../ops/gather.h"
#include "common.h"

namespace halfstep::cpu {

namespace {

using math::BlockStats;

at::Tensor grad_stats(const c10::List<std::optional<at::Tensor>>& grads, at::TensorList) {
  ops::check_grads("grad_stats", grads);
  const std::vector<at::Tensor> tensors = ops::dense_grads(grads);
  Blocks blocks;
  for (const at::Tensor& grad : tensors) blocks.add(grad.defined() ? grad.numel() : 0);
  std::vector<BlockStats> partial(size_t(blocks.total()));
  const Kernels& k = kernels();
  blocks.for_each([&](size_t tensor, int64_t block, int64_t begin, int64_t end) {
    const at::Tensor& grad = tensors[tensor];
    const auto* data = static_cast<const char*>(grad.const_data_ptr());
    partial[size_t(block)] = k.grad_stats(data + begin * int64_t(grad.element_size()),
                                          ops::dtype_code(grad.scalar_type()), end - begin);
  });

  at::Tensor result =
      at::zeros({int64_t(grads.size()) + 1, math::kStatColumns}, at::TensorOptions(at::kDouble));
  auto* rows = result.mutable_data_ptr<double>();
  BlockStats all;
  int64_t numel = 0;
  double first_bad = -1;
  for (size_t i = 0; i < grads.size(); ++i) {
    BlockStats sum;
    for (int64_t b = 0; b < blocks.count(i); ++b) sum.add(partial[size_t(blocks.first(i) + b)]);
    const int64_t count = tensors[i].defined() ? tensors[i].numel() : 0;
    math::write_stats_row(rows + int64_t(i) * math::kStatColumns, sum, count, sum.nonfinite > 0);
    all.add(sum);
    numel += count;
    if (first_bad < 0 && sum.nonfinite > 0) first_bad = double(i);
  }
  math::write_stats_row(rows + int64_t(grads.size()) * math::kStatColumns, all, numel, first_bad);
  return result;
}

void unscale_blocks(at::TensorList outputs, at::TensorList grads, const at::Tensor& inv_scale,
                    const at::Tensor& found_inf) {
  std::vector<at::Tensor> inputs;
  Blocks blocks;
  for (size_t i = 0; i < grads.size(); ++i) {
    inputs.push_back(ops::in_layout_of(grads[i], outputs[i]));
    blocks.add(inputs.back().numel());
  }
  const double factor = *inv_scale.const_data_ptr<float>();
  std::atomic<bool> bad{false};
  const Kernels& k = kernels();
  blocks.for_each([&](size_t i, int64_t, int64_t begin, int64_t end) {
    const auto* in = static_cast<const char*>(inputs[i].const_data_ptr());
    auto* out = static_cast<char*>(outputs[i].mutable_data_ptr());
    if (k.unscale(in + begin * int64_t(inputs[i].element_size()),
                  ops::dtype_code(inputs[i].scalar_type()),
                  out + begin * int64_t(outputs[i].element_size()),
                  ops::dtype_code(outputs[i].scalar_type()), factor, end - begin))
      bad.store(true, std::memory_order_relaxed);
  });
  if (bad) *found_inf.mutable_data_ptr<float>() = 1.0f;
}

void unscale_(at::TensorList grads, const at::Tensor& inv_scale, const at::Tensor& found_inf,
              at::TensorList) {
  ops::check_unscale("unscale_", grads, grads, inv_scale, found_inf);
  unscale_blocks(grads, grads, inv_scale, found_inf);
}

void unscale_to_(at::TensorList outputs, at::TensorList grads, const at::Tensor& inv_scale,
                 const at::Tensor& found_inf, at::TensorList) {
  ops::check_unscale("unscale_to_", grads, outputs, inv_scale, found_inf);
  unscale_blocks(outputs, grads, inv_scale, found_inf);
}

double scalar_or(const std::optional<at::Tensor>& tensor, double otherwise) {
  if (!tensor) return otherwise;
  return tensor->scalar_type() == at::kDouble ? *tensor->const_data_ptr<double>()
                                              : double(*tensor->const_data_ptr<float>());
}

at::Tensor step_control(at::TensorList stats, const std::optional<at::Tensor>& scale,
                        const std::optional<at::Tensor>& found_inf,
                        const std::optional<at::Tensor>& clip, double max_norm) {
  ops::check_step_control(stats, scale, found_inf, clip);
  double sum_squares = 0;
  const double flag = scalar_or(found_inf, 0);
  bool bad = flag != 0;  // true for NaN
  for (const at::Tensor& table : stats) {
    const double* totals =
        table.const_data_ptr<double>() + (table.size(0) - 1) * math::kStatColumns;
    sum_squares += totals[math::kStatSumSquares];
    bad |= totals[math::kStatFoundInf] != 0;
  }
  at::Tensor control = at::empty({math::kControlEntries}, at::TensorOptions(at::kDouble));
  math::write_control(control.mutable_data_ptr<double>(), sum_squares, bad, scalar_or(scale, 1),
                      max_norm, scalar_or(clip, 1));
  return control;
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CPU, m) {
  m.impl("grad_stats", grad_stats);
  m.impl("unscale_", unscale_);
  m.impl("unscale_to_", unscale_to_);
  m.impl("step_control", step_control);
}

}  // namespace halfstep::cpu
