// Stock cross entropy of FP16 logits, which torch sums in FP16.
//
// nll_loss, in which cross_entropy and NLLLoss of class indices end: a kernel of our own that
// multiplies in FP32, sums in FP64 and rounds once.
//   output = -sum w[t] x[t] (over sum w[t] for the mean), dx[t] = -w[t] g (over the same sum).
//   Torch's FP16 kernel keeps both sums in FP16. The mean over more than 65,504 targets has an
//   infinite sum of weights: the loss is NaN and every gradient is zero (torch 2.11 and 2.15), and
//   over pixels it takes five times as long as in FP32. The second result, total_weight, is FP16
//   here too, as torch's types want it; the backward does not read it but sums the weights again.
//   At BackendSelect, below autograd. What torch refuses goes to its kernel, which has the words.
// cross_entropy_loss with label smoothing or class probabilities: computed in FP32, rounded once.
//   Torch sums the log-probabilities of all classes in FP16: 8,192 classes, or fewer in a large
//   batch, make the loss infinite. While torch.compile traces, every cross entropy goes this way,
//   since the graph would hold those FP16 sums; the compiler fuses the conversions.
//   Tests: tests/python/test_nll_loss.py.

#include <ATen/Parallel.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <ATen/ops/cross_entropy_loss_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nll_loss2d_backward_ops.h>
#include <ATen/ops/nll_loss2d_forward_ops.h>
#include <ATen/ops/nll_loss_backward_ops.h>
#include <ATen/ops/nll_loss_forward_ops.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../ops/overrides.h"
#include "wide.h"

namespace halfstep::cpu {

namespace {

using c10::DispatchKeySet;
using OptionalTensor = std::optional<at::Tensor>;

bool defined(const OptionalTensor& t) { return t && t->defined(); }

/// Whether [N, C, (H, W)] log-probabilities, [N, (H, W)] targets and [C] weights are such as torch
/// takes.
bool takes(DispatchKeySet keys, const at::Tensor& x, const at::Tensor& target,
           const OptionalTensor& weight, int64_t reduction, int64_t pixel_dims) {
  const auto half = [](const at::Tensor& t) {
    return t.scalar_type() == at::kHalf && t.layout() == at::kStrided;
  };
  if (!half(x) || !ops::widens_layers(at::kHalf) || !reaches_cpu(keys)) return false;
  const auto type = target.scalar_type();
  if (x.numel() == 0 || x.dim() != 2 + pixel_dims || target.dim() != 1 + pixel_dims ||
      (type != at::kLong && type != at::kByte) || reduction < 0 || reduction > at::Reduction::Sum)
    return false;
  for (int64_t d = 0; d < target.dim(); ++d)
    if (target.size(d) != x.size(d == 0 ? 0 : d + 1)) return false;
  return !defined(weight) || (half(*weight) && weight->dim() == 1 && weight->size(0) == x.size(1));
}

/// The targets of a call and what they weigh.
class Targets {
 public:
  /// `pixels`: positions that lie apart by one element in a contiguous x.
  Targets(const at::Tensor& x, const at::Tensor& target, const OptionalTensor& weight,
          int64_t ignored)
      : target_(target.to(at::kLong).contiguous()),
        classes_(x.size(1)),
        pixels_(x.numel() / (x.size(0) * classes_)),
        ignored_(ignored) {
    if (defined(weight)) weight_ = weight->to(at::kFloat).contiguous();
  }

  int64_t count() const { return target_.numel(); }

  /// body(i, offset, w) for each target that is not ignored: its place in x and its weight. False
  /// when a target names no class. `body` returns what is to be added to `loss`; the sums are made
  /// in parts that do not depend on the number of threads, and added up in order.
  template <class Body>
  bool each(double& loss, double& weight, const Body& body) const {
    constexpr int64_t kPart = 4096;
    const int64_t parts = (count() + kPart - 1) / kPart;
    std::vector<double> losses(size_t(parts), 0), weights(losses);
    std::atomic<bool> known = true;
    const int64_t* target = target_.const_data_ptr<int64_t>();
    const float* of_class = weight_.defined() ? weight_.const_data_ptr<float>() : nullptr;
    at::parallel_for(0, parts, 2, [&](int64_t first, int64_t end) {
      for (int64_t part = first; part < end; ++part) {
        double sum = 0, total = 0;
        int64_t i = part * kPart, sample = i / pixels_, pixel = i % pixels_;
        for (const int64_t stop = std::min(i + kPart, count()); i < stop; ++i) {
          const int64_t t = target[i];
          if (t != ignored_) {
            if (t < 0 || t >= classes_) {
              known = false;
              return;
            }
            const float w = of_class ? of_class[t] : 1.f;
            sum += body(i, (sample * classes_ + t) * pixels_ + pixel, w);
            total += w;
          }
          if (++pixel == pixels_) {
            pixel = 0;
            ++sample;
          }
        }
        losses[size_t(part)] = sum;
        weights[size_t(part)] = total;
      }
    });
    loss = weight = 0;
    for (size_t part = 0; part < losses.size(); ++part) {
      loss += losses[part];
      weight += weights[part];
    }
    return known;
  }

