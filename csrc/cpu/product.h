#pragma once

// c (+)= a b in the compute type: FP32 for operands of 16 bits and FP32, FP64 for FP64. FP16
// operands go through the kernels of tiles/tiles.h where this CPU has some that are quicker and the
// product is worth its packing; everywhere else they are widened for torch's FP32 product. All sum
// in FP32, of exact products.

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>

#include "tiles/multiply.h"
#include "wide.h"

namespace halfstep::cpu {

/// The kernels for this CPU's BF16 matrix unit (ops::has_matrix_unit), or in FP32
/// (ops::has_vector_tiles); null where FP16 products are better left to torch.
const TileKernels* tiles();

/// Whether FP16 products of [m, k] and [k, n] are worth it.
bool in_tiles(int64_t m, int64_t n, int64_t k);
/// Whether the elements of this FP16 matrix are for tiles(): the matrix unit takes finite ones
/// only.
bool values_fit_tiles(const at::Tensor& halves);

/// Operands in the compute type: 16-bit ones as copies in memory that is used for one piece after
/// another, others as they are.
class Operand {
 public:
  Operand(const at::Tensor& like, int64_t numel);
  at::Tensor operator()(const at::Tensor& piece) const { return wide_ ? (*wide_)(piece) : piece; }

 private:
  std::optional<Wide> wide_;
};

/// The piece += its place in an FP32 matrix; then matrix = the piece + bias, rounded once. Rows are
/// contiguous; `bias`: FP32, of the matrix' columns, or null.
void add_to(const TileResult& piece, const at::Tensor& matrix);
void round_to(const TileResult& piece, const at::Tensor& matrix, const float* bias = nullptr);

/// b [k, n], made ready once for products with pieces of a.
class Right {
 public:
  /// rows: the most of a piece of a; 0 where a has the compute type. use_tiles: b is FP16, a FP16
  /// or FP32, and what is FP16 is values_fit_tiles().
  Right(const at::Tensor& b, int64_t rows, bool use_tiles);
  /// c (+)= a b; c [m, n] in the compute type, its rows contiguous.
  void multiply(at::Tensor& c, const at::Tensor& a, bool add = false) const;
  /// In tiles only: a b in pieces, each taken by the thread that computed it, from memory
  /// that is then used for its next one.
  void multiply(const at::Tensor& a, const std::function<void(const TileResult&)>& take) const;

 private:
  void run(TileProduct product, const at::Tensor& a,
           const std::function<void(const TileResult&)>& take) const;

  at::Tensor b_;
  std::optional<Wide> packed_;
  std::optional<Operand> wide_b_, wide_a_;
};

}  // namespace halfstep::cpu
