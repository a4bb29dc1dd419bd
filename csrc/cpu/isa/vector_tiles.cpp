// Products of FP16 and FP32 operands in FP32 vector instructions: the kernels of tiles.h for CPUs
// with neither a unit for FP16 nor one for BF16 matrices.
//
//   A panel holds FP32 numbers, [inner dimension][32 lines], for both operands alike; FP16 is
//   widened on the way in. A few rows of c at a time have their sums in registers: 11, 11 and 10
//   rows of 32 columns on AVX-512, 6 or 5 rows of 16 columns on AVX2. An element of c is the sum of
//   sums of up to kDepth terms, each by FMA from its first term to its last: the same bits on both
//   instruction sets.
// Tests: tests/cpp/tiles_test.cpp, tests/python/test_tiles.py.

#include "vector_tiles.h"
#include "rows.h"
#if defined(__AVX2__)
#include "../tiles/transpose.h"
#endif

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

#if defined(__AVX2__)
static_assert(kTileBlock == 2 * kLanes && kBlockBytes == kTileBlock * kTileBlock * sizeof(float));

/// Register i becomes lane i of all.
HALFSTEP_FN void transpose_lanes(F32 (&r)[kLanes]) {
#if defined(__AVX512F__)
  __m512i x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = _mm512_castps_si512(r[i].piece[0]);
  transpose_registers(x);
  for (int i = 0; i < kLanes; ++i) r[i].piece[0] = _mm512_castsi512_ps(x[i]);
#else
  // Lines 0 to 7 become the first half of a result, 8 to 15 the second.
  for (int half = 0; half < 2; ++half) {
    __m256 x[8], y[8];
    for (int i = 0; i < 8; ++i) {
      x[i] = r[8 * half + i].piece[0];
      y[i] = r[8 * half + i].piece[1];
    }
    transpose_registers(x);
    transpose_registers(y);
    for (int i = 0; i < 8; ++i) {
      r[8 * half + i].piece[0] = x[i];
      r[8 * half + i].piece[1] = y[i];
    }
  }
  for (int i = 0; i < 8; ++i) std::swap(r[i].piece[1], r[i + 8].piece[0]);
#endif
}

/// Up to kLanes neighbours from `at` on, zeros after them.
template <class E>
HALFSTEP_FN F32 load_some(const void* data, int64_t at, int64_t count) {
  if (count >= kLanes) return E::load(data, at);
  return count > 0 ? E::load(data, at, Part{int(count)}) : broadcast<F32>(0);
}

template <class E>
void pack_lines_together(const TileMatrix& m, int64_t line, int64_t lines, int64_t inner,
                         int64_t count, float* panel) {
  for (int64_t k = 0; k < count; ++k, panel += kTileBlock) {
    const int64_t at = (inner + k) * m.inner_stride + line;
    store_lanes(panel, load_some<E>(m.data, at, lines));
    store_lanes(panel + kLanes, load_some<E>(m.data, at + kLanes, lines - kLanes));
  }
  for (int64_t k = count; k % kTileBlock != 0; ++k, panel += kTileBlock) {
    store_lanes(panel, broadcast<F32>(0));
    store_lanes(panel + kLanes, broadcast<F32>(0));
  }
}

template <class E>
void pack_along_inner(const TileMatrix& m, int64_t line, int64_t lines, int64_t inner,
                      int64_t count, float* panel) {
  const int64_t whole = (count + kTileBlock - 1) / kTileBlock * kTileBlock;
  for (int64_t k = 0; k < whole; k += kLanes)
    for (int64_t half = 0; half < kTileBlock; half += kLanes) {
      F32 r[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        r[i] = load_some<E>(m.data, (line + half + i) * m.line_stride + inner + k,
                            half + i < lines ? count - k : 0);
      transpose_lanes(r);
      for (int64_t i = 0; i < kLanes; ++i) store_lanes(panel + (k + i) * kTileBlock + half, r[i]);
    }
}

void pack(const TileMatrix& m, int64_t line, int64_t lines, int64_t inner, int64_t count, bool,
          char* panel) {
  auto* out = reinterpret_cast<float*>(panel);
  const auto run = [&](auto elements) {
    using E = decltype(elements);
    if (m.inner_stride == 1)
      pack_along_inner<E>(m, line, lines, inner, count, out);
    else
      pack_lines_together<E>(m, line, lines, inner, count, out);
  };
  m.half ? run(Elements<Dtype::kF16>()) : run(Elements<Dtype::kF32>());
}

/// kRows rows of c, kPacks packs of columns.
template <int kRows, int kPacks>
void multiply_rows(const float* a, const float* b, int64_t inner, float* c, int64_t c_stride,
                   bool add) {
  F32 sum[kRows][kPacks];
  for (auto& row : sum)
    for (F32& pack : row) pack = broadcast<F32>(0);
  for (int64_t k = 0; k < inner; ++k, a += kTileBlock, b += kTileBlock) {
    F32 x[kPacks];
    for (int p = 0; p < kPacks; ++p) x[p] = load_lanes(b + p * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const F32 factor = broadcast<F32>(a[r]);
      for (int p = 0; p < kPacks; ++p) sum[r][p] = fma(factor, x[p], sum[r][p]);
    }
  }
  for (int r = 0; r < kRows; ++r, c += c_stride)
    for (int p = 0; p < kPacks; ++p) {
      float* const to = c + p * kLanes;
      store_lanes(to, add ? load_lanes(to) + sum[r][p] : sum[r][p]);
    }
}

/// Rows kFirst to 31 in groups of at most kMost.
template <int kMost, int kPacks, int kFirst = 0>
HALFSTEP_FN void multiply_columns(const float* a, const float* b, int64_t inner, float* c,
                                  int64_t c_stride, bool add) {
  constexpr int kLeft = int(kTileBlock) - kFirst, kGroups = (kLeft + kMost - 1) / kMost;
  constexpr int kRows = (kLeft + kGroups - 1) / kGroups;
  multiply_rows<kRows, kPacks>(a + kFirst, b, inner, c + kFirst * c_stride, c_stride, add);
  if constexpr (kGroups > 1)
    multiply_columns<kMost, kPacks, kFirst + kRows>(a, b, inner, c, c_stride, add);
}

void multiply(const char* a_panel, const char* b_panel, int64_t blocks, bool, float* c,
              int64_t c_stride, bool add) {
  const auto* a = reinterpret_cast<const float*>(a_panel);
  const auto* b = reinterpret_cast<const float*>(b_panel);
  const int64_t inner = blocks * kTileBlock;
#if defined(__AVX512F__)
  multiply_columns<11, 2>(a, b, inner, c, c_stride, add);
#else
  multiply_columns<6, 1>(a, b, inner, c, c_stride, add);
  multiply_columns<6, 1>(a, b + kLanes, inner, c + kLanes, c_stride, add);
#endif
}

#endif

}  // namespace

#if defined(__AVX2__)
const TileKernels kVectorTiles = {nullptr, pack, multiply, [] {}, [] {}};
#endif

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
