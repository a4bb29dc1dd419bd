#pragma once

// The family `activation` between its schemas and its kernels: checks, outputs, and the walk over
// the operands, the same on the CPU, on CUDA and for Meta. A backend gives the launches.

#include "../math/activation.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "check.h"
#include "optional.h"
#include "spans.h"

namespace halfstep::ops {

using math::Activation;
/// "none" or "tanh", as in torch.nn.functional.gelu.
inline Activation gelu_form(const char* op, std::string_view approximate) {
  TORCH_CHECK(approximate == "none" || approximate == "tanh", op, ": approximate is '", approximate,
              "'; expected 'none' or 'tanh'");
  return approximate == "tanh" ? Activation::kGeluTanh : Activation::kGelu;
}

inline void check_float(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(is_supported_float(tensor.scalar_type()), op, ": ", name, " is ", describe(tensor),
              "; expected float16, bfloat16, float32 or float64");
}

inline void check_beside(const char* op, const char* name, const at::Tensor& tensor,
                         const char* reference_name, const at::Tensor& reference) {
  TORCH_CHECK(tensor.scalar_type() == reference.scalar_type() &&
                  tensor.sym_sizes() == reference.sym_sizes(),
              op, ": ", name, " is ", describe(tensor), " but ", reference_name, " is ",
              describe(reference));
  check_device(op, {name}, tensor, {reference_name}, reference);
}

/// gate and up, or the two halves of one tensor.
struct Gated {
  at::Tensor gate, up;
};
inline Gated halves(const char* op, const at::Tensor& gate, const OptionalTensor& up) {
  check_float(op, "gate", gate);
  if (up) {
    check_beside(op, "up", *up, "gate", gate);
    return {gate, *up};
  }
  TORCH_CHECK(gate.dim() > 0 && gate.sym_size(-1) % 2 == 0, op, ": gate is ", describe(gate),
              " and up is missing; expected an even last dimension, gate and up side by side");
  const c10::SymInt half = gate.sym_size(-1) / 2;
  return {gate.narrow_symint(-1, 0, half), gate.narrow_symint(-1, half, half)};
}

inline void check_overflowed(const char* op, const at::Tensor& overflowed, const at::Tensor& gate) {
  TORCH_CHECK(overflowed.scalar_type() == at::kLong && overflowed.sym_numel() == 1, op,
              ": overflowed is ", overflowed.scalar_type(), overflowed.sym_sizes(),
              "; expected one int64 element");
  check_device(op, {"overflowed"}, overflowed, {"gate"}, gate);
}

/// What the dropout ops check: `seed` is {key, offset} on the device.
inline void check_dropout(const char* op, const char* name, const at::Tensor& x, double p,
                          const OptionalTensor& seed) {
  check_float(op, name, x);
  TORCH_CHECK(p >= 0 && p <= 1, op, ": p is ", p, "; expected a probability between 0 and 1");
  if (seed) {
    TORCH_CHECK(seed->scalar_type() == at::kLong && seed->dim() == 1 && seed->sym_size(0) == 2, op,
                ": seed is ", seed->scalar_type(), seed->sym_sizes(), "; expected int64[2]");
    check_device(op, {"seed"}, *seed, {name}, x);
  } else {
    TORCH_CHECK(p == 0 || p == 1, op, ": p is ", p, " but seed is missing");
  }
}
inline void check_dropout_add(const char* op, const at::Tensor& x, const OptionalTensor& bias,
                              const at::Tensor& residual, double p, const OptionalTensor& seed) {
  check_dropout(op, "x", x, p, seed);
  check_beside(op, "residual", residual, "x", x);
  if (!bias) return;
  TORCH_CHECK(x.dim() > 0 && bias->dim() == 1 && bias->sym_size(0) == x.sym_size(-1) &&
                  bias->scalar_type() == x.scalar_type(),
              op, ": bias is ", describe(*bias), " but x is ", describe(x),
              "; expected x's dtype and the length of its last dimension");
  check_device(op, {"bias"}, *bias, {"x"}, x);
}

inline void check_bias_gradient(const char* op, const at::Tensor& grad, double p,
                                const OptionalTensor& seed, bool bias) {
  check_dropout(op, "grad", grad, p, seed);
  TORCH_CHECK(!bias || grad.dim() > 0, op, ": grad is ", describe(grad),
              "; expected at least one dimension, that of the bias");
}

/// One launch: inputs, then outputs, walked in `spans`.
struct Launch {
  const char* op;
  Activation activation;
  at::Tensor overflowed;  ///< undefined: nobody counts
  Spans spans;
  std::vector<at::Tensor> inputs, outputs;
  int64_t numel() const { return spans.rows * spans.width; }
};
/// The elementwise ops on a backend: `Backend::forward`, `backward`, `gated`, `gated_backward` take
/// a Launch; `kComputes` is false for Meta, where sizes may be symbols.
template <class Backend>
struct ActivationOps {
  using Kernel = void (*)(const Launch&);
  static void run(const char* op, Activation activation, Kernel kernel,
                  std::vector<at::Tensor> inputs, std::vector<at::Tensor> outputs,
                  const at::Tensor& overflowed = {}) {
    if constexpr (Backend::kComputes) {
      if (outputs[0].numel() == 0) return;
      const Spans spans = plan_spans(inputs, outputs);
      kernel({op, activation, overflowed, spans, std::move(inputs), std::move(outputs)});
    }
  }

