#include "../math/scale.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"

// The loss scale: one state machine on the device (csrc/math/scale.h).

namespace halfstep::ops {

namespace {

constexpr const char* kSchemas[] = {
    // scale: one float32 element; state, policy: float64 [32]. A bad step is found_inf != 0 or NaN.
    "update_scale_(Tensor(a!) scale, Tensor(b!) state, Tensor found_inf, Tensor policy) -> ()",
    // The same for policies that look at gradients: stats are tables of grad_stats over gradients
    // that carry the scale; proposal, one element, is the scale that a policy of the user asks for.
    "advance_scale_(Tensor(a!) scale, Tensor(b!) state, Tensor found_inf, Tensor policy, Tensor[] "
    "stats, Tensor? proposal) -> ()",
    // The scale after each update of a whole string of steps: float64 [T]. state is left as it is.
    // Gradients are not looked at: for Static and Dynamic.
    "simulate_scale(Tensor found_inf, Tensor policy, Tensor state) -> Tensor",
    // The state a policy starts in: float64 [32].
    "init_scale_state(Tensor policy) -> Tensor",
};

void update_scale_meta(const at::Tensor& scale, const at::Tensor& state,
                       const at::Tensor& found_inf, const at::Tensor& policy) {
  check_update_scale("update_scale_", scale, state, found_inf, policy, {}, std::nullopt);
}

void advance_scale_meta(const at::Tensor& scale, const at::Tensor& state,
                        const at::Tensor& found_inf, const at::Tensor& policy, at::TensorList stats,
                        const std::optional<at::Tensor>& proposal) {
  check_update_scale("advance_scale_", scale, state, found_inf, policy, stats, proposal);
}

at::Tensor simulate_scale_meta(const at::Tensor& found_inf, const at::Tensor& policy,
                               const at::Tensor& state) {
  check_simulate_scale(found_inf, policy, state);
  return at::empty_symint({found_inf.sym_size(0)}, policy.options());
}

at::Tensor init_scale_state_meta(const at::Tensor& policy) {
  check_scale_vector("init_scale_state", "policy", policy);
  return at::empty({math::kStateEntries}, policy.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  m.impl("update_scale_", update_scale_meta);
  m.impl("advance_scale_", advance_scale_meta);
  m.impl("simulate_scale", simulate_scale_meta);
  m.impl("init_scale_state", init_scale_state_meta);
}

}  // namespace halfstep::ops
