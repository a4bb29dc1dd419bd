#include "../csrc/math/grads.h"

#include "floats.h"
#include "reduce.h"
#include "table.h"

namespace halfstep::cuda {

using math::BlockStats;
using math::Dtype;

namespace {

// ---- grad_stats --------------------------------------------------------------------------------
// Per tensor and in all: count of non-finite elements, sum of squares, amax, zeros,
// FP16-subnormals.
//   Inputs FP16, BF16, FP32, FP64, mixed; read only. 2 bytes an FP16 element, 16-byte loads.
//   stats_chunks: a block of 256 threads a chunk of 16,384, so 64 elements a thread. FP16 squares
//   are added in FP32 for those 64 terms (65504^2 * 64 is far from overflow), then in FP64; other
//   dtypes in FP64 from the start, since their squares overflow or vanish in FP32.
//   stats_rows: a block a tensor adds its chunks; stats_totals: one block adds the tensors.
//   Every sum is one fixed tree: the result does not depend on the grid or the order of blocks.
// Tests: tests/emulation/grads_test.cpp, tests/gpu.

struct Tally {
  double sum = 0, amax = 0;
  int nonfinite = 0, zeros = 0, subnormals = 0;

  HALFSTEP_FN void count(double magnitude) {
    nonfinite += !(magnitude <= 0x1.fffffffffffffp1023);
    zeros += magnitude == 0;
    subnormals += magnitude < 0x1p-14 && magnitude > 0;
    amax = BlockStats::larger(amax, magnitude);
  }
};

__device__ void tally_half(const uint16_t* grad, int64_t begin, int64_t end, Tally& tally) {
  constexpr int kCount = 8;
  float partial = 0;
  int largest = 0;  // magnitudes of halves compare as integers, and NaN is the largest
  for (int64_t i = begin + int64_t(threadIdx.x) * kCount; i < end; i += kThreads * kCount) {
    const int lanes = end - i < kCount ? int(end - i) : kCount;
    const auto bits = read_group<kCount>(grad, i, lanes);
    HALFSTEP_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const int magnitude = bits.x[k] & 0x7fff;
      const bool present = k < lanes;
      tally.nonfinite += magnitude >= 0x7c00;
      tally.zeros += present && magnitude == 0;
      tally.subnormals += magnitude != 0 && magnitude < 0x400;
      largest = magnitude > largest ? magnitude : largest;
      const float x = math::half_to_float(bits.x[k]);
      partial = math::fma(x, x, partial);
    }
  }
  tally.sum = partial;
  tally.amax = math::half_to_float(uint16_t(largest));
}

template <Dtype kDtype, class Stored>
__device__ void tally_wide(const Stored* grad, int64_t begin, int64_t end, Tally& tally) {
  constexpr int kCount = int(16 / sizeof(Stored));
  for (int64_t i = begin + int64_t(threadIdx.x) * kCount; i < end; i += kThreads * kCount) {
    const int lanes = end - i < kCount ? int(end - i) : kCount;
    const auto group = read_group<kCount>(grad, i, lanes);
    HALFSTEP_UNROLL
    for (int k = 0; k < kCount; ++k) {
      if (k >= lanes) continue;
      const double x = math::load_scalar<double>(group.x, kDtype, k);
      tally.sum = math::fma(x, x, tally.sum);
      tally.count(x < 0 ? -x : x);
    }
  }
}

__global__ void __launch_bounds__(kThreads) stats_chunks(Table table, BlockStats* partials) {
  for_each_chunk(table, [&](const Row& row, int64_t, int64_t chunk, int64_t begin, int64_t end) {
    Tally tally;
    const void* grad = row.tensor.grad;
    switch (row.tensor.grad_dtype) {
      case Dtype::kF16:
        tally_half(static_cast<const uint16_t*>(grad), begin, end, tally);
        break;
      case Dtype::kBF16:
        tally_wide<Dtype::kBF16>(static_cast<const uint16_t*>(grad), begin, end, tally);
        break;
      case Dtype::kF32:
        tally_wide<Dtype::kF32>(static_cast<const float*>(grad), begin, end, tally);
        break;
      default:
        tally_wide<Dtype::kF64>(static_cast<const double*>(grad), begin, end, tally);
    }
    BlockStats mine;
    mine.sum_squares = tally.sum;
    mine.amax = tally.amax;
    mine.nonfinite = tally.nonfinite;
    mine.zeros = tally.zeros;
    mine.subnormals = tally.subnormals;
    const BlockStats all = reduce_stats(mine);
    if (threadIdx.x == 0) write(partials + chunk, all);
  });
}

__global__ void __launch_bounds__(kThreads)
    stats_rows(Table table, const BlockStats* partials, double* result, const double* known) {
  for (int64_t r = blockIdx.x; r < table.count; r += gridDim.x) {
    const Row row = read_uniform(table.rows + r);
    if (row.numel == kKnown) {
      const int64_t at = row.index * math::kStatColumns + threadIdx.x;
      if (threadIdx.x < math::kStatColumns) write(result + at, read(known + at));
      continue;
    }
    BlockStats mine;
    for (int64_t c = threadIdx.x; c < chunks_of(row.numel); c += kThreads)
      mine.add(read(partials + row.first_chunk + c));
    const BlockStats all = reduce_stats(mine);
    if (threadIdx.x != 0) continue;
    double numbers[math::kStatColumns];
    math::write_stats_row(numbers, all, row.numel, all.nonfinite > 0 ? 1.0 : 0.0);
    for (int k = 0; k < math::kStatColumns; ++k)
      write(result + row.index * math::kStatColumns + k, numbers[k]);
  }
}

struct Earliest {
  HALFSTEP_FN double operator()(double a, double b) const { return a < b ? a : b; }
};

__global__ void __launch_bounds__(kThreads) stats_totals(Table table, double* result, int64_t n) {
  HALFSTEP_SHARED(double, first, kWarps);
  HALFSTEP_SHARED(double, counts, kWarps);
  BlockStats mine;
  double numel = 0, first_bad = __builtin_inf();
  for (int64_t r = threadIdx.x; r < table.count; r += kThreads) {
    const int64_t index = read(&table.rows[r].index);
    const double* row = result + index * math::kStatColumns;
    BlockStats one;
    one.sum_squares = read(row + math::kStatSumSquares);
    one.amax = read(row + math::kStatAmax);
    one.nonfinite = int64_t(read(row + math::kStatNonfinite));
    one.zeros = int64_t(read(row + math::kStatZeros));
    one.subnormals = int64_t(read(row + math::kStatSubnormals));
    mine.add(one);
    numel += read(row + math::kStatCount);
    if (one.nonfinite > 0) first_bad = Earliest()(first_bad, double(index));
  }
  const BlockStats all = reduce_stats(mine);
  first_bad = reduce_block(first_bad, Earliest(), first);
  numel = reduce_block(numel, Sum(), counts);
  if (threadIdx.x != 0) return;
  double numbers[math::kStatColumns];
  math::write_stats_row(numbers, all, int64_t(numel), all.nonfinite > 0 ? first_bad : -1.0);
  for (int k = 0; k < math::kStatColumns; ++k)
    write(result + n * math::kStatColumns + k, numbers[k]);
}

__global__ void zero_rows(double* result, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kThreads)
    write(result + i, 0.0);
}

