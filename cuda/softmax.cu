#include "../csrc/math/softmax.h"

#include "floats.h"
#include "reduce.h"

namespace halfstep::cuda {

using math::Dtype;
using math::SoftmaxRows;

namespace {

// y = exp(s - max s) / sum exp(s - max s),  s = scale x + mask, over what takes part; all else is
// zero. dx = scale y (dy - sum y dy / sum y).
//   FP16, BF16, FP32 (in FP32), FP64; mask bool or of any of them, with any strides; out overlaps
//   nothing. A row of which nothing takes part is zeros; NaN, +inf, or only -inf make it NaN.
//   Rows up to 1,024 belong to a warp, up to 8,192 to a block of 256 threads, in registers: 8 or 32
//   elements a thread, one read and one write, 4 bytes an FP16 element forward and 6 backward; of a
//   causal row only what takes part is read. Longer rows are read twice: forward with a running
//   maximum, 6 bytes, backward 10; the second read finds what the cache still holds.
//   A thread owns groups of 8 neighbours: 16-byte accesses where the row begins on 16 bytes.
//   Sums: FP32 for a group, then FP64, lanes and warps in one fixed tree: the bits depend on the
//   length of the row and on nothing else.
// Tests: tests/emulation/softmax_test.cpp, tests/gpu/test_softmax_cuda.py.

constexpr int kGroup = 8;

struct Larger {
  HALFSTEP_FN double operator()(double a, double b) const { return a >= b ? a : b; }
};

/// The same result in all threads of a row.
template <int kRowThreads, class Op>
__device__ double reduce_row(double value, const Op& op, double* shared) {
  for (int lanes = 16; lanes > 0; lanes /= 2)
    value = op(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  if constexpr (kRowThreads > 32) {
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[0];
    for (int warp = 1; warp < kRowThreads / 32; ++warp) value = op(value, shared[warp]);
    __syncthreads();  // everybody has read before the next one writes
  }
  return value;
}

template <class T>
struct Row {
  Dtype dtype;
  int64_t length, count;
  const char* x;
  const char* grad;
  char* out;
  math::SoftmaxMask mask;
  T scale;

  HALFSTEP_FN Row(const SoftmaxRows& all, int64_t row)
      : dtype(all.dtype),
        length(all.length),
        count(math::softmax_count(all, row)),
        mask(all.mask),
        scale(T(all.scale)) {
    const int64_t before = row * length * math::dtype_size(dtype);
    x = static_cast<const char*>(all.x) + before;
    out = static_cast<char*>(all.out) + before;
    grad = static_cast<const char*>(all.grad) + (all.grad ? before : 0);
    if (!mask.data) return;
    int64_t offset[1];
    math::row_offsets(all.mask_rows, row, offset);
    const int64_t size = mask.is_bool ? 1 : math::dtype_size(mask.dtype);
    mask.data = static_cast<const char*>(mask.data) + offset[0] * size;
  }

  HALFSTEP_FN int taking_part(int64_t i) const { return lanes(i, count); }
  HALFSTEP_FN int present(int64_t i) const { return lanes(i, length); }

  /// What is added to the elements at i: 0 or -inf where the mask is bool.
  HALFSTEP_FN Group<T, kGroup> added(int64_t i, int lanes) const {
    Group<T, kGroup> a = {};
    const T none = -T(__builtin_inf());
    if (mask.is_bool && mask.stride == 1) {
      const auto bits = read_group<kGroup>(static_cast<const uint8_t*>(mask.data), i, lanes);
      HALFSTEP_UNROLL
      for (int k = 0; k < kGroup; ++k) a.x[k] = bits.x[k] ? T(0) : none;
    } else if (mask.stride == 1) {
      a = read_floats<T, kGroup>(mask.data, mask.dtype, i, lanes);
    } else {
      HALFSTEP_UNROLL
      for (int k = 0; k < kGroup; ++k)
        if (k < lanes) a.x[k] = added_one((i + k) * mask.stride);
    }
    return a;
  }

  /// x where there is no mask, else scale x + mask; bit k of `taking` says that element k takes
  /// part.
  HALFSTEP_FN Group<T, kGroup> logits(int64_t i, uint32_t& taking) const {
    const int lanes = taking_part(i);
    taking = (1u << lanes) - 1;
    auto v = read_floats<T, kGroup>(x, dtype, i, lanes);
    if (mask.data) {
      const auto a = added(i, lanes);
      HALFSTEP_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        if (a.x[k] == -T(__builtin_inf())) taking &= ~(1u << k);
        v.x[k] = math::masked_logit(v.x[k], scale, a.x[k]);
      }
    }
    return v;
  }
  /// By which logits() is still to be multiplied.
  HALFSTEP_FN T factor() const { return mask.data ? T(1) : scale; }

  HALFSTEP_FN T exponential(T v, T top) const {
    if constexpr (sizeof(T) == 8) return math::softmax_exp<Dtype::kF64>(v, factor(), top);
    return dtype == Dtype::kF32 ? math::softmax_exp<Dtype::kF32>(v, factor(), top)
                                : math::softmax_exp<Dtype::kF16>(v, factor(), top);
  }

  /// e / total; a row that is not ordinary is NaN where an element takes part.
  HALFSTEP_FN void write_shares(int64_t i, Group<T, kGroup> e, uint32_t taking, bool ordinary,
                                const math::Inverse<T>& inverse) const {
    HALFSTEP_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      const T share = ordinary ? math::softmax_share(e.x[k], inverse) : T(__builtin_nan(""));
      e.x[k] = taking >> k & 1 ? share : T(0);
    }
    write_floats<T, kGroup>(out, dtype, i, present(i), e);
  }

