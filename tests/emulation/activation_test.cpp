#include "../../cuda/activation.cu"

#include "../cpp/catch.h"
#include "csrc/cpu/isa/activation.h"
#include "tensors.h"

using namespace halfstep;
using emulation::Array;
using emulation::Buffer;
using math::Activation;
using math::Dtype;

namespace {

const Dtype kDtypes[] = {Dtype::kF16, Dtype::kBF16, Dtype::kF32, Dtype::kF64};
const Activation kActivations[] = {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                                   Activation::kSquaredRelu};

const cpu::ActivationKernels& host() { return *cpu::kKernelsDefault.activation; }

/// Numbers of all sizes, with what is not finite.
void fill(Array& array, uint64_t seed) {
  emulation::fill_normal(array, 3, seed);
  const double odd[] = {NAN, INFINITY, -INFINITY, 65504, -65504, 0x1p-24, -0.0};
  for (int64_t i = int64_t(seed % 5); i < array.count(); i += 29)
    array.set(i, odd[size_t(i) % std::size(odd)]);
}

/// The elements as bytes, every NaN as the same one: which of two operands' NaN comes through is
/// the compiler's choice.
std::vector<char> bytes_of(Array& array) {
  for (int64_t i = 0; i < array.count(); ++i)
    if (std::isnan(array.get(i))) array.set(i, NAN);
  return array.bytes();
}

/// Rows of `width` elements, `gap` elements apart, the first `offset` elements off alignment.
struct Shape {
  int64_t rows, width, gap, offset;
};
const Shape kShapes[] = {
    {1, 1, 0, 0}, {1, 4999, 0, 0}, {1, 777, 0, 1}, {5, 40, 8, 0}, {7, 13, 3, 0}};

struct Operands {
  Operands(Dtype dtype, const Shape& shape, int count) {
    spans.rows = shape.rows;
    spans.width = shape.width;
    for (int k = 0; k < count; ++k) {
      spans.stride[k] = shape.width + shape.gap;
      arrays.push_back(
          std::make_unique<Array>(dtype, shape.rows * spans.stride[k] - shape.gap, shape.offset));
      fill(*arrays.back(), uint64_t(k + 1));
    }
  }
  char* row(int k, int64_t r) const {
    return static_cast<char*>(arrays[size_t(k)]->data()) +
           r * spans.stride[k] * math::dtype_size(arrays[size_t(k)]->dtype());
  }
  void* data(int k) const { return arrays[size_t(k)]->data(); }
  std::vector<char> bytes(int first) const {
    std::vector<char> all;
    for (size_t k = size_t(first); k < arrays.size(); ++k)
      emulation::append(all, bytes_of(*arrays[k]));
    return all;
  }
  cuda::Spans spans;
  std::vector<std::unique_ptr<Array>> arrays;
};

/// `device` in every order, and `row` on the CPU, leave the same bytes in the operands from
/// `first`.
void check_equal(Dtype dtype, int operands, int first,
                 const std::function<void(const Operands&)>& device,
                 const std::function<void(const Operands&, int64_t)>& row) {
  for (const Shape& shape : kShapes) {
    const Operands want(dtype, shape, operands);
    for (int64_t r = 0; r < shape.rows; ++r) row(want, r);
    std::vector<char> got;
    const auto errors = emulation::in_all_orders(
        [&] {
          const Operands mine(dtype, shape, operands);
          device(mine);
          got = mine.bytes(first);
          return got;
        },
        emulation::Orders::kThree);
    CHECK(errors == std::vector<std::string>());
    CHECK((got == want.bytes(first)));
  }
}

}  // namespace

TEST_CASE("activations on the device have the bits of the CPU's", "[activation]") {
  for (const Dtype dtype : kDtypes)
    for (const Activation f : kActivations) {
      check_equal(
          dtype, 2, 1,
          [&](const Operands& o) {
            cuda::activation_forward(f, dtype, o.spans, o.data(0), o.data(1), nullptr);
          },
          [&](const Operands& o, int64_t r) {
            host().forward(f, dtype, o.row(0, r), o.row(1, r), o.spans.width);
          });
      check_equal(
          dtype, 3, 2,
          [&](const Operands& o) {
            cuda::activation_backward(f, dtype, o.spans, o.data(0), o.data(1), o.data(2), nullptr);
          },
          [&](const Operands& o, int64_t r) {
            host().backward(f, dtype, o.row(0, r), o.row(1, r), o.row(2, r), o.spans.width);
          });
    }
}

