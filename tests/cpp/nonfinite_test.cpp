#include <halfstep/halfstep.h>
#include <torch/torch.h>

#include "catch.h"

using namespace halfstep;

namespace {

struct NetImpl : torch::nn::Module {
  NetImpl() {
    first = register_module("first", torch::nn::Linear(4, 4));
    second = register_module("second", torch::nn::Linear(4, 2));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    return second->forward(torch::relu(first->forward(x)));
  }
  torch::nn::Linear first{nullptr}, second{nullptr};
};
TORCH_MODULE(Net);

}  // namespace

TEST_CASE("the first op that makes an infinity is named with its module", "[nonfinite]") {
  torch::manual_seed(0);
  Net net;
  const auto x = torch::randn({3, 4});
  const auto run = [&] {
    net->zero_grad();
    net->forward(x).pow(2).mean().backward();
  };
  CHECK(!find_nonfinite(*net, run));
  {
    const torch::NoGradGuard no_grad;
    net->second->weight.fill_(3e38);
  }
  const auto found = find_nonfinite(*net, run);
  REQUIRE(found);
  CHECK(found->producer);
  CHECK(found->phase == "forward");
  CHECK(found->module == "second");
  CHECK(found->op == "aten::addmm");
  CHECK(found->value == "inf");
  CHECK(found->message().find("made by aten::addmm in 'second'") != std::string::npos);
}

TEST_CASE("what came from outside, the backward and the optimizer are told apart", "[nonfinite]") {
  torch::manual_seed(0);
  Net net;
  auto x = torch::randn({3, 4});
  const auto loss = [&] { return net->forward(x).sum(); };
  {
    // 2e38 * 2 in the product of the backward; the forward sees zeros.
    const torch::NoGradGuard no_grad;
    net->second->weight.fill_(2e38);
    net->first->weight.zero_();
    net->first->bias.fill_(1e-30);
  }
  const auto backward = find_nonfinite(*net, [&] { loss().backward(); });
  REQUIRE(backward);
  CHECK(backward->producer);
  CHECK(backward->phase == "backward");
  CHECK(backward->module == "second");
  CHECK(backward->role == "activation gradient");

  Net other;
  optim::AdamW opt(other->named_parameters(), optim::AdamWOptions(1e-3));
  const auto optimizer = find_nonfinite(*other, [&] {
    other->zero_grad();
    other->forward(x).sum().backward();
    other->first->weight.mutable_grad().fill_(1e22);
    opt.step();
  });
  REQUIRE(optimizer);
  CHECK(optimizer->phase == "optimizer");
  CHECK(optimizer->op == "halfstep::adamw_step_");
  CHECK(optimizer->role == "optimizer state");

  x[1][2] = NAN;
  Net healthy;
  const auto outside = find_nonfinite(*healthy, [&] { healthy->forward(x).sum().backward(); });
  REQUIRE(outside);
  CHECK(!outside->producer);
  CHECK(outside->role == "input");
  CHECK(outside->index == std::vector<int64_t>{1, 2});
}

TEST_CASE("the forward of a second micro-batch is a forward, and an error leaves no trace",
          "[nonfinite]") {
  torch::manual_seed(0);
  Net net;
  const auto x = torch::ones({3, 4});
  const auto loss = [&](double factor) { return net->forward(x * factor).pow(2).sum(); };
  const auto found = find_nonfinite(*net, [&] {
    loss(1).backward();
    loss(3e38).backward();
  });
  REQUIRE(found);
  CHECK(found->producer);
  CHECK(found->phase == "forward");
  CHECK_THROWS(find_nonfinite(*net, [&] { torch::mm(x, x); }));
  CHECK(find_nonfinite(*net, [&] { loss(3e38).backward(); }));
}

TEST_CASE("one search at a time, and an error of the run ends it", "[nonfinite]") {
  Net net;
  CHECK_THROWS_WITH(find_nonfinite(*net, [&] { find_nonfinite(*net, [] {}); }),
                    Catch::Contains("another one is at work in this process"));
  CHECK(!find_nonfinite(*net, [&] { net->forward(torch::randn({2, 4})); }));
}
