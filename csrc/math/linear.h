#pragma once

// What stands behind a product: y = act(h), h = x w^T + b, and its slope. What the backward needs
// of h is kept as compactly as it can be: one bit an element for ReLU, h in the output's dtype for
// GELU. The bits of a row take a multiple of 16 bytes (128 columns, the rule of cuBLASLt's masks),
// column j is bit j % 8 of byte j / 8, and nothing reads the bits beyond the row.

#include "functions.h"

namespace halfstep::math {

enum class LinearActivation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3 };

/// Rows whose column sums are added in FP32; the sums of such blocks are added in FP64.
constexpr int64_t kBiasRows = 64;

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// Of one row.
HALFSTEP_FN constexpr int64_t mask_bytes(int64_t columns) { return (columns + 127) / 128 * 16; }

template <LinearActivation kActivation, class V>
HALFSTEP_FN V activate(const V& h) {
  if constexpr (kActivation == LinearActivation::kRelu)
    return relu(h);
  else if constexpr (kActivation == LinearActivation::kGelu)
    return gelu(h);
  else if constexpr (kActivation == LinearActivation::kGeluTanh)
    return gelu_tanh(h);
  else
    return h;
}

/// The derivative at h, for activations that keep h. It is 0 or 1 long before h leaves the range of
/// 16 bits, so an infinite h, which may be a finite one that was rounded, has that slope too.
template <LinearActivation kActivation, class V>
HALFSTEP_FN V slope(const V& h) {
  const V far = broadcast<V>(1000), end = select(h >= broadcast<V>(0), far, broadcast<V>(-1000));
  const V bounded = select(abs(h) >= far, end, h);
  if constexpr (kActivation == LinearActivation::kGelu)
    return gelu_slope(bounded);
  else
    return gelu_tanh_slope(bounded);
}

/// Whether ReLU lets the gradient of h pass: not at zero, and NaN passes, as in torch.
template <class V>
HALFSTEP_FN auto is_closed(const V& h) {
  return broadcast<V>(0) >= h;
}

HALFSTEP_MATH_END

namespace halfstep::math {

/// body(std::integral_constant<LinearActivation, …>()) for the activation met at run time.
template <LinearActivation kActivation>
struct ActivationConstant {
  static constexpr LinearActivation value = kActivation;
};
template <class Body>
auto with_linear_activation(LinearActivation activation, const Body& body) {
  switch (activation) {
    case LinearActivation::kNone:
      return body(ActivationConstant<LinearActivation::kNone>());
    case LinearActivation::kRelu:
      return body(ActivationConstant<LinearActivation::kRelu>());
    case LinearActivation::kGelu:
      return body(ActivationConstant<LinearActivation::kGelu>());
    default:
      return body(ActivationConstant<LinearActivation::kGeluTanh>());
  }
}

}  // namespace halfstep::math
