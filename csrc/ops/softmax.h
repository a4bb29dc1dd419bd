#pragma once

// Checks and preparation of softmax, shared by its Meta, CPU and CUDA sides.

#include "../math/softmax.h"

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <cmath>

#include "check.h"
#include "gather.h"
#include "rows.h"

namespace halfstep::ops {

/// `dim` counted from the left.
inline int64_t softmax_dim(const at::Tensor& x, int64_t dim) {
  return dim < 0 ? dim + x.dim() : dim;
}

inline void check_softmax_x(const char* op, const char* name, const at::Tensor& x, int64_t dim,
                            double scale, bool causal) {
  TORCH_CHECK(is_supported_float(x.scalar_type()) && x.layout() == at::kStrided, op, ": ", name,
              " is ", describe(x), " (", x.layout(),
              "); expected a dense float16, bfloat16, float32 or float64 tensor");
  const int64_t dims = std::max<int64_t>(x.dim(), 1);
  TORCH_CHECK(dim >= -dims && dim < dims, op, ": dim is ", dim, " but ", name, " is ", describe(x));
  TORCH_CHECK(std::isfinite(scale), op, ": scale is ", scale, "; expected a finite number");
  TORCH_CHECK(!causal || (x.dim() >= 2 && softmax_dim(x, dim) == x.dim() - 1), op,
              ": causal needs dim = -1 and [..., queries, keys], but dim is ", dim, " and ", name,
              " is ", describe(x));
}

inline void check_softmax(const at::Tensor& x, int64_t dim, double scale,
                          const std::optional<at::Tensor>& mask, bool causal) {
  check_softmax_x("softmax", "x", x, dim, scale, causal);
  if (!mask || !mask->defined()) return;
  TORCH_CHECK((mask->scalar_type() == at::kBool || is_supported_float(mask->scalar_type())) &&
                  mask->layout() == at::kStrided,
              "softmax: mask is ", describe(*mask), " (", mask->layout(),
              "); expected a dense bool or floating-point tensor");
  TORCH_CHECK(at::is_expandable_to(mask->sym_sizes(), x.sym_sizes()), "softmax: mask is ",
              describe(*mask), ", which does not broadcast to x, ", describe(x));
  check_device("softmax", {"mask"}, *mask, {"x"}, x);
}

inline void check_softmax_backward(const at::Tensor& grad, const at::Tensor& y, int64_t dim,
                                   double scale, bool causal) {
  check_softmax_x("softmax_backward", "y", y, dim, scale, causal);
  TORCH_CHECK(grad.sym_sizes() == y.sym_sizes() && grad.scalar_type() == y.scalar_type(),
              "softmax_backward: grad is ", describe(grad), " but y is ", describe(y));
  check_device("softmax_backward", {"grad"}, grad, {"y"}, y);
}

/// Tensors as rows, and what keeps them alive. Where `out`, which is in x's layout, does not have
/// its rows side by side they go to a copy, which finish() writes back.
class SoftmaxWork {
 public:
  SoftmaxWork(const at::Tensor& x, int64_t dim, double scale, bool causal)
      : out_(at::empty_like(x)) {
    dim_ = softmax_dim(x, dim);
    x_ = rows(x);
    const at::Tensor target = moved(out_);
    target_ = target.is_contiguous() ? target : at::empty_like(x_);
    all_.dtype = dtype_code(x.scalar_type());
    all_.length = x_.size(-1);
    all_.rows = all_.length == 0 ? 0 : x_.numel() / all_.length;
    all_.causal = causal;
    if (causal) all_.queries = math::Divisor(x_.size(-2));
    all_.scale = scale;
    all_.x = x_.const_data_ptr();
    all_.out = target_.mutable_data_ptr();
  }

  void set_grad(const at::Tensor& grad) {
    grad_ = rows(grad);
    all_.grad = grad_.const_data_ptr();
  }
  void set_mask(const std::optional<at::Tensor>& mask) {
    if (!mask || !mask->defined()) return;
    mask_ = moved(mask->expand(out_.sizes()));
    const auto layout = [&] {
      const at::IntArrayRef sizes = x_.sizes().slice(0, size_t(x_.dim() - 1));
      return merge_rows<1>(sizes, {row_strides(mask_, sizes)});
    };
    auto merged = layout();
    if (!merged) {
      mask_ = mask_.contiguous();
      merged = layout();
    }
    all_.mask_rows = *merged;
    all_.mask.is_bool = mask_.scalar_type() == at::kBool;
    all_.mask.dtype = dtype_code(mask_.scalar_type());
    all_.mask.stride = mask_.stride(-1);
    all_.mask.data = mask_.const_data_ptr();
  }

  const math::SoftmaxRows& rows() const { return all_; }
  at::Tensor finish() const {
    const at::Tensor place = moved(out_);
    if (!place.is_alias_of(target_)) place.copy_(target_);
    return out_;
  }

 private:
  at::Tensor moved(const at::Tensor& x) const {
    return x.dim() == 0 ? x.reshape({1}) : x.movedim(dim_, -1);
  }
  at::Tensor rows(const at::Tensor& x) const { return moved(x).contiguous(); }

  int64_t dim_ = 0;
  at::Tensor out_, x_, target_, grad_, mask_;
  math::SoftmaxRows all_;
};

}  // namespace halfstep::ops
