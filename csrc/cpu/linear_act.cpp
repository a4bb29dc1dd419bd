// The ops linear, linear_forward, linear_backward and linear_wgrad_ on the CPU.
//
//   wide    FP32 products of tiles of rows (product.h): the product stays in the cache, and the
//           epilogue (isa/linear.cpp) reads it there and rounds once. In the backward dz stays in
//           FP32, and both products use the same copy of it.
//   narrow  16-bit products by oneDNN, where the CPU has the unit, FP16 has not the quicker matrix
//           unit of product.h, and one rounding is still all there is: no activation, ReLU (which
//           commutes with rounding), and bfloat16, whose unit is four times quicker than FP32:
//           there GELU sees h rounded to bfloat16, as it does in torch. In the backward dz is
//           rounded once, before its products.
//   Tests: tests/python/test_linear.py.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <optional>

#include "../ops/gather.h"
#include "../ops/linear.h"
#include "../ops/overrides.h"
#include "isa/kernels.h"
#include "isa/linear.h"
#include "product.h"

namespace halfstep::cpu {

namespace {

using ops::Gradients;
using ops::OptionalName;
using ops::OptionalTensor;

/// A matrix whose rows are contiguous, as a kernel sees it.
Rows rows_of(const at::Tensor& matrix) {
  return {matrix.data_ptr(), matrix.stride(0) * int64_t(matrix.element_size()),
          matrix.scalar_type() == at::kByte ? Dtype::kF32 : ops::dtype_code(matrix.scalar_type())};
}
Rows rows_of(const TileResult& r) {
  return {r.data, r.stride * int64_t(sizeof(float)), Dtype::kF32};
}
/// The same with row 0 moved, so that row `first` is where row 0 was.
Rows starting_at(Rows rows, int64_t first) {
  rows.data = rows.row(-first);
  return rows;
}

/// Rows [begin, end) of a kernel on all threads, in pieces of whole blocks of rows.
template <class Kernel, class Work>
void run_rows(const Kernel& kernel, const Work& work, int64_t begin, int64_t end) {
  const int64_t blocks = (end - begin + math::kBiasRows - 1) / math::kBiasRows;
  const int64_t grain =
      std::max<int64_t>(1, 8192 / (math::kBiasRows * std::max<int64_t>(work.columns, 1)));
  at::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    kernel(work, begin + first * math::kBiasRows, std::min(end, begin + last * math::kBiasRows));
  });
}

/// Memory for results in the compute type.
class Room {
 public:
  Room(const at::Tensor& like, int64_t numel) {
    if (ops::wide_type(like) == at::kFloat)
      wide_.emplace(numel);
    else
      memory_ = at::empty({numel}, like.options());
  }
  at::Tensor shaped(int64_t rows, int64_t columns) const {
    if (wide_) return wide_->shaped({rows, columns});
    return memory_.narrow(0, 0, rows * columns).view({rows, columns});
  }

 private:
  std::optional<Wide> wide_;
  at::Tensor memory_;
};

/// Rows of a tile of a product with a [n, k] weight, whole groups of kBiasRows. Small ones keep
/// product and operand near the cores; but torch's product packs the weight for each tile anew,
/// which takes as long as reading some 3 min(n, k) rows from memory instead (measured). Ours packs
/// it once.
int64_t tile_rows(int64_t m, int64_t n, int64_t k, bool use_tiles) {
  const int64_t narrow = std::min(n, k), wide = std::max<int64_t>({n, k, 1});
  int64_t most = std::max<int64_t>(kPiece / 2 / wide, 512);
  if (!use_tiles) most = std::max(most, std::min(3 * narrow, 8 * kPiece / wide));
  return (even_part(m, most) + math::kBiasRows - 1) / math::kBiasRows * math::kBiasRows;
}

struct Tile {
  int64_t rows, columns;
};
/// Columns are cut only where an FP32 copy of the weight would be large; the cuts lie on whole
/// groups of a mask.
Tile tile_of(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kWeight = 4 * kPiece;
  int64_t columns = n;
  if (n * k > kWeight)
    columns = (even_part(n, std::max<int64_t>(kWeight / k, 128)) + 127) / 128 * 128;
  return {tile_rows(m, columns, k, false), columns};
}

// ---- forward -----------------------------------------------------------------------------------
struct Forward {
  at::Tensor y, saved;
};

