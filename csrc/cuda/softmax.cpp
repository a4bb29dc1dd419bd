#include "../ops/softmax.h"

#include <torch/library.h>

#include "common.h"

namespace halfstep::cuda {

namespace {

at::Tensor softmax_cuda(const at::Tensor& x, int64_t dim, double scale,
                        const std::optional<at::Tensor>& mask, bool causal) {
  ops::check_softmax(x, dim, scale, mask, causal);
  const Place place(x);
  ops::SoftmaxWork work(x, dim, scale, causal);
  work.set_mask(mask);
  check("softmax", softmax(work.rows(), place.stream()));
  return work.finish();
}

at::Tensor softmax_backward_cuda(const at::Tensor& grad, const at::Tensor& y, int64_t dim,
                                 double scale, bool causal) {
  ops::check_softmax_backward(grad, y, dim, scale, causal);
  const Place place(y);
  ops::SoftmaxWork work(y, dim, scale, causal);
  work.set_grad(grad);
  check("softmax_backward", softmax_backward(work.rows(), place.stream()));
  return work.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CUDA, m) {
  m.impl("softmax", softmax_cuda);
  m.impl("softmax_backward", softmax_backward_cuda);
}

}  // namespace halfstep::cuda