// ---- grad_histogram ----------------------------------------------------------------------------
// Per tensor: how many |x| / scale lie between which powers of two (math::HistogramColumn).
//   One read of each gradient and 496 bytes a chunk of 16,384 elements. The division is FP64, a
//   product where the scale is a power of two: the same bits as on the CPU.
//   histogram_chunks: a block a chunk; each warp counts in shared memory of its own, with atomics
//   on integers, so that the order of threads does not matter. histogram_rows: a block a tensor
//   adds its chunks.
// Tests: tests/emulation/grads_test.cpp, tests/gpu.

__device__ double number(Scalar scalar, double otherwise) {
  if (!scalar.data) return otherwise;
  return scalar.is_double ? read_uniform(static_cast<const double*>(scalar.data))
                          : double(read_uniform(static_cast<const float*>(scalar.data)));
}

template <Dtype kDtype, class Stored>
__device__ double count_chunk(const Stored* grad, const math::Unscale& unscale, int64_t begin,
                              int64_t end, int* counts) {
  constexpr int kCount = int(16 / sizeof(Stored));
  double amax = 0;
  for (int64_t i = begin + int64_t(threadIdx.x) * kCount; i < end; i += kThreads * kCount) {
    const int lanes = end - i < kCount ? int(end - i) : kCount;
    const auto group = read_group<kCount>(grad, i, lanes);
    HALFSTEP_UNROLL
    for (int k = 0; k < kCount; ++k) {
      if (k >= lanes) continue;
      const double x = math::load_scalar<double>(group.x, kDtype, k);
      const double magnitude = x < 0 ? -x : x;
      const double divided =
          unscale.power_of_two ? magnitude * unscale.inverse : magnitude / unscale.scale;
      const int column = math::histogram_column(magnitude, divided);
      add_shared(counts + column, 1);
      if (column != math::kHistNonfinite && magnitude > amax) amax = magnitude;
    }
  }
  return amax;
}

