#include "../csrc/math/functions.h"
#include "../csrc/math/loss.h"

#include "floats.h"
#include "reduce.h"

namespace halfstep::cuda {

namespace {

// Cross entropy by rows: csrc/math/loss.h has the formulas. Logits FP16, BF16, FP32 computed in
// FP32, FP64 in FP64; losses in FP64; the gradient is rounded once to its own dtype.
//   One block of 256 threads a row, the grid strides over rows. Groups of eight elements begin at
//   16-byte boundaries of the logits, so that a row of odd length costs one short group. A thread
//   carries its own maximum and corrects its sum when it grows; the block puts them together.
//   forward, loss alone: 2 bytes a 16-bit logit. With the gradient: 4 where the row fits kCache
//   bytes of shared memory (20,480 16-bit logits), into which each thread puts the groups that it
//   reads again; 6 beyond, of which the second read finds most of its rows in L2.
//   backward: 2 read, 2 written. rescale: 2 and 2, or nothing.
// No atomics; sums in one fixed order, so two runs agree to the bit; the CPU to the last place.
// A label that is no class is never an address: its row is NaN. 64-bit offsets.
// Tests: tests/emulation/loss_test.cpp, tests/gpu/test_loss_cuda.py.

constexpr int kGroup = 8;
constexpr int kCache = 40960;

using math::Dtype;

template <Dtype kDtype>
struct Element {
  using T = float;
  using Raw = uint16_t;
};
template <>
struct Element<Dtype::kF32> {
  using T = float;
  using Raw = float;
};
template <>
struct Element<Dtype::kF64> {
  using T = double;
  using Raw = double;
};

/// The same for all threads of a block.
__device__ double number(Scalar scalar, int64_t i = 0) {
  if (!scalar.data) return 1;
  return scalar.is_double ? read_uniform(static_cast<const double*>(scalar.data) + i)
                          : double(read_uniform(static_cast<const float*>(scalar.data) + i));
}

/// A row in groups: a short one up to the first 16-byte boundary, then full ones, then the rest.
struct Groups {
  int64_t count, lead, length;
  __device__ Groups(const void* row, int64_t n, int size) : length(n) {
    const auto beyond = int64_t(reinterpret_cast<uintptr_t>(row) % 16);
    lead = beyond == 0 ? 0 : (16 - beyond) / size;
    if (lead > n) lead = n;
    count = (lead > 0) + (n - lead + kGroup - 1) / kGroup;
  }
  __device__ int64_t first(int64_t group) const {
    return lead == 0 ? group * kGroup : group == 0 ? 0 : lead + (group - 1) * kGroup;
  }
  __device__ int lanes(int64_t group) const {
    if (lead > 0 && group == 0) return int(lead);
    const int64_t left = length - first(group);
    return left < kGroup ? int(left) : kGroup;
  }
};

template <class Raw>
__device__ Group<Raw, kGroup> read_row(const Raw* row, const Groups& groups, int64_t group) {
  const int64_t first = groups.first(group);
  return read_group<kGroup>(row + first, 0, groups.lanes(group));
}

struct Label {
  int64_t index;
  bool is_ignored, is_class;
  double weight;
};

template <class T>
__device__ Label read_label(const LossRows& p, int64_t row) {
  Label label;
  label.index = read_uniform(p.labels + row);
  label.is_ignored = label.index == p.numbers.ignored;
  label.is_class = !label.is_ignored && label.index >= 0 && label.index < p.numbers.classes;
  label.weight = 1;
  if (label.is_class && p.numbers.weights)
    label.weight = double(read_uniform(static_cast<const T*>(p.numbers.weights) + label.index));
  return label;
}

/// One thread's part of a row.
template <class T>
struct Partial {
  T max;
  double rest = 0, weighted = 0;  ///< sum of exp(x_c - max) but the label's; sum of w_c x_c

