#include "../csrc/math/norm.h"

#include "floats.h"
#include "reduce.h"

namespace halfstep::cuda {

using math::Dtype;

namespace {

// ---- LayerNorm and RMSNorm ---------------------------------------------------------------------
// Formulas: csrc/math/norm.h. x, y, dy, dx FP16, BF16, FP32; residual, its output and its gradient
// any of the three; weight and bias any; FP64 with FP64. Nothing aliases.
//   Up to 8,192 columns a team of 32, 128, 256 or 512 threads takes a row, 8 or 16 consecutive
//   elements a thread, which stay in its registers: every operand is read once, in 16-byte loads.
//   Blocks of at least 256 threads, so several rows a block up to 1,024 columns. A resident grid
//   strides over rows: weight and bias are read once a block.
//   Beyond, and for FP64, a block of 256 threads a row reads the row again for each step (from the
//   L2 cache while rows in flight fit there), and backward forms the sums for weight and bias in a
//   second kernel.
//   Bytes an FP16 element: forward 4, with residual 8; backward 6, with the residual's gradient 8;
//   and 16 bytes a column for each unit of 8 to 64 rows, where weight and bias get gradients.
//   Sums of a row: in FP32 over 8 or 16 elements and a warp's tree (FP64 throughout in the forward
//   of BF16 and FP32, whose squares may leave FP32), then in FP64 over warps in order. Sums over
//   rows: FP32 over at most 64 rows of a unit, then FP64 over units in order. Units depend on the
//   sizes alone, so nothing depends on the grid; no atomics.
// Tests: tests/emulation/norm_test.cpp, tests/gpu/test_norm_cuda.py.

constexpr int kElements = 8;  ///< consecutive elements of a thread
constexpr int kSlices = 8;    ///< of the units, added side by side at the end

template <int kTeam>
constexpr int kBlockThreads = kTeam < kThreads ? kThreads : kTeam;
template <int kTeam>
constexpr int kTeams = kBlockThreads<kTeam> / kTeam;

template <class T>
using Eight = Group<T, kElements>;

/// read_floats and write_floats for T; beside FP32 arithmetic nothing is FP64, and saying so saves
/// the registers of eight doubles.
template <class T>
__device__ Eight<T> load(const void* from, Dtype dtype, int64_t i, int lanes) {
  if constexpr (sizeof(T) == 4) {
    switch (dtype) {
      case Dtype::kF16:
        return read_floats<T, kElements>(from, Dtype::kF16, i, lanes);
      case Dtype::kBF16:
        return read_floats<T, kElements>(from, Dtype::kBF16, i, lanes);
      default:
        return read_floats<T, kElements>(from, Dtype::kF32, i, lanes);
    }
  } else {
    return read_floats<T, kElements>(from, dtype, i, lanes);
  }
}
template <class T>
__device__ Eight<T> store(void* to, Dtype dtype, int64_t i, int lanes, const Eight<T>& x) {
  if constexpr (sizeof(T) == 4) {
    switch (dtype) {
      case Dtype::kF16:
        return write_floats<T, kElements>(to, Dtype::kF16, i, lanes, x);
      case Dtype::kBF16:
        return write_floats<T, kElements>(to, Dtype::kBF16, i, lanes, x);
      default:
        return write_floats<T, kElements>(to, Dtype::kF32, i, lanes, x);
    }
  } else {
    return write_floats<T, kElements>(to, dtype, i, lanes, x);
  }
}

/// Elements [i, i + lanes) of weight or bias; `otherwise` where there is none.
template <class T>
__device__ Eight<T> read_parameter(const void* from, Dtype dtype, T offset, T otherwise, int64_t i,
                                   int lanes) {
  Eight<T> x = {};
  if (from) x = load<T>(from, dtype, i, lanes);
  HALFSTEP_UNROLL
  for (int k = 0; k < kElements; ++k) x.x[k] = from ? x.x[k] + offset : otherwise;
  return x;
}

HALFSTEP_FN int lanes_at(int64_t i, int64_t n, bool present) {
  if (!present || i >= n) return 0;
  return n - i < kElements ? int(n - i) : kElements;
}

HALFSTEP_FN const void* row_of(const void* from, Dtype dtype, int64_t row, int64_t n) {
  return static_cast<const char*>(from) + row * n * math::dtype_size(dtype);
}
HALFSTEP_FN void* row_of(void* from, Dtype dtype, int64_t row, int64_t n) {
  return static_cast<char*>(from) + row * n * math::dtype_size(dtype);
}

/// Sums over the threads of a team, the same in each of them. `shared`: 2 x warps of the block x
/// kCount; `turn` tells which half is free, so that one barrier a sum is enough.
template <int kTeam, int kCount, class A>
__device__ void add_team(const A (&mine)[kCount], double (&total)[kCount], double* shared,
                         int& turn) {
  constexpr int kTeamWarps = kTeam / 32, kBlockWarps = kBlockThreads<kTeam> / 32;
  double* half = shared + turn * kBlockWarps * kCount;
  const int warp = int(threadIdx.x) / 32;
  HALFSTEP_UNROLL
  for (int c = 0; c < kCount; ++c) {
    A value = mine[c];
    for (int distance = 16; distance > 0; distance /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, distance);
    total[c] = value;
    if (kTeamWarps > 1 && threadIdx.x % 32 == 0) half[warp * kCount + c] = value;
  }
  if (kTeamWarps == 1) return;
  __syncthreads();
  const int first = warp / kTeamWarps * kTeamWarps;
  HALFSTEP_UNROLL
  for (int c = 0; c < kCount; ++c) {
    double sum = half[first * kCount + c];
    for (int w = 1; w < kTeamWarps; ++w) sum += half[(first + w) * kCount + c];
    total[c] = sum;
  }
  turn ^= 1;
}

// ---- rows in registers -------------------------------------------------------------------------

/// x, or x + residual as it is rounded and stored.
template <Dtype kDtype>
__device__ Eight<float> load_input(const NormForward& work, int64_t row, int64_t i, int lanes) {
  auto x = load<float>(row_of(work.x, kDtype, row, work.n), kDtype, i, lanes);
  if (!work.residual) return x;
  const auto residual = load<float>(row_of(work.residual, work.residual_dtype, row, work.n),
                                    work.residual_dtype, i, lanes);
  HALFSTEP_UNROLL
  for (int k = 0; k < kElements; ++k) x.x[k] += residual.x[k];
  return store<float>(row_of(work.residual_out, work.residual_dtype, row, work.n),
                      work.residual_dtype, i, lanes, x);
}

template <Dtype kDtype, int kTeam, int kGroups>
__global__ void __launch_bounds__(kBlockThreads<kTeam>) forward_rows(NormForward work) {
  using A = std::conditional_t<kDtype == Dtype::kF16, float, double>;
  HALFSTEP_SHARED(double, shared, 2 * 2 * (kBlockThreads<kTeam> / 32));
  const int team = int(threadIdx.x) / kTeam, lane = int(threadIdx.x) % kTeam;
  const int64_t n = work.n;
  const bool centred = work.mean;
  int turn = 0;
  Eight<float> weight[kGroups], bias[kGroups], x[kGroups];
  HALFSTEP_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    const int64_t i = int64_t(g * kTeam + lane) * kElements;
    const int lanes = lanes_at(i, n, true);
    weight[g] = read_parameter<float>(work.weight, work.weight_dtype, float(work.weight_offset),
                                      float(1 + work.weight_offset), i, lanes);
    bias[g] = read_parameter<float>(work.bias, work.bias_dtype, 0, -0.0f, i, lanes);
  }
  for (int64_t first = int64_t(blockIdx.x) * kTeams<kTeam>; first < work.rows;
       first += int64_t(gridDim.x) * kTeams<kTeam>) {
    const int64_t row = first + team;
    const bool present = row < work.rows;
    float mean = 0;
    A sum[1] = {0};
    double total[1];
    HALFSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const int64_t i = int64_t(g * kTeam + lane) * kElements;
      x[g] = load_input<kDtype>(work, row, i, lanes_at(i, n, present));
      HALFSTEP_UNROLL
      for (int k = 0; k < kElements; ++k) sum[0] += A(x[g].x[k]);
    }
    if (centred) {
      add_team<kTeam>(sum, total, shared, turn);
      mean = float(total[0] / double(n));
    }
    A sums[2] = {0, 0};
    double totals[2];
    HALFSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const int lanes = lanes_at(int64_t(g * kTeam + lane) * kElements, n, present);
      HALFSTEP_UNROLL
      for (int k = 0; k < kElements; ++k) {
        const A d = k < lanes ? A(x[g].x[k]) - A(mean) : A(0);
        sums[0] += d;
        sums[1] = math::fma(d, d, sums[1]);
      }
    }
    add_team<kTeam>(sums, totals, shared, turn);
    const auto r = math::norm_row(mean, totals[0], totals[1], n, work.eps, centred);
    HALFSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const int64_t i = int64_t(g * kTeam + lane) * kElements;
      Eight<float> y;
      HALFSTEP_UNROLL
      for (int k = 0; k < kElements; ++k)
        y.x[k] = math::fma(math::normalise(x[g].x[k], r), weight[g].x[k], bias[g].x[k]);
      store<float>(row_of(work.y, kDtype, row, n), kDtype, i, lanes_at(i, n, present), y);
    }
    if (lane == 0 && present) {
      if (centred)
        write(static_cast<float*>(work.mean) + row, float(double(r.mean) + double(r.rest)));
      write(static_cast<float*>(work.rstd) + row, r.rstd);
    }
  }
}

