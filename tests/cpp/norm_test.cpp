// LayerNorm and RMSNorm in C++: functions and modules against FP64, gradients, names, refusals.

#include "api.h"

using namespace halfstep;

namespace {

at::Tensor plain(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, double eps,
                 bool centred) {
  const auto d = centred ? h - h.mean(-1, true) : h;
  return d / (d.pow(2).mean(-1, true) + eps).sqrt() * weight + bias;
}

at::Tensor leaf(const at::Tensor& t, at::ScalarType type) {
  return t.detach().to(type).clone().requires_grad_();
}

/// The largest difference in units of `type` at the largest element.
double error(const at::Tensor& got, const at::Tensor& want, double eps) {
  return (got.to(at::kDouble) - want).abs().max().item<double>() /
         (eps * std::max(1e-30, want.abs().max().item<double>()));
}

}  // namespace

TEST_CASE("norms and their gradients against FP64, with a residual stream of its own dtype",
          "[norm]") {
  torch::manual_seed(3);
  const auto x64 = torch::randn({40, 50}), r64 = torch::randn({40, 50});
  const auto w64 = 1 + torch::randn({50}) / 4, b64 = torch::randn({50}) / 4;
  const std::pair<at::ScalarType, double> types[] = {
      {at::kHalf, 0x1p-10}, {at::kBFloat16, 0x1p-7}, {at::kFloat, 0x1p-21}};
  for (const auto& [type, eps] : types)
    for (const bool centred : {true, false}) {
      const auto x = leaf(x64, type), r = leaf(r64, at::kFloat), w = leaf(w64, type),
                 b = leaf(b64, at::kFloat);
      const auto X = leaf(x, at::kDouble), R = leaf(r, at::kDouble), W = leaf(w, at::kDouble),
                 B = leaf(b, at::kDouble);
      const auto [y, h] = centred ? functional::layer_norm(x, {50}, w, b, 1e-5, r)
                                  : functional::rms_norm(x, {50}, w, 1e-5, r, 1.0);
      CHECK(y.scalar_type() == type);
      CHECK(h.scalar_type() == at::kFloat);
      const auto H = X + R;
      const auto Y = plain(H, centred ? W : W + 1, centred ? B : torch::zeros({}), 1e-5, centred);
      CHECK(error(y, Y, eps) <= 1);
      const auto dy = torch::randn({40, 50}).to(type), dh = torch::randn({40, 50});
      std::vector<at::Tensor> leaves = {x, r, w}, wide = {X, R, W};
      if (centred) {
        leaves.push_back(b);
        wide.push_back(B);
      }
      const auto got = torch::autograd::grad({y, h}, leaves, {dy, dh});
      const auto want =
          torch::autograd::grad({Y, H}, wide, {dy.to(at::kDouble), dh.to(at::kDouble)});
      for (size_t i = 0; i < leaves.size(); ++i) {
        CHECK(got[i].scalar_type() == leaves[i].scalar_type());
        CHECK(error(got[i], want[i], eps) <= 1);
      }
    }
}

TEST_CASE("norm modules carry torch's names and options", "[norm]") {
  nn::LayerNorm norm(torch::nn::LayerNormOptions({8}).eps(1e-3));
  nn::RMSNorm rms(nn::RMSNormOptions({8}).weight_offset(1));
  nn::RMSNorm bare(nn::RMSNormOptions({8}).elementwise_affine(false).eps(1e-6));
  CHECK(norm->named_parameters().keys() == std::vector<std::string>{"weight", "bias"});
  CHECK(rms->named_parameters().keys() == std::vector<std::string>{"weight"});
  CHECK(bare->parameters().empty());
  CHECK(rms->weight.abs().max().item<float>() == 0);
  const auto x = torch::randn({3, 8});
  CHECK(torch::allclose(norm(x), torch::layer_norm(x, {8}, norm->weight, norm->bias, 1e-3), 1e-5,
                        1e-6));
  CHECK(torch::equal(rms(x), functional::rms_norm(x, {8})));
  CHECK(torch::allclose(bare(x), plain(x, torch::ones({8}), torch::zeros({8}), 1e-6, false), 1e-5,
                        1e-6));
  const auto [y, h] = norm->forward_residual(x, x);
  CHECK(torch::equal(h, x + x));
  CHECK(torch::equal(y, norm(h)));
  CHECK(torch::equal(std::get<0>(rms->forward_residual(x, x)), rms(x + x)));
  torch::nn::Sequential net(torch::nn::Linear(8, 8), nn::LayerNorm(std::vector<int64_t>{8}), rms);
  CHECK(net->forward(x).sizes() == x.sizes());
  const auto copy = std::dynamic_pointer_cast<nn::RMSNormImpl>(rms->clone());
  CHECK((copy && torch::equal(copy->forward(x), rms(x))));
  std::ostringstream text;
  text << *rms;
  CHECK(text.str() ==
        "halfstep::nn::RMSNorm([8], eps=None, elementwise_affine=true, weight_offset=1)");
}

TEST_CASE("norms name what they refuse, in C++ too", "[norm]") {
  const auto x = torch::randn({3, 8});
  CHECK(has(message_of([&] { functional::layer_norm(x, {7}); }),
            "layer_norm: x is torch.float32[3, 8] but normalized_shape is [7]"));
  CHECK(has(message_of([&] { functional::rms_norm(x, {8}, torch::ones({8}).to(at::kHalf)); }),
            "rms_norm: weight is torch.float16[8] but x is torch.float32[3, 8]"));
  const auto leaf_x = leaf(x, at::kDouble);
  const auto grad = torch::autograd::grad({functional::layer_norm(leaf_x, {8})}, {leaf_x},
                                          {torch::ones({3, 8}, at::kDouble)}, true, true)[0];
  CHECK(has(message_of([&] { grad.sum().backward(); }),
            "layer_norm_backward is differentiable once"));
}
