// A watched run for tests/python/test_monitor.py: monitor_peer FOLDER.

#include <halfstep/halfstep.h>
#include <torch/torch.h>

#include <limits>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const std::string folder = argv[1];
  torch::manual_seed(0);
  torch::nn::Sequential net({{"a \"quoted\" name", torch::nn::AnyModule(torch::nn::Linear(6, 8))},
                             {"1", torch::nn::AnyModule(torch::nn::ReLU())},
                             {"2", torch::nn::AnyModule(torch::nn::Linear(8, 3))}});
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
      loss = torch::nn::functional::cross_entropy(net->forward(x).to(torch::kFloat), y);
    }
    if (step == 5) loss = loss * std::numeric_limits<double>::infinity();
    scaler.scale(loss).backward();
    scaler.step(opt);
    scaler.update();
    monitor.step(scaler);
  }
  monitor.write_json(folder + "/monitor.json");
}
