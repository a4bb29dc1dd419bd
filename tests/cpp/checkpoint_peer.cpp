// The C++ half of tests/python/test_checkpoint.py and of tests/fixtures/make.py:
//   checkpoint_peer train KIND FILE AFTER       trains, saves, trains on, saves
//   checkpoint_peer resume KIND FILE AFTER      loads, trains on, saves
//   checkpoint_peer losses FILE AFTER           loads a scaler of two losses, saves it
//   checkpoint_peer golden FOLDER               the files of fixtures.h

#include <halfstep/halfstep.h>
#include <torch/torch.h>

#include <iostream>

#include "fixtures.h"

using namespace halfstep;

namespace {

constexpr int kSteps = 5;

torch::nn::Sequential make_net() {
  torch::manual_seed(1);
  return torch::nn::Sequential(torch::nn::Linear(16, 32), torch::nn::ReLU(),
                               torch::nn::Linear(32, 24), torch::nn::ReLU(),
                               torch::nn::Linear(24, 4));
}

std::unique_ptr<optim::Optimizer> make_optimizer(const std::string& kind,
                                                 torch::nn::Sequential& net) {
  const auto params = net->named_parameters();
  if (kind == "AdamW")
    return std::make_unique<optim::AdamW>(params, optim::AdamWOptions(1e-2).max_grad_norm(1.0));
  if (kind == "Adam")
    return std::make_unique<optim::Adam>(
        params, optim::AdamOptions(1e-2).amsgrad(true).master(Master::kFp32));
  if (kind == "AdamW8")
    return std::make_unique<optim::AdamW>(params, optim::AdamWOptions(1e-2)
                                                      .decouple_lr(true)
                                                      .decay_in_update(true)
                                                      .states(States::kInt8)
                                                      .ema_decay(0.9)
                                                      .seed(3));
  if (kind == "Lion")
    return std::make_unique<optim::Lion>(
        params,
        optim::LionOptions(1e-3).weight_decay(0.1).states(States::kInt8).master(Master::kSplit8));
  if (kind == "Adagrad")
    return std::make_unique<optim::Adagrad>(params, optim::AdagradOptions(1e-2)
                                                        .initial_accumulator_value(0.1)
                                                        .lr_decay(0.01)
                                                        .states(States::kBf16)
                                                        .master(Master::kKahan));
  if (kind == "Lamb")
    return std::make_unique<optim::Lamb>(
        params, optim::LambOptions(1e-2).ema_decay(0.99).zero_grads(true).max_grad_norm(1.0));
  if (kind == "NovoGrad")
    return std::make_unique<optim::NovoGrad>(
        params,
        optim::NovoGradOptions(1e-2).weight_decay(1e-3).master(Master::kStochastic).seed(7));
  TORCH_CHECK(kind == "SGD", "no optimizer is called ", kind);
  return std::make_unique<optim::SGD>(
      params, optim::SGDOptions(0.1).momentum(0.9).nesterov(true).weight_decay(1e-3));
}

void train(torch::nn::Sequential& net, optim::Optimizer& opt, GradScaler& scaler,
           const at::Tensor& x, const at::Tensor& y) {
  for (int step = 0; step < kSteps; ++step) {
    if (!dynamic_cast<optim::Lamb*>(&opt)) opt.zero_grad();  // it leaves zeroed ones behind
    at::Tensor loss;
    {
      AutocastGuard guard(torch::kCPU);
      loss = torch::nn::functional::cross_entropy(net->forward(x).to(torch::kFloat), y);
    }
    scaler.scale(loss).backward();
    scaler.step(opt);
    scaler.update();
  }
}

void write(const std::string& path, torch::nn::Sequential& net, optim::Optimizer& opt,
           const GradScaler& scaler, const at::Tensor& x, const at::Tensor& y, bool packed) {
  StateDict checkpoint;
  checkpoint.insert("x", x).insert("y", y);
  checkpoint.insert("model", state_dict(*net));
  checkpoint.insert("optimizer", opt.state_dict(packed));
  checkpoint.insert("scaler", scaler.state_dict());
  save(checkpoint, path);
}

void run(const std::string& mode, const std::string& kind, const std::string& file,
         const std::string& after) {
  auto net = make_net();
  cast_model(*net, torch::kHalf, CastOptions().keep_fp32({"4.*"}));
  auto opt = make_optimizer(kind, net);
  const bool packed = kind != "AdamW" && kind != "Adam" && kind != "SGD";
  GradScaler scaler(GradScalerOptions().policy(policies::Dynamic().growth_interval(3)));
  at::Tensor x, y;
  if (mode == "train") {
    x = torch::randn({64, 16});
    y = torch::randint(0, 4, {64});
    train(net, *opt, scaler, x, y);
    write(file, net, *opt, scaler, x, y, packed);
  } else {
    const StateDict checkpoint = load(file);
    load_state_dict(*net, checkpoint.at("model"));
    opt->load_state_dict(checkpoint.at("optimizer"));
    scaler.load_state_dict(checkpoint.at("scaler"));
    x = checkpoint.at("x").toTensor();
    y = checkpoint.at("y").toTensor();
  }
  train(net, *opt, scaler, x, y);
  write(after, net, *opt, scaler, x, y, packed);
}

void copy_losses(const std::string& file, const std::string& after) {
  GradScaler scaler(GradScalerOptions().losses(2));
  scaler.load_state_dict(load(file));
  save(scaler.state_dict(), after);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  torch::set_num_threads(1);
  try {
    if (words.size() == 2 && words[0] == "golden") {
      fixtures::write_all(words[1] + "/");
    } else if (words.size() == 3 && words[0] == "losses") {
      copy_losses(words[1], words[2]);
    } else if (words.size() == 4 && (words[0] == "train" || words[0] == "resume")) {
      run(words[0], words[1], words[2], words[3]);
    } else {
      std::cerr << "checkpoint_peer: see the top of checkpoint_peer.cpp\n";
      return 2;
    }
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 1;
  }
}