 private:
  at::Tensor target_, weight_;
  int64_t classes_, pixels_, ignored_;
};

template <class Op, int64_t kPixelDims>
std::tuple<at::Tensor, at::Tensor> forward(DispatchKeySet keys, const at::Tensor& self,
                                           const at::Tensor& target, const OptionalTensor& weight,
                                           int64_t reduction, c10::SymInt ignore_index) {
  const auto stock = [&] {
    return Op::redispatch(below_select(keys), self, target, weight, reduction, ignore_index);
  };
  if (!takes(keys, self, target, weight, reduction, kPixelDims)) return stock();
  const Plain plain;
  const at::Tensor dense = self.contiguous();
  const Targets targets(self, target, weight, ignore_index.expect_int());
  const at::Half* x = dense.const_data_ptr<at::Half>();
  const bool each = reduction == at::Reduction::None;
  const at::Tensor output =
      each ? at::zeros(target.sizes(), self.options()) : at::empty({}, self.options());
  at::Half* y = output.mutable_data_ptr<at::Half>();
  double loss, total;
  const bool known = targets.each(loss, total, [&](int64_t i, int64_t offset, float w) {
    const float value = -w * float(x[offset]);
    if (each) y[i] = value;
    return value;
  });
  if (!known) return stock();
  if (!each) *y = at::Half(float(reduction == at::Reduction::Mean ? loss / total : loss));
  const at::Tensor total_weight = at::empty({}, self.options());
  *total_weight.mutable_data_ptr<at::Half>() = at::Half(each ? 0.f : float(total));
  return {output, total_weight};
}

template <class Op, int64_t kPixelDims>
at::Tensor backward(DispatchKeySet keys, const at::Tensor& grad, const at::Tensor& self,
                    const at::Tensor& target, const OptionalTensor& weight, int64_t reduction,
                    c10::SymInt ignore_index, const at::Tensor& total_weight) {
  const auto stock = [&] {
    return Op::redispatch(below_select(keys), grad, self, target, weight, reduction, ignore_index,
                          total_weight);
  };
  const bool each = reduction == at::Reduction::None;
  if (!takes(keys, self, target, weight, reduction, kPixelDims) ||
      grad.scalar_type() != at::kHalf || grad.layout() != at::kStrided ||
      (each ? grad.sizes() != target.sizes() : grad.numel() != 1))
    return stock();
  const Plain plain;
  const Targets targets(self, target, weight, ignore_index.expect_int());
  double unused, total = 1;
  const auto nothing = [](int64_t, int64_t, float) { return 0.; };
  if (reduction == at::Reduction::Mean && !targets.each(unused, total, nothing)) return stock();
  const at::Tensor dense = grad.contiguous(), result = at::zeros(self.sizes(), self.options());
  const at::Half* g = dense.const_data_ptr<at::Half>();
  at::Half* dx = result.mutable_data_ptr<at::Half>();
  const double all = each ? 0 : -double(float(*g)) / total;
  double unread;
  const bool known = targets.each(unused, unread, [&](int64_t i, int64_t offset, float w) {
    dx[offset] = at::Half(float(w * (each ? -double(float(g[i])) : all)));
    return 0.;
  });
  return known ? result : stock();
}

/// Of differentiable ops, so it serves above and below autograd.
at::Tensor cross_entropy(const at::Tensor& self, const at::Tensor& target,
                         const OptionalTensor& weight, int64_t reduction, c10::SymInt ignore_index,
                         double label_smoothing) {
  const auto call = [&](const at::Tensor& x, const at::Tensor& t, const OptionalTensor& w) {
    return at::compositeimplicitautograd::cross_entropy_loss_symint(x, t, w, reduction,
                                                                    ignore_index, label_smoothing);
  };
  const auto is_half = [](const at::Tensor& t) { return t.scalar_type() == at::kHalf; };
  const bool sums_classes = label_smoothing > 0 || target.is_floating_point() ||
                            self.key_set().has(c10::DispatchKey::Python);
  if (!sums_classes || !is_half(self) || (defined(weight) && !is_half(*weight)) ||
      (target.is_floating_point() && !is_half(target)) || self.layout() != at::kStrided ||
      !ops::widens_layers(at::kHalf))
    return call(self, target, weight);
  const auto wide = [&](const at::Tensor& t) { return is_half(t) ? t.to(at::kFloat) : t; };
  return call(wide(self), wide(target), defined(weight) ? OptionalTensor(wide(*weight)) : weight)
      .to(at::kHalf);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, AutogradCPU, m) { m.impl("cross_entropy_loss", cross_entropy); }
TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("cross_entropy_loss", cross_entropy); }
TORCH_LIBRARY_IMPL(aten, BackendSelect, m) {
  m.impl("nll_loss_forward", forward<at::_ops::nll_loss_forward, 0>);
  m.impl("nll_loss_backward", backward<at::_ops::nll_loss_backward, 0>);
  m.impl("nll_loss2d_forward", forward<at::_ops::nll_loss2d_forward, 2>);
  m.impl("nll_loss2d_backward", backward<at::_ops::nll_loss2d_backward, 2>);
}

}  // namespace halfstep::cpu
