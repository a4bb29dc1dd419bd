// A 16-bit matrix times a vector, along its rows and along its columns.
//   The matrix is read once: 2 bytes an element. Along rows, four at a time share the vector's
//   conversion; along columns, the sums of a strip of up to 256 stay in registers.
//   Every sum is taken in one order, whatever the instruction set and the number of threads.
// Tests: tests/python/test_overrides.py, tests/python/test_isa.py.

#include "mv.h"

#include "kernels.h"
#include "rows.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

template <class Body>
void with_sixteen(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kF16)
    body(Elements<Dtype::kF16>());
  else
    body(Elements<Dtype::kBF16>());
}

/// One element rounded to the dtype of E.
template <class E>
void store_one(void* to, int64_t i, double value) {
  alignas(64) uint16_t lanes[kLanes];
  E::store(lanes, 0, broadcast<F32>(round_to_odd(value)));
  static_cast<uint16_t*>(to)[i] = lanes[0];
}

template <class E, int kRows>
void some_rows(const MatrixVector& work, int64_t row) {
  const auto* a = static_cast<const uint16_t*>(work.a) + row * work.stride;
  LaneSum<F32> sum[kRows];
  const auto flush_all = [&] {
    for (auto& s : sum) s.flush();
  };
  struct All {
    const decltype(flush_all)& run;
    void flush() { run(); }
  } all{flush_all};
  for_each_term(
      work.columns,
      [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const F32 x = E::load(work.x, i, lanes);
        for (int k = 0; k < kRows; ++k)
          sum[k].add_product(E::load(a + k * work.stride, i, lanes), x);
      },
      all);
  for (int k = 0; k < kRows; ++k) store_one<E>(work.y, row + k, sum[k].total());
}

void rows(const MatrixVector& work, int64_t begin, int64_t end) {
  with_sixteen(work.dtype, [&](auto elements) {
    using E = decltype(elements);
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) some_rows<E, 4>(work, row);
    for (; row < end; ++row) some_rows<E, 1>(work, row);
  });
}

/// kPacks packs of columns from `column` on, of which the last may be a part.
template <class E, int kPacks, class Lanes>
void strip(const MatrixVector& work, int64_t column, Lanes lanes) {
  const auto* a = static_cast<const uint16_t*>(work.a) + column;
  const auto* x = static_cast<const uint16_t*>(work.x);
  LaneSum<F32> sum[kPacks];
  for (int64_t row = 0; row < work.rows; ++row) {
    const F32 factor = broadcast<F32>(load_scalar<float>(x, E::dtype, row));
    for (int k = 0; k < kPacks; ++k) {
      const uint16_t* from = a + row * work.stride + k * kLanes;
      sum[k].add_product(E::load(from, 0, lanes), factor);
    }
    if (row % 64 == 63)
      for (auto& s : sum) s.flush();
  }
  for (int k = 0; k < kPacks; ++k)
    E::store(work.y, column + k * kLanes, narrow(sum[k].lanes()), lanes);
}

/// Strips of kPacks packs while there are as many, then of half as many.
template <class E, int kPacks>
void strips(const MatrixVector& work, int64_t column, int64_t end) {
  for (; column + kPacks * kLanes <= end; column += kPacks * kLanes)
    strip<E, kPacks>(work, column, Whole());
  if constexpr (kPacks > 1)
    strips<E, kPacks / 2>(work, column, end);
  else if (column < end)
    strip<E, 1>(work, column, Part{int(end - column)});
}

void columns(const MatrixVector& work, int64_t begin, int64_t end) {
  with_sixteen(work.dtype,
               [&](auto elements) { strips<decltype(elements), 16>(work, begin, end); });
}

}  // namespace

const MatrixVectorKernels kMatrixVector = {rows, columns};

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
