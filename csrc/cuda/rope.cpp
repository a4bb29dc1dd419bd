#include "../ops/rope.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common.h"

namespace halfstep::cuda {

namespace {

at::Tensor rope_cuda(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                     bool interleaved, bool inverse) {
  ops::check_rope("rope", x, cos, sin);
  const Place place(x);
  at::Tensor out = at::empty_like(x);
  const ops::RopeWork work(x, out, cos, sin, interleaved, inverse);
  check("rope", rope(work.rows(), place.stream()));
  work.finish();
  return out;
}

void rope_in_place_cuda(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                        bool interleaved, bool inverse) {
  ops::check_rope_in_place(x, cos, sin);
  const Place place(x);
  const ops::RopeWork work(x, x, cos, sin, interleaved, inverse);
  check("rope_", rope(work.rows(), place.stream()));
  work.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CUDA, m) {
  m.impl("rope", rope_cuda);
  m.impl("rope_", rope_in_place_cuda);
}

}  // namespace halfstep::cuda
