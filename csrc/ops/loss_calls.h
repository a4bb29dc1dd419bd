#pragma once

// Typed calls of the ops that the two losses share.

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/graph_task.h>

#include <string>
#include <string_view>
#include <tuple>

#include "dispatch.h"
#include "optional.h"

namespace halfstep::ops {

/// loss, stats, total, gradient.
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline Forward call_forward(const at::Tensor& logits, const at::Tensor& target,
                            const OptionalTensor& weight, int64_t ignore_index,
                            std::string_view reduction, double smoothing, double z_loss,
                            const OptionalTensor& grad_scale) {
  static const auto op =
      find_op<Forward(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                      std::string_view, double, double, const OptionalTensor&)>(
          "halfstep::cross_entropy_forward");
  return op.call(logits, target, weight, ignore_index, reduction, smoothing, z_loss, grad_scale);
}

inline at::Tensor call_backward(const at::Tensor& grad_output, const at::Tensor& logits,
                                const at::Tensor& target, const OptionalTensor& weight,
                                const at::Tensor& stats, const at::Tensor& total,
                                int64_t ignore_index, std::string_view reduction, double smoothing,
                                double z_loss) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         const OptionalTensor&, const at::Tensor&, const at::Tensor&, int64_t,
                         std::string_view, double, double)>("halfstep::cross_entropy_backward");
  return op.call(grad_output, logits, target, weight, stats, total, ignore_index, reduction,
                 smoothing, z_loss);
}

inline at::Tensor call_rescale(const at::Tensor& grad, const at::Tensor& grad_output,
                               const OptionalTensor& grad_scale, at::ScalarType dtype) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                         at::ScalarType)>("halfstep::rescale_gradient");
  return op.call(grad, grad_output, grad_scale, dtype);
}

/// A gradient that the forward has formed and kept, in `dtype` and for the grad_output that came.
/// In its own memory where it will not be asked for again.
inline at::Tensor rescaled(const char* op, const at::Tensor& kept, const at::Tensor& grad_output,
                           const OptionalTensor& grad_scale, at::ScalarType dtype) {
  static const auto in_place =
      find_op<void(const at::Tensor&, const at::Tensor&, const OptionalTensor&)>(
          "halfstep::rescale_gradient_");
  if (!kept.defined()) return kept;
  if (c10::GradMode::is_enabled()) {  // for a second derivative, which depends on what is not kept
    at::Tensor grad = call_rescale(kept, grad_output.detach(), grad_scale, dtype);
    const at::Tensor input = at::empty({0}, kept.options()).set_requires_grad(true);
    differentiable_once(op, {&input}, {&grad});
    return grad;
  }
  if (kept.scalar_type() != dtype || torch::autograd::get_current_graph_task_keep_graph())
    return call_rescale(kept, grad_output, grad_scale, dtype);
  in_place.call(kept, grad_output, grad_scale);
  return kept;
}

}  // namespace halfstep::ops