  template <Dtype kDtype, class Raw>
  __device__ void add(const Group<Raw, kGroup>& raw, int lanes, int64_t skip, const T* weights,
                      bool smooths) {
    T x[kGroup], most = max;
    HALFSTEP_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      x[k] = math::load_scalar<T>(raw.x, kDtype, k);
      if (k < lanes && x[k] > most) most = x[k];
    }
    if (most > max) {
      rest *= double(math::exp_negative(max - most));
      max = most;
    }
    T sum = 0;
    HALFSTEP_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      // Where all so far is -inf the terms are 0, but a NaN stays one.
      const T term =
          max == -T(INFINITY) ? (x[k] == x[k] ? T(0) : x[k]) : math::exp_negative(x[k] - max);
      if (k < lanes && k != skip) sum += term;
      if (smooths && k < lanes)
        weighted += (weights ? double(read(weights + k)) : 1) * double(x[k]);
    }
    rest += double(sum);
  }
};

template <class T>
__device__ T reduce_max(T value, T* shared) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const T other = __shfl_down_sync(0xffffffffu, value, distance);
    value = other > value ? other : value;
  }
  __syncthreads();  // nobody still reads the results before
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) value = shared[warp] > value ? shared[warp] : value;
  return value;
}

/// The sum in every thread.
__device__ double reduce_sum(double value, double* shared) {
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_down_sync(0xffffffffu, value, distance);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) value += shared[warp];
  return value;
}

template <class T>
__device__ void write_row(const LossRows& p, int64_t row, const Groups& groups, int64_t group,
                          const Group<T, kGroup>& values) {
  const int size = int(math::dtype_size(p.grad_dtype));
  char* out = static_cast<char*>(p.grad) + (row * p.numbers.classes + groups.first(group)) * size;
  write_floats<T, kGroup>(out, p.grad_dtype, 0, groups.lanes(group), values);
}

template <class T>
__device__ void fill_row(const LossRows& p, int64_t row, const Groups& groups, T value) {
  Group<T, kGroup> values;
  for (int k = 0; k < kGroup; ++k) values.x[k] = value;
  for (int64_t g = threadIdx.x; g < groups.count; g += kThreads)
    write_row(p, row, groups, g, values);
}

/// One group of the gradient.
template <Dtype kDtype, class T, class Raw>
__device__ Group<T, kGroup> gradient(const LossRows& p, const math::RowGradient& g,
                                     const Group<Raw, kGroup>& raw, int64_t first, int lanes,
                                     int64_t label) {
  const T* weights = static_cast<const T*>(p.numbers.weights);
  const bool is_sixteen = p.grad_dtype == Dtype::kF16 || p.grad_dtype == Dtype::kBF16;
  Group<T, kGroup> out = {};
  HALFSTEP_UNROLL
  for (int k = 0; k < kGroup; ++k) {
    const T term = math::exp_negative<math::dtype_size(kDtype) == 2>(
        math::load_scalar<T>(raw.x, kDtype, k) - T(g.max));
    out.x[k] = term * T(g.slope);
    if (g.shift != 0 && k < lanes) {
      const T weight = weights ? read(weights + first + k) : T(1);
      out.x[k] = math::fma(term, T(g.slope), weight * T(-g.shift));
    }
    if (first + k == label) out.x[k] = is_sixteen ? T(math::round_to_odd(g.label)) : T(g.label);
  }
  return out;
}

