#pragma once

#include "../../math/softmax.h"

namespace halfstep::cpu {

/// One row of `length` elements that lie side by side. Only the first `count` take part.
struct SoftmaxRow {
  math::Dtype dtype;
  int64_t length, count;
  double scale;
  const void* x;  ///< logits; in the backward the saved result
  void* out;
  math::SoftmaxMask mask;      ///< forward only
  const void* grad = nullptr;  ///< backward only
  void* scratch = nullptr;     ///< forward only: softmax_scratch(length) bytes
};

/// Room for a row in the compute type, whole packs.
constexpr int64_t softmax_scratch(int64_t length) { return (length + math::kLanes) * 8; }

struct SoftmaxKernels {
  void (*forward)(const SoftmaxRow& row);
  void (*backward)(const SoftmaxRow& row);
};

inline namespace HALFSTEP_ISA {
extern const SoftmaxKernels kSoftmax;
}

}  // namespace halfstep::cpu