/// Adds what the teams of a block hold for each column, in order, and writes it.
template <int kTeam, int kGroups>
__device__ void write_columns(const Eight<float> (&mine)[kGroups], float* to, int64_t n) {
  constexpr int kColumns = kTeam * kElements * kGroups;
  const int team = int(threadIdx.x) / kTeam, lane = int(threadIdx.x) % kTeam;
  if (kTeams<kTeam> == 1) {
    HALFSTEP_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const int64_t i = int64_t(g * kTeam + lane) * kElements;
      write_group<kElements>(to, i, lanes_at(i, n, true), mine[g]);
    }
    return;
  }
  HALFSTEP_SHARED(float, columns, kTeams<kTeam> == 1 ? 1 : kTeams<kTeam> * kColumns);
  __syncthreads();  // nobody still reads the columns before
  HALFSTEP_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    HALFSTEP_UNROLL
    for (int k = 0; k < kElements; ++k)
      columns[team * kColumns + (g * kTeam + lane) * kElements + k] = mine[g].x[k];
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += kBlockThreads<kTeam>) {
    float sum = columns[i];
    for (int t = 1; t < kTeams<kTeam>; ++t) sum += columns[t * kColumns + i];
    write(to + i, sum);
  }
}

/// dx of one thread's elements, in the dtypes that are asked for.
template <class T>
__device__ void write_gradient(const NormBackward& work, int64_t row, int64_t i, int lanes,
                               const Eight<T>& dx) {
  if (work.grad_x)
    store<T>(row_of(work.grad_x, work.grad_dtype, row, work.n), work.grad_dtype, i, lanes, dx);
  if (work.grad_input)
    store<T>(row_of(work.grad_input, work.input_dtype, row, work.n), work.input_dtype, i, lanes,
             dx);
}

