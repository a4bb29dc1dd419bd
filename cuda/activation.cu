#include "../csrc/math/activation.h"

#include "floats.h"
#include "reduce.h"

namespace halfstep::cuda {

using math::Activation;
using math::Dtype;

namespace {

constexpr int kLength = 8;  // elements of a thread at a time: 16 bytes of a 16-bit dtype

template <Dtype kDtype>
using Compute = std::conditional_t<kDtype == Dtype::kF64, double, float>;

// ---- activations and gated units
// ----------------------------------------------------------------- y = f(x), dx = grad f'(x); y =
// f(gate) up, dgate = grad f'(gate) up, dup = grad f(gate).
//   FP16, BF16, FP32 computed in FP32; FP64 in FP64; one rounding. An output may be the memory of
//   an input. FP16 bytes an element: 4 and 6; 6 and 10. Operands are rows with strides of their
//   own. A thread takes 8 elements of a row at a time, in 16-byte accesses where row and alignment
//   allow; blocks of 256 threads, as many as are resident, stride over all groups of all rows.
//   Nothing is shared, so registers alone bound the occupancy. Elements do not depend on each
//   other: bit-equal in any order, and to the CPU's kernels (FP64: exp and erfc are the
//   platform's). The count of overflows is a sum of integers.
// Tests: tests/emulation/activation_test.cpp, tests/gpu/test_activation_cuda.py.

/// body(row, i, lanes) for the groups of this thread.
template <class Body>
__device__ void for_each_group(const Spans& spans, const Body& body) {
  const int64_t per_row = (spans.width + kLength - 1) / kLength, groups = spans.rows * per_row;
  for (int64_t g = int64_t(blockIdx.x) * kThreads + threadIdx.x; g < groups;
       g += int64_t(gridDim.x) * kThreads) {
    const int64_t row = spans.rows == 1 ? 0 : g / per_row;
    const int64_t i = (g - row * per_row) * kLength, rest = spans.width - i;
    body(row, i, rest < kLength ? int(rest) : kLength);
  }
}

/// Operand `k` of a row.
template <Dtype kDtype>
__device__ Group<Compute<kDtype>, kLength> read_operand(const void* base, const Spans& spans, int k,
                                                        int64_t row, int64_t i, int lanes) {
  return read_floats<Compute<kDtype>, kLength>(
      static_cast<const char*>(base) + row * spans.stride[k] * math::dtype_size(kDtype), kDtype, i,
      lanes);
}
template <Dtype kDtype>
__device__ void write_operand(void* base, const Spans& spans, int k, int64_t row, int64_t i,
                              int lanes, const Group<Compute<kDtype>, kLength>& x) {
  write_floats<Compute<kDtype>, kLength>(
      static_cast<char*>(base) + row * spans.stride[k] * math::dtype_size(kDtype), kDtype, i, lanes,
      x);
}

template <class F, Dtype kDtype>
__global__ void __launch_bounds__(kThreads)
    activation_forward_kernel(Spans spans, const void* x, void* y) {
  for_each_group(spans, [&](int64_t row, int64_t i, int lanes) {
    auto a = read_operand<kDtype>(x, spans, 0, row, i, lanes);
    HALFSTEP_UNROLL
    for (int k = 0; k < kLength; ++k) a.x[k] = F::template value<kDtype == Dtype::kF16>(a.x[k]);
    write_operand<kDtype>(y, spans, 1, row, i, lanes, a);
  });
}

template <class F, Dtype kDtype>
__global__ void __launch_bounds__(kThreads)
    activation_backward_kernel(Spans spans, const void* grad, const void* x, void* dx) {
  for_each_group(spans, [&](int64_t row, int64_t i, int lanes) {
    auto d = read_operand<kDtype>(grad, spans, 0, row, i, lanes);
    const auto a = read_operand<kDtype>(x, spans, 1, row, i, lanes);
    HALFSTEP_UNROLL
    for (int k = 0; k < kLength; ++k)
      d.x[k] = F::template gradient<kDtype == Dtype::kF16>(d.x[k], a.x[k]);
    write_operand<kDtype>(dx, spans, 2, row, i, lanes, d);
  });
}

template <class F, Dtype kDtype>
__global__ void __launch_bounds__(kThreads)
    gated_kernel(Spans spans, const void* gate, const void* up, void* y, int64_t* overflowed) {
  int64_t count = 0;
  constexpr auto kBound = math::overflow_bound<Compute<kDtype>>(kDtype);
  for_each_group(spans, [&](int64_t row, int64_t i, int lanes) {
    const auto g = read_operand<kDtype>(gate, spans, 0, row, i, lanes);
    const auto u = read_operand<kDtype>(up, spans, 1, row, i, lanes);
    Group<Compute<kDtype>, kLength> result;
    HALFSTEP_UNROLL
    for (int k = 0; k < kLength; ++k) {
      result.x[k] = F::template value<kDtype == Dtype::kF16>(g.x[k]) * u.x[k];
      if (overflowed) count += math::count(math::overflows(result.x[k], g.x[k], u.x[k], kBound));
    }
    write_operand<kDtype>(y, spans, 2, row, i, lanes, result);
  });
  if (count != 0) add_count(overflowed, count);
}

template <class F, Dtype kDtype>
__global__ void __launch_bounds__(kThreads)
    gated_backward_kernel(Spans spans, const void* grad, const void* gate, const void* up,
                          void* dgate, void* dup) {
  for_each_group(spans, [&](int64_t row, int64_t i, int lanes) {
    const auto d = read_operand<kDtype>(grad, spans, 0, row, i, lanes);
    auto g = read_operand<kDtype>(gate, spans, 1, row, i, lanes);
    auto u = read_operand<kDtype>(up, spans, 2, row, i, lanes);
    HALFSTEP_UNROLL
    for (int k = 0; k < kLength; ++k) {
      const auto at = F::template curve<kDtype == Dtype::kF16>(g.x[k]);
      g.x[k] = d.x[k] * at.slope * u.x[k];
      u.x[k] = d.x[k] * at.value;
    }
    write_operand<kDtype>(dgate, spans, 3, row, i, lanes, g);
    write_operand<kDtype>(dup, spans, 4, row, i, lanes, u);
  });
}

template <Dtype kValue>
struct DtypeConstant {
  static constexpr Dtype value = kValue;
};
/// body(DtypeConstant<…>()) for the dtype met at run time.
template <class Body>
Status with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kF16:
      return body(DtypeConstant<Dtype::kF16>());
    case Dtype::kBF16:
      return body(DtypeConstant<Dtype::kBF16>());
    case Dtype::kF32:
      return body(DtypeConstant<Dtype::kF32>());
    default:
      return body(DtypeConstant<Dtype::kF64>());
  }
}

