// linear on CUDA. Unfused: torch's product (of 16-bit operands into FP32 where an activation
// follows that does not commute with rounding), then the epilogue of cuda/linear.cu. Fused, through
// cuBLASLt, for 16-bit operands whose sizes it takes, wherever it was measured to be quicker
// (plans.h):
//   forward   relu: RELU_AUX_BIAS, gelu_tanh: GELU_AUX_BIAS (and their forms without bias or aux)
//   backward  without activation, weight and bias gradient together: BGRADB
// With torch.use_deterministic_algorithms(True) everything is unfused, so that no result depends on
// a measurement. Tests: tests/gpu/test_linear_cuda.py.

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "../ops/dispatch.h"
#include "../ops/linear.h"
#include "cublaslt.h"

namespace halfstep::cuda {

namespace {

using math::LinearActivation;
using ops::Gradients;
using ops::OptionalName;
using ops::OptionalTensor;

struct Plain {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  ops::NoAutocast no_autocast;
};

// ---- fused -------------------------------------------------------------------------------------
constexpr int64_t kMostWorkspace = int64_t(32) << 20;

Plans* plans() {
  static Plans* const all = cublaslt() ? new Plans(*cublaslt(), kMostWorkspace) : nullptr;
  return all;
}

/// Runs the problem fused, or not at all; `unfused` is what it is measured against.
bool run_fused(const Place& place, Problem problem, const Pointers& pointers,
               const std::function<void()>& unfused) {
  if (at::globalContext().deterministicAlgorithms() || !plans()) return false;
  problem.device = place.device().index();
  problem.alignment = common_alignment({pointers.a, pointers.b, pointers.d});
  // What cuBLASLt's 16-bit epilogues ask of sizes and addresses.
  const bool fits =
      problem.rows > 0 && problem.rows % 8 == 0 && problem.a_stride % 8 == 0 &&
      problem.b_stride % 8 == 0 && problem.columns > 0 && problem.inner > 0 &&
      common_alignment({pointers.a, pointers.b, pointers.d, pointers.bias, pointers.aux}) >= 16;
  if (!fits) return false;
  at::Tensor workspace;
  Plans::Call call;
  call.stream = place.stream();
  call.may_measure = !captures(place.stream());
  call.allocate = [&](int64_t bytes) {
    workspace = place.scratch(bytes);
    return workspace.mutable_data_ptr();
  };
  call.unfused = unfused;
  call.stopwatch = stopwatch(place.stream());
  return plans()->run(problem, pointers, call);
}

std::optional<Epilogue> forward_epilogue(LinearActivation activation, bool has_bias, bool saves) {
  if (activation == LinearActivation::kRelu)
    return saves      ? has_bias ? Epilogue::kReluAuxBias : Epilogue::kReluAux
           : has_bias ? Epilogue::kReluBias
                      : Epilogue::kRelu;
  if (activation == LinearActivation::kGeluTanh)
    return saves      ? has_bias ? Epilogue::kGeluAuxBias : Epilogue::kGeluAux
           : has_bias ? Epilogue::kGeluBias
                      : Epilogue::kGelu;
  return std::nullopt;
}

// ---- forward -----------------------------------------------------------------------------------
struct Forward {
  at::Tensor x, weight;  ///< matrices, contiguous
  OptionalTensor bias;
  LinearActivation activation;
  at::Tensor y, saved;  ///< y: [M, N]

