// Recurrent layers in FP16 through torch's FP32 layers, for LSTM oneDNN's.
//
//   torch takes oneDNN's layer for FP32 only: with FP16 weights it falls back to one product and a
//   dozen small ops a time step (2.5 times slower than FP32), and under FP16 autocast it hands
//   oneDNN FP16 tensors, which has no training primitive for them and raises.
//   aten::lstm, at AutogradCPU, of FP16 tensors: the operands are widened, the FP32 layer computes,
//   the three results are rounded once; the gradients of weights and inputs are rounded once by the
//   derivative of the widening. The graph keeps FP32 copies of them.
//   aten::mkldnn_rnn_layer, at BackendSelect, in which autocast ends: the same, one layer at a
//   time, and the graph keeps the 16-bit tensors. As with FP32 there is no second derivative.
//   GRU and the plain layers have no layer in oneDNN here and are small ops a time step in FP32
//   too; in FP16 each of them rounds, and converts for the next. aten::gru, rnn_tanh, rnn_relu: as
//   lstm. Tests: tests/python/test_overrides_layers.py.

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>

#include <ATen/ops/gru_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/lstm_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/mkldnn_rnn_layer_backward_ops.h>
#include <ATen/ops/mkldnn_rnn_layer_ops.h>
#include <ATen/ops/rnn_relu_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/rnn_tanh_compositeimplicitautograd_dispatch.h>
#include <torch/library.h>

#include <algorithm>

#include "../ops/overrides.h"
#include "wide.h"