TEST_CASE("gated units on the device have the bits and the counts of the CPU's", "[activation]") {
  for (const Dtype dtype : kDtypes)
    for (const Activation f : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
      int64_t counted = 0, expected = 0;
      check_equal(
          dtype, 3, 2,
          [&](const Operands& o) {
            Buffer<int64_t> overflowed(1, 5);
            cuda::gated(f, dtype, o.spans, o.data(0), o.data(1), o.data(2), overflowed.data(),
                        nullptr);
            counted = overflowed[0] - 5;
          },
          [&](const Operands& o, int64_t r) {
            const int64_t some =
                host().gated(f, dtype, true, o.row(0, r), o.row(1, r), o.row(2, r), o.spans.width);
            expected = r == 0 ? some : expected + some;
          });
      CHECK(counted == expected);
      if (dtype == Dtype::kF16) CHECK(counted > 0);
      check_equal(
          dtype, 5, 3,
          [&](const Operands& o) {
            cuda::gated_backward(f, dtype, o.spans, o.data(0), o.data(1), o.data(2), o.data(3),
                                 o.data(4), nullptr);
          },
          [&](const Operands& o, int64_t r) {
            host().gated_backward(f, dtype, o.row(0, r), o.row(1, r), o.row(2, r), o.row(3, r),
                                  o.row(4, r), o.spans.width);
          });
    }
}

TEST_CASE("bytes of activations and gated units", "[activation]") {
  const int64_t n = 4096;
  const Operands o(Dtype::kF16, {1, n, 0, 0}, 5);
  const auto moved = [&](const auto& launch) {
    emulation::reset();
    launch();
    const auto& s = emulation::state();
    CHECK(s.errors.empty());
    return double(s.bytes_read + s.bytes_written) / double(n);
  };
  const auto f = Activation::kSilu;
  CHECK(moved([&] {
          cuda::activation_forward(f, Dtype::kF16, o.spans, o.data(0), o.data(1), nullptr);
        }) == 4);
  CHECK(moved([&] {
          cuda::activation_backward(f, Dtype::kF16, o.spans, o.data(0), o.data(1), o.data(2),
                                    nullptr);
        }) == 6);
  CHECK(moved([&] {
          cuda::gated(f, Dtype::kF16, o.spans, o.data(0), o.data(1), o.data(2), nullptr, nullptr);
        }) == 6);
  CHECK(moved([&] {
          cuda::gated_backward(f, Dtype::kF16, o.spans, o.data(0), o.data(1), o.data(2), o.data(3),
                               o.data(4), nullptr);
        }) == 10);
  emulation::reset();
}

namespace {

struct DropoutCase {
  int64_t rows, width;
  double p;
  bool bias;
};

/// The CPU's kernels over the whole of it; `sums`: [row blocks, width].
void host_dropout(Dtype dtype, const DropoutCase& c, const Operands& o, const int64_t* seed,
                  void* bias, bool backward, std::vector<double>& totals) {
  const int64_t numel = c.rows * c.width, padded = (numel + 63) / 64 * 64;
  const math::Dropout dropout = math::Dropout::of(c.p);
  std::vector<float> kept(size_t(padded), 1.0f);
  if (dropout.is_random)
    host().kept(uint64_t(seed[0]), uint64_t(seed[1]), dropout.threshold, 0, numel, kept.data());
  totals.assign(size_t(c.width), 0);
  std::vector<double> wide(size_t(c.width));
  std::vector<float> narrow(size_t(c.width));
  const int64_t size = math::dtype_size(dtype);
  const auto at = [&](int k, int64_t i) { return static_cast<char*>(o.data(k)) + i * size; };
  for (int64_t r = 0; r < c.rows; ++r) {
    const int64_t i = r * c.width;
    if (!backward) {
      host().dropout_add(dtype, at(0, i), bias, at(1, i), kept.data() + i, dropout.scale, at(2, i),
                         c.width);
      continue;
    }
    void* sums = dtype == Dtype::kF64 ? (void*)wide.data() : (void*)narrow.data();
    host().dropout_backward(dtype, at(0, i), kept.data() + i, dropout.scale, at(2, i), sums,
                            c.width);
    if (r % 64 != 63 && r + 1 != c.rows) continue;
    for (size_t k = 0; k < totals.size(); ++k)
      totals[k] += dtype == Dtype::kF64 ? wide[k] : double(narrow[k]);
    std::fill(wide.begin(), wide.end(), 0);
    std::fill(narrow.begin(), narrow.end(), 0.0f);
  }
}

cuda::DropoutArguments arguments_of(const DropoutCase& c, const Operands& o, const int64_t* seed) {
  const math::Dropout dropout = math::Dropout::of(c.p);
  cuda::DropoutArguments a;
  a.numel = c.rows * c.width;
  a.width = c.width;
  a.seed = dropout.is_random ? seed : nullptr;
  a.threshold = dropout.threshold;
  a.scale = dropout.scale;
  a.x = o.data(0);
  a.residual = o.data(1);
  a.y = o.data(2);
  return a;
}

}  // namespace

