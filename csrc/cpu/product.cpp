#include "product.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <functional>

#include "../ops/check.h"
#include "../ops/gather.h"
#include "../ops/overrides.h"
#include "isa/kernels.h"
#include "isa/linear.h"

namespace halfstep::cpu {

namespace {

void in_parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, count, 1, body);
}

/// kScratch numbers, which the thread keeps.
float* scratch() {
  thread_local const c10::DataPtr kept =
      c10::GetCPUAllocator()->allocate(size_t(kScratch) * sizeof(float));
  return static_cast<float*>(kept.get());
}

/// Lines are rows of a, columns of b.
TileMatrix lines_of(const at::Tensor& t, bool rows_are_lines) {
  return {t.const_data_ptr(), t.scalar_type() == at::kHalf, t.stride(rows_are_lines ? 0 : 1),
          t.stride(rows_are_lines ? 1 : 0)};
}
at::Tensor with_a_contiguous_side(const at::Tensor& t) {
  return t.stride(0) == 1 || t.stride(1) == 1 ? t : t.contiguous();
}

}  // namespace

const TileKernels* tiles() {
  static const TileKernels* const found = [] {
#if defined(HALFSTEP_AMX)
    if (ops::has_matrix_unit()) return &kAmxTiles;
#endif
    return ops::has_vector_tiles() ? kernels().vector_tiles : nullptr;
  }();
  return found;
}

bool in_tiles(int64_t m, int64_t n, int64_t k) {
  return tiles() && std::min({m, n, k}) >= kTileBlock && m * n * k >= int64_t(1) << 20;
}

bool values_fit_tiles(const at::Tensor& halves) {
  if (!tiles()->finite) return true;
  at::Tensor rows = halves.stride(0) == 1 ? halves.t() : halves;
  if (rows.stride(1) != 1) rows = rows.contiguous();
  const int64_t count = rows.size(0), columns = rows.size(1), stride = rows.stride(0);
  const auto* data = static_cast<const char*>(rows.const_data_ptr());
  std::atomic<bool> finite = true;
  at::parallel_for(0, count, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(columns, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end && finite.load(std::memory_order_relaxed); ++i)
                       if (!tiles()->finite(data + 2 * i * stride, columns)) finite = false;
                   });
  return finite;
}

void add_to(const TileResult& piece, const at::Tensor& matrix) {
  const float* from = matrix.const_data_ptr<float>() + piece.row * matrix.stride(0) + piece.column;
  for (int64_t i = 0; i < piece.rows; ++i, from += matrix.stride(0))
    for (int64_t j = 0; j < piece.columns; ++j) piece.data[i * piece.stride + j] += from[j];
}

void round_to(const TileResult& piece, const at::Tensor& matrix, const float* bias) {
  const int64_t size = matrix.element_size();
  LinearForward work;
  work.product = {piece.data, piece.stride * int64_t(sizeof(float)), Dtype::kF32};
  work.y = {static_cast<char*>(matrix.mutable_data_ptr()) +
                (piece.row * matrix.stride(0) + piece.column) * size,
            matrix.stride(0) * size, ops::dtype_code(matrix.scalar_type())};
  if (bias) work.bias = bias + piece.column;
  work.columns = piece.columns;
  kernels().linear->forward(work, 0, piece.rows);
}

Operand::Operand(const at::Tensor& like, int64_t numel) {
  if (ops::is_sixteen(like.scalar_type())) wide_.emplace(numel);
}

Right::Right(const at::Tensor& b, int64_t rows, bool use_tiles) {
  const int64_t k = b.size(0), n = b.size(1);
  if (!use_tiles) {
    wide_b_.emplace(b, b.numel());
    if (rows > 0) wide_a_.emplace(b, rows * k);
    b_ = (*wide_b_)(b);
    return;
  }
  b_ = with_a_contiguous_side(b);
  packed_.emplace(packed_bytes(n, k) / int64_t(sizeof(float)));
  pack_b(*tiles(), lines_of(b_, false), n, k, static_cast<char*>(packed_->data()), in_parallel);
}

void Right::run(TileProduct product, const at::Tensor& a,
                const std::function<void(const TileResult&)>& take) const {
  const at::Tensor lines = with_a_contiguous_side(a);
  product.m = lines.size(0);
  product.n = b_.size(1);
  product.k = b_.size(0);
  product.a = lines_of(lines, true);
  product.b = lines_of(b_, false);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  multiply_packed(*tiles(), product, static_cast<char*>(packed_->data()), threads, in_parallel,
                  scratch, take);
}

void Right::multiply(const at::Tensor& a,
                     const std::function<void(const TileResult&)>& take) const {
  run({}, a, take);
}

void Right::multiply(at::Tensor& c, const at::Tensor& a, bool add) const {
  if (packed_) {
    TileProduct product{};
    product.c = c.mutable_data_ptr<float>();
    product.c_stride = c.stride(0);
    product.add = add;
    return run(product, a, {});
  }
  const at::Tensor wide = ops::is_sixteen(a.scalar_type()) ? (*wide_a_)(a) : a;
  if (add)
    at::cpu::addmm_(c, wide, b_);
  else
    at::cpu::mm_out(c, wide, b_);
}

}  // namespace halfstep::cpu
