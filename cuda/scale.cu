#include "../csrc/math/scale.h"

#include "memory.h"

namespace halfstep::cuda {

namespace {

// The loss scale's state machine (csrc/math/scale.h) in one thread: sixteen numbers in, sixteen
// out. Tests: tests/emulation/scale_test.cpp, tests/gpu.

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

__global__ void update_scale_once(float* scale, double* state, Scalar found_inf,
                                  const double* policy) {
  const Numbers rule = fetch(policy);
  Numbers numbers = fetch(state);
  const double flag = found_inf.is_double ? read(static_cast<const double*>(found_inf.data))
                                          : double(read(static_cast<const float*>(found_inf.data)));
  math::update_scale(rule.x, numbers.x, flag != 0);
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

Status update_scale(float* scale, double* state, Scalar found_inf, const double* policy,
                    Stream stream) {
  return launch(update_scale_once, 1, 1, stream, scale, state, found_inf, policy);
}

Status simulate_scale(const float* found_inf, int64_t steps, const double* policy,
                      const double* state, double* scales, Stream stream) {
  return launch(simulate_steps, 1, 1, stream, found_inf, steps, policy, state, scales);
}

Status init_scale_state(const double* policy, double* state, Stream stream) {
  return launch(init_state, 1, 1, stream, policy, state);
}

}  // namespace halfstep::cuda
