// Matrix products in 16 bits: out = beta * self + alpha * a b, summed in FP32 (product.h) and
// rounded once, on CPUs without a 16-bit unit, and in FP16 where the CPU has a matrix unit for BF16
// but none for FP16.
//
//   Without a unit the stock 16-bit products are 40 to 500 times slower than FP32 (pytorch#146508);
//   with the BF16 matrix unit they are as quick as FP32, and ours 1.5 to 2 times as quick. Large
//   FP16 products go through tiles/tiles.h where product.h has kernels for this CPU. All others
//   are taken in pieces, so that the FP32 copies never exceed three times kPiece elements; where
//   the inner dimension is cut, the pieces' products are summed in FP32 in order. mm, addmm, bmm
//   and baddbmm stand at BackendSelect, below autograd: gradients, second derivatives, forward
//   mode, functorch and tracing are torch's own, and the graph keeps the 16-bit tensors. matmul,
//   einsum, nn.LSTM, … end in these. mv has only a CompositeExplicitAutograd kernel in torch, so it
//   stands at CPU. linear adds a bias to inputs of any shape through addmm, so that there is one
//   rounding. Every other dtype goes to the stock kernel as it is. Tests:
//   tests/python/test_overrides.py.

#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/baddbmm_cpu_dispatch.h>
#include <ATen/ops/baddbmm_ops.h>
#include <ATen/ops/bmm_cpu_dispatch.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mv_compositeexplicitautograd_dispatch.h>
#include <torch/library.h>

#include "../ops/gather.h"
#include "../ops/overrides.h"
#include "isa/kernels.h"
#include "isa/mv.h"
#include "product.h"

namespace halfstep::cpu {

namespace {

using c10::DispatchKeySet;
using OptionalTensor = std::optional<at::Tensor>;

/// beta * self + alpha * …; without `self` the product alone.
struct Sum {
  at::Tensor self;
  at::Scalar beta = 0, alpha = 1;

