// grad_stats:  per block of 4,096 elements: count of non-finite, sum of squares, amax, zeros,
// subnormals.
//   One read of each gradient, nothing written: 2 bytes an FP16 parameter.
//   FP16: squares in FP32 lanes for 64 terms (65504^2 * 64 is far from overflow), then FP64 lanes.
//   Other dtypes: FP64 lanes from the start, since their squares overflow or vanish in FP32.
//   Lanes are added as ((0+8)+(4+12))+...: one fixed tree, so every instruction set gives the same
//   bits.
// grad_histogram:  per block, how many |x| / scale lie between which powers of two. One read of
// each
//   gradient. The division and the loads are vectors, the counting is one element at a time.
// unscale:  one read, one write.
// Tests: tests/cpp/grads_test.cpp, tests/python/test_grads.py.

#include "states.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

using namespace math;

namespace {

/// Counters over FP16 bits, 16 elements of int16 at a time.
struct HalfCounters {
  typedef int16_t Native __attribute__((vector_size(32)));
  Native amax{}, zeros{}, small{}, nonfinite{};

  HALFSTEP_FN void add(const uint16_t* from) {
    Native bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    bits &= int16_t(0x7fff);
    amax = bits > amax ? bits : amax;
    zeros -= bits == Native{};
    small -= bits < int16_t(0x400);
    nonfinite -= bits >= int16_t(0x7c00);
  }
  static int64_t total(const Native& counts) {
    int64_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += counts[i];
    return sum;
  }
  void write(BlockStats& stats, int64_t padding) const {
    int16_t largest = 0;
    for (int i = 0; i < 16; ++i) largest = amax[i] > largest ? amax[i] : largest;
    stats.amax = double(half_to_float(uint16_t(largest)));
    stats.nonfinite = total(nonfinite);
    stats.zeros = total(zeros) - padding;
    stats.subnormals = total(small) - total(zeros);
  }
};

BlockStats half_stats(const uint16_t* grad, int64_t count) {
  HalfCounters counters;
  F64 sum = broadcast<F64>(0);
  int64_t i = 0;
  while (i + kLanes <= count) {
    const int64_t stop = i + 64 * kLanes <= count ? i + 64 * kLanes : count - count % kLanes;
    F32 partial = broadcast<F32>(0);
    for (; i < stop; i += kLanes) {
      counters.add(grad + i);
      const F32 x = load_half(grad + i);
      partial = fma(x, x, partial);
    }
    sum = sum + to_double(partial);
  }
  int64_t padding = 0;
  if (i < count) {
    uint16_t tail[kLanes] = {};
    __builtin_memcpy(tail, grad + i, size_t(count - i) * 2);
    padding = kLanes - (count - i);
    counters.add(tail);
    const F32 x = load_half(tail);
    sum = sum + to_double(x * x);
  }
  BlockStats stats;
  stats.sum_squares = sum_lanes(sum);
  counters.write(stats, padding);
  return stats;
}

/// BF16, FP32 and FP64: sixteen FP64 lanes throughout.
template <Dtype kDtype>
BlockStats wide_stats(const void* grad, int64_t count) {
  F64 sum = broadcast<F64>(0), amax = broadcast<F64>(0);
  I64 zeros = broadcast<I64>(0), small = zeros, nonfinite = zeros;
  const I64 none = zeros, infinity = to_bits(broadcast<F64>(__builtin_inf()));
  const auto add = [&](const void* from, int64_t i) __attribute__((always_inline)) {
    const F64 x = load_any<F64>(from, kDtype, i);
    const F64 magnitude = abs(x);
    sum = fma(x, x, sum);
    // Non-negative doubles compare as integers, and NaN is the largest.
    amax = select<double>(to_bits(magnitude) >= to_bits(amax), magnitude, amax);
    zeros = zeros - (to_bits(magnitude) == none);
    small = small - (broadcast<F64>(0x1.fffffffffffffp-15) >= magnitude);
    nonfinite = nonfinite - (to_bits(magnitude) >= infinity);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) add(grad, i);
  int64_t padding = 0;
  if (i < count) {
    constexpr int64_t kSize = dtype_size(kDtype);
    alignas(64) char tail[kLanes * 8] = {};
    __builtin_memcpy(tail, static_cast<const char*>(grad) + i * kSize, size_t((count - i) * kSize));
    padding = kLanes - (count - i);
    add(tail, 0);
  }
  BlockStats stats;
  stats.sum_squares = sum_lanes(sum);
  double lanes[kLanes];
  store_lanes(lanes, amax);
  for (const double lane : lanes) stats.amax = BlockStats::larger(stats.amax, lane);
  int64_t counts[3][kLanes];
  store_lanes(counts[0], nonfinite);
  store_lanes(counts[1], zeros);
  store_lanes(counts[2], small);
  for (int lane = 0; lane < kLanes; ++lane) {
    stats.nonfinite += counts[0][lane];
    stats.zeros += counts[1][lane];
    stats.subnormals += counts[2][lane] - counts[1][lane];
  }
  stats.zeros -= padding;
  return stats;
}

/// Elements before `lanes` of a group of sixteen.
HALFSTEP_FN void count_group(const F64& x, const Unscale& unscale, int64_t lanes, Histogram& into) {
  const F64 magnitude = abs(x);
  const F64 divided = unscale.power_of_two ? magnitude * broadcast<F64>(unscale.inverse)
                                           : magnitude / broadcast<F64>(unscale.scale);
  double before[kLanes], after[kLanes];
  store_lanes(before, magnitude);
  store_lanes(after, divided);
  for (int64_t k = 0; k < lanes; ++k) {
    const int column = histogram_column(before[k], after[k]);
    ++into.counts[column];
    if (column != kHistNonfinite && before[k] > into.amax) into.amax = before[k];
  }
}

template <Dtype kDtype>
void histogram(const void* grad, double scale, int64_t count, Histogram& into) {
  const Unscale unscale(scale);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    count_group(load_any<F64>(grad, kDtype, i), unscale, kLanes, into);
  if (i == count) return;
  constexpr int64_t kSize = dtype_size(kDtype);
  alignas(64) char tail[kLanes * 8] = {};
  __builtin_memcpy(tail, static_cast<const char*>(grad) + i * kSize, size_t((count - i) * kSize));
  count_group(load_any<F64>(tail, kDtype, 0), unscale, count - i, into);
}

template <class T>
void store_scalar(void* to, Dtype dtype, int64_t i, T x) {
  switch (dtype) {
    case Dtype::kF16:
      static_cast<uint16_t*>(to)[i] = float_to_half(float(x));
      break;
    case Dtype::kBF16:
      static_cast<uint16_t*>(to)[i] = float_to_bfloat(float(x));
      break;
    case Dtype::kF32:
      static_cast<float*>(to)[i] = float(x);
      break;
    default:
      static_cast<double*>(to)[i] = double(x);
  }
}

bool finite(double x) { return x - x == 0; }
bool finite(float x) { return x - x == 0; }

/// One element at a time where an FP64 tensor takes part.
template <class T>
bool unscale_scalar(const void* input, Dtype input_dtype, void* output, Dtype output_dtype,
                    T inv_scale, int64_t begin, int64_t end) {
  bool bad = false;
  for (int64_t i = begin; i < end; ++i) {
    const T x = load_scalar<T>(input, input_dtype, i);
    store_scalar(output, output_dtype, i, x * inv_scale);
    bad |= !finite(x) || !finite(load_scalar<T>(output, output_dtype, i));
  }
  return bad;
}

}  // namespace

