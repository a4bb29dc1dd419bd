#include "api.h"

namespace F = torch::nn::functional;

TEST_CASE("Linear and MLP are torch's with the activation in the op", "[linear]") {
  torch::manual_seed(0);
  const auto x = torch::randn({5, 16});
  torch::nn::Linear stock(16, 24);
  halfstep::nn::Linear ours(halfstep::nn::LinearOptions(16, 24).activation("gelu"));
  REQUIRE(ours->named_parameters().size() == 2);
  {
    torch::NoGradGuard off;
    for (auto& p : stock->named_parameters()) ours->named_parameters()[p.key()].copy_(p.value());
  }
  const auto expected = F::gelu(stock(x)), got = ours(x);
  CHECK(torch::allclose(got, expected, 1e-5, 1e-6));
  const auto dy = torch::randn_like(got);
  got.backward(dy);
  expected.backward(dy);
  CHECK(torch::allclose(ours->weight.grad(), stock->weight.grad(), 1e-5, 1e-5));
  CHECK(torch::allclose(ours->bias.grad(), stock->bias.grad(), 1e-5, 1e-5));
  halfstep::nn::MLP mlp(halfstep::nn::MLPOptions(16, 64).out_features(4).activation("relu"));
  CHECK(mlp(x).sizes() == at::IntArrayRef({5, 4}));
  CHECK(torch::allclose(mlp(x),
                        F::linear(F::relu(F::linear(x, mlp->fc1->weight, mlp->fc1->bias)),
                                  mlp->fc2->weight, mlp->fc2->bias),
                        1e-5, 1e-6));
  CHECK(std::dynamic_pointer_cast<halfstep::nn::MLPImpl>(mlp->clone())->parameters().size() == 4);
}

TEST_CASE("linear in FP16 under autocast, without bias, and what it refuses", "[linear]") {
  const auto x = torch::randn({3, 8}), w = torch::randn({6, 8});
  halfstep::AutocastGuard guard(torch::kCPU);
  const auto y = halfstep::functional::linear(x, w, {}, "relu");
  CHECK(y.scalar_type() == torch::kHalf);
  CHECK(torch::allclose(y.to(torch::kFloat), F::relu(torch::mm(x, w.t())).to(torch::kFloat), 1e-2,
                        1e-2));
  CHECK(has(message_of([&] { halfstep::functional::linear(x, w, {}, "swish"); }),
            "linear: activation is 'swish'"));
  CHECK(has(message_of([&] { halfstep::functional::linear(x, w.t()); }), "x is Half[3, 8]"));
  CHECK(has(message_of([&] {
              halfstep::nn::Linear(halfstep::nn::LinearOptions(2, 2).activation("swish"));
            }),
            "Linear: activation is 'swish'"));
}
