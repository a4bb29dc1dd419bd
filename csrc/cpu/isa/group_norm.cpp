// GroupNorm (Wu and He, ECCV 2018) in FP16, forward and backward. Formulas of a row:
// csrc/math/norm.h, with the weight and bias of the element's channel.
//   FP16 in and out, FP32 in between, sums as in norm.cpp. A row is read twice, the second time
//   from the cache where it fits. Bytes an element: forward 4, backward 6. The mean that the
//   backward is given was rounded to FP16; what that dropped is taken from the row.
// Tests: tests/python/test_overrides_layers.py, tests/python/test_isa.py.

#include "group_norm.h"

#include "../../math/norm.h"
#include "kernels.h"
#include "pairs.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

using Half = Elements<Dtype::kF16>;

struct Moments {
  double sum, squares;
};

/// Sums of d = x - mean and of its squares. FP16 is too narrow for them to leave FP32.
Moments sums(const uint16_t* x, int64_t n, float mean) {
  PairSum<F32> sum, squares;
  for_each_pair(
      n,
      [&](int64_t i, auto lanes, auto which) __attribute__((always_inline)) {
        const F32 d = within(Half::load(x, i, lanes) - broadcast<F32>(mean), lanes, 0);
        sum[which].add(d);
        squares[which].add_product(d, d);
      },
      sum, squares);
  return {sum.total(), squares.total()};
}

/// Around the row's beginning; once more around its mean where that was far off.
NormRow<float> moments(const uint16_t* x, int64_t n, double eps) {
  float mean = 0;
  for (int64_t i = 0; i < kLanes; ++i) mean += half_to_float(x[i]) / kLanes;
  Moments found = sums(x, n, mean);
  const double share = 1 / double(n), rest = found.sum * share;
  if (2 * rest * rest > found.squares * share) {
    mean = float(double(mean) + rest);
    found = sums(x, n, mean);
  }
  return norm_row(mean, found.sum, found.squares, n, eps, true);
}

/// body(channel, its weight, offset of its run) for the channels of a row.
template <class Body>
HALFSTEP_FN void for_each_channel(const GroupNorm& work, int64_t row, const Body& body) {
  for (int64_t k = 0; k < work.channels; ++k) {
    const int64_t channel = row % work.groups * work.channels + k;
    body(channel, work.weight ? work.weight[channel] : 1.0f, k * work.pixels);
  }
}

void forward(const GroupNorm& work, double eps, uint16_t* y, uint16_t* mean, uint16_t* rstd,
             int64_t begin, int64_t end) {
  const int64_t n = work.channels * work.pixels;
  for (int64_t row = begin; row < end; ++row) {
    const uint16_t* x = work.x + row * n;
    const NormRow<float> found = moments(x, n, eps);
    mean[row] = float_to_half(float(double(found.mean) + double(found.rest)));
    rstd[row] = float_to_half(found.rstd);
    for_each_channel(work, row, [&](int64_t channel, float weight, int64_t at) {
      const F32 w = broadcast<F32>(weight);
      const F32 b = broadcast<F32>(work.bias ? work.bias[channel] : 0.0f);
      for_each_pack(
          work.pixels, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
            const F32 z = normalise(Half::load(x + at, i, lanes), found);
            Half::store(y + row * n + at, i, fma(z, w, b), lanes);
          });
    });
  }
}

void backward(const GroupNorm& work, const uint16_t* dy, const uint16_t* mean, const uint16_t* rstd,
              uint16_t* dx, double* weight_shares, double* bias_shares, int64_t begin,
              int64_t end) {
  const int64_t n = work.channels * work.pixels;
  for (int64_t row = begin; row < end; ++row) {
    const uint16_t *x = work.x + row * n, *grad = dy + row * n;
    const float centre = half_to_float(mean[row]), factor = half_to_float(rstd[row]);
    double* products = weight_shares + row * work.channels;
    double* totals = bias_shares + row * work.channels;
    double sum = 0, g = 0, gz = 0;
    for_each_channel(work, row, [&](int64_t channel, float weight, int64_t at) {
      PairSum<F32> near, one, product;
      for_each_pair(
          work.pixels,
          [&](int64_t i, auto lanes, auto which) __attribute__((always_inline)) {
            const F32 x_i = Half::load(x + at, i, lanes), dy_i = Half::load(grad + at, i, lanes);
            const F32 z = within(norm_near_z(x_i, centre, factor), lanes, 0);
            near[which].add(z);
            one[which].add(dy_i);
            product[which].add_product(dy_i, z);
          },
          near, one, product);
      const int64_t k = channel % work.channels;
      products[k] = product.total();
      totals[k] = one.total();
      sum += near.total();
      g += weight * totals[k];
      gz += weight * products[k];
    });
    const NormSlope<float> slope = norm_slope(factor, sum, g, gz, n, true);
    for (int64_t k = 0; k < work.channels; ++k) products[k] -= double(slope.rest) * totals[k];
    if (!dx) continue;
    for_each_channel(work, row, [&](int64_t, float weight, int64_t at) {
      for_each_pack(
          work.pixels, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
            const F32 g_i = Half::load(grad + at, i, lanes) * broadcast<F32>(weight);
            const F32 near = norm_near_z(Half::load(x + at, i, lanes), centre, factor);
            const F32 z = norm_z(near, slope);
            Half::store(dx + row * n + at, i, norm_gradient(g_i, z, broadcast<F32>(0), slope),
                        lanes);
          });
    });
  }
}

}  // namespace

const GroupNormKernels kGroupNorm = {forward, backward};

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