  Sum() = default;
  Sum(const at::Tensor& s, at::Scalar b, at::Scalar a) : beta(b), alpha(a) {
    if (b.toDouble() != 0) self = s;  // as in torch, a zero beta drops even NaN
  }
  Sum expanded(at::IntArrayRef sizes) const {
    Sum result = *this;
    if (self.defined()) result.self = self.expand(sizes);
    return result;
  }
  template <class Slice>
  Sum sliced(const Slice& slice) const {
    Sum result = *this;
    if (self.defined()) result.self = slice(self);
    return result;
  }
};

struct Tile {
  int64_t m, n, k;
};

/// An even division of [m, k] x [k, n] into pieces of at most kPiece elements. k is cut last, since
/// each cut reads the sum again; a thin product has little arithmetic for each converted element
/// and is quickest in pieces that stay in the innermost large cache (measured).
Tile tile(int64_t m, int64_t n, int64_t k) {
  const bool thin = std::min({m, n, k}) <= 64;
  const int64_t most = thin ? kPiece / 4 : kPiece;
  Tile t{m, n, even_part(k, thin ? 512 : 4096)};
  while (t.m * t.k > most) t.m = (t.m + 1) / 2;
  while (t.k * t.n > most) t.n = (t.n + 1) / 2;
  while (t.m * t.n > most) {
    int64_t& larger = t.m > t.n ? t.m : t.n;
    larger = (larger + 1) / 2;
  }
  return {even_part(m, t.m), even_part(n, t.n), t.k};
}

at::Tensor block(const at::Tensor& t, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return t.narrow(0, row, std::min(rows, t.size(0) - row))
      .narrow(1, column, std::min(columns, t.size(1) - column));
}

/// sum (+)= a b in FP32; the first tile of the inner dimension carries beta.
void add_product(at::Tensor& wide_sum, const at::Tensor& a, const at::Tensor& b, const Sum& sum,
                 bool first) {
  if (first && !sum.self.defined() && sum.alpha.toDouble() == 1)
    at::cpu::mm_out(wide_sum, a, b);
  else
    at::cpu::addmm_(wide_sum, a, b, first ? sum.beta : at::Scalar(1), sum.alpha);
}

/// b is packed a few columns at a time, for all rows.
void multiply_in_tiles(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                       const Sum& sum) {
  if (out.stride(1) != 1) {
    const auto turned = [](const at::Tensor& t) { return t.t(); };
    if (out.stride(0) == 1) return multiply_in_tiles(out.t(), b.t(), a.t(), sum.sliced(turned));
    const at::Tensor dense = at::empty(out.sizes(), out.options());
    multiply_in_tiles(dense, a, b, sum);
    out.copy_(dense);
    return;
  }
  const bool one_row = sum.self.defined() && sum.self.stride(0) == 0;
  const int64_t k = a.size(1), n = b.size(1);
  const int64_t columns = even_part(n, std::max<int64_t>(4 * kPiece / k, kGroup * kTileBlock));
  for (int64_t j = 0; j < n; j += columns) {
    const int64_t count = std::min(columns, n - j);
    const auto part = [&](const at::Tensor& t) { return t.narrow(-1, j, count); };
    const at::Tensor target = part(out);
    static_cast<void>(target.mutable_data_ptr());  // a lazy copy is made here, not by a worker
    at::Tensor addend;                             // beta * self
    if (sum.self.defined()) {
      addend = part(one_row ? sum.self.select(0, 0) : sum.self).to(at::kFloat).contiguous();
      if (sum.beta.toDouble() != 1) addend = addend.mul(sum.beta);
    }
    const float* const row = one_row ? addend.const_data_ptr<float>() : nullptr;
    Right(part(b), 0, true).multiply(a, [&](const TileResult& r) {
      if (addend.defined() && !one_row) add_to(r, addend);
      round_to(r, target, row);
    });
  }
}

bool fits_tiles(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == at::kHalf && in_tiles(a.size(-2), b.size(-1), a.size(-1));
}

void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const Sum& sum) {
  if (sum.alpha.toDouble() == 1 && fits_tiles(a, b) && values_fit_tiles(a) && values_fit_tiles(b))
    return multiply_in_tiles(out, a, b, sum);
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  const Tile t = tile(m, n, k);
  const Wide wide_a(t.m * t.k), wide_b(t.k * t.n), wide_out(t.m * t.n);
  at::Tensor piece_a, piece_b;
  const bool one_k = t.k == k, one_n = t.n == n;
  for (int64_t i = 0; i < m; i += t.m) {
    for (int64_t j = 0; j < n; j += t.n) {
      const at::Tensor target = block(out, i, t.m, j, t.n);
      at::Tensor wide_sum = wide_out.shaped(target.sizes());
      if (sum.self.defined()) wide_sum.copy_(block(sum.self, i, t.m, j, t.n));
      for (int64_t l = 0; l < k; l += t.k) {
        if (!one_k || j == 0) piece_a = wide_a(block(a, i, t.m, l, t.k));
        if (!one_k || !one_n || i == 0) piece_b = wide_b(block(b, l, t.k, j, t.n));
        add_product(wide_sum, piece_a, piece_b, sum, l == 0);
      }
      target.copy_(wide_sum);
    }
  }
}

/// Batches first .. end, `part` of them at a time.
void multiply_range(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const Sum& sum,
                    int64_t first, int64_t end, int64_t part) {
  const int64_t m = a.size(1), k = a.size(2), n = b.size(2);
  const Wide wide_a(part * m * k), wide_b(part * k * n), wide_out(part * m * n);
  for (int64_t i = first; i < end; i += part) {
    const int64_t count = std::min(part, end - i);
    const auto some = [&](const at::Tensor& t) { return t.narrow(0, i, count); };
    at::Tensor wide_sum = wide_out.shaped({count, m, n});
    if (sum.self.defined()) {
      wide_sum.copy_(some(sum.self));
      at::cpu::baddbmm_(wide_sum, wide_a(some(a)), wide_b(some(b)), sum.beta, sum.alpha);
    } else {
      at::cpu::bmm_out(wide_sum, wide_a(some(a)), wide_b(some(b)));
      if (sum.alpha.toDouble() != 1) wide_sum.mul_(sum.alpha);
    }
    some(out).copy_(wide_sum);
  }
}

/// Small products: each thread widens, multiplies and rounds its own batches, in its own cache.
/// Larger ones: one after another, each on all threads.
void multiply_batches(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                      const Sum& sum) {
  constexpr int64_t kThreadPiece = kPiece / 8;
  const int64_t batches = a.size(0), m = a.size(1), k = a.size(2), n = b.size(2);
  const int64_t largest = std::max({m * k, k * n, m * n});
  const auto multiply_one = [&](int64_t i) {
    const auto one = [&](const at::Tensor& t) { return t.select(0, i); };
    multiply(one(out), one(a), one(b), sum.sliced(one));
  };
  if (largest <= kPiece && fits_tiles(a, b) && batches >= at::get_num_threads()) {
    at::parallel_for(0, batches, 1, [&](int64_t first, int64_t end) {
      const Plain plain;
      for (int64_t i = first; i < end; ++i) multiply_one(i);
    });
  } else if (largest <= kThreadPiece && batches >= at::get_num_threads()) {
    const int64_t part = kThreadPiece / largest;
    const int64_t grain = std::max<int64_t>(1, (1 << 18) / (m * k * n));
    at::parallel_for(0, batches, grain, [&](int64_t first, int64_t end) {
      const Plain plain;
      multiply_range(out, a, b, sum, first, end, std::min(part, end - first));
    });
  } else if (2 * largest <= kPiece && !fits_tiles(a, b)) {
    multiply_range(out, a, b, sum, 0, batches, even_part(batches, kPiece / largest));
  } else {
    for (int64_t i = 0; i < batches; ++i) multiply_one(i);
  }
}

std::vector<int64_t> product_sizes(const at::Tensor& a, const at::Tensor& b) {
  std::vector<int64_t> sizes = a.sizes().vec();
  sizes.back() = b.size(-1);
  return sizes;
}
/// Whether this call is ours; a call that torch refuses, or that has nothing to compute, is not.
bool takes(DispatchKeySet keys, const at::Tensor& a, const at::Tensor& b, int64_t dims) {
  const auto type = a.scalar_type();
  const bool fits = type == b.scalar_type() && a.dim() == dims && b.dim() == dims &&
                    reaches_cpu(keys) && a.size(-1) == b.size(-2) &&
                    (dims == 2 || a.size(0) == b.size(0)) && a.numel() != 0 && b.numel() != 0;
  return fits &&
         (ops::widens_products(type) || (ops::prefers_matrix_unit(type) && fits_tiles(a, b)));
}
bool takes_self(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b) {
  return self.scalar_type() == a.scalar_type() &&
         at::is_expandable_to(self.sizes(), product_sizes(a, b));
}
/// An `out` that shares memory with an operand or with itself is left to torch's kernel.
bool takes_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  return out.scalar_type() == a.scalar_type() && !out.is_alias_of(a) && !out.is_alias_of(b) &&
         at::has_internal_overlap(out) != at::MemOverlap::Yes;
}