/// Rows [unit * unit_rows, …) are one unit; its sums go to partials[unit][weight, bias][n].
template <Dtype kDtype, int kTeam, int kGroups>
__global__ void __launch_bounds__(kBlockThreads<kTeam>)
    backward_rows(NormBackward work, float* partials, int64_t units, int64_t unit_rows) {
  HALFSTEP_SHARED(double, shared, 2 * 3 * (kBlockThreads<kTeam> / 32));
  const int team = int(threadIdx.x) / kTeam, lane = int(threadIdx.x) % kTeam;
  const int64_t n = work.n;
  const bool centred = work.mean;
  int turn = 0;
  const auto read_weight = [&](int g) {
    const int64_t i = int64_t(g * kTeam + lane) * kElements;
    return read_parameter<float>(work.weight, work.weight_dtype, float(work.weight_offset),
                                 float(1 + work.weight_offset), i, lanes_at(i, n, true));
  };
  // Two groups of everything do not fit the registers: then the weight comes from the cache.
  Eight<float> held = {};
  if (kGroups == 1) held = read_weight(0);
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    Eight<float> weight_sum[kGroups] = {}, bias_sum[kGroups] = {};
    const int64_t begin = unit * unit_rows;
    const int64_t end = begin + unit_rows < work.rows ? begin + unit_rows : work.rows;
    for (int64_t first = begin; first < end; first += kTeams<kTeam>) {
      const int64_t row = first + team;
      const bool present = row < end;
      const float mean =
          present && centred ? read_uniform(static_cast<const float*>(work.mean) + row) : 0;
      const float rstd = present ? read_uniform(static_cast<const float*>(work.rstd) + row) : 0;
      Eight<float> dy[kGroups], z[kGroups];
      float sums[3] = {0, 0, 0};
      double totals[3];
      HALFSTEP_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const int64_t i = int64_t(g * kTeam + lane) * kElements;
        const int lanes = lanes_at(i, n, present);
        dy[g] = load<float>(row_of(work.grad_y, kDtype, row, n), kDtype, i, lanes);
        z[g] =
            load<float>(row_of(work.input, work.input_dtype, row, n), work.input_dtype, i, lanes);
        const Eight<float> weight = kGroups == 1 ? held : read_weight(g);
        HALFSTEP_UNROLL
        for (int k = 0; k < kElements; ++k) {
          z[g].x[k] = k < lanes ? math::norm_near_z(z[g].x[k], mean, rstd) : 0;
          const float product = dy[g].x[k] * weight.x[k];
          sums[0] += z[g].x[k];
          sums[1] += product;
          sums[2] = math::fma(product, z[g].x[k], sums[2]);
        }
      }
      add_team<kTeam>(sums, totals, shared, turn);
      const auto slope = math::norm_slope(rstd, totals[0], totals[1], totals[2], n, centred);
      HALFSTEP_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const int64_t i = int64_t(g * kTeam + lane) * kElements;
        const int lanes = lanes_at(i, n, present);
        Eight<float> residual = {};
        if (work.grad_residual)
          residual = load<float>(row_of(work.grad_residual, work.input_dtype, row, n),
                                 work.input_dtype, i, lanes);
        const Eight<float> weight = kGroups == 1 ? held : read_weight(g);
        HALFSTEP_UNROLL
        for (int k = 0; k < kElements; ++k) {
          const float exact = math::norm_z(z[g].x[k], slope);
          weight_sum[g].x[k] = math::fma(dy[g].x[k], exact, weight_sum[g].x[k]);
          bias_sum[g].x[k] += dy[g].x[k];
          residual.x[k] =
              math::norm_gradient(dy[g].x[k] * weight.x[k], exact, residual.x[k], slope);
        }
        write_gradient(work, row, i, lanes, residual);
      }
    }
    if (work.grad_weight) write_columns<kTeam, kGroups>(weight_sum, partials + 2 * unit * n, n);
    if (work.grad_bias) write_columns<kTeam, kGroups>(bias_sum, partials + (2 * unit + 1) * n, n);
  }
}

