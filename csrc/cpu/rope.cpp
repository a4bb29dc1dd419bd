#include "../ops/rope.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common.h"
#include "isa/rope.h"

namespace halfstep::cpu {

namespace {

void rotate(const at::Tensor& x, const at::Tensor& out, const at::Tensor& cos,
            const at::Tensor& sin, bool interleaved, bool inverse) {
  const ops::RopeWork work(x, out, cos, sin, interleaved, inverse);
  const auto& all = work.rows();
  // 32,768 elements: below that a thread costs more than it brings.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(all.width, 1));
  at::parallel_for(0, all.rows, grain,
                   [&](int64_t begin, int64_t end) { kernels().rope->rotate(all, begin, end); });
  work.finish();
}

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool interleaved,
                bool inverse) {
  ops::check_rope("rope", x, cos, sin);
  at::Tensor out = at::empty_like(x);
  rotate(x, out, cos, sin, interleaved, inverse);
  return out;
}

void rope_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool interleaved,
           bool inverse) {
  ops::check_rope_in_place(x, cos, sin);
  rotate(x, x, cos, sin, interleaved, inverse);
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CPU, m) {
  m.impl("rope", rope);
  m.impl("rope_", rope_);
}

}  // namespace halfstep::cpu
