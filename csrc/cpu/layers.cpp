// Layers whose stock FP16 kernel is slow, or that have none: by kernels of our own (GroupNorm, max
// and min of rows), or by the stock FP32 kernel, rounded once.
//
//   Measured on CPUs with the FP16 unit and without (docs/audit.md): tanh and powers 2.3 to 10
//   times slower than FP32, norms along a dimension 5, group norm 2, im2col's and col2im's inner
//   loop 3, grid_sample 2 to 3, means over columns 2, the largest of rows 1.2 to 1.7, the backward
//   of EmbeddingBag 1.7; avg_pool3d refuses FP16.
//   All have CPU kernels in torch, so these stand at BackendSelect, below autograd: derivatives of
//   any order, functorch and tracing are torch's own, and the graph keeps the 16-bit tensors.
//   The batch is taken in parts of about kPiece elements, elementwise functions in runs that stay
//   in a core's own cache. A call with another dtype, device or shape goes to the stock kernel.
//   Tests: tests/python/test_overrides_layers.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <ATen/ops/_adaptive_avg_pool2d_backward_ops.h>
#include <ATen/ops/_embedding_bag_dense_backward_ops.h>
#include <ATen/ops/avg_pool3d_backward_ops.h>
#include <ATen/ops/avg_pool3d_ops.h>
#include <ATen/ops/col2im_ops.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/grid_sampler_2d_backward_ops.h>
#include <ATen/ops/grid_sampler_2d_ops.h>
#include <ATen/ops/im2col_ops.h>
#include <ATen/ops/linalg_vector_norm_ops.h>
#include <ATen/ops/max_ops.h>
#include <ATen/ops/mean_ops.h>
#include <ATen/ops/min_ops.h>
#include <ATen/ops/mul_cpu_dispatch.h>
#include <ATen/ops/native_group_norm_backward_ops.h>
#include <ATen/ops/native_group_norm_ops.h>
#include <ATen/ops/pow_cpu_dispatch.h>
#include <ATen/ops/pow_ops.h>
#include <ATen/ops/sum_ops.h>
#include <ATen/ops/tanh_cpu_dispatch.h>
#include <ATen/ops/tanh_ops.h>
#include <torch/library.h>

#include <mutex>

#include "../ops/overrides.h"
#include "isa/group_norm.h"
#include "isa/kernels.h"
#include "wide.h"

namespace halfstep::cpu {

namespace {

using c10::DispatchKeySet;
using OptionalTensor = std::optional<at::Tensor>;

bool half(const at::Tensor& t) {
  return t.scalar_type() == at::kHalf && t.layout() == at::kStrided && t.numel() != 0;
}
bool half(const OptionalTensor& t) { return !t || !t->defined() || half(*t); }

/// Whether a call on these tensors, all of them FP16, is ours.
template <class... Tensors>
bool takes(DispatchKeySet keys, const Tensors&... tensors) {
  return (half(tensors) && ...) && ops::widens_layers(at::kHalf) && reaches_cpu(keys);
}

OptionalTensor wide(const OptionalTensor& t) {
  return t && t->defined() ? OptionalTensor(t->to(at::kFloat)) : t;
}

// ---- by parts of the batch ---------------------------------------------------------------------

/// A result that the parts fill; the first to come makes it, in its own part's layout.
class Whole {
 public:
  const at::Tensor& like(const at::Tensor& part, int64_t rows) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (tensor_.defined()) return tensor_;
    auto sizes = part.sizes().vec();
    sizes[0] = rows;
    const auto type = part.scalar_type() == at::kFloat ? at::kHalf : part.scalar_type();
    return tensor_ = whole_like(part, sizes, type);
  }
  operator at::Tensor() const { return tensor_; }

 private:
  std::mutex mutex_;
  at::Tensor tensor_;
};

/// Rows of one part of the batch.
struct Rows {
  int64_t first, count, all, part;

