#include "activation.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/erfc.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <torch/csrc/autograd/custom_function.h>

#include "dispatch.h"

// Activations, gated units and bias + dropout + residual add: schemas, derivatives, autocast. The
// first backward is a kernel; the second is composed of torch's operations in FP32 (FP64 for FP64).

namespace halfstep::ops {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr const char* kSchemas[] = {
    // All tensors of one call have one dtype (float16, bfloat16, float32, float64), one shape and
    // one
    // device. Products are formed in float32 (float64 for float64) and rounded once.
    "silu(Tensor x) -> Tensor",
    "silu_backward(Tensor grad, Tensor x) -> Tensor",
    "squared_relu(Tensor x) -> Tensor",
    "squared_relu_backward(Tensor grad, Tensor x) -> Tensor",
    // approximate: 'none' or 'tanh'.
    "gelu(Tensor x, *, str approximate='none') -> Tensor",
    "gelu_backward(Tensor grad, Tensor x, *, str approximate='none') -> Tensor",
    // f(gate) * up. Without `up`, gate is [..., 2F], gate and up side by side.
    "swiglu(Tensor gate, Tensor? up=None) -> Tensor",
    "geglu(Tensor gate, Tensor? up=None, *, str approximate='none') -> Tensor",
    // Gradients of gate and up, or of the one tensor that holds both.
    "swiglu_backward(Tensor grad, Tensor gate, Tensor? up=None) -> Tensor[]",
    "geglu_backward(Tensor grad, Tensor gate, Tensor? up=None, *, str approximate='none') -> "
    "Tensor[]",
    // The same outputs; overflowed, one int64 element, grows by the number of those that left the
    // dtype although gate and up are finite.
    "swiglu_counted(Tensor gate, Tensor? up, Tensor(a!) overflowed) -> Tensor",
    "geglu_counted(Tensor gate, Tensor? up, Tensor(a!) overflowed, *, str approximate='none') -> "
    "Tensor",
    // residual + dropout(x + bias). bias: [F], F the last dimension of x. seed: int64 [2], Philox's
    // key and offset, read on the device; needed where 0 < p < 1.
    "bias_dropout_add(Tensor x, Tensor? bias, Tensor residual, float p, Tensor? seed=None) -> "
    "Tensor",
    // The gradients of x and, with `bias`, of the bias (else an empty tensor).
    "bias_dropout_add_backward(Tensor grad, float p, Tensor? seed=None, bool bias=False) -> "
    "(Tensor, Tensor)",
};

// ---- calls
// ---------------------------------------------------------------------------------------

const char* form_of(Activation activation) {
  return activation == Activation::kGeluTanh ? "tanh" : "none";
}

at::Tensor call_forward(Activation activation, const at::Tensor& x) {
  using Plain = at::Tensor(const at::Tensor&);
  using Gelu = at::Tensor(const at::Tensor&, std::string_view);
  static const auto silu = find_op<Plain>("halfstep::silu");
  static const auto squared_relu = find_op<Plain>("halfstep::squared_relu");
  static const auto gelu = find_op<Gelu>("halfstep::gelu");
  if (activation == Activation::kSilu) return silu.call(x);
  if (activation == Activation::kSquaredRelu) return squared_relu.call(x);
  return gelu.call(x, form_of(activation));
}

at::Tensor call_backward(Activation activation, const at::Tensor& grad, const at::Tensor& x) {
  using Plain = at::Tensor(const at::Tensor&, const at::Tensor&);
  using Gelu = at::Tensor(const at::Tensor&, const at::Tensor&, std::string_view);
  static const auto silu = find_op<Plain>("halfstep::silu_backward");
  static const auto squared_relu = find_op<Plain>("halfstep::squared_relu_backward");
  static const auto gelu = find_op<Gelu>("halfstep::gelu_backward");
  if (activation == Activation::kSilu) return silu.call(grad, x);
  if (activation == Activation::kSquaredRelu) return squared_relu.call(grad, x);
  return gelu.call(grad, x, form_of(activation));
}

at::Tensor call_gated(Activation activation, const at::Tensor& gate, const OptionalTensor& up,
                      const at::Tensor& overflowed) {
  using T = at::Tensor;
  using O = OptionalTensor;
  static const auto swiglu = find_op<T(const T&, const O&)>("halfstep::swiglu");
  static const auto geglu = find_op<T(const T&, const O&, std::string_view)>("halfstep::geglu");
  static const auto swiglu_counted =
      find_op<T(const T&, const O&, const T&)>("halfstep::swiglu_counted");
  static const auto geglu_counted =
      find_op<T(const T&, const O&, const T&, std::string_view)>("halfstep::geglu_counted");
  const bool is_silu = activation == Activation::kSilu;
  if (!overflowed.defined())
    return is_silu ? swiglu.call(gate, up) : geglu.call(gate, up, form_of(activation));
  return is_silu ? swiglu_counted.call(gate, up, overflowed)
                 : geglu_counted.call(gate, up, overflowed, form_of(activation));
}

std::vector<at::Tensor> call_gated_backward(Activation activation, const at::Tensor& grad,
                                            const at::Tensor& gate, const OptionalTensor& up) {
  using T = at::Tensor;
  using O = OptionalTensor;
  using Ts = std::vector<T>;
  static const auto swiglu = find_op<Ts(const T&, const T&, const O&)>("halfstep::swiglu_backward");
  static const auto geglu =
      find_op<Ts(const T&, const T&, const O&, std::string_view)>("halfstep::geglu_backward");
  return activation == Activation::kSilu ? swiglu.call(grad, gate, up)
                                         : geglu.call(grad, gate, up, form_of(activation));
}

at::Tensor call_dropout_add(const at::Tensor& x, const OptionalTensor& bias,
                            const at::Tensor& residual, double p, const OptionalTensor& seed) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const OptionalTensor&, const at::Tensor&, double,
                         const OptionalTensor&)>("halfstep::bias_dropout_add");
  return op.call(x, bias, residual, p, seed);
}

