#include "../math/scale_statistics.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"

namespace halfstep::cuda {

namespace {

void advance(const char* op, const at::Tensor& scale, const at::Tensor& state,
             const at::Tensor& found_inf, const at::Tensor& policy, at::TensorList stats,
             const std::optional<at::Tensor>& proposal) {
  ops::check_update_scale(op, scale, state, found_inf, policy, stats, proposal);
  const Place place(scale);
  const auto* rule = policy.const_data_ptr<double>();
  at::Tensor memory;
  math::GradView* view = nullptr;
  if (!stats.empty()) {
    memory = place.scratch(sizeof(math::GradView));
    view = static_cast<math::GradView*>(memory.mutable_data_ptr());
  }
  for (size_t i = 0; i < stats.size(); ++i)
    check(op, view_stats(stats[i].const_data_ptr<double>(), stats[i].size(0) - 1, rule, i == 0,
                         view, place.stream()));
  check(op, update_scale(scale.mutable_data_ptr<float>(), state.mutable_data_ptr<double>(),
                         scalar(found_inf), rule, view, scalar(proposal), place.stream()));
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
  m.impl("advance_scale_", advance_scale_);
  m.impl("simulate_scale", simulate_scale_cuda);
  m.impl("init_scale_state", init_scale_state_cuda);
}

}  // namespace halfstep::cuda