void compute(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const Sum& sum) {
  const Sum expanded = sum.expanded(out.sizes());
  a.dim() == 2 ? multiply(out, a, b, expanded) : multiply_batches(out, a, b, expanded);
}
at::Tensor fresh(const at::Tensor& a, const at::Tensor& b, const Sum& sum) {
  const Plain plain;
  at::Tensor out = at::empty(product_sizes(a, b), a.options());
  compute(out, a, b, sum);
  return out;
}
at::Tensor& into(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const Sum& sum) {
  const Plain plain;
  at::native::resize_output(out, product_sizes(a, b));
  compute(out, a, b, sum);
  return out;
}

// ---- mm, bmm -----------------------------------------------------------------------------------
template <class Op, int64_t kDims>
at::Tensor product(DispatchKeySet keys, const at::Tensor& a, const at::Tensor& b) {
  if (!takes(keys, a, b, kDims)) return Op::redispatch(below_select(keys), a, b);
  return fresh(a, b, Sum());
}
template <class Op, int64_t kDims>
at::Tensor& product_out(DispatchKeySet keys, const at::Tensor& a, const at::Tensor& b,
                        at::Tensor& out) {
  if (!takes(keys, a, b, kDims) || !takes_out(out, a, b))
    return Op::redispatch(below_select(keys), a, b, out);
  return into(out, a, b, Sum());
}

// ---- addmm, baddbmm ----------------------------------------------------------------------------
template <class Op, int64_t kDims>
at::Tensor sum(DispatchKeySet keys, const at::Tensor& self, const at::Tensor& a,
               const at::Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  if (!takes(keys, a, b, kDims) || !takes_self(self, a, b))
    return Op::redispatch(below_select(keys), self, a, b, beta, alpha);
  return fresh(a, b, Sum(self, beta, alpha));
}
template <class Op, int64_t kDims>
at::Tensor& sum_out(DispatchKeySet keys, const at::Tensor& self, const at::Tensor& a,
                    const at::Tensor& b, const at::Scalar& beta, const at::Scalar& alpha,
                    at::Tensor& out) {
  const bool same = out.is_same(self) || !out.is_alias_of(self);
  if (!takes(keys, a, b, kDims) || !takes_self(self, a, b) || !takes_out(out, a, b) || !same)
    return Op::redispatch(below_select(keys), self, a, b, beta, alpha, out);
  return into(out, a, b, Sum(self, beta, alpha));
}
template <class Op, int64_t kDims>
at::Tensor& sum_in_place(DispatchKeySet keys, at::Tensor& self, const at::Tensor& a,
                         const at::Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  if (!takes(keys, a, b, kDims) || !takes_out(self, a, b) || self.sizes() != product_sizes(a, b))
    return Op::redispatch(below_select(keys), self, a, b, beta, alpha);
  return into(self, a, b, Sum(self, beta, alpha));
}

