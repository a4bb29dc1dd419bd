#include "../../cuda/linear.cu"

#include "../cpp/catch.h"
#include "csrc/cpu/isa/linear.h"
#include "tensors.h"

using namespace halfstep;
using cuda::EpilogueBackward;
using cuda::EpilogueForward;
using emulation::append;
using emulation::Array;
using emulation::Orders;
using math::Dtype;
using math::LinearActivation;

namespace {

constexpr LinearActivation kAll[] = {LinearActivation::kNone, LinearActivation::kRelu,
                                     LinearActivation::kGelu, LinearActivation::kGeluTanh};

struct Shape {
  int64_t rows, columns, offset = 0;
};

Dtype compute_type(Dtype dtype) { return dtype == Dtype::kF64 ? dtype : Dtype::kF32; }
bool keeps_mask(LinearActivation a) { return a == LinearActivation::kRelu; }

/// What is kept of h: a mask, or h in `dtype`.
Array saved_array(LinearActivation activation, Dtype dtype, const Shape& s) {
  if (keeps_mask(activation)) return Array(Dtype::kF16, s.rows * math::mask_bytes(s.columns), 0, 1);
  return Array(dtype, s.rows * s.columns, s.offset);
}

cpu::Rows rows_of(const Array& array, int64_t columns) {
  return {const_cast<void*>(array.data()), columns * math::dtype_size(array.dtype()),
          array.dtype()};
}

struct Data {
  Array product, bias, dy;
  Data(Dtype dtype, Dtype product_dtype, const Shape& s)
      : product(product_dtype, s.rows * s.columns, s.offset),
        bias(dtype, s.columns, s.offset),
        dy(dtype, s.rows * s.columns, s.offset) {
    emulation::fill_normal(product, 2, 1);
    emulation::fill_normal(bias, 1, 2);
    emulation::fill_normal(dy, 1, 3);
    if (s.rows * s.columns > 3) {
      product.set(1, NAN);
      product.set(2, -INFINITY);
      product.set(3, 1e5);
    }
  }
};

std::vector<char> forward_on_device(LinearActivation activation, Dtype dtype, Dtype product_dtype,
                                    const Shape& s, bool saves) {
  Data data(dtype, product_dtype, s);
  Array y(dtype, s.rows * s.columns, s.offset), saved = saved_array(activation, dtype, s);
  EpilogueForward work;
  work.product = data.product.data();
  work.product_dtype = product_dtype;
  work.bias = data.bias.data();
  work.bias_dtype = dtype;
  work.y = y.data();
  work.y_dtype = dtype;
  work.saved = saves ? saved.data() : nullptr;
  work.rows = s.rows;
  work.columns = s.columns;
  work.activation = activation;
  CHECK(cuda::epilogue_forward(work, nullptr) == 0);
  std::vector<char> result = y.bytes();
  if (saves && activation != LinearActivation::kNone) append(result, saved.bytes());
  return result;
}

std::vector<char> forward_on_host(LinearActivation activation, Dtype dtype, Dtype product_dtype,
                                  const Shape& s, Array& saved) {
  Data data(dtype, product_dtype, s);
  Array y(dtype, s.rows * s.columns), bias(compute_type(dtype), s.columns);
  for (int64_t i = 0; i < s.columns; ++i) bias.set(i, data.bias.get(i));
  cpu::LinearForward work;
  work.product = rows_of(data.product, s.columns);
  work.y = rows_of(y, s.columns);
  work.saved = rows_of(saved, s.columns);
  if (keeps_mask(activation)) work.saved.stride = math::mask_bytes(s.columns);
  work.bias = bias.data();
  work.columns = s.columns;
  work.activation = activation;
  cpu::kKernelsDefault.linear->forward(work, 0, s.rows);
  std::vector<char> result = y.bytes();
  if (activation != LinearActivation::kNone) append(result, saved.bytes());
  return result;
}

std::vector<char> backward_on_device(LinearActivation activation, Dtype dtype, const Shape& s,
                                     const Array& saved, bool wants_dz, bool wants_sums) {
  Data data(dtype, compute_type(dtype), s);
  const int64_t blocks = (s.rows + math::kBiasRows - 1) / math::kBiasRows;
  Array dz(dtype, s.rows * s.columns, s.offset), sums(compute_type(dtype), blocks * s.columns),
      db(dtype, s.columns);
  EpilogueBackward work;
  work.dy = data.dy.data();
  work.saved = saved.data();
  work.dz = wants_dz ? dz.data() : nullptr;
  work.sums = wants_sums ? sums.data() : nullptr;
  work.rows = s.rows;
  work.columns = s.columns;
  work.dtype = dtype;
  work.activation = activation;
  CHECK(cuda::epilogue_backward(work, nullptr) == 0);
  std::vector<char> result;
  if (wants_dz) append(result, dz.bytes());
  if (wants_sums) {
    CHECK(cuda::add_rows(sums.data(), dtype == Dtype::kF64, blocks, s.columns, db.data(), dtype,
                         nullptr) == 0);
    append(result, db.bytes());
  }
  return result;
}

/// dz of the CPU kernel, and the exact sums of what it computes.
std::vector<char> dz_on_host(LinearActivation activation, Dtype dtype, const Shape& s,
                             const Array& saved) {
  Data data(dtype, compute_type(dtype), s);
  Array dz(dtype, s.rows * s.columns);
  cpu::LinearBackward work;
  work.dy = rows_of(data.dy, s.columns);
  work.saved = rows_of(saved, s.columns);
  if (keeps_mask(activation)) work.saved.stride = math::mask_bytes(s.columns);
  work.dz = rows_of(dz, s.columns);
  work.columns = s.columns;
  work.activation = activation;
  cpu::kKernelsDefault.linear->backward(work, 0, s.rows);
  return dz.bytes();
}

}  // namespace

