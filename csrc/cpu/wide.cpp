#include "wide.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>

#include <array>

namespace halfstep::cpu {

namespace {

std::array<c10::DataPtr, 3>& kept_by_this_thread() {
  thread_local std::array<c10::DataPtr, 3> kept;
  return kept;
}

}  // namespace

at::Tensor whole_like(const at::Tensor& part, at::IntArrayRef sizes, at::ScalarType type) {
  return at::empty_strided(sizes, at::infer_dense_strides(sizes, part.strides()),
                           part.options().dtype(type));
}

Wide::Wide(int64_t numel) : keep_(numel <= kPiece) {
  if (keep_)
    for (auto& buffer : kept_by_this_thread())
      if (buffer) {
        memory_ = std::move(buffer);
        buffer.clear();
        return;
      }
  memory_ = c10::GetCPUAllocator()->allocate(size_t(keep_ ? kPiece : numel) * sizeof(float));
}

Wide::~Wide() {
  if (keep_)
    for (auto& buffer : kept_by_this_thread())
      if (!buffer) {
        buffer = std::move(memory_);
        return;
      }
}

at::Tensor Wide::shaped(at::IntArrayRef sizes) const {
  return at::from_blob(memory_.get(), sizes, at::TensorOptions().dtype(at::kFloat));
}

at::Tensor Wide::operator()(const at::Tensor& piece) const {
  const auto strides = at::infer_dense_strides(piece.sizes(), piece.strides());
  return at::from_blob(memory_.get(), piece.sizes(), strides, at::TensorOptions().dtype(at::kFloat))
      .copy_(piece);
}

}  // namespace halfstep::cpu
