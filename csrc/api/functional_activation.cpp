#include <halfstep/functional/activation.h>

#include <ATen/ops/randint.h>

#include <limits>

#include "calls.h"

namespace halfstep::functional {

using at::Tensor;

Tensor gelu(const Tensor& x, std::string_view approximate) {
  static const auto op = api::find_op<Tensor(const Tensor&, std::string_view)>("halfstep::gelu");
  return op.call(x, approximate);
}

Tensor silu(const Tensor& x) {
  static const auto op = api::find_op<Tensor(const Tensor&)>("halfstep::silu");
  return op.call(x);
}

Tensor squared_relu(const Tensor& x) {
  static const auto op = api::find_op<Tensor(const Tensor&)>("halfstep::squared_relu");
  return op.call(x);
}

Tensor swiglu(const Tensor& gate, const std::optional<Tensor>& up,
              const std::optional<Tensor>& overflowed) {
  using Optional = std::optional<Tensor>;
  static const auto plain =
      api::find_op<Tensor(const Tensor&, const Optional&)>("halfstep::swiglu");
  static const auto counted = api::find_op<Tensor(const Tensor&, const Optional&, const Tensor&)>(
      "halfstep::swiglu_counted");
  return overflowed ? counted.call(gate, up, *overflowed) : plain.call(gate, up);
}

Tensor geglu(const Tensor& gate, const std::optional<Tensor>& up, std::string_view approximate,
             const std::optional<Tensor>& overflowed) {
  using Optional = std::optional<Tensor>;
  static const auto plain =
      api::find_op<Tensor(const Tensor&, const Optional&, std::string_view)>("halfstep::geglu");
  static const auto counted =
      api::find_op<Tensor(const Tensor&, const Optional&, const Tensor&, std::string_view)>(
          "halfstep::geglu_counted");
  return overflowed ? counted.call(gate, up, *overflowed, approximate)
                    : plain.call(gate, up, approximate);
}

Tensor bias_dropout_add(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& residual,
                        double p, bool training, const std::optional<Tensor>& seed) {
  using Optional = std::optional<Tensor>;
  static const auto op =
      api::find_op<Tensor(const Tensor&, const Optional&, const Tensor&, double, const Optional&)>(
          "halfstep::bias_dropout_add");
  if (!training) p = 0;
  Optional numbers = seed;
  if (!numbers && p > 0 && p < 1)
    numbers = at::randint(0, std::numeric_limits<int64_t>::max(), {2},
                          at::TensorOptions().dtype(at::kLong).device(x.device()));
  return op.call(x, bias, residual, p, numbers);
}

}  // namespace halfstep::functional
