#include "../math/scale.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"

namespace halfstep::cuda {

namespace {

void update_scale_(const at::Tensor& scale, const at::Tensor& state, const at::Tensor& found_inf,
                   const at::Tensor& policy) {
  ops::check_update_scale(scale, state, found_inf, policy);
  const Place place(scale);
  check("update_scale_",
        update_scale(scale.mutable_data_ptr<float>(), state.mutable_data_ptr<double>(),
                     scalar(found_inf), policy.const_data_ptr<double>(), place.stream()));
}

at::Tensor simulate_scale_cuda(const at::Tensor& found_inf, const at::Tensor& policy,
                               const at::Tensor& state) {
  ops::check_simulate_scale(found_inf, policy, state);
  const Place place(policy);
  at::Tensor scales = at::empty({found_inf.size(0)}, policy.options());
  check("simulate_scale",
        simulate_scale(found_inf.const_data_ptr<float>(), found_inf.size(0),
                       policy.const_data_ptr<double>(), state.const_data_ptr<double>(),
                       scales.mutable_data_ptr<double>(), place.stream()));
  return scales;
}

at::Tensor init_scale_state_cuda(const at::Tensor& policy) {
  ops::check_scale_vector("init_scale_state", "policy", policy);
  const Place place(policy);
  at::Tensor state = at::empty({math::kStateEntries}, policy.options());
  check("init_scale_state", init_scale_state(policy.const_data_ptr<double>(),
                                             state.mutable_data_ptr<double>(), place.stream()));
  return state;
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CUDA, m) {
  m.impl("update_scale_", update_scale_);
  m.impl("simulate_scale", simulate_scale_cuda);
  m.impl("init_scale_state", init_scale_state_cuda);
}

}  // namespace halfstep::cuda
