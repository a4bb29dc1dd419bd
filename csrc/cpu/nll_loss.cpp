// Stock cross entropy of FP16 logits, which torch sums in FP16.
//
// nll_loss, in which cross_entropy and NLLLoss of class indices end: a kernel of our own that
// computes in FP64 and rounds once.
//   output = -sum w[t] x[t] (over sum w[t] for the mean), dx[t] = -w[t] g (over the same sum).
//   Torch's FP16 kernel keeps both sums in FP16. The mean over more than 65,504 targets has an
//   infinite sum of weights: the loss is NaN and every gradient is zero (torch 2.11 and 2.15), and
//   over pixels it takes five times as long as in FP32. The second result, total_weight, is FP16
//   here too, as torch's types want it. A backward whose total_weight is the rounded sum of its own
//   targets divides by that sum, another one, as DTensor passes, by what it was given.
//   At BackendSelect, below autograd. What torch refuses goes to its kernel, which has the words.
// cross_entropy_loss with label smoothing or class probabilities: computed in FP32, rounded once.
//   Torch adds up FP16 losses in FP16, and with smoothing the log-probabilities of all classes:
//   8,192 of them, or fewer in a large batch, make the loss infinite.
// Tensors with a __torch_dispatch__ (fake tensors while torch.compile traces, DTensor): cross
//   entropy and nll_loss of every kind go through FP32, since below it is their graph or their
//   decomposition that would hold the FP16 sums; a compiler fuses the conversions.
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
#include <ATen/ops/nll_loss_nd_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../math/half.h"
#include "../ops/overrides.h"
#include "wide.h"

namespace halfstep::cpu {

namespace {

using c10::DispatchKeySet;
using OptionalTensor = std::optional<at::Tensor>;

bool defined(const OptionalTensor& t) { return t && t->defined(); }
bool is_half(const at::Tensor& t) {
  return t.scalar_type() == at::kHalf && t.layout() == at::kStrided;
}
bool is_half(const OptionalTensor& t) { return !defined(t) || is_half(*t); }
/// The only rounding of a value that was computed in FP64.
at::Half rounded(double x) { return at::Half(math::round_to_odd(x)); }

/// Whether [N, C, (H, W)] log-probabilities, [N, (H, W)] targets and [C] weights are such as torch
/// takes.
bool takes(DispatchKeySet keys, const at::Tensor& x, const at::Tensor& target,
           const OptionalTensor& weight, int64_t reduction, int64_t pixel_dims) {
  const auto type = target.scalar_type();
  if (!is_half(x) || !is_half(weight) || !ops::widens_layers(at::kHalf) || !reaches_cpu(keys) ||
      x.numel() == 0 || x.dim() != 2 + pixel_dims || target.dim() != 1 + pixel_dims ||
      (type != at::kLong && type != at::kByte) || reduction < 0 || reduction > at::Reduction::Sum)
    return false;
  for (int64_t d = 0; d < target.dim(); ++d)
    if (target.size(d) != x.size(d == 0 ? 0 : d + 1)) return false;
  return !defined(weight) || (weight->dim() == 1 && weight->size(0) == x.size(1));
}

/// Where the log-probability of a class stands in memory.
struct Layout {
  int64_t sample, of_class, pixel;

  /// Of x whose pixels lie one stride apart.
  explicit Layout(const at::Tensor& x)
      : sample(x.stride(0)), of_class(x.stride(1)), pixel(x.dim() == 4 ? x.stride(3) : 1) {}
  static bool fits(const at::Tensor& x) {
    return x.dim() == 2 || x.stride(2) == x.size(3) * x.stride(3);
  }
};

struct Target {
  int64_t i, sample, pixel, of_class;
  double weight;

  int64_t in(const Layout& to) const {
    return sample * to.sample + of_class * to.of_class + pixel * to.pixel;
  }
};

struct Sums {
  double loss = 0, weight = 0;
  bool known = true;  ///< every target names a class
};

/// The targets of a call and what they weigh.
class Targets {
 public:
  Targets(const at::Tensor& x, const at::Tensor& target, const OptionalTensor& weight,
          int64_t ignored)
      : target_(target.to(at::kLong).contiguous()),
        classes_(x.size(1)),
        pixels_(x.numel() / (x.size(0) * classes_)),
        ignored_(ignored) {
    if (defined(weight)) weight_ = weight->to(at::kFloat).contiguous();
  }

