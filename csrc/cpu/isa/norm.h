#pragma once

// CPU kernels of LayerNorm and RMSNorm (csrc/math/norm.h). T below is the compute type: double
// where x is FP64, else float. Rows are contiguous.

#include <cstdint>

#include "../../math/platform.h"

namespace halfstep::cpu {

using math::Dtype;

struct NormForward {
  const void* x = nullptr;         ///< [rows, n]
  const void* residual = nullptr;  ///< or null: then x is what is normalised
  const void* weight = nullptr;    ///< T, padded: see `parameters`
  const void* bias = nullptr;      ///< T, padded
  void* y = nullptr;               ///< x's dtype
  void* residual_out = nullptr;    ///< x + residual in the residual's dtype
  void* mean = nullptr;            ///< T [rows]; null for RMSNorm
  void* rstd = nullptr;            ///< T [rows]
  Dtype x_dtype = Dtype::kF32, residual_dtype = Dtype::kF32;
  int64_t n = 0;
  double eps = 0;
};

struct NormBackward {
  const void* grad_y = nullptr;         ///< [rows, n]
  const void* grad_residual = nullptr;  ///< gradient of residual_out, input's dtype, or null
  const void* input = nullptr;          ///< what was normalised
  const void* weight = nullptr;         ///< T, padded
  const void* mean = nullptr;           ///< T [rows]; null for RMSNorm
  const void* rstd = nullptr;           ///< T [rows]
  void* grad_x = nullptr;               ///< grad_y's dtype, or null
  void* grad_input = nullptr;           ///< the same in input's dtype, or null
  Dtype grad_dtype = Dtype::kF32, input_dtype = Dtype::kF32;
  int64_t n = 0;
};

struct NormKernels {
  /// Elements of T in memory for rows of n: whole packs.
  int64_t (*padded)(int64_t n);
  /// `count` values of T in `to`, from + offset, zeros up to whole packs; without `from` the value
  /// `otherwise` in each.
  void (*parameters)(const void* from, Dtype dtype, double offset, double otherwise, int64_t count,
                     bool wide, void* to);
  /// Rows [begin, end).
  void (*forward)(const NormForward& work, int64_t begin, int64_t end);
  /// Rows [begin, end). sums: null, or for weight and bias, one after the other, padded(n) doubles
  /// that are overwritten and padded(n) values of T as scratch: the sums of these rows, kNormRows
  /// of them at a time in T.
  void (*backward)(const NormBackward& work, int64_t begin, int64_t end, double* sums,
                   void* scratch);
  /// to[i] = the sum over `blocks` rows of `sums` (`stride` apart), in order, for i in [begin,
  /// end).
  void (*add_blocks)(const double* sums, int64_t blocks, int64_t stride, int64_t begin, int64_t end,
                     Dtype dtype, void* to);
};

}  // namespace halfstep::cpu
