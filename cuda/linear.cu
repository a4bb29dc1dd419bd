#include "../csrc/math/linear.h"

#include "floats.h"
#include "reduce.h"

namespace halfstep::cuda {

using math::Dtype;
using math::LinearActivation;

namespace {

// What stands behind a product that was not fused into it, row-major [rows, columns], contiguous:
//   forward   y = act(product + bias), and a mask (ReLU) or h in y's dtype (GELU)
//   backward  dz = dy act'(h), and column sums of the unrounded dz
//   FP32 (FP64 for FP64) inside, one rounding at each store. product: FP32, or y's dtype, then y
//   may be the product. bias: any dtype, or null. saved, dz and sums are optional. A block of 256
//   threads takes 64 rows of 256 columns: a warp reads 512 bytes of one FP16 row, a lane eight
//   neighbouring columns, which is one byte of a mask, in eight rows of the 64. The grid strides
//   over the tiles. Sums: FP32 over a lane's eight rows, then over the warps in order, one row of
//   `sums` for 64 rows; add_rows adds those in FP64, in one fixed order, and rounds once. Bytes an
//   element in FP16: forward 4 or 2 in, 2 out, 2 (h) or 1/8 (mask) kept; backward 2 in, 2 or 1/8
//   kept, 2 out, and 4/64 for the sums. Elementwise results are those of the CPU kernels up to the
//   compiler's exp; no atomics.
// Tests: tests/emulation/linear_test.cpp, tests/gpu/test_linear_cuda.py.

constexpr int kGroup = 8;                      // columns of a thread
constexpr int64_t kTileColumns = 32 * kGroup;  // of a block
constexpr int64_t kTileRows = math::kBiasRows;

int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

/// body(row tile, first column of the thread, how many are in the row) for each tile of the block.
template <class Body>
__device__ void for_each_tile(int64_t rows, int64_t columns, const Body& body) {
  const int64_t across = (columns + kTileColumns - 1) / kTileColumns;
  const int64_t down = (rows + kTileRows - 1) / kTileRows;
  for (int64_t tile = blockIdx.x; tile < across * down; tile += gridDim.x) {
    const int64_t column = tile % across * kTileColumns + int64_t(threadIdx.x % 32) * kGroup;
    const int64_t left = columns - column;
    body(tile / across, column, left >= kGroup ? kGroup : left > 0 ? int(left) : 0);
  }
}

__device__ int64_t byte_size(Dtype dtype) { return math::dtype_size(dtype); }
template <class T>
__device__ T* row_of(T* data, Dtype dtype, int64_t row, int64_t columns) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data ? static_cast<T*>(static_cast<Byte*>(data) + row * columns * byte_size(dtype)) : data;
}

/// The bytes of a mask behind the last group of a row, by the thread that has that group.
__device__ void close_mask(uint8_t* mask, int64_t columns, int64_t column, int lanes) {
  if (lanes == 0 || column + lanes < columns) return;
  for (int64_t i = column / 8 + 1; i < math::mask_bytes(columns); ++i) write(mask + i, uint8_t(0));
}

template <LinearActivation kActivation, class T>
__device__ void forward_group(const EpilogueForward& work, int64_t row, int64_t column, int lanes,
                              const Group<T, kGroup>& bias) {
  const int64_t columns = work.columns;
  Group<T, kGroup> h = read_floats<T, kGroup>(
      row_of(work.product, work.product_dtype, row, columns), work.product_dtype, column, lanes);
  Group<T, kGroup> y;
  unsigned bits = 0;
  HALFSTEP_UNROLL
  for (int k = 0; k < kGroup; ++k) {
    h.x[k] = h.x[k] + bias.x[k];
    y.x[k] = math::activate<kActivation>(h.x[k]);
    if (k < lanes && !math::is_closed(h.x[k])) bits |= 1u << k;
  }
  write_floats(row_of(work.y, work.y_dtype, row, columns), work.y_dtype, column, lanes, y);
  if (!work.saved || kActivation == LinearActivation::kNone) return;
  if (kActivation == LinearActivation::kRelu) {
    auto* mask = static_cast<uint8_t*>(work.saved) + row * math::mask_bytes(columns);
    if (lanes > 0) write(mask + column / 8, uint8_t(bits));
    close_mask(mask, columns, column, lanes);
  } else {
    write_floats(row_of(work.saved, work.y_dtype, row, columns), work.y_dtype, column, lanes, h);
  }
}

template <LinearActivation kActivation, class T>
__global__ void __launch_bounds__(kThreads) epilogue_forward_tiles(EpilogueForward work) {
  for_each_tile(work.rows, work.columns, [&](int64_t tile, int64_t column, int lanes) {
    Group<T, kGroup> bias = {};
    if (work.bias) bias = read_floats<T, kGroup>(work.bias, work.bias_dtype, column, lanes);
    for (int r = int(threadIdx.x) / 32; r < kTileRows; r += kWarps) {
      const int64_t row = tile * kTileRows + r;
      if (row < work.rows) forward_group<kActivation>(work, row, column, lanes, bias);
    }
  });
}

template <LinearActivation kActivation, class T>
__device__ Group<T, kGroup> backward_group(const EpilogueBackward& work, int64_t row,
                                           int64_t column, int lanes) {
  const int64_t columns = work.columns;
  Group<T, kGroup> z =
      read_floats<T, kGroup>(row_of(work.dy, work.dtype, row, columns), work.dtype, column, lanes);
  if constexpr (kActivation == LinearActivation::kRelu) {
    const auto* mask = static_cast<const uint8_t*>(work.saved) + row * math::mask_bytes(columns);
    const unsigned bits = lanes > 0 ? read(mask + column / 8) : 0;
    HALFSTEP_UNROLL
    for (int k = 0; k < kGroup; ++k)
      if (!(bits >> k & 1)) z.x[k] = 0;
  } else if constexpr (kActivation != LinearActivation::kNone) {
    const Group<T, kGroup> h = read_floats<T, kGroup>(row_of(work.saved, work.dtype, row, columns),
                                                      work.dtype, column, lanes);
    HALFSTEP_UNROLL
    for (int k = 0; k < kGroup; ++k) z.x[k] = z.x[k] * math::slope<kActivation>(h.x[k]);
  }
  if (work.dz)
    write_floats(row_of(work.dz, work.dtype, row, columns), work.dtype, column, lanes, z);
  return z;
}

/// The sums of the warps, in order; the first warp writes them.
template <class T>
__device__ void write_sums(T* to, int64_t column, int lanes, const Group<T, kGroup>& mine) {
  HALFSTEP_SHARED(T, all, kWarps * kTileColumns);
  const int lane = int(threadIdx.x) % 32;
  __syncthreads();  // nobody still reads the tile before
  HALFSTEP_UNROLL
  for (int k = 0; k < kGroup; ++k)  // neighbouring lanes in neighbouring banks
    all[(int(threadIdx.x) / 32 * kGroup + k) * 32 + lane] = mine.x[k];
  __syncthreads();
  if (threadIdx.x >= 32) return;
  Group<T, kGroup> sum;
  HALFSTEP_UNROLL
  for (int k = 0; k < kGroup; ++k) {
    sum.x[k] = all[k * 32 + lane];
    for (int warp = 1; warp < kWarps; ++warp)
      sum.x[k] = sum.x[k] + all[(warp * kGroup + k) * 32 + lane];
  }
  write_group<kGroup>(to, column, lanes, sum);
}

template <LinearActivation kActivation, class T>
__global__ void __launch_bounds__(kThreads) epilogue_backward_tiles(EpilogueBackward work) {
  for_each_tile(work.rows, work.columns, [&](int64_t tile, int64_t column, int lanes) {
    Group<T, kGroup> sum = {};
    for (int r = int(threadIdx.x) / 32; r < kTileRows; r += kWarps) {
      const int64_t row = tile * kTileRows + r;
      if (row >= work.rows) break;
      const auto z = backward_group<kActivation, T>(work, row, column, lanes);
      HALFSTEP_UNROLL
      for (int k = 0; k < kGroup; ++k) sum.x[k] = sum.x[k] + z.x[k];
    }
    if (work.sums) write_sums(static_cast<T*>(work.sums) + tile * work.columns, column, lanes, sum);
  });
}

/// A block takes 32 columns, a warp every eighth row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_rows_of(const T* sums, int64_t rows, int64_t columns, void* out, Dtype dtype) {
  HALFSTEP_SHARED(double, all, kThreads);
  const int64_t across = (columns + 31) / 32;
  for (int64_t tile = blockIdx.x; tile < across; tile += gridDim.x) {
    const int64_t column = tile * 32 + threadIdx.x % 32;
    double sum = 0;
    if (column < columns)
      for (int64_t row = threadIdx.x / 32; row < rows; row += kWarps)
        sum += double(read(sums + row * columns + column));
    __syncthreads();  // nobody still reads the tile before
    all[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= 32 || column >= columns) continue;
    for (int warp = 1; warp < kWarps; ++warp) sum += all[warp * 32 + threadIdx.x];
    Group<double, 1> one = {{sum}};
    if (dtype == Dtype::kF64) {
      write_floats(out, dtype, column, 1, one);
    } else {
      // To odd on the way to 16 bits: the second rounding is then the only one that counts.
      const Group<float, 1> single = {
          {dtype_size(dtype) == 2 ? math::round_to_odd(sum) : float(sum)}};
      write_floats(out, dtype, column, 1, single);
    }
  }
}

