#include "../math/scale_statistics.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "../ops/check.h"
#include "common.h"

namespace halfstep::cpu {

namespace {

void advance(const char* op, const at::Tensor& scale, const at::Tensor& state,
             const at::Tensor& found_inf, const at::Tensor& policy, at::TensorList stats,
             const std::optional<at::Tensor>& proposal) {
  ops::check_update_scale(op, scale, state, found_inf, policy, stats, proposal);
  const auto* rule = policy.const_data_ptr<double>();
  math::GradView view;
  for (const at::Tensor& table : stats) {
    const auto* rows = table.const_data_ptr<double>();
    for (int64_t i = 0; i + 1 < table.size(0); ++i)  // the last row holds the totals
      view.add(math::view_row(rule, rows + i * math::kStatColumns));
  }
  auto* entries = state.mutable_data_ptr<double>();
  math::update_scale(rule, entries, number(found_inf) != 0, view,
                     proposal ? number(*proposal) : std::nan(""));
  *scale.mutable_data_ptr<float>() = float(entries[math::kStateScale]);
}

void update_scale_(const at::Tensor& scale, const at::Tensor& state, const at::Tensor& found_inf,
                   const at::Tensor& policy) {
  advance("update_scale_", scale, state, found_inf, policy, {}, std::nullopt);
}

void advance_scale_(const at::Tensor& scale, const at::Tensor& state, const at::Tensor& found_inf,
                    const at::Tensor& policy, at::TensorList stats,
                    const std::optional<at::Tensor>& proposal) {
  advance("advance_scale_", scale, state, found_inf, policy, stats, proposal);
}

at::Tensor simulate_scale(const at::Tensor& found_inf, const at::Tensor& policy,
                          const at::Tensor& state) {
  ops::check_simulate_scale(found_inf, policy, state);
  const int64_t steps = found_inf.size(0);
  at::Tensor scales = at::empty({steps}, policy.options());
  const at::Tensor scratch = state.clone();
  const auto* flags = found_inf.const_data_ptr<float>();
  auto* entries = scratch.mutable_data_ptr<double>();
  for (int64_t i = 0; i < steps; ++i) {
    math::update_scale(policy.const_data_ptr<double>(), entries, flags[i] != 0);
    scales.mutable_data_ptr<double>()[i] = entries[math::kStateScale];
  }
  return scales;
}

at::Tensor init_scale_state(const at::Tensor& policy) {
  ops::check_scale_vector("init_scale_state", "policy", policy);
  at::Tensor state = at::empty({math::kStateEntries}, policy.options());
  math::init_scale_state(policy.const_data_ptr<double>(), state.mutable_data_ptr<double>());
  return state;
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CPU, m) {
  m.impl("update_scale_", update_scale_);
  m.impl("advance_scale_", advance_scale_);
  m.impl("simulate_scale", simulate_scale);
  m.impl("init_scale_state", init_scale_state);
}

}  // namespace halfstep::cpu