BlockStats grad_stats(const void* grad, Dtype dtype, int64_t count) {
  switch (dtype) {
    case Dtype::kF16:
      return half_stats(static_cast<const uint16_t*>(grad), count);
    case Dtype::kBF16:
      return wide_stats<Dtype::kBF16>(grad, count);
    case Dtype::kF32:
      return wide_stats<Dtype::kF32>(grad, count);
    default:
      return wide_stats<Dtype::kF64>(grad, count);
  }
}

void grad_histogram(const void* grad, Dtype dtype, double scale, int64_t count, Histogram& into) {
  switch (dtype) {
    case Dtype::kF16:
      return histogram<Dtype::kF16>(grad, scale, count, into);
    case Dtype::kBF16:
      return histogram<Dtype::kBF16>(grad, scale, count, into);
    case Dtype::kF32:
      return histogram<Dtype::kF32>(grad, scale, count, into);
    default:
      return histogram<Dtype::kF64>(grad, scale, count, into);
  }
}

bool unscale(const void* input, Dtype input_dtype, void* output, Dtype output_dtype,
             double inv_scale, int64_t count) {
  if (input_dtype == Dtype::kF64 || output_dtype == Dtype::kF64)
    return unscale_scalar<double>(input, input_dtype, output, output_dtype, inv_scale, 0, count);
  const F32 factor = broadcast<F32>(float(inv_scale));
  const F32 infinity = broadcast<F32>(__builtin_inff());
  I32 finite_before = broadcast<I32>(-1), finite_after = finite_before;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 x = load_any<F32>(input, input_dtype, i);
    const F32 y = x * factor;
    if (output_dtype == Dtype::kF16)
      store_half(static_cast<uint16_t*>(output) + i, y);
    else if (output_dtype == Dtype::kBF16)
      store_bfloat(static_cast<uint16_t*>(output) + i, y);
    else
      store_lanes(static_cast<float*>(output) + i, y);
    const F32 stored = output_dtype == Dtype::kF32 ? y : load_any<F32>(output, output_dtype, i);
    finite_before = finite_before & ((abs(x) != infinity) & (x == x));
    finite_after = finite_after & ((abs(stored) != infinity) & (stored == stored));
  }
  const bool bad = any((finite_before & finite_after) != broadcast<I32>(-1));
  return unscale_scalar<float>(input, input_dtype, output, output_dtype, float(inv_scale), i,
                               count) ||
         bad;
}

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
