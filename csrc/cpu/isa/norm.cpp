// LayerNorm and RMSNorm, forward and backward. Formulas: csrc/math/norm.h.
//   x, y, dy, dx: FP16, BF16, FP32; residual, its output and their gradients: any of the three of
//   their own; weight and bias: made T before. FP64: all of them FP64, computed in FP64. Nothing
//   aliases.
//   A thread takes whole rows, twice: for the sums of a row, and for what is formed with them; the
//   second time from its cache. The sums for weight and bias stay in cache over a block of rows.
//   A short row is read before its predecessor is finished: the sums that end the reading are a
//   chain of additions, which the processor then has other work beside.
//   While a row is read the next one is asked for: reading stops and begins again with every row,
//   which the processor's own prefetching does not follow.
//   Bytes an FP16 element: forward 4, with residual 8; backward 6, with the residual's gradient 8.
//   Determinism: sums of a row are LaneSums; sums over rows go in FP32 for 64 rows, then in FP64,
//   block after block. Nothing depends on the instruction set or the number of threads. Each output
//   is rounded once; y is formed of the residual output as it was rounded.
//   Squares beyond FP32 (rows of |x| > 1e18) are summed again in FP64.
// Tests: tests/python/test_norm.py, tests/cpp/norm_test.cpp, tests/python/test_isa.py.

#include "norm.h"

#include "../../math/norm.h"
#include "pairs.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

template <class V>
using Scalar = typename Traits<V>::Scalar;

/// FP16 elements of a row of which two, with all that belongs to them, fit in the first cache.
constexpr int64_t kShortRow = 1024;

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

/// body(Elements<…>()) for a dtype that is computed in V.
template <class V, class Body>
HALFSTEP_FN void with_dtype(Dtype dtype, const Body& body) {
  if constexpr (sizeof(Scalar<V>) == 8) {
    body(Elements<Dtype::kF64>());
  } else {
    switch (dtype) {
      case Dtype::kF16:
        return body(Elements<Dtype::kF16>());
      case Dtype::kBF16:
        return body(Elements<Dtype::kBF16>());
      default:
        return body(Elements<Dtype::kF32>());
    }
  }
}

template <class V>
void fill_parameters(const void* from, Dtype dtype, double offset, double otherwise, int64_t count,
                     Scalar<V>* to) {
  using T = Scalar<V>;
  int64_t i = 0;
  for (; from && i + kLanes <= count; i += kLanes)
    store_lanes(to + i, load_any<V>(from, dtype, i) + broadcast<V>(T(offset)));
  for (; i < count; ++i) to[i] = from ? load_scalar<T>(from, dtype, i) + T(offset) : T(otherwise);
  for (; i < padded(count); ++i) to[i] = 0;
}

void parameters(const void* from, Dtype dtype, double offset, double otherwise, int64_t count,
                bool wide, void* to) {
  if (wide)
    fill_parameters<F64>(from, dtype, offset, otherwise, count, static_cast<double*>(to));
  else
    fill_parameters<F32>(from, dtype, offset, otherwise, count, static_cast<float*>(to));
}

const char* start_of(const void* data, int64_t bytes) {
  return data ? static_cast<const char*>(data) + bytes : nullptr;
}
char* start_of(void* data, int64_t bytes) {
  return data ? static_cast<char*>(data) + bytes : nullptr;
}

struct RowSums {
  double sum, squares;
};

/// Sums of d = x - mean and of its squares over a row, in A (FP32 or FP64) lanes.
template <class A, class V, class Load>
RowSums sum_row(const Load& load, int64_t n, Scalar<V> mean) {
  PairSum<A> sum, squares;
  for_each_pair(
      n,
      [&](int64_t i, auto lanes, auto which) __attribute__((always_inline)) {
        A d;
        if constexpr (sizeof(A) == sizeof(V))
          d = load(i, lanes) - broadcast<A>(mean);
        else
          d = to_double(load(i, lanes)) - broadcast<A>(mean);
        d = within(d, lanes, 0);
        sum[which].add(d);
        squares[which].add_product(d, d);
      },
      sum, squares);
  return {sum.total(), squares.total()};
}