  at::Tensor slice(const at::Tensor& t) const { return t.narrow(0, first, count); }
  at::Tensor operator()(const at::Tensor& t) const { return slice(t).to(at::kFloat); }
  /// Rounds a part's result into the whole.
  void store(const at::Tensor& result, Whole& whole) const {
    if (result.defined()) slice(whole.like(result, all)).copy_(result);
  }
};

/// body(rows) for parts in which the larger of two operands has about kPiece / 12 elements, so that
/// a part's FP32 copies stay in its core's cache; parts run in parallel and do not depend on the
/// number of threads. Rows too large for that are taken one after another, and a batch too small to
/// be worth it whole, each by the kernel's own threads.
template <class Body>
void for_rows(const at::Tensor& one, const at::Tensor& other, const Body& body) {
  const int64_t all = one.size(0);
  const int64_t whole = std::max(one.numel(), other.numel());
  const int64_t row = std::max<int64_t>(whole / all, 1);
  const bool in_turn = row > kPiece / 4 || whole <= kPiece / 4;
  const int64_t part = even_part(all, (in_turn ? kPiece : kPiece / 12) / row);
  const int64_t parts = (all + part - 1) / part;
  const auto run = [&](int64_t first, int64_t end) {
    const Plain plain;
    for (int64_t i = first; i < end; ++i)
      body(Rows{i * part, std::min(part, all - i * part), all, i});
  };
  if (in_turn)
    run(0, parts);
  else
    at::parallel_for(0, parts, 1, run);
}

/// Sum over the parts, in their order.
at::Tensor sum_of(const std::vector<at::Tensor>& parts) {
  at::Tensor total;
  for (const auto& part : parts) {
    if (!part.defined()) continue;
    if (!total.defined())
      total = part;
    else
      total.add_(part);
  }
  return total;
}

at::Tensor rounded(const at::Tensor& t) { return t.defined() ? t.to(at::kHalf) : t; }

// ---- group norm --------------------------------------------------------------------------------
using NativeGroupNorm = at::_ops::native_group_norm;
using NativeGroupNormBackward = at::_ops::native_group_norm_backward;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// Whether the arguments fit each other; torch's own kernel has the words for those that do not.
bool fit(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
         const c10::SymInt& n, const c10::SymInt& c, const c10::SymInt& pixels, int64_t groups) {
  const auto is_of_channels = [&](const OptionalTensor& t) {
    return !t || !t->defined() || (t->dim() == 1 && t->numel() == c);
  };
  return input.dim() >= 2 && input.size(0) == n && input.size(1) == c &&
         input.numel() == n * c * pixels && groups > 0 && input.size(1) % groups == 0 &&
         is_of_channels(weight) && is_of_channels(bias);
}
/// Runs of a channel's pixels shorter than a pack, and channels that lie side by side, go to the
/// stock kernel in FP32.
bool is_planes(const at::Tensor& t, const c10::SymInt& pixels) {
  return t.is_contiguous() && pixels >= math::kLanes;
}

const uint16_t* bits(const at::Tensor& t) {
  return static_cast<const uint16_t*>(t.const_data_ptr());
}
uint16_t* writable(const at::Tensor& t) {
  return t.defined() ? static_cast<uint16_t*>(t.mutable_data_ptr()) : nullptr;
}

/// `body(first, end)` over rows of n elements.
template <class Body>
void for_long_rows(int64_t rows, int64_t n, const Body& body) {
  constexpr int64_t kGrain = 8 * math::kBlock;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / n), body);
}

/// The operands of a row's kernels; the parameters in FP32 live as long as it does.
struct Groups {
  OptionalTensor weight, bias;
  GroupNorm work;
  int64_t rows, n;

  Groups(const at::Tensor& input, const OptionalTensor& w, const OptionalTensor& b, int64_t groups,
         const c10::SymInt& pixels)
      : weight(contiguous(wide(w))), bias(contiguous(wide(b))) {
    const auto values = [](const OptionalTensor& t) {
      return t && t->defined() ? t->const_data_ptr<float>() : nullptr;
    };
    const int64_t channels = input.size(1) / groups;
    work = {bits(input), values(weight), values(bias), groups, channels, pixels.expect_int()};
    rows = input.size(0) * groups;
    n = channels * work.pixels;
  }
  static OptionalTensor contiguous(OptionalTensor t) {
    return t && t->defined() ? OptionalTensor(t->contiguous()) : t;
  }
};

