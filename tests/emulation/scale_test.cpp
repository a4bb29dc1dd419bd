#include "../../cuda/scale.cu"

#include "../cpp/catch.h"
#include "tensors.h"

using namespace halfstep;
using emulation::Buffer;

namespace {

Buffer<double>& policy() {
  static Buffer<double> numbers(math::kPolicyEntries, 0.0);
  numbers[math::kPolicyKind] = double(math::PolicyKind::kDynamic);
  numbers[math::kPolicyInitScale] = 1024;
  numbers[math::kPolicyGrowthFactor] = 2;
  numbers[math::kPolicyBackoffFactor] = 0.5;
  numbers[math::kPolicyGrowthInterval] = 3;
  numbers[math::kPolicyMinScale] = 1;
  numbers[math::kPolicyMaxScale] = 0x1p24;
  numbers[math::kPolicyHysteresis] = 2;
  return numbers;
}

}  // namespace

TEST_CASE("the device's state machine walks as the host's", "[scale]") {
  emulation::reset();
  std::mt19937 random(3);
  const int steps = 400;
  Buffer<float> flags(size_t(steps), 0.0f), scale(1, 0.0f);
  for (int i = 0; i < steps; ++i)
    flags[size_t(i)] = random() % 4 == 0 ? (i % 2 ? 2.0f : NAN) : 0.0f;
  Buffer<double> state(math::kStateEntries, -1.0), scales(size_t(steps), 0.0);
  cuda::init_scale_state(policy().data(), state.data(), nullptr);
  double host[math::kStateEntries];
  math::init_scale_state(policy().data(), host);
  CHECK(std::memcmp(host, state.data(), sizeof(host)) == 0);
  cuda::simulate_scale(flags.data(), steps, policy().data(), state.data(), scales.data(), nullptr);
  for (int i = 0; i < steps; ++i) {
    const cuda::Scalar flag = {flags.data() + i, false};
    cuda::update_scale(scale.data(), state.data(), flag, policy().data(), nullptr, {}, nullptr);
    math::update_scale(policy().data(), host, flags[size_t(i)] != 0);
    REQUIRE(std::memcmp(host, state.data(), sizeof(host)) == 0);
    REQUIRE(scales[size_t(i)] == host[math::kStateScale]);
    REQUIRE(scale[0] == float(host[math::kStateScale]));
  }
  Buffer<double> wide(1, NAN);
  cuda::update_scale(scale.data(), state.data(), {wide.data(), true}, policy().data(), nullptr, {},
                     nullptr);
  CHECK(state[math::kStateLastFoundInf] == 1);
  CHECK(emulation::state().errors.empty());
}