/// Row 0 of columns from `column` on.
Rows columns_from(Rows rows, int64_t column, int64_t element_size) {
  if (rows) rows.data = static_cast<char*>(rows.data) + column * element_size;
  return rows;
}

/// What becomes of columns from `column` on.
LinearForward forward_work(int64_t column, int64_t columns, LinearActivation activation,
                           const at::Tensor& y, const at::Tensor& saved, const void* bias) {
  LinearForward work;
  work.columns = columns;
  work.activation = activation;
  work.bias = bias;
  work.y = columns_from(rows_of(y), column, int64_t(y.element_size()));
  if (saved.numel() != 0)
    work.saved = saved.scalar_type() == at::kByte
                     ? columns_from(rows_of(saved), column / 8, 1)
                     : columns_from(rows_of(saved), column, int64_t(saved.element_size()));
  return work;
}

void forward_wide(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                  LinearActivation activation, const at::Tensor& y, const at::Tensor& saved,
                  bool use_tiles) {
  const int64_t m = x.size(0), k = x.size(1), n = weight.size(0);
  const Tile tile = tile_of(m, n, k);
  at::Tensor wide_bias;
  if (bias) wide_bias = bias->to(ops::wide_type(x)).contiguous();
  const char* const bias_data =
      bias ? static_cast<const char*>(wide_bias.const_data_ptr()) : nullptr;
  const auto bias_from = [&](int64_t column) -> const void* {
    return bias_data ? bias_data + column * wide_bias.element_size() : nullptr;
  };
  std::optional<Room> room;
  if (!use_tiles) room.emplace(x, tile.rows * tile.columns);
  for (int64_t j = 0; j < n; j += tile.columns) {
    const int64_t columns = std::min(tile.columns, n - j);
    const Right right(weight.narrow(0, j, columns).t(), tile.rows, use_tiles);
    if (use_tiles) {
      right.multiply(x, [&](const TileResult& r) {
        const int64_t column = j + r.column;
        auto work = forward_work(column, r.columns, activation, y, saved, bias_from(column));
        work.product = starting_at(rows_of(r), r.row);
        kernels().linear->forward(work, r.row, r.row + r.rows);
      });
      continue;
    }
    auto work = forward_work(j, columns, activation, y, saved, bias_from(j));
    for (int64_t i = 0; i < m; i += tile.rows) {
      const int64_t rows = std::min(tile.rows, m - i);
      at::Tensor product = room->shaped(rows, columns);
      right.multiply(product, x.narrow(0, i, rows));
      work.product = starting_at(rows_of(product), i);
      run_rows(kernels().linear->forward, work, i, i + rows);
    }
  }
}

/// Whether the products of an FP16 x [m, k] with a weight go through tiles(); a matrix unit for
/// FP16 itself is oneDNN's, and quicker, where its rounding is the only one.
bool takes_tiles(const at::Tensor& x, const at::Tensor& weight, bool rounds_once) {
  return x.scalar_type() == at::kHalf && !(rounds_once && ops::has_half_matrix_unit()) &&
         in_tiles(x.size(0), weight.size(0), weight.size(1));
}

bool is_narrow(const at::Tensor& x, LinearActivation activation) {
  return ops::is_sixteen(x.scalar_type()) && ops::has_unit(x.scalar_type()) &&
         (activation <= LinearActivation::kRelu || x.scalar_type() == at::kBFloat16);
}

Forward forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                LinearActivation activation, bool saves) {
  const Plain plain;
  const bool same_bias = !bias || bias->scalar_type() == x.scalar_type();
  Forward out;
  out.saved = ops::empty_saved(x, weight, saves ? activation : LinearActivation::kNone);
  const bool is_plain = activation == LinearActivation::kNone && same_bias;
  const at::Tensor rows = ops::as_rows(x);
  const bool use_tiles = takes_tiles(rows, weight, activation <= LinearActivation::kRelu) &&
                         values_fit_tiles(rows) && values_fit_tiles(weight);
  if (is_plain && !use_tiles && (!ops::is_sixteen(x.scalar_type()) || is_narrow(x, activation))) {
    out.y = at::linear(x, weight, bias).contiguous();
    return out;
  }
  if (same_bias && !use_tiles && is_narrow(x, activation)) {
    const at::Tensor product = ops::as_rows(at::linear(x, weight, bias)).contiguous();
    LinearForward work;
    work.product = rows_of(product);
    work.columns = weight.size(0);
    work.activation = activation;
    out.y = activation == LinearActivation::kRelu ? product
                                                  : at::empty(product.sizes(), product.options());
    work.y = rows_of(out.y);
    if (out.saved.numel() != 0) work.saved = rows_of(out.saved);
    run_rows(kernels().linear->forward, work, 0, product.size(0));
    auto sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    out.y = out.y.view(sizes);
    return out;
  }
  out.y = ops::empty_output(x, weight);
  if (out.y.numel() != 0)
    forward_wide(rows, weight, bias, activation, ops::as_rows(out.y), out.saved, use_tiles);
  return out;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                  OptionalName activation) {
  const LinearActivation kind = ops::activation_of("linear", activation);
  ops::check_linear("linear", x, weight, bias);
  return forward(x, weight, bias, kind, false).y;
}