TEST_CASE("epilogues of the device are those of the CPU, in every order", "[linear]") {
  emulation::reset();
  for (const Shape& s : {Shape{1, 1}, {3, 7}, {65, 9, 1}, {70, 264}, {2, 520, 3}, {0, 5}})
    for (const Dtype dtype : {Dtype::kF16, Dtype::kBF16, Dtype::kF32, Dtype::kF64}) {
      if (s.rows == 70 && dtype != Dtype::kF16) continue;
      for (const LinearActivation activation : kAll)
        for (const Dtype product : {compute_type(dtype), dtype}) {
          if (product == compute_type(dtype) && product == dtype && dtype == Dtype::kF16) continue;
          Array saved = saved_array(activation, dtype, s);
          const auto host = forward_on_host(activation, dtype, product, s, saved);
          std::vector<char> device;
          const auto errors = emulation::in_all_orders(
              [&] {
                device = forward_on_device(activation, dtype, product, s, true);
                return device;
              },
              Orders::kThree);
          CHECK(errors.empty());
          INFO(s.rows << " x " << s.columns << ", dtype " << int(dtype) << ", activation "
                      << int(activation));
          CHECK((device == host));
        }
    }
}

TEST_CASE("dz of the device is that of the CPU, and sums do not depend on the grid", "[linear]") {
  emulation::reset();
  for (const Shape& s : {Shape{1, 1}, {65, 9, 1}, {130, 264}, {2, 520, 3}, {0, 5}})
    for (const Dtype dtype : {Dtype::kF16, Dtype::kBF16, Dtype::kF64}) {
      if (s.rows == 130 && dtype != Dtype::kF16) continue;
      for (const LinearActivation activation : kAll) {
        Array saved = saved_array(activation, dtype, s);
        forward_on_host(activation, dtype, compute_type(dtype), s, saved);
        std::vector<char> both;
        const auto errors = emulation::in_all_orders(
            [&] {
              both = backward_on_device(activation, dtype, s, saved, true, true);
              return both;
            },
            Orders::kThree);
        CHECK(errors.empty());
        const auto host = dz_on_host(activation, dtype, s, saved);
        CHECK((std::vector<char>(both.begin(), both.begin() + int64_t(host.size())) == host));
        const auto alone = backward_on_device(activation, dtype, s, saved, false, true);
        CHECK((std::vector<char>(both.begin() + int64_t(host.size()), both.end()) == alone));
      }
    }
}

TEST_CASE("the bias gradient is the sum of the unrounded dz", "[linear]") {
  emulation::reset();
  const Shape s{150, 40};
  Array saved = saved_array(LinearActivation::kGelu, Dtype::kF16, s);
  Data data(Dtype::kF16, Dtype::kF32, s);
  for (int64_t i = 0; i < saved.count(); ++i) saved.set(i, 0.01 * double(i % 300 - 150));
  const auto bytes =
      backward_on_device(LinearActivation::kGelu, Dtype::kF16, s, saved, false, true);
  const auto* db = reinterpret_cast<const uint16_t*>(bytes.data());
  for (int64_t j = 0; j < s.columns; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < s.rows; ++i)
      sum += data.dy.get(i * s.columns + j) * math::gelu_slope(saved.get(i * s.columns + j));
    CHECK(std::fabs(math::half_to_float(db[j]) - sum) <= 0x1p-10 * std::fabs(sum) + 1e-4);
  }
}

TEST_CASE("bytes an element of the epilogues", "[linear]") {
  const Shape s{256, 1024};
  const double elements = double(s.rows * s.columns);
  const auto bytes_of = [&](const auto& body) {
    emulation::reset();
    body();
    return double(emulation::state().bytes_read + emulation::state().bytes_written) / elements;
  };
  const auto forward = [&](LinearActivation a, Dtype product) {
    return bytes_of([&] { forward_on_device(a, Dtype::kF16, product, s, true); });
  };
  const auto backward = [&](LinearActivation a, bool dz) {
    const Array saved = saved_array(a, Dtype::kF16, s);
    return bytes_of([&] { backward_on_device(a, Dtype::kF16, s, saved, dz, true); });
  };
  // The bias is read once for 64 rows by each of eight warps, the sums are written and read once.
  CHECK(std::fabs(forward(LinearActivation::kGelu, Dtype::kF32) - 8.25) <= 0.01);
  CHECK(std::fabs(forward(LinearActivation::kRelu, Dtype::kF16) - 4.375) <= 0.01);
  CHECK(std::fabs(backward(LinearActivation::kGelu, true) - 6.125) <= 0.02);
  CHECK(std::fabs(backward(LinearActivation::kRelu, true) - 4.25) <= 0.02);
  CHECK(std::fabs(backward(LinearActivation::kNone, false) - 2.125) <= 0.02);
}
