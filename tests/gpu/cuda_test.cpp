// The C++ API on a GPU against the same program on the CPU.

#include <halfstep/halfstep.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>

#include "../cpp/backward_stats.h"

namespace {

bool has_gpu() {
  if (torch::cuda::is_available()) return true;
  WARN("no GPU: nothing was tested");
  return false;
}

struct Run {
  std::vector<torch::Tensor> masters;
  halfstep::ScalerStats stats;
};

/// A few steps on given gradients: no matrix product, so that the CPU and the GPU must agree bit
/// for bit; one step overflows.
template <class Optimizer, class Options>
Run train(torch::Device device, torch::ScalarType dtype, const Options& options) {
  torch::manual_seed(0);
  std::vector<torch::Tensor> params;
  for (const int64_t size : {1, 7, 4096, 20000})
    params.push_back(torch::randn({size}).to(dtype).to(device).requires_grad_());
  Optimizer optimizer(params, options);
  halfstep::GradScaler scaler(halfstep::GradScalerOptions().policy(
      halfstep::policies::Dynamic().init_scale(1024).growth_interval(2)));
  scaler.scale(torch::ones({}, device));
  for (int step = 0; step < 6; ++step) {
    for (auto& param : params) {
      auto grad = torch::randn({param.numel()}) * 512;
      if (step == 2) grad[0] = std::numeric_limits<float>::infinity();
      param.mutable_grad() = grad.to(dtype).to(device);
    }
    scaler.step(optimizer);
    CHECK(scaler.step_was_skipped() == (step == 2));
    scaler.update();
  }
  if (device.is_cuda()) torch::cuda::synchronize();
  Run run{optimizer.master_params(), scaler.stats()};
  for (auto& master : run.masters) master = master.cpu();
  return run;
}

void compare(const Run& host, const Run& device) {
  REQUIRE(host.masters.size() == device.masters.size());
  for (size_t i = 0; i < host.masters.size(); ++i)
    CHECK(torch::equal(host.masters[i], device.masters[i]));
  CHECK(host.stats.scale == device.stats.scale);
  CHECK(host.stats.steps_applied == device.stats.steps_applied);
  CHECK(host.stats.steps_skipped == 1);
  CHECK(device.stats.steps_skipped == 1);
}

/// The trace of a few steps on gradients whose sums are exact in any order; one step overflows.
std::string trace(torch::Device device) {
  char path[] = "/tmp/halfstep_XXXXXX";
  REQUIRE(::mkdtemp(path));
  const std::string file = std::string(path) + "/run.trace";
  std::vector<torch::Tensor> params;
  for (const int64_t size : {3, 5000})
    params.push_back(torch::zeros({size}, torch::kHalf).to(device).requires_grad_());
  halfstep::optim::SGD optimizer(params, halfstep::optim::SGDOptions(0.0));
  halfstep::GradScaler scaler(
      halfstep::GradScalerOptions().policy(halfstep::policies::Dynamic().init_scale(1024)));
  {
    const halfstep::Recorder recorder(scaler, file, 2);
    for (int step = 0; step < 7; ++step) {
      scaler.scale(torch::ones({}, device));
      for (auto& param : params) {
        auto grad = torch::exp2(torch::arange(param.numel()).remainder(7).to(torch::kFloat));
        if (step == 2) grad[1] = std::numeric_limits<float>::infinity();
        param.mutable_grad() = grad.to(torch::kHalf).to(device);
      }
      scaler.step(optimizer);
      scaler.update();
    }
  }
  std::ifstream read(file);
  const std::string text(std::istreambuf_iterator<char>(read), {});
  ::unlink(file.c_str());
  ::rmdir(path);
  return text;
}

}  // namespace

TEST_CASE("the CUDA library is loaded with the first", "[gpu]") {
  CHECK((halfstep::cuda_status() == "ready" || halfstep::cuda_status() == "no device"));
}

