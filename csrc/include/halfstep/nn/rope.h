#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/pimpl.h>

#include <optional>

#include "../export.h"

namespace halfstep::nn {

struct HALFSTEP_API RotaryEmbeddingOptions {
  /// How many elements of a head turn; even.
  /* implicit */ RotaryEmbeddingOptions(int64_t dim) : dim_(dim) {}
  TORCH_ARG(int64_t, dim);
  TORCH_ARG(double, base) = 10000;
  TORCH_ARG(int64_t, max_seq_len) = 2048;
  TORCH_ARG(bool, interleaved) = false;
};

/// Rotary position embedding: pair i of position p turns by p base^(-2i/dim). The tables are FP32,
/// made on the CPU and moved to the device of the first x from another one; they are no part of the
/// state and stay FP32 when the module is cast.
class HALFSTEP_API RotaryEmbeddingImpl : public torch::nn::Cloneable<RotaryEmbeddingImpl> {
 public:
  explicit RotaryEmbeddingImpl(const RotaryEmbeddingOptions& options);
  explicit RotaryEmbeddingImpl(int64_t dim) : RotaryEmbeddingImpl(RotaryEmbeddingOptions(dim)) {}
  void reset() override;
  /// x: [..., seq, head_dim], or with seq_dim = -3 [..., seq, heads, head_dim]. positions: integers
  /// [seq] or [batch…, seq], whose leading dimensions are x's; without them 0, 1, 2, ….
  at::Tensor forward(const at::Tensor& x, const std::optional<at::Tensor>& positions = {},
                     int64_t seq_dim = -2);
  void pretty_print(std::ostream& stream) const override;

  RotaryEmbeddingOptions options;
  at::Tensor cos, sin;  ///< FP32 [max_seq_len, dim/2]

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {2, torch::nn::AnyValue(int64_t(-2))})
};
TORCH_MODULE(RotaryEmbedding);

}  // namespace halfstep::nn
