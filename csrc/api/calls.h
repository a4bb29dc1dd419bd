#pragma once

// Typed calls of the registered ops, for the classes above them. Each looks its op up once.

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../ops/dispatch.h"

namespace halfstep::api {

using Tensors = at::TensorList;
using OptionalTensor = std::optional<at::Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;

using ops::find_op;

/// The tensor there. Nothing waits, but for what comes to the CPU, whose ops would read a copy that
/// is still on its way.
inline at::Tensor to_device(const at::Tensor& t, c10::Device device, at::ScalarType type) {
  return t.to(device, type, /*non_blocking=*/!device.is_cpu());
}

inline at::Tensor grad_stats(const OptionalTensors& grads, Tensors table = {}) {
  static const auto op =
      find_op<at::Tensor(const OptionalTensors&, Tensors)>("halfstep::grad_stats");
  return op.call(grads, table);
}
inline at::Tensor grad_histogram(const OptionalTensors& grads, const OptionalTensor& scale) {
  static const auto op = find_op<at::Tensor(const OptionalTensors&, const OptionalTensor&)>(
      "halfstep::grad_histogram");
  return op.call(grads, scale);
}
/// Row `index` of `rows`: that of grad_stats for `grad`.
inline void grad_stats_row_(const at::Tensor& grad, const at::Tensor& rows, int64_t index) {
  static const auto op =
      find_op<void(const at::Tensor&, const at::Tensor&, int64_t)>("halfstep::grad_stats_row_");
  op.call(grad, rows, index);
}
/// grad_stats(grads), with `rows` for those not named in `stale`.
inline at::Tensor grad_stats_rest(const OptionalTensors& grads, const at::Tensor& rows,
                                  at::IntArrayRef stale, Tensors table = {}) {
  static const auto op =
      find_op<at::Tensor(const OptionalTensors&, const at::Tensor&, at::IntArrayRef, Tensors)>(
          "halfstep::grad_stats_rest");
  return op.call(grads, rows, stale, table);
}
inline void unscale_(Tensors grads, const at::Tensor& inv_scale, const at::Tensor& found_inf) {
  static const auto op =
      find_op<void(Tensors, const at::Tensor&, const at::Tensor&, Tensors)>("halfstep::unscale_");
  op.call(grads, inv_scale, found_inf, {});
}
inline void unscale_to_(Tensors outputs, Tensors grads, const at::Tensor& inv_scale,
                        const at::Tensor& found_inf) {
  static const auto op =
      find_op<void(Tensors, Tensors, const at::Tensor&, const at::Tensor&, Tensors)>(
          "halfstep::unscale_to_");
  op.call(outputs, grads, inv_scale, found_inf, {});
}
inline at::Tensor step_control(Tensors stats, const OptionalTensor& scale,
                               const OptionalTensor& found_inf, const OptionalTensor& clip,
                               double max_norm) {
  static const auto op =
      find_op<at::Tensor(Tensors, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, double)>("halfstep::step_control");
  return op.call(stats, scale, found_inf, clip, max_norm);
}
/// Any policy's update; `stats` and `proposal` for those that want them.
inline void advance_scale_(const at::Tensor& scale, const at::Tensor& state,
                           const at::Tensor& found_inf, const at::Tensor& policy, Tensors stats,
                           const OptionalTensor& proposal) {
  static const auto op =
      find_op<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   Tensors, const OptionalTensor&)>("halfstep::advance_scale_");
  op.call(scale, state, found_inf, policy, stats, proposal);
}
inline at::Tensor init_scale_state(const at::Tensor& policy) {
  static const auto op = find_op<at::Tensor(const at::Tensor&)>("halfstep::init_scale_state");
  return op.call(policy);
}
/// What all step ops begin with (csrc/ops/optim.h), for one parameter group.
struct StepFrame {
  Tensors params;
  OptionalTensors grads;
  Tensors masters;
  std::vector<at::Tensor> states;
  Tensors emas;
  std::vector<at::Tensor> zeroed;
  at::Tensor steps, overflowed, lr;
  OptionalTensor control;
  Tensors table;
  double ema_decay = 0;
  bool stochastic = false;
  int64_t seed = 0;
};
template <class... N>
void step_op(const char* name, const StepFrame& f, N... numbers) {
  const auto op = find_op<void(Tensors, const OptionalTensors&, Tensors, Tensors, Tensors, Tensors,
                               const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const OptionalTensor&, Tensors, double, bool, int64_t, N...)>(name);
  op.call(f.params, f.grads, f.masters, f.states, f.emas, f.zeroed, f.steps, f.overflowed, f.lr,
          f.control, f.table, f.ema_decay, f.stochastic, f.seed, numbers...);
}
inline void write_masters_(Tensors values, Tensors params, Tensors masters,
                           const at::Tensor& overflowed) {
  static const auto op =
      find_op<void(Tensors, Tensors, Tensors, const at::Tensor&)>("halfstep::write_masters_");
  op.call(values, params, masters, overflowed);
}
inline std::vector<at::Tensor> read_masters(Tensors params, Tensors masters) {
  static const auto op =
      find_op<std::vector<at::Tensor>(Tensors, Tensors)>("halfstep::read_masters");
  return op.call(params, masters);
}
/// FP32 values of a bfloat16 or int8 state; `scale` is empty for bfloat16.
inline at::Tensor read_state(const at::Tensor& state, const at::Tensor& scale, bool is_signed) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, bool)>("halfstep::read_state");
  return op.call(state, scale, is_signed);
}
inline void write_state_(const at::Tensor& value, const at::Tensor& state, const at::Tensor& scale,
                         bool is_signed, int64_t seed) {
  static const auto op =
      find_op<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, int64_t)>(
          "halfstep::write_state_");
  op.call(value, state, scale, is_signed, seed);
}
inline void refresh_masters_(Tensors params, Tensors masters, const at::Tensor& changed,
                             bool dry_run) {
  static const auto op =
      find_op<void(Tensors, Tensors, const at::Tensor&, bool)>("halfstep::refresh_masters_");
  op.call(params, masters, changed, dry_run);
}

}  // namespace halfstep::api
