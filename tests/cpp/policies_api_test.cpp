// Policies in C++: each is the Python one, and users write their own.

#include "api.h"

using namespace halfstep;

namespace {

/// A scaler over one parameter whose gradients are told.
struct Loop {
  at::Tensor p = torch::zeros({2}, torch::requires_grad());
  optim::SGD opt{{p}, optim::SGDOptions(0.0)};
  GradScaler scaler;
  explicit Loop(GradScalerOptions options) : scaler(std::move(options)) {
    scaler.scale(torch::ones({}));
  }
  explicit Loop(policies::Rule rule) : Loop(GradScalerOptions().policy(std::move(rule))) {}
  double step(bool bad, float value = 1) {
    p.mutable_grad() = torch::full({2}, bad ? NAN : value);
    scaler.step(opt);
    scaler.update();
    return scaler.get_scale();
  }
};

/// torch's rule in a dozen lines, on the device.
struct Torch : policies::Policy {
  double interval;
  explicit Torch(double interval) : interval(interval) { min_scale = 0x1p-126; }
  policies::Numbers init() const override { return {{"clean", torch::zeros({})}}; }
  at::Tensor update(policies::Numbers& state, const policies::Stats& stats) override {
    const auto bad = stats.found_inf != 0;
    const auto clean = torch::where(bad, 0.0, state["clean"] + 1);
    const auto grow = clean >= interval;
    state["clean"] = torch::where(grow, 0.0, clean);
    return stats.scale * torch::where(bad, 0.5, torch::where(grow, 2.0, 1.0)).to(torch::kFloat);
  }
};

/// The same with numbers.
struct OnHost : Torch {
  using Torch::Torch;
  bool host() const override { return true; }
  double update_host(policies::Numbers& state, const ScalerStats& stats) override {
    auto& clean = state["clean"];
    clean = stats.last_found_inf ? torch::zeros({}) : clean + 1;
    if (stats.last_found_inf) return stats.scale * 0.5;
    if (clean.item<double>() < interval) return stats.scale;
    clean = torch::zeros({});
    return stats.scale * 2;
  }
};

std::vector<bool> string_of(int steps, int one_in, unsigned seed) {
  std::vector<bool> string;
  for (int i = 0; i < steps; ++i) {
    seed = seed * 1664525u + 1013904223u;
    string.push_back((seed >> 16) % unsigned(one_in) == 0);
  }
  return string;
}

}  // namespace

TEST_CASE("torch's rule as a policy of the user is in lock-step", "[policies]") {
  Loop device(GradScalerOptions().policy(std::make_shared<Torch>(4)));
  Loop host(GradScalerOptions().policy(std::make_shared<OnHost>(4)));
  Loop preset(policies::Rule(policies::preset("torch").growth_interval(4)));
  auto string = string_of(400, 5, 1);
  string.insert(string.end(), 200, true);  // to the floor, from where they recover alike
  string.insert(string.end(), 60, false);
  for (const bool bad : string) {
    const double scale = preset.step(bad);
    REQUIRE(device.step(bad) == scale);
    REQUIRE(host.step(bad) == scale);
  }
}

TEST_CASE("a policy's tensors are saved and resumed", "[policies]") {
  const auto string = string_of(60, 4, 2);
  Loop first(GradScalerOptions().policy(std::make_shared<Torch>(3)));
  for (int i = 0; i < 30; ++i) first.step(string[size_t(i)]);
  const StateDict state = first.scaler.state_dict();
  Loop second(GradScalerOptions().policy(std::make_shared<Torch>(3)));
  second.scaler.load_state_dict(state);
  for (size_t i = 30; i < 60; ++i) REQUIRE(first.step(string[i]) == second.step(string[i]));
  Loop other{policies::Rule(policies::Dynamic())};
  CHECK(has(message_of([&] { other.scaler.load_state_dict(state); }),
            "of a Policy of yours but this GradScaler has a policy of halfstep"));
}

TEST_CASE("the scaler keeps what a policy asks for finite and in bounds", "[policies]") {
  struct Says : policies::Policy {
    double answer;
    explicit Says(double answer) : answer(answer) { min_scale = 0.25, max_scale = 1024 * 1024; }
    at::Tensor update(policies::Numbers&, const policies::Stats&) override {
      return torch::tensor(answer, torch::kDouble);
    }
  };
  for (const auto& [answer, scale] : std::vector<std::pair<double, double>>{
           {3, 3}, {0, 65536}, {NAN, 65536}, {INFINITY, 65536}, {1e-9, 0.25}, {1e9, 1024 * 1024}}) {
    Loop loop(GradScalerOptions().policy(std::make_shared<Says>(answer)));
    CHECK(loop.step(false) == scale);
  }
  struct Nothing : policies::Policy {};
  Loop loop(GradScalerOptions().policy(std::make_shared<Nothing>()));
  CHECK(has(message_of([&] { loop.step(false); }), "overrides neither update() nor host()"));
}

