#include "../math/scale.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../ops/check.h"

namespace halfstep::cpu {

namespace {

void update_scale_(const at::Tensor& scale, const at::Tensor& state, const at::Tensor& found_inf,
                   const at::Tensor& policy) {
  ops::check_update_scale(scale, state, found_inf, policy);
  const double flag = found_inf.scalar_type() == at::kDouble
                          ? *found_inf.const_data_ptr<double>()
                          : double(*found_inf.const_data_ptr<float>());
  auto* entries = state.mutable_data_ptr<double>();
  math::update_scale(policy.const_data_ptr<double>(), entries, flag != 0);
  *scale.mutable_data_ptr<float>() = float(entries[math::kStateScale]);
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
  m.impl("simulate_scale", simulate_scale);
  m.impl("init_scale_state", init_scale_state);
}

}  // namespace halfstep::cpu
