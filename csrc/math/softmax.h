#pragma once

// What the softmax kernels of both devices are told, and the element of each direction.

#include "functions.h"
#include "layout.h"

namespace halfstep::math {

/// The mask of a row: what it says of element i lies `stride` elements after i - 1. `data` null:
/// there is none.
struct SoftmaxMask {
  const void* data = nullptr;
  bool is_bool = false;
  Dtype dtype = Dtype::kF32;  ///< of an additive mask
  int64_t stride = 1;
};

/// A whole tensor: rows of `length` elements that lie side by side, one after another.
struct SoftmaxRows {
  Dtype dtype = Dtype::kF32;
  int64_t rows = 0, length = 0;
  bool causal = false;
  Divisor queries;  ///< causal: rows of one matrix
  double scale = 1;
  const void* x = nullptr;  ///< logits; in the backward the saved result
  void* out = nullptr;
  const void* grad = nullptr;  ///< backward only
  SoftmaxMask mask;            ///< forward only; `data` is that of the first row
  RowLayout<1> mask_rows;
};

}  // namespace halfstep::math

HALFSTEP_MATH_BEGIN

/// How many elements of a row, from the left, take part: in row i of a causal matrix the first
/// i + 1.
HALFSTEP_FN int64_t softmax_count(const SoftmaxRows& all, int64_t row) {
  if (!all.causal) return all.length;
  divide(row, all.queries);
  return row < all.length ? row + 1 : all.length;
}

/// scale * x + mask; where the mask is -inf, x is not looked at.
template <class V>
HALFSTEP_FN V masked_logit(const V& x, const V& scale, const V& mask) {
  const V none = broadcast<V>(-__builtin_inff());
  return select(mask == none, none, fma(x, scale, mask));
}

/// exp(scale * x - top), where scale * x <= top but for its rounding, which may be large. FP32:
/// with what the product and the difference dropped, which is most of a small result's error; below
/// 16 bits it does not show.
template <Dtype kDtype, class V>
HALFSTEP_FN V softmax_exp(const V& x, const V& scale, const V& top) {
  const V zero = broadcast<V>(0);
  if constexpr (kDtype == Dtype::kF64) return exp(fma(x, scale, zero - top));
  if constexpr (dtype_size(kDtype) == 2)
    return exp_negative<true>(at_most(fma(x, scale, zero - top), 0));
  const V product = x * scale, difference = product - top;
  const V back = difference - product;
  const V dropped =
      fma(x, scale, zero - product) + ((product - (difference - back)) - (top + back));
  const V e = exp_negative(difference);
  return fma(e, select(dropped == dropped, dropped, zero), e);
}

/// 1 / total in two parts, so that a product with it is rounded once and no more.
template <class T>
struct Inverse {
  T high, low;
  HALFSTEP_FN explicit Inverse(double total) {
    high = T(1) / T(total);
    low = T((1.0 - total * double(high)) * double(high));
  }
};

/// e / total.
template <class V, class T>
HALFSTEP_FN V softmax_share(const V& e, const Inverse<T>& inverse) {
  return fma(e, broadcast<V>(inverse.high), e * broadcast<V>(inverse.low));
}

/// The mean of dy under y. y was rounded when it was stored, so its sum is not quite 1; divided by
/// that sum, a gradient that is the same everywhere gives none, as it should. A row without any y
/// was masked.
HALFSTEP_FN double softmax_mean(double y_dy, double y) { return y > 0 ? y_dy / y : y_dy; }

/// scale * y * (dy - mean), the mean in two parts.
template <class V, class T>
HALFSTEP_FN V softmax_slope(const V& y, const V& dy, const V& scale, T high, T low) {
  return scale * y * (dy - broadcast<V>(high) - broadcast<V>(low));
}

HALFSTEP_MATH_END
