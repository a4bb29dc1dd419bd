#include "../ops/activation.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>

#include "../ops/gather.h"
#include "isa/activation.h"
#include "isa/kernels.h"

namespace halfstep::cpu {

namespace {

using ops::Launch;
using ops::OptionalTensor;

/// Elements that a thread takes at a time: below it a thread costs more than it brings.
constexpr int64_t kGrain = 8 * math::kBlock;
/// Rows whose bias gradient is summed in FP32, before the blocks of rows are summed in FP64 in
/// order.
constexpr int64_t kRowBlock = 64;

/// body(pointers, n): runs of n elements at the operands' places, in parallel.
template <class Body>
void for_each_run(const Launch& launch, const Body& body) {
  const ops::Spans& spans = launch.spans;
  std::array<char*, ops::kMaxOperands> base{};
  size_t operands = 0;
  for (const at::Tensor& input : launch.inputs)
    base[operands++] = static_cast<char*>(const_cast<void*>(input.const_data_ptr()));
  for (const at::Tensor& output : launch.outputs)
    base[operands++] = static_cast<char*>(output.mutable_data_ptr());
  const int64_t size = launch.outputs[0].element_size();
  // Whole blocks, so that two threads do not write to one cache line of a contiguous output.
  const int64_t blocks = (launch.numel() + math::kBlock - 1) / math::kBlock;
  at::parallel_for(0, blocks, kGrain / math::kBlock, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(last * math::kBlock, launch.numel());
    for (int64_t i = first * math::kBlock; i < end;) {
      const int64_t row = i / spans.width, column = i % spans.width;
      const int64_t n = std::min(spans.width - column, end - i);
      std::array<char*, ops::kMaxOperands> at = base;
      for (size_t k = 0; k < operands; ++k) at[k] += (row * spans.stride[k] + column) * size;
      body(at, n);
      i += n;
    }
  });
}

math::Dtype dtype_of(const Launch& launch) {
  return ops::dtype_code(launch.outputs[0].scalar_type());
}

struct Backend {
  static constexpr bool kComputes = true;

  static void forward(const Launch& launch) {
    for_each_run(launch, [&, dtype = dtype_of(launch)](const auto& at, int64_t n) {
      kernels().activation->forward(launch.activation, dtype, at[0], at[1], n);
    });
  }
  static void backward(const Launch& launch) {
    for_each_run(launch, [&, dtype = dtype_of(launch)](const auto& at, int64_t n) {
      kernels().activation->backward(launch.activation, dtype, at[0], at[1], at[2], n);
    });
  }
  static void gated(const Launch& launch) {
    std::atomic<int64_t> overflowed = 0;
    const bool counts = launch.overflowed.defined();
    for_each_run(launch, [&, dtype = dtype_of(launch)](const auto& at, int64_t n) {
      const int64_t some =
          kernels().activation->gated(launch.activation, dtype, counts, at[0], at[1], at[2], n);
      if (some != 0) overflowed += some;
    });
    if (counts) *launch.overflowed.mutable_data_ptr<int64_t>() += overflowed;
  }
  static void gated_backward(const Launch& launch) {
    for_each_run(launch, [&, dtype = dtype_of(launch)](const auto& at, int64_t n) {
      kernels().activation->gated_backward(launch.activation, dtype, at[0], at[1], at[2], at[3],
                                           at[4], n);
    });
  }
};

/// The choices of one call of dropout, block by block.
struct Mask {
  Mask(double p, const OptionalTensor& seed) : dropout(math::Dropout::of(p)) {
    if (!dropout.is_random) return;
    const auto* numbers = seed->const_data_ptr<int64_t>();
    key = uint64_t(numbers[0]);
    offset = uint64_t(numbers[seed->stride(0)]);
  }
  /// Of elements [begin, begin + kBlock); null when there is no choice.
  const float* draw(int64_t begin, int64_t count, float* memory) const {
    if (!dropout.is_random) return nullptr;
    kernels().activation->kept(key, offset, dropout.threshold, begin, count, memory);
    return memory;
  }
  math::Dropout dropout;
  uint64_t key = 0, offset = 0;
};

/// body(i, column, n, kept): the runs of elements [begin, end) within rows of `width`, block by
/// block; begin is a multiple of 64.
template <class Body>
void for_each_dropout_run(const Mask& mask, int64_t begin, int64_t end, int64_t width,
                          const Body& body) {
  alignas(64) float memory[math::kBlock];
  for (int64_t block = begin; block < end; block += math::kBlock) {
    const int64_t stop = std::min(block + math::kBlock, end);
    const float* kept = mask.draw(block, stop - block, memory);
    for (int64_t i = block; i < stop;) {
      const int64_t column = i % width, n = std::min(width - column, stop - i);
      body(i, column, n, kept ? kept + (i - block) : nullptr);
      i += n;
    }
  }
}

const char* const_bytes(const at::Tensor& tensor) {
  return static_cast<const char*>(tensor.const_data_ptr());
}

at::Tensor bias_dropout_add(const at::Tensor& x, const OptionalTensor& bias,
                            const at::Tensor& residual, double p, const OptionalTensor& seed) {
  ops::check_dropout_add("bias_dropout_add", x, bias, residual, p, seed);
  const at::Tensor input = x.contiguous(), other = residual.contiguous();
  at::Tensor y = at::empty_like(input);
  const int64_t numel = y.numel(), size = y.element_size();
  if (numel == 0) return y;
  const at::Tensor offsets = bias ? bias->contiguous() : at::Tensor();
  const int64_t width = bias ? offsets.numel() : numel;
  const Mask mask(p, seed);
  const math::Dtype dtype = ops::dtype_code(x.scalar_type());
  const char *from = const_bytes(input), *beside = const_bytes(other);
  const char* added = bias ? const_bytes(offsets) : nullptr;
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t blocks = (numel + math::kBlock - 1) / math::kBlock;
  at::parallel_for(0, blocks, kGrain / math::kBlock, [&](int64_t first, int64_t last) {
    for_each_dropout_run(mask, first * math::kBlock, std::min(last * math::kBlock, numel), width,
                         [&](int64_t i, int64_t column, int64_t n, const float* kept) {
                           kernels().activation->dropout_add(
                               dtype, from + i * size, added ? added + column * size : nullptr,
                               beside + i * size, kept, mask.dropout.scale, to + i * size, n);
                         });
  });
  return y;
}

/// Sums of the rows of `partials`, in order, in FP64.
template <class T>
void add_rows(const at::Tensor& partials, double* totals) {
  const int64_t rows = partials.size(0), width = partials.size(1);
  const auto* values = partials.const_data_ptr<T>();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) totals[c] += double(values[r * width + c]);
}

