#include "rope.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "dispatch.h"

// Rotary position embedding. A rotation is undone by the negative angle, so each op is its own
// derivative with `inverse` turned over, of any order, and keeps nothing but the tables.

namespace halfstep::ops {

namespace {

constexpr const char* kSchemas[] = {
    // x: [..., dim], FP16, BF16, FP32 or FP64. cos, sin: [..., pairs], any floating dtype,
    // broadcast
    // to x but for the last dimension; 2 * pairs <= dim. inverse: by the negative angle.
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor",
    "rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> ()",
};

at::Tensor rope_meta(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool,
                     bool) {
  check_rope("rope", x, cos, sin);
  return at::empty_like(x);
}

void rope_in_place_meta(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool,
                        bool) {
  check_rope_in_place(x, cos, sin);
}

at::Tensor call_rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                     bool interleaved, bool inverse) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool)>(
          "halfstep::rope");
  return op.call(x, cos, sin, interleaved, inverse);
}

void call_rope_in_place(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                        bool interleaved, bool inverse) {
  static const auto op =
      find_op<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool)>(
          "halfstep::rope_");
  op.call(x, cos, sin, interleaved, inverse);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <bool kInPlace>
struct Rope : torch::autograd::Function<Rope<kInPlace>> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin, bool interleaved, bool inverse) {
    context->save_for_backward({cos, sin});
    context->saved_data["interleaved"] = interleaved;
    context->saved_data["inverse"] = inverse;
    const at::AutoDispatchBelowADInplaceOrView below;
    if constexpr (!kInPlace) return call_rope(x, cos, sin, interleaved, inverse);
    call_rope_in_place(x, cos, sin, interleaved, inverse);
    context->mark_dirty({x});
    return x;
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    return {call_rope(grads[0], saved[0], saved[1], context->saved_data["interleaved"].toBool(),
                      !context->saved_data["inverse"].toBool()),
            at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor rope_autograd(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                         bool interleaved, bool inverse) {
  check_rope("rope", x, cos, sin);
  return Rope<false>::apply(x, cos, sin, interleaved, inverse);
}

void rope_in_place_autograd(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                            bool interleaved, bool inverse) {
  check_rope_in_place(x, cos, sin);
  // Before the data change, as torch does for its own in-place ops.
  TORCH_CHECK(!(x.is_leaf() && x.requires_grad() && c10::GradMode::is_enabled()),
              "rope_: x is a leaf that requires grad, which cannot be changed in place");
  Rope<true>::apply(x, cos, sin, interleaved, inverse);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  m.impl("rope", rope_meta);
  m.impl("rope_", rope_in_place_meta);
}

TORCH_LIBRARY_IMPL(halfstep, Autograd, m) {
  m.impl("rope", rope_autograd);
  m.impl("rope_", rope_in_place_autograd);
}

}  // namespace halfstep::ops
