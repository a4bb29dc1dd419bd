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
    const double error = ulps(f(x), exact(x));
    if (!(error <= most)) most = error;  // NaN too
  }
  return most;
}

double phi(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }
double density(double x) { return std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI); }

}  // namespace

TEST_CASE("exp is within 1.05 ULP and ends just above FP32's subnormal numbers", "[math]") {
  const auto exact = [](double x) { return std::exp(x); };
  CHECK(worst(math::exp<float>, exact, -86.49f, 88.7f) < 1.05);
  for (const float x : {-86.5f, -87.3f, -90.0f, -104.0f, -1e30f}) CHECK(math::exp(x) == 0);
  CHECK(worst(math::exp<float>, exact, -1e-3f, 1e-3f) < 1);
  CHECK(math::exp(0.0f) == 1);
  CHECK(math::exp(-INFINITY) == 0);
  CHECK(math::exp(INFINITY) == INFINITY);
  CHECK(math::exp(88.73f) == INFINITY);
  CHECK(std::isnan(math::exp(NAN)));
  CHECK(math::exp(1.5) == std::exp(1.5));
}

TEST_CASE("exp_negative is exp without what lies above 0", "[math]") {
  const auto exact = [](double x) { return std::exp(x); };
  for (const float x : {0.0f, -1e-3f, -0.7f, -17.3f, -86.49f, -86.5f, -1e30f, -INFINITY})
    CHECK(math::exp_negative(x) == math::exp(x));
  CHECK(worst(math::exp_negative<true, float>, exact, -86.49f, 0) < 5);
  CHECK(worst(math::exp_negative<true, float>, exact, -20, 0) < 3);
  CHECK(math::exp_negative<true>(0.0f) == 1);
  CHECK(math::exp_negative<true>(-INFINITY) == 0);
  CHECK(std::isnan(math::exp_negative(NAN)));
  CHECK(std::isnan(math::exp_negative<true>(NAN)));
  CHECK(math::exp_negative<true>(-1.5) == std::exp(-1.5));
}

TEST_CASE("the normal distribution keeps its relative precision in the tail", "[math]") {
  CHECK(worst([](float x) { return math::normal(x).below; }, phi, -12.5f, 6) < 6);
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
  CHECK(worst([](float x) { return math::gelu(x); }, [](double x) { return x * phi(x); }, -12, 12) <
        6);
  CHECK(worst([](float x) { return math::silu(x); }, [&](double x) { return x * logistic(x); }, -80,
              80) < 4);
  const auto above = [](float x) { return math::logistic(x).above; };
  CHECK(worst(
            above, [](double x) { return 1 / (1 + std::exp(x)); }, -80, 80) < 3);
  // The argument of the exponential carries |u| 2^-24 of rounding into the result.
  CHECK(worst([](float x) { return math::gelu_tanh(x); }, [&](double x) { return x * gate(x); }, -3,
              12) < 13);
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

TEST_CASE("the forms for FP16 are far closer than FP16 can tell", "[math]") {
  const double unit = 0x1p-20 * 0x1p23;  // 2^-20 in ULP of FP32
  const auto below = [](float x) { return math::normal<true>(x).below; };
  const auto dense = [](float x) { return math::normal<true>(x).density; };
  CHECK(worst(below, phi, -5, 6) < 2 * unit);
  CHECK(worst(dense, density, -5, 5) < 2 * unit);
  CHECK(worst(below, phi, -9.49f, -5) < 8 * unit);
  CHECK(worst(dense, density, 5, 9.49f) < 8 * unit);
  const auto logistic = [](double x) { return 1 / (1 + std::exp(-x)); };
  CHECK(worst([](float x) { return math::logistic<true>(x).below; }, logistic, -86, 86) < unit);
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(-90, 90);
  double most = 0;
  for (int i = 0; i < 100'000; ++i) {
    const float x = uniform(random);
    most = std::max(most, std::fabs(math::logistic<true>(x).above - logistic(-double(x))));
  }
  CHECK(most < 0x1p-22);
}

TEST_CASE("activations at the ends of the range", "[math]") {
  const std::function<float(float)> values[] = {[](float x) { return math::gelu(x); },
                                                [](float x) { return math::gelu_tanh(x); },
                                                [](float x) { return math::silu(x); },
                                                [](float x) { return math::gelu<true>(x); },
                                                [](float x) { return math::gelu_tanh<true>(x); },
                                                [](float x) { return math::silu<true>(x); }};
  for (const auto& f : values) {
    CHECK(f(INFINITY) == INFINITY);
    CHECK(std::isnan(f(-INFINITY)));  // as in torch: an infinity is not hidden
    CHECK(f(-3e38f) == 0);
    CHECK(f(65504.0f) == 65504.0f);
    CHECK(std::isnan(f(NAN)));
  }
  const std::function<float(float)> slopes[] = {
      [](float x) { return math::gelu_slope(x); },
      [](float x) { return math::gelu_tanh_slope(x); },
      [](float x) { return math::silu_slope(x); },
      [](float x) { return math::gelu_slope<true>(x); },
      [](float x) { return math::gelu_tanh_slope<true>(x); },
      [](float x) { return math::silu_slope<true>(x); }};
  for (const auto& f : slopes) {
    for (const float x : {INFINITY, -INFINITY, NAN}) CHECK(std::isnan(f(x)));
    CHECK(f(3e38f) == 1);
    CHECK(f(-3e38f) == 0);
  }
  CHECK(math::relu(-1.0f) == 0);
  CHECK(std::isnan(math::relu(NAN)));
  CHECK(math::relu_slope(0.0f) == 0);
}