 private:
  HALFSTEP_FN static int lanes(int64_t i, int64_t end) {
    return end - i >= kGroup ? kGroup : end > i ? int(end - i) : 0;
  }
  HALFSTEP_FN T added_one(int64_t at) const {
    const T none = -T(__builtin_inf());
    if (mask.is_bool) return read(static_cast<const uint8_t*>(mask.data) + at) ? T(0) : none;
    const char* from = static_cast<const char*>(mask.data) + at * math::dtype_size(mask.dtype);
    return read_floats<T, 1>(from, mask.dtype, 0, 1).x[0];
  }
};

/// Neither without any element, nor with NaN or infinity among them.
HALFSTEP_FN bool is_ordinary(double total) { return total > 0 && total < __builtin_inf(); }

/// body(row, thread, shared) for every row of the grid's blocks, kRowThreads threads a row.
template <int kRowThreads, class T, class Body>
__device__ void for_each_row(const SoftmaxRows& all, const Body& body) {
  HALFSTEP_SHARED(double, shared, kWarps);
  constexpr int kRows = kThreads / kRowThreads;
  const int thread = int(threadIdx.x) % kRowThreads;
  for (int64_t r = int64_t(blockIdx.x) * kRows + threadIdx.x / kRowThreads; r < all.rows;
       r += int64_t(gridDim.x) * kRows)
    body(Row<T>(all, r), thread, shared);
}

/// Rows of at most 8 * kRowThreads * kGroups elements.
template <class T, int kRowThreads, int kGroups>
__global__ void __launch_bounds__(kThreads) forward_held(SoftmaxRows all) {
  for_each_row<kRowThreads, T>(all, [](const Row<T>& row, int thread, double* shared) {
    Group<T, kGroup> e[kGroups];
    uint32_t taking[kGroups];
    T largest = -T(__builtin_inf());
    HALFSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      e[g] = row.logits(int64_t(g * kRowThreads + thread) * kGroup, taking[g]);
      HALFSTEP_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        const T s = e[g].x[k] * row.factor();
        if ((taking[g] >> k & 1) && s >= largest) largest = s;
      }
    }
    const T top = T(reduce_row<kRowThreads>(double(largest), Larger(), shared));
    double sum = 0;
    HALFSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      T partial = 0;
      HALFSTEP_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        e[g].x[k] = taking[g] >> k & 1 ? row.exponential(e[g].x[k], top) : T(0);
        partial += e[g].x[k];
      }
      sum += double(partial);
    }
    const double total = reduce_row<kRowThreads>(sum, Sum(), shared);
    const bool ordinary = is_ordinary(total);
    const math::Inverse<T> inverse(total);
    HALFSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const int64_t i = int64_t(g * kRowThreads + thread) * kGroup;
      if (row.present(i) > 0) row.write_shares(i, e[g], taking[g], ordinary, inverse);
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_streamed(SoftmaxRows all) {
  for_each_row<kThreads, T>(all, [](const Row<T>& row, int thread, double* shared) {
    const T none = -T(__builtin_inf());
    constexpr int kStride = kThreads * kGroup;
    T largest = none;
    double sum = 0;
    uint32_t taking;
    for (int64_t i = int64_t(thread) * kGroup; i < row.count; i += kStride) {
      const auto v = row.logits(i, taking);
      T top = largest;
      HALFSTEP_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        const T s = v.x[k] * row.factor();
        if ((taking >> k & 1) && s >= top) top = s;
      }
      T partial = 0;
      HALFSTEP_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        const bool counts = (taking >> k & 1) && v.x[k] * row.factor() != none;
        partial += counts ? row.exponential(v.x[k], top) : T(0);
      }
      sum = (largest == top ? sum : sum * double(math::exp_negative(largest - top))) +
            double(partial);
      largest = top;
    }
    const T top = T(reduce_row<kThreads>(double(largest), Larger(), shared));
    if (largest != top) sum *= double(math::exp_negative(largest - top));
    const double total = reduce_row<kThreads>(sum, Sum(), shared);
    const bool ordinary = is_ordinary(total);
    const math::Inverse<T> inverse(total);
    for (int64_t i = int64_t(thread) * kGroup; i < row.length; i += kStride) {
      auto e = row.logits(i, taking);
      HALFSTEP_UNROLL
      for (int k = 0; k < kGroup; ++k)
        e.x[k] = taking >> k & 1 ? row.exponential(e.x[k], top) : T(0);
      row.write_shares(i, e, taking, ordinary, inverse);
    }
  });
}

