#include "math/split16.h"

#include <cmath>
#include <random>
#include <vector>

#include "catch.h"

using namespace halfstep::math;

namespace {

float half_trip(float master) {
  const float h = half_to_float(float_to_half(master));
  const int32_t remainder = remainder_half(master, h);
  REQUIRE(remainder == int16_t(remainder));
  return join_half(h, remainder);
}

float bfloat_trip(float master) {
  const int32_t h = int16_t(bfloat_away(master));
  const int32_t remainder = remainder_bfloat(master, h);
  REQUIRE(remainder == int16_t(remainder));
  return join_bfloat(h, remainder);
}

bool same_bits(float a, float b) { return bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b); }

}  // namespace

TEST_CASE("split16 FP16: lossless from 2^-16 to 65520", "[math]") {
  std::mt19937 random(2);
  int wrong = 0;
  for (int i = 0; i < 10'000'000; ++i) {
    const float x = bit_cast<float>(uint32_t(random()));
    const float magnitude = std::fabs(x);
    if (!(magnitude >= 0x1p-16f && magnitude < 65520.0f)) continue;
    const float h = half_to_float(float_to_half(x));
    wrong += !same_bits(join_half(h, int32_t(int16_t(remainder_half(x, h)))), x);
  }
  CHECK(wrong == 0);
}

TEST_CASE("split16 FP16: the corners around every half", "[math]") {
  int wrong = 0;
  for (uint32_t bits = 1; bits < 0x7c00; ++bits) {
    const float h = half_to_float(uint16_t(bits)), next = half_to_float(uint16_t(bits + 1));
    const float middle = std::isinf(next) ? 65519.996f : h + (next - h) / 2;
    for (const float x : {h, std::nextafter(h, 0.0f), std::nextafter(h, 1e6f), middle,
                          std::nextafter(middle, 0.0f), std::nextafter(middle, 65519.0f)})
      for (const float master : {x, -x}) {
        if (std::fabs(master) >= 65520.0f) continue;
        const float back = half_trip(master);
        wrong += std::fabs(master) >= 0x1p-16f ? !same_bits(back, master)
                                               : !(std::fabs(back - master) <= 0x1p-40f);
      }
  }
  CHECK(wrong == 0);
}

TEST_CASE("split16 FP16: below 2^-16 the error is at most 2^-40", "[math]") {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(-0x1p-14f, 0x1p-14f);
  float worst = 0;
  for (int i = 0; i < 1'000'000; ++i) {
    const float x = uniform(random) * uniform(random) * 0x1p14f;
    worst = std::max(worst, std::fabs(half_trip(x) - x));
  }
  CHECK(worst <= 0x1p-40f);
  CHECK(worst > 0);
  CHECK(same_bits(half_trip(-0.0f), 0.0f));
}

TEST_CASE("split16 BF16: exact for all that rounds to a finite weight", "[math]") {
  std::mt19937 random(4);
  int wrong = 0, not_nearest = 0;
  for (int i = 0; i < 10'000'000; ++i) {
    const float x = bit_cast<float>(uint32_t(random()));
    if (!(std::fabs(x) < kBfloatLimit)) continue;
    wrong += !same_bits(bfloat_trip(x), x);
    const auto h = uint16_t(bfloat_away(x));
    const bool tie = (bit_cast<uint32_t>(x) & 0xffffu) == 0x8000u;
    not_nearest += !tie && h != float_to_bfloat(x);
  }
  CHECK(wrong == 0);
  CHECK(not_nearest == 0);
}

TEST_CASE("split16 keeps NaN a NaN", "[math]") {
  CHECK(std::isnan(half_trip(NAN)));
  CHECK(std::isnan(bfloat_trip(bit_cast<float>(0x7fffffffu))));
  CHECK(std::isnan(bfloat_trip(bit_cast<float>(0xff800001u))));
}
