// Watched runs for tests/python/test_monitor.py: monitor_peer FOLDER.

#include <halfstep/halfstep.h>
#include <torch/torch.h>

#include <limits>

namespace nn = torch::nn;

namespace {

/// Every file that a monitor writes, of a run with a step that is skipped.
void write_files(const std::string& folder) {
  torch::manual_seed(0);
  nn::Sequential net({{"a \"quoted\" name", nn::AnyModule(nn::Linear(6, 8))},
                      {"1", nn::AnyModule(nn::ReLU())},
                      {"2", nn::AnyModule(nn::Linear(8, 3))}});
  halfstep::cast_model(*net);
  halfstep::optim::AdamW opt(net->named_parameters(), halfstep::optim::AdamWOptions(1e-2));
  halfstep::GradScaler scaler(
      halfstep::GradScalerOptions().policy(halfstep::policies::Dynamic().init_scale(256)));
  halfstep::Monitor monitor(
      *net, opt,
      {.every = 2, .live = folder + "/live.json", .tensorboard = folder, .aliases = {"megatron"}});
  const auto x = torch::randn({16, 6});
  const auto y = torch::randint(3, {16});
  for (int step = 1; step <= 8; ++step) {
    opt.zero_grad();
    at::Tensor loss;
    {
      halfstep::AutocastGuard guard(torch::kCPU);
      loss = nn::functional::cross_entropy(net->forward(x).to(torch::kFloat), y);
    }
    if (step == 5) loss = loss * std::numeric_limits<double>::infinity();
    scaler.scale(loss).backward();
    scaler.step(opt);
    scaler.update();
    monitor.step(scaler);
  }
  monitor.write_json(folder + "/monitor.json");
}

struct MixImpl : nn::Module {
  MixImpl() { weight = register_parameter("weight", torch::empty({12, 12})); }
  at::Tensor forward(const at::Tensor& x) { return torch::matmul(x, weight.t()); }
  at::Tensor weight;
};
TORCH_MODULE(Mix);

/// Net of test_monitor.py.
struct NetImpl : nn::Module {
  at::Tensor forward(const at::Tensor& ids) {
    at::Tensor x = norm(embed(ids));
    x = std::get<0>(lstm(x.to(lstm->all_weights()[0].scalar_type()))).select(1, 3);
    for (int i = 0; i < 2; ++i) x = torch::relu(twice(x));
    return head(torch::relu(batch(mix(x))));
  }
  nn::Embedding embed = register_module("embed", nn::Embedding(20, 12));
  nn::LayerNorm norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({12})));
  nn::LSTM lstm = register_module("lstm", nn::LSTM(nn::LSTMOptions(12, 12).batch_first(true)));
  nn::Linear twice = register_module("twice", nn::Linear(12, 12));
  Mix mix = register_module("mix", Mix());
  nn::BatchNorm1d batch = register_module("batch", nn::BatchNorm1d(12));
  nn::Linear head = register_module("head", nn::Linear(12, 5));
};
TORCH_MODULE(Net);

/// Numbers over many orders of magnitude that Python makes to the bit.
at::Tensor spread(at::IntArrayRef sizes, int64_t seed) {
  const at::Tensor n = torch::arange(c10::multiply_integers(sizes)) * 7919 + seed * 104729;
  const at::Tensor unit = n.remainder(2001).sub(1000).to(torch::kDouble).div(1500);
  return unit.mul(torch::exp2(-n.remainder(24).to(torch::kDouble))).to(torch::kFloat).view(sizes);
}

/// A run of which Python has the same: two micro-batches a step, one layer after the other.
void write_counts(const std::string& path, bool cast) {
  Net net;
  int64_t seed = 0;
  for (auto& p : net->parameters()) {
    const torch::NoGradGuard no_grad;
    p.copy_(spread(p.sizes(), ++seed));
  }
  if (cast) halfstep::cast_model(*net);
  halfstep::optim::SGD opt(net->named_parameters(), halfstep::optim::SGDOptions(1e-3));
  halfstep::GradScaler scaler(
      halfstep::GradScalerOptions().policy(halfstep::policies::Dynamic().init_scale(0x1p-8)));
  halfstep::Monitor monitor(*net, opt, {.every = 1});
  monitor.step(scaler.stats());
  for (int step = 0; step < 7; ++step) {
    opt.zero_grad();
    for (int micro = 0; micro < 2; ++micro) {
      const auto ids = (torch::arange(24) * 7 + micro + step).remainder(20).view({6, 4});
      const auto y = (torch::arange(6) + micro).remainder(5);
      halfstep::AutocastGuard guard(torch::kCPU);
      const auto loss = nn::functional::cross_entropy(net->forward(ids).to(torch::kFloat), y);
      scaler.scale(loss).backward();
    }
    scaler.step(opt);
    scaler.update();
    monitor.step(scaler);
  }
  monitor.write_json(path);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const std::string folder = argv[1];
  write_files(folder);
  write_counts(folder + "/cast.json", true);
  write_counts(folder + "/autocast.json", false);
}