/// The moments of a row. first(i, lanes), called for each pack in order, and again(i, lanes) after
/// it give its elements. The sums are taken around the average of the first pack; once more where
/// that was far off.
template <class V, class First, class Again>
HALFSTEP_FN NormRow<Scalar<V>> read_row(int64_t n, double eps, bool centred, const First& first,
                                        const Again& again) {
  using T = Scalar<V>;
  T mean = 0;
  if (centred) {
    // Any place near the row will do; that of a constant row is the constant.
    if (n >= kLanes) {
      mean = sum_lanes(first(0, Whole()) * broadcast<V>(T(1) / kLanes));
    } else {
      T lanes[kLanes];
      store_lanes(lanes, first(0, Part{int(n)}));
      double total = 0;
      for (const T lane : lanes) total += double(lane);
      mean = T(total / double(n));
    }
  }
  PairSum<V> sum, squares;
  for_each_pair(
      n,
      [&](int64_t i, auto lanes, auto which) __attribute__((always_inline)) {
        const V d = within(first(i, lanes) - broadcast<V>(mean), lanes, 0);
        sum[which].add(d);
        squares[which].add_product(d, d);
      },
      sum, squares);
  RowSums sums = {sum.total(), squares.total()};
  const double share = 1 / double(n), rest = sums.sum * share;
  if (centred && 2 * rest * rest > sums.squares * share) {
    mean = T(double(mean) + rest);
    sums = sum_row<V, V>(again, n, mean);
  }
  if constexpr (sizeof(T) == 4) {
    if (!(sums.squares - sums.squares == 0)) {
      if (centred) mean = T(sum_row<F64, V>(again, n, 0).sum / double(n));
      sums = sum_row<F64, V>(again, n, mean);
    }
  }
  return norm_row(mean, sums.sum, sums.squares, n, eps, centred);
}

/// read(row, which) and finish(row, which) for the rows [begin, end) in order, of which two are on
/// their way at a time where they are short.
template <class Read, class Finish>
HALFSTEP_FN void for_each_row(int64_t begin, int64_t end, int64_t n, const Read& read,
                              const Finish& finish) {
  const int64_t ahead = n <= kShortRow ? 1 : 0;
  int64_t next = begin;
  for (int64_t row = begin; row < end; ++row) {
    for (; next < end && next <= row + ahead; ++next) read(next, next & 1);
    finish(row, row & 1);
  }
}

/// Of x in X, or of x + residual as it is rounded and stored in R.
template <class V, class X, class R>
void forward_rows(const NormForward& work, int64_t begin, int64_t end) {
  using T = Scalar<V>;
  const int64_t n = work.n;
  const bool centred = work.mean;
  const auto* weight = static_cast<const T*>(work.weight);
  const auto* bias = static_cast<const T*>(work.bias);
  const auto row_of = [&](auto* data, int64_t row, int64_t size) {
    return start_of(data, row * n * size);
  };
  // What y is formed of.
  const auto again = [&](int64_t row) __attribute__((always_inline)) {
    if constexpr (std::is_void_v<R>) {
      return [x = row_of(work.x, row, X::size)](int64_t i, auto lanes)
          __attribute__((always_inline)) {
        return X::load(x, i, lanes);
      };
    } else {
      return [out = row_of(work.residual_out, row, R::size)](int64_t i, auto lanes)
          __attribute__((always_inline)) {
        return R::load(out, i, lanes);
      };
    }
  };
  NormRow<T> moments[2];
  const auto read = [&](int64_t row, int64_t which) __attribute__((always_inline)) {
    const char *x = row_of(work.x, row, X::size), *y = row_of(work.y, row, X::size);
    const auto first = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      fetch(x, (n + i) * X::size);
      fetch_to_write(y + i * X::size);
      const V value = X::load(x, i, lanes);
      if constexpr (std::is_void_v<R>) {
        return value;
      } else {
        const char* residual = row_of(work.residual, row, R::size);
        char* out = row_of(work.residual_out, row, R::size);
        fetch(residual, (n + i) * R::size);
        R::store(out, i, value + R::load(residual, i, lanes), lanes);
        return R::load(out, i, lanes);
      }
    };
    moments[which] = read_row<V>(n, work.eps, centred, first, again(row));
  };
  const auto finish = [&](int64_t row, int64_t which) __attribute__((always_inline)) {
    const NormRow<T> r = moments[which];
    if (centred) static_cast<T*>(work.mean)[row] = T(double(r.mean) + double(r.rest));
    static_cast<T*>(work.rstd)[row] = r.rstd;
    char* y = row_of(work.y, row, X::size);
    const auto x = again(row);
    for_each_pack(
        n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          const V z = normalise(x(i, lanes), r);
          X::store(y, i, fma(z, load_lanes(weight + i), load_lanes(bias + i)), lanes);
        });
  };
  for_each_row(begin, end, n, read, finish);
}

template <class V>
void forward_in(const NormForward& work, int64_t begin, int64_t end) {
  with_dtype<V>(work.x_dtype, [&](auto elements) {
    using X = decltype(elements);
    if (!work.residual) return forward_rows<V, X, void>(work, begin, end);
    with_dtype<V>(work.residual_dtype,
                  [&](auto other) { forward_rows<V, X, decltype(other)>(work, begin, end); });
  });
}

void forward(const NormForward& work, int64_t begin, int64_t end) {
  work.x_dtype == Dtype::kF64 ? forward_in<F64>(work, begin, end)
                              : forward_in<F32>(work, begin, end);
}

/// Moves `count` sums of T into doubles.
template <class V>
void flush(Scalar<V>* from, double* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += double(from[i]);
    from[i] = 0;
  }
}