// ---- rows that are read again ------------------------------------------------------------------

template <class T>
__device__ Eight<T> read_row(const void* from, Dtype dtype, int64_t row, int64_t i, int64_t n) {
  return load<T>(row_of(from, dtype, row, n), dtype, i, lanes_at(i, n, true));
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_wide(NormForward work) {
  HALFSTEP_SHARED(double, shared, 2 * 2 * kWarps);
  const int64_t n = work.n, begin = int64_t(threadIdx.x) * kElements;
  const bool centred = work.mean;
  const void* input = work.residual ? work.residual_out : work.x;
  const Dtype input_dtype = work.residual ? work.residual_dtype : work.x_dtype;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < work.rows; row += gridDim.x) {
    double sum[1] = {0}, total[1], sums[2] = {0, 0}, totals[2];
    if (work.residual || centred)
      for (int64_t i = begin; i < n; i += kThreads * kElements) {
        auto x = read_row<T>(work.x, work.x_dtype, row, i, n);
        if (work.residual) {
          const auto residual = read_row<T>(work.residual, work.residual_dtype, row, i, n);
          for (int k = 0; k < kElements; ++k) x.x[k] += residual.x[k];
          x = store<T>(row_of(work.residual_out, input_dtype, row, n), input_dtype, i,
                       lanes_at(i, n, true), x);
        }
        for (int k = 0; k < kElements; ++k) sum[0] += double(x.x[k]);
      }
    T mean = 0;
    if (centred) {
      add_team<kThreads>(sum, total, shared, turn);
      mean = T(total[0] / double(n));
    }
    for (int64_t i = begin; i < n; i += kThreads * kElements) {
      const auto x = read_row<T>(input, input_dtype, row, i, n);
      const int lanes = lanes_at(i, n, true);
      for (int k = 0; k < lanes; ++k) {
        const double d = double(x.x[k]) - double(mean);
        sums[0] += d;
        sums[1] = math::fma(d, d, sums[1]);
      }
    }
    add_team<kThreads>(sums, totals, shared, turn);
    const auto r = math::norm_row(mean, totals[0], totals[1], n, work.eps, centred);
    for (int64_t i = begin; i < n; i += kThreads * kElements) {
      const int lanes = lanes_at(i, n, true);
      auto x = read_row<T>(input, input_dtype, row, i, n);
      const auto weight = read_parameter<T>(work.weight, work.weight_dtype, T(work.weight_offset),
                                            T(1 + work.weight_offset), i, lanes);
      const auto bias = read_parameter<T>(work.bias, work.bias_dtype, 0, -T(0), i, lanes);
      for (int k = 0; k < kElements; ++k)
        x.x[k] = math::fma(math::normalise(x.x[k], r), weight.x[k], bias.x[k]);
      store<T>(row_of(work.y, work.x_dtype, row, n), work.x_dtype, i, lanes, x);
    }
    if (threadIdx.x == 0) {
      if (centred) write(static_cast<T*>(work.mean) + row, T(double(r.mean) + double(r.rest)));
      write(static_cast<T*>(work.rstd) + row, r.rstd);
    }
  }
}

