// softmax:  y = exp(s - max s) / sum exp(s - max s),  s = scale x + mask, over the elements that
// take part; all others are exact zeros.
//   FP16, BF16, FP32 (in FP32), FP64; rows of any length; x and out may not overlap.
//   Two reads of x (or one, and one of the scratch row, where there is a mask) and one write. The
//   exponentials wait in the scratch row, so that each result is rounded once.
//   Sums: sixteen FP32 lanes for 64 terms each, then FP64.
//   A row of which nothing takes part is zeros. NaN and +inf make the row NaN, as do only -inf
//   among what takes part; masked elements stay zeros then, too.
// softmax_backward:  dx = scale y (dy - sum y dy / sum y).
//   Two reads of y and dy, the second from the cache, and one write.
// Tests: tests/python/test_softmax.py, tests/cpp/softmax_test.cpp.

#include "softmax.h"

#include "rows.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

/// What a mask adds to sixteen elements: 0 or -inf for a bool one.
template <class V>
V load_mask(const SoftmaxMask& mask, int64_t i, int count) {
  using T = typename Traits<V>::Scalar;
  if (mask.stride == 1 && count == kLanes && !mask.is_bool)
    return load_any<V>(mask.data, mask.dtype, i);
  T lanes[kLanes] = {};
  for (int k = 0; k < count; ++k) {
    const int64_t at = (i + k) * mask.stride;
    lanes[k] = mask.is_bool ? (static_cast<const bool*>(mask.data)[at] ? T(0) : T(-__builtin_inf()))
                            : load_scalar<T>(mask.data, mask.dtype, at);
  }
  return load_lanes(lanes);
}

/// The same of a bool mask that lies side by side.
template <class V>
HALFSTEP_FN V load_bools(const void* mask, int64_t i) {
  using T = typename Traits<V>::Scalar;
  const I32 bits = load_int8(static_cast<const int8_t*>(mask) + i);
  const F32 added = select<float>(bits == broadcast<I32>(0), broadcast<F32>(-__builtin_inff()),
                                  broadcast<F32>(0));
  if constexpr (sizeof(T) == 8)
    return to_double(added);
  else
    return added;
}

/// A row without a positive finite sum: NaN where an element takes part, else zero.
template <class E>
__attribute__((noinline)) void write_other_row(const SoftmaxRow& row) {
  using V = typename E::V;
  using T = typename E::T;
  for_each_pack(row.count, [&](int64_t i, auto lanes) {
    T y[kLanes] = {};
    T added[kLanes] = {};
    if (row.mask.data) store_lanes(added, load_mask<V>(row.mask, i, lanes.count));
    for (int k = 0; k < lanes.count; ++k)
      y[k] = added[k] == T(-__builtin_inf()) ? T(0) : T(__builtin_nan(""));
    E::store(row.out, i, load_lanes(y), lanes);
  });
}

template <class E>
void write_zeros(void* to, int64_t begin, int64_t end) {
  __builtin_memset(static_cast<char*>(to) + begin * E::size, 0, size_t((end - begin) * E::size));
}

template <class E, bool kMasked>
void forward_row(const SoftmaxRow& row) {
  using V = typename E::V;
  using T = typename E::T;
  const T lowest = -T(__builtin_inf());
  const V scale = broadcast<V>(T(row.scale));
  T* const logits = static_cast<T*>(row.scratch);
  const bool bools = row.mask.is_bool && row.mask.stride == 1;
  V largest = broadcast<V>(lowest);
  for_each_pack(
      row.count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        V s = E::load(row.x, i, lanes);
        if constexpr (kMasked) {
          const V mask = bools && lanes.count == kLanes ? load_bools<V>(row.mask.data, i)
                                                        : load_mask<V>(row.mask, i, lanes.count);
          s = masked_logit(s, scale, mask);
        } else {
          s = s * scale;
        }
        s = within(s, lanes, lowest);
        if constexpr (kMasked) store_lanes(logits + i, s);
        largest = larger(s, largest);
      });
  const T top = max_lane(largest);
  LaneSum<V> sum;
  for_each_term(
      row.count,
      [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const V x = kMasked ? load_lanes(logits + i) : E::load(row.x, i, lanes);
        const V factor = kMasked ? broadcast<V>(1) : scale;
        const V e = within(math::softmax_exp<E::dtype>(x, factor, broadcast<V>(top)), lanes, 0);
        sum.add(e);
        store_lanes(logits + i, e);
      },
      sum);
  const double total = sum.total();
  if (!(total > 0 && total < __builtin_inf())) return write_other_row<E>(row);
  const Inverse<T> inverse(total);
  for_each_pack(
      row.count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const V e = load_lanes(logits + i);
        // What Inverse::low brings is below what 16 bits hold.
        E::store(row.out, i,
                 E::size == 2 ? e * broadcast<V>(inverse.high) : softmax_share(e, inverse), lanes);
      });
}

template <class E>
void backward_row(const SoftmaxRow& row) {
  using V = typename E::V;
  using T = typename E::T;
  const V scale = broadcast<V>(T(row.scale));
  LaneSum<V> y_dy, y_sum;
  for_each_term(
      row.count,
      [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const V y = E::load(row.x, i, lanes);
        y_dy.add_product(y, E::load(row.grad, i, lanes));
        y_sum.add(y);
      },
      y_dy, y_sum);
  const double mean = softmax_mean(y_dy.total(), y_sum.total());
  const T high = T(mean);
  const T low = high - high == 0 ? T(mean - double(high)) : T(0);
  for_each_pack(
      row.count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        E::store(
            row.out, i,
            softmax_slope(E::load(row.x, i, lanes), E::load(row.grad, i, lanes), scale, high, low),
            lanes);
      });
}

void forward(const SoftmaxRow& row) {
  with_elements(row.dtype, [&](auto elements) {
    using E = decltype(elements);
    row.mask.data ? forward_row<E, true>(row) : forward_row<E, false>(row);
    write_zeros<E>(row.out, row.count, row.length);
  });
}

void backward(const SoftmaxRow& row) {
  with_elements(row.dtype, [&](auto elements) {
    using E = decltype(elements);
    backward_row<E>(row);
    write_zeros<E>(row.out, row.count, row.length);
  });
}

}  // namespace

const SoftmaxKernels kSoftmax = {forward, backward};

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
