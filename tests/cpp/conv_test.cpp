#include <halfstep/halfstep.h>
#include <torch/torch.h>

#include "catch.h"

namespace F = torch::nn::functional;
namespace hf = halfstep::functional;

TEST_CASE("Convolutions round once and take torch's options", "[conv]") {
  torch::manual_seed(0);
  const auto x = torch::randn({2, 4, 9, 8}).to(torch::kHalf);
  const auto w = torch::randn({6, 2, 2, 3}).to(torch::kHalf);
  const auto b = torch::randn({6});
  auto options = F::Conv2dFuncOptions().groups(2).bias(b);
  const auto wide = [&] { return F::conv2d(x.to(torch::kFloat), w.to(torch::kFloat), options); };
  CHECK(torch::equal(hf::conv2d(x, w, options), wide().to(torch::kHalf)));
  options.padding(torch::kSame).dilation({1, 2});
  CHECK(torch::equal(hf::conv2d(x, w, options), wide().to(torch::kHalf)));
  options.padding(torch::kValid);
  CHECK(torch::equal(hf::conv2d(x[0], w, options), wide()[0].to(torch::kHalf)));
  CHECK_THROWS_AS(hf::conv2d(x, w, F::Conv2dFuncOptions().padding(torch::kSame).stride(2)),
                  c10::Error);

  const auto t = torch::randn({4, 3, 3, 3}).to(torch::kHalf);
  const auto up = F::ConvTranspose2dFuncOptions().stride(2).output_padding(1);
  CHECK(torch::equal(
      hf::conv_transpose2d(x, t, up),
      F::conv_transpose2d(x.to(torch::kFloat), t.to(torch::kFloat), up).to(torch::kHalf)));
}

TEST_CASE("Convolution modules are torch's with another forward, and clone as themselves",
          "[conv]") {
  torch::manual_seed(0);
  halfstep::nn::Conv2d conv(
      torch::nn::Conv2dOptions(4, 6, 3).padding(1).padding_mode(torch::kReflect));
  torch::nn::Conv2d stock(
      torch::nn::Conv2dOptions(4, 6, 3).padding(1).padding_mode(torch::kReflect));
  for (const auto& p : stock->named_parameters()) {
    const torch::NoGradGuard no_grad;
    conv->named_parameters()[p.key()].copy_(p.value());
  }
  const auto x = torch::randn({2, 4, 7, 7});
  CHECK(torch::allclose(conv(x), stock(x), 1e-5, 1e-6));
  conv->weight.set_data(conv->weight.detach().to(torch::kHalf));
  const auto y = conv(x.to(torch::kHalf));  // the bias stays FP32
  CHECK(y.scalar_type() == torch::kHalf);
  const auto copy = std::dynamic_pointer_cast<halfstep::nn::Conv2dImpl>(conv->clone());
  REQUIRE(copy);
  CHECK(torch::equal(copy->forward(x.to(torch::kHalf)), y));
  CHECK_FALSE(copy->weight.is_alias_of(conv->weight));
  y.to(torch::kFloat).sum().backward();
  CHECK(conv->bias.grad().scalar_type() == torch::kFloat);
  CHECK(conv->weight.grad().scalar_type() == torch::kHalf);

  halfstep::nn::ConvTranspose1d up(torch::nn::ConvTranspose1dOptions(4, 2, 3).stride(2));
  const std::vector<int64_t> size{16};
  CHECK(up->forward(torch::randn({1, 4, 7}), at::IntArrayRef(size)).size(2) == 16);
}
