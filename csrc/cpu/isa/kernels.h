#pragma once

// The table through which the rest of the library reaches the CPU kernels. Each instruction set's
// objects define one such table and nothing else that another object could bind to. No torch here:
// pointers, sizes and plain structs.

#include <cstdint>

#include "../../math/grads.h"
#include "../../math/optim.h"
#include "extreme.h"
#include "loss.h"
#include "norm.h"

namespace halfstep::cpu {

using math::Dtype;
using math::MasterKind;
using math::StepTensor;

/// Elements [begin, end) of one parameter, begin a multiple of kStateBlock and no multiple of 2^32
/// between them; returns how many were kept from leaving the 16-bit range.
template <class Constants>
using StepKernel = int64_t (*)(const StepTensor& tensor, const Constants& constants, int64_t begin,
                               int64_t end);

/// Sums of the squares of the two values of a rule's norms().
struct Norms {
  double a2 = 0, b2 = 0;
};
template <class Constants>
using NormsKernel = Norms (*)(const StepTensor& tensor, const Constants& constants, int64_t begin,
                              int64_t end);

struct ActivationKernels;  // activation.h
struct GroupNormKernels;   // group_norm.h
struct LinearKernels;
struct MatrixVectorKernels;  // mv.h
struct RopeKernels;
struct SoftmaxKernels;
struct TileKernels;  // tiles/tiles.h

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

  StepKernel<math::AdamConstants> adam;
  StepKernel<math::SgdConstants> sgd;
  StepKernel<math::LionConstants> lion;
  StepKernel<math::AdagradConstants> adagrad;
  StepKernel<math::LambConstants> lamb;
  StepKernel<math::NovoGradConstants> novograd;
  NormsKernel<math::LambConstants> lamb_norms;
  NormsKernel<math::NovoGradConstants> novograd_norms;

  /// Writes weight and master from values of the compute type; returns how many elements do not fit
  /// the 16-bit range and were left alone.
  int64_t (*write_masters)(const StepTensor& tensor, const void* values, int64_t begin,
                           int64_t end);
  /// Reads the exact weight into values of the compute type.
  void (*read_masters)(const StepTensor& tensor, void* values, int64_t begin, int64_t end);
  /// Masters that do not round to their weight: counted and, unless `dry_run`, set to the weight.
  int64_t (*refresh_masters)(const StepTensor& tensor, bool dry_run, int64_t begin, int64_t end);

  /// FP32 values of tensor.state[0], which is BF16 or int8, and back.
  void (*read_state)(const StepTensor& tensor, bool is_signed, void* values, int64_t begin,
                     int64_t end);
  void (*write_state)(const StepTensor& tensor, bool is_signed, const void* values, uint32_t key,
                      int64_t begin, int64_t end);

  const NormKernels* norm;
  const ActivationKernels* activation;
  const SoftmaxKernels* softmax;  ///< softmax.h
  const RopeKernels* rope;        ///< rope.h
  const LossKernels* loss;
  const LinearKernels* linear;         ///< linear.h
  const GroupNormKernels* group_norm;  ///< group_norm.h
  const MatrixVectorKernels* mv;       ///< mv.h
  ExtremeKernel extreme;
  const TileKernels* vector_tiles;  ///< vector_tiles.h; null in the default table
};

extern const Kernels kKernelsDefault;
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;

/// The widest table that this CPU and ATEN_CPU_CAPABILITY allow, chosen once.
const Kernels& kernels();

}  // namespace halfstep::cpu