__global__ void __launch_bounds__(kThreads)
    histogram_chunks(Table table, Scalar scale, int64_t* partials) {
  HALFSTEP_SHARED(int, counts, kWarps* math::kHistColumns);
  HALFSTEP_SHARED(double, largest, kWarps);
  const math::Unscale unscale(number(scale, 1));
  for_each_chunk(table, [&](const Row& row, int64_t, int64_t chunk, int64_t begin, int64_t end) {
    __syncthreads();  // nobody still reads the counts before
    for (int c = threadIdx.x; c < kWarps * math::kHistColumns; c += kThreads) counts[c] = 0;
    __syncthreads();
    int* mine = counts + threadIdx.x / 32 * math::kHistColumns;
    const void* grad = row.tensor.grad;
    double amax = 0;
    switch (row.tensor.grad_dtype) {
      case Dtype::kF16:
        amax =
            count_chunk<Dtype::kF16>(static_cast<const uint16_t*>(grad), unscale, begin, end, mine);
        break;
      case Dtype::kBF16:
        amax = count_chunk<Dtype::kBF16>(static_cast<const uint16_t*>(grad), unscale, begin, end,
                                         mine);
        break;
      case Dtype::kF32:
        amax = count_chunk<Dtype::kF32>(static_cast<const float*>(grad), unscale, begin, end, mine);
        break;
      default:
        amax =
            count_chunk<Dtype::kF64>(static_cast<const double*>(grad), unscale, begin, end, mine);
    }
    amax = reduce_block(amax, Largest(), largest);
    for (int c = threadIdx.x; c < math::kHistColumns; c += kThreads) {
      int64_t sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += counts[warp * math::kHistColumns + c];
      // Thread 0 holds the amax, and writes it in the place of a count.
      if (c != math::kHistAmax) write(partials + chunk * math::kHistColumns + c, sum);
    }
    if (threadIdx.x == 0)
      write(partials + chunk * math::kHistColumns + math::kHistAmax, math::bit_cast<int64_t>(amax));
  });
}

__global__ void __launch_bounds__(kThreads)
    histogram_rows(Table table, Scalar scale, const int64_t* partials, double* result) {
  constexpr int kParts = kThreads / 64;  // chunks that are added side by side
  HALFSTEP_SHARED(int64_t, sums, kThreads);
  const int column = int(threadIdx.x) % 64, part = int(threadIdx.x) / 64;
  const double divisor = number(scale, 1);
  // Bits of non-negative doubles compare as integers.
  const auto join = [&](int64_t a, int64_t b) {
    return column != math::kHistAmax ? a + b : a > b ? a : b;
  };
  for (int64_t r = blockIdx.x; r < table.count; r += gridDim.x) {
    const Row row = read_uniform(table.rows + r);
    int64_t sum = 0;
    if (column < math::kHistColumns)
      for (int64_t c = part; c < chunks_of(row.numel); c += kParts)
        sum = join(sum, read(partials + (row.first_chunk + c) * math::kHistColumns + column));
    __syncthreads();  // nobody still reads the sums before
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (part != 0 || column >= math::kHistColumns) continue;
    for (int p = 1; p < kParts; ++p) sum = join(sum, sums[p * 64 + column]);
    const double value = column == math::kHistCount  ? double(row.numel)
                         : column == math::kHistAmax ? math::bit_cast<double>(sum) / divisor
                                                     : double(sum);
    write(result + row.index * math::kHistColumns + column, value);
  }
}

// ---- unscale -----------------------------------------------------------------------------------
// output = input * inv_scale, one rounding; FP64 multiplies in FP64, all else in FP32.
//   One read and one write an element. found_inf only ever becomes 1, whoever writes it.
// Tests: tests/emulation/grads_test.cpp, tests/gpu.

template <class T>
HALFSTEP_FN bool is_finite(T x) {
  return x - x == 0;
}

template <class T>
__device__ bool unscale_chunk(const math::StepTensor& tensor, T factor, int64_t begin,
                              int64_t end) {
  constexpr int kCount = 4;
  bool bad = false;
  for (int64_t i = begin + int64_t(threadIdx.x) * kCount; i < end; i += kThreads * kCount) {
    const int lanes = end - i < kCount ? int(end - i) : kCount;
    const auto x = read_floats<T, kCount>(tensor.grad, tensor.grad_dtype, i, lanes);
    Group<T, kCount> y;
    HALFSTEP_UNROLL
    for (int k = 0; k < kCount; ++k) y.x[k] = x.x[k] * factor;
    const auto stored = write_floats<T, kCount>(tensor.param, tensor.param_dtype, i, lanes, y);
    HALFSTEP_UNROLL
    for (int k = 0; k < kCount; ++k) bad |= !is_finite(x.x[k]) || !is_finite(stored.x[k]);
  }
  return bad;
}

