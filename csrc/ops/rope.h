#pragma once

// Checks and preparation of rope, shared by its Meta, CPU and CUDA sides.

#include "../math/rope.h"

#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include "check.h"
#include "gather.h"
#include "rows.h"

namespace halfstep::ops {

inline void check_rope(const char* op, const at::Tensor& x, const at::Tensor& cos,
                       const at::Tensor& sin) {
  TORCH_CHECK(is_supported_float(x.scalar_type()) && x.layout() == at::kStrided && x.dim() >= 1, op,
              ": x is ", describe(x), " (", x.layout(),
              "); expected a dense float16, bfloat16, float32 or float64 tensor [..., dim]");
  TORCH_CHECK(
      is_supported_float(cos.scalar_type()) && cos.layout() == at::kStrided && cos.dim() >= 1, op,
      ": cos is ", describe(cos), " (", cos.layout(),
      "); expected a dense floating-point tensor [..., dim/2]");
  TORCH_CHECK(sin.sym_sizes() == cos.sym_sizes() && sin.scalar_type() == cos.scalar_type() &&
                  sin.layout() == at::kStrided,
              op, ": sin is ", describe(sin), " but cos is ", describe(cos));
  TORCH_CHECK(cos.sym_size(-1) * 2 <= x.sym_size(-1), op, ": cos is ", describe(cos), ", for ",
              cos.sym_size(-1) * 2, " elements of a row, but x is ", describe(x));
  const auto leading = [](const at::Tensor& t) {
    return t.sym_sizes().slice(0, size_t(t.dim() - 1));
  };
  TORCH_CHECK(at::is_expandable_to(leading(cos), leading(x)), op, ": cos is ", describe(cos),
              ", whose dimensions before the last do not broadcast to those of x, ", describe(x));
  check_device(op, {"cos"}, cos, {"x"}, x);
  check_device(op, {"sin"}, sin, {"x"}, x);
  TORCH_CHECK(!cos.requires_grad() && !sin.requires_grad(), op, ": ",
              cos.requires_grad() ? "cos" : "sin", " requires grad, but it gets none");
}

inline void check_rope_in_place(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  check_rope("rope_", x, cos, sin);
  TORCH_CHECK(at::has_internal_overlap(x) != at::MemOverlap::Yes, "rope_: x is ", describe(x),
              " with strides ", x.sym_strides(), ": its elements overlap");
}

/// Tensors as rows, and what keeps them alive. `out` may be x.
class RopeWork {
 public:
  RopeWork(const at::Tensor& x, const at::Tensor& out, const at::Tensor& cos, const at::Tensor& sin,
           bool interleaved, bool inverse)
      : x_(with_rows(x)),
        out_(with_rows(out)),
        target_(out),
        cos_(with_rows(cos)),
        sin_(with_rows(sin)) {
    if (x.is_same(out)) out_ = x_;
    auto merged = layout();
    if (!merged) {  // too many dimensions that cannot be walked as one
      const bool in_place = out_.is_same(x_);
      x_ = x_.contiguous();
      out_ = in_place ? x_ : out_.contiguous();
      merged = layout();
      if (!merged) {
        cos_ = whole(cos_);
        sin_ = whole(sin_);
        merged = layout();
      }
    }
    all_.layout = *merged;
    all_.dtype = dtype_code(x.scalar_type());
    all_.table_dtype = dtype_code(cos.scalar_type());
    all_.interleaved = interleaved;
    all_.inverse = inverse;
    all_.half = cos.size(-1);
    all_.width = x.size(-1);
    all_.rows = all_.width == 0 ? 0 : x.numel() / all_.width;
    all_.x = x_.const_data_ptr();
    all_.out = out_.mutable_data_ptr();
    all_.cos = cos_.const_data_ptr();
    all_.sin = sin_.const_data_ptr();
  }

  const math::RopeRows& rows() const { return all_; }
  void finish() const {
    if (!out_.is_same(target_)) target_.copy_(out_);
  }

 private:
  static at::Tensor with_rows(const at::Tensor& t) {
    return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous();
  }
  at::IntArrayRef leading() const { return x_.sizes().slice(0, size_t(x_.dim() - 1)); }
  at::Tensor whole(const at::Tensor& table) const {
    auto sizes = x_.sizes().vec();
    sizes.back() = table.size(-1);
    return table.expand(sizes).contiguous();
  }
  std::optional<math::RowLayout<4>> layout() const {
    const at::IntArrayRef sizes = leading();
    return merge_rows<4>(sizes, {row_strides(x_, sizes), row_strides(out_, sizes),
                                 row_strides(cos_, sizes), row_strides(sin_, sizes)});
  }

  at::Tensor x_, out_, target_, cos_, sin_;
  math::RopeRows all_;
};

}  // namespace halfstep::ops
