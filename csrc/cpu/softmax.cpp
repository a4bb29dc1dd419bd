#include "../ops/softmax.h"

#include <torch/library.h>

#include <memory>

#include "common.h"
#include "isa/softmax.h"

namespace halfstep::cpu {

namespace {

constexpr int64_t kGrain = 32768;  // elements: below that a thread costs more than it brings

/// body(row, scratch) for all rows, with `bytes` of scratch. Causal rows grow within their matrix:
/// where a thread has but a few matrices, first and last rows are taken in turn, so that every
/// thread gets as many elements. In order they are quicker, since memory is then read ahead.
template <class Body>
void for_each_row(const math::SoftmaxRows& all, int64_t bytes, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(all.length, 1));
  const int64_t queries = all.queries.size;
  const bool in_turn = all.causal && all.rows < 8 * at::get_num_threads() * queries;
  at::parallel_for(0, all.rows, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[size_t(bytes)]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t query = i % queries;
      const int64_t turn = query % 2 == 0 ? query / 2 : queries - 1 - query / 2;
      body(in_turn ? i - query + turn : i, scratch.get());
    }
  });
}

SoftmaxRow describe_row(const math::SoftmaxRows& all, int64_t row) {
  const int64_t before = row * all.length * math::dtype_size(all.dtype);
  SoftmaxRow one = {};
  one.dtype = all.dtype;
  one.length = all.length;
  one.count = math::softmax_count(all, row);
  one.scale = all.scale;
  one.x = static_cast<const char*>(all.x) + before;
  one.out = static_cast<char*>(all.out) + before;
  if (all.grad) one.grad = static_cast<const char*>(all.grad) + before;
  one.mask = all.mask;
  if (one.mask.data) {
    int64_t offset[1];
    math::row_offsets(all.mask_rows, row, offset);
    const int64_t size = one.mask.is_bool ? 1 : math::dtype_size(one.mask.dtype);
    one.mask.data = static_cast<const char*>(one.mask.data) + offset[0] * size;
  }
  return one;
}

at::Tensor softmax(const at::Tensor& x, int64_t dim, double scale,
                   const std::optional<at::Tensor>& mask, bool causal) {
  ops::check_softmax(x, dim, scale, mask, causal);
  ops::SoftmaxWork work(x, dim, scale, causal);
  work.set_mask(mask);
  const auto& all = work.rows();
  for_each_row(all, softmax_scratch(all.length),
               [&, kernel = kernels().softmax->forward](int64_t row, void* scratch) {
                 SoftmaxRow one = describe_row(all, row);
                 one.scratch = scratch;
                 kernel(one);
               });
  return work.finish();
}

at::Tensor softmax_backward(const at::Tensor& grad, const at::Tensor& y, int64_t dim, double scale,
                            bool causal) {
  ops::check_softmax_backward(grad, y, dim, scale, causal);
  ops::SoftmaxWork work(y, dim, scale, causal);
  work.set_grad(grad);
  const auto& all = work.rows();
  for_each_row(all, 0, [&, kernel = kernels().softmax->backward](int64_t row, void*) {
    kernel(describe_row(all, row));
  });
  return work.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CPU, m) {
  m.impl("softmax", softmax);
  m.impl("softmax_backward", softmax_backward);
}

}  // namespace halfstep::cpu