std::tuple<at::Tensor, at::Tensor> call_dropout_backward(const at::Tensor& grad, double p,
                                                         const OptionalTensor& seed, bool bias) {
  static const auto op =
      find_op<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, double, const OptionalTensor&,
                                                 bool)>("halfstep::bias_dropout_add_backward");
  return op.call(grad, p, seed, bias);
}

// ---- second derivatives
// --------------------------------------------------------------------------

at::Tensor widened(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? tensor : tensor.to(at::kFloat);
}

/// f, f' and f'' at x, which is FP32 or FP64, in torch's operations: differentiable again.
struct Jet {
  at::Tensor value, slope, bend;
};
Jet jet_of(Activation activation, const at::Tensor& x) {
  if (activation == Activation::kSquaredRelu) {
    const at::Tensor positive = at::relu(x);
    return {positive * positive, 2 * positive, 2 * (x > 0).to(x.scalar_type())};
  }
  if (activation == Activation::kGelu) {
    const at::Tensor below = 0.5 * at::erfc(x * -0.70710678118654752440);
    const at::Tensor density = 0.39894228040143267794 * at::exp(-0.5 * x * x);
    return {x * below, below + x * density, density * (2 - x * x)};
  }
  // x s(u(x)) with the logistic s: u = x for SiLU.
  constexpr double k = 1.5957691216057307118, c = 0.044715 * k;
  const bool tanh = activation == Activation::kGeluTanh;
  const at::Tensor s = at::sigmoid(tanh ? x * (k + c * x * x) : x), rest = s * (1 - s);
  if (!tanh) return {x * s, s + x * rest, rest * (2 + x * (1 - 2 * s))};
  const at::Tensor u1 = k + 3 * c * x * x, u2 = 6 * c * x;
  return {x * s, s + x * rest * u1, rest * (2 * u1 + x * u2 + x * u1 * u1 * (1 - 2 * s))};
}

// ---- autograd
// ------------------------------------------------------------------------------------

struct Unary : Function<Unary> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, int64_t activation) {
    context->save_for_backward({x});
    context->saved_data["activation"] = activation;
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_forward(Activation(activation), x);
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto activation = Activation(context->saved_data["activation"].toInt());
    return {call_backward(activation, grads[0], context->get_saved_variables()[0]), at::Tensor()};
  }
};

struct UnaryBackward : Function<UnaryBackward> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& grad, const at::Tensor& x,
                            int64_t activation) {
    context->save_for_backward({grad, x});
    context->saved_data["activation"] = activation;
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_backward(Activation(activation), grad, x);
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto activation = Activation(context->saved_data["activation"].toInt());
    const auto type = saved[1].scalar_type();
    const at::Tensor v = widened(grads[0]), d = widened(saved[0]);
    const Jet at = jet_of(activation, widened(saved[1]));
    return {(v * at.slope).to(type), (v * d * at.bend).to(type), at::Tensor()};
  }
};

struct GatedUnit : Function<GatedUnit> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& gate,
                            const OptionalTensor& up, const OptionalTensor& overflowed,
                            int64_t activation) {
    context->save_for_backward({gate, up.value_or(at::Tensor())});
    context->saved_data["activation"] = activation;
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_gated(Activation(activation), gate, up, overflowed.value_or(at::Tensor()));
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto activation = Activation(context->saved_data["activation"].toInt());
    auto results = call_gated_backward(activation, grads[0], saved[0], given(saved[1]));
    results.resize(4);
    return results;
  }
};

