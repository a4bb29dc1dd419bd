#pragma once

// The table through which the rest of the library reaches the CPU kernels. Each instruction set's
// objects define one such table and nothing else that another object could bind to. No torch here:
// pointers, sizes and plain structs.

#include <cstdint>

#include "../../math/grads.h"
#include "../../math/optim.h"

namespace halfstep::cpu {

using math::Dtype;
using math::MasterKind;
using math::StepTensor;

struct Kernels {
  const char* name;  ///< "default", "avx2", "avx512"

  /// Statistics of one block of at most kBlock elements.
  math::BlockStats (*grad_stats)(const void* grad, Dtype dtype, int64_t count);

  /// Adds `count` elements to `into`.
  void (*grad_histogram)(const void* grad, Dtype dtype, double scale, int64_t count,
                         math::Histogram& into);

  /// outputs[i] = inputs[i] * inv_scale for `count` elements; true when any element is non-finite
  /// before or after. FP64 multiplies in FP64, all else in FP32. May run in place.
  bool (*unscale)(const void* input, Dtype input_dtype, void* output, Dtype output_dtype,
                  double inv_scale, int64_t count);

  /// Elements [begin, end) of one parameter; returns how many were kept from leaving 16-bit range.
  int64_t (*adam)(const StepTensor& tensor, const math::AdamStep& step, int64_t begin, int64_t end);
  int64_t (*sgd)(const StepTensor& tensor, const math::SgdStep& step, int64_t begin, int64_t end);

  /// Writes weight and master from values of the compute type; returns how many elements do not fit
  /// the 16-bit range and were left alone.
  int64_t (*write_masters)(const StepTensor& tensor, const void* values, int64_t begin,
                           int64_t end);
  /// Reads the exact weight into values of the compute type.
  void (*read_masters)(const StepTensor& tensor, void* values, int64_t begin, int64_t end);
  /// Masters that do not round to their weight: counted and, unless `dry_run`, set to the weight.
  int64_t (*refresh_masters)(const StepTensor& tensor, bool dry_run, int64_t begin, int64_t end);
};

extern const Kernels kKernelsDefault;
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;

/// The widest table that this CPU and ATEN_CPU_CAPABILITY allow, chosen once.
const Kernels& kernels();

}  // namespace halfstep::cpu