int64_t blocks_for(const Spans& spans) {
  const int64_t groups = spans.rows * ((spans.width + kLength - 1) / kLength);
  return (groups + kThreads - 1) / kThreads;
}

// ---- dropout
// ------------------------------------------------------------------------------------- y =
// residual + (x + bias) factor, dx = grad factor; factor = kept scale, kept from Philox4x32-10 on
// the element's row-major number (csrc/math/activation.h), key and offset read from the device.
//   All operands contiguous, of one dtype; an output may be the memory of an input. FP16 bytes an
//   element: 6 (and the bias) and 4.
//   A thread takes half a group of 64: four runs of 8 elements, 16 apart, so that its 8 calls of
//   Philox are used to the last word. Two threads side by side fill 32-byte sectors.
//   Bias gradient: the mask goes to scratch, a bit an element; then a thread sums one column of 64
//   rows in FP32, in order (2.1 bytes an element more), and the blocks of rows are summed in FP64,
//   in order: bit-equal to the CPU's kernels.
// Tests: tests/emulation/activation_test.cpp, tests/gpu/test_activation_cuda.py.

constexpr int kRuns = 4, kRunStride = 16, kHalf = 32;

/// body(i, lanes, factors, bits of the run) for the four runs of each half group of this thread,
/// then finish(half, bits).
template <class T, class Body, class Finish>
__device__ void for_each_half(const DropoutArguments& a, const Body& body, const Finish& finish) {
  const int64_t halves = (a.numel + math::kDropoutGroup - 1) / math::kDropoutGroup * 2;
  const uint64_t key = a.seed ? uint64_t(read_uniform(a.seed)) : 0;
  const uint64_t offset = a.seed ? uint64_t(read_uniform(a.seed + 1)) : 0;
  for (int64_t h = int64_t(blockIdx.x) * kThreads + threadIdx.x; h < halves;
       h += int64_t(gridDim.x) * kThreads) {
    const int64_t begin = h / 2 * math::kDropoutGroup + h % 2 * kLength;
    uint32_t bits = 0;  // of run r: bits 8 r to 8 r + 7
    if (a.seed) {
      HALFSTEP_UNROLL
      for (int k = 0; k < kLength; ++k) {
        const auto words = math::dropout_words<uint32_t>(key, offset, begin + k);
        HALFSTEP_UNROLL
        for (int r = 0; r < kRuns; ++r)
          bits |= uint32_t(words.x[r] >= a.threshold) << (kLength * r + k);
      }
    } else {
      bits = 0xffffffffu;
    }
    HALFSTEP_UNROLL
    for (int r = 0; r < kRuns; ++r) {
      const int64_t i = begin + r * kRunStride, rest = a.numel - i;
      if (rest <= 0) continue;
      Group<T, kLength> factor;
      HALFSTEP_UNROLL
      for (int k = 0; k < kLength; ++k)
        factor.x[k] = T((bits >> (kLength * r + k)) & 1u) * T(a.scale);
      body(i, rest < kLength ? int(rest) : kLength, factor);
    }
    finish(h, bits);
  }
}