TEST_CASE("weights on the GPU are bit-equal to the CPU's", "[gpu]") {
  if (!has_gpu()) return;
  using namespace halfstep::optim;
  for (const auto dtype : {torch::kHalf, torch::kBFloat16, torch::kFloat, torch::kDouble}) {
    INFO(c10::toString(dtype));
    const AdamOptions adam = AdamWOptions(1e-2).weight_decay(0.1);
    compare(train<AdamW>(torch::kCPU, dtype, adam), train<AdamW>(torch::kCUDA, dtype, adam));
    const SGDOptions sgd = SGDOptions(1e-2).momentum(0.9).nesterov(true);
    compare(train<SGD>(torch::kCPU, dtype, sgd), train<SGD>(torch::kCUDA, dtype, sgd));
  }
}

TEST_CASE("a network trains on the GPU under the guard", "[gpu]") {
  if (!has_gpu()) return;
  torch::manual_seed(0);
  auto net =
      torch::nn::Sequential(torch::nn::Linear(16, 32), torch::nn::ReLU(), torch::nn::Linear(32, 2));
  net->to(torch::kCUDA);
  halfstep::cast_model(*net);
  halfstep::optim::AdamW optimizer(net->named_parameters(),
                                   halfstep::optim::AdamWOptions(2e-2).max_grad_norm(1.0));
  halfstep::GradScaler scaler;
  const auto x = torch::randn({64, 16}, torch::kCUDA);
  const auto y = (x.select(1, 0) > 0).to(torch::kLong);
  double first = 0, last = 0;
  const halfstep::AutocastGuard guard(torch::kCUDA);
  for (int step = 0; step < 40; ++step) {
    optimizer.zero_grad();
    const auto loss = torch::nn::functional::cross_entropy(net->forward(x).to(torch::kFloat), y);
    scaler.scale(loss).backward();
    scaler.step(optimizer);
    scaler.update();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  CHECK(last < 0.5 * first);
}

TEST_CASE("a trace from the GPU is the CPU's to the letter", "[gpu]") {
  if (!has_gpu()) return;
  const std::string host = trace(torch::kCPU);
  CHECK(std::count(host.begin(), host.end(), '\n') == 2 + 2 + 7);
  CHECK(trace(torch::kCUDA) == host);
}

TEST_CASE("statistics in the backward are the bits of the step's pass on the GPU", "[gpu]") {
  if (!has_gpu()) return;
  for (const auto dtype : {torch::kHalf, torch::kFloat}) {
    std::vector<torch::Tensor> masters[2];
    for (const bool on : {false, true}) {
      torch::manual_seed(0);
      std::vector<torch::Tensor> params;
      for (const int64_t size : {1, 7, 4096, 20000})
        params.push_back(torch::randn({size}).to(dtype).to(torch::kCUDA).requires_grad_());
      const auto options = halfstep::optim::AdamWOptions(1e-2).max_grad_norm(0.1);
      backward_stats::Open<halfstep::optim::AdamW> optimizer(params, options);
      if (on) optimizer.stats_in_backward();
      halfstep::GradScaler scaler;
      for (int step = 0; step < 5; ++step) {
        optimizer.zero_grad();
        auto loss = torch::zeros({}, torch::kCUDA);
        for (const auto& p : params)
          loss = loss + (p * torch::randn({p.numel()}).to(p)).to(torch::kFloat).square().mean();
        const backward_stats::Seen seen;
        scaler.scale(loss).backward();
        CHECK(seen.rows == (on ? 4 : 0));
        const auto table = optimizer.gather_stats().at(0).second;
        CHECK(seen.reread == (on ? 0 : 4));
        CHECK(backward_stats::same_bits(table, backward_stats::one_pass(params)));
        scaler.step(optimizer);
        scaler.update();
      }
      masters[on] = optimizer.master_params();
    }
    for (size_t i = 0; i < masters[0].size(); ++i)
      CHECK(torch::equal(masters[0][i], masters[1][i]));
  }
}
