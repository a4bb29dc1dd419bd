#include "math/loss.h"

#include <cmath>

#include "api.h"

using namespace halfstep;
namespace F = torch::nn::functional;

namespace {

at::Tensor labels(int64_t rows, int64_t classes) {
  return torch::arange(rows, torch::kLong) * 5 % classes;
}

}  // namespace

TEST_CASE("a row's loss and gradient keep their relative precision when p_y is nearly 1",
          "[loss]") {
  math::CrossEntropy c;
  c.classes = 3;
  c.weight_sum = 3;
  const double rest = 2 * std::exp(-40.0);
  CHECK(std::fabs(math::row_loss(c, {40, rest}, 40, 1, 1, 0) / rest - 1) < 1e-12);
  const auto g = math::row_gradient(c, {40, rest}, 1, 1, 8);
  CHECK(std::fabs(g.label / (-8 * rest) - 1) < 1e-12);
  CHECK(g.slope == 8 / (1 + rest));
  CHECK(g.shift == 0);
}

TEST_CASE("smoothing spreads the label's weight and the z-loss adds its square", "[loss]") {
  math::CrossEntropy c;
  c.classes = 4;
  c.weight_sum = 6;
  c.smoothing = 0.2;
  c.z_loss = 0.5;
  // Logits 0, 0, 0, 0, label weight 2: lse = log 4 = L; spread 0.
  const double lse = std::log(4.0);
  const double want = 0.8 * 2 * lse + 0.05 * 6 * lse + 0.5 * lse * lse;
  CHECK(std::fabs(math::row_loss(c, {0, 3}, 0, 1, 2, 0) - want) < 1e-12);
  const auto g = math::row_gradient(c, {0, 3}, 1, 2, 1);
  CHECK(std::fabs(g.slope - (0.8 * 2 + 0.05 * 6 + lse) / 4) < 1e-12);
  CHECK(std::fabs(g.shift - 0.05) < 1e-12);
  CHECK(std::fabs(g.label - (g.slope - 0.05 * 2 - 0.8 * 2)) < 1e-12);
}

TEST_CASE("cross entropy from C++ is torch's, in FP32, with the scale in its rounding", "[loss]") {
  torch::manual_seed(0);
  for (const auto dtype : {torch::kHalf, torch::kFloat}) {
    const auto logits = (torch::randn({6, 50}) * 2).to(dtype).requires_grad_();
    const auto target = labels(6, 50), weight = torch::rand({50}) + 0.5;
    const auto options = functional::CrossEntropyOptions().weight(weight).label_smoothing(0.1);
    const auto loss = functional::cross_entropy(logits, target, options);
    const auto wide = logits.detach().to(torch::kDouble).requires_grad_();
    const auto want = F::cross_entropy(
        wide, target,
        F::CrossEntropyFuncOptions().weight(weight.to(torch::kDouble)).label_smoothing(0.1));
    CHECK(loss.scalar_type() == torch::kFloat);
    CHECK(torch::allclose(loss.to(torch::kDouble), want, 1e-6));
    (loss * 1024).backward();
    (want * 1024).backward();
    CHECK(torch::allclose(logits.grad().to(torch::kDouble), wide.grad(), 1e-3, 1e-4));
    const auto again = logits.detach().requires_grad_();
    auto hinted = options;
    hinted.grad_scale(torch::tensor(1024.0f));
    (functional::cross_entropy(again, target, hinted) * 1024).backward();
    CHECK(torch::equal(again.grad(), logits.grad()));
  }
}

TEST_CASE("cross entropy from C++ names what is wrong", "[loss]") {
  const auto logits = torch::randn({2, 5});
  CHECK(has(message_of([&] {
              functional::cross_entropy(logits, torch::tensor({1, 7}));
            }),
            "target[1] is 7; expected a class from 0 to 4"));
  CHECK(has(message_of([&] {
              functional::cross_entropy(logits, labels(2, 5),
                                        functional::CrossEntropyOptions().reduction("avg"));
            }),
            "reduction is 'avg'"));
}

TEST_CASE("the modules hold torch's parameters; a head can share a weight", "[loss]") {
  torch::manual_seed(0);
  const auto x = torch::randn({7, 4}), target = labels(7, 6);
  nn::CrossEntropyLoss loss(functional::CrossEntropyOptions().weight(torch::rand({6})));
  CHECK(loss->named_buffers().contains("weight"));
  const auto options = nn::LinearCrossEntropyLossOptions(4, 6).bias(true).loss(
      functional::CrossEntropyOptions().weight(loss->weight));
  nn::LinearCrossEntropyLoss head(options);
  CHECK(head->named_parameters().size() == 2);
  const auto want = loss(head->logits(x), target), got = head(x, target);
  CHECK(torch::allclose(got, want));
  got.backward();
  CHECK(head->weight.grad().sizes() == head->weight.sizes());
  CHECK(head->bias.grad().defined());

  torch::nn::Embedding embedding(6, 4);
  nn::LinearCrossEntropyLoss tied(nn::LinearCrossEntropyLossOptions(4, 6), embedding->weight);
  CHECK(tied->weight.is_same(embedding->weight));
  tied(x, target, torch::tensor(8.0f)).backward();
  CHECK(embedding->weight.grad().defined());
  CHECK(has(message_of([&] {
              nn::LinearCrossEntropyLoss(nn::LinearCrossEntropyLossOptions(5, 6),
                                         embedding->weight);
            }),
            "tied is"));
  const auto copy = std::dynamic_pointer_cast<nn::LinearCrossEntropyLossImpl>(head->clone());
  CHECK(torch::equal(copy->forward(x, target), head(x, target)));
}

TEST_CASE("autocast casts a head's operands and leaves the loss in FP32", "[loss]") {
  nn::LinearCrossEntropyLoss head(4, 6);
  const auto x = torch::randn({7, 4});
  const AutocastGuard guard(torch::kCPU);
  const auto loss = head(x, labels(7, 6));
  CHECK(loss.scalar_type() == torch::kFloat);
  CHECK(torch::equal(loss, functional::linear_cross_entropy(
                               x.to(torch::kHalf), head->weight.to(torch::kHalf), labels(7, 6))));
}