std::tuple<at::Tensor, at::Tensor> bias_dropout_add_backward(const at::Tensor& grad, double p,
                                                             const OptionalTensor& seed,
                                                             bool bias) {
  ops::check_bias_gradient("bias_dropout_add_backward", grad, p, seed, bias);
  const at::Tensor from = grad.contiguous();
  at::Tensor dx = at::empty_like(from);
  const int64_t numel = dx.numel(), size = dx.element_size();
  const int64_t width = bias ? grad.size(-1) : numel;
  const bool wide = grad.scalar_type() == at::kDouble;
  const auto doubles = grad.options().dtype(at::kDouble);
  if (numel == 0) return {dx, at::zeros({bias ? width : 0}, grad.options())};
  // Without a bias there are no rows: blocks of the size that a block of rows would have.
  const int64_t span = bias ? kRowBlock * width : kGrain;
  const int64_t spans = (numel + span - 1) / span;
  const at::Tensor partials =
      at::zeros({bias ? spans : 0, width}, doubles.dtype(wide ? at::kDouble : at::kFloat));
  const int64_t partial_size = partials.element_size();
  const Mask mask(p, seed);
  const math::Dtype dtype = ops::dtype_code(grad.scalar_type());
  const char* source = const_bytes(from);
  auto* to = static_cast<char*>(dx.mutable_data_ptr());
  auto* sums = static_cast<char*>(partials.mutable_data_ptr());
  at::parallel_for(0, spans, std::max<int64_t>(1, kGrain / span), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s)
      for_each_dropout_run(mask, s * span, std::min((s + 1) * span, numel), width,
                           [&](int64_t i, int64_t column, int64_t n, const float* kept) {
                             kernels().activation->dropout_backward(
                                 dtype, source + i * size, kept, mask.dropout.scale, to + i * size,
                                 bias ? sums + (s * width + column) * partial_size : nullptr, n);
                           });
  });
  at::Tensor totals = at::zeros({bias ? width : 0}, doubles);
  if (wide)
    add_rows<double>(partials, totals.mutable_data_ptr<double>());
  else
    add_rows<float>(partials, totals.mutable_data_ptr<double>());
  at::Tensor dbias = at::empty({totals.size(0)}, grad.options());
  const auto* rows = totals.const_data_ptr<double>();
  for (int64_t c = 0; c < totals.size(0); ++c)
    math::store_rounded(dbias.mutable_data_ptr(), dtype, c, rows[c]);
  return {dx, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CPU, m) {
  ops::add_activations<ops::ActivationOps<Backend>>(m);
  m.impl("bias_dropout_add", bias_dropout_add);
  m.impl("bias_dropout_add_backward", bias_dropout_add_backward);
}

}  // namespace halfstep::cpu
