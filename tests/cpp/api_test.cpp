// Autocast, casting and evaluation in C++.

#include <thread>
#include <type_traits>

#include "api.h"

using namespace halfstep;

TEST_CASE("autocast guard restores what was there", "[api]") {
  const auto x = torch::randn({2, 16});
  auto net = torch::nn::Linear(16, 4);
  {
    AutocastGuard outer(torch::kCPU, torch::kBFloat16);
    CHECK(net->forward(x).scalar_type() == torch::kBFloat16);
    {
      AutocastGuard inner(torch::kCPU);
      CHECK(net->forward(x).scalar_type() == torch::kHalf);
      AutocastGuard off(torch::kCPU, false);
      CHECK(net->forward(x).scalar_type() == torch::kFloat);
    }
    CHECK(net->forward(x).scalar_type() == torch::kBFloat16);
  }
  CHECK(net->forward(x).scalar_type() == torch::kFloat);
}

static_assert(!std::is_copy_constructible_v<AutocastGuard> &&
              !std::is_copy_assignable_v<AutocastGuard>);

TEST_CASE("a guard is its thread's own, and takes a device of either kind", "[api]") {
  const auto x = torch::randn({2, 16});
  auto net = torch::nn::Linear(16, 4);
  const AutocastGuard guard(torch::Device(torch::kCPU));
  CHECK(net->forward(x).scalar_type() == torch::kHalf);
  at::ScalarType elsewhere = at::ScalarType::Undefined;
  std::thread([&] { elsewhere = net->forward(x).scalar_type(); }).join();
  CHECK(elsewhere == torch::kFloat);
  const AutocastGuard off(torch::Device(torch::kCPU), false);
  CHECK(net->forward(x).scalar_type() == torch::kFloat);
}

TEST_CASE("one guard round the whole loop trains", "[api]") {
  const Task task;
  for (const std::string way : {"ours", "stock", "ours alone"}) {
    auto net = make_net();
    optim::AdamW ours(net->parameters(), optim::AdamWOptions(2e-2));
    torch::optim::AdamW stock(net->parameters(), torch::optim::AdamWOptions(2e-2));
    torch::optim::Optimizer& opt = way == "stock" ? static_cast<torch::optim::Optimizer&>(stock)
                                                  : static_cast<torch::optim::Optimizer&>(ours);
    GradScaler scaler;
    AutocastGuard guard(torch::kCPU);
    double first = 0, last = 0;
    for (int i = 0; i < 30; ++i) {
      opt.zero_grad();
      const auto loss = loss_of(net, task);
      if (way == "ours alone") {
        loss.backward();
        opt.step();
      } else {
        scaler.scale(loss).backward();
        scaler.step(opt);
        scaler.update();
      }
      last = loss.item<double>();
      if (i == 0) first = last;
    }
    INFO(way);
    CHECK(last < 0.5 * first);
  }
}

TEST_CASE("casting keeps norms, buffers, ties and what globs name", "[api]") {
  struct NetImpl : torch::nn::Module {
    NetImpl() {
      first = register_module("first", torch::nn::Linear(4, 4));
      norm = register_module("norm", torch::nn::BatchNorm1d(4));
      tied = register_module("tied", torch::nn::Linear(4, 4));
      tied->weight = tied->register_parameter("weight2", first->weight);
    }
    torch::nn::Linear first{nullptr}, tied{nullptr};
    torch::nn::BatchNorm1d norm{nullptr};
  };
  const auto net = std::make_shared<NetImpl>();
  const auto report = cast_model(*net);
  CHECK(report.kept == std::vector<std::string>{"norm.weight", "norm.bias"});
  CHECK(net->first->weight.scalar_type() == torch::kHalf);
  CHECK(net->tied->weight.is_same(net->first->weight));
  CHECK(net->norm->running_mean.scalar_type() == torch::kFloat);
  CHECK(net->norm->num_batches_tracked.scalar_type() == torch::kLong);

  const auto other = std::make_shared<NetImpl>();
  const auto kept = cast_model(*other, torch::kBFloat16, CastOptions().keep_fp32({"first.*"})).kept;
  CHECK(kept == std::vector<std::string>{"first.weight", "first.bias"});
  CHECK(other->norm->weight.scalar_type() == torch::kBFloat16);
  CHECK(has(message_of([&] { cast_model(*other, torch::kFloat); }), "dtype is float32"));
}

TEST_CASE("masters begin at the FP32 weights; evaluation and export are exact", "[api]") {
  auto net = make_net(), plain = make_net();
  cast_model(*net);
  optim::AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2).master(Master::kFp32));
  const auto masters = opt.master_params();
  const auto params = plain->parameters();
  for (size_t i = 0; i < params.size(); ++i) CHECK(torch::equal(masters[i], params[i]));
  const auto x = torch::randn({3, 16});
  const auto weight = net->parameters()[0].detach().clone();
  {
    EvaluateIn in(*net, opt, torch::kFloat);
    CHECK(torch::equal(net->forward(x), plain->forward(x)));
  }
  CHECK(torch::equal(net->parameters()[0].detach(), weight));
  CHECK(net->is_training());
  const auto exported = export_state_dict(*net, opt, torch::kDouble);
  CHECK(torch::equal(exported["0.weight"], params[0].detach().to(torch::kDouble)));
}