/// The mean of dy under y in two parts.
template <class T>
struct Mean {
  T high, low;
  HALFSTEP_FN Mean(double y_dy, double y) {
    const double mean = math::softmax_mean(y_dy, y);
    high = T(mean);
    low = high - high == 0 ? T(mean - double(high)) : T(0);
  }
};

template <class T>
__device__ void add_group(const Group<T, kGroup>& y, const Group<T, kGroup>& dy, double& y_dy,
                          double& y_sum) {
  T product = 0, sum = 0;
  HALFSTEP_UNROLL
  for (int k = 0; k < kGroup; ++k) {
    product = math::fma(y.x[k], dy.x[k], product);
    sum += y.x[k];
  }
  y_dy += double(product);
  y_sum += double(sum);
}

template <class T>
__device__ void write_slopes(const Row<T>& row, int64_t i, const Group<T, kGroup>& y,
                             const Group<T, kGroup>& dy, const Mean<T>& mean) {
  Group<T, kGroup> dx;
  const int lanes = row.taking_part(i);
  HALFSTEP_UNROLL
  for (int k = 0; k < kGroup; ++k)
    dx.x[k] =
        k < lanes ? math::softmax_slope(y.x[k], dy.x[k], row.scale, mean.high, mean.low) : T(0);
  write_floats<T, kGroup>(row.out, row.dtype, i, row.present(i), dx);
}