/// rest[row]: what is subtracted from z, for the sums over rows; may be null.
template <class T>
__global__ void __launch_bounds__(kThreads) backward_wide(NormBackward work, T* rest) {
  HALFSTEP_SHARED(double, shared, 2 * 3 * kWarps);
  const int64_t n = work.n, begin = int64_t(threadIdx.x) * kElements;
  const bool centred = work.mean;
  const T offset = T(work.weight_offset), otherwise = T(1 + work.weight_offset);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < work.rows; row += gridDim.x) {
    const T mean = centred ? read_uniform(static_cast<const T*>(work.mean) + row) : T(0);
    const T rstd = read_uniform(static_cast<const T*>(work.rstd) + row);
    double sums[3] = {0, 0, 0}, totals[3];
    for (int64_t i = begin; i < n; i += kThreads * kElements) {
      const int lanes = lanes_at(i, n, true);
      const auto dy = read_row<T>(work.grad_y, work.grad_dtype, row, i, n);
      const auto x = read_row<T>(work.input, work.input_dtype, row, i, n);
      const auto weight =
          read_parameter<T>(work.weight, work.weight_dtype, offset, otherwise, i, lanes);
      for (int k = 0; k < lanes; ++k) {
        const double z = double(math::norm_near_z(x.x[k], mean, rstd));
        const double g = double(dy.x[k] * weight.x[k]);
        sums[0] += z;
        sums[1] += g;
        sums[2] = math::fma(g, z, sums[2]);
      }
    }
    add_team<kThreads>(sums, totals, shared, turn);
    const auto slope = math::norm_slope(rstd, totals[0], totals[1], totals[2], n, centred);
    if (rest && threadIdx.x == 0) write(rest + row, slope.rest);
    if (!work.grad_x && !work.grad_input) continue;
    for (int64_t i = begin; i < n; i += kThreads * kElements) {
      const int lanes = lanes_at(i, n, true);
      const auto dy = read_row<T>(work.grad_y, work.grad_dtype, row, i, n);
      const auto x = read_row<T>(work.input, work.input_dtype, row, i, n);
      const auto weight =
          read_parameter<T>(work.weight, work.weight_dtype, offset, otherwise, i, lanes);
      Eight<T> dx = {};
      if (work.grad_residual) dx = read_row<T>(work.grad_residual, work.input_dtype, row, i, n);
      for (int k = 0; k < kElements; ++k)
        dx.x[k] = math::norm_gradient(
            dy.x[k] * weight.x[k], math::norm_z(math::norm_near_z(x.x[k], mean, slope.rstd), slope),
            dx.x[k], slope);
      write_gradient(work, row, i, lanes, dx);
    }
  }
}

