#pragma once

// Cross entropy of one row, x the logits, y the label, w the class weights (1 without), e the label
// smoothing, z the factor of the z-loss, V classes:
//
//   m = max x,  rest = sum over c != y of exp(x_c - m),  s = rest + exp(x_y - m),
//   lse = m + log s,  W = sum of w,  p_c = exp(x_c - m) / s
//   loss     = (1 - e) w_y (lse - x_y) + e/V sum_c w_c (lse - x_c) + z lse^2
//   d/dx_c   = p_c ((1 - e) w_y + e/V W + 2 z lse) - e/V w_c - (c = y) (1 - e) w_y
//
// The first two terms are torch's, with its smoothing (Szegedy et al., arXiv 1512.00567); the third
// is PaLM's (arXiv 2204.02311). The label's own exponential stays out of `rest`: a confident row,
// where p_y is 1 to FP32's last place, then keeps the relative precision of its loss,
// log(1 + rest), and of 1 - p_y = rest / s. What a row needs once is computed in FP64.
// Tests: tests/cpp/loss_test.cpp, tests/python/test_loss.py.

#include "vec.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace halfstep::math {

/// What all rows of a call share.
struct CrossEntropy {
  int64_t classes = 0;
  int64_t ignored = -100;            ///< rows with this label have neither loss nor gradient
  const void* weights = nullptr;     ///< of the classes, FP32 (FP64 for FP64 logits), or null: 1
  double weight_sum = 0;             ///< W
  double smoothing = 0, z_loss = 0;  ///< e, z
};

/// What the gradient of a row needs beside the logits.
struct RowStats {
  double max = 0, rest = 0;
};

/// The gradient of a row: exp(x_c - max) * slope - w_c * shift, and `label` at its label.
struct RowGradient {
  double max = 0, slope = 0, shift = 0, label = 0;
};

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// log s; rest is below 1 where the label's logit is the largest.
HALFSTEP_FN double log_sum(double rest, double label_term) {
  return label_term == 1 ? ::log1p(rest) : ::log(rest + label_term);
}

/// `label_logit` = x_y, `label_term` = exp(x_y - m), `label_weight` = w_y, `spread` = sum of
/// w_c (m - x_c), looked at with smoothing only.
HALFSTEP_FN double row_loss(const CrossEntropy& c, RowStats stats, double label_logit,
                            double label_term, double label_weight, double spread) {
  const double log_s = log_sum(stats.rest, label_term);
  double loss = (1 - c.smoothing) * label_weight * ((stats.max - label_logit) + log_s);
  if (c.smoothing != 0) loss += c.smoothing / double(c.classes) * (c.weight_sum * log_s + spread);
  if (c.z_loss != 0) {
    const double lse = stats.max + log_s;
    loss += c.z_loss * lse * lse;
  }
  return loss;
}

/// All of it times `factor`, the gradient that arrives.
HALFSTEP_FN RowGradient row_gradient(const CrossEntropy& c, RowStats stats, double label_term,
                                     double label_weight, double factor) {
  const double s = stats.rest + label_term;
  const double direct = (1 - c.smoothing) * label_weight;
  const double smooth = c.smoothing / double(c.classes);
  double others = smooth * c.weight_sum;
  if (c.z_loss != 0) others += 2 * c.z_loss * (stats.max + log_sum(stats.rest, label_term));
  const double label =
      others * (label_term / s) - smooth * label_weight - direct * (stats.rest / s);
  return {stats.max, factor * ((direct + others) / s), factor * smooth, factor * label};
}

HALFSTEP_MATH_END
