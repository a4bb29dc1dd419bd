#pragma once

// LayerNorm and RMSNorm, one row of n elements at a time, for one element or sixteen:
//
//   d_i  = x_i - mean                     exact where x_i is near the mean, whatever the mean is
//   z_i  = (d_i - rest) rstd              rest: mean of d, what the rounding of `mean` dropped
//   y_i  = z_i w_i + b_i
//   g_i  = dy_i w_i
//   dx_i = rstd (g_i - average(g) - z_i average(g z)) + the gradient of the residual output
//   dw  += dy_i z_i,  db += dy_i
//
// RMSNorm is the same with mean = rest = average(g) = 0. Sums are taken of d, not of x: a row of
// mean 1e3 and deviation 1e-2 keeps all digits that its elements have (Chan, Golub and LeVeque, The
// American Statistician 37, 1983: corrected two-pass).

#include "vec.h"

namespace halfstep::math {

/// Rows whose share of a weight's gradient is summed in the compute type before it enters FP64.
constexpr int64_t kNormRows = 64;

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// What a row is normalised with.
template <class T>
struct NormRow {
  T mean, rest, rstd;
};

/// From sum(d) and sum(d^2) of a row. NaN stays NaN.
template <class T>
HALFSTEP_FN NormRow<T> norm_row(T mean, double sum, double squares, int64_t n, double eps,
                                bool centred) {
  const double share = 1 / double(n), rest = centred ? sum * share : 0;
  double variance = squares * share - rest * rest;
  if (variance < 0) variance = 0;
  return {mean, T(rest), T(1 / sqrt(variance + eps))};
}

template <class V, class T>
HALFSTEP_FN V normalise(V x, const NormRow<T>& row) {
  const T shift = row.rest == 0 ? -T(0) : -(row.rest * row.rstd);  // rstd may be infinite
  return fma(x - broadcast<V>(row.mean), broadcast<V>(row.rstd), broadcast<V>(shift));
}

/// What the gradient of a row is formed with.
template <class T>
struct NormSlope {
  T rest, rstd, average, product;
};

/// d rstd: z before `rest`, known before any sum of the backward is.
template <class V, class T>
HALFSTEP_FN V norm_near_z(V x, T mean, T rstd) {
  return (x - broadcast<V>(mean)) * broadcast<V>(rstd);
}

/// From sum(d rstd), sum(g) and sum(g d rstd).
template <class T>
HALFSTEP_FN NormSlope<T> norm_slope(T rstd, double sum, double g, double gz, int64_t n,
                                    bool centred) {
  const double share = 1 / double(n), rest = centred ? sum * share : 0;
  return {T(rest), rstd, T(centred ? g * share : 0), T((gz - rest * g) * share)};
}

/// z from d rstd, and dx from g and z.
template <class V, class T>
HALFSTEP_FN V norm_z(V near, const NormSlope<T>& slope) {
  return near - broadcast<V>(slope.rest);
}
template <class V, class T>
HALFSTEP_FN V norm_gradient(V g, V z, V residual, const NormSlope<T>& slope) {
  const V inner = fma(broadcast<V>(-slope.product), z, g - broadcast<V>(slope.average));
  return fma(broadcast<V>(slope.rstd), inner, residual);
}

HALFSTEP_MATH_END
