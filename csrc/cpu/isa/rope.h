#pragma once

#include "../../math/rope.h"

namespace halfstep::cpu {

struct RopeKernels {
  /// Rows [begin, end) of `all`.
  void (*rotate)(const math::RopeRows& all, int64_t begin, int64_t end);
};

inline namespace HALFSTEP_ISA {
extern const RopeKernels kRope;
}

}  // namespace halfstep::cpu