TEST_CASE("the skip limit holds, throws or calls", "[policies]") {
  Loop hold{policies::Rule(policies::Dynamic().init_scale(8).min_scale(2).skip_limit(2))};
  for (int i = 0; i < 6; ++i) hold.step(true);
  CHECK(hold.scaler.get_scale() == 2);
  Loop raise{policies::Rule(policies::Dynamic().skip_limit(2).on_limit(policies::OnLimit::kRaise))};
  raise.step(true), raise.step(true);
  CHECK(has(message_of([&] { raise.step(true); }),
            "after 3 skipped steps in a row (skip_limit is 2)"));
  raise.step(false);  // the scaler stands between two iterations
  std::vector<int64_t> told;
  Loop call{policies::Rule(policies::Dynamic().skip_limit(2).on_limit(
      [&](const ScalerStats& stats) { told.push_back(stats.consecutive_skips); }))};
  for (const bool bad : {true, true, false, true, true, true, true}) call.step(bad);
  CHECK(told == std::vector<int64_t>{3, 4});
  Loop floor{policies::Rule(policies::preset("deepspeed_zero"))};
  for (int i = 0; i < 17; ++i) floor.step(true);
  CHECK(has(message_of([&] { floor.step(true); }), "its floor, and the gradients still overflow"));
}

TEST_CASE("the states of other projects go there and back", "[policies]") {
  for (const char* name : {"torch", "apex", "megatron", "deepspeed", "paddle", "modulus"}) {
    const auto rule = [&] {
      auto policy = policies::preset(name).init_scale(1024).growth_interval(5);
      return policies::Rule(policy);
    };
    Loop first(rule()), second(rule());
    const auto string = string_of(80, 7, 3);
    for (size_t i = 0; i < 40; ++i) first.step(string[i]);
    second.scaler.load_state_dict(first.scaler.state_dict(name));
    for (size_t i = 40; i < 80; ++i) REQUIRE(first.step(string[i]) == second.step(string[i]));
  }
  Loop plain{policies::Rule(policies::Dynamic().hysteresis(2))};
  CHECK(has(message_of([&] { plain.scaler.state_dict("megatron"); }),
            "the policy has refill 0 but megatron's is 1"));
  CHECK(has(message_of([&] { plain.scaler.state_dict("onnx"); }), "format is 'onnx'"));
  StateDict apex;
  apex.insert("loss_scaler0", StateDict()).insert("loss_scaler1", StateDict());
  Loop one{policies::Rule(policies::preset("apex"))};
  CHECK(has(message_of([&] { one.scaler.load_state_dict(apex); }), "has 2 scalers"));
}

TEST_CASE("statistics policies see the gradients of the step", "[policies]") {
  Loop occupancy{policies::Rule(policies::Occupancy().init_scale(1024).growth_interval(1))};
  CHECK(occupancy.step(false, 20'000) == 512);
  CHECK(occupancy.step(false, 5'000) == 512);
  CHECK(occupancy.step(false, 1) == 1024);
  auto p = torch::zeros({3000}, torch::requires_grad());
  optim::SGD opt({p}, optim::SGDOptions(0.0));
  GradScaler scaler(GradScalerOptions().policy(policies::Underflow().init_scale(1)));
  scaler.scale(torch::ones({}));
  for (const double scale : {2.0, 4.0, 8.0}) {
    p.mutable_grad() = torch::full({3000}, 1e-6f);
    scaler.step(opt);
    scaler.update();
    CHECK(scaler.get_scale() == scale);
  }
  GradScaler log_max(GradScalerOptions().policy(policies::LogMax().init_scale(4)));
  torch::optim::SGD stock({p}, torch::optim::SGDOptions(0.0));
  log_max.scale(torch::ones({}));
  p.mutable_grad() = torch::full({3000}, 64.0f);  // 16 unscaled: 2^(16 - 4)
  log_max.step(stock);
  log_max.update();
  CHECK(log_max.get_scale() == 4096);
  const StateDict state = log_max.state_dict();
  GradScaler fresh;
  fresh.load_state_dict(state);
  CHECK(fresh.get_scale() == 4096);
}

TEST_CASE("presets are the same numbers in both languages", "[policies]") {
  std::ifstream file(HALFSTEP_FIXTURES "presets.txt");
  std::string name, number;
  int faithful = 0, presets = 0;
  while (file >> name >> faithful) {
    const policies::Rule rule = policies::preset(name, faithful != 0);
    INFO(name << (faithful ? ", faithful" : ""));
    for (size_t i = 0; i < rule.numbers.size(); ++i) {
      REQUIRE(bool(file >> number));
      INFO("entry " << i);
      CHECK(rule.numbers[i] == std::strtod(number.c_str(), nullptr));
    }
    ++presets;
  }
  CHECK(presets == 32);
  CHECK(has(message_of([] { policies::preset("tensorflow"); }), "'tensorflow' is unknown"));
  CHECK(has(message_of([] { policies::Dynamic().tolerance(2); }), "tolerance is 2"));
  CHECK(has(message_of([] { policies::Underflow(1.0); }), "target is 1"));
}