template <class T>
Status start_forward(const EpilogueForward& work, int64_t tiles, Stream stream) {
  return math::with_linear_activation(work.activation, [&](auto activation) {
    const auto kernel = epilogue_forward_tiles<decltype(activation)::value, T>;
    return launch(kernel, grid_for(kernel, kThreads, tiles), kThreads, stream, work);
  });
}
template <class T>
Status start_backward(const EpilogueBackward& work, int64_t tiles, Stream stream) {
  return math::with_linear_activation(work.activation, [&](auto activation) {
    const auto kernel = epilogue_backward_tiles<decltype(activation)::value, T>;
    return launch(kernel, grid_for(kernel, kThreads, tiles), kThreads, stream, work);
  });
}

}  // namespace

Status epilogue_forward(const EpilogueForward& work, Stream stream) {
  const int64_t tiles = tiles_of(work.rows, kTileRows) * tiles_of(work.columns, kTileColumns);
  return work.y_dtype == Dtype::kF64 ? start_forward<double>(work, tiles, stream)
                                     : start_forward<float>(work, tiles, stream);
}

Status epilogue_backward(const EpilogueBackward& work, Stream stream) {
  const int64_t tiles = tiles_of(work.rows, kTileRows) * tiles_of(work.columns, kTileColumns);
  return work.dtype == Dtype::kF64 ? start_backward<double>(work, tiles, stream)
                                   : start_backward<float>(work, tiles, stream);
}

Status add_rows(const void* sums, bool is_double, int64_t rows, int64_t columns, void* out,
                Dtype dtype, Stream stream) {
  const int64_t tiles = tiles_of(columns, 32);
  const auto start = [&](const auto* typed, const auto kernel) {
    return launch(kernel, grid_for(kernel, kThreads, tiles), kThreads, stream, typed, rows, columns,
                  out, dtype);
  };
  return is_double ? start(static_cast<const double*>(sums), add_rows_of<double>)
                   : start(static_cast<const float*>(sums), add_rows_of<float>);
}

}  // namespace halfstep::cuda
