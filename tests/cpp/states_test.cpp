// Narrow states and rounding at random, one lane at a time; that all lanes, instruction sets and
// the device give the same bits is shown by tests/python/test_isa.py and
// tests/emulation/optim_test.cpp.

#include "math/states.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "catch.h"

using namespace halfstep::math;

namespace {

constexpr int kCount = 1 << 17;

/// Random bits of elements `first` and on.
std::vector<uint32_t> bits_of(uint32_t key, uint32_t stream, int64_t first = 0) {
  const uint32_t base = random_base(key, stream, first);
  std::vector<uint32_t> bits;
  for (int64_t i = first; i < first + kCount; ++i) bits.push_back(random_bits<uint32_t>(base, i));
  return bits;
}

/// The largest of |mean| of bits, each counted as -1 or 1, in standard deviations.
double worst_bias(const std::vector<uint32_t>& words) {
  double worst = 0;
  for (int bit = 0; bit < 32; ++bit) {
    int64_t sum = 0;
    for (const uint32_t word : words) sum += word >> bit & 1 ? 1 : -1;
    worst = std::max(worst, std::fabs(double(sum)) / std::sqrt(double(words.size())));
  }
  return worst;
}

std::vector<uint32_t> exclusive_or(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b,
                                   size_t shift = 0) {
  std::vector<uint32_t> out;
  for (size_t i = 0; i + shift < a.size(); ++i) out.push_back(a[i] ^ b[i + shift]);
  return out;
}

}  // namespace

TEST_CASE("bits at random are even, and those of different uses agree half of the time", "[math]") {
  const uint32_t key = random_key(5, 1, 0);
  const auto bits = bits_of(key, 1);
  CHECK(worst_bias(bits) < 5);
  CHECK(worst_bias(exclusive_or(bits, bits_of(key, 2))) < 5);                    // streams
  CHECK(worst_bias(exclusive_or(bits, bits_of(random_key(5, 2, 0), 1))) < 5);    // steps
  CHECK(worst_bias(exclusive_or(bits, bits_of(random_key(5, 1, 1), 1))) < 5);    // tensors
  CHECK(worst_bias(exclusive_or(bits, bits_of(key, 1, int64_t(1) << 32))) < 5);  // far elements
  for (const size_t shift : {1, 2, 3, 16, 128})                                  // neighbours
    CHECK(worst_bias(exclusive_or(bits, bits, shift)) < 5);
  std::vector<uint32_t> halves;  // two states share a word
  for (const uint32_t word : bits) halves.push_back(state_dice(0, word) ^ state_dice(1, word));
  for (uint32_t& word : halves) word |= word << 16;
  CHECK(worst_bias(halves) < 5);
}

TEST_CASE("four elements of an int8 block share a hash, each with another byte ahead", "[math]") {
  const uint32_t base = random_base(random_key(5, 1, 0), 1, 0);
  const auto word = [&](int s, int64_t i) { return block_dice<uint32_t>(s, base, i); };
  const auto dice = [&](int s, int64_t i) { return word(s, i) & 0xffff; };
  std::vector<uint32_t> apart;
  for (int64_t i = 0; i < kCount; ++i) {
    if (i % 128 < 32) {
      const uint32_t hash = random_bits<uint32_t>(base, i);
      CHECK(word(0, i) == hash);
      CHECK(word(0, i + 32) == (hash << 8 | hash >> 24));
      CHECK(word(0, i + 64) == (hash << 16 | hash >> 16));
      CHECK(word(0, i + 96) == (hash << 24 | hash >> 8));
    }
    CHECK(word(0, i) == word(1, i ^ 64));
    CHECK(word(2, i) == word(0, i));  // another base
    apart.push_back(dice(0, i) << 16 | dice(1, i));
  }
  CHECK(worst_bias(apart) < 5);
  for (const size_t shift : {1, 16, 32, 64, 96, 128})
    CHECK(worst_bias(exclusive_or(apart, apart, shift)) < 5);
  for (uint32_t& word : apart) word = (word >> 16 ^ (word & 0xffff)) * 0x10001u;
  CHECK(worst_bias(apart) < 5);  // the two states of an element
}

TEST_CASE("codes of neighbours under one hash are rounded nearly independently", "[math]") {
  const uint32_t base = random_base(random_key(7, 1, 0), 1, 0);
  for (const int64_t apart : {32, 64, 96}) {
    for (const int s : {0, 1}) {
      double sums[3] = {};  // of what rounds up, and of both
      int64_t count = 0;
      for (int64_t i = 0; i < kCount; ++i) {
        if (i % 128 + apart >= 128) continue;
        const auto up = [&](int64_t at) {
          return (block_dice<uint32_t>(s, base, at) & 0x7fff) >= 0x5555 ? 1.0 : 0.0;
        };
        const double a = up(i), b = up(i + apart);
        sums[0] += a;
        sums[1] += b;
        sums[2] += a * b;
        ++count;
      }
      const double share = 1 - double(0x5555) / 0x8000;
      const double sd = std::sqrt(share * (1 - share) / double(count));
      CHECK(std::fabs(sums[0] / double(count) - share) < 5 * sd);
      CHECK(std::fabs(sums[1] / double(count) - share) < 5 * sd);
      // A byte that leads in one trails in the other and decides there once in 128 times.
      const double both = sums[2] / double(count) - share * share;
      CHECK(std::fabs(both) < 5 * sd + 1.0 / 128);
    }
  }
}

