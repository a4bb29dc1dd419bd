// Activations, gated units and bias + dropout + residual add.
//   Formulas: csrc/math/activation.h. FP64 in FP64, everything else in FP32, rounded once.
//   Outputs may be the memory of an input of the same dtype.
//   FP16 bytes an element: activation 4 forward, 6 backward; gated unit 6 and 10; dropout add 6 and
//   4 (with a bias gradient 1/16 more, the partial sums).
//   Elements do not depend on each other: no division of the work changes a bit.
// Tests: tests/python/test_activation.py, tests/cpp/activation_test.cpp.

#include "activation.h"

#include "parts.h"
#include "rows.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

void forward(math::Activation activation, Dtype dtype, const void* x, void* y, int64_t n) {
  with_elements(dtype, [&](auto elements) {
    with_activation(activation, [&](auto curve) {
      using E = decltype(elements);
      for_each_pack(
          n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
            E::store(y, i,
                     decltype(curve)::template value<E::dtype == Dtype::kF16>(E::load(x, i, lanes)),
                     lanes);
          });
    });
  });
}

void backward(math::Activation activation, Dtype dtype, const void* grad, const void* x, void* dx,
              int64_t n) {
  with_elements(dtype, [&](auto elements) {
    with_activation(activation, [&](auto curve) {
      using E = decltype(elements);
      for_each_pack(
          n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
            const auto d = E::load(grad, i, lanes);
            E::store(dx, i,
                     decltype(curve)::template gradient<E::dtype == Dtype::kF16>(
                         d, E::load(x, i, lanes)),
                     lanes);
          });
    });
  });
}

int64_t gated(math::Activation activation, Dtype dtype, bool counts, const void* gate,
              const void* up, void* y, int64_t n) {
  int64_t total = 0;
  with_elements(dtype, [&](auto elements) {
    with_gate(activation, [&](auto curve) {
      using E = decltype(elements);
      const auto bound = math::overflow_bound<typename E::T>(E::dtype);
      for_each_pack(
          n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
            const auto g = E::load(gate, i, lanes), u = E::load(up, i, lanes);
            const auto result = decltype(curve)::template value<E::dtype == Dtype::kF16>(g) * u;
            E::store(y, i, result, lanes);
            if (counts) total += math::count(math::overflows(result, g, u, bound));
          });
    });
  });
  return total;
}

void gated_backward(math::Activation activation, Dtype dtype, const void* grad, const void* gate,
                    const void* up, void* dgate, void* dup, int64_t n) {
  with_elements(dtype, [&](auto elements) {
    with_gate(activation, [&](auto curve) {
      using E = decltype(elements);
      for_each_pack(
          n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
            const auto d = E::load(grad, i, lanes), u = E::load(up, i, lanes);
            const auto at =
                decltype(curve)::template curve<E::dtype == Dtype::kF16>(E::load(gate, i, lanes));
            // The slope is at most 1.13: in this order nothing overflows that need not.
            E::store(dgate, i, d * at.slope * u, lanes);
            E::store(dup, i, d * at.value, lanes);
          });
    });
  });
}

void kept(uint64_t key, uint64_t offset, uint32_t threshold, int64_t begin, int64_t count,
          float* to) {
  const F32 one = broadcast<F32>(1), zero = broadcast<F32>(0);
  for (int64_t i = 0; i < count; i += kDropoutGroup) {
    const Words<U32> words = dropout_words<U32>(key, offset, begin + i);
    for (int w = 0; w < 4; ++w)
      store_lanes(to + i + w * kLanes,
                  select<float>(words.x[w] >= broadcast<U32>(threshold), one, zero));
  }
}

/// Factors of the elements from i on, in the compute type.
template <class V, class Lanes>
HALFSTEP_FN V factors(const float* kept, int64_t i, Lanes lanes, V scale) {
  if (!kept) return scale;
  const F32 ones = Elements<Dtype::kF32>::load(kept, i, lanes);
  if constexpr (sizeof(V) == sizeof(F64))
    return to_double(ones) * scale;
  else
    return ones * scale;
}

void dropout_add(Dtype dtype, const void* x, const void* bias, const void* residual,
                 const float* kept, double scale, void* y, int64_t n) {
  with_elements(dtype, [&](auto elements) {
    using E = decltype(elements);
    const auto factor = broadcast<typename E::V>(typename E::T(scale));
    const auto zero = broadcast<typename E::V>(0);
    for_each_pack(
        n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          const auto b = bias ? E::load(bias, i, lanes) : zero;
          const auto r = E::load(residual, i, lanes);
          E::store(y, i,
                   math::dropout_add(E::load(x, i, lanes), b, r, factors(kept, i, lanes, factor)),
                   lanes);
        });
  });
}

void dropout_backward(Dtype dtype, const void* grad, const float* kept, double scale, void* dx,
                      void* sums, int64_t n) {
  with_elements(dtype, [&](auto elements) {
    using E = decltype(elements);
    using Sums = Elements<E::dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32>;
    const auto factor = broadcast<typename E::V>(typename E::T(scale));
    for_each_pack(
        n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          const auto d = E::load(grad, i, lanes) * factors(kept, i, lanes, factor);
          E::store(dx, i, d, lanes);
          if (sums) Sums::store(sums, i, Sums::load(sums, i, lanes) + d, lanes);
        });
  });
}

}  // namespace

const ActivationKernels kActivation = {forward, backward,    gated,           gated_backward,
                                       kept,    dropout_add, dropout_backward};

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
