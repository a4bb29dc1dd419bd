#include "math/activation.h"

#include <ATen/ATen.h>
#include <halfstep/functional/activation.h>
#include <halfstep/nn/activation.h>

#include <cmath>

#include "api.h"
#include "catch.h"

using namespace halfstep;
namespace hf = halfstep::functional;

TEST_CASE("Philox4x32-10 gives the known answers of its authors", "[activation]") {
  using W = math::Words<uint32_t>;
  const auto check = [](uint64_t key, W counter, W want) {
    const W got = math::philox<uint32_t>(key, counter);
    for (int k = 0; k < 4; ++k) CHECK(got.x[k] == want.x[k]);
  };
  check(0, {{0, 0, 0, 0}}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check(~0ull, {{~0u, ~0u, ~0u, ~0u}}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check(0x299f31d0a4093822, {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
        {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST_CASE("a dropout's threshold and scale follow its probability", "[activation]") {
  CHECK(math::Dropout::of(0.5).threshold == 0x80000000u);
  CHECK(math::Dropout::of(0.75).scale == 4);
  CHECK(math::Dropout::of(1e-12).threshold == 0);
  CHECK(math::Dropout::of(1 - 1e-12).threshold == 0xffffffffu);
  CHECK_FALSE(math::Dropout::of(0).is_random);
  CHECK_FALSE(math::Dropout::of(1).is_random);
  CHECK(math::Dropout::of(1).scale == 0);
}

TEST_CASE("activations from C++ follow torch's formulas and are differentiable", "[activation]") {
  at::manual_seed(1);
  const auto x = at::randn({5, 12}, at::kDouble).requires_grad_(true);
  const auto u = at::randn({5, 12}, at::kDouble).requires_grad_(true);
  CHECK(at::allclose(hf::gelu(x), at::gelu(x)));
  CHECK(at::allclose(hf::gelu(x, "tanh"), at::gelu(x, "tanh")));
  CHECK(at::allclose(hf::silu(x), at::silu(x)));
  CHECK(at::allclose(hf::squared_relu(x), at::relu(x).pow(2)));
  CHECK(at::allclose(hf::geglu(x, u, "tanh"), at::gelu(x, "tanh") * u));
  hf::swiglu(x, u).sum().backward();
  const auto dx = x.grad().clone(), du = u.grad().clone();
  x.mutable_grad().reset();
  u.mutable_grad().reset();
  (at::silu(x) * u).sum().backward();
  CHECK(at::allclose(dx, x.grad()));
  CHECK(at::allclose(du, u.grad()));
  CHECK(at::equal(hf::swiglu(at::cat({x, u}, 1)), hf::swiglu(x, u)));
  CHECK(message_of([&] { hf::gelu(x, "fast"); }).find("gelu: approximate is 'fast'") !=
        std::string::npos);
}

TEST_CASE("a gated unit counts what left the range, and its clone keeps the count",
          "[activation]") {
  nn::SwiGLU unit(nn::GatedOptions().count_overflow(true));
  const auto gate = at::tensor({300.0, 2.0, INFINITY, 40.0}).to(at::kHalf);
  const auto up = at::tensor({300.0, 2.0, 1.0, 1000.0}).to(at::kHalf);
  const auto y = unit->forward(gate, up);
  CHECK(y[0].item<float>() == INFINITY);
  CHECK(y[3].item<float>() == 40000.0f);
  CHECK(unit->overflowed.item<int64_t>() == 1);
  const auto copy = std::dynamic_pointer_cast<nn::SwiGLUImpl>(unit->clone());
  CHECK(copy->overflowed.item<int64_t>() == 1);
  CHECK_FALSE(nn::GeGLU()->overflowed.defined());
  CHECK(message_of([&] {
          nn::GeGLU(nn::GatedOptions().approximate("erf"));
        }).find("GeGLU: approximate is 'erf'") != std::string::npos);
}

TEST_CASE("gated units and losses take their place in a Sequential", "[activation]") {
  const auto x = at::randn({3, 8}), target = at::tensor({0, 4, 2}, at::kLong);
  torch::nn::Sequential net(torch::nn::Linear(8, 12), nn::SwiGLU(), nn::GeGLU());
  const auto up = net->ptr<torch::nn::LinearImpl>(0)->forward(x);
  CHECK(at::equal(net->forward(x), hf::geglu(hf::swiglu(up))));
  torch::nn::Sequential add(nn::BiasDropoutAdd(0.0));
  CHECK(at::equal(add->forward(x, std::optional<at::Tensor>(), x), x + x));
  nn::LinearCrossEntropyLoss loss(8, 5);
  torch::nn::Sequential head(loss);
  CHECK(at::equal(head->forward(x, target), loss->forward(x, target)));
}

TEST_CASE("dropout from C++: repeated by the seed, absent in evaluation", "[activation]") {
  nn::BiasDropoutAdd layer(0.25);
  const auto x = at::ones({64, 48}, at::kHalf), residual = at::zeros({64, 48}, at::kHalf);
  const auto bias = at::ones({48}, at::kHalf);
  at::manual_seed(3);
  const auto first = layer->forward(x, bias, residual);
  const auto second = layer->forward(x, bias, residual);
  at::manual_seed(3);
  CHECK(at::equal(layer->forward(x, bias, residual), first));
  CHECK_FALSE(at::equal(first, second));
  CHECK(((first == 0) | (first == at::full({}, 2 / 0.75).to(at::kHalf))).all().item<bool>());
  layer->eval();
  CHECK(at::equal(layer->forward(x, bias, residual), at::full({64, 48}, 2.0, at::kHalf)));
  CHECK(message_of([&] { nn::BiasDropoutAdd(1.5); }).find("p is 1.5") != std::string::npos);
}

TEST_CASE("GELU and SiLU are modules under torch's options", "[activation]") {
  const auto x = at::linspace(-4, 4, 33).to(at::kHalf);
  CHECK(at::equal(nn::GELU(torch::nn::GELUOptions().approximate("tanh"))->forward(x),
                  hf::gelu(x, "tanh")));
  CHECK(at::equal(nn::GELU()->forward(x), hf::gelu(x)));
  CHECK(at::equal(nn::SiLU()->forward(x), hf::silu(x)));
  CHECK(at::equal(nn::SquaredReLU()->forward(x), hf::squared_relu(x)));
}