Three group_norm(DispatchKeySet keys, const at::Tensor& input, const OptionalTensor& weight,
                 const OptionalTensor& bias, c10::SymInt n, c10::SymInt c, c10::SymInt pixels,
                 int64_t groups, double eps) {
  const auto below = below_select(keys);
  if (!takes(keys, input, weight, bias) || !fit(input, weight, bias, n, c, pixels, groups))
    return NativeGroupNorm::redispatch(below, input, weight, bias, n, c, pixels, groups, eps);
  if (is_planes(input, pixels)) {
    const Plain plain;
    const Groups of(input, weight, bias, groups, pixels);
    const at::Tensor y = at::empty_like(input),
                     mean = at::empty({input.size(0), groups}, y.options());
    const at::Tensor rstd = at::empty_like(mean);
    for_long_rows(of.rows, of.n, [&](int64_t first, int64_t end) {
      kernels().group_norm->forward(of.work, eps, writable(y), writable(mean), writable(rstd),
                                    first, end);
    });
    return {y, mean, rstd};
  }
  Whole out, mean, rstd;
  const OptionalTensor wide_weight = wide(weight), wide_bias = wide(bias);
  for_rows(input, input, [&](const Rows& rows) {
    const auto [a, b, d] = NativeGroupNorm::redispatch(below, rows(input), wide_weight, wide_bias,
                                                       rows.count, c, pixels, groups, eps);
    rows.store(a, out);
    rows.store(b, mean);
    rows.store(d, rstd);
  });
  return {out, mean, rstd};
}

Three group_norm_backward(DispatchKeySet keys, const at::Tensor& grad, const at::Tensor& input,
                          const at::Tensor& mean, const at::Tensor& rstd,
                          const OptionalTensor& weight, c10::SymInt n, c10::SymInt c,
                          c10::SymInt pixels, int64_t groups, std::array<bool, 3> mask) {
  const auto below = below_select(keys);
  const auto is_of_groups = [&](const at::Tensor& t) { return t.numel() == n * groups; };
  if (!takes(keys, grad, input, mean, rstd, weight) ||
      !fit(input, weight, {}, n, c, pixels, groups) || grad.sizes() != input.sizes() ||
      !is_of_groups(mean) || !is_of_groups(rstd))
    return NativeGroupNormBackward::redispatch(below, grad, input, mean, rstd, weight, n, c, pixels,
                                               groups, mask);
  if (is_planes(input, pixels) && is_planes(grad, pixels)) {
    const Plain plain;
    const Groups of(input, weight, {}, groups, pixels);
    const at::Tensor means = mean.contiguous(), factors = rstd.contiguous();
    const at::Tensor dx = mask[0] ? at::empty_like(input) : at::Tensor();
    const auto shares = at::empty({2, input.size(0), input.size(1)}, at::kDouble);
    double* share = shares.mutable_data_ptr<double>();
    for_long_rows(of.rows, of.n, [&](int64_t first, int64_t end) {
      kernels().group_norm->backward(of.work, bits(grad), bits(means), bits(factors), writable(dx),
                                     share, share + shares.numel() / 2, first, end);
    });
    const auto total = [&](int64_t k) {
      return mask[size_t(k + 1)] ? shares[k].sum(0).to(at::kHalf) : at::Tensor();
    };
    return {dx, total(0), total(1)};
  }
  Whole grad_input;
  std::vector<at::Tensor> grad_weight(size_t(input.size(0))), grad_bias(grad_weight);
  const OptionalTensor wide_weight = wide(weight);
  for_rows(input, input, [&](const Rows& rows) {
    const auto [a, b, d] =
        NativeGroupNormBackward::redispatch(below, rows(grad), rows(input), rows(mean), rows(rstd),
                                            wide_weight, rows.count, c, pixels, groups, mask);
    rows.store(a, grad_input);
    grad_weight[size_t(rows.part)] = b;
    grad_bias[size_t(rows.part)] = d;
  });
  const Plain plain;
  return {grad_input, rounded(sum_of(grad_weight)), rounded(sum_of(grad_bias))};
}

// ---- im2col, col2im: unfold and fold -----------------------------------------------------------
at::Tensor im2col(DispatchKeySet keys, const at::Tensor& self, at::IntArrayRef kernel,
                  at::IntArrayRef dilation, at::IntArrayRef padding, at::IntArrayRef stride) {
  using Op = at::_ops::im2col;
  const auto below = below_select(keys);
  if (!takes(keys, self) || self.dim() != 4)
    return Op::redispatch(below, self, kernel, dilation, padding, stride);
  Whole out;
  for_rows(self, self, [&](const Rows& rows) {
    rows.store(Op::redispatch(below, rows(self), kernel, dilation, padding, stride), out);
  });
  return out;
}