/// grad_y and its gradient in G, the input, the gradient of the residual output and that of the
/// residual in X.
template <class V, class G, class X>
void backward_rows(const NormBackward& work, int64_t begin, int64_t end, double* sums,
                   Scalar<V>* scratch) {
  using T = Scalar<V>;
  const int64_t n = work.n, width = padded(n);
  const auto* weight = static_cast<const T*>(work.weight);
  const int64_t sum_count = sums ? (work.mean ? 2 : 1) * width : 0;
  for (int64_t i = 0; i < sum_count; ++i) {
    sums[i] = 0;
    scratch[i] = 0;
  }
  T* const weight_sum = sums ? scratch : nullptr;
  T* const bias_sum = sums && work.mean ? scratch + width : nullptr;
  const auto row_of = [&](auto* data, int64_t row, int64_t size) {
    return start_of(data, row * n * size);
  };
  const auto mean_of = [&](int64_t row) {
    return work.mean ? static_cast<const T*>(work.mean)[row] : T(0);
  };
  const auto rstd_of = [&](int64_t row) { return static_cast<const T*>(work.rstd)[row]; };
  NormSlope<T> slopes[2];
  const auto read = [&](int64_t row, int64_t which) __attribute__((always_inline)) {
    const T mean = mean_of(row), rstd = rstd_of(row);
    const char *grad = row_of(work.grad_y, row, G::size), *x = row_of(work.input, row, X::size);
    PairSum<V> sum, g_sum, product;
    for_each_pair(
        n,
        [&](int64_t i, auto lanes, auto half) __attribute__((always_inline)) {
          fetch(grad, (n + i) * G::size);
          fetch(x, (n + i) * X::size);
          const V z = within(norm_near_z(X::load(x, i, lanes), mean, rstd), lanes, 0);
          const V g = G::load(grad, i, lanes) * load_lanes(weight + i);
          sum[half].add(z);
          g_sum[half].add(g);
          product[half].add_product(g, z);
        },
        sum, g_sum, product);
    slopes[which] =
        norm_slope(rstd, sum.total(), g_sum.total(), product.total(), n, work.mean != nullptr);
  };
  const auto finish = [&](int64_t row, int64_t which) __attribute__((always_inline)) {
    const T mean = mean_of(row), rstd = rstd_of(row);
    const NormSlope<T> slope = slopes[which];
    const char *grad = row_of(work.grad_y, row, G::size), *x = row_of(work.input, row, X::size);
    const char* residual = row_of(work.grad_residual, row, X::size);
    char* grad_x = row_of(work.grad_x, row, G::size);
    char* grad_input = row_of(work.grad_input, row, X::size);
    for_each_pack(
        n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          const V dy = G::load(grad, i, lanes);
          const V z = norm_z(norm_near_z(X::load(x, i, lanes), mean, rstd), slope);
          if (weight_sum) store_lanes(weight_sum + i, fma(dy, z, load_lanes(weight_sum + i)));
          if (bias_sum) store_lanes(bias_sum + i, load_lanes(bias_sum + i) + dy);
          const V more = work.grad_residual ? X::load(residual, i, lanes) : broadcast<V>(0);
          const V dx = norm_gradient(dy * load_lanes(weight + i), z, more, slope);
          if (work.grad_x) G::store(grad_x, i, dx, lanes);
          if (work.grad_input) X::store(grad_input, i, dx, lanes);
        });
    if ((row - begin) % kNormRows == kNormRows - 1) flush<V>(scratch, sums, sum_count);
  };
  for_each_row(begin, end, n, read, finish);
  flush<V>(scratch, sums, sum_count);
}

template <class V>
void backward_in(const NormBackward& work, int64_t begin, int64_t end, double* sums,
                 void* scratch) {
  with_dtype<V>(work.grad_dtype, [&](auto elements) {
    with_dtype<V>(work.input_dtype, [&](auto other) {
      backward_rows<V, decltype(elements), decltype(other)>(work, begin, end, sums,
                                                            static_cast<Scalar<V>*>(scratch));
    });
  });
}

void backward(const NormBackward& work, int64_t begin, int64_t end, double* sums, void* scratch) {
  work.grad_dtype == Dtype::kF64 ? backward_in<F64>(work, begin, end, sums, scratch)
                                 : backward_in<F32>(work, begin, end, sums, scratch);
}

void add_blocks(const double* sums, int64_t blocks, int64_t stride, int64_t begin, int64_t end,
                Dtype dtype, void* to) {
  constexpr int64_t kColumns = 64;
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t count = end - first < kColumns ? end - first : kColumns;
    double total[kColumns] = {};
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t k = 0; k < count; ++k) total[k] += sums[block * stride + first + k];
    for (int64_t k = 0; k < count; ++k) store_rounded(to, dtype, first + k, total[k]);
  }
}

}  // namespace

extern const NormKernels kNorm;
const NormKernels kNorm = {padded, parameters, forward, backward, add_blocks};

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
