#pragma once

// Reductions over a block of threads, in one fixed tree: lanes by halves, then warps in order.

#include "memory.h"

namespace halfstep::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Sum {
  template <class T>
  HALFSTEP_FN T operator()(T a, T b) const {
    return a + b;
  }
};
/// NaN wins.
struct Largest {
  HALFSTEP_FN double operator()(double a, double b) const { return math::BlockStats::larger(a, b); }
};

/// The result is valid in thread 0. Every thread of a block of kThreads takes part; `shared` holds
/// kWarps elements and may be used again after the next barrier.
template <class T, class Op>
__device__ T reduce_block(T value, const Op& op, T* shared) {
  for (int distance = 16; distance > 0; distance /= 2)
    value = op(value, __shfl_down_sync(0xffffffffu, value, distance));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp) value = op(value, shared[warp]);
  return value;
}

/// Statistics of all threads, valid in thread 0.
__device__ inline math::BlockStats reduce_stats(const math::BlockStats& mine) {
  HALFSTEP_SHARED(double, sums, kWarps);
  HALFSTEP_SHARED(double, largest, kWarps);
  HALFSTEP_SHARED(long long, counts, 3 * kWarps);
  math::BlockStats all;
  __syncthreads();  // nobody still reads the results before
  all.sum_squares = reduce_block(mine.sum_squares, Sum(), sums);
  all.amax = reduce_block(mine.amax, Largest(), largest);
  all.nonfinite = reduce_block((long long)(mine.nonfinite), Sum(), counts);
  all.zeros = reduce_block((long long)(mine.zeros), Sum(), counts + kWarps);
  all.subnormals = reduce_block((long long)(mine.subnormals), Sum(), counts + 2 * kWarps);
  return all;
}

}  // namespace halfstep::cuda
