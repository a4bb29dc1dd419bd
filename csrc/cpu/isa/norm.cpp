// LayerNorm and RMSNorm, forward and backward. Formulas: csrc/math/norm.h.
//   x, y, dy, dx: FP16, BF16, FP32; residual, its output and their gradients: any of the three of
//   their own; weight and bias: made T before. FP64: all of them FP64, computed in FP64. Nothing
//   aliases.
//   A thread takes whole rows. A row is read once, into a buffer of T that stays in its cache; the
//   moments and the output are formed there. Backward: the same for dy and x; the sums for weight
//   and bias stay in cache over a block of rows.
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

template <class T>
void fill_parameters(const void* from, Dtype dtype, double offset, double otherwise, int64_t count,
                     T* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = from ? load_scalar<T>(from, dtype, i) + T(offset) : T(otherwise);
  for (int64_t i = count; i < padded(count); ++i) to[i] = 0;
}

void parameters(const void* from, Dtype dtype, double offset, double otherwise, int64_t count,
                bool wide, void* to) {
  if (wide)
    fill_parameters(from, dtype, offset, otherwise, count, static_cast<double*>(to));
  else
    fill_parameters(from, dtype, offset, otherwise, count, static_cast<float*>(to));
}

struct RowSums {
  double sum, squares;
};

/// Sums of d = x - mean and of its squares over a row in the buffer, in A (FP32 or FP64) lanes.
template <class A, class V>
RowSums sum_row(const Scalar<V>* x, int64_t n, Scalar<V> mean) {
  PairSum<A> sum, squares;
  for_each_pair(
      n,
      [&](int64_t i, auto lanes, auto which) __attribute__((always_inline)) {
        A d;
        if constexpr (sizeof(A) == sizeof(V))
          d = load_lanes(x + i) - broadcast<A>(mean);
        else
          d = to_double(load_lanes(x + i)) - broadcast<A>(mean);
        d = within(d, lanes, 0);
        sum[which].add(d);
        squares[which].add_product(d, d);
      },
      sum, squares);
  return {sum.total(), squares.total()};
}

/// load(i, lanes), a row, into the buffer, and its moments. The sums are taken on the way, around
/// the average of the first pack; once more where that was far off.
template <class V, class Load>
HALFSTEP_FN NormRow<Scalar<V>> read_row(int64_t n, double eps, bool centred, Scalar<V>* buffer,
                                        const Load& load) {
  using T = Scalar<V>;
  T mean = 0;
  if (centred) {
    // Any place near the row will do; that of a constant row is the constant.
    if (n >= kLanes) {
      mean = sum_lanes(load(0, Whole()) * broadcast<V>(T(1) / kLanes));
    } else {
      T lanes[kLanes];
      store_lanes(lanes, load(0, Part{int(n)}));
      double total = 0;
      for (const T lane : lanes) total += double(lane);
      mean = T(total / double(n));
    }
  }
  PairSum<V> sum, squares;
  for_each_pair(
      n,
      [&](int64_t i, auto lanes, auto which) __attribute__((always_inline)) {
        const V x = load(i, lanes);
        store_lanes(buffer + i, x);
        const V d = within(x - broadcast<V>(mean), lanes, 0);
        sum[which].add(d);
        squares[which].add_product(d, d);
      },
      sum, squares);
  RowSums sums = {sum.total(), squares.total()};
  const double share = 1 / double(n), rest = sums.sum * share;
  if (centred && 2 * rest * rest > sums.squares * share) {
    mean = T(double(mean) + rest);
    sums = sum_row<V, V>(buffer, n, mean);
  }
  if constexpr (sizeof(T) == 4) {
    if (!(sums.squares - sums.squares == 0)) {
      if (centred) mean = T(sum_row<F64, V>(buffer, n, 0).sum / double(n));
      sums = sum_row<F64, V>(buffer, n, mean);
    }
  }
  return norm_row(mean, sums.sum, sums.squares, n, eps, centred);
}

