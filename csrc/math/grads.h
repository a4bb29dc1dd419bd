#pragma once

// Gradient statistics and the numbers that one step derives from them.

#include "platform.h"

namespace halfstep::math {

/// Columns of the float64 [n + 1, 8] result of grad_stats; the last row holds the totals.
enum StatColumn : int {
  kStatNonfinite = 0,  ///< elements that are inf or NaN
  kStatSumSquares =
      1,           ///< sum of x^2 as stored (still scaled); non-finite with a non-finite element
  kStatAmax = 2,   ///< max |x|; NaN counts as larger than inf
  kStatZeros = 3,  ///< elements equal to 0 (either sign)
  kStatSubnormals = 4,  ///< elements with 0 < |x| < 2^-14, FP16's subnormal range, in any dtype
  kStatCount = 5,       ///< elements
  kStatFirstBad = 6,    ///< totals: index of the first tensor with a non-finite element, or -1
  kStatFoundInf = 7,    ///< 1 when any element is non-finite, else 0
  kStatColumns = 8,
};

/// Columns of the float64 [n, 62] result of grad_histogram: a histogram of |x| / scale by powers of
/// two. All but the amax are counts.
enum HistogramColumn : int {
  kHistCount = 0,      ///< elements
  kHistZeros = 1,      ///< equal to 0 (either sign)
  kHistNonfinite = 2,  ///< inf or NaN
  kHistAmax = 3,       ///< largest |x| / scale of the finite elements
  kHistUnder = 4,      ///< not 0, and below 2^-40
  kHistFirst = 5,      ///< kHistFirst + k: in [2^(k-40), 2^(k-39)), k = 0 ... 55
  kHistOver = 61,      ///< finite, and 2^16 or above
  kHistColumns = 62,
};
constexpr int kHistLowest = -40;  ///< exponent of kHistFirst

/// What grad_histogram gathers over a run of elements; counts by column, the amax as stored.
struct Histogram {
  int64_t counts[kHistColumns] = {};
  double amax = 0;
};

/// Entries of the float64 [4] result of step_control.
enum ControlEntry : int {
  kControlFoundInf = 0,    ///< not 0: the step is skipped
  kControlMultiplier = 1,  ///< factor on every gradient: clip / scale
  kControlNorm = 2,        ///< unscaled global norm before clipping, NaN when found_inf
  kControlClip = 3,        ///< clip factor
  kControlEntries = 4,
};

/// What is gathered over a run of elements.
struct BlockStats {
  double sum_squares = 0;
  double amax = 0;
  int64_t nonfinite = 0;
  int64_t zeros = 0;
  int64_t subnormals = 0;

  /// NaN wins, as in IEEE 754-2019 maximum.
  HALFSTEP_FN static double larger(double a, double b) {
    if (a != a) return a;
    if (b != b) return b;
    return a > b ? a : b;
  }
  HALFSTEP_FN void add(const BlockStats& other) {
    sum_squares += other.sum_squares;
    amax = larger(amax, other.amax);
    nonfinite += other.nonfinite;
    zeros += other.zeros;
    subnormals += other.subnormals;
  }
};

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// One row of grad_stats.
HALFSTEP_FN void write_stats_row(double* row, const BlockStats& s, int64_t numel,
                                 double first_bad) {
  row[kStatNonfinite] = double(s.nonfinite);
  row[kStatSumSquares] = s.sum_squares;
  row[kStatAmax] = s.amax;
  row[kStatZeros] = double(s.zeros);
  row[kStatSubnormals] = double(s.subnormals);
  row[kStatCount] = double(numel);
  row[kStatFirstBad] = first_bad;
  row[kStatFoundInf] = s.nonfinite > 0 ? 1.0 : 0.0;
}

/// A row of grad_stats as it was before it was written.
HALFSTEP_FN BlockStats read_stats_row(const double* row) {
  BlockStats s;
  s.sum_squares = row[kStatSumSquares];
  s.amax = row[kStatAmax];
  s.nonfinite = int64_t(row[kStatNonfinite]);
  s.zeros = int64_t(row[kStatZeros]);
  s.subnormals = int64_t(row[kStatSubnormals]);
  return s;
}

/// |x| / scale, rounded once; dividing is slow, and by a power of two a product is the same.
struct Unscale {
  double scale, inverse;
  bool power_of_two;

  HALFSTEP_FN explicit Unscale(double scale_)
      : scale(scale_),
        inverse(1 / scale_),
        power_of_two((bit_cast<int64_t>(scale_) & 0xfffffffffffffll) == 0) {}
};

/// Column of an element of grad_histogram from its magnitude before and after the division.
HALFSTEP_FN int histogram_column(double magnitude, double unscaled) {
  if (magnitude == 0) return kHistZeros;
  if (!(magnitude <= 0x1.fffffffffffffp1023)) return kHistNonfinite;
  const int exponent = int(bit_cast<int64_t>(unscaled) >> 52) - 1023;
  if (exponent < kHistLowest) return kHistUnder;
  const int column = kHistFirst + exponent - kHistLowest;
  return column < kHistOver ? column : int(kHistOver);
}

/// clip = min(1, max_norm / (norm + 1e-6)) as torch.nn.utils.clip_grad_norm_; max_norm < 0: none.
/// `scale` may be any positive finite number; `extra_clip` is a factor the caller computed.
HALFSTEP_FN void write_control(double* control, double sum_squares, bool found_inf, double scale,
                               double max_norm, double extra_clip) {
  const double norm = __builtin_sqrt(sum_squares) / scale;
  double clip = extra_clip;
  if (max_norm >= 0) {
    const double factor = max_norm / (norm + 1e-6);
    clip *= factor < 1.0 ? factor : 1.0;
  }
  control[kControlFoundInf] = found_inf ? 1.0 : 0.0;
  control[kControlMultiplier] = clip / scale;
  control[kControlNorm] = found_inf ? __builtin_nan("") : norm;
  control[kControlClip] = clip;
}

HALFSTEP_MATH_END