at::Tensor col2im(DispatchKeySet keys, const at::Tensor& self, c10::SymIntArrayRef size,
                  at::IntArrayRef kernel, at::IntArrayRef dilation, at::IntArrayRef padding,
                  at::IntArrayRef stride) {
  using Op = at::_ops::col2im;
  const auto below = below_select(keys);
  if (!takes(keys, self) || self.dim() != 3)
    return Op::redispatch(below, self, size, kernel, dilation, padding, stride);
  Whole out;
  for_rows(self, self, [&](const Rows& rows) {
    rows.store(Op::redispatch(below, rows(self), size, kernel, dilation, padding, stride), out);
  });
  return out;
}

// ---- grid_sample -------------------------------------------------------------------------------
at::Tensor grid_sample(DispatchKeySet keys, const at::Tensor& input, const at::Tensor& grid,
                       int64_t mode, int64_t padding, bool corners) {
  using Op = at::_ops::grid_sampler_2d;
  const auto below = below_select(keys);
  if (!takes(keys, input, grid) || input.size(0) != grid.size(0))
    return Op::redispatch(below, input, grid, mode, padding, corners);
  Whole out;
  for_rows(input, grid, [&](const Rows& rows) {
    rows.store(Op::redispatch(below, rows(input), rows(grid), mode, padding, corners), out);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> grid_sample_backward(DispatchKeySet keys, const at::Tensor& grad,
                                                        const at::Tensor& input,
                                                        const at::Tensor& grid, int64_t mode,
                                                        int64_t padding, bool corners,
                                                        std::array<bool, 2> mask) {
  using Op = at::_ops::grid_sampler_2d_backward;
  const auto below = below_select(keys);
  if (!takes(keys, grad, input, grid) || input.size(0) != grid.size(0))
    return Op::redispatch(below, grad, input, grid, mode, padding, corners, mask);
  Whole grad_input, grad_grid;
  for_rows(input, grad, [&](const Rows& rows) {
    const auto [a, b] =
        Op::redispatch(below, rows(grad), rows(input), rows(grid), mode, padding, corners, mask);
    rows.store(a, grad_input);
    rows.store(b, grad_grid);
  });
  return {grad_input, grad_grid};
}

// ---- pooling -----------------------------------------------------------------------------------
at::Tensor avg_pool3d(DispatchKeySet keys, const at::Tensor& self, at::IntArrayRef kernel,
                      at::IntArrayRef stride, at::IntArrayRef padding, bool ceil, bool include_pad,
                      std::optional<int64_t> divisor) {
  using Op = at::_ops::avg_pool3d;
  const auto below = below_select(keys);
  if (!takes(keys, self) || self.dim() < 4)
    return Op::redispatch(below, self, kernel, stride, padding, ceil, include_pad, divisor);
  Whole out;
  for_rows(self, self, [&](const Rows& rows) {
    rows.store(
        Op::redispatch(below, rows(self), kernel, stride, padding, ceil, include_pad, divisor),
        out);
  });
  return out;
}

at::Tensor avg_pool3d_backward(DispatchKeySet keys, const at::Tensor& grad, const at::Tensor& self,
                               at::IntArrayRef kernel, at::IntArrayRef stride,
                               at::IntArrayRef padding, bool ceil, bool include_pad,
                               std::optional<int64_t> divisor) {
  using Op = at::_ops::avg_pool3d_backward;
  const auto below = below_select(keys);
  if (!takes(keys, grad, self) || self.dim() < 4 || grad.size(0) != self.size(0))
    return Op::redispatch(below, grad, self, kernel, stride, padding, ceil, include_pad, divisor);
  Whole out;
  for_rows(self, grad, [&](const Rows& rows) {
    rows.store(Op::redispatch(below, rows(grad), rows(self), kernel, stride, padding, ceil,
                              include_pad, divisor),
               out);
  });
  return out;
}

at::Tensor adaptive_avg_pool2d_backward(DispatchKeySet keys, const at::Tensor& grad,
                                        const at::Tensor& self) {
  using Op = at::_ops::_adaptive_avg_pool2d_backward;
  const auto below = below_select(keys);
  if (!takes(keys, grad, self) || self.dim() != 4 || grad.size(0) != self.size(0))
    return Op::redispatch(below, grad, self);
  Whole out;
  for_rows(self, grad, [&](const Rows& rows) {
    rows.store(Op::redispatch(below, rows(grad), rows(self)), out);
  });
  return out;
}

at::Tensor embedding_bag_backward(DispatchKeySet keys, const at::Tensor& grad,
                                  const at::Tensor& indices, const at::Tensor& offset2bag,
                                  const at::Tensor& bag_size, const at::Tensor& maximum,
                                  c10::SymInt rows, bool by_frequency, int64_t mode,
                                  const OptionalTensor& weights, int64_t padding) {
  using Op = at::_ops::_embedding_bag_dense_backward;
  const auto below = below_select(keys);
  const bool ours = takes(keys, grad, weights);
  const auto call = [&](const at::Tensor& g, const OptionalTensor& w) {
    return Op::redispatch(below, g, indices, offset2bag, bag_size, maximum, rows, by_frequency,
                          mode, w, padding);
  };
  if (!ours) return call(grad, weights);
  const Plain plain;
  return rounded(call(grad.to(at::kFloat), wide(weights)));
}

// ---- along a dimension -------------------------------------------------------------------------
bool leaves_rows(const at::Tensor& self, at::OptionalIntArrayRef dims) {
  if (self.dim() < 2 || !dims || dims->empty()) return false;
  for (const int64_t d : *dims)
    if (d == 0 || d == -self.dim() || d >= self.dim() || d < -self.dim()) return false;
  return true;
}

at::Tensor vector_norm(DispatchKeySet keys, const at::Tensor& self, const at::Scalar& order,
                       at::OptionalIntArrayRef dims, bool keep,
                       std::optional<at::ScalarType> type) {
  using Op = at::_ops::linalg_vector_norm;
  const auto below = below_select(keys);
  if (!takes(keys, self) || type || !leaves_rows(self, dims))
    return Op::redispatch(below, self, order, dims, keep, type);
  Whole out;
  for_rows(self, self, [&](const Rows& rows) {
    rows.store(Op::redispatch(below, rows(self), order, dims, keep, type), out);
  });
  return out;
}

/// The stock FP16 mean widens its input whole before it sums.
at::Tensor mean(DispatchKeySet keys, const at::Tensor& self, at::OptionalIntArrayRef dims,
                bool keep, std::optional<at::ScalarType> type) {
  using Op = at::_ops::mean_dim;
  const auto below = below_select(keys);
  const bool some = dims && !dims->empty() && int64_t(dims->size()) < self.dim();
  if (!takes(keys, self) || (type && *type != at::kHalf) || !some)
    return Op::redispatch(below, self, dims, keep, type);
  Whole out;
  if (leaves_rows(self, dims)) {
    for_rows(self, self, [&](const Rows& rows) {
      rows.store(Op::redispatch(below, rows(self), dims, keep, std::nullopt), out);
    });
    return out;
  }
  std::vector<at::Tensor> sums(size_t(self.size(0)));
  for_rows(self, self, [&](const Rows& rows) {
    sums[size_t(rows.part)] =
        at::_ops::sum_dim_IntList::redispatch(below, rows(self), dims, keep, std::nullopt);
  });
  const Plain plain;
  at::Tensor total = sum_of(sums);
  return rounded(total.mul_(double(total.numel()) / double(self.numel())));
}

template <class Op, bool kSmallest>
std::tuple<at::Tensor, at::Tensor> extreme(DispatchKeySet keys, const at::Tensor& self, int64_t dim,
                                           bool keep) {
  const bool last = self.dim() > 0 && (dim == -1 || dim == self.dim() - 1);
  if (!takes(keys, self) || !last || !self.is_contiguous() || has_names(self))
    return Op::redispatch(below_select(keys), self, dim, keep);
  const Plain plain;
  const int64_t n = self.size(-1), rows = self.numel() / n;
  auto sizes = self.sizes().vec();
  if (keep)
    sizes.back() = 1;
  else
    sizes.pop_back();
  const at::Tensor values = at::empty(sizes, self.options());
  const at::Tensor indices = at::empty(sizes, self.options().dtype(at::kLong));
  const ExtremeRows work = {bits(self), n, writable(values), indices.mutable_data_ptr<int64_t>()};
  for_long_rows(
      rows, n, [&](int64_t first, int64_t end) { kernels().extreme(work, kSmallest, first, end); });
  return {values, indices};
}

// ---- elementwise -------------------------------------------------------------------------------

/// f(run in FP32, in place) over runs of 16,384 elements: 64 KiB, which stay in a core's own cache
/// and are long enough for a call of torch's. `in` and `out` are dense with the same strides; they
/// may be the same tensor.
template <class F>
void elementwise(const at::Tensor& in, const at::Tensor& out, const F& f) {
  constexpr int64_t kRun = 16384;
  const int64_t runs = (in.numel() + kRun - 1) / kRun;
  const uint16_t* from = bits(in);
  uint16_t* to = writable(out);
  auto* const convert = kernels().unscale;
  at::parallel_for(0, runs, 2, [&](int64_t first, int64_t end) {
    const Plain plain;
    const Wide buffer(kRun);
    for (int64_t i = first * kRun; i < std::min(end * kRun, in.numel()); i += kRun) {
      const int64_t count = std::min(kRun, in.numel() - i);
      convert(from + i, math::Dtype::kF16, buffer.data(), math::Dtype::kF32, 1, count);
      at::Tensor run = buffer.shaped({count});
      f(run);
      convert(buffer.data(), math::Dtype::kF32, to + i, math::Dtype::kF16, 1, count);
    }
  });
}

/// Small tensors gain nothing over the stock kernel.
bool takes_elements(DispatchKeySet keys, const at::Tensor& self) {
  return takes(keys, self) && self.numel() >= 2048 && self.is_non_overlapping_and_dense();
}

at::Tensor tanh(DispatchKeySet keys, const at::Tensor& self) {
  if (!takes_elements(keys, self)) return at::_ops::tanh::redispatch(below_select(keys), self);
  const Plain plain;
  at::Tensor out = at::empty_like(self);
  elementwise(self, out, [](at::Tensor& run) { at::cpu::tanh_(run); });
  return out;
}

at::Tensor& tanh_(DispatchKeySet keys, at::Tensor& self) {
  if (!takes_elements(keys, self)) return at::_ops::tanh_::redispatch(below_select(keys), self);
  elementwise(self, self, [](at::Tensor& run) { at::cpu::tanh_(run); });
  return self;
}

at::Tensor pow(DispatchKeySet keys, const at::Tensor& self, const at::Scalar& exponent) {
  if (!takes_elements(keys, self) || exponent.isComplex())
    return at::_ops::pow_Tensor_Scalar::redispatch(below_select(keys), self, exponent);
  const Plain plain;
  if (exponent.toDouble() == 2) return at::cpu::mul(self, self);  // in FP32, rounded once
  at::Tensor out = at::empty_like(self);
  elementwise(self, out, [&](at::Tensor& run) { at::cpu::pow_(run, exponent); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, BackendSelect, m) {
  m.impl("native_group_norm", group_norm);
  m.impl("native_group_norm_backward", group_norm_backward);
  m.impl("im2col", im2col);
  m.impl("col2im", col2im);
  m.impl("grid_sampler_2d", grid_sample);
  m.impl("grid_sampler_2d_backward", grid_sample_backward);
  m.impl("avg_pool3d", avg_pool3d);
  m.impl("avg_pool3d_backward", avg_pool3d_backward);
  m.impl("_adaptive_avg_pool2d_backward", adaptive_avg_pool2d_backward);
  m.impl("_embedding_bag_dense_backward", embedding_bag_backward);
  m.impl("linalg_vector_norm", vector_norm);
  m.impl("mean.dim", mean);
  m.impl("max.dim", extreme<at::_ops::max_dim, false>);
  m.impl("min.dim", extreme<at::_ops::min_dim, true>);
  m.impl("tanh", tanh);
  m.impl("tanh_", tanh_);
  m.impl("pow.Tensor_Scalar", pow);
}

}  // namespace halfstep::cpu