struct GatedUnitBackward : Function<GatedUnitBackward> {
  static variable_list forward(AutogradContext* context, const at::Tensor& grad,
                               const at::Tensor& gate, const OptionalTensor& up,
                               int64_t activation) {
    context->save_for_backward({grad, gate, up.value_or(at::Tensor())});
    context->saved_data["activation"] = activation;
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_gated_backward(Activation(activation), grad, gate, up);
  }
  /// With v = the gradients of dgate = d u f'(g) and of dup = d f(g).
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto activation = Activation(context->saved_data["activation"].toInt());
    const bool packed = !saved[2].defined();
    const auto type = saved[1].scalar_type();
    const auto both = [&](const at::Tensor& first, const at::Tensor& second) {
      const Gated pair = halves("gated unit", first, given(second));
      return Gated{widened(pair.gate), widened(pair.up)};
    };
    const at::Tensor d = widened(saved[0]);
    const Gated at = both(saved[1], saved[2]);
    const Gated v = both(grads[0], packed ? at::Tensor() : grads[1]);
    const Jet f = jet_of(activation, at.gate);
    const at::Tensor to_grad = v.gate * at.up * f.slope + v.up * f.value;
    const at::Tensor to_gate = v.gate * d * at.up * f.bend + v.up * d * f.slope;
    const at::Tensor to_up = v.gate * d * f.slope;
    if (packed)
      return {to_grad.to(type), at::cat({to_gate, to_up}, -1).to(type), at::Tensor(), at::Tensor()};
    return {to_grad.to(type), to_gate.to(type), to_up.to(type), at::Tensor()};
  }
};

struct DropoutAdd : Function<DropoutAdd> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x,
                            const OptionalTensor& bias, const at::Tensor& residual, double p,
                            const OptionalTensor& seed) {
    context->save_for_backward({seed.value_or(at::Tensor())});
    context->saved_data["p"] = p;
    context->saved_data["bias"] = bias && bias->requires_grad();
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_dropout_add(x, bias, residual, p, seed);
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const double p = context->saved_data["p"].toDouble();
    const bool bias = context->saved_data["bias"].toBool();
    variable_list results(5);
    results[2] = grads[0];
    if (!bias && p == 0) {
      results[0] = grads[0];
      return results;
    }
    const auto seed = given(context->get_saved_variables()[0]);
    at::Tensor sums;
    std::tie(results[0], sums) = call_dropout_backward(grads[0], p, seed, bias);
    if (bias) results[1] = sums;
    return results;
  }
};

/// Linear in `grad`: its derivative is itself.
struct DropoutAddBackward : Function<DropoutAddBackward> {
  static variable_list forward(AutogradContext* context, const at::Tensor& grad, double p,
                               const OptionalTensor& seed, bool bias) {
    context->save_for_backward({seed.value_or(at::Tensor())});
    context->saved_data["p"] = p;
    context->saved_data["bias"] = bias;
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, sums] = call_dropout_backward(grad, p, seed, bias);
    return {dx, sums};
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const double p = context->saved_data["p"].toDouble();
    const auto seed = given(context->get_saved_variables()[0]);
    const bool bias = context->saved_data["bias"].toBool();
    const at::Tensor v = bias ? grads[0] + grads[1] : grads[0];
    return {std::get<0>(call_dropout_backward(v, p, seed, false)), at::Tensor(), at::Tensor(),
            at::Tensor()};
  }
};

/// The Autograd kernels of one activation; they end in the op of the same name.
struct Differentiable {
  static at::Tensor forward(const char*, Activation activation, const at::Tensor& x) {
    return Unary::apply(x, int64_t(activation));
  }
  static at::Tensor backward(const char*, Activation activation, const at::Tensor& grad,
                             const at::Tensor& x) {
    return UnaryBackward::apply(grad, x, int64_t(activation));
  }
  static at::Tensor gated(const char*, Activation activation, const at::Tensor& gate,
                          const OptionalTensor& up, const at::Tensor& overflowed = {}) {
    return GatedUnit::apply(gate, up, given(overflowed), int64_t(activation));
  }
  static std::vector<at::Tensor> gated_backward(const char*, Activation activation,
                                                const at::Tensor& grad, const at::Tensor& gate,
                                                const OptionalTensor& up) {
    return GatedUnitBackward::apply(grad, gate, up, int64_t(activation));
  }
};

at::Tensor bias_dropout_add_autograd(const at::Tensor& x, const OptionalTensor& bias,
                                     const at::Tensor& residual, double p,
                                     const OptionalTensor& seed) {
  return DropoutAdd::apply(x, bias, residual, p, seed);
}

