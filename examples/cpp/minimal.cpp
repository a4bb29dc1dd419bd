// Mixed-precision training in a LibTorch program: FP16 weights, exact split16 masters, loss
// scaling.

#include <halfstep/halfstep.h>
#include <torch/torch.h>

#include <iostream>

int main() {
  torch::manual_seed(0);
  auto net =
      torch::nn::Sequential(torch::nn::Linear(16, 32), torch::nn::ReLU(), torch::nn::Linear(32, 2));
  halfstep::cast_model(*net);
  halfstep::optim::AdamW opt(net->named_parameters(),
                             halfstep::optim::AdamWOptions(2e-2).max_grad_norm(1.0));
  halfstep::GradScaler scaler;
  const auto x = torch::randn({64, 16});
  const auto y = (x.select(1, 0) > 0).to(torch::kLong);
  double first = 0, last = 0;
  for (int step = 0; step < 40; ++step) {
    opt.zero_grad();
    torch::Tensor loss;
    {
      halfstep::AutocastGuard guard(torch::kCPU);
      loss = torch::nn::functional::cross_entropy(net->forward(x).to(torch::kFloat), y);
    }
    scaler.scale(loss).backward();
    scaler.step(opt);
    scaler.update();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  std::cout << "loss " << first << " -> " << last << ", applied " << scaler.stats().steps_applied
            << "\n";
  return last < 0.5 * first ? 0 : 1;
}
