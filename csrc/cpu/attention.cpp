// The CPU's fused attention (what scaled_dot_product_attention calls) in 16 bits, computed by the
// stock FP32 kernel and rounded once, a few heads at a time. Both ops have a CPU kernel in torch;
// BackendSelect is free. Tests: tests/python/test_overrides.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward_cpu_dispatch.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward_ops.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_cpu_dispatch.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_ops.h>
#include <torch/library.h>

#include "../ops/overrides.h"
#include "wide.h"

namespace halfstep::cpu {

namespace {

using c10::DispatchKeySet;
using OptionalTensor = std::optional<at::Tensor>;
using Forward = at::_ops::_scaled_dot_product_flash_attention_for_cpu;
using Backward = at::_ops::_scaled_dot_product_flash_attention_for_cpu_backward;

bool takes(DispatchKeySet keys, const at::Tensor& query, const at::Tensor& key,
           const at::Tensor& value) {
  const auto fits = [&](const at::Tensor& t) {
    return t.scalar_type() == query.scalar_type() && t.dim() == 4 && t.size(0) == query.size(0) &&
           t.size(1) == query.size(1) && t.numel() != 0;
  };
  return reaches_cpu(keys) && fits(query) && fits(key) && fits(value);
}

/// Batches and heads of one piece.
struct Part {
  int64_t batch, batches, head, heads;
  int64_t all_batches, all_heads;
  at::Tensor operator()(const at::Tensor& t) const {
    return t.narrow(0, batch, batches).narrow(1, head, heads);
  }
  std::vector<int64_t> whole(at::IntArrayRef sizes) const {
    auto all = sizes.vec();
    all[0] = all_batches;
    all[1] = all_heads;
    return all;
  }
  /// A mask is [query, key], or four-dimensional with 1 where it is shared.
  OptionalTensor mask(const OptionalTensor& mask) const {
    if (!mask || !mask->defined()) return mask;
    at::Tensor m = *mask;
    if (m.dim() == 4) {
      if (m.size(0) != 1) m = m.narrow(0, batch, batches);
      if (m.size(1) != 1) m = m.narrow(1, head, heads);
    }
    return m.scalar_type() == at::kBool ? m : m.to(at::kFloat);
  }
};

/// body(part) for parts in which query, key and value have about a quarter of kPiece elements each,
/// or two heads for each thread where that is more: the backward divides its work by heads.
template <class Body>
void for_parts(const at::Tensor& query, const at::Tensor& key, const Body& body) {
  const int64_t batches = query.size(0), heads = query.size(1);
  const int64_t head = std::max(query.size(2), key.size(2)) * query.size(3);
  const int64_t most = std::max<int64_t>(kPiece / 4 / head, 2 * at::get_num_threads());
  const int64_t some_heads = even_part(heads, most);
  const int64_t some = some_heads < heads ? 1 : even_part(batches, most / heads);
  for (int64_t b = 0; b < batches; b += some)
    for (int64_t h = 0; h < heads; h += some_heads)
      body(
          Part{b, std::min(some, batches - b), h, std::min(some_heads, heads - h), batches, heads});
}

at::Tensor wide(const at::Tensor& t) { return t.to(at::kFloat); }

/// Copies a part's result into the whole, which is made at the first part in that part's layout.
void store(const at::Tensor& result, const Part& part, at::Tensor& whole, at::ScalarType type) {
  if (!whole.defined()) whole = whole_like(result, part.whole(result.sizes()), type);
  part(whole).copy_(result);
}

std::tuple<at::Tensor, at::Tensor> forward(DispatchKeySet keys, const at::Tensor& query,
                                           const at::Tensor& key, const at::Tensor& value,
                                           double dropout, bool causal, const OptionalTensor& mask,
                                           std::optional<double> scale) {
  const auto type = query.scalar_type();
  if (!ops::widens_products(type) || !takes(keys, query, key, value))
    return Forward::redispatch(below_select(keys), query, key, value, dropout, causal, mask, scale);
  const Plain plain;
  at::Tensor out, sums;
  for_parts(query, key, [&](const Part& part) {
    const auto result = at::cpu::_scaled_dot_product_flash_attention_for_cpu(
        wide(part(query)), wide(part(key)), wide(part(value)), dropout, causal, part.mask(mask),
        scale);
    store(std::get<0>(result), part, out, type);
    store(std::get<1>(result), part, sums, at::kFloat);
  });
  return {out, sums};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    DispatchKeySet keys, const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& out, const at::Tensor& sums, double dropout,
    bool causal, const OptionalTensor& mask, std::optional<double> scale) {
  const auto type = query.scalar_type();
  if (!ops::widens_attention_backward(type) || !takes(keys, query, key, value))
    return Backward::redispatch(below_select(keys), grad, query, key, value, out, sums, dropout,
                                causal, mask, scale);
  const Plain plain;
  at::Tensor grad_query, grad_key, grad_value;
  for_parts(query, key, [&](const Part& part) {
    const auto result = at::cpu::_scaled_dot_product_flash_attention_for_cpu_backward(
        wide(part(grad)), wide(part(query)), wide(part(key)), wide(part(value)), wide(part(out)),
        part(sums), dropout, causal, part.mask(mask), scale);
    store(std::get<0>(result), part, grad_query, type);
    store(std::get<1>(result), part, grad_key, type);
    store(std::get<2>(result), part, grad_value, type);
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, BackendSelect, m) {
  m.impl("_scaled_dot_product_flash_attention_for_cpu", forward);
  m.impl("_scaled_dot_product_flash_attention_for_cpu_backward", backward);
}

}  // namespace halfstep::cpu
