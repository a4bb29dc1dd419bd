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

TEST_CASE("what policies see of the gradients does not depend on the order of threads or rows",
          "[scale]") {
  std::mt19937 random(5);
  std::vector<std::vector<double>> tables;
  std::vector<std::unique_ptr<Buffer<double>>> memory;
  for (const int rows : {1, 700, 0, 256}) {
    std::vector<double> table(size_t(rows + 1) * math::kStatColumns, 0.0);
    for (int i = 0; i < rows; ++i) {
      double* row = table.data() + i * math::kStatColumns;
      const double amax = std::ldexp(1.0 + random() % 1000 / 1000.0, int(random() % 30) - 14);
      const double count = double(random() % 5000);
      row[math::kStatCount] = count;
      row[math::kStatZeros] = double(random() % 5000) * (count > 4999 ? 1 : 0);
      row[math::kStatSubnormals] = std::floor(count * (random() % 100 / 100.0));
      row[math::kStatAmax] = count > 0 ? amax : 0;
      row[math::kStatSumSquares] = amax * amax * (count > 0 ? 1 + count * 0.01 : 0);
    }
    tables.push_back(table);
    memory.push_back(std::make_unique<Buffer<double>>(table));
  }
  for (const auto kind : {math::PolicyKind::kLogMax, math::PolicyKind::kOccupancy,
                          math::PolicyKind::kUnderflow, math::PolicyKind::kCustom}) {
    Buffer<double> rule(
        std::vector<double>(policy().data(), policy().data() + math::kPolicyEntries));
    rule[math::kPolicyKind] = double(kind);
    rule[math::kPolicyTarget] = 1e-3;
    rule[math::kPolicyEdge] = 0.125;
    rule[math::kPolicyHeadroom] = 16;
    rule[math::kPolicyLeast] = 1000;
    rule[math::kPolicyMeanDecay] = 0.99;
    rule[math::kPolicyVarianceDecay] = 0.999;
    rule[math::kPolicySigmas] = 3.09;
    rule[math::kPolicyLogMax] = 16;
    math::GradView expected;
    for (const auto& table : tables)
      for (size_t i = 0; i + 1 < table.size() / math::kStatColumns; ++i)
        expected.add(math::view_row(rule.data(), table.data() + i * math::kStatColumns));
    double host[math::kStateEntries];
    math::init_scale_state(rule.data(), host);
    math::update_scale(rule.data(), host, false, expected, 77);
    for (const auto order :
         {emulation::Order::kForward, emulation::Order::kBackward, emulation::Order::kShuffled}) {
      emulation::reset();
      emulation::state().thread_order = order;
      Buffer<math::GradView> view(1, math::GradView());
      for (size_t i = 0; i < memory.size(); ++i)
        cuda::view_stats(memory[i]->data(), int64_t(tables[i].size() / math::kStatColumns) - 1,
                         rule.data(), i == 0, view.data(), nullptr);
      CHECK(std::memcmp(view.data(), &expected, sizeof(expected)) == 0);
      Buffer<double> state(math::kStateEntries, 0.0);
      Buffer<float> scale(1, 0.0f), flag(1, 0.0f);
      Buffer<double> proposal(1, 77.0);
      cuda::init_scale_state(rule.data(), state.data(), nullptr);
      cuda::update_scale(scale.data(), state.data(), {flag.data(), false}, rule.data(), view.data(),
                         {proposal.data(), true}, nullptr);
      CHECK(std::memcmp(host, state.data(), sizeof(host)) == 0);
      CHECK(scale[0] == float(host[math::kStateScale]));
      CHECK(emulation::state().errors.empty());
    }
    if (kind == math::PolicyKind::kCustom) CHECK(host[math::kStateScale] == 77);
  }
  emulation::reset();
}
