// The kernels of tiles.h in AMX and AVX-512 instructions. Called only where the CPU has them.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "tiles.h"
#include "transpose.h"

namespace halfstep::cpu {

namespace {

struct Split {
  __m512i high, low;  // 32 BF16 each
};

/// The upper 16 bits, as FP32.
__m512 upper(__m512 x) {
  const __m512i mask = _mm512_set1_epi32(int(0xFFFF0000U));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), mask));
}
/// The upper 16 bits of `first` and `second` in turn.
__m512i in_turn(__m512 first, __m512 second) {
  return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(_mm512_castps_si512(first), 16),
                                 _mm512_castps_si512(second));
}
/// Those of four of `first`, four of `second`, and so on.
__m512i by_fours(__m512 first, __m512 second) {
  return _mm512_packus_epi32(_mm512_srli_epi32(_mm512_castps_si512(first), 16),
                             _mm512_srli_epi32(_mm512_castps_si512(second), 16));
}
/// The upper 16 bits of these are the nearest BF16 numbers, ties away from zero. NaN stays NaN,
/// which the sum would wrap around to zero where its bits are all set.
__m512 half_more(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 numbers = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
  return _mm512_castsi512_ps(_mm512_mask_add_epi32(bits, numbers, bits, _mm512_set1_epi32(0x8000)));
}

/// The 8 upper bits of an FP16 number and the 3 that are left, which the upper half of an FP32
/// number holds; of an FP32 number the nearest of 8 bits, and of what is left again.
template <bool kHalf, bool kInTurn>
Split split(__m512 first, __m512 second) {
  const auto together = [](__m512 a, __m512 b) { return kInTurn ? in_turn(a, b) : by_fours(a, b); };
  const __m512 a = upper(kHalf ? first : half_more(first));
  const __m512 b = upper(kHalf ? second : half_more(second));
  const __m512 c = _mm512_sub_ps(first, a), d = _mm512_sub_ps(second, b);
  return {together(a, b), kHalf ? together(c, d) : together(half_more(c), half_more(d))};
}

__mmask16 first_of(int64_t count) {
  return count >= 16 ? __mmask16(0xFFFF) : __mmask16((1U << (count > 0 ? count : 0)) - 1);
}

/// The masked ones of 16 neighbours as FP32, zeros in the other places.
template <bool kHalf>
__m512 load(const void* data, int64_t at, __mmask16 mask) {
  if constexpr (kHalf)
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + at));
  else
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + at);
}

/// 16 x 16 numbers of 32 bits, in rows of 64 bytes.
void transpose(char* tile) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(tile + 64 * i);
  transpose_registers(r);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 64 * i, r[i]);
}

