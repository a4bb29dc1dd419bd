#include <halfstep/functional/rope.h>
#include <halfstep/nn/rope.h>

#include <ATen/ops/arange.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>

namespace halfstep::nn {

RotaryEmbeddingImpl::RotaryEmbeddingImpl(const RotaryEmbeddingOptions& given) : options(given) {
  reset();
}

void RotaryEmbeddingImpl::reset() {
  const int64_t dim = options.dim();
  TORCH_CHECK(dim > 0 && dim % 2 == 0, "RotaryEmbedding: dim is ", dim,
              "; expected a positive even number");
  const at::TensorOptions wide(at::kDouble);
  const at::Tensor frequencies =
      at::pow(at::Scalar(options.base()), at::arange(0, dim, 2, wide).mul(-1.0 / double(dim)));
  const at::Tensor angles = at::outer(at::arange(options.max_seq_len(), wide), frequencies);
  cos = angles.cos().to(at::kFloat);
  sin = angles.sin().to(at::kFloat);
}

at::Tensor RotaryEmbeddingImpl::forward(const at::Tensor& x,
                                        const std::optional<at::Tensor>& positions,
                                        int64_t seq_dim) {
  TORCH_CHECK((seq_dim == -2 || seq_dim == -3) && x.dim() >= -seq_dim,
              "RotaryEmbedding: seq_dim is ", seq_dim, " and x is ", x.sizes(),
              "; expected -2 or -3 and as many dimensions");
  if (cos.device() != x.device()) {
    cos = cos.to(x.device());
    sin = sin.to(x.device());
  }
  at::Tensor c, s;
  if (positions && positions->defined()) {
    const auto gather = [&](const at::Tensor& table) {
      auto sizes = positions->sizes().vec();
      // Leading dimensions of positions are x's from the left; in between every head turns alike.
      if (positions->dim() > 1)
        sizes.insert(sizes.end() - 1, size_t(x.dim() - positions->dim() + seq_dim + 1), 1);
      sizes.push_back(table.size(1));
      return table.index({*positions}).view(sizes);
    };
    c = gather(cos);
    s = gather(sin);
  } else {
    const int64_t seq = x.size(seq_dim);
    TORCH_CHECK(seq <= options.max_seq_len(), "RotaryEmbedding: x has ", seq,
                " positions but max_seq_len is ", options.max_seq_len());
    c = cos.narrow(0, 0, seq);
    s = sin.narrow(0, 0, seq);
  }
  if (seq_dim == -3) {
    c = c.unsqueeze(-2);
    s = s.unsqueeze(-2);
  }
  return functional::rope(x, c, s, options.interleaved());
}

void RotaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "halfstep::nn::RotaryEmbedding(dim=" << options.dim() << ", base=" << options.base()
         << ", max_seq_len=" << options.max_seq_len() << ", interleaved=" << std::boolalpha
         << options.interleaved() << ")";
}

}  // namespace halfstep::nn
