// rope:  pairs (a, b) of a row turn by an angle each: (a cos - b sin, b cos + a sin); `inverse` by
// the negative angle.
//   A pair is (i, half + i), or (2i, 2i + 1) where interleaved. What lies after the pairs is
//   copied. FP16, BF16, FP32 (in FP32), FP64; tables of any dtype; out may be x itself. One read
//   and one write an element; a table is read once for each row that it turns. Each sum of products
//   is rounded once, then to the dtype: the bits of all instruction sets and of the device agree.
// Tests: tests/python/test_rope.py, tests/cpp/rope_test.cpp.

#include "rope.h"

#include "rows.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

/// Elements 0, 2, 4, … (kOdd: 1, 3, 5, …) of two registers in a row.
template <bool kOdd, class N>
HALFSTEP_FN N every_other(N a, N b) {
  constexpr int o = kOdd;
  if constexpr (sizeof(N) / sizeof(a[0]) == 16)
    return __builtin_shufflevector(a, b, o, o + 2, o + 4, o + 6, o + 8, o + 10, o + 12, o + 14,
                                   o + 16, o + 18, o + 20, o + 22, o + 24, o + 26, o + 28, o + 30);
  else if constexpr (sizeof(N) / sizeof(a[0]) == 8)
    return __builtin_shufflevector(a, b, o, o + 2, o + 4, o + 6, o + 8, o + 10, o + 12, o + 14);
  else if constexpr (sizeof(N) / sizeof(a[0]) == 4)
    return __builtin_shufflevector(a, b, o, o + 2, o + 4, o + 6);
  else
    return __builtin_shufflevector(a, b, o, o + 2);
}
/// a0 b0 a1 b1 …: the first (kSecond: the second) register's worth.
template <bool kSecond, class N>
HALFSTEP_FN N merged(N a, N b) {
  constexpr int w = int(sizeof(N) / sizeof(a[0])), o = kSecond ? w / 2 : 0;
  if constexpr (w == 16)
    return __builtin_shufflevector(a, b, o, o + w, o + 1, o + 1 + w, o + 2, o + 2 + w, o + 3,
                                   o + 3 + w, o + 4, o + 4 + w, o + 5, o + 5 + w, o + 6, o + 6 + w,
                                   o + 7, o + 7 + w);
  else if constexpr (w == 8)
    return __builtin_shufflevector(a, b, o, o + w, o + 1, o + 1 + w, o + 2, o + 2 + w, o + 3,
                                   o + 3 + w);
  else if constexpr (w == 4)
    return __builtin_shufflevector(a, b, o, o + w, o + 1, o + 1 + w);
  else
    return __builtin_shufflevector(a, b, o, o + w);
}

/// Thirty-two elements at `from` as sixteen pairs, and back.
template <class E, bool kInterleaved>
struct Pairs {
  using V = typename E::V;
  V a, b;
  HALFSTEP_FN Pairs(const void* from, int64_t first, int64_t second) {
    a = E::load(from, first);
    b = E::load(from, second);
    if constexpr (kInterleaved) {
      const V x = a, y = b;
      constexpr int n = V::kPieces;
      for (int k = 0; k < n; ++k) {
        const auto low = 2 * k < n ? x.piece[2 * k % n] : y.piece[2 * k % n];
        const auto high = 2 * k + 1 < n ? x.piece[(2 * k + 1) % n] : y.piece[(2 * k + 1) % n];
        a.piece[k] = every_other<false>(low, high);
        b.piece[k] = every_other<true>(low, high);
      }
    }
  }
  HALFSTEP_FN void store(void* to, int64_t first, int64_t second) const {
    V x = a, y = b;
    if constexpr (kInterleaved) {
      constexpr int n = V::kPieces;
      for (int k = 0; k < n; ++k) {
        (2 * k < n ? x : y).piece[2 * k % n] = merged<false>(a.piece[k], b.piece[k]);
        (2 * k + 1 < n ? x : y).piece[(2 * k + 1) % n] = merged<true>(a.piece[k], b.piece[k]);
      }
    }
    E::store(to, first, x);
    E::store(to, second, y);
  }
};

