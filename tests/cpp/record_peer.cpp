// Recorded runs for tests/python/test_trace_cpp.py: record_peer KIND FILE. Python has the same
// runs.

#include <halfstep/halfstep.h>
#include <torch/torch.h>

#include <limits>

namespace nn = torch::nn;
namespace policies = halfstep::policies;

namespace {

/// Numbers in [-1, 1] that Python makes to the bit.
at::Tensor numbers(at::IntArrayRef sizes, int64_t seed) {
  const at::Tensor n = torch::arange(c10::multiply_integers(sizes)) * 7919 + seed * 104729;
  return n.remainder(2001).sub(1000).to(torch::kDouble).div(1000).to(torch::kFloat).view(sizes);
}

struct Half : policies::Policy {
  Half() { init_scale = 0x1p20; }
  policies::Numbers init() const override { return {{"clean", torch::zeros({})}}; }
  at::Tensor update(policies::Numbers& state, const policies::Stats& stats) override {
    const at::Tensor bad = stats.found_inf != 0;
    const at::Tensor clean = torch::where(bad, 0.0, state["clean"] + 1), grow = clean >= 4;
    state["clean"] = torch::where(grow, 0.0, clean);
    return torch::where(bad, stats.scale / 2, torch::where(grow, stats.scale * 2, stats.scale));
  }
};

halfstep::GradScalerOptions options(const std::string& kind) {
  halfstep::GradScalerOptions chosen;
  if (kind == "custom") return chosen.policy(std::make_shared<Half>());
  if (kind == "underflow") return chosen.policy(policies::Underflow().init_scale(0x1p20));
  if (kind == "two") return chosen.policy(policies::Occupancy().init_scale(0x1p20));
  return chosen.policy(policies::Dynamic()
                           .init_scale(0x1p20)
                           .growth_interval(4)
                           .min_scale(0x1p-10)
                           .refill(policies::Refill::kGrowth)
                           .skip_limit(50));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string kind = argv[1];
  nn::Sequential net(nn::Linear(6, 16), nn::ReLU(), nn::Linear(16, 3));
  int64_t seed = 0;
  for (auto& p : net->parameters()) {
    const torch::NoGradGuard no_grad;
    p.copy_(numbers(p.sizes(), ++seed));
  }
  std::unique_ptr<torch::optim::Optimizer> first, second;
  if (kind == "two") {  // FP32 weights, the second half of them with torch's own optimizer
    first = std::make_unique<halfstep::optim::AdamW>(net[0]->as<nn::Linear>()->named_parameters(),
                                                     halfstep::optim::AdamWOptions(1e-2));
    second = std::make_unique<torch::optim::SGD>(net[2]->as<nn::Linear>()->parameters(), 1e-2);
  } else {
    halfstep::cast_model(*net);
    first = std::make_unique<halfstep::optim::AdamW>(net->named_parameters(),
                                                     halfstep::optim::AdamWOptions(1e-2));
  }
  halfstep::GradScaler scaler(options(kind));
  halfstep::Recorder recorder(scaler, argv[2], kind == "two" ? 3 : 1);
  for (int step = 1; step <= 40; ++step) {
    for (auto* opt : {first.get(), second.get()})
      if (opt) opt->zero_grad();
    at::Tensor loss;
    {
      halfstep::AutocastGuard guard(torch::kCPU);
      loss = net->forward(numbers({8, 6}, 100 + step)).to(torch::kFloat).square().mean();
    }
    if (step == 17 || step == 18) loss = loss * std::numeric_limits<double>::quiet_NaN();
    scaler.scale(loss).backward();
    if (kind == "unscale") {
      scaler.unscale_(*first);
      scaler.clip_grad_norm_({first.get()}, 1.0);
    }
    for (auto* opt : {first.get(), second.get()})
      if (opt) scaler.step(*opt);
    scaler.update(kind == "two" && step % 12 == 5 ? std::optional<double>(0x1p10) : std::nullopt);
  }
  recorder.close();
}
