#include "../math/grads.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"

// Gradients: statistics, unscaling, and the four numbers that a step needs of them.

namespace halfstep::ops {

namespace {

constexpr const char* kSchemas[] = {
    // float64 [n + 1, 8] on the gradients' device; columns in csrc/math/grads.h (StatColumn). Row i
    // is
    // gradient i (None: a row of zeros), the last row the totals. Reads each gradient once.
    "grad_stats(Tensor?[] grads, Tensor(a!)[] table) -> Tensor",
    // rows[index] = row 0 of grad_stats([grad]): for gradients that are looked at one by one.
    "grad_stats_row_(Tensor grad, Tensor(a!) rows, int index) -> ()",
    // grad_stats(grads), bit for bit, where row i of `rows` already is that of gradient i unless i
    // is
    // in `stale`: only those are read.
    "grad_stats_rest(Tensor?[] grads, Tensor rows, int[] stale, Tensor(a!)[] table) -> Tensor",
    // float64 [n, 62]: counts of |gradient / scale| by powers of two; columns in csrc/math/grads.h
    // (HistogramColumn). scale: one float32 element. None: a row of zeros. Reads each gradient
    // once.
    "grad_histogram(Tensor?[] grads, Tensor? scale) -> Tensor",
    // grad_stats without a table: a pure op, for graphs. Inductor of torch 2.11 fails on an op that
    // returns one tensor and has an empty list for the arguments it writes.
    "grad_stats_of(Tensor?[] grads) -> Tensor",
    // grads *= inv_scale in place; found_inf becomes 1 when an element is non-finite before or
    // after.
    "unscale_(Tensor(a!)[] grads, Tensor inv_scale, Tensor(b!) found_inf, Tensor(t!)[] table) -> "
    "()",
    // outputs = grads * inv_scale with one rounding to the outputs' dtype; grads are left as they
    // are.
    "unscale_to_(Tensor(a!)[] outputs, Tensor[] grads, Tensor inv_scale, Tensor(b!) found_inf, "
    "Tensor(t!)[] table) -> ()",
    // float64 [4]: {found_inf, multiplier, norm, clip} (ControlEntry). `stats` may be empty;
    // found_inf
    // is OR-ed in (not 0, or NaN); clip is a further factor; max_norm < 0 means no clipping.
    "step_control(Tensor[] stats, Tensor? scale, Tensor? found_inf, Tensor? clip, float max_norm) "
    "-> Tensor",
};

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

at::Tensor empty_rows(const OptionalTensors& grads, int64_t rows, int64_t columns) {
  c10::Device device(c10::DeviceType::Meta);
  for (size_t i = 0; i < grads.size(); ++i)
    if (const std::optional<at::Tensor> grad = grads[i]; grad && grad->defined())
      device = grad->device();
  return at::empty({rows, columns}, at::TensorOptions().dtype(at::kDouble).device(device));
}

at::Tensor grad_stats_meta(const OptionalTensors& grads, at::TensorList) {
  check_grads("grad_stats", grads);
  return empty_rows(grads, int64_t(grads.size()) + 1, math::kStatColumns);
}

void grad_stats_row_meta(const at::Tensor& grad, const at::Tensor& rows, int64_t index) {
  check_stats_row(grad, rows, index);
}

at::Tensor grad_stats_rest_meta(const OptionalTensors& grads, const at::Tensor& rows,
                                at::IntArrayRef stale, at::TensorList) {
  check_stats_rest(grads, rows, stale);
  return at::empty({int64_t(grads.size()) + 1, math::kStatColumns}, rows.options());
}

at::Tensor grad_histogram_meta(const OptionalTensors& grads,
                               const std::optional<at::Tensor>& scale) {
  check_histogram(grads, scale);
  return empty_rows(grads, int64_t(grads.size()), math::kHistColumns);
}

at::Tensor grad_stats_of(const c10::List<std::optional<at::Tensor>>& grads) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::grad_stats", "")
                             .typed<decltype(grad_stats_meta)>();
  return op.call(grads, {});
}

void unscale_meta(at::TensorList grads, const at::Tensor& inv_scale, const at::Tensor& found_inf,
                  at::TensorList) {
  check_unscale("unscale_", grads, grads, inv_scale, found_inf);
}

void unscale_to_meta(at::TensorList outputs, at::TensorList grads, const at::Tensor& inv_scale,
                     const at::Tensor& found_inf, at::TensorList) {
  check_unscale("unscale_to_", grads, outputs, inv_scale, found_inf);
}

at::Tensor step_control_meta(at::TensorList stats, const std::optional<at::Tensor>& scale,
                             const std::optional<at::Tensor>& found_inf,
                             const std::optional<at::Tensor>& clip, double) {
  check_step_control(stats, scale, found_inf, clip);
  const at::Tensor* any = stats.empty() ? nullptr : &stats[0];
  for (const auto* tensor : {&scale, &found_inf, &clip})
    if (!any && *tensor) any = &**tensor;
  return at::empty({math::kControlEntries}, any->options().dtype(at::kDouble));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  m.impl("grad_stats", grad_stats_meta);
  m.impl("grad_stats_row_", grad_stats_row_meta);
  m.impl("grad_stats_rest", grad_stats_rest_meta);
  m.impl("grad_histogram", grad_histogram_meta);
  m.impl("unscale_", unscale_meta);
  m.impl("unscale_to_", unscale_to_meta);
  m.impl("step_control", step_control_meta);
}

TORCH_LIBRARY_IMPL(halfstep, CompositeExplicitAutograd, m) {
  m.impl("grad_stats_of", grad_stats_of);
}

// A sparse gradient is refused by its index; its values() are a dense tensor that is taken.
#define HALFSTEP_REFUSE_SPARSE(key)                  \
  TORCH_LIBRARY_IMPL(halfstep, key, m) {             \
    m.impl("grad_stats", grad_stats_meta);           \
    m.impl("grad_stats_row_", grad_stats_row_meta);  \
    m.impl("grad_stats_rest", grad_stats_rest_meta); \
    m.impl("grad_histogram", grad_histogram_meta);   \
  }
HALFSTEP_REFUSE_SPARSE(SparseCPU)
HALFSTEP_REFUSE_SPARSE(SparseCUDA)

}  // namespace halfstep::ops
