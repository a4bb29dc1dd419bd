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
using math::Histogram;

/// Statistics of each tensor; zeros where it is undefined.
std::vector<BlockStats> stats_of(const std::vector<at::Tensor>& tensors) {
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
  std::vector<BlockStats> sums(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t b = 0; b < blocks.count(i); ++b) sums[i].add(partial[size_t(blocks.first(i) + b)]);
  return sums;
}

at::Tensor table_of(const std::vector<BlockStats>& sums, const std::vector<int64_t>& numels) {
  at::Tensor result =
      at::zeros({int64_t(sums.size()) + 1, math::kStatColumns}, at::TensorOptions(at::kDouble));
  auto* rows = result.mutable_data_ptr<double>();
  BlockStats all;
  int64_t numel = 0;
  double first_bad = -1;
  for (size_t i = 0; i < sums.size(); ++i) {
    const BlockStats& sum = sums[i];
    math::write_stats_row(rows + int64_t(i) * math::kStatColumns, sum, numels[i],
                          sum.nonfinite > 0);
    all.add(sum);
    numel += numels[i];
    if (first_bad < 0 && sum.nonfinite > 0) first_bad = double(i);
  }
  math::write_stats_row(rows + int64_t(sums.size()) * math::kStatColumns, all, numel, first_bad);
  return result;
}

std::vector<int64_t> numels_of(const std::vector<at::Tensor>& tensors) {
  std::vector<int64_t> numels;
  for (const at::Tensor& grad : tensors) numels.push_back(grad.defined() ? grad.numel() : 0);
  return numels;
}

at::Tensor grad_stats(const ops::OptionalTensors& grads, at::TensorList) {
  ops::check_grads("grad_stats", grads);
  const std::vector<at::Tensor> tensors = ops::dense_grads(grads);
  return table_of(stats_of(tensors), numels_of(tensors));
}

void grad_stats_row_(const at::Tensor& grad, const at::Tensor& rows, int64_t index) {
  ops::check_stats_row(grad, rows, index);
  const at::Tensor flat = grad.is_non_overlapping_and_dense() ? grad : grad.contiguous();
  const BlockStats sum = stats_of({flat})[0];
  math::write_stats_row(rows.mutable_data_ptr<double>() + index * math::kStatColumns, sum,
                        grad.numel(), sum.nonfinite > 0);
}

at::Tensor grad_stats_rest(const ops::OptionalTensors& grads, const at::Tensor& rows,
                           at::IntArrayRef stale, at::TensorList) {
  ops::check_stats_rest(grads, rows, stale);
  const std::vector<at::Tensor> tensors = ops::dense_grads(grads);
  std::vector<at::Tensor> read(tensors.size());
  for (const int64_t i : stale) read[size_t(i)] = tensors[size_t(i)];
  std::vector<BlockStats> sums = stats_of(read);
  const auto* known = rows.const_data_ptr<double>();
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].defined() && !read[i].defined())
      sums[i] = math::read_stats_row(known + int64_t(i) * math::kStatColumns);
  return table_of(sums, numels_of(tensors));
}

/// Counts are integers: threads may add them in any order.
void merge(const Histogram& part, Histogram& sum) {
  for (int c = 0; c < math::kHistColumns; ++c)
    if (part.counts[c] != 0)
      std::atomic_ref(sum.counts[c]).fetch_add(part.counts[c], std::memory_order_relaxed);
  std::atomic_ref<double> amax(sum.amax);
  double known = amax.load(std::memory_order_relaxed);
  while (part.amax > known && !amax.compare_exchange_weak(known, part.amax)) {
  }
}

at::Tensor grad_histogram(const ops::OptionalTensors& grads,
                          const std::optional<at::Tensor>& scale) {
  ops::check_histogram(grads, scale);
  const std::vector<at::Tensor> tensors = ops::dense_grads(grads);
  const math::Unscale unscale(scale ? double(*scale->const_data_ptr<float>()) : 1.0);
  std::vector<Histogram> sums(tensors.size());
  Blocks blocks;
  for (const int64_t numel : numels_of(tensors)) blocks.add(numel);
  const Kernels& k = kernels();
  blocks.for_each([&](size_t tensor, int64_t, int64_t begin, int64_t end) {
    const at::Tensor& grad = tensors[tensor];
    const auto* data = static_cast<const char*>(grad.const_data_ptr());
    Histogram part;
    k.grad_histogram(data + begin * int64_t(grad.element_size()),
                     ops::dtype_code(grad.scalar_type()), unscale.scale, end - begin, part);
    merge(part, sums[tensor]);
  });
  at::Tensor result =
      at::zeros({int64_t(tensors.size()), math::kHistColumns}, at::TensorOptions(at::kDouble));
  auto* row = result.mutable_data_ptr<double>();
  for (size_t i = 0; i < tensors.size(); ++i, row += math::kHistColumns) {
    for (int c = 0; c < math::kHistColumns; ++c) row[c] = double(sums[i].counts[c]);
    row[math::kHistCount] = tensors[i].defined() ? double(tensors[i].numel()) : 0;
    row[math::kHistAmax] = sums[i].amax / unscale.scale;
  }
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
  m.impl("grad_stats_row_", grad_stats_row_);
  m.impl("grad_stats_rest", grad_stats_rest);
  m.impl("grad_histogram", grad_histogram);
  m.impl("unscale_", unscale_);
  m.impl("unscale_to_", unscale_to_);
  m.impl("step_control", step_control);
}

}  // namespace halfstep::cpu
