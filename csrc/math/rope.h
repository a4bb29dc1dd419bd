#pragma once

// The rotation of one pair: (a cos - b sin, b cos + a sin), each sum rounded about once however
// much of it cancels.

#include "layout.h"
#include "vec.h"

namespace halfstep::math {

/// Rows of x (0), out (1), cos (2) and sin (3); elements of a row lie side by side.
struct RopeRows {
  Dtype dtype = Dtype::kF32, table_dtype = Dtype::kF32;
  bool interleaved = false, inverse = false;
  int64_t rows = 0;
  int64_t half = 0;   ///< pairs that turn: columns of the tables
  int64_t width = 0;  ///< elements of a row of x; those after 2 half are copied
  const void* x = nullptr;
  void* out = nullptr;  ///< may be x
  const void* cos = nullptr;
  const void* sin = nullptr;
  RowLayout<4> layout;
};

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// p q + r s. The rounding error of r s is added back (Kahan); it is NaN where r s is infinite.
template <class V>
HALFSTEP_FN V sum_of_products(const V& p, const V& q, const V& r, const V& s) {
  const V product = r * s;
  const V error = fma(r, s, broadcast<V>(0) - product);
  return fma(p, q, product) + select(error == error, error, broadcast<V>(0));
}

template <class V>
HALFSTEP_FN void rotate(V& a, V& b, const V& cos, const V& sin) {
  const V x = a;
  a = sum_of_products(x, cos, broadcast<V>(0) - b, sin);
  b = sum_of_products(b, cos, x, sin);
}

HALFSTEP_MATH_END