template <class T>
__device__ Group<T, kLength> read_bias(const DropoutArguments& a, Dtype dtype, int64_t i,
                                       int lanes) {
  Group<T, kLength> bias = {};
  if (!a.bias) return bias;
  const int64_t column = i % a.width;
  if (column % kLength == 0 && column + kLength <= a.width)
    return read_floats<T, kLength>(a.bias, dtype, column, lanes);
  for (int k = 0; k < kLength; ++k)
    if (k < lanes) bias.x[k] = read_floats<T, 1>(a.bias, dtype, (column + k) % a.width, 1).x[0];
  return bias;
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) dropout_add_kernel(DropoutArguments a) {
  using T = Compute<kDtype>;
  for_each_half<T>(
      a,
      [&](int64_t i, int lanes, const Group<T, kLength>& factor) {
        auto x = read_floats<T, kLength>(a.x, kDtype, i, lanes);
        const auto residual = read_floats<T, kLength>(a.residual, kDtype, i, lanes);
        const auto bias = read_bias<T>(a, kDtype, i, lanes);
        HALFSTEP_UNROLL
        for (int k = 0; k < kLength; ++k)
          x.x[k] = math::dropout_add(x.x[k], bias.x[k], residual.x[k], factor.x[k]);
        write_floats<T, kLength>(a.y, kDtype, i, lanes, x);
      },
      [](int64_t, uint32_t) {});
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) dropout_backward_kernel(DropoutArguments a) {
  using T = Compute<kDtype>;
  for_each_half<T>(
      a,
      [&](int64_t i, int lanes, const Group<T, kLength>& factor) {
        auto d = read_floats<T, kLength>(a.x, kDtype, i, lanes);
        HALFSTEP_UNROLL
        for (int k = 0; k < kLength; ++k) d.x[k] = d.x[k] * factor.x[k];
        write_floats<T, kLength>(a.y, kDtype, i, lanes, d);
      },
      [&](int64_t half, uint32_t bits) {
        if (a.bits) write(a.bits + half, bits);
      });
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(DropoutArguments a, int64_t rows) {
  using T = Compute<kDtype>;
  const int64_t strips = (a.width + kThreads - 1) / kThreads;
  const int64_t blocks = (rows + kDropoutRows - 1) / kDropoutRows * strips;
  for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    const int64_t block = b / strips, column = b % strips * kThreads + threadIdx.x;
    if (column >= a.width) continue;
    const int64_t first = block * kDropoutRows;
    const int64_t last = first + kDropoutRows < rows ? first + kDropoutRows : rows;
    T sum = 0;
    for (int64_t row = first; row < last; ++row) {
      const int64_t i = row * a.width + column;
      const uint32_t bits = read(a.bits + i / math::kDropoutGroup * 2 + i / kLength % 2);
      const T kept = T((bits >> (i / kRunStride % kRuns * kLength + i % kLength)) & 1u);
      sum = sum + read_floats<T, 1>(a.x, kDtype, i, 1).x[0] * (kept * T(a.scale));
    }
    write(static_cast<T*>(a.partials) + block * a.width + column, sum);
  }
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) column_totals_kernel(DropoutArguments a, int64_t rows) {
  using T = Compute<kDtype>;
  const int64_t blocks = (rows + kDropoutRows - 1) / kDropoutRows;
  for (int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x; column < a.width;
       column += int64_t(gridDim.x) * kThreads) {
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block)
      total += double(read(static_cast<const T*>(a.partials) + block * a.width + column));
    // To odd on the way to 16 bits: the second rounding is then the only one that counts.
    const T sum = math::dtype_size(kDtype) == 2 ? T(math::round_to_odd(total)) : T(total);
    write_floats<T, 1>(a.bias_gradient, kDtype, column, 1, {{sum}});
  }
}

}  // namespace