/// x, or x + residual as it is rounded and stored, into the buffer.
template <class V>
NormRow<Scalar<V>> load_row(const NormForward& work, int64_t row, Scalar<V>* buffer) {
  const int64_t n = work.n;
  const bool centred = work.mean;
  NormRow<Scalar<V>> result;
  with_dtype<V>(
      work.x_dtype, [&](auto elements) __attribute__((always_inline)) {
        using X = decltype(elements);
        const char* x = static_cast<const char*>(work.x) + row * n * X::size;
        const char* y = static_cast<const char*>(work.y) + row * n * X::size;
        if (!work.residual) {
          result = read_row<V>(
              n, work.eps, centred,
              buffer, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
                fetch(x, (n + i) * X::size);
                fetch_to_write(y + i * X::size);
                return X::load(x, i, lanes);
              });
          return;
        }
        with_dtype<V>(
            work.residual_dtype, [&](auto other) __attribute__((always_inline)) {
              using R = decltype(other);
              const char* residual = static_cast<const char*>(work.residual) + row * n * R::size;
              char* out = static_cast<char*>(work.residual_out) + row * n * R::size;
              result = read_row<V>(
                  n, work.eps, centred,
                  buffer, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
                    fetch(x, (n + i) * X::size);
                    fetch(residual, (n + i) * R::size);
                    fetch_to_write(y + i * X::size);
                    R::store(out, i, X::load(x, i, lanes) + R::load(residual, i, lanes), lanes);
                    return R::load(out, i, lanes);
                  });
            });
      });
  return result;
}

template <class V>
void forward_rows(const NormForward& work, int64_t begin, int64_t end, Scalar<V>* buffer) {
  using T = Scalar<V>;
  const auto* weight = static_cast<const T*>(work.weight);
  const auto* bias = static_cast<const T*>(work.bias);
  for (int64_t row = begin; row < end; ++row) {
    const NormRow<T> r = load_row<V>(work, row, buffer);
    if (work.mean) static_cast<T*>(work.mean)[row] = T(double(r.mean) + double(r.rest));
    static_cast<T*>(work.rstd)[row] = r.rstd;
    with_dtype<V>(
        work.x_dtype, [&](auto elements) __attribute__((always_inline)) {
          using E = decltype(elements);
          char* y = static_cast<char*>(work.y) + row * work.n * E::size;
          for_each_pack(
              work.n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
                const V z = normalise(load_lanes(buffer + i), r);
                E::store(y, i, fma(z, load_lanes(weight + i), load_lanes(bias + i)), lanes);
              });
        });
  }
}

void forward(const NormForward& work, int64_t begin, int64_t end, void* buffer) {
  if (work.x_dtype == Dtype::kF64)
    forward_rows<F64>(work, begin, end, static_cast<double*>(buffer));
  else
    forward_rows<F32>(work, begin, end, static_cast<float*>(buffer));
}

/// `row` elements of `from` as V in `to`, zeros up to whole packs.
template <class V>
void widen(const void* from, Dtype dtype, int64_t row, int64_t n, Scalar<V>* to) {
  with_dtype<V>(
      dtype, [&](auto elements) __attribute__((always_inline)) {
        using E = decltype(elements);
        const char* data = static_cast<const char*>(from) + row * n * E::size;
        for_each_pack(
            n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
              store_lanes(to + i, E::load(data, i, lanes));
            });
      });
}

/// One row of the backward in buffers of T.
template <class V>
struct Row {
  Scalar<V>*grad, *z, *residual;  ///< dy; z, later dx; gradient of the residual output
};

/// dy and z (but for `rest`) into the buffers, and the sums of the row.
template <class V>
NormSlope<Scalar<V>> slope_of(const NormBackward& work, int64_t row, const Row<V>& at) {
  using T = Scalar<V>;
  const T mean = work.mean ? static_cast<const T*>(work.mean)[row] : T(0);
  const T rstd = static_cast<const T*>(work.rstd)[row];
  const auto* weight = static_cast<const T*>(work.weight);
  PairSum<V> sum, g_sum, product;
  with_dtype<V>(
      work.grad_dtype, [&](auto elements) __attribute__((always_inline)) {
        using G = decltype(elements);
        const char* grad = static_cast<const char*>(work.grad_y) + row * work.n * G::size;
        with_dtype<V>(
            work.input_dtype, [&](auto other) __attribute__((always_inline)) {
              using X = decltype(other);
              const char* x = static_cast<const char*>(work.input) + row * work.n * X::size;
              for_each_pair(
                  work.n,
                  [&](int64_t i, auto lanes, auto which) __attribute__((always_inline)) {
                    fetch(grad, (work.n + i) * G::size);
                    fetch(x, (work.n + i) * X::size);
                    const V dy = G::load(grad, i, lanes);
                    const V z = within(norm_near_z(X::load(x, i, lanes), mean, rstd), lanes, 0);
                    const V g = dy * load_lanes(weight + i);
                    store_lanes(at.grad + i, dy);
                    store_lanes(at.z + i, z);
                    sum[which].add(z);
                    g_sum[which].add(g);
                    product[which].add_product(g, z);
                  },
                  sum, g_sum, product);
            });
      });
  return norm_slope(rstd, sum.total(), g_sum.total(), product.total(), work.n,
                    work.mean != nullptr);
}

