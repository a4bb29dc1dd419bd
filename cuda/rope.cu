#include "../csrc/math/rope.h"

#include "floats.h"
#include "reduce.h"

namespace halfstep::cuda {

using math::RopeRows;

namespace {

// Pairs (a, b) of a row turn by an angle each: (a cos - b sin, b cos + a sin); `inverse` by the
// negative angle. A pair is (i, half + i), or (2i, 2i + 1) where interleaved; what lies after the
// pairs is copied.
//   FP16, BF16, FP32 (in FP32), FP64; tables of any of them; out may be x itself.
//   A thread turns 8 pairs or copies 16 elements: 16-byte accesses where a row allows. One read and
//   one write, 4 bytes an FP16 element, and the tables, 8 bytes a pair in FP32, which neighbouring
//   rows share where they are broadcast, so that they come from the cache.
//   No sum runs over elements: the bits are those of the CPU.
// Tests: tests/emulation/rope_test.cpp, tests/gpu/test_softmax_cuda.py.

constexpr int kPairs = 8;

/// Where the pairs of one thread lie.
template <class T, bool kInterleaved>
struct Pairs {
  math::Dtype dtype;
  int64_t half, first;
  int lanes;
  Group<T, kPairs> a, b;

  __device__ void load(const char* x) {
    const auto size = math::dtype_size(dtype);
    if constexpr (kInterleaved) {
      const auto p = read_floats<T, kPairs>(x, dtype, 2 * first, low());
      const auto q = read_floats<T, kPairs>(x, dtype, 2 * first + kPairs, high());
      HALFSTEP_UNROLL
      for (int k = 0; k < kPairs / 2; ++k) {
        a.x[k] = p.x[2 * k];
        b.x[k] = p.x[2 * k + 1];
        a.x[kPairs / 2 + k] = q.x[2 * k];
        b.x[kPairs / 2 + k] = q.x[2 * k + 1];
      }
    } else {
      a = read_floats<T, kPairs>(x, dtype, first, lanes);
      b = read_floats<T, kPairs>(x + half * size, dtype, first, lanes);
    }
  }
  __device__ void store(char* out) const {
    const auto size = math::dtype_size(dtype);
    if constexpr (kInterleaved) {
      Group<T, kPairs> p, q;
      HALFSTEP_UNROLL
      for (int k = 0; k < kPairs / 2; ++k) {
        p.x[2 * k] = a.x[k];
        p.x[2 * k + 1] = b.x[k];
        q.x[2 * k] = a.x[kPairs / 2 + k];
        q.x[2 * k + 1] = b.x[kPairs / 2 + k];
      }
      write_floats<T, kPairs>(out, dtype, 2 * first, low(), p);
      write_floats<T, kPairs>(out, dtype, 2 * first + kPairs, high(), q);
    } else {
      write_floats<T, kPairs>(out, dtype, first, lanes, a);
      write_floats<T, kPairs>(out + half * size, dtype, first, lanes, b);
    }
  }

 private:
  HALFSTEP_FN int low() const { return 2 * lanes < kPairs ? 2 * lanes : kPairs; }
  HALFSTEP_FN int high() const { return 2 * lanes - low(); }
};

HALFSTEP_FN int64_t groups(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) rope_kernel(RopeRows all, math::Divisor a_row) {
  const int64_t turning = groups(all.half, kPairs);
  for (int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x; item < all.rows * a_row.size;
       item += int64_t(gridDim.x) * kThreads) {
    int64_t group = item;
    const int64_t row = math::divide(group, a_row);
    int64_t at[4];
    math::row_offsets(all.layout, row, at);
    const int64_t size = math::dtype_size(all.dtype), table = math::dtype_size(all.table_dtype);
    const char* x = static_cast<const char*>(all.x) + at[0] * size;
    char* out = static_cast<char*>(all.out) + at[1] * size;
    if (group >= turning) {
      const int64_t i = 2 * all.half + (group - turning) * 2 * kPairs;
      const int lanes = all.width - i < 2 * kPairs ? int(all.width - i) : 2 * kPairs;
      write_floats<T, 2 * kPairs>(out + i * size, all.dtype, 0, lanes,
                                  read_floats<T, 2 * kPairs>(x + i * size, all.dtype, 0, lanes));
      continue;
    }
    const int64_t first = group * kPairs;
    const int lanes = all.half - first < kPairs ? int(all.half - first) : kPairs;
    Pairs<T, kInterleaved> pairs = {all.dtype, all.half, first, lanes, {}, {}};
    pairs.load(x);
    const auto cos = read_floats<T, kPairs>(static_cast<const char*>(all.cos) + at[2] * table,
                                            all.table_dtype, first, lanes);
    const auto sin = read_floats<T, kPairs>(static_cast<const char*>(all.sin) + at[3] * table,
                                            all.table_dtype, first, lanes);
    HALFSTEP_UNROLL
    for (int k = 0; k < kPairs; ++k)
      math::rotate(pairs.a.x[k], pairs.b.x[k], cos.x[k], all.inverse ? -sin.x[k] : sin.x[k]);
    pairs.store(out);
  }
}

Status start(void (*kernel)(RopeRows, math::Divisor), const RopeRows& all, Stream stream) {
  const int64_t rest = all.x == all.out ? 0 : all.width - 2 * all.half;
  const math::Divisor a_row(groups(all.half, kPairs) + groups(rest, 2 * kPairs));
  const int64_t blocks = groups(all.rows * a_row.size, kThreads);
  return launch(kernel, grid_for(kernel, kThreads, blocks), kThreads, stream, all, a_row);
}

}  // namespace

Status rope(const RopeRows& all, Stream stream) {
  if (all.dtype == math::Dtype::kF64)
    return start(all.interleaved ? rope_kernel<double, true> : rope_kernel<double, false>, all,
                 stream);
  return start(all.interleaved ? rope_kernel<float, true> : rope_kernel<float, false>, all, stream);
}

}  // namespace halfstep::cuda
