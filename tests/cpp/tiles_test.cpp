// Products in tiles (csrc/cpu/tiles): blocking, packing and edges against FP64, by a twin of the
// matrix unit's kernels in plain C++, which runs anywhere, and by the instructions themselves where
// they are.

#include <halfstep/overrides.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "catch.h"
#include "cpu/isa/kernels.h"
#include "cpu/tiles/multiply.h"
#include "math/half.h"

using namespace halfstep::cpu;

namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
uint16_t to_bfloat(float x) { return uint16_t((bits_of(x) + (x == x ? 0x8000 : 0)) >> 16); }
float of_bfloat(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float element(const TileMatrix& m, int64_t line, int64_t inner) {
  const int64_t at = line * m.line_stride + inner * m.inner_stride;
  return m.half ? halfstep::math::half_to_float(static_cast<const uint16_t*>(m.data)[at])
                : static_cast<const float*>(m.data)[at];
}

/// Where line `l` and inner `i` of a block stand in it, in BF16 numbers; the low part is 1,024 on.
int64_t place(int64_t l, int64_t i, bool is_b) {
  const int64_t tile = l / 16 * 512, row = l % 16;
  return tile + (is_b ? i / 2 * 32 + row * 2 + i % 2 : row * 32 + i);
}

void plain_pack(const TileMatrix& m, int64_t line, int64_t lines, int64_t inner, int64_t count,
                bool is_b, char* panel) {
  auto* out = reinterpret_cast<uint16_t*>(panel);
  for (int64_t k = 0; k < count; k += kTileBlock, out += kBlockBytes / 2)
    for (int64_t l = 0; l < kTileBlock; ++l)
      for (int64_t i = 0; i < kTileBlock; ++i) {
        const bool there = l < lines && k + i < count;
        const float x = there ? element(m, line + l, inner + k + i) : 0;
        const uint16_t high = m.half ? uint16_t(bits_of(x) >> 16) : to_bfloat(x);
        out[place(l, i, is_b)] = high;
        out[place(l, i, is_b) + 1024] = to_bfloat(x - of_bfloat(high));
      }
}

void plain_multiply(const char* a, const char* b, int64_t blocks, bool exact, float* c,
                    int64_t c_stride, bool add) {
  const auto* x = reinterpret_cast<const uint16_t*>(a);
  const auto* y = reinterpret_cast<const uint16_t*>(b);
  for (int64_t r = 0; r < kTileBlock; ++r)
    for (int64_t s = 0; s < kTileBlock; ++s) {
      float sum = 0;
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t part = 0; part < 4; ++part) {
          if (part == 3 && !exact) continue;
          const int64_t first = block * (kBlockBytes / 2);
          for (int64_t i = 0; i < kTileBlock; ++i)
            sum += of_bfloat(x[first + (part & 1) * 1024 + place(r, i, false)]) *
                   of_bfloat(y[first + (part >> 1) * 1024 + place(s, i, true)]);
        }
      c[r * c_stride + s] = add ? c[r * c_stride + s] + sum : sum;
    }
}

const TileKernels kPlainTiles = {nullptr, plain_pack, plain_multiply, [] {}, [] {}};

/// In one thread, in an order that no kernel may rely on.
const auto backwards = [](int64_t count, const auto& body) {
  for (int64_t i = count; i-- > 0;) body(i, i + 1);
};

struct Matrix {
  std::vector<uint16_t> halves;
  std::vector<float> floats;
  bool half, inner_contiguous;
  int64_t lines, inner, stride;

  Matrix(int64_t l, int64_t i, bool h, bool contiguous)
      : half(h),
        inner_contiguous(contiguous),
        lines(l),
        inner(i),
        stride((contiguous ? i : l) + 3) {
    const size_t size = size_t((contiguous ? l : i) * stride);
    h ? halves.resize(size, 0x7E00) : floats.resize(size, NAN);  // what is not read is NaN
  }
  int64_t at(int64_t l, int64_t i) const {
    return inner_contiguous ? l * stride + i : i * stride + l;
  }
  template <class Value>
  void fill(Value value) {
    for (int64_t l = 0; l < lines; ++l)
      for (int64_t i = 0; i < inner; ++i)
        if (half)
          halves[size_t(at(l, i))] = halfstep::math::float_to_half(float(value()));
        else
          floats[size_t(at(l, i))] = float(value());
  }
  TileMatrix view() const {
    const void* data = half ? static_cast<const void*>(halves.data()) : floats.data();
    return {data, half, inner_contiguous ? stride : 1, inner_contiguous ? 1 : stride};
  }
  double value(int64_t l, int64_t i) const { return double(element(view(), l, i)); }
};

