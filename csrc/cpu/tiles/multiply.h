#pragma once

// c (+)= a b by the kernels of tiles.h: packing, blocking, edges. `parallel(count, body(begin,
// end))` divides [0, count) over threads.
//
//   b is packed once, in panels of kDepth of the inner dimension: a group of panels is at most
//   1 MiB, which the second cache of the CPUs that have the unit holds twice, and is used for all
//   strips of a that a thread has. c is read and written once for each kDepth. An element's order
//   of summation depends on the inner dimension alone.

#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace halfstep::cpu {

constexpr int64_t kDepth = 512;
constexpr int64_t kGroup = 16;  // panels of b, at most
constexpr int64_t kPart = 8;    // strips of a, at most
/// Rows of scratch memory are not a power of two apart, or 32 of them would share two sets of a
/// cache.
constexpr int64_t kScratchStride = kGroup * kTileBlock + 16;
constexpr int64_t kScratch = kPart * kTileBlock * kScratchStride;  // FP32 numbers

constexpr int64_t blocks_of(int64_t count) { return (count + kTileBlock - 1) / kTileBlock; }
/// Bytes of a packed operand.
constexpr int64_t packed_bytes(int64_t lines, int64_t inner) {
  return blocks_of(lines) * blocks_of(inner) * kBlockBytes;
}

/// c [m, n] in FP32, its rows contiguous, c_stride elements apart; without c the results live in
/// scratch memory until they are taken.
struct TileProduct {
  int64_t m, n, k;
  TileMatrix a, b;
  float* c = nullptr;
  int64_t c_stride = 0;
  bool add = false;
};

/// Rows x columns of the result from (row, column) on, rows `stride` numbers apart.
struct TileResult {
  int64_t row, rows, column, columns;
  float* data;
  int64_t stride;
};

/// The panels of one depth lie together.
inline char* panel_of(char* packed, int64_t n, int64_t k, int64_t panel, int64_t inner) {
  const int64_t blocks = blocks_of(std::min(kDepth, k - inner));
  return packed + (blocks_of(n) * (inner / kTileBlock) + panel * blocks) * kBlockBytes;
}

template <class Parallel>
void pack_b(const TileKernels& kernels, const TileMatrix& b, int64_t n, int64_t k, char* packed,
            const Parallel& parallel) {
  const int64_t panels = blocks_of(n), depths = (k + kDepth - 1) / kDepth;
  parallel(panels * depths, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i % panels, inner = i / panels * kDepth, line = panel * kTileBlock;
      kernels.pack(b, line, std::min(kTileBlock, n - line), inner, std::min(kDepth, k - inner),
                   true, panel_of(packed, n, k, panel, inner));
    }
  });
}

/// One 32 x 32 block of c, of which rows x columns are there.
inline void multiply_edge(const TileKernels& kernels, const char* a, const char* b, int64_t blocks,
                          bool exact, float* c, int64_t c_stride, bool add, int64_t rows,
                          int64_t columns) {
  alignas(64) float whole[kTileBlock * kTileBlock] = {};
  const size_t bytes = size_t(columns) * sizeof(float);
  if (add)
    for (int64_t r = 0; r < rows; ++r) std::memcpy(whole + r * kTileBlock, c + r * c_stride, bytes);
  kernels.multiply(a, b, blocks, exact, whole, kTileBlock, add);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(c + r * c_stride, whole + r * kTileBlock, bytes);
}

/// Between its start and its end this thread may multiply.
class TileSession {
 public:
  explicit TileSession(const TileKernels& kernels) : kernels_(kernels) { kernels_.enter(); }
  ~TileSession() { kernels_.leave(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

 private:
  const TileKernels& kernels_;
};

/// How many parts strips of a are divided into, so that groups x parts tasks keep all threads busy
/// to the end.
inline int64_t parts_of(int64_t strips, int64_t groups, int64_t threads) {
  const int64_t least = (strips + kPart - 1) / kPart;
  const auto longest = [&](int64_t parts) {  // strips of the thread that has most
    return (groups * parts + threads - 1) / threads * ((strips + parts - 1) / parts);
  };
  int64_t best = least;
  for (int64_t parts = least + 1; parts <= std::min(strips, least + threads); ++parts)
    if (longest(parts) < longest(best)) best = parts;
  return best;
}

/// `packed`: b, by pack_b. `threads`: how many `parallel` has. scratch(): kScratch numbers of the
/// calling thread's, aligned to 64 bytes. take(TileResult) is called once for each piece of a
/// result without c, by the thread that has it.
template <class Parallel, class Scratch, class Take>
void multiply_packed(const TileKernels& kernels, const TileProduct& p, char* packed,
                     int64_t threads, const Parallel& parallel, const Scratch& scratch,
                     const Take& take) {
  const bool exact = p.a.half && p.b.half;
  const int64_t strips = blocks_of(p.m), panels = blocks_of(p.n);
  const int64_t groups = (panels + kGroup - 1) / kGroup;
  const int64_t parts = parts_of(strips, groups, threads);
  parallel(groups * parts, [&](int64_t begin, int64_t end) {
    alignas(64) char a[kDepth / kTileBlock * kBlockBytes];
    const TileSession session(kernels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / parts, part = task % parts;
      const int64_t first_panel = panels * group / groups;
      const int64_t last_panel = panels * (group + 1) / groups;
      const int64_t first_strip = strips * part / parts;
      const int64_t last_strip = strips * (part + 1) / parts;
      const int64_t row = first_strip * kTileBlock, column = first_panel * kTileBlock;
      float* const base = p.c ? p.c + row * p.c_stride + column : scratch();
      const int64_t stride = p.c ? p.c_stride : kScratchStride;
      for (int64_t inner = 0; inner < p.k; inner += kDepth) {
        const int64_t depth = std::min(kDepth, p.k - inner), blocks = blocks_of(depth);
        const bool add = p.add || inner > 0;
        for (int64_t s = first_strip; s < last_strip; ++s) {
          const int64_t rows = std::min(kTileBlock, p.m - s * kTileBlock);
          kernels.pack(p.a, s * kTileBlock, rows, inner, depth, false, a);
          for (int64_t j = first_panel; j < last_panel; ++j) {
            const int64_t columns = std::min(kTileBlock, p.n - j * kTileBlock);
            const char* const b = panel_of(packed, p.n, p.k, j, inner);
            float* const c =
                base + (s - first_strip) * kTileBlock * stride + (j - first_panel) * kTileBlock;
            if (!p.c || (rows == kTileBlock && columns == kTileBlock))
              kernels.multiply(a, b, blocks, exact, c, stride, add);
            else
              multiply_edge(kernels, a, b, blocks, exact, c, stride, add, rows, columns);
          }
        }
      }
      if (!p.c)
        take(TileResult{row, std::min(p.m, last_strip * kTileBlock) - row, column,
                        std::min(p.n, last_panel * kTileBlock) - column, base, stride});
    }
  });
}

}  // namespace halfstep::cpu