/// kForward: loss and stats, with kGradient the gradient too; else the gradient from stats.
template <Dtype kDtype, bool kForward, bool kGradient>
__global__ void __launch_bounds__(kThreads) loss_rows(LossRows p) {
  using T = typename Element<kDtype>::T;
  using Raw = typename Element<kDtype>::Raw;
  constexpr bool kKeeps = kForward && kGradient;
  using Kept = Group<Raw, kGroup>;
  constexpr int kKept = kKeeps ? kCache / int(sizeof(Kept)) : 1;
  HALFSTEP_SHARED(Kept, kept, kKept);
  HALFSTEP_SHARED(T, largest, kWarps);
  HALFSTEP_SHARED(double, sums, kWarps);
  const double weight_sum = p.numbers.weights ? read_uniform(p.sums + 1) : p.numbers.weight_sum;
  const bool smooths = p.numbers.smoothing != 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const Raw* logits = static_cast<const Raw*>(p.logits) + row * p.stride;
    const Groups groups(logits, p.numbers.classes, int(sizeof(Raw)));
    const Label label = read_label<T>(p, row);
    T* stats_at = static_cast<T*>(p.stats) + 2 * row;
    if (!label.is_class) {
      const double value = label.is_ignored ? 0 : __builtin_nan("");
      if (kForward && threadIdx.x == 0) {
        write(p.losses + row, value);
        write(stats_at, T(value));
        write(stats_at + 1, T(value));
      }
      if (kGradient) fill_row(p, row, groups, T(value));
      continue;
    }
    math::CrossEntropy numbers = p.numbers;
    numbers.weight_sum = weight_sum;
    const double logit = double(
        math::load_scalar<T>(Group<Raw, 1>{{read_uniform(logits + label.index)}}.x, kDtype, 0));
    math::RowStats stats;
    if (kForward) {
      Partial<T> mine = {-T(INFINITY)};
      for (int64_t g = threadIdx.x; g < groups.count; g += kThreads) {
        const auto raw = read_row(logits, groups, g);
        const int64_t first = groups.first(g);
        const T* weights = static_cast<const T*>(p.numbers.weights);
        mine.template add<kDtype>(raw, groups.lanes(g), label.index - first,
                                  weights ? weights + first : nullptr, smooths);
        if (kKeeps && groups.count <= kKept) kept[g] = raw;
      }
      const T max = reduce_max(mine.max, largest);
      // A thread without elements has -inf and 0.
      const double shrink = mine.max == max ? 1 : double(math::exp_negative(mine.max - max));
      stats = {double(max), double(T(reduce_sum(mine.rest * shrink, sums)))};
      const double weighted = smooths ? reduce_sum(mine.weighted, sums) : 0;
      if (threadIdx.x == 0) {
        const double term = double(math::exp_negative(T(logit) - max));
        write(p.losses + row, math::row_loss(numbers, stats, logit, term, label.weight,
                                             weight_sum * stats.max - weighted));
        write(stats_at, T(stats.max));
        write(stats_at + 1, T(stats.rest));
      }
    } else {
      stats = {double(read_uniform(stats_at)), double(read_uniform(stats_at + 1))};
    }
    if (kGradient) {
      const double divisor = p.is_mean ? read_uniform(p.sums) : 1;
      const double upstream = number(p.upstream, p.per_row ? row : 0);
      const math::RowGradient g =
          math::row_gradient(numbers, stats, double(math::exp_negative(T(logit) - T(stats.max))),
                             label.weight, upstream / divisor);
      // The label's logit has been read by all before a gradient may take its place.
      __syncthreads();
      for (int64_t i = threadIdx.x; i < groups.count; i += kThreads) {
        const auto raw = kKeeps && groups.count <= kKept ? kept[i] : read_row(logits, groups, i);
        const int64_t first = groups.first(i);
        write_row(p, row, groups, i,
                  gradient<kDtype, T>(p, g, raw, first, groups.lanes(i), label.index));
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_weights(LossRows p, double* result) {
  HALFSTEP_SHARED(double, shared, kWarps);
  double labels = 0, all = 0;
  const T* weights = static_cast<const T*>(p.numbers.weights);
  for (int64_t i = threadIdx.x; i < p.rows; i += kThreads) {
    const int64_t label = read(p.labels + i);
    if (label == p.numbers.ignored || label < 0 || label >= p.numbers.classes) continue;
    labels += weights ? double(read(weights + label)) : 1;
  }
  if (weights)
    for (int64_t i = threadIdx.x; i < p.numbers.classes; i += kThreads)
      all += double(read(weights + i));
  labels = reduce_sum(labels, shared);
  all = reduce_sum(all, shared);
  if (threadIdx.x != 0) return;
  write(result, labels);
  write(result + 1, weights ? all : p.numbers.weight_sum);
}

__global__ void __launch_bounds__(kThreads)
    total_loss(const double* losses, int64_t rows, const double* sums, bool is_mean, void* out,
               bool is_double) {
  HALFSTEP_SHARED(double, shared, kWarps);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) sum += read(losses + i);
  sum = reduce_sum(sum, shared);
  if (threadIdx.x != 0) return;
  if (is_mean) sum /= read(sums);
  if (is_double)
    write(static_cast<double*>(out), sum);
  else
    write(static_cast<float*>(out), float(sum));
}

/// One block a piece of kPiece elements of a row.
constexpr int64_t kPiece = 16384;
template <class T>
__global__ void __launch_bounds__(kThreads) rescale_pieces(Rescale p, int64_t pieces) {
  const double divisor = number(p.divisor);
  const int from_size = int(math::dtype_size(p.dtype));
  const int to_size = int(math::dtype_size(p.out_dtype));
  const int64_t per_row = (p.length + kPiece - 1) / kPiece;
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const int64_t row = piece / per_row, begin = piece % per_row * kPiece;
    const double factor = number(p.factor, p.per_row ? row : 0) / divisor;
    if (factor == 1 && p.out == p.grad) continue;
    const auto* from = static_cast<const char*>(p.grad) + (row * p.length + begin) * from_size;
    auto* to = static_cast<char*>(p.out) + (row * p.length + begin) * to_size;
    const int64_t count = p.length - begin < kPiece ? p.length - begin : kPiece;
    for (int64_t i = int64_t(threadIdx.x) * kGroup; i < count; i += kThreads * kGroup) {
      const int lanes = count - i < kGroup ? int(count - i) : kGroup;
      auto x = read_floats<T, kGroup>(from, p.dtype, i, lanes);
      for (int k = 0; k < kGroup; ++k) x.x[k] = x.x[k] * T(factor);
      write_floats<T, kGroup>(to, p.out_dtype, i, lanes, x);
    }
  }
}

template <bool kForward, bool kGradient>
Status launch_rows(const LossRows& rows, Stream stream) {
  const auto start = [&](auto kernel) {
    return launch(kernel, grid_for(kernel, kThreads, rows.rows), kThreads, stream, rows);
  };
  switch (rows.dtype) {
    case Dtype::kF16:
      return start(loss_rows<Dtype::kF16, kForward, kGradient>);
    case Dtype::kBF16:
      return start(loss_rows<Dtype::kBF16, kForward, kGradient>);
    case Dtype::kF32:
      return start(loss_rows<Dtype::kF32, kForward, kGradient>);
    default:
      return start(loss_rows<Dtype::kF64, kForward, kGradient>);
  }
}

}  // namespace

