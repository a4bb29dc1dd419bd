#include "../math/scale.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"

// The loss scale: one state machine on the device (csrc/math/scale.h).

namespace halfstep::ops {

namespace {

constexpr const char* kSchemas[] = {
    // scale: one float32 element; state, policy: float64 [16]. A bad step is found_inf != 0 or NaN.
    "update_scale_(Tensor(a!) scale, Tensor(b!) state, Tensor found_inf, Tensor policy) -> ()",
    // The scale after each update of a whole string of steps: float64 [T]. state is left as it is.
    "simulate_scale(Tensor found_inf, Tensor policy, Tensor state) -> Tensor",
    // The state a policy starts in: float64 [16].
    "init_scale_state(Tensor policy) -> Tensor",
};

void update_scale_meta(const at::Tensor& scale, const at::Tensor& state,
                       const at::Tensor& found_inf, const at::Tensor& policy) {
  check_update_scale(scale, state, found_inf, policy);
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

void check_scale_vector(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kDouble && tensor.dim() == 1 &&
                  tensor.sym_size(0) == math::kStateEntries && tensor.is_contiguous(),
              op, ": ", name, " is ", describe(tensor), "; expected contiguous torch.float64[16]");
}

void check_update_scale(const at::Tensor& scale, const at::Tensor& state,
                        const at::Tensor& found_inf, const at::Tensor& policy) {
  check_scalar("update_scale_", "scale", scale, at::kFloat);
  check_scale_vector("update_scale_", "state", state);
  TORCH_CHECK(found_inf.sym_numel() == 1 &&
                  (found_inf.scalar_type() == at::kFloat || found_inf.scalar_type() == at::kDouble),
              "update_scale_: found_inf is ", describe(found_inf),
              "; expected one element of torch.float32 or torch.float64");
  check_scale_vector("update_scale_", "policy", policy);
}

void check_simulate_scale(const at::Tensor& found_inf, const at::Tensor& policy,
                          const at::Tensor& state) {
  TORCH_CHECK(
      found_inf.dim() == 1 && found_inf.scalar_type() == at::kFloat && found_inf.is_contiguous(),
      "simulate_scale: found_inf is ", describe(found_inf),
      "; expected contiguous torch.float32[T]");
  check_scale_vector("simulate_scale", "policy", policy);
  check_scale_vector("simulate_scale", "state", state);
}

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  m.impl("update_scale_", update_scale_meta);
  m.impl("simulate_scale", simulate_scale_meta);
  m.impl("init_scale_state", init_scale_state_meta);
}

}  // namespace halfstep::ops
