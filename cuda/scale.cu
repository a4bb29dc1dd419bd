#include "../csrc/math/scale_statistics.h"

#include "reduce.h"

namespace halfstep::cuda {

namespace {

// The loss scale's state machine (csrc/math/scale.h, scale_statistics.h) in one thread: 32 numbers
// in, 32 out; before it, for policies that look at gradients, one block a table of grad_stats:
// 64 bytes a tensor. Maxima and sums of whole numbers: the order of the rows does not matter.
// Tests: tests/emulation/scale_test.cpp, tests/gpu.

static_assert(int(math::kStateEntries) == int(math::kPolicyEntries));

struct Numbers {
  double x[math::kStateEntries];
};

__device__ Numbers fetch(const double* from) {
  Numbers numbers;
  for (int i = 0; i < math::kStateEntries; ++i) numbers.x[i] = read(from + i);
  return numbers;
}
__device__ void put(double* to, const Numbers& numbers) {
  for (int i = 0; i < math::kStateEntries; ++i) write(to + i, numbers.x[i]);
}

__device__ double number(Scalar scalar) {
  if (!scalar.data) return __builtin_nan("");
  return scalar.is_double ? read(static_cast<const double*>(scalar.data))
                          : double(read(static_cast<const float*>(scalar.data)));
}

__device__ math::GradView fetch_view(const math::GradView* from) {
  math::GradView view;
  view.amax = read(&from->amax);
  view.elements = read(&from->elements);
  view.top = read(&from->top);
  view.top_grown = read(&from->top_grown);
  view.nonzeros = read(&from->nonzeros);
  view.subnormals = read(&from->subnormals);
  view.worst = read(&from->worst);
  return view;
}

__global__ void __launch_bounds__(kThreads)
    view_table(const double* table, int64_t rows, const double* policy, bool first,
               math::GradView* result) {
  HALFSTEP_SHARED(double, scratch, 7 * kWarps);
  const Numbers rule = fetch(policy);
  math::GradView mine;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    double row[math::kStatColumns];
    for (int k = 0; k < math::kStatColumns; ++k) row[k] = read(table + i * math::kStatColumns + k);
    mine.add(math::view_row(rule.x, row));
  }
  math::GradView all;
  all.amax = reduce_block(mine.amax, Largest(), scratch);
  all.elements = reduce_block(mine.elements, Sum(), scratch + kWarps);
  all.top = reduce_block(mine.top, Sum(), scratch + 2 * kWarps);
  all.top_grown = reduce_block(mine.top_grown, Sum(), scratch + 3 * kWarps);
  all.nonzeros = reduce_block(mine.nonzeros, Sum(), scratch + 4 * kWarps);
  all.subnormals = reduce_block(mine.subnormals, Sum(), scratch + 5 * kWarps);
  all.worst = reduce_block(mine.worst, Largest(), scratch + 6 * kWarps);
  if (threadIdx.x != 0) return;
  if (!first) all.add(fetch_view(result));
  write(&result->amax, all.amax);
  write(&result->elements, all.elements);
  write(&result->top, all.top);
  write(&result->top_grown, all.top_grown);
  write(&result->nonzeros, all.nonzeros);
  write(&result->subnormals, all.subnormals);
  write(&result->worst, all.worst);
}

__global__ void update_scale_once(float* scale, double* state, Scalar found_inf,
                                  const double* policy, const math::GradView* view,
                                  Scalar proposal) {
  const Numbers rule = fetch(policy);
  Numbers numbers = fetch(state);
  math::update_scale(rule.x, numbers.x, number(found_inf) != 0,
                     view ? fetch_view(view) : math::GradView(), number(proposal));
  put(state, numbers);
  write(scale, float(numbers.x[math::kStateScale]));
}

__global__ void simulate_steps(const float* found_inf, int64_t steps, const double* policy,
                               const double* state, double* scales) {
  const Numbers rule = fetch(policy);
  Numbers numbers = fetch(state);
  for (int64_t i = 0; i < steps; ++i) {
    math::update_scale(rule.x, numbers.x, read(found_inf + i) != 0);
    write(scales + i, numbers.x[math::kStateScale]);
  }
}

__global__ void init_state(const double* policy, double* state) {
  const Numbers rule = fetch(policy);
  Numbers numbers;
  math::init_scale_state(rule.x, numbers.x);
  put(state, numbers);
}

}  // namespace

Status view_stats(const double* table, int64_t rows, const double* policy, bool first,
                  math::GradView* view, Stream stream) {
  return launch(view_table, 1, kThreads, stream, table, rows, policy, first, view);
}

Status update_scale(float* scale, double* state, Scalar found_inf, const double* policy,
                    const math::GradView* view, Scalar proposal, Stream stream) {
  return launch(update_scale_once, 1, 1, stream, scale, state, found_inf, policy, view, proposal);
}

Status simulate_scale(const float* found_inf, int64_t steps, const double* policy,
                      const double* state, double* scales, Stream stream) {
  return launch(simulate_steps, 1, 1, stream, found_inf, steps, policy, state, scales);
}

Status init_scale_state(const double* policy, double* state, Stream stream) {
  return launch(init_state, 1, 1, stream, policy, state);
}

}  // namespace halfstep::cuda
