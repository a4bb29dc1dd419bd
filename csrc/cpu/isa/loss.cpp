// Cross entropy, a row at a time; formulas in csrc/math/loss.h.
//
//   loss: two passes, one for the largest logit and one for the sums, the second out of the cache.
//   A pass that carries a running maximum reads once but corrects its sums as it goes.
//   gradient: one pass, exp again: to keep the exponentials of a row costs more than to form them.
//   16-bit and FP32 logits in FP32 with sums as in rows.h, FP64 in FP64; every result is rounded
//   once. The gradient may overwrite the logits: a pack is read before it is written, and what the
//   label needs is read before all.
//   A NaN, +inf or only -inf in a row make its loss and gradient NaN; an ignored row is exact zeros
//   whatever it holds.
//   Tests: tests/python/test_loss.py, test_isa.py.

#include "loss.h"

#include "../../math/functions.h"
#include "parts.h"
#include "rows.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

template <class E>
double largest(const void* row, int64_t n) {
  using V = typename E::V;
  const V lowest = broadcast<V>(-typename E::T(INFINITY));
  V four[4] = {lowest, lowest, lowest, lowest};  // independent, so that they overlap
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) four[k] = larger(E::load(row, i + k * kLanes), four[k]);
  for_each_pack(
      n - i, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
        const auto x = E::load(row, i + j, lanes);
        four[0] = larger(within(x, lanes, -typename E::T(INFINITY)), four[0]);
      });
  return double(max_lane(larger(larger(four[0], four[1]), larger(four[2], four[3]))));
}

template <class T>
double scalar(const void* row, Dtype dtype, int64_t i) {
  return double(math::load_scalar<T>(row, dtype, i));
}

template <class E>
struct Sums {
  double rest, spread;
};

/// kSmooth: the spread too. `label` is a class, so that its pack is met.
template <class E, bool kSmooth>
Sums<E> sums(const CrossEntropy& c, const void* row, int64_t label, double max) {
  using V = typename E::V;
  using T = typename E::T;
  const V m = broadcast<V>(T(max));
  const auto* weights = static_cast<const T*>(c.weights);
  using W = Elements<sizeof(T) == 8 ? Dtype::kF64 : Dtype::kF32>;
  LaneSum<V> rest, spread;
  const auto add = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const V x = E::load(row, i, lanes);
    V e = within(math::exp_negative(x - m), lanes, 0);
    if (uint64_t(label - i) < uint64_t(kLanes)) {
      T terms[kLanes];
      store_lanes(terms, e);
      terms[label - i] = 0;
      e = load_lanes(terms);
    }
    rest.add(e);
    if constexpr (kSmooth) {
      if (weights)
        spread.add_product(W::load(weights, i, lanes), within(m - x, lanes, 0));
      else
        spread.add(within(m - x, lanes, 0));
    }
  };
  for_each_term(c.classes, add, rest, spread);
  return {rest.total(), kSmooth ? spread.total() : 0};
}

/// exp(x_y - max), as the passes over the row compute it.
template <class T>
double label_term(double logit, double max) {
  return double(math::exp_negative(T(logit) - T(max)));
}

template <class T>
double weight_of(const CrossEntropy& c, int64_t label) {
  return c.weights ? double(static_cast<const T*>(c.weights)[label]) : 1;
}

template <class E>
double row_loss(const CrossEntropy& c, const void* row, int64_t label, RowStats& stats) {
  using T = typename E::T;
  stats.max = largest<E>(row, c.classes);
  const Sums<E> sum = c.smoothing != 0 ? sums<E, true>(c, row, label, stats.max)
                                       : sums<E, false>(c, row, label, stats.max);
  stats.rest = sum.rest;
  const double logit = scalar<T>(row, E::dtype, label);
  return math::row_loss(c, stats, logit, label_term<T>(logit, stats.max), weight_of<T>(c, label),
                        sum.spread);
}

template <class E, bool kSmooth>
void write_gradient(const CrossEntropy& c, const void* row, const math::RowGradient& g, void* out) {
  using V = typename E::V;
  using T = typename E::T;
  using W = Elements<sizeof(T) == 8 ? Dtype::kF64 : Dtype::kF32>;
  const V m = broadcast<V>(T(g.max)), slope = broadcast<V>(T(g.slope));
  const V shift = broadcast<V>(T(-g.shift));
  for_each_pack(
      c.classes, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const V e = math::exp_negative<E::size == 2>(E::load(row, i, lanes) - m);
        if constexpr (!kSmooth)
          E::store(out, i, e * slope, lanes);
        else if (c.weights)
          E::store(out, i, fma(e, slope, W::load(c.weights, i, lanes) * shift), lanes);
        else
          E::store(out, i, fma(e, slope, shift), lanes);
      });
}

template <class E>
void row_gradient(const CrossEntropy& c, const void* row, int64_t label, RowStats stats,
                  double factor, void* out) {
  using T = typename E::T;
  const double logit = scalar<T>(row, E::dtype, label);
  const math::RowGradient g =
      math::row_gradient(c, stats, label_term<T>(logit, stats.max), weight_of<T>(c, label), factor);
  c.smoothing != 0 ? write_gradient<E, true>(c, row, g, out)
                   : write_gradient<E, false>(c, row, g, out);
  math::store_rounded(out, E::dtype, label, g.label);
}

double cross_entropy_loss(const CrossEntropy& c, const void* logits, Dtype dtype, int64_t label,
                          RowStats& stats) {
  stats = {};
  if (label == c.ignored) return 0;
  return with_elements(dtype,
                       [&](auto e) { return row_loss<decltype(e)>(c, logits, label, stats); });
}

void cross_entropy_gradient(const CrossEntropy& c, const void* logits, Dtype dtype, int64_t label,
                            RowStats stats, double factor, void* out) {
  if (label == c.ignored) {
    __builtin_memset(out, 0, size_t(c.classes * math::dtype_size(dtype)));
    return;
  }
  with_elements(dtype,
                [&](auto e) { row_gradient<decltype(e)>(c, logits, label, stats, factor, out); });
}

}  // namespace

const LossKernels kLossKernels = {cross_entropy_loss, cross_entropy_gradient};

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