std::tuple<at::Tensor, at::Tensor> linear_forward(const at::Tensor& x, const at::Tensor& weight,
                                                  const OptionalTensor& bias,
                                                  OptionalName activation) {
  const LinearActivation kind = ops::activation_of("linear_forward", activation);
  ops::check_linear("linear_forward", x, weight, bias);
  Forward out = forward(x, weight, bias, kind, true);
  return {out.y, out.saved};
}

// ---- backward ----------------------------------------------------------------------------------
/// What a backward has to do; all tensors are matrices, unwanted results undefined.
struct Backward {
  at::Tensor dy, x, weight, saved;
  LinearActivation activation;
  at::Tensor dx, dw, db;
  at::Tensor sums;  ///< [blocks of rows, N] in the compute type, where db is wanted

  int64_t rows() const { return dy.size(0); }
  int64_t columns() const { return dy.size(1); }
  LinearBackward work() const {
    LinearBackward work;
    work.dy = rows_of(dy);
    work.columns = columns();
    work.activation = activation;
    if (activation != LinearActivation::kNone) work.saved = rows_of(saved);
    if (sums.defined()) work.sums = rows_of(sums);
    return work;
  }
};

void finish_bias(const Backward& b) {
  if (!b.db.defined()) return;
  const Rows sums = rows_of(b.sums);
  at::parallel_for(0, b.columns(), 1024, [&](int64_t begin, int64_t end) {
    kernels().linear->add_rows(sums, b.sums.size(0), b.db.data_ptr(),
                               ops::dtype_code(b.db.scalar_type()), begin, end);
  });
}

void backward_wide(const Backward& b, bool use_tiles) {
  const int64_t m = b.rows(), n = b.columns(), k = b.x.size(1);
  const int64_t tile = tile_rows(m, n, k, use_tiles);
  const Room dz_room(b.x, tile * n);
  std::optional<Right> weight;
  std::optional<Room> dx_room;
  at::Tensor dw = b.dw;
  if (b.dx.defined()) {
    weight.emplace(b.weight, 0, use_tiles);
    if (ops::is_sixteen(b.x.scalar_type()) && !use_tiles) dx_room.emplace(b.x, tile * k);
  }
  if (dw.defined() && dw.scalar_type() != ops::wide_type(b.x))
    dw = at::empty({n, k}, b.x.options().dtype(ops::wide_type(b.x)));
  LinearBackward work = b.work();
  for (int64_t i = 0; i < m; i += tile) {
    const int64_t rows = std::min(tile, m - i);
    const at::Tensor dz = dz_room.shaped(rows, n);
    work.dz = starting_at(rows_of(dz), i);
    run_rows(kernels().linear->backward, work, i, i + rows);
    if (b.dx.defined()) {
      at::Tensor target = b.dx.narrow(0, i, rows);
      if (use_tiles) {
        weight->multiply(dz, [&](const TileResult& r) { round_to(r, target); });
      } else {
        at::Tensor product = dx_room ? dx_room->shaped(rows, k) : target;
        weight->multiply(product, dz);
        if (dx_room) target.copy_(product);
      }
    }
    if (dw.defined()) Right(b.x.narrow(0, i, rows), 0, use_tiles).multiply(dw, dz.t(), i != 0);
  }
  if (dw.defined() && !dw.is_same(b.dw)) b.dw.copy_(dw);
}