  /// body(Target) for each one that is not ignored, and the sums of what it returns and of the
  /// weights: in parts that do not depend on the number of threads, added up in order. Stops early
  /// when a target names no class.
  template <class Body>
  Sums for_each(const Body& body) const {
    constexpr int64_t kPart = 4096;
    const int64_t count = target_.numel(), parts = (count + kPart - 1) / kPart;
    std::vector<Sums> sums(static_cast<size_t>(parts));
    const int64_t* target = target_.const_data_ptr<int64_t>();
    const float* of_class = weight_.defined() ? weight_.const_data_ptr<float>() : nullptr;
    at::parallel_for(0, parts, 2, [&](int64_t first, int64_t end) {
      for (int64_t part = first; part < end; ++part) {
        Sums sum;
        int64_t i = part * kPart, sample = i / pixels_, pixel = i % pixels_;
        for (const int64_t stop = std::min(i + kPart, count); i < stop && sum.known; ++i) {
          const int64_t t = target[i];
          if (t != ignored_) {
            sum.known = t >= 0 && t < classes_;
            if (!sum.known) break;
            const double w = of_class ? of_class[t] : 1;
            sum.loss += body(Target{i, sample, pixel, t, w});
            sum.weight += w;
          }
          if (++pixel == pixels_) {
            pixel = 0;
            ++sample;
          }
        }
        sums[size_t(part)] = sum;
      }
    });
    Sums total;
    for (const Sums& part : sums) {
      total.loss += part.loss;
      total.weight += part.weight;
      total.known &= part.known;
    }
    return total;
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
  const at::Tensor dense = Layout::fits(self) ? self : self.contiguous();
  const Layout layout(dense);
  const auto* x = dense.const_data_ptr<at::Half>();
  const bool per_target = reduction == at::Reduction::None;
  const at::Tensor output =
      per_target ? at::zeros(target.sizes(), self.options()) : at::empty({}, self.options());
  const at::Tensor total_weight = at::zeros({}, self.options());
  auto* y = output.mutable_data_ptr<at::Half>();
  const Sums sums =
      Targets(self, target, weight, ignore_index.expect_int()).for_each([&](const Target& t) {
        const double loss = -t.weight * float(x[t.in(layout)]);
        if (per_target) y[t.i] = rounded(loss);
        return loss;
      });
  if (!sums.known) return stock();
  if (!per_target) {
    *y = rounded(reduction == at::Reduction::Mean ? sums.loss / sums.weight : sums.loss);
    *total_weight.mutable_data_ptr<at::Half>() = rounded(sums.weight);
  }
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
  const bool per_target = reduction == at::Reduction::None;
  if (!takes(keys, self, target, weight, reduction, kPixelDims) || !is_half(grad) ||
      !is_half(total_weight) || total_weight.numel() != 1 ||
      (per_target ? grad.sizes() != target.sizes() : grad.dim() > 1 || grad.numel() != 1))
    return stock();
  const Plain plain;
  const Targets targets(self, target, weight, ignore_index.expect_int());
  const at::Tensor dense = grad.contiguous();
  const auto* g = dense.const_data_ptr<at::Half>();
  double factor = per_target ? -1 : -double(float(*g));
  if (reduction == at::Reduction::Mean) {
    const Sums sums = targets.for_each([](const Target&) { return 0.; });
    if (!sums.known) return stock();
    const float given = *total_weight.const_data_ptr<at::Half>();
    factor /= float(rounded(sums.weight)) == given ? sums.weight : double(given);
  }
  const at::Tensor result = at::zeros(self.sizes(), self.options());
  const Layout layout(result);
  auto* dx = result.mutable_data_ptr<at::Half>();
  const Sums sums = targets.for_each([&](const Target& t) {
    const double weighted = t.weight * factor;
    dx[t.in(layout)] = rounded(per_target ? weighted * float(g[t.i]) : weighted);
    return 0.;
  });
  return sums.known ? result : stock();
}

// ---- through FP32 ------------------------------------------------------------------------------
// Of differentiable ops, so these serve above and below autograd.

at::Tensor wide(const at::Tensor& t) { return is_half(t) ? t.to(at::kFloat) : t; }
OptionalTensor wide(const OptionalTensor& t) { return defined(t) ? OptionalTensor(wide(*t)) : t; }

/// Whether FP16 operands that fit each other are to be widened.
bool widens(const at::Tensor& self, const at::Tensor& target, const OptionalTensor& weight,
            bool overflows) {
  const bool indices = !target.is_floating_point();
  return (overflows || self.key_set().has(c10::DispatchKey::Python)) && is_half(self) &&
         is_half(weight) && ops::widens_layers(at::kHalf) &&
         (indices || (is_half(target) && target.sym_sizes() == self.sym_sizes()));
}

at::Tensor cross_entropy(const at::Tensor& self, const at::Tensor& target,
                         const OptionalTensor& weight, int64_t reduction, c10::SymInt ignore_index,
                         double label_smoothing) {
  const auto call = [&](const at::Tensor& x, const at::Tensor& t, const OptionalTensor& w) {
    return at::compositeimplicitautograd::cross_entropy_loss_symint(x, t, w, reduction,
                                                                    ignore_index, label_smoothing);
  };
  if (!widens(self, target, weight, label_smoothing > 0 || target.is_floating_point()))
    return call(self, target, weight);
  return call(wide(self), wide(target), wide(weight)).to(at::kHalf);
}

at::Tensor nll_loss_nd(const at::Tensor& self, const at::Tensor& target,
                       const OptionalTensor& weight, int64_t reduction, c10::SymInt ignore_index) {
  const auto call = [&](const at::Tensor& x, const OptionalTensor& w) {
    return at::compositeimplicitautograd::nll_loss_nd_symint(x, target, w, reduction, ignore_index);
  };
  if (!widens(self, target, weight, false) || target.is_floating_point()) return call(self, weight);
  return call(wide(self), wide(weight)).to(at::kHalf);
}

void add_composites(torch::Library& m) {
  m.impl("cross_entropy_loss", cross_entropy);
  m.impl("nll_loss_nd", nll_loss_nd);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, AutogradCPU, m) { add_composites(m); }
TORCH_LIBRARY_IMPL(aten, CPU, m) { add_composites(m); }
TORCH_LIBRARY_IMPL(aten, BackendSelect, m) {
  m.impl("nll_loss_forward", forward<at::_ops::nll_loss_forward, 0>);
  m.impl("nll_loss_backward", backward<at::_ops::nll_loss_backward, 0>);
  m.impl("nll_loss2d_forward", forward<at::_ops::nll_loss2d_forward, 2>);
  m.impl("nll_loss2d_backward", backward<at::_ops::nll_loss2d_backward, 2>);
}

}  // namespace halfstep::cpu