/// The sums over the rows of a unit, eight columns a thread.
template <class T>
__global__ void __launch_bounds__(kThreads)
    columns_wide(NormBackward work, const T* rest, T* partials, int64_t units, int64_t unit_rows) {
  const int64_t n = work.n, tiles = (n + kThreads * kElements - 1) / (kThreads * kElements);
  for (int64_t piece = blockIdx.x; piece < units * tiles; piece += gridDim.x) {
    const int64_t unit = piece / tiles;
    const int64_t i = (piece % tiles * kThreads + threadIdx.x) * kElements;
    const int lanes = lanes_at(i, n, true);
    if (lanes == 0) continue;
    const int64_t begin = unit * unit_rows;
    const int64_t end = begin + unit_rows < work.rows ? begin + unit_rows : work.rows;
    Eight<T> weight_sum = {}, bias_sum = {};
    for (int64_t row = begin; row < end; ++row) {
      const T mean = work.mean ? read_uniform(static_cast<const T*>(work.mean) + row) : T(0);
      const math::NormSlope<T> slope = {read_uniform(rest + row),
                                        read_uniform(static_cast<const T*>(work.rstd) + row), T(0),
                                        T(0)};
      const auto dy = read_row<T>(work.grad_y, work.grad_dtype, row, i, n);
      const auto x = read_row<T>(work.input, work.input_dtype, row, i, n);
      for (int k = 0; k < kElements; ++k) {
        weight_sum.x[k] =
            math::fma(dy.x[k], math::norm_z(math::norm_near_z(x.x[k], mean, slope.rstd), slope),
                      weight_sum.x[k]);
        bias_sum.x[k] += dy.x[k];
      }
    }
    write_group<kElements>(partials + 2 * unit * n, i, lanes, weight_sum);
    write_group<kElements>(partials + (2 * unit + 1) * n, i, lanes, bias_sum);
  }
}

/// to[column] = the sum over units of partials[unit][which][column], 32 columns a block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_columns(const T* partials, int64_t units, int which, int64_t n, Dtype dtype, void* to) {
  static_assert(kThreads == 32 * kSlices);
  HALFSTEP_SHARED(double, slices, kThreads);
  const int slice = int(threadIdx.x) / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
  double sum = 0;
  if (column < n)
    for (int64_t unit = slice; unit < units; unit += kSlices)
      sum += double(read(partials + (2 * unit + which) * n + column));
  slices[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || column >= n) return;
  for (int s = 1; s < kSlices; ++s) sum += slices[s * 32 + int(threadIdx.x)];
  // To odd on the way to 16 bits: the second rounding is then the only one that counts.
  if (math::dtype_size(dtype) == 2) sum = double(math::round_to_odd(sum));
  write_floats<double, 1>(to, dtype, column, 1, Group<double, 1>{{sum}});
}

// ---- launches ----------------------------------------------------------------------------------

constexpr int64_t kInRegisters = 8192;

/// Rows of a unit: about 512 units, of 8 to 64 rows.
int64_t unit_rows_of(int64_t rows) {
  const int64_t even = (rows + 511) / 512;
  return even < 8 ? 8 : even > math::kNormRows ? math::kNormRows : even;
}
int64_t units_of(int64_t rows) { return (rows + unit_rows_of(rows) - 1) / unit_rows_of(rows); }
bool in_registers(Dtype dtype, int64_t n) { return dtype != Dtype::kF64 && n <= kInRegisters; }

/// body.template operator()<kTeam, kGroups>() for the team that fits n columns.
template <class Body>
Status with_team(int64_t n, const Body& body) {
  if (n <= 256) return body.template operator()<32, 1>();
  if (n <= 1024) return body.template operator()<128, 1>();
  if (n <= 2048) return body.template operator()<256, 1>();
  if (n <= 4096) return body.template operator()<512, 1>();
  return body.template operator()<512, 2>();
}