TEST_CASE("codes at the ends of what a scale holds, whatever is above their random bits",
          "[math]") {
  int wrong = 0;
  for (const uint32_t above : {0u, 0x8000u, 0xffff8000u})
    for (const uint32_t dice : {0u, 1u, 0x4000u, 0x7fffu}) {
      for (const int e : {-110, -3, 0, 60, 121}) {
        const auto code = [&](double y) {
          return encode_state<true>(float(std::ldexp(y, e)), e, above | dice);
        };
        wrong += code(127) != 127 || code(-127) != -127 || code(0) != 0 || code(-0.0) != 0;
        wrong += code(0.5) != (dice >= 0x4000 ? 1 : 0) || code(-0.5) != (dice >= 0x4000 ? 0 : -1);
        wrong += code(126 + 0x1p-15) != (dice == 0x7fff ? 127 : 126);
      }
      for (const int e : {-110, -3, 0, 57}) {
        const auto code = [&](double y) {
          return encode_state<false>(float(std::ldexp(y, e)), e, above | dice);
        };
        wrong += code(254) != 254 || code(0) != 0 || code(0.25) != 1;
        wrong +=
            code(253.5) != (dice >= 0x4000 ? 254 : 253) || code(1.5) != (dice >= 0x4000 ? 2 : 1);
      }
    }
  CHECK(wrong == 0);
}

TEST_CASE("a block's scale is the smallest that holds its largest value", "[math]") {
  std::mt19937 random(3);
  int wrong = 0;
  for (int i = 0; i < 1'000'000; ++i) {
    const float x = std::fabs(bit_cast<float>(uint32_t(random())));
    if (!std::isfinite(x)) continue;
    const auto check = [&](int e, double top) {
      wrong += x > top * std::ldexp(1.0, e);
      wrong += e > kLowestExponent && x <= top * std::ldexp(1.0, e - 1);
      wrong += e < kLowestExponent;
    };
    check(scale_exponent<true>(to_bits(x)), 127);
    check(scale_exponent<false>(to_bits(x)), 254);
  }
  for (const float x : {0.0f, 127.0f, std::nextafter(127.0f, 1000.0f), 3.4028235e38f})
    wrong += double(x) > 127 * std::ldexp(1.0, scale_exponent<true>(to_bits(x)));
  CHECK(scale_exponent<true>(to_bits(127.0f)) == 0);
  CHECK(scale_exponent<true>(to_bits(std::nextafter(127.0f, 1000.0f))) == 1);
  CHECK(scale_exponent<false>(to_bits(254.0f)) == 0);
  CHECK(scale_exponent<true>(0) == kLowestExponent);
  CHECK(wrong == 0);
}

TEST_CASE("int8 codes keep the expected value, zero, and what is not finite", "[math]") {
  const auto bits = bits_of(random_key(1, 1, 1), 1);
  for (const float x : {-126.7f, -3.25f, -0.01f, 0.3f, 100.5f, 127.0f}) {
    double sum = 0;
    for (const uint32_t word : bits)
      sum += decode_state<true, false, float>(encode_state<true>(x, 0, state_dice(0, word)), 0);
    CHECK(std::fabs(sum / kCount - x) < 5 * 0.5 / std::sqrt(kCount));
  }
  int wrong = 0;
  for (const uint32_t word : bits) {
    const uint32_t dice = state_dice(1, word);
    wrong += encode_state<false>(coded_value<false>(1e-12f), 0, dice) != 1;  // never 0 beside an m
    wrong += encode_state<false>(coded_value<false>(0.0f), 0, dice) != 0;
    wrong += encode_state<true>(0.0f, 0, dice) != 0;
    wrong += encode_state<true>(-INFINITY, 3, dice) != -128;
    wrong += encode_state<false>(float(NAN), 3, dice) != 255;
    wrong += encode_state<false>(254.0f, 0, dice) != 254;
    wrong += encode_state<true>(-127.0f, 0, dice) != -127;
  }
  CHECK(wrong == 0);
  CHECK(std::isnan(decode_state<true, false, float>(-128, 0)));
  CHECK(std::isnan(decode_state<false, false, float>(255, 0)));
  CHECK(decode_state<false, false, float>(10, 1) == 400.0f);
}

TEST_CASE("BF16 at random is a neighbour, right on average, and finite where x is", "[math]") {
  const auto bits = bits_of(random_key(2, 1, 1), 1);
  const auto rounded = [](float x, uint32_t dice) {
    return bfloat_to_float(uint16_t(bfloat_at_random(x, dice)));
  };
  for (const float x : {1.001f, -3.3e-5f, 1e-40f, 6.7e30f}) {
    double sum = 0;
    int wrong = 0;
    const float low = bit_cast<float>(to_bits(x) & int32_t(0xffff0000));
    const float high = bit_cast<float>((to_bits(x) & int32_t(0xffff0000)) + 0x10000);
    for (const uint32_t word : bits) {
      const float y = rounded(x, state_dice(0, word));
      wrong += y != low && y != high;
      sum += (double(y) - x) / (double(high) - low);
    }
    CHECK(wrong == 0);
    CHECK(std::fabs(sum / kCount) < 5 * 0.5 / std::sqrt(kCount));
  }
  CHECK(rounded(3.4028235e38f, 0xffff) == 0x1.fep127f);
  CHECK(rounded(-3.4028235e38f, 0xffff) == -0x1.fep127f);
  CHECK(std::isinf(rounded(INFINITY, 0xffff)));
  CHECK(std::isnan(rounded(quiet(bit_cast<float>(0x7f800001)), 0xffff)));
}