template <class V>
HALFSTEP_FN V load_table(const void* table, Dtype dtype, int64_t i, Whole) {
  return load_any<V>(table, dtype, i);
}
template <class V>
HALFSTEP_FN V load_table(const void* table, Dtype dtype, int64_t i, Part part) {
  alignas(64) char padded[kLanes * 8] = {};
  const int64_t size = dtype_size(dtype);
  __builtin_memcpy(padded, static_cast<const char*>(table) + i * size, size_t(part.count * size));
  return load_any<V>(padded, dtype, 0);
}

template <class E, bool kInterleaved>
HALFSTEP_FN void rotate_row(const RopeRows& r, const char* x, char* out, const void* cos,
                            const void* sin) {
  using V = typename E::V;
  const V sign = broadcast<V>(r.inverse ? -1 : 1);
  for_each_pack(
      r.half, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const V c = load_table<V>(cos, r.table_dtype, i, lanes);
        const V s = load_table<V>(sin, r.table_dtype, i, lanes) * sign;
        if constexpr (std::is_same_v<decltype(lanes), Whole>) {
          const int64_t first = kInterleaved ? 2 * i : i,
                        second = kInterleaved ? 2 * i + kLanes : r.half + i;
          Pairs<E, kInterleaved> pairs(x, first, second);
          math::rotate(pairs.a, pairs.b, c, s);
          pairs.store(out, first, second);
        } else {
          alignas(64) char copy[2 * kLanes * E::size] = {};
          const auto each = [&](const auto& body) __attribute__((always_inline)) {
            if constexpr (kInterleaved) {
              body(0, 2 * i, 2 * lanes.count);
            } else {
              body(0, i, lanes.count);
              body(kLanes, r.half + i, lanes.count);
            }
          };
          each([&](int64_t at, int64_t from, int64_t n) {
            __builtin_memcpy(copy + at * E::size, x + from * E::size, size_t(n * E::size));
          });
          Pairs<E, kInterleaved> pairs(copy, 0, kLanes);
          math::rotate(pairs.a, pairs.b, c, s);
          pairs.store(copy, 0, kLanes);
          each([&](int64_t at, int64_t to, int64_t n) {
            __builtin_memcpy(out + to * E::size, copy + at * E::size, size_t(n * E::size));
          });
        }
      });
  if (r.width > 2 * r.half && x != out)
    __builtin_memcpy(out + 2 * r.half * E::size, x + 2 * r.half * E::size,
                     size_t((r.width - 2 * r.half) * E::size));
}

/// Row by row; along the innermost dimension offsets grow by their strides.
template <class E, bool kInterleaved>
void rotate_rows(const RopeRows& r, int64_t begin, int64_t end) {
  const int64_t table = dtype_size(r.table_dtype);
  const auto* x = static_cast<const char*>(r.x);
  auto* out = static_cast<char*>(r.out);
  const auto* cos = static_cast<const char*>(r.cos);
  const auto* sin = static_cast<const char*>(r.sin);
  const int inner = r.layout.dims - 1;
  const int64_t run = inner < 0 ? 1 : r.layout.size[inner].size;
  for (int64_t row = begin; row < end;) {
    int64_t at[4];
    row_offsets(r.layout, row, at);
    const int64_t left = run - row % run, stop = left < end - row ? row + left : end;
    for (; row < stop; ++row) {
      rotate_row<E, kInterleaved>(r, x + at[0] * E::size, out + at[1] * E::size,
                                  cos + at[2] * table, sin + at[3] * table);
      if (inner >= 0)
        for (int t = 0; t < 4; ++t) at[t] += r.layout.stride[t][inner];
    }
  }
}

void rotate(const RopeRows& all, int64_t begin, int64_t end) {
  with_elements(all.dtype, [&](auto elements) {
    using E = decltype(elements);
    all.interleaved ? rotate_rows<E, true>(all, begin, end)
                    : rotate_rows<E, false>(all, begin, end);
  });
}

}  // namespace

const RopeKernels kRope = {rotate};

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