  static at::Tensor forward(const char* op, Activation activation, const at::Tensor& x) {
    check_float(op, "x", x);
    at::Tensor y = at::empty_like(x);
    run(op, activation, Backend::forward, {x}, {y});
    return y;
  }
  static at::Tensor backward(const char* op, Activation activation, const at::Tensor& grad,
                             const at::Tensor& x) {
    check_float(op, "x", x);
    check_beside(op, "grad", grad, "x", x);
    at::Tensor dx = at::empty_like(x);
    run(op, activation, Backend::backward, {grad, x}, {dx});
    return dx;
  }
  static at::Tensor gated(const char* op, Activation activation, const at::Tensor& gate,
                          const OptionalTensor& up, const at::Tensor& overflowed = {}) {
    const Gated both = halves(op, gate, up);
    if (overflowed.defined()) check_overflowed(op, overflowed, gate);
    at::Tensor y = at::empty_like(both.gate);
    run(op, activation, Backend::gated, {both.gate, both.up}, {y}, overflowed);
    return y;
  }
  static std::vector<at::Tensor> gated_backward(const char* op, Activation activation,
                                                const at::Tensor& grad, const at::Tensor& gate,
                                                const OptionalTensor& up) {
    const Gated both = halves(op, gate, up);
    check_beside(op, "grad", grad, "gate", both.gate);
    std::vector<at::Tensor> results = {at::empty_like(gate)};
    if (up) results.push_back(at::empty_like(gate));
    const Gated grads = halves(op, results[0], up ? OptionalTensor(results[1]) : OptionalTensor());
    run(op, activation, Backend::gated_backward, {grad, both.gate, both.up},
        {grads.gate, grads.up});
    return results;
  }
};

/// The kernels of `Ops` under the names of the schemas.
template <class Ops>
void add_activations(torch::Library& m) {
  using T = at::Tensor;
  using O = OptionalTensor;
  m.impl("silu", [](const T& x) { return Ops::forward("silu", Activation::kSilu, x); });
  m.impl("silu_backward", [](const T& grad, const T& x) {
    return Ops::backward("silu_backward", Activation::kSilu, grad, x);
  });
  m.impl("squared_relu",
         [](const T& x) { return Ops::forward("squared_relu", Activation::kSquaredRelu, x); });
  m.impl("squared_relu_backward", [](const T& grad, const T& x) {
    return Ops::backward("squared_relu_backward", Activation::kSquaredRelu, grad, x);
  });
  m.impl("gelu", [](const T& x, std::string_view approximate) {
    return Ops::forward("gelu", gelu_form("gelu", approximate), x);
  });
  m.impl("gelu_backward", [](const T& grad, const T& x, std::string_view approximate) {
    return Ops::backward("gelu_backward", gelu_form("gelu_backward", approximate), grad, x);
  });
  m.impl("swiglu", [](const T& gate, const O& up) {
    return Ops::gated("swiglu", Activation::kSilu, gate, up);
  });
  m.impl("swiglu_counted", [](const T& gate, const O& up, const T& overflowed) {
    return Ops::gated("swiglu_counted", Activation::kSilu, gate, up, overflowed);
  });
  m.impl("swiglu_backward", [](const T& grad, const T& gate, const O& up) {
    return Ops::gated_backward("swiglu_backward", Activation::kSilu, grad, gate, up);
  });
  m.impl("geglu", [](const T& gate, const O& up, std::string_view approximate) {
    return Ops::gated("geglu", gelu_form("geglu", approximate), gate, up);
  });
  m.impl("geglu_counted",
         [](const T& gate, const O& up, const T& overflowed, std::string_view approximate) {
           return Ops::gated("geglu_counted", gelu_form("geglu_counted", approximate), gate, up,
                             overflowed);
         });
  m.impl("geglu_backward",
         [](const T& grad, const T& gate, const O& up, std::string_view approximate) {
           return Ops::gated_backward("geglu_backward", gelu_form("geglu_backward", approximate),
                                      grad, gate, up);
         });
}

}  // namespace halfstep::ops