__global__ void __launch_bounds__(kThreads)
    unscale_chunks(Table table, const float* inv_scale, float* found_inf) {
  const float factor = read_uniform(inv_scale);
  for_each_chunk(table, [&](const Row& row, int64_t, int64_t, int64_t begin, int64_t end) {
    const math::StepTensor& tensor = row.tensor;
    const bool wide = tensor.grad_dtype == Dtype::kF64 || tensor.param_dtype == Dtype::kF64;
    const bool bad = wide ? unscale_chunk<double>(tensor, double(factor), begin, end)
                          : unscale_chunk<float>(tensor, factor, begin, end);
    if (bad) write(found_inf, 1.0f);
  });
}

// ---- step_control ------------------------------------------------------------------------------

constexpr int kTotals = 64;  ///< pointers that one launch takes by value
struct Totals {
  const double* row[kTotals];
  int count;
  bool first, last;
};

/// One thread. Between launches the sum of squares waits in control[kControlNorm], the flag in
/// control[kControlFoundInf].
__global__ void control_totals(Totals totals, Scalar scale, Scalar found_inf, Scalar clip,
                               double max_norm, double* control) {
  double sum = totals.first ? 0 : read(control + math::kControlNorm);
  bool bad = totals.first ? number(found_inf, 0) != 0 : read(control + math::kControlFoundInf) != 0;
  for (int i = 0; i < totals.count; ++i) {
    sum += read(totals.row[i] + math::kStatSumSquares);
    bad |= read(totals.row[i] + math::kStatFoundInf) != 0;
  }
  double numbers[math::kControlEntries] = {bad ? 1.0 : 0.0, 1, sum, 1};
  if (totals.last)
    math::write_control(numbers, sum, bad, number(scale, 1), max_norm, number(clip, 1));
  for (int k = 0; k < math::kControlEntries; ++k) write(control + k, numbers[k]);
}

}  // namespace

Status grad_stats(const Table& table, BlockStats* partials, double* result, int64_t n,
                  const double* known, Stream stream) {
  const int64_t cells = (n + 1) * math::kStatColumns;
  Status status =
      launch(zero_rows, (cells + kThreads - 1) / kThreads, kThreads, stream, result, cells);
  if (status == kSuccess)
    status = launch(stats_chunks, grid_for(stats_chunks, kThreads, table.chunks), kThreads, stream,
                    table, partials);
  if (status == kSuccess)
    status = launch(stats_rows, grid_for(stats_rows, kThreads, table.count), kThreads, stream,
                    table, partials, result, known);
  if (status == kSuccess) status = launch(stats_totals, 1, kThreads, stream, table, result, n);
  return status;
}

Status grad_stats_rows(const Table& table, BlockStats* partials, double* result, Stream stream) {
  const Status status = launch(stats_chunks, grid_for(stats_chunks, kThreads, table.chunks),
                               kThreads, stream, table, partials);
  if (status != kSuccess) return status;
  return launch(stats_rows, grid_for(stats_rows, kThreads, table.count), kThreads, stream, table,
                partials, result, nullptr);
}

Status grad_histogram(const Table& table, Scalar scale, int64_t* partials, double* result,
                      int64_t n, Stream stream) {
  const int64_t cells = n * math::kHistColumns;
  Status status =
      launch(zero_rows, (cells + kThreads - 1) / kThreads, kThreads, stream, result, cells);
  if (status == kSuccess)
    status = launch(histogram_chunks, grid_for(histogram_chunks, kThreads, table.chunks), kThreads,
                    stream, table, scale, partials);
  if (status == kSuccess)
    status = launch(histogram_rows, grid_for(histogram_rows, kThreads, table.count), kThreads,
                    stream, table, scale, partials, result);
  return status;
}

Status unscale(const Table& table, const float* inv_scale, float* found_inf, Stream stream) {
  return launch(unscale_chunks, grid_for(unscale_chunks, kThreads, table.chunks), kThreads, stream,
                table, inv_scale, found_inf);
}

Status step_control(const double* const* totals, int64_t count, Scalar scale, Scalar found_inf,
                    Scalar clip, double max_norm, double* control, Stream stream) {
  int64_t done = 0;
  do {
    Totals some = {};
    some.first = done == 0;
    for (; some.count < kTotals && done < count; ++done) some.row[some.count++] = totals[done];
    some.last = done == count;
    const Status status =
        launch(control_totals, 1, 1, stream, some, scale, found_inf, clip, max_norm, control);
    if (status != kSuccess) return status;
  } while (done < count);
  return kSuccess;
}

}  // namespace halfstep::cuda