Status activation_forward(Activation activation, Dtype dtype, const Spans& spans, const void* x,
                          void* y, Stream stream) {
  return with_dtype(dtype, [&](auto constant) {
    return math::with_activation(activation, [&](auto f) {
      const auto kernel = activation_forward_kernel<decltype(f), decltype(constant)::value>;
      return launch(kernel, grid_for(kernel, kThreads, blocks_for(spans)), kThreads, stream, spans,
                    x, y);
    });
  });
}

Status activation_backward(Activation activation, Dtype dtype, const Spans& spans, const void* grad,
                           const void* x, void* dx, Stream stream) {
  return with_dtype(dtype, [&](auto constant) {
    return math::with_activation(activation, [&](auto f) {
      const auto kernel = activation_backward_kernel<decltype(f), decltype(constant)::value>;
      return launch(kernel, grid_for(kernel, kThreads, blocks_for(spans)), kThreads, stream, spans,
                    grad, x, dx);
    });
  });
}

Status gated(Activation activation, Dtype dtype, const Spans& spans, const void* gate,
             const void* up, void* y, int64_t* overflowed, Stream stream) {
  return with_dtype(dtype, [&](auto constant) {
    return math::with_gate(activation, [&](auto f) {
      const auto kernel = gated_kernel<decltype(f), decltype(constant)::value>;
      return launch(kernel, grid_for(kernel, kThreads, blocks_for(spans)), kThreads, stream, spans,
                    gate, up, y, overflowed);
    });
  });
}

Status gated_backward(Activation activation, Dtype dtype, const Spans& spans, const void* grad,
                      const void* gate, const void* up, void* dgate, void* dup, Stream stream) {
  return with_dtype(dtype, [&](auto constant) {
    return math::with_gate(activation, [&](auto f) {
      const auto kernel = gated_backward_kernel<decltype(f), decltype(constant)::value>;
      return launch(kernel, grid_for(kernel, kThreads, blocks_for(spans)), kThreads, stream, spans,
                    grad, gate, up, dgate, dup);
    });
  });
}

namespace {

int64_t half_blocks(int64_t numel) {
  return (numel + int64_t(kHalf) * kThreads - 1) / (int64_t(kHalf) * kThreads);
}

}  // namespace

Status dropout_add(Dtype dtype, const DropoutArguments& arguments, Stream stream) {
  return with_dtype(dtype, [&](auto constant) {
    const auto kernel = dropout_add_kernel<decltype(constant)::value>;
    return launch(kernel, grid_for(kernel, kThreads, half_blocks(arguments.numel)), kThreads,
                  stream, arguments);
  });
}

Status dropout_backward(Dtype dtype, const DropoutArguments& arguments, Stream stream) {
  return with_dtype(dtype, [&](auto constant) {
    constexpr Dtype kDtype = decltype(constant)::value;
    const auto kernel = dropout_backward_kernel<kDtype>;
    const Status status = launch(kernel, grid_for(kernel, kThreads, half_blocks(arguments.numel)),
                                 kThreads, stream, arguments);
    if (status != kSuccess || !arguments.bias_gradient) return status;
    const int64_t rows = arguments.numel / arguments.width;
    const int64_t strips = (arguments.width + kThreads - 1) / kThreads;
    const auto sums = column_sums_kernel<kDtype>;
    const Status summed =
        launch(sums, grid_for(sums, kThreads, (rows + kDropoutRows - 1) / kDropoutRows * strips),
               kThreads, stream, arguments, rows);
    if (summed != kSuccess) return summed;
    const auto totals = column_totals_kernel<kDtype>;
    return launch(totals, grid_for(totals, kThreads, strips), kThreads, stream, arguments, rows);
  });
}

}  // namespace halfstep::cuda