template <Dtype kDtype>
Status start_forward(const NormForward& work, Stream stream) {
  return with_team(work.n, [&]<int kTeam, int kGroups>() {
    const auto kernel = forward_rows<kDtype, kTeam, kGroups>;
    const int64_t chunks = (work.rows + kTeams<kTeam> - 1) / kTeams<kTeam>;
    return launch(kernel, grid_for(kernel, kBlockThreads<kTeam>, chunks), kBlockThreads<kTeam>,
                  stream, work);
  });
}

template <Dtype kDtype>
Status start_backward(const NormBackward& work, float* partials, Stream stream) {
  return with_team(work.n, [&]<int kTeam, int kGroups>() {
    const auto kernel = backward_rows<kDtype, kTeam, kGroups>;
    const int64_t units = units_of(work.rows);
    return launch(kernel, grid_for(kernel, kBlockThreads<kTeam>, units), kBlockThreads<kTeam>,
                  stream, work, partials, units, unit_rows_of(work.rows));
  });
}

template <class T>
Status start_wide(const NormBackward& work, T* scratch, Stream stream) {
  const int64_t units = units_of(work.rows);
  T* rest = scratch ? scratch + 2 * units * work.n : nullptr;
  const auto kernel = backward_wide<T>;
  Status status =
      launch(kernel, grid_for(kernel, kThreads, work.rows), kThreads, stream, work, rest);
  if (status != kSuccess || !scratch) return status;
  const auto columns = columns_wide<T>;
  const int64_t tiles = (work.n + kThreads * kElements - 1) / (kThreads * kElements);
  return launch(columns, grid_for(columns, kThreads, units * tiles), kThreads, stream, work, rest,
                scratch, units, unit_rows_of(work.rows));
}

template <class T>
Status finish(const NormBackward& work, const T* partials, Stream stream) {
  const int64_t blocks = (work.n + 31) / 32, units = units_of(work.rows);
  Status status = kSuccess;
  if (work.grad_weight)
    status = launch(finish_columns<T>, blocks, kThreads, stream, partials, units, 0, work.n,
                    work.weight_dtype, work.grad_weight);
  if (status == kSuccess && work.grad_bias)
    status = launch(finish_columns<T>, blocks, kThreads, stream, partials, units, 1, work.n,
                    work.bias_dtype, work.grad_bias);
  return status;
}

}  // namespace

Status norm_forward(const NormForward& work, Stream stream) {
  if (!in_registers(work.x_dtype, work.n)) {
    const auto kernel = work.x_dtype == Dtype::kF64 ? forward_wide<double> : forward_wide<float>;
    return launch(kernel, grid_for(kernel, kThreads, work.rows), kThreads, stream, work);
  }
  switch (work.x_dtype) {
    case Dtype::kF16:
      return start_forward<Dtype::kF16>(work, stream);
    case Dtype::kBF16:
      return start_forward<Dtype::kBF16>(work, stream);
    default:
      return start_forward<Dtype::kF32>(work, stream);
  }
}

int64_t norm_scratch(const NormBackward& work) {
  if (!work.grad_weight && !work.grad_bias) return 0;
  const int64_t size = work.grad_dtype == Dtype::kF64 ? 8 : 4;
  return (2 * units_of(work.rows) * work.n + work.rows) * size;
}

Status norm_backward(const NormBackward& work, void* scratch, Stream stream) {
  if (work.grad_dtype == Dtype::kF64) {
    auto* sums = static_cast<double*>(scratch);
    const Status status = start_wide(work, sums, stream);
    return status == kSuccess ? finish(work, sums, stream) : status;
  }
  auto* sums = static_cast<float*>(scratch);
  Status status;
  if (!in_registers(work.grad_dtype, work.n))
    status = start_wide(work, sums, stream);
  else if (work.grad_dtype == Dtype::kF16)
    status = start_backward<Dtype::kF16>(work, sums, stream);
  else if (work.grad_dtype == Dtype::kBF16)
    status = start_backward<Dtype::kBF16>(work, sums, stream);
  else
    status = start_backward<Dtype::kF32>(work, sums, stream);
  return status == kSuccess ? finish(work, sums, stream) : status;
}

}  // namespace halfstep::cuda