  bool same_bias() const { return !bias || bias->scalar_type() == x.scalar_type(); }
};

/// FP32 products are made of so many elements at a time: they stay in the L2 cache, and their
/// memory does not grow with the batch.
constexpr int64_t kProductElements = int64_t(1) << 23;

void run_epilogue(const Forward& f, const at::Tensor& product, int64_t first,
                  const OptionalTensor& bias, const Place& place) {
  EpilogueForward work;
  work.rows = product.size(0);
  work.columns = product.size(1);
  work.activation = f.activation;
  work.product = product.const_data_ptr();
  work.product_dtype = ops::dtype_code(product.scalar_type());
  if (bias) {
    work.bias = bias->const_data_ptr();
    work.bias_dtype = ops::dtype_code(bias->scalar_type());
  }
  work.y = f.y.narrow(0, first, work.rows).mutable_data_ptr();
  work.y_dtype = ops::dtype_code(f.y.scalar_type());
  if (f.saved.numel() != 0) work.saved = f.saved.narrow(0, first, work.rows).mutable_data_ptr();
  check("linear", epilogue_forward(work, place.stream()));
}

/// The product in FP32, unless rounding it first changes nothing: ReLU commutes with rounding.
void forward_unfused(const Forward& f, const Place& place) {
  const int64_t m = f.y.size(0), n = f.y.size(1);
  at::Tensor y = f.y;
  if (f.activation == LinearActivation::kRelu && f.same_bias() && f.bias) {
    at::addmm_out(y, *f.bias, f.x, f.weight.t());
    run_epilogue(f, y, 0, std::nullopt, place);
  } else if (!ops::is_sixteen(f.x.scalar_type()) ||
             (f.activation == LinearActivation::kRelu && !f.bias)) {
    at::mm_out(y, f.x, f.weight.t());
    run_epilogue(f, y, 0, f.bias, place);
  } else {
    const int64_t most = std::max<int64_t>(kProductElements / n, 128);
    const at::Tensor room = at::empty({std::min(most, m), n}, y.options().dtype(at::kFloat));
    for (int64_t i = 0; i < m; i += most) {
      const int64_t rows = std::min(most, m - i);
      at::Tensor product = room.narrow(0, 0, rows);
      at::mm_out(product, f.x.narrow(0, i, rows), f.weight.t(), at::kFloat);
      run_epilogue(f, product, i, f.bias, place);
    }
  }
}

bool forward_fused(const Forward& f, const Place& place) {
  const bool saves = f.saved.numel() != 0;
  const auto epilogue = forward_epilogue(f.activation, f.bias.has_value(), saves);
  if (!epilogue || !ops::is_sixteen(f.x.scalar_type()) || !f.same_bias()) return false;
  // Row-major y = x w^T is column-major y^T = w x^T.
  Problem problem;
  problem.rows = f.weight.size(0);
  problem.columns = f.x.size(0);
  problem.inner = problem.a_stride = problem.b_stride = f.x.size(1);
  problem.d_stride = problem.rows;
  problem.transposes_a = 1;
  problem.dtype = ops::dtype_code(f.x.scalar_type());
  problem.epilogue = *epilogue;
  if (saves)
    problem.aux_stride =
        f.activation == LinearActivation::kRelu ? 8 * f.saved.size(1) : problem.rows;
  Pointers pointers{f.weight.const_data_ptr(), f.x.const_data_ptr(), f.y.mutable_data_ptr(),
                    f.bias ? const_cast<void*>(f.bias->const_data_ptr()) : nullptr,
                    saves ? f.saved.mutable_data_ptr() : nullptr};
  return run_fused(place, problem, pointers, [&] { forward_unfused(f, place); });
}

Forward forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                LinearActivation activation, bool saves) {
  const Plain plain;
  const Place place(x);
  Forward f{ops::as_rows(x).contiguous(), weight.contiguous(), bias, activation, {}, {}};
  if (bias) f.bias = bias->contiguous();
  f.saved = ops::empty_saved(x, weight, saves ? activation : LinearActivation::kNone);
  if (activation == LinearActivation::kNone && f.same_bias()) {  // torch fuses the bias itself
    f.y = at::linear(x, weight, bias).contiguous();
    return f;
  }
  const at::Tensor y = ops::empty_output(x, weight);
  f.y = ops::as_rows(y);
  if (y.numel() != 0 && !forward_fused(f, place)) forward_unfused(f, place);
  f.y = y;
  return f;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                  OptionalName activation) {
  const LinearActivation kind = ops::activation_of("linear", activation);
  ops::check_linear("linear", x, weight, bias);
  return forward(x, weight, bias, kind, false).y;
}

std::tuple<at::Tensor, at::Tensor> linear_forward(const at::Tensor& x, const at::Tensor& weight,
                                                  const OptionalTensor& bias,
                                                  OptionalName activation) {
  const LinearActivation kind = ops::activation_of("linear_forward", activation);
  ops::check_linear("linear_forward", x, weight, bias);
  const Forward f = forward(x, weight, bias, kind, true);
  return {f.y, f.saved};
}

// ---- backward ----------------------------------------------------------------------------------
/// into (+)= dz^T x, accumulated in FP32 and not rounded on the way.
void wgrad(at::Tensor into, const at::Tensor& dz, const at::Tensor& x, bool fresh) {
  if (!ops::is_sixteen(x.scalar_type())) {
    at::addmm_out(into, into, dz.t(), x, fresh ? 0 : 1);
  } else if (fresh) {
    at::mm_out(into, dz.t(), x, at::kFloat);
  } else {
    at::addmm_out(into, into, dz.t(), x, at::kFloat);
  }
}

struct Backward {
  at::Tensor dy, x, weight, saved;  ///< matrices, contiguous
  LinearActivation activation;
  at::Tensor dw, db;  ///< undefined where not wanted
};

/// dz, or nothing where it is dy; the bias gradient on the way.
at::Tensor activation_backward(const Backward& b, const Place& place) {
  const int64_t m = b.dy.size(0), n = b.dy.size(1);
  EpilogueBackward work;
  at::Tensor dz = b.dy, sums;
  const int64_t blocks = (m + math::kBiasRows - 1) / math::kBiasRows;
  if (b.activation != LinearActivation::kNone) {
    dz = at::empty({m, n}, b.dy.options());
    work.dz = dz.mutable_data_ptr();
    work.saved = b.saved.const_data_ptr();
  }
  if (b.db.defined()) {
    sums = at::empty({blocks, n}, b.dy.options().dtype(ops::wide_type(b.dy)));
    work.sums = sums.mutable_data_ptr();
  }
  if (!work.dz && !work.sums) return dz;
  work.dy = b.dy.const_data_ptr();
  work.rows = m;
  work.columns = n;
  work.dtype = ops::dtype_code(b.dy.scalar_type());
  work.activation = b.activation;
  check("linear_backward", epilogue_backward(work, place.stream()));
  if (b.db.defined())
    check("linear_backward",
          add_rows(sums.const_data_ptr(), sums.scalar_type() == at::kDouble, blocks, n,
                   b.db.mutable_data_ptr(), ops::dtype_code(b.db.scalar_type()), place.stream()));
  return dz;
}

void weight_gradient(const at::Tensor& dw, const at::Tensor& dz, const at::Tensor& x) {
  at::Tensor out = dw;
  if (dw.scalar_type() == x.scalar_type())
    at::mm_out(out, dz.t(), x);
  else
    wgrad(out, dz, x, true);
}

/// dw and db of a plain product in one pass over dy.
bool backward_fused(const Backward& b, const Place& place) {
  const bool fits = b.activation == LinearActivation::kNone && ops::is_sixteen(b.x.scalar_type()) &&
                    b.dw.defined() && b.db.defined() && b.dw.scalar_type() == b.x.scalar_type() &&
                    b.db.scalar_type() == b.x.scalar_type();
  if (!fits) return false;
  // Row-major dw = dz^T x is column-major dw^T = x^T dz.
  Problem problem;
  problem.rows = problem.a_stride = problem.d_stride = b.x.size(1);
  problem.columns = problem.b_stride = b.dy.size(1);
  problem.inner = b.x.size(0);
  problem.transposes_b = 1;
  problem.dtype = ops::dtype_code(b.x.scalar_type());
  problem.epilogue = Epilogue::kBgradB;
  const Pointers pointers{b.x.const_data_ptr(), b.dy.const_data_ptr(), b.dw.mutable_data_ptr(),
                          b.db.mutable_data_ptr(), nullptr};
  return run_fused(place, problem, pointers, [&] {
    activation_backward(b, place);
    weight_gradient(b.dw, b.dy, b.x);
  });
}

Gradients linear_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                          const at::Tensor& saved, OptionalName activation,
                          std::array<bool, 3> wanted, at::ScalarType weight_dtype,
                          std::optional<at::ScalarType> bias_dtype) {
  const LinearActivation kind = ops::activation_of("linear_backward", activation);
  ops::check_linear_backward(dy, x, weight, saved, kind, weight_dtype, bias_dtype);
  const Plain plain;
  const Place place(x);
  Gradients gradients = ops::empty_gradients(x, weight, wanted, weight_dtype, bias_dtype);
  auto& [dx, dw, db] = gradients;
  Backward b{ops::as_rows(dy).contiguous(),
             ops::as_rows(x).contiguous(),
             weight,
             saved.contiguous(),
             kind,
             {},
             {}};
  if (b.dy.numel() == 0) {
    for (at::Tensor* t : {&dx, &dw, &db}) t->zero_();
    return gradients;
  }
  if (wanted[1]) b.dw = dw;
  if (wanted[2] && bias_dtype) b.db = db;
  at::Tensor dz = b.dy;
  if (!backward_fused(b, place)) {
    dz = activation_backward(b, place);
    if (b.dw.defined()) weight_gradient(b.dw, dz, b.x);
  }
  if (wanted[0]) {
    at::Tensor rows = dx.view({dz.size(0), x.size(-1)});
    at::mm_out(rows, dz, b.weight);
  }
  return gradients;
}

void linear_wgrad_(const at::Tensor& into, const at::Tensor& dz, const at::Tensor& x) {
  ops::check_linear_wgrad(into, dz, x);
  const Plain plain;
  const Place place(x);
  if (dz.numel() != 0 && x.numel() != 0) wgrad(into, ops::as_rows(dz), ops::as_rows(x), false);
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CUDA, m) {
  m.impl("linear", linear);
  m.impl("linear_forward", linear_forward);
  m.impl("linear_backward", linear_backward);
  m.impl("linear_wgrad_", linear_wgrad_);
}

}  // namespace halfstep::cuda
