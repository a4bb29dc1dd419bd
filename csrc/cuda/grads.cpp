#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"

namespace halfstep::cuda {

namespace {

/// Rows of the gradients that there are; `any` becomes one of them.
ops::Gathered gradient_rows(const std::vector<at::Tensor>& tensors, const at::Tensor*& any) {
  ops::Gathered work;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].defined()) continue;
    any = &tensors[i];
    math::StepTensor row;
    row.grad = const_cast<void*>(tensors[i].const_data_ptr());
    row.grad_dtype = ops::dtype_code(tensors[i].scalar_type());
    work.tensors.push_back(row);
    work.numels.push_back(tensors[i].numel());
    work.index.push_back(int64_t(i));
  }
  return work;
}

at::Tensor empty_rows(const Place& place, size_t rows, int64_t columns) {
  return at::empty({int64_t(rows), columns}, at::TensorOptions(at::kDouble).device(place.device()));
}

at::Tensor stats_of(const char* op, const ops::Gathered& work, const Place& place, size_t n,
                    const double* known, at::TensorList table) {
  const std::vector<Row> rows = make_rows(work);
  const DeviceTable device(op, place, rows, table);
  const at::Tensor partials =
      place.scratch(device.get().chunks * int64_t(sizeof(math::BlockStats)));
  at::Tensor result = empty_rows(place, n + 1, math::kStatColumns);
  check(op, grad_stats(device.get(), static_cast<math::BlockStats*>(partials.data_ptr()),
                       result.mutable_data_ptr<double>(), int64_t(n), known, place.stream()));
  return result;
}

at::Tensor grad_stats_cuda(const ops::OptionalTensors& grads, at::TensorList table) {
  ops::check_grads("grad_stats", grads);
  const std::vector<at::Tensor> tensors = ops::dense_grads(grads);
  const at::Tensor* any = nullptr;
  const ops::Gathered work = gradient_rows(tensors, any);
  TORCH_CHECK(any, "grad_stats: no gradient is given, so the device is unknown");
  const Place place(*any);
  ops::check_table("grad_stats", table, *any, grads.size(), sizeof(Row));
  return stats_of("grad_stats", work, place, grads.size(), nullptr, table);
}

void grad_stats_row_cuda(const at::Tensor& grad, const at::Tensor& rows, int64_t index) {
  const char* op = "grad_stats_row_";
  ops::check_stats_row(grad, rows, index);
  const at::Tensor* any = nullptr;
  const at::Tensor flat = grad.is_non_overlapping_and_dense() ? grad : grad.contiguous();
  ops::Gathered work = gradient_rows({flat}, any);
  work.index[0] = index;
  const Place place(grad);
  const DeviceTable device(op, place, make_rows(work), {});
  const at::Tensor partials =
      place.scratch(device.get().chunks * int64_t(sizeof(math::BlockStats)));
  check(op, grad_stats_rows(device.get(), static_cast<math::BlockStats*>(partials.data_ptr()),
                            rows.mutable_data_ptr<double>(), place.stream()));
}

at::Tensor grad_stats_rest_cuda(const ops::OptionalTensors& grads, const at::Tensor& rows,
                                at::IntArrayRef stale, at::TensorList table) {
  const char* op = "grad_stats_rest";
  ops::check_stats_rest(grads, rows, stale);
  ops::check_table(op, table, rows, grads.size(), sizeof(Row));
  const std::vector<at::Tensor> tensors = ops::dense_grads(grads);
  const at::Tensor* any = nullptr;
  ops::Gathered work = gradient_rows(tensors, any);
  std::vector<bool> read(tensors.size(), false);
  for (const int64_t i : stale) read[size_t(i)] = true;
  for (size_t r = 0; r < work.index.size(); ++r)
    if (!read[size_t(work.index[r])]) work.numels[r] = kKnown;
  const Place place(rows);
  return stats_of(op, work, place, grads.size(), rows.const_data_ptr<double>(), table);
}

