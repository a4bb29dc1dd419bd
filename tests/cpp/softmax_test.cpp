#include "api.h"

using namespace halfstep;

TEST_CASE("softmax in C++: torch's values, masks, causal rows, gradients", "[softmax]") {
  torch::manual_seed(0);
  const at::Tensor x = torch::randn({2, 3, 9, 9}, torch::kDouble).requires_grad_();
  const at::Tensor keep = torch::rand({3, 1, 9}) > 0.3;
  const at::Tensor causal = torch::ones({9, 9}, torch::kBool).tril();
  const at::Tensor masked = x.mul(0.5).masked_fill(~(keep & causal), -INFINITY);
  const at::Tensor expected = masked.softmax(-1).nan_to_num(0);
  const at::Tensor y = functional::softmax(x, -1, 0.5, keep, true);
  CHECK(torch::allclose(y, expected, 1e-12, 1e-14));
  const at::Tensor upstream = torch::randn_like(x);
  const auto gradient = [&](const at::Tensor& out) {
    return torch::autograd::grad({out}, {x}, {upstream}, true)[0];
  };
  CHECK(torch::allclose(gradient(y), gradient(expected).nan_to_num(0), 1e-10, 1e-12));
  const at::Tensor half = x.detach().to(torch::kHalf);
  CHECK(torch::allclose(functional::softmax(half).to(torch::kDouble),
                        half.to(torch::kDouble).softmax(-1), 1e-3, 1e-7));
}

TEST_CASE("the Softmax module has torch's options and a scale", "[softmax]") {
  nn::Softmax softmax(nn::SoftmaxOptions(-1));
  const at::Tensor x = torch::randn({4, 5});
  CHECK(torch::allclose(softmax(x), torch::softmax(x, -1), 1e-6, 1e-7));
  CHECK(std::dynamic_pointer_cast<torch::nn::SoftmaxImpl>(softmax.ptr()));
  nn::SoftmaxOptions options(-1);
  options.causal(true).scale(2);
  nn::Softmax causal(options);
  CHECK(causal(x).triu(1).count_nonzero().item<int64_t>() == 0);
  const auto copy = std::dynamic_pointer_cast<nn::SoftmaxImpl>(causal->clone());
  REQUIRE(copy);
  CHECK(torch::equal(copy->forward(x), causal(x)));
  torch::nn::Sequential in_a_row(torch::nn::Linear(5, 5), nn::Softmax(-1));
  CHECK(torch::allclose(in_a_row->forward(x).sum(-1), torch::ones({4})));
}

TEST_CASE("softmax refuses by name", "[softmax]") {
  const at::Tensor x = torch::randn({4, 5});
  CHECK(has(message_of([&] { functional::softmax(x, 2); }),
            "softmax: dim is 2 but x is torch.float32[4, 5]"));
  CHECK(has(message_of([&] { functional::softmax(x, -1, 1, torch::ones({4}, torch::kBool)); }),
            "does not broadcast to x"));
  CHECK(has(message_of([&] { functional::softmax(x, 0, 1, {}, true); }), "causal needs dim = -1"));
}
