#include "math/functions.h"

#include <cmath>
#include <functional>
#include <random>

#include "catch.h"

using namespace halfstep;

namespace {

/// |got - exact| in units of the last place of the float nearest to `exact`.
double ulps(float got, double exact) {
  const float nearest = float(exact);
  if (std::isnan(exact)) return std::isnan(got) ? 0 : 1e9;
  if (std::isinf(nearest)) return got == nearest ? 0 : 1e9;
  const float magnitude = std::fabs(nearest);
  const double unit =
      magnitude < 0x1p-126f ? 0x1p-149 : std::ldexp(1.0, std::ilogb(magnitude) - 23);
  return std::fabs(double(got) - exact) / unit;
}

double worst(const std::function<float(float)>& f, const std::function<double(double)>& exact,
             float low, float high) {
  double most = 0;
  std::mt19937 random(7);
  std::uniform_real_distribution<float> uniform(low, high);
  for (int i = 0; i < 300'000; ++i) {
    const float x = uniform(random);
    most = std::max(most, ulps(f(x), exact(x)));
  }
  return most;
}

double phi(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }
double density(double x) { return std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI); }

}  // namespace

TEST_CASE("exp is within 1.05 ULP, subnormal results too, and ends where FP32 ends", "[math]") {
  const auto exact = [](double x) { return std::exp(x); };
  CHECK(worst(math::exp<float>, exact, -87, 88.7f) < 1.05);
  CHECK(worst(math::exp<float>, exact, -105, -87) < 1.05);
  CHECK(worst(math::exp<float>, exact, -1e-3f, 1e-3f) < 1);
  CHECK(math::exp(0.0f) == 1);
  CHECK(math::exp(-INFINITY) == 0);
  CHECK(math::exp(INFINITY) == INFINITY);
  CHECK(math::exp(88.73f) == INFINITY);
  CHECK(math::exp(-104.0f) == 0);
  CHECK(std::isnan(math::exp(NAN)));
  CHECK(math::exp(1.5) == std::exp(1.5));
}

TEST_CASE("the normal distribution keeps its relative precision in the tail", "[math]") {
  CHECK(worst([](float x) { return math::normal(x).below; }, phi, -12.5f, 6) < 4.5);
  CHECK(worst([](float x) { return math::normal(x).density; }, density, -12.5f, 12.5f) < 3);
  CHECK(math::normal(-40.0f).below == 0);
  CHECK(math::normal(40.0f).below == 1);
  CHECK(math::normal(0.0f).below == 0.5f);
  CHECK(std::isnan(math::normal(NAN).below));
}

TEST_CASE("activations and their slopes against FP64", "[math]") {
  const auto gate = [](double x) {
    return 1 / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  };
  const auto logistic = [](double x) { return 1 / (1 + std::exp(-x)); };
  CHECK(worst(
            math::gelu<float>, [](double x) { return x * phi(x); }, -12, 12) < 5.5);
  CHECK(worst(
            math::silu<float>, [&](double x) { return x * logistic(x); }, -80, 80) < 4);
  const auto above = [](float x) { return math::logistic(x).above; };
  CHECK(worst(
            above, [](double x) { return 1 / (1 + std::exp(x)); }, -80, 80) < 3);
  // The argument of the exponential carries |u| 2^-24 of rounding into the result.
  CHECK(worst(
            math::gelu_tanh<float>, [&](double x) { return x * gate(x); }, -3, 12) < 12);
  // Slopes pass through zero: absolute there.
  std::mt19937 random(5);
  std::uniform_real_distribution<float> uniform(-10, 10);
  double most = 0;
  for (int i = 0; i < 100'000; ++i) {
    const float x = uniform(random);
    const double s = logistic(x), g = gate(x);
    most = std::max(
        {most, std::fabs(math::gelu_slope(x) - (phi(x) + x * density(x))),
         std::fabs(math::silu_slope(x) - s * (1 + x * (1 - s))),
         std::fabs(math::gelu_tanh_slope(x) - (g + x * g * (1 - g) * 2 * std::sqrt(2 / M_PI) *
                                                       (1 + 3 * 0.044715 * double(x) * x)))});
  }
  CHECK(most < 1e-6);
}

TEST_CASE("activations at the ends of the range", "[math]") {
  for (const auto& f : {math::gelu<float>, math::gelu_tanh<float>, math::silu<float>}) {
    CHECK(f(INFINITY) == INFINITY);
    CHECK(std::isnan(f(-INFINITY)));  // as in torch: an infinity is not hidden
    CHECK(f(-3e38f) == 0);
    CHECK(f(65504.0f) == 65504.0f);
    CHECK(std::isnan(f(NAN)));
  }
  const std::function<float(float)> slopes[] = {[](float x) { return math::gelu_slope(x); },
                                                [](float x) { return math::gelu_tanh_slope(x); },
                                                [](float x) { return math::silu_slope(x); }};
  for (const auto& f : slopes) {
    for (const float x : {INFINITY, -INFINITY, NAN}) CHECK(std::isnan(f(x)));
    CHECK(f(3e38f) == 1);
    CHECK(f(-3e38f) == 0);
  }
  CHECK(math::relu(-1.0f) == 0);
  CHECK(std::isnan(math::relu(NAN)));
  CHECK(math::relu_slope(0.0f) == 0);
}
