#include "api.h"

using namespace halfstep;

namespace {

at::Tensor turned(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t half = cos.size(-1);
  const at::Tensor a = x.narrow(-1, 0, half), b = x.narrow(-1, half, half);
  return torch::cat(
      {a * cos - b * sin, b * cos + a * sin, x.narrow(-1, 2 * half, x.size(-1) - 2 * half)}, -1);
}

}  // namespace

TEST_CASE("rope in C++: the rotation, its inverse as gradient, in place", "[rope]") {
  torch::manual_seed(0);
  const at::Tensor x = torch::randn({2, 3, 7, 40}, torch::kDouble).requires_grad_();
  const at::Tensor cos = torch::randn({7, 17}, torch::kDouble), sin = torch::randn_like(cos);
  const at::Tensor y = functional::rope(x, cos, sin);
  CHECK(torch::allclose(y, turned(x, cos, sin), 1e-12, 1e-14));
  const at::Tensor upstream = torch::randn_like(x);
  const auto gradient = [&](const at::Tensor& out) {
    return torch::autograd::grad({out}, {x}, {upstream})[0];
  };
  const at::Tensor expected = gradient(y);
  CHECK(torch::allclose(expected, turned(upstream, cos, -sin), 1e-12, 1e-14));
  const at::Tensor copy = x * 1;
  functional::rope_(copy, cos, sin);
  CHECK(torch::equal(copy, y));
  CHECK(torch::equal(gradient(copy), expected));
  CHECK(has(message_of([&] { functional::rope_(x, cos, sin); }), "rope_: x is a leaf"));
  CHECK(has(message_of([&] {
              functional::rope(x, torch::randn({7, 21}), torch::randn({7, 21}));
            }),
            "for 42 elements of a row"));
}

TEST_CASE("RotaryEmbedding turns by positions", "[rope]") {
  torch::manual_seed(0);
  nn::RotaryEmbedding rope(nn::RotaryEmbeddingOptions(16).max_seq_len(64).interleaved(true));
  const at::Tensor x = torch::randn({2, 4, 10, 16});
  const at::Tensor y = rope(x);
  CHECK(torch::equal(rope(x, torch::arange(10)), y));
  CHECK(torch::equal(rope(x.transpose(1, 2), std::nullopt, -3).transpose(1, 2), y));
  const at::Tensor shifted = torch::arange(10).expand({2, 10}) + torch::tensor({{0}, {5}});
  const at::Tensor z = rope(x, shifted);
  CHECK(torch::equal(z[0], y[0]));
  CHECK(torch::equal(z[1], rope(x[1], torch::arange(5, 15))));
  CHECK(torch::equal(rope(x.transpose(1, 2), shifted, -3).transpose(1, 2), z));
  // Scores depend on distances only.
  const at::Tensor q = torch::randn({1, 16}), k = torch::randn({1, 16});
  const auto score = [&](int64_t i, int64_t j) {
    return (rope(q, torch::tensor({i})) * rope(k, torch::tensor({j}))).sum().item<double>();
  };
  CHECK(std::fabs(score(3, 9) - score(43, 49)) < 1e-5);
  rope->to(torch::kHalf);
  CHECK(rope->cos.scalar_type() == torch::kFloat);
  CHECK(has(message_of([&] { rope(torch::randn({65, 16})); }), "max_seq_len is 64"));
  CHECK(has(message_of([] { nn::RotaryEmbedding(7); }), "dim is 7"));
}