// ---- mv ----------------------------------------------------------------------------------------
/// Torch's 16-bit kernel is slow with the unit, and without it where the rows are not contiguous: a
/// transposed matrix, as in the backward of mv itself, took seven times as long as in FP32.
at::Tensor mv(const at::Tensor& a, const at::Tensor& x) {
  const auto type = a.scalar_type();
  const bool sixteen = type == at::kHalf || type == at::kBFloat16;
  const bool ours = sixteen && (ops::widens_products(type) || ops::widens_layers(type)) &&
                    x.scalar_type() == type && a.dim() == 2 && x.dim() == 1 &&
                    a.size(1) == x.size(0) && a.numel() != 0 && !a.is_neg() && !x.is_neg() &&
                    !has_names(a) && !has_names(x);
  if (!ours) return at::compositeexplicitautograd::mv(a, x);
  const Plain plain;
  const bool transposed = a.stride(1) != 1 && a.stride(0) == 1;
  const at::Tensor matrix = transposed ? a.t() : a.stride(1) == 1 ? a : a.contiguous();
  const at::Tensor vector = x.contiguous(), y = at::empty({a.size(0)}, x.options());
  const MatrixVector work = {
      ops::dtype_code(type), matrix.const_data_ptr(), vector.const_data_ptr(), y.mutable_data_ptr(),
      matrix.size(0),        matrix.size(1),          matrix.stride(0)};
  constexpr int64_t kGrain = 8 * math::kBlock;
  const auto* kernel = kernels().mv;
  if (!transposed) {
    at::parallel_for(0, work.rows, std::max<int64_t>(4, kGrain / work.columns),
                     [&](int64_t first, int64_t end) { kernel->rows(work, first, end); });
    return y;
  }
  constexpr int64_t kStrip = 256;  // what the kernel takes at a time
  const int64_t strips = (work.columns + kStrip - 1) / kStrip;
  at::parallel_for(0, strips, std::max<int64_t>(1, kGrain / (kStrip * work.rows)),
                   [&](int64_t first, int64_t end) {
                     kernel->columns(work, first * kStrip, std::min(end * kStrip, work.columns));
                   });
  return y;
}

// ---- linear ------------------------------------------------------------------------------------
/// Of differentiable ops, so it serves above and below autograd.
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  const bool ours =
      bias && bias->defined() && bias->dim() == 1 && weight.dim() == 2 && input.dim() != 0 &&
      input.scalar_type() == weight.scalar_type() &&
      (ops::widens_products(input.scalar_type()) || ops::prefers_matrix_unit(input.scalar_type()));
  if (!ours || input.dim() == 2 || input.is_mkldnn())
    return at::compositeimplicitautograd::linear(input, weight, bias);
  const at::Tensor rows = input.dim() == 1 ? input.unsqueeze(0) : input.flatten(0, -2);
  const at::Tensor out = at::addmm(*bias, rows, weight.t());
  if (input.dim() == 1) return out.squeeze(0);
  auto sizes = input.sym_sizes().vec();
  sizes.back() = weight.sym_size(0);
  return out.view_symint(sizes);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, AutogradCPU, m) { m.impl("linear", linear); }
TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("linear", linear);
  m.impl("mv", mv);
}
TORCH_LIBRARY_IMPL(aten, BackendSelect, m) {
  m.impl("mm", product<at::_ops::mm, 2>);
  m.impl("mm.out", product_out<at::_ops::mm_out, 2>);
  m.impl("bmm", product<at::_ops::bmm, 3>);
  m.impl("bmm.out", product_out<at::_ops::bmm_out, 3>);
  m.impl("addmm", sum<at::_ops::addmm, 2>);
  m.impl("addmm.out", sum_out<at::_ops::addmm_out, 2>);
  m.impl("addmm_", sum_in_place<at::_ops::addmm_, 2>);
  m.impl("baddbmm", sum<at::_ops::baddbmm, 3>);
  m.impl("baddbmm.out", sum_out<at::_ops::baddbmm_out, 3>);
  m.impl("baddbmm_", sum_in_place<at::_ops::baddbmm_, 3>);
}

}  // namespace halfstep::cpu