Status loss_sums(const LossRows& rows, double* sums, Stream stream) {
  return rows.dtype == Dtype::kF64 ? launch(sum_weights<double>, 1, kThreads, stream, rows, sums)
                                   : launch(sum_weights<float>, 1, kThreads, stream, rows, sums);
}

Status loss_forward(const LossRows& rows, Stream stream) {
  return rows.grad ? launch_rows<true, true>(rows, stream) : launch_rows<true, false>(rows, stream);
}

Status loss_backward(const LossRows& rows, Stream stream) {
  return launch_rows<false, true>(rows, stream);
}

Status loss_total(const double* losses, int64_t rows, const double* sums, bool is_mean, void* out,
                  bool is_double, Stream stream) {
  return launch(total_loss, 1, kThreads, stream, losses, rows, sums, is_mean, out, is_double);
}

Status rescale_rows(const Rescale& rescale, Stream stream) {
  const int64_t pieces = rescale.rows * ((rescale.length + kPiece - 1) / kPiece);
  const auto start = [&](auto kernel) {
    return launch(kernel, grid_for(kernel, kThreads, pieces), kThreads, stream, rescale, pieces);
  };
  const bool is_double = rescale.dtype == Dtype::kF64 || rescale.out_dtype == Dtype::kF64;
  return is_double ? start(rescale_pieces<double>) : start(rescale_pieces<float>);
}

}  // namespace halfstep::cuda
