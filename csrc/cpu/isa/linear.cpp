// Epilogues of a product: bias, activation, what is kept for the backward; the activation's
// derivative, and the gradient of the bias.
//
//   forward    y = act(h), h = product + bias   backward   dz = dy act'(h), db = sum over rows of
//   dz FP32 (FP64 for FP64) inside, one rounding at each store. Rows in packs of sixteen. An
//   element depends on its own row and column only; column sums run in FP32 over blocks of 64 rows,
//   whoever computes them, then in FP64 in the order of the blocks: the same bits for any number of
//   threads and any instruction set. Bytes an element in FP16: forward 4 of FP32 product (in the
//   cache) + 2 out, 2 more kept for GELU or 1/8 for ReLU; backward 2 + 2 or 1/8 in, 2 out. Tests:
//   tests/python/test_linear.py, test_isa.py.

#include "linear.h"

#include "rows.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

/// Lane i of a mask as bit i.
HALFSTEP_FN uint32_t bits_of(const I32& mask) {
#if defined(__AVX512F__)
  return uint32_t(_mm512_movepi32_mask((__m512i)mask.piece[0]));
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)mask.piece[0])) |
         uint32_t(_mm256_movemask_ps((__m256)mask.piece[1])) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(is_set(mask, i)) << i;
  return bits;
#endif
}
HALFSTEP_FN uint32_t bits_of(const I64& mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(is_set(mask, i)) << i;
  return bits;
}
/// Lane i of x where bit i is set, else zero.
template <class V>
HALFSTEP_FN V where_set(uint32_t bits, const V& x) {
  typename Traits<V>::Mask mask;
  using I = std::remove_reference_t<decltype(mask.piece[0][0])>;
  constexpr int kWidth = kRegister / int(sizeof(I));
  for (int p = 0; p < Traits<V>::Mask::kPieces; ++p) {
    typename Traits<V>::Mask::Native one{};
    for (int i = 0; i < kWidth; ++i) one[i] = I(1) << (p * kWidth + i);
    mask.piece[p] = (one & (I(bits) - typename Traits<V>::Mask::Native{})) != 0;
  }
  return select(mask, x, broadcast<V>(0));
}

HALFSTEP_FN void store_bits(char* row, int64_t i, uint32_t bits) {
  const auto two = uint16_t(bits);
  __builtin_memcpy(row + i / 8, &two, 2);
}
HALFSTEP_FN uint32_t load_bits(const char* row, int64_t i) {
  uint16_t two;
  __builtin_memcpy(&two, row + i / 8, 2);
  return two;
}

/// The end of a row of bits: those of the last pack beyond the row, and whole bytes after it.
void close_mask(char* row, int64_t columns) {
  const int64_t packs = (columns + kLanes - 1) / kLanes * (kLanes / 8);
  for (int64_t i = packs; i < math::mask_bytes(columns); ++i) row[i] = 0;
}

template <LinearActivation kActivation, class Product, class Out>
void forward_rows(const LinearForward& work, int64_t begin, int64_t end) {
  using V = typename Out::V;
  for (int64_t r = begin; r < end; ++r) {
    const char* product = work.product.row(r);
    char* y = work.y.row(r);
    char* saved = work.saved ? work.saved.row(r) : nullptr;
    for_each_pack(
        work.columns, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          V h = Product::load(product, i, lanes);
          if (work.bias)
            h = h + Elements < sizeof(V) == sizeof(F64) ? Dtype::kF64
                                                        : Dtype::kF32 > ::load(work.bias, i, lanes);
          Out::store(y, i, activate<kActivation>(h), lanes);
          if constexpr (kActivation == LinearActivation::kRelu) {
            if (saved) store_bits(saved, i, ~bits_of(is_closed(h)) & ((1u << lanes.count) - 1));
          } else if constexpr (kActivation != LinearActivation::kNone) {
            if (saved) Out::store(saved, i, h, lanes);
          }
        });
    if (kActivation == LinearActivation::kRelu && saved) close_mask(saved, work.columns);
  }
}

/// One block of rows; its column sums grow in place.
template <LinearActivation kActivation, class In, class Out>
void backward_rows(const LinearBackward& work, int64_t begin, int64_t end, char* sums) {
  using V = typename In::V;
  using Wide = Elements<sizeof(V) == sizeof(F64) ? Dtype::kF64 : Dtype::kF32>;
  for (int64_t r = begin; r < end; ++r) {
    const char* dy = work.dy.row(r);
    const char* saved = work.saved ? work.saved.row(r) : nullptr;
    char* dz = work.dz ? work.dz.row(r) : nullptr;
    for_each_pack(
        work.columns, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          V z = In::load(dy, i, lanes);
          if constexpr (kActivation == LinearActivation::kRelu)
            z = where_set(load_bits(saved, i), z);
          else if constexpr (kActivation != LinearActivation::kNone)
            z = z * slope<kActivation>(V(In::load(saved, i, lanes)));
          if (sums) Wide::store(sums, i, r == begin ? z : V(Wide::load(sums, i, lanes)) + z, lanes);
          if (dz) Out::store(dz, i, z, lanes);
        });
  }
}

template <LinearActivation kActivation, class In, class Out>
void backward_blocks(const LinearBackward& work, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += math::kBiasRows) {
    const int64_t last = first + math::kBiasRows < end ? first + math::kBiasRows : end;
    char* sums = work.sums ? work.sums.row(first / math::kBiasRows) : nullptr;
    backward_rows<kActivation, In, Out>(work, first, last, sums);
  }
}

void forward(const LinearForward& work, int64_t begin, int64_t end) {
  with_linear_activation(work.activation, [&](auto activation) {
    with_elements(work.y.dtype, [&](auto out) {
      using Out = decltype(out);
      using Wide = Elements<Out::dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32>;
      if (work.product.dtype == Out::dtype)
        forward_rows<activation.value, Out, Out>(work, begin, end);
      else
        forward_rows<activation.value, Wide, Out>(work, begin, end);
    });
  });
}

void backward(const LinearBackward& work, int64_t begin, int64_t end) {
  with_linear_activation(work.activation, [&](auto activation) {
    with_elements(work.dy.dtype, [&](auto in) {
      using In = decltype(in);
      using Wide = Elements<In::dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32>;
      if (work.dz && work.dz.dtype != In::dtype)
        backward_blocks<activation.value, In, Wide>(work, begin, end);
      else
        backward_blocks<activation.value, In, In>(work, begin, end);
    });
  });
}

void add_rows(const Rows& sums, int64_t rows, void* out, Dtype out_dtype, int64_t begin,
              int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    double total = 0;
    for (int64_t r = 0; r < rows; ++r)
      total += sums.dtype == Dtype::kF64 ? reinterpret_cast<const double*>(sums.row(r))[j]
                                         : reinterpret_cast<const float*>(sums.row(r))[j];
    store_rounded(out, out_dtype, j, total);
  }
}

}  // namespace

const LinearKernels kLinear = {forward, backward, add_rows};

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
