#include "math/half.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>
#include <random>

#include "catch.h"

using namespace halfstep::math;

TEST_CASE("every half widens exactly and comes back", "[math]") {
  int wrong_value = 0, wrong_bits = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto h = uint16_t(bits);
    const float ours = half_to_float(h);
    const float theirs = float(c10::Half(h, c10::Half::from_bits()));
    if (std::isnan(theirs)) {
      wrong_value += !std::isnan(ours);
      wrong_bits += float_to_half(ours) != (h | 0x200u);  // a NaN becomes quiet, payload kept
    } else {
      wrong_value += std::memcmp(&ours, &theirs, 4) != 0;
      wrong_bits += float_to_half(ours) != h;
    }
  }
  CHECK(wrong_value == 0);
  CHECK(wrong_bits == 0);
}

TEST_CASE("float to half rounds to nearest even, as c10 does", "[math]") {
  std::mt19937 random(1);
  int wrong = 0, wrong_bfloat = 0;
  for (int i = 0; i < 10'000'000; ++i) {
    const float x = bit_cast<float>(uint32_t(random()));
    if (std::isnan(x)) continue;
    wrong += float_to_half(x) != c10::Half(x).x;
    wrong_bfloat += float_to_bfloat(x) != c10::BFloat16(x).x;
  }
  CHECK(wrong == 0);
  CHECK(wrong_bfloat == 0);
}

TEST_CASE("the limits of FP16", "[math]") {
  CHECK(half_to_float(float_to_half(65519.99f)) == 65504.0f);
  CHECK(std::isinf(half_to_float(float_to_half(65520.0f))));
  CHECK(float_to_half(0x1p-25f) == 0);                               // a tie, to even
  CHECK(half_to_float(float_to_half(0x1.000002p-25f)) == 0x1p-24f);  // just above it
  CHECK(float_to_half(-0.0f) == 0x8000);
}

TEST_CASE("rounding a double to odd makes the second rounding exact", "[math]") {
  // Just above the tie 1 + 2^-11: FP32 would round it onto the tie, and FP16 then down to 1.
  const double x = 1 + 0x1p-11 + 0x1p-40;
  CHECK(float_to_half(float(x)) == float_to_half(1.0f));
  CHECK(half_to_float(float_to_half(round_to_odd(x))) == 1 + 0x1p-10f);
  CHECK(round_to_odd(-x) == -round_to_odd(x));
  CHECK(round_to_odd(0.5) == 0.5f);
}
