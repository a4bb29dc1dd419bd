#pragma once

// Elementwise ops on tensors of any layout: the order in which all operands are walked, as rows
// whose elements lie one after another. Shared by the CPU and the CUDA side.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_permuted.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <vector>

namespace halfstep::ops {

constexpr size_t kMaxOperands = 6;

/// `rows` rows of `width` elements; row r of operand k begins r * stride[k] elements after the
/// operand's first.
struct Spans {
  int64_t rows = 1, width = 1;
  std::array<int64_t, kMaxOperands> stride{};
};

/// The dimensions of `tensor` from the slowest in memory to the fastest.
inline std::vector<int64_t> memory_order(const at::Tensor& tensor) {
  std::vector<int64_t> order(size_t(tensor.dim()));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return tensor.stride(a) > tensor.stride(b); });
  return order;
}

/// The walk over `operands` (of one shape) in the given order of dimensions, where one exists.
inline std::optional<Spans> find_spans(const std::vector<at::Tensor>& operands,
                                       at::IntArrayRef order) {
  struct Dimension {
    int64_t size;
    std::array<int64_t, kMaxOperands> stride;
  };
  std::vector<Dimension> dimensions;
  for (const int64_t d : order) {
    Dimension next = {operands[0].size(d), {}};
    if (next.size == 1) continue;
    for (size_t k = 0; k < operands.size(); ++k) next.stride[k] = operands[k].stride(d);
    const auto joins = [&] {
      for (size_t k = 0; k < operands.size(); ++k)
        if (dimensions.back().stride[k] != next.stride[k] * next.size) return false;
      return true;
    };
    if (!dimensions.empty() && joins()) {
      next.size *= dimensions.back().size;
      dimensions.back() = next;
    } else {
      dimensions.push_back(next);
    }
  }
  const auto is_run = [&](const Dimension& dimension) {
    for (size_t k = 0; k < operands.size(); ++k)
      if (dimension.stride[k] != 1) return false;
    return true;
  };
  Spans spans;
  if (!dimensions.empty() && is_run(dimensions.back())) {
    spans.width = dimensions.back().size;
    dimensions.pop_back();
  }
  if (dimensions.size() > 1) return std::nullopt;
  if (!dimensions.empty()) {
    spans.rows = dimensions[0].size;
    spans.stride = dimensions[0].stride;
  }
  return spans;
}

/// The walk over `inputs` and `outputs` in the memory order of the first output. Inputs that it
/// cannot take in place are replaced by copies; outputs are dense, or dense but for one dimension.
/// Stepping through single elements is for outputs that leave no choice.
inline Spans plan_spans(std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& outputs) {
  const std::vector<int64_t> order = memory_order(outputs[0]);
  const int64_t least = find_spans(outputs, order).value().width;
  const auto together = [&](const std::vector<at::Tensor>& some) {
    std::vector<at::Tensor> operands = some;
    operands.insert(operands.end(), outputs.begin(), outputs.end());
    std::optional<Spans> spans = find_spans(operands, order);
    if (spans && spans->width == 1 && least != 1) spans.reset();
    return spans;
  };
  const auto copy = [&](at::Tensor& input) {
    input = at::empty_permuted(input.sizes(), order, input.options()).copy_(input);
  };
  for (at::Tensor& input : inputs)
    if (!together({input})) copy(input);
  if (const auto spans = together(inputs)) return *spans;
  for (at::Tensor& input : inputs) copy(input);
  return together(inputs).value();
}

}  // namespace halfstep::ops