std::tuple<at::Tensor, at::Tensor> bias_dropout_add_backward_autograd(const at::Tensor& grad,
                                                                      double p,
                                                                      const OptionalTensor& seed,
                                                                      bool bias) {
  const auto results = DropoutAddBackward::apply(grad, p, seed, bias);
  return {results[0], results[1]};
}

// ---- autocast
// ------------------------------------------------------------------------------------

/// The operands as they are where they have one dtype, else in autocast's.
template <at::DeviceType kDevice>
struct Cast {
  bool mixed = false;
  void see(const at::Tensor& first, const OptionalTensor& other) {
    mixed = mixed || (other && other->scalar_type() != first.scalar_type());
  }
  template <class T>
  T of(const T& tensor) const {
    return mixed ? autocast_to_lower(tensor, kDevice) : tensor;
  }
};

template <at::DeviceType kDevice>
struct Autocast {
  static at::Tensor gated(Activation activation, const at::Tensor& gate, const OptionalTensor& up,
                          const at::Tensor& overflowed = {}) {
    const NoAutocast off;
    Cast<kDevice> cast;
    cast.see(gate, up);
    return call_gated(activation, cast.of(gate), cast.of(up), overflowed);
  }
  static at::Tensor swiglu(const at::Tensor& gate, const OptionalTensor& up) {
    return gated(Activation::kSilu, gate, up);
  }
  static at::Tensor swiglu_counted(const at::Tensor& gate, const OptionalTensor& up,
                                   const at::Tensor& overflowed) {
    return gated(Activation::kSilu, gate, up, overflowed);
  }
  static at::Tensor geglu(const at::Tensor& gate, const OptionalTensor& up,
                          std::string_view approximate) {
    return gated(gelu_form("geglu", approximate), gate, up);
  }
  static at::Tensor geglu_counted(const at::Tensor& gate, const OptionalTensor& up,
                                  const at::Tensor& overflowed, std::string_view approximate) {
    return gated(gelu_form("geglu_counted", approximate), gate, up, overflowed);
  }
  static at::Tensor dropout_add(const at::Tensor& x, const OptionalTensor& bias,
                                const at::Tensor& residual, double p, const OptionalTensor& seed) {
    const NoAutocast off;
    Cast<kDevice> cast;
    cast.see(x, bias);
    cast.see(x, residual);
    return call_dropout_add(cast.of(x), cast.of(bias), cast.of(residual), p, seed);
  }
  static void add_to(torch::Library& m) {
    m.impl("swiglu", swiglu);
    m.impl("swiglu_counted", swiglu_counted);
    m.impl("geglu", geglu);
    m.impl("geglu_counted", geglu_counted);
    m.impl("bias_dropout_add", dropout_add);
  }
};

// ---- Meta
// ----------------------------------------------------------------------------------------

struct MetaBackend {
  static constexpr bool kComputes = false;
  static constexpr void (*forward)(const Launch&) = nullptr;
  static constexpr void (*backward)(const Launch&) = nullptr;
  static constexpr void (*gated)(const Launch&) = nullptr;
  static constexpr void (*gated_backward)(const Launch&) = nullptr;
};

at::Tensor bias_dropout_add_meta(const at::Tensor& x, const OptionalTensor& bias,
                                 const at::Tensor& residual, double p, const OptionalTensor& seed) {
  check_dropout_add("bias_dropout_add", x, bias, residual, p, seed);
  return at::empty_symint(x.sym_sizes(), x.options());
}

std::tuple<at::Tensor, at::Tensor> bias_dropout_add_backward_meta(const at::Tensor& grad, double p,
                                                                  const OptionalTensor& seed,
                                                                  bool bias) {
  check_bias_gradient("bias_dropout_add_backward", grad, p, seed, bias);
  return {at::empty_symint(grad.sym_sizes(), grad.options()),
          at::empty_symint({bias ? grad.sym_size(-1) : c10::SymInt(0)}, grad.options())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(halfstep, m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(halfstep, Meta, m) {
  add_activations<ActivationOps<MetaBackend>>(m);
  m.impl("bias_dropout_add", bias_dropout_add_meta);
  m.impl("bias_dropout_add_backward", bias_dropout_add_backward_meta);
}

TORCH_LIBRARY_IMPL(halfstep, Autograd, m) {
  add_activations<Differentiable>(m);
  m.impl("bias_dropout_add", bias_dropout_add_autograd);
  m.impl("bias_dropout_add_backward", bias_dropout_add_backward_autograd);
}

TORCH_LIBRARY_IMPL(halfstep, AutocastCPU, m) { Autocast<at::kCPU>::add_to(m); }
TORCH_LIBRARY_IMPL(halfstep, AutocastCUDA, m) { Autocast<at::kCUDA>::add_to(m); }

}  // namespace halfstep::ops