/// into (+)= dz^T x in the compute type.
void wgrad(at::Tensor& into, const at::Tensor& dz, const at::Tensor& x, bool fresh) {
  const int64_t m = dz.size(0), n = dz.size(1), k = x.size(1);
  const int64_t tile =
      even_part(m, std::max<int64_t>(kPiece / 2 / std::max<int64_t>({n, k, 1}), 512));
  const bool dense = into.stride(1) == 1 && into.stride(0) >= k;
  const bool use_tiles = dense && x.scalar_type() == at::kHalf &&
                         in_tiles(n, k, std::min(tile, m)) && values_fit_tiles(dz) &&
                         values_fit_tiles(x);
  for (int64_t i = 0; i < m; i += tile) {
    const int64_t rows = std::min(tile, m - i);
    Right(x.narrow(0, i, rows), n, use_tiles)
        .multiply(into, dz.narrow(0, i, rows).t(), !(fresh && i == 0));
  }
}

/// Products of a dz that is rounded to 16 bits, by oneDNN.
void backward_narrow(Backward& b) {
  LinearBackward work = b.work();
  at::Tensor dz = b.dy;
  if (b.activation != LinearActivation::kNone) {
    dz = at::empty(b.dy.sizes(), b.dy.options());
    work.dz = rows_of(dz);
  }
  if (work.dz || work.sums) run_rows(kernels().linear->backward, work, 0, b.rows());
  if (b.dx.defined()) at::mm_out(b.dx, dz, b.weight);
  if (!b.dw.defined()) return;
  if (b.dw.scalar_type() == b.x.scalar_type())
    at::mm_out(b.dw, dz.t(), b.x);
  else
    wgrad(b.dw, dz, b.x, true);
}

/// Above this an FP32 copy of weight and weight gradient is more than a layer should cost.
constexpr int64_t kLargestWideWeight = int64_t(1) << 24;

Gradients linear_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                          const at::Tensor& saved, OptionalName activation,
                          std::array<bool, 3> wanted, at::ScalarType weight_dtype,
                          std::optional<at::ScalarType> bias_dtype) {
  const LinearActivation kind = ops::activation_of("linear_backward", activation);
  ops::check_linear_backward(dy, x, weight, saved, kind, weight_dtype, bias_dtype);
  const Plain plain;
  Gradients gradients = ops::empty_gradients(x, weight, wanted, weight_dtype, bias_dtype);
  auto& [dx, dw, db] = gradients;
  Backward b{ops::as_rows(dy).contiguous(),
             ops::as_rows(x),
             weight,
             saved.contiguous(),
             kind,
             {},
             {},
             {},
             {}};
  if (b.rows() == 0 || b.columns() == 0) {
    for (at::Tensor* t : {&dx, &dw, &db}) t->zero_();
    return gradients;
  }
  if (wanted[0]) b.dx = dx.view({b.rows(), x.size(-1)});
  if (wanted[1]) b.dw = dw;
  if (wanted[2] && bias_dtype) {
    b.db = db;
    const int64_t blocks = (b.rows() + math::kBiasRows - 1) / math::kBiasRows;
    b.sums = at::empty({blocks, b.columns()}, x.options().dtype(ops::wide_type(x)));
  }
  const bool large = weight.numel() > kLargestWideWeight;
  const bool keeps_h = kind > LinearActivation::kRelu;
  const bool use_tiles = !large && takes_tiles(b.x, weight, true) && values_fit_tiles(b.dy) &&
                         values_fit_tiles(b.x) && values_fit_tiles(weight) &&
                         (!keeps_h || values_fit_tiles(b.saved));
  const bool narrow =
      ops::is_sixteen(x.scalar_type()) && !use_tiles && (ops::has_unit(x.scalar_type()) || large);
  narrow ? backward_narrow(b) : backward_wide(b, use_tiles);
  finish_bias(b);
  return gradients;
}

void linear_wgrad_(const at::Tensor& into, const at::Tensor& dz, const at::Tensor& x) {
  ops::check_linear_wgrad(into, dz, x);
  const Plain plain;
  at::Tensor sum = into;
  if (dz.numel() != 0 && x.numel() != 0) wgrad(sum, ops::as_rows(dz), ops::as_rows(x), false);
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CPU, m) {
  m.impl("linear", linear);
  m.impl("linear_forward", linear_forward);
  m.impl("linear_backward", linear_backward);
  m.impl("linear_wgrad_", linear_wgrad_);
}

}  // namespace halfstep::cpu
