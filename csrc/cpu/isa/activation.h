#pragma once

// The CPU kernels of the family `activation`: runs of n elements that lie one after another. No
// torch here.

#include <cstdint>

#include "../../math/activation.h"

namespace halfstep::cpu {

struct ActivationKernels {
  /// y = f(x)
  void (*forward)(math::Activation activation, math::Dtype dtype, const void* x, void* y,
                  int64_t n);
  /// dx = grad f'(x)
  void (*backward)(math::Activation activation, math::Dtype dtype, const void* grad, const void* x,
                   void* dx, int64_t n);
  /// y = f(gate) up. With `counts`: how many y left the dtype although gate and up are finite.
  int64_t (*gated)(math::Activation activation, math::Dtype dtype, bool counts, const void* gate,
                   const void* up, void* y, int64_t n);
  /// dgate = grad up f'(gate), dup = grad f(gate)
  void (*gated_backward)(math::Activation activation, math::Dtype dtype, const void* grad,
                         const void* gate, const void* up, void* dgate, void* dup, int64_t n);

  /// kept[k] = 1 where dropout keeps element begin + k, else 0; count floats, rounded up to whole
  /// groups of 64; begin is a multiple of 64.
  void (*kept)(uint64_t key, uint64_t offset, uint32_t threshold, int64_t begin, int64_t count,
               float* kept);
  /// y = residual + (x + bias) kept scale; bias and kept may be null (0, and 1).
  void (*dropout_add)(math::Dtype dtype, const void* x, const void* bias, const void* residual,
                      const float* kept, double scale, void* y, int64_t n);
  /// dx = grad kept scale, added to sums (float, double for FP64) before it is rounded; kept and
  /// sums may be null.
  void (*dropout_backward)(math::Dtype dtype, const void* grad, const float* kept, double scale,
                           void* dx, void* sums, int64_t n);
};

}  // namespace halfstep::cpu