/// A tile's two parts, 16 lines x 32: a row is a line where the inner dimension is contiguous, and
/// a pair of the inner dimension where the lines are.
template <bool kHalf, bool kInnerContiguous>
void pack_tile(const TileMatrix& m, int64_t line, int64_t lines, int64_t inner, int64_t count,
               char* high, char* low) {
  const __mmask16 first = first_of(kInnerContiguous ? count : lines), second = first_of(count - 16);
  for (int64_t r = 0; r < 16; ++r) {
    Split parts;
    if constexpr (kInnerContiguous) {
      const int64_t at = (line + r) * m.line_stride + inner;
      const bool there = r < lines;
      const __m512 x = load<kHalf>(m.data, at, there ? first : __mmask16(0));
      const __m512 y = load<kHalf>(m.data, at + 16, there ? second : __mmask16(0));
      parts =
          split<kHalf, false>(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
    } else {
      const int64_t k = 2 * r, at = (inner + k) * m.inner_stride + line;
      parts = split<kHalf, true>(
          load<kHalf>(m.data, at, k < count ? first : __mmask16(0)),
          load<kHalf>(m.data, at + m.inner_stride, k + 1 < count ? first : __mmask16(0)));
    }
    _mm512_store_si512(high + 64 * r, parts.high);
    _mm512_store_si512(low + 64 * r, parts.low);
  }
}

template <bool kHalf, bool kInnerContiguous>
void pack_panel(const TileMatrix& m, int64_t line, int64_t lines, int64_t inner, int64_t count,
                bool is_b, char* panel) {
  constexpr int64_t kTile = kBlockBytes / 4;
  for (int64_t k = 0; k < count; k += kTileBlock, panel += kBlockBytes)
    for (int64_t half = 0; half < 2; ++half) {
      char* const high = panel + half * kTile;
      char* const low = high + 2 * kTile;
      const int64_t there = lines - 16 * half;
      pack_tile<kHalf, kInnerContiguous>(m, line + 16 * half, there > 16 ? 16 : there, inner + k,
                                         count - k, high, low);
      // The unit wants lines as the rows of a, and pairs of the inner dimension as those of b.
      if (kInnerContiguous == is_b) {
        transpose(high);
        transpose(low);
      }
    }
}

void pack(const TileMatrix& m, int64_t line, int64_t lines, int64_t inner, int64_t count, bool is_b,
          char* panel) {
  const bool contiguous = m.inner_stride == 1;
  if (m.half && contiguous)
    pack_panel<true, true>(m, line, lines, inner, count, is_b, panel);
  else if (m.half)
    pack_panel<true, false>(m, line, lines, inner, count, is_b, panel);
  else if (contiguous)
    pack_panel<false, true>(m, line, lines, inner, count, is_b, panel);
  else
    pack_panel<false, false>(m, line, lines, inner, count, is_b, panel);
}

bool finite(const void* halves, int64_t count) {
  const auto* p = static_cast<const uint16_t*>(halves);
  const __m512i exponent = _mm512_set1_epi16(0x7C00);
  const auto bad = [&](__m512i x) {
    return _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
  };
  int64_t i = 0;
  for (; i + 128 <= count; i += 128) {
    const __mmask32 a = bad(_mm512_loadu_si512(p + i)), b = bad(_mm512_loadu_si512(p + i + 32));
    const __mmask32 c = bad(_mm512_loadu_si512(p + i + 64)),
                    d = bad(_mm512_loadu_si512(p + i + 96));
    if (a | b | c | d) return false;
  }
  for (; i < count; i += 32) {
    const int64_t left = count - i;
    const __mmask32 mask = left >= 32 ? ~__mmask32(0) : __mmask32((1U << left) - 1);
    if (bad(_mm512_maskz_loadu_epi16(mask, p + i))) return false;
  }
  return true;
}

/// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

/// Not a local one: GCC 12 takes the instruction to read 8 bytes, and drops what it need not store.
const Configuration kConfiguration;

void enter() { _tile_loadconfig(&kConfiguration); }
void leave() { _tile_release(); }

/// Tiles 0 to 3 hold c; 4 and 5 are lines of a, 6 and 7 of b.
#define HALFSTEP_ALL_FOUR  \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)

/// Fetches a tile of the next block of each operand; panels come from the second cache.
void fetch_next(const char* a, const char* b) {
  for (int64_t line = 0; line < 16; ++line) {
    _mm_prefetch(b + kBlockBytes + 64 * line, _MM_HINT_T0);
    _mm_prefetch(a + kBlockBytes + 64 * line, _MM_HINT_T0);
  }
}

/// `to`: where the result goes in the end, of which the next block is fetched.
template <bool kExact>
void multiply_panels(const char* a, const char* b, int64_t blocks, float* c, int64_t c_stride,
                     const float* to, int64_t to_stride) {
  constexpr int64_t kTile = kBlockBytes / 4;
  constexpr int64_t kLines = 2 * kTileBlock;  // of 64 bytes, in a block of c
  float* const below = c + 16 * c_stride;
  const int64_t stride = 4 * c_stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < blocks; ++i, a += kBlockBytes, b += kBlockBytes) {
    // The next block of c, for writing.
    for (int64_t l = kLines * i / blocks; l < kLines * (i + 1) / blocks; ++l)
      __builtin_prefetch(to + l / 2 * to_stride + kTileBlock + l % 2 * 16, 1);
    _tile_loadd(4, a, 64);  // high high
    _tile_loadd(5, a + kTile, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTile, 64);
    HALFSTEP_ALL_FOUR;
    fetch_next(a, b);
    _tile_loadd(6, b + 2 * kTile, 64);  // high low
    _tile_loadd(7, b + 3 * kTile, 64);
    HALFSTEP_ALL_FOUR;
    fetch_next(a + kTile, b + kTile);
    _tile_loadd(4, a + 2 * kTile, 64);
    _tile_loadd(5, a + 3 * kTile, 64);
    if constexpr (kExact) {  // low low
      HALFSTEP_ALL_FOUR;
    }
    fetch_next(a + 2 * kTile, b + 2 * kTile);
    _tile_loadd(6, b, 64);  // low high
    _tile_loadd(7, b + kTile, 64);
    HALFSTEP_ALL_FOUR;
    fetch_next(a + 3 * kTile, b + 3 * kTile);
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 16, stride);
  _tile_stored(2, below, stride);
  _tile_stored(3, below + 16, stride);
}

void multiply(const char* a, const char* b, int64_t blocks, bool exact, float* c, int64_t c_stride,
              bool add) {
  alignas(64) float sum[kTileBlock * kTileBlock];
  float* const into = add ? sum : c;
  const int64_t stride = add ? kTileBlock : c_stride;
  exact ? multiply_panels<true>(a, b, blocks, into, stride, c, c_stride)
        : multiply_panels<false>(a, b, blocks, into, stride, c, c_stride);
  if (!add) return;
  for (int64_t r = 0; r < kTileBlock; ++r)
    for (int64_t j = 0; j < kTileBlock; j += 16) {
      float* const to = c + r * c_stride + j;
      _mm512_storeu_ps(
          to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(sum + r * kTileBlock + j)));
    }
}

}  // namespace

const TileKernels kAmxTiles = {finite, pack, multiply, enter, leave};

}  // namespace halfstep::cpu