namespace halfstep::cpu {

namespace {

using c10::DispatchKeySet;
using OptionalTensor = std::optional<at::Tensor>;

at::Tensor wide(const at::Tensor& t) {
  return t.defined() && t.scalar_type() == at::kHalf ? t.to(at::kFloat) : t;
}
OptionalTensor wide(const OptionalTensor& t) { return t ? OptionalTensor(wide(*t)) : t; }
std::vector<at::Tensor> wide(at::TensorList list) {
  std::vector<at::Tensor> result;
  for (const auto& t : list) result.push_back(wide(t));
  return result;
}
at::Tensor rounded(const at::Tensor& t) { return t.defined() ? t.to(at::kHalf) : t; }

bool takes(const at::Tensor& input, at::TensorList hx, at::TensorList params) {
  const auto half = [](const at::Tensor& t) {
    return t.scalar_type() == at::kHalf && t.device().is_cpu() && t.layout() == at::kStrided;
  };
  return ops::widens_layers(at::kHalf) && half(input) && std::all_of(hx.begin(), hx.end(), half) &&
         std::all_of(params.begin(), params.end(), half);
}

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
Three rounded(const Three& t) {
  return {rounded(std::get<0>(t)), rounded(std::get<1>(t)), rounded(std::get<2>(t))};
}

/// Of differentiable ops, so it serves above and below autograd.
Three lstm(const at::Tensor& input, at::TensorList hx, at::TensorList params, bool has_biases,
           int64_t layers, double dropout, bool train, bool bidirectional, bool batch_first) {
  namespace stock = at::compositeimplicitautograd;
  if (!takes(input, hx, params))
    return stock::lstm(input, hx, params, has_biases, layers, dropout, train, bidirectional,
                       batch_first);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return rounded(stock::lstm(wide(input), wide(hx), wide(params), has_biases, layers, dropout,
                             train, bidirectional, batch_first));
}

Three lstm_packed(const at::Tensor& data, const at::Tensor& batch_sizes, at::TensorList hx,
                  at::TensorList params, bool has_biases, int64_t layers, double dropout,
                  bool train, bool bidirectional) {
  namespace stock = at::compositeimplicitautograd;
  if (!takes(data, hx, params))
    return stock::lstm(data, batch_sizes, hx, params, has_biases, layers, dropout, train,
                       bidirectional);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return rounded(stock::lstm(wide(data), batch_sizes, wide(hx), wide(params), has_biases, layers,
                             dropout, train, bidirectional));
}

/// GRU and the plain recurrent layers: `kStock` is torch's function.
using Two = std::tuple<at::Tensor, at::Tensor>;
Two rounded(const Two& t) { return {rounded(std::get<0>(t)), rounded(std::get<1>(t))}; }

/// Whether a plain layer runs under FP16 autocast, which casts each of its products: the results
/// are FP16. (Those of a GRU keep the type of hx.)
bool is_cast(const at::Tensor& input, const at::Tensor& hx, at::TensorList params) {
  const auto castable = [](const at::Tensor& t) {
    const bool floating = t.scalar_type() == at::kHalf || t.scalar_type() == at::kFloat;
    return floating && t.device().is_cpu() && t.layout() == at::kStrided;
  };
  return at::autocast::is_autocast_enabled(at::kCPU) &&
         at::autocast::get_autocast_dtype(at::kCPU) == at::kHalf && ops::widens_layers(at::kHalf) &&
         castable(input) && castable(hx) && std::all_of(params.begin(), params.end(), castable);
}
/// Operands in FP32, rounded to FP16 before where autocast would.
at::Tensor operand(const at::Tensor& t, bool cast) { return wide(cast ? rounded(t) : t); }
std::vector<at::Tensor> operands(at::TensorList list, bool cast) {
  std::vector<at::Tensor> result;
  for (const auto& t : list) result.push_back(operand(t, cast));
  return result;
}

using Padded = Two(const at::Tensor&, const at::Tensor&, at::TensorList, bool, int64_t, double,
                   bool, bool, bool);
template <Padded* kStock, bool kPlain = false>
Two recurrent(const at::Tensor& input, const at::Tensor& hx, at::TensorList params, bool has_biases,
              int64_t layers, double dropout, bool train, bool bidirectional, bool batch_first) {
  const bool cast = kPlain && is_cast(input, hx, params);
  if (!cast && !takes(input, hx, params))
    return kStock(input, hx, params, has_biases, layers, dropout, train, bidirectional,
                  batch_first);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return rounded(kStock(operand(input, cast), operand(hx, cast), operands(params, cast), has_biases,
                        layers, dropout, train, bidirectional, batch_first));
}

using Packed = Two(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::TensorList, bool,
                   int64_t, double, bool, bool);
template <Packed* kStock, bool kPlain = false>
Two recurrent_packed(const at::Tensor& data, const at::Tensor& batch_sizes, const at::Tensor& hx,
                     at::TensorList params, bool has_biases, int64_t layers, double dropout,
                     bool train, bool bidirectional) {
  const bool cast = kPlain && is_cast(data, hx, params);
  if (!cast && !takes(data, hx, params))
    return kStock(data, batch_sizes, hx, params, has_biases, layers, dropout, train, bidirectional);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return rounded(kStock(operand(data, cast), batch_sizes, operand(hx, cast), operands(params, cast),
                        has_biases, layers, dropout, train, bidirectional));
}

using Layer = at::_ops::mkldnn_rnn_layer;
using LayerBackward = at::_ops::mkldnn_rnn_layer_backward;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer(
    DispatchKeySet keys, const at::Tensor& input, const at::Tensor& w0, const at::Tensor& w1,
    const at::Tensor& w2, const at::Tensor& w3, const at::Tensor& hx, const at::Tensor& cx,
    bool reverse, at::IntArrayRef batch_sizes, int64_t mode, int64_t hidden, int64_t layers,
    bool has_biases, bool bidirectional, bool batch_first, bool train) {
  const auto below = below_select(keys);
  if (input.scalar_type() != at::kHalf || !ops::widens_layers(at::kHalf) || !reaches_cpu(keys))
    return Layer::redispatch(below, input, w0, w1, w2, w3, hx, cx, reverse, batch_sizes, mode,
                             hidden, layers, has_biases, bidirectional, batch_first, train);
  const Plain plain;
  const auto [y, hy, cy, workspace] = Layer::redispatch(
      below, wide(input), wide(w0), wide(w1), wide(w2), wide(w3), wide(hx), wide(cx), reverse,
      batch_sizes, mode, hidden, layers, has_biases, bidirectional, batch_first, train);
  return {rounded(y), rounded(hy), rounded(cy), workspace};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
layer_backward(DispatchKeySet keys, const at::Tensor& input, const at::Tensor& w1,
               const at::Tensor& w2, const at::Tensor& w3, const at::Tensor& w4,
               const at::Tensor& hx, const at::Tensor& cx, const at::Tensor& y,
               const at::Tensor& hy, const at::Tensor& cy, const OptionalTensor& grad_y,
               const OptionalTensor& grad_hy, const OptionalTensor& grad_cy, bool reverse,
               int64_t mode, int64_t hidden, int64_t layers, bool has_biases, bool train,
               bool bidirectional, at::IntArrayRef batch_sizes, bool batch_first,
               const at::Tensor& workspace) {
  const auto below = below_select(keys);
  if (input.scalar_type() != at::kHalf || !ops::widens_layers(at::kHalf) || !reaches_cpu(keys))
    return LayerBackward::redispatch(below, input, w1, w2, w3, w4, hx, cx, y, hy, cy, grad_y,
                                     grad_hy, grad_cy, reverse, mode, hidden, layers, has_biases,
                                     train, bidirectional, batch_sizes, batch_first, workspace);
  const Plain plain;
  const auto wide_grads = std::apply(
      [](const auto&... g) { return std::make_tuple(rounded(g)...); },
      LayerBackward::redispatch(
          below, wide(input), wide(w1), wide(w2), wide(w3), wide(w4), wide(hx), wide(cx), wide(y),
          wide(hy), wide(cy), wide(grad_y), wide(grad_hy), wide(grad_cy), reverse, mode, hidden,
          layers, has_biases, train, bidirectional, batch_sizes, batch_first, workspace));
  return wide_grads;
}

void add_layers(torch::Library& m) {
  namespace stock = at::compositeimplicitautograd;
  m.impl("lstm.input", lstm);
  m.impl("lstm.data", lstm_packed);
  m.impl("gru.input", recurrent<stock::gru>);
  m.impl("gru.data", recurrent_packed<stock::gru>);
  m.impl("rnn_tanh.input", recurrent<stock::rnn_tanh, true>);
  m.impl("rnn_tanh.data", recurrent_packed<stock::rnn_tanh, true>);
  m.impl("rnn_relu.input", recurrent<stock::rnn_relu, true>);
  m.impl("rnn_relu.data", recurrent_packed<stock::rnn_relu, true>);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, AutogradCPU, m) { add_layers(m); }
TORCH_LIBRARY_IMPL(aten, CPU, m) { add_layers(m); }
TORCH_LIBRARY_IMPL(aten, BackendSelect, m) {
  m.impl("mkldnn_rnn_layer", layer);
  m.impl("mkldnn_rnn_layer_backward", layer_backward);
}

}  // namespace halfstep::cpu