at::Tensor grad_histogram_cuda(const ops::OptionalTensors& grads,
                               const std::optional<at::Tensor>& scale) {
  const char* op = "grad_histogram";
  ops::check_histogram(grads, scale);
  const std::vector<at::Tensor> tensors = ops::dense_grads(grads);
  const at::Tensor* any = nullptr;
  const ops::Gathered work = gradient_rows(tensors, any);
  TORCH_CHECK(any, op, ": no gradient is given, so the device is unknown");
  const Place place(*any);
  const DeviceTable device(op, place, make_rows(work), {});
  const at::Tensor partials =
      place.scratch(device.get().chunks * math::kHistColumns * int64_t(sizeof(int64_t)));
  at::Tensor result = empty_rows(place, grads.size(), math::kHistColumns);
  check(op,
        grad_histogram(device.get(), halfstep::cuda::scalar(scale),
                       static_cast<int64_t*>(partials.data_ptr()),
                       result.mutable_data_ptr<double>(), int64_t(grads.size()), place.stream()));
  return result;
}

void unscale_rows(const char* op, at::TensorList outputs, at::TensorList grads,
                  const at::Tensor& inv_scale, const at::Tensor& found_inf, at::TensorList table) {
  if (grads.empty()) return;
  const Place place(grads[0]);
  ops::check_table(op, table, grads[0], grads.size(), sizeof(Row));
  ops::Gathered work;
  std::vector<at::Tensor> walked;
  for (size_t i = 0; i < grads.size(); ++i) {
    walked.push_back(ops::in_layout_of(grads[i], outputs[i]));
    math::StepTensor row;
    row.grad = const_cast<void*>(walked.back().const_data_ptr());
    row.grad_dtype = ops::dtype_code(grads[i].scalar_type());
    row.param = outputs[i].mutable_data_ptr();
    row.param_dtype = ops::dtype_code(outputs[i].scalar_type());
    work.tensors.push_back(row);
    work.numels.push_back(grads[i].numel());
    work.index.push_back(int64_t(i));
  }
  const std::vector<Row> rows = make_rows(work);
  const DeviceTable device(op, place, rows, table);
  check(op, unscale(device.get(), inv_scale.const_data_ptr<float>(),
                    found_inf.mutable_data_ptr<float>(), place.stream()));
}

void unscale_(at::TensorList grads, const at::Tensor& inv_scale, const at::Tensor& found_inf,
              at::TensorList table) {
  ops::check_unscale("unscale_", grads, grads, inv_scale, found_inf);
  unscale_rows("unscale_", grads, grads, inv_scale, found_inf, table);
}

void unscale_to_(at::TensorList outputs, at::TensorList grads, const at::Tensor& inv_scale,
                 const at::Tensor& found_inf, at::TensorList table) {
  ops::check_unscale("unscale_to_", grads, outputs, inv_scale, found_inf);
  unscale_rows("unscale_to_", outputs, grads, inv_scale, found_inf, table);
}

at::Tensor step_control_cuda(at::TensorList stats, const std::optional<at::Tensor>& scale,
                             const std::optional<at::Tensor>& found_inf,
                             const std::optional<at::Tensor>& clip, double max_norm) {
  ops::check_step_control(stats, scale, found_inf, clip);
  const at::Tensor* any = stats.empty() ? nullptr : &stats[0];
  for (const auto* tensor : {&scale, &found_inf, &clip})
    if (!any && *tensor) any = &**tensor;
  const Place place(*any);
  std::vector<const double*> totals;
  for (const at::Tensor& rows : stats)
    totals.push_back(rows.const_data_ptr<double>() + (rows.size(0) - 1) * math::kStatColumns);
  at::Tensor control =
      at::empty({math::kControlEntries}, at::TensorOptions(at::kDouble).device(place.device()));
  check("step_control",
        step_control(totals.data(), int64_t(totals.size()), scalar(scale), scalar(found_inf),
                     scalar(clip), max_norm, control.mutable_data_ptr<double>(), place.stream()));
  return control;
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CUDA, m) {
  m.impl("grad_stats", grad_stats_cuda);
  m.impl("grad_stats_row_", grad_stats_row_cuda);
  m.impl("grad_stats_rest", grad_stats_rest_cuda);
  m.impl("grad_histogram", grad_histogram_cuda);
  m.impl("unscale_", unscale_);
  m.impl("unscale_to_", unscale_to_);
  m.impl("step_control", step_control_cuda);
}

}  // namespace halfstep::cuda