template <class T, int kRowThreads, int kGroups>
__global__ void __launch_bounds__(kThreads) backward_held(SoftmaxRows all) {
  for_each_row<kRowThreads, T>(all, [](const Row<T>& row, int thread, double* shared) {
    Group<T, kGroup> y[kGroups], dy[kGroups];
    double y_dy = 0, y_sum = 0;
    HALFSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const int64_t i = int64_t(g * kRowThreads + thread) * kGroup;
      const int lanes = row.taking_part(i);
      y[g] = read_floats<T, kGroup>(row.x, row.dtype, i, lanes);
      dy[g] = read_floats<T, kGroup>(row.grad, row.dtype, i, lanes);
      add_group(y[g], dy[g], y_dy, y_sum);
    }
    y_dy = reduce_row<kRowThreads>(y_dy, Sum(), shared);
    y_sum = reduce_row<kRowThreads>(y_sum, Sum(), shared);
    const Mean<T> mean(y_dy, y_sum);
    HALFSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const int64_t i = int64_t(g * kRowThreads + thread) * kGroup;
      if (row.present(i) > 0) write_slopes(row, i, y[g], dy[g], mean);
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_streamed(SoftmaxRows all) {
  for_each_row<kThreads, T>(all, [](const Row<T>& row, int thread, double* shared) {
    constexpr int kStride = kThreads * kGroup;
    double y_dy = 0, y_sum = 0;
    for (int64_t i = int64_t(thread) * kGroup; i < row.count; i += kStride) {
      const int lanes = row.taking_part(i);
      add_group(read_floats<T, kGroup>(row.x, row.dtype, i, lanes),
                read_floats<T, kGroup>(row.grad, row.dtype, i, lanes), y_dy, y_sum);
    }
    y_dy = reduce_row<kThreads>(y_dy, Sum(), shared);
    y_sum = reduce_row<kThreads>(y_sum, Sum(), shared);
    const Mean<T> mean(y_dy, y_sum);
    for (int64_t i = int64_t(thread) * kGroup; i < row.length; i += kStride) {
      const int lanes = row.taking_part(i);
      write_slopes(row, i, read_floats<T, kGroup>(row.x, row.dtype, i, lanes),
                   read_floats<T, kGroup>(row.grad, row.dtype, i, lanes), mean);
    }
  });
}

Status start(void (*kernel)(SoftmaxRows), int row_threads, const SoftmaxRows& all, Stream stream) {
  const int64_t rows = kThreads / row_threads;
  return launch(kernel, grid_for(kernel, kThreads, (all.rows + rows - 1) / rows), kThreads, stream,
                all);
}

template <class T>
Status forward(const SoftmaxRows& all, Stream stream) {
  if (all.length <= 256) return start(forward_held<T, 32, 1>, 32, all, stream);
  if (all.length <= 1024) return start(forward_held<T, 32, 4>, 32, all, stream);
  if (all.length <= 2048) return start(forward_held<T, kThreads, 1>, kThreads, all, stream);
  if (all.length <= 8192) return start(forward_held<T, kThreads, 4>, kThreads, all, stream);
  return start(forward_streamed<T>, kThreads, all, stream);
}

template <class T>
Status backward(const SoftmaxRows& all, Stream stream) {
  if (all.length <= 256) return start(backward_held<T, 32, 1>, 32, all, stream);
  if (all.length <= 1024) return start(backward_held<T, 32, 4>, 32, all, stream);
  if (all.length <= 2048) return start(backward_held<T, kThreads, 1>, kThreads, all, stream);
  if (all.length <= 8192) return start(backward_held<T, kThreads, 4>, kThreads, all, stream);
  return start(backward_streamed<T>, kThreads, all, stream);
}

}  // namespace

Status softmax(const SoftmaxRows& all, Stream stream) {
  return all.dtype == Dtype::kF64 ? forward<double>(all, stream) : forward<float>(all, stream);
}

Status softmax_backward(const SoftmaxRows& all, Stream stream) {
  return all.dtype == Dtype::kF64 ? backward<double>(all, stream) : backward<float>(all, stream);
}

}  // namespace halfstep::cuda
