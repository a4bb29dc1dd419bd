#include <halfstep/nn/activation.h>

#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <ostream>

#include "../ops/optional.h"

namespace halfstep::nn {

namespace {

void check_form(const char* module, const std::string& approximate) {
  TORCH_CHECK(approximate == "none" || approximate == "tanh", module, ": approximate is '",
              approximate, "'; expected 'none' or 'tanh'");
}

at::Tensor counter(const GatedOptions& options) {
  return options.count_overflow_ ? at::zeros({}, at::TensorOptions().dtype(at::kLong))
                                 : at::Tensor();
}

}  // namespace

GELUImpl::GELUImpl(torch::nn::GELUOptions o) : options(std::move(o)) {
  check_form("GELU", options.approximate());
}
GELUImpl::GELUImpl(const torch::nn::GELUImpl& stock) : GELUImpl(stock.options) {
  train(stock.is_training());
}
void GELUImpl::pretty_print(std::ostream& stream) const {
  stream << "halfstep::nn::GELU(approximate=" << options.approximate() << ")";
}
at::Tensor GELUImpl::forward(const at::Tensor& x) {
  return functional::gelu(x, options.approximate());
}

SiLUImpl::SiLUImpl(const torch::nn::SiLUImpl& stock) { train(stock.is_training()); }
void SiLUImpl::pretty_print(std::ostream& stream) const { stream << "halfstep::nn::SiLU()"; }
at::Tensor SiLUImpl::forward(const at::Tensor& x) { return functional::silu(x); }

void SquaredReLUImpl::pretty_print(std::ostream& stream) const {
  stream << "halfstep::nn::SquaredReLU()";
}
at::Tensor SquaredReLUImpl::forward(const at::Tensor& x) { return functional::squared_relu(x); }

SwiGLUImpl::SwiGLUImpl(GatedOptions o) : options(std::move(o)) { SwiGLUImpl::reset(); }
void SwiGLUImpl::reset() { overflowed = register_buffer("overflowed", counter(options)); }
void SwiGLUImpl::pretty_print(std::ostream& stream) const {
  stream << "halfstep::nn::SwiGLU(count_overflow=" << options.count_overflow_ << ")";
}
at::Tensor SwiGLUImpl::forward(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  return functional::swiglu(gate, up, ops::given(overflowed));
}

GeGLUImpl::GeGLUImpl(GatedOptions o) : options(std::move(o)) {
  check_form("GeGLU", options.approximate_);
  GeGLUImpl::reset();
}
void GeGLUImpl::reset() { overflowed = register_buffer("overflowed", counter(options)); }
void GeGLUImpl::pretty_print(std::ostream& stream) const {
  stream << "halfstep::nn::GeGLU(approximate=" << options.approximate_
         << ", count_overflow=" << options.count_overflow_ << ")";
}
at::Tensor GeGLUImpl::forward(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  return functional::geglu(gate, up, options.approximate_, ops::given(overflowed));
}

BiasDropoutAddImpl::BiasDropoutAddImpl(double probability) : p(probability) {
  TORCH_CHECK(p >= 0 && p <= 1, "BiasDropoutAdd: p is ", p,
              "; expected a probability between 0 and 1");
}
void BiasDropoutAddImpl::pretty_print(std::ostream& stream) const {
  stream << "halfstep::nn::BiasDropoutAdd(p=" << p << ")";
}
at::Tensor BiasDropoutAddImpl::forward(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                                       const at::Tensor& residual,
                                       const std::optional<at::Tensor>& seed) {
  return functional::bias_dropout_add(x, bias, residual, p, is_training(), seed);
}

}  // namespace halfstep::nn
