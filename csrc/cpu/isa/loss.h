#pragma once

// CPU kernels of the cross entropy: csrc/cpu/isa/loss.cpp.

#include <cstdint>

#include "../../math/loss.h"

namespace halfstep::cpu {

using math::CrossEntropy;
using math::Dtype;
using math::RowStats;

struct LossKernels {
  /// The loss of one row, 0 where its label is the ignored one. `label` is a class otherwise.
  double (*loss)(const CrossEntropy& problem, const void* logits, Dtype dtype, int64_t label,
                 RowStats& stats);
  /// Its gradient times `factor`, rounded once, to `out`, which may be `logits` itself.
  void (*gradient)(const CrossEntropy& problem, const void* logits, Dtype dtype, int64_t label,
                   RowStats stats, double factor, void* out);
};

}  // namespace halfstep::cpu