/// c = (3 +) a b in rows of n + 5 numbers, those beside the matrix 3; or a b taken piece by piece.
std::vector<float> product_of(const TileKernels& kernels, const Matrix& a, const Matrix& b,
                              bool add, bool pieces = false, int64_t threads = 2) {
  const int64_t m = a.lines, n = b.lines, k = a.inner, stride = n + 5;
  std::vector<float> c(size_t(m * stride), 3.0F);
  std::vector<char> memory(size_t(packed_bytes(n, k)) + 64);
  char* packed = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  const TileProduct product{
      m, n, k, a.view(), b.view(), pieces ? nullptr : c.data(), pieces ? 0 : stride, add};
  pack_b(kernels, product.b, n, k, packed, backwards);
  alignas(64) static float scratch[kScratch];
  std::fill(scratch, scratch + kScratch, NAN);
  multiply_packed(
      kernels, product, packed, threads, backwards, [&] { return scratch; },
      [&](const TileResult& r) {
        for (int64_t i = 0; i < r.rows; ++i)
          for (int64_t j = 0; j < r.columns; ++j)
            c[size_t((r.row + i) * stride + r.column + j)] = r.data[i * r.stride + j];
      });
  return c;
}

/// The largest error over the sum of magnitudes.
double error_of(const TileKernels& kernels, const Matrix& a, const Matrix& b, bool add,
                bool pieces = false) {
  const int64_t m = a.lines, n = b.lines, k = a.inner, stride = n + 5;
  const std::vector<float> c = product_of(kernels, a, b, add, pieces);
  double worst = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double want = add ? 3 : 0, magnitude = want;
      for (int64_t l = 0; l < k; ++l) {
        const double term = a.value(i, l) * b.value(j, l);
        want += term;
        magnitude += std::abs(term);
      }
      const double off = std::abs(double(c[size_t(i * stride + j)]) - want);
      const double error = off == 0 ? 0 : off / magnitude;
      if (!(error <= worst)) worst = error;  // NaN too
    }
    for (int64_t j = n; j < stride; ++j)
      REQUIRE(c[size_t(i * stride + j)] == 3.0F);  // beside the matrix
  }
  return worst;
}

/// of_wide: the error that FP32 operands may have.
void check(const TileKernels& kernels, double of_wide) {
  std::mt19937 random(7);
  const auto uniform = [&] { return std::uniform_real_distribution<float>(-1, 1)(random); };
  const auto eleven_bits = [&] { return float(int(random() % 4095) - 2047); };
  const auto few = [&] { return float(int(random() % 3) - 1); };
  struct Sizes {
    int64_t m, n, k;
  };
  for (const auto [m, n, k] :
       {Sizes{32, 32, 32}, {1, 1, 1}, {33, 31, 257}, {70, 1056, 40}, {5, 48, 1100}, {300, 65, 513}})
    for (const bool a_inner : {true, false})
      for (const bool b_inner : {true, false}) {
        CAPTURE(m, n, k, a_inner, b_inner);
        Matrix a(m, k, true, a_inner), b(n, k, true, b_inner);
        // Sums of 11-bit integers below 2^24: every part of both operands counts, and nothing
        // rounds.
        a.fill(eleven_bits);
        b.fill(few);
        CHECK(error_of(kernels, a, b, false) == 0);
        a.fill(few);
        b.fill(eleven_bits);
        CHECK(error_of(kernels, a, b, true) == 0);
        a.fill(uniform);
        b.fill(uniform);
        CHECK(error_of(kernels, a, b, true) < 1e-6);
        CHECK(error_of(kernels, a, b, false, true) < 1e-6);
        // Subnormal numbers are numbers.
        a.fill([&] { return std::ldexp(eleven_bits(), -24 - 11); });
        CHECK(error_of(kernels, a, b, false) < 1e-6);
        // FP32, on the matrix unit to 16 bits.
        Matrix wide(m, k, false, a_inner);
        wide.fill(uniform);
        CHECK(error_of(kernels, wide, b, false) < of_wide);
      }
}

}  // namespace

TEST_CASE("products in two parts of BF16 are FP32 products of FP16") {
  check(kPlainTiles, 0x1.4p-15);
}

