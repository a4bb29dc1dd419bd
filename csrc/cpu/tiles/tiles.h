#pragma once

// FP16 products without losing a bit of an operand: on the BF16 matrix unit of a CPU (Intel AMX),
// or in FP32 vector instructions (isa/vector_tiles.cpp), which hold FP32 numbers where this file
// speaks of two parts.
//
//   An FP16 number is the sum of two BF16 numbers, exactly: 11 bits are 8 and 3, and BF16 has
//   FP32's range. So a b = (ah + al)(bh + bl) is four products of the unit, each exact, summed in
//   FP32: the error is that of an FP32 product. An FP32 operand (a gradient before it is rounded)
//   is taken to 16 bits, and al bl is left out: at most 1.25 * 2^-15 of a term, in the mean a sixth
//   of that, where rounding to FP16 costs 2^-11. The unit takes subnormal numbers as zero, which
//   only FP32 operands below 2^-110 have. NaN gives NaN, and so does an infinity, also where the
//   product should be infinite: callers look for them among FP16 operands first (finite) and take
//   another way.
//
//   No torch here: this file and its users (amx.cpp, vector_tiles.cpp, the plain twin of
//   tests/cpp/tiles_test.cpp) are pointers and sizes.

#include <cstdint>

// Which compilers know the instructions.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HALFSTEP_AMX 1
#endif

namespace halfstep::cpu {

/// A block is 32 lines x 32 of the inner dimension, 4 bytes each. The matrix unit has it in four
/// tiles of 16 lines: upper and lower half of the high parts, then of the low parts. A panel is
/// blocks along the inner dimension.
constexpr int64_t kTileBlock = 32;
constexpr int64_t kBlockBytes = 2 * 2 * kTileBlock * kTileBlock;

/// Lines of an operand (rows of a, columns of b) and what runs along each, the inner dimension.
/// Strides in elements; one of them is 1. FP16 or FP32.
struct TileMatrix {
  const void* data;
  bool half;
  int64_t line_stride, inner_stride;
};

struct TileKernels {
  /// Whether `count` halves are all finite; null where that does not matter.
  bool (*finite)(const void* halves, int64_t count);
  /// `lines` of at most kTileBlock lines from `line` on, `count` of the inner dimension from
  /// `inner` on, as the panel of operand a or b; what is missing in the last block is zero.
  void (*pack)(const TileMatrix& matrix, int64_t line, int64_t lines, int64_t inner, int64_t count,
               bool is_b, char* panel);
  /// c[32, 32] (+)= the product of two panels of `blocks` blocks, which is summed by itself first:
  /// what c holds takes no digits from it. exact: with al bl. Between enter and leave on the same
  /// thread.
  void (*multiply)(const char* a, const char* b, int64_t blocks, bool exact, float* c,
                   int64_t c_stride, bool add);
  void (*enter)();
  void (*leave)();
};

/// amx.cpp, where HALFSTEP_AMX is defined.
extern const TileKernels kAmxTiles;

}  // namespace halfstep::cpu