TEST_CASE("dropout on the device draws the CPU's mask, and its bias gradient has the same bits",
          "[activation]") {
  for (const Dtype dtype : {Dtype::kF16, Dtype::kF32, Dtype::kF64})
    for (const DropoutCase c : {DropoutCase{1, 1, 0.5, true}, DropoutCase{70, 40, 0.3, true},
                                DropoutCase{131, 13, 0.9, true}, DropoutCase{3, 333, 0, true},
                                DropoutCase{3, 64, 1, true}, DropoutCase{1, 5000, 0.1, false}}) {
      Buffer<int64_t> seed(std::vector<int64_t>{0x123456789abcdef, int64_t(1) << 40});
      Array bias(dtype, c.width);
      fill_normal(bias, 1, 8);
      void* added = c.bias ? bias.data() : nullptr;
      const Shape flat = {1, c.rows * c.width, 0, 0};
      const Operands want(dtype, flat, 3);
      std::vector<double> totals;
      host_dropout(dtype, c, want, seed.data(), added, false, totals);
      std::vector<char> got;
      auto errors = emulation::in_all_orders(
          [&] {
            const Operands mine(dtype, flat, 3);
            auto a = arguments_of(c, mine, seed.data());
            a.bias = added;
            cuda::dropout_add(dtype, a, nullptr);
            return got = mine.bytes(2);
          },
          emulation::Orders::kThree);
      CHECK(errors == std::vector<std::string>());
      CHECK((got == want.bytes(2)));

      host_dropout(dtype, c, want, seed.data(), nullptr, true, totals);
      std::vector<char> sums;
      errors = emulation::in_all_orders(
          [&] {
            const Operands mine(dtype, flat, 3);
            auto a = arguments_of(c, mine, seed.data());
            Array gradient(dtype, c.width);
            Buffer<uint32_t> bits(size_t((a.numel + 63) / 64 * 2));
            Buffer<double> partials(size_t((c.rows + 63) / 64 * c.width));
            if (c.bias) {
              a.bias_gradient = gradient.data();
              a.bits = bits.data();
              a.partials = partials.data();
            }
            cuda::dropout_backward(dtype, a, nullptr);
            sums = bytes_of(gradient);
            got = mine.bytes(2);
            auto all = got;
            if (c.bias) emulation::append(all, sums);
            return all;
          },
          emulation::Orders::kThree);
      CHECK(errors == std::vector<std::string>());
      CHECK((got == want.bytes(2)));
      if (!c.bias) continue;
      Array expected(dtype, c.width);
      for (int64_t k = 0; k < c.width; ++k) expected.set(k, totals[size_t(k)]);
      CHECK((sums == bytes_of(expected)));
    }
}

TEST_CASE("bytes of dropout", "[activation]") {
  const DropoutCase c = {128, 64, 0.5, true};
  const int64_t n = c.rows * c.width;
  const Operands o(Dtype::kF16, {1, n, 0, 0}, 3);
  Buffer<int64_t> seed(std::vector<int64_t>{1, 2});
  emulation::reset();
  cuda::dropout_add(Dtype::kF16, arguments_of(c, o, seed.data()), nullptr);
  const auto& s = emulation::state();
  CHECK(double(s.bytes_read + s.bytes_written) / double(n) < 6.01);
  emulation::reset();
  cuda::dropout_backward(Dtype::kF16, arguments_of(c, o, seed.data()), nullptr);
  CHECK(double(s.bytes_read + s.bytes_written) / double(n) < 4.01);
  CHECK(s.errors.empty());
  emulation::reset();
}