TEST_CASE("the matrix unit gives what its plain twin gives") {
#if defined(HALFSTEP_AMX)
  if (halfstep::cpu_path().find("matrix unit") == std::string::npos) {
    WARN("this CPU has no BF16 matrix unit, or a better one; or it is hidden");
    return;
  }
  check(kAmxTiles, 0x1.4p-15);
  std::mt19937 random(3);
  for (const bool inner : {true, false})
    for (const bool half : {true, false})
      for (const bool is_b : {true, false}) {
        Matrix m(40, 90, half, inner);
        m.fill([&] { return std::ldexp(float(int(random())), -40 + int(random() % 30)); });
        alignas(64) char plain[3 * kBlockBytes], unit[3 * kBlockBytes];
        plain_pack(m.view(), 19, 21, 7, 83, is_b, plain);
        kAmxTiles.pack(m.view(), 19, 21, 7, 83, is_b, unit);
        CAPTURE(inner, half, is_b);
        CHECK(std::memcmp(plain, unit, sizeof plain) == 0);
      }
  for (const int64_t count : {1, 31, 32, 100}) {
    std::vector<uint16_t> halves(size_t(count), 0x7BFF);
    CHECK(kAmxTiles.finite(halves.data(), count));
    for (const uint16_t bad : {0x7C00, 0xFC00, 0x7E01}) {
      halves.back() = bad;
      CHECK(!kAmxTiles.finite(halves.data(), count));
      CHECK(kAmxTiles.finite(halves.data(), count - 1));
    }
  }
#endif
}

TEST_CASE("tasks are whole, within scratch memory, and even over threads") {
  for (int64_t strips = 1; strips <= 200; ++strips)
    for (const int64_t groups : {1, 2, 3, 7, 20})
      for (const int64_t threads : {1, 2, 3, 7, 64}) {
        CAPTURE(strips, groups, threads);
        const int64_t parts = parts_of(strips, groups, threads);
        REQUIRE((parts >= 1 && parts <= strips));        // none is empty
        REQUIRE((strips + parts - 1) / parts <= kPart);  // what scratch memory is for
        const auto longest = [&](int64_t count) {
          return (groups * count + threads - 1) / threads * ((strips + count - 1) / count);
        };
        REQUIRE(longest(parts) <= longest((strips + kPart - 1) / kPart));
      }
  CHECK(parts_of(8, 1, 2) == 2);  // 256 rows by up to 512 columns: a half for each of two threads
  for (int64_t panels = 1; panels <= 200; ++panels) {
    const int64_t groups = (panels + kGroup - 1) / kGroup;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t size = panels * (g + 1) / groups - panels * g / groups;
      REQUIRE((size >= 1 && size <= kGroup));
    }
  }
}

TEST_CASE("vector tiles sum by FMA, the same bits on AVX2 and AVX-512") {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    WARN("this CPU has no AVX2");
    return;
  }
  std::vector<const TileKernels*> found = {kKernelsAvx2.vector_tiles};
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found.push_back(kKernelsAvx512.vector_tiles);
  CHECK(kKernelsDefault.vector_tiles == nullptr);
  std::mt19937 random(11);
  const auto value = [&] {
    return std::ldexp(float(int(random() % 4095) - 2047), -int(random() % 30));
  };
  for (const TileKernels* kernels : found) {
    REQUIRE(kernels != nullptr);
    check(*kernels, 1e-6);
    for (const bool half : {true, false})
      for (const bool inner : {true, false}) {
        const int64_t m = 45, n = 77, k = 1100;  // three depths, the last of 76
        Matrix a(m, k, half, inner), b(n, k, true, !inner);
        a.fill(value);
        b.fill(value);
        for (const bool add : {true, false}) {
          const std::vector<float> c = product_of(*kernels, a, b, add);
          for (const int64_t threads : {1, 3, 16})
            REQUIRE(product_of(*kernels, a, b, add, false, threads) == c);
          for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) {
              float sum = 0;
              for (int64_t first = 0; first < k; first += kDepth) {
                float part = 0;
                for (int64_t l = first; l < std::min(k, first + kDepth); ++l)
                  part = std::fma(float(a.value(i, l)), float(b.value(j, l)), part);
                sum = first == 0 ? (add ? 3 + part : part) : sum + part;
              }
              REQUIRE(bits_of(c[size_t(i * (n + 5) + j)]) == bits_of(sum));
            }
        }
      }
    // Infinities and NaN are numbers like others.
    Matrix a(40, 70, true, true), b(40, 70, true, false);
    a.fill(value);
    b.fill([] { return 0.0F; });
    a.halves[size_t(a.at(3, 69))] = 0x7C00;
    b.halves[size_t(b.at(5, 69))] = 0x3C00;
    const std::vector<float> c = product_of(*kernels, a, b, false);
    for (int64_t i = 0; i < 40; ++i)
      for (int64_t j = 0; j < 40; ++j) {
        const float x = c[size_t(i * 45 + j)];
        REQUIRE((i == 3 ? (j == 5 ? x == INFINITY : std::isnan(x)) : std::isfinite(x)));
      }
  }
#else
  WARN("only on x86");
#endif
}