/// dx of the row, and its part of the sums for weight and bias.
template <class V, bool kResidual>
void finish_row(const NormBackward& work, int64_t row, const Row<V>& at,
                const NormSlope<Scalar<V>>& slope, Scalar<V>* weight_sum, Scalar<V>* bias_sum) {
  using T = Scalar<V>;
  const auto* weight = static_cast<const T*>(work.weight);
  const auto write = [&](void* to, Dtype dtype, const auto& value) {
    with_dtype<V>(
        dtype, [&](auto elements) __attribute__((always_inline)) {
          using E = decltype(elements);
          char* data = static_cast<char*>(to) + row * work.n * E::size;
          for_each_pack(
              work.n, [&](int64_t i, auto lanes)
                          __attribute__((always_inline)) { E::store(data, i, value(i), lanes); });
        });
  };
  const auto gradient = [&](int64_t i) __attribute__((always_inline)) {
    const V dy = load_lanes(at.grad + i), z = norm_z(load_lanes(at.z + i), slope);
    if (weight_sum) {
      store_lanes(weight_sum + i, fma(dy, z, load_lanes(weight_sum + i)));
      if (bias_sum) store_lanes(bias_sum + i, load_lanes(bias_sum + i) + dy);
    }
    const V residual = kResidual ? load_lanes(at.residual + i) : broadcast<V>(0);
    return norm_gradient(dy * load_lanes(weight + i), z, residual, slope);
  };
  if (work.grad_x && !work.grad_input) {
    write(work.grad_x, work.grad_dtype, gradient);
    return;
  }
  for (int64_t i = 0; i < work.n; i += kLanes) store_lanes(at.z + i, gradient(i));
  const auto kept = [&](int64_t i) __attribute__((always_inline)) { return load_lanes(at.z + i); };
  if (work.grad_x) write(work.grad_x, work.grad_dtype, kept);
  if (work.grad_input) write(work.grad_input, work.input_dtype, kept);
}

/// Moves `count` sums of T into doubles.
template <class V>
void flush(Scalar<V>* from, double* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += double(from[i]);
    from[i] = 0;
  }
}

template <class V>
void backward_rows(const NormBackward& work, int64_t begin, int64_t end, Scalar<V>* buffer,
                   double* sums, Scalar<V>* scratch) {
  const int64_t width = padded(work.n);
  const int64_t sum_count = sums ? (work.mean ? 2 : 1) * width : 0;
  const Row<V> at = {buffer, buffer + width, buffer + 2 * width};
  for (int64_t i = 0; i < sum_count; ++i) {
    sums[i] = 0;
    scratch[i] = 0;
  }
  auto* weight_sum = sums ? scratch : nullptr;
  auto* bias_sum = sums && work.mean ? scratch + width : nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const auto slope = slope_of<V>(work, row, at);
    if (work.grad_residual) {
      widen<V>(work.grad_residual, work.input_dtype, row, work.n, at.residual);
      finish_row<V, true>(work, row, at, slope, weight_sum, bias_sum);
    } else {
      finish_row<V, false>(work, row, at, slope, weight_sum, bias_sum);
    }
    if ((row - begin) % kNormRows == kNormRows - 1) flush<V>(scratch, sums, sum_count);
  }
  flush<V>(scratch, sums, sum_count);
}

void backward(const NormBackward& work, int64_t begin, int64_t end, void* buffer, double* sums,
              void* scratch) {
  if (work.grad_dtype == Dtype::kF64)
    backward_rows<F64>(work, begin, end, static_cast<double*>(buffer), sums,
                       static_cast<double*>(scratch));
  else
    backward_rows<F32>(work, begin, end, static_cast<float*>(buffer), sums,
                       static_cast<float*>(scratch));
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
