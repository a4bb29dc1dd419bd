#pragma once

// From strided tensors to the rows that the kernels of both devices walk.

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "../math/layout.h"

namespace halfstep::ops {

/// Strides of `tensor` over the leading dimensions `sizes`, to which its own are broadcast from the
/// right: 0 where it has none, or one element.
inline std::vector<int64_t> row_strides(const at::Tensor& tensor, at::IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size(), 0);
  const int64_t own = tensor.dim() - 1;
  for (int64_t d = 0; d < own; ++d)
    if (tensor.size(d) != 1) strides[sizes.size() - size_t(own - d)] = tensor.stride(d);
  return strides;
}

/// Dimensions of one element are left out, and neighbours that every tensor walks as one are
/// merged. None where more than kRowDims are left.
template <int kTensors>
std::optional<math::RowLayout<kTensors>> merge_rows(
    at::IntArrayRef sizes, const std::array<std::vector<int64_t>, kTensors>& strides) {
  math::RowLayout<kTensors> layout;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    const int last = layout.dims - 1;
    bool merges = last >= 0;
    for (int t = 0; t < kTensors && merges; ++t)
      merges = layout.stride[t][last] == strides[size_t(t)][d] * sizes[d];
    if (!merges && layout.dims == math::kRowDims) return std::nullopt;
    const int at = merges ? last : layout.dims++;
    layout.size[at] = math::Divisor(merges ? layout.size[at].size * sizes[d] : sizes[d]);
    for (int t = 0; t < kTensors; ++t) layout.stride[t][at] = strides[size_t(t)][d];
  }
  return layout;
}

}  // namespace halfstep::ops
