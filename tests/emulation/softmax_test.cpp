#include "../../cuda/softmax.cu"

#include "../cpp/catch.h"
#include "csrc/cpu/isa/softmax.h"
#include "tensors.h"

using namespace halfstep;
using emulation::Array;
using math::Dtype;
using math::SoftmaxRows;

namespace {

enum class Masked { kNo, kBool, kBoolPerRow, kAdded, kAddedStrided };

struct Case {
  Dtype dtype;
  int64_t rows, length;
  int64_t queries = 0;
  Masked masked = Masked::kNo;
  int64_t offset = 0;
};

/// x, its mask and an upstream gradient, in emulated memory.
struct Data {
  Array x, grad, mask;
  SoftmaxRows all;

  explicit Data(const Case& c)
      : x(c.dtype, c.rows * c.length, c.offset),
        grad(c.dtype, c.rows * c.length, c.offset),
        mask(c.masked == Masked::kAdded ? Dtype::kF16 : Dtype::kF32, 3 * c.length + 3, 1,
             c.masked == Masked::kBool || c.masked == Masked::kBoolPerRow ? 1 : 0) {
    emulation::fill_normal(x, 3, uint64_t(c.length));
    emulation::fill_normal(grad, 1, uint64_t(c.length) + 1);
    all.dtype = c.dtype;
    all.rows = c.rows;
    all.length = c.length;
    all.causal = c.queries > 0;
    all.queries = math::Divisor(c.queries);
    all.scale = 0.7;
    all.x = x.data();
    if (c.masked == Masked::kNo) return;
    const bool bools = c.masked == Masked::kBool || c.masked == Masked::kBoolPerRow;
    for (int64_t i = 0; i < mask.count(); ++i) {
      if (bools)
        static_cast<uint8_t*>(mask.data())[i] = i % 3 != 0;
      else
        mask.set(i, i % 5 == 0 ? -INFINITY : double(i % 7) / 8);
    }
    all.mask.data = mask.data();
    all.mask.is_bool = bools;
    all.mask.dtype = mask.dtype();
    const bool one = c.masked == Masked::kBoolPerRow;
    all.mask.stride = one ? 0 : c.masked == Masked::kAddedStrided ? 3 : 1;
    all.mask_rows.dims = 1;
    all.mask_rows.size[0] = math::Divisor(c.rows);
    all.mask_rows.stride[0][0] = one || c.masked == Masked::kAddedStrided ? 1 : c.length / 2;
  }
};

void run_cpu(const SoftmaxRows& all, bool backward) {
  std::vector<char> scratch(size_t(cpu::softmax_scratch(all.length)));
  for (int64_t r = 0; r < all.rows; ++r) {
    const int64_t before = r * all.length * math::dtype_size(all.dtype);
    cpu::SoftmaxRow row = {};
    row.dtype = all.dtype;
    row.length = all.length;
    row.count = math::softmax_count(all, r);
    row.scale = all.scale;
    row.x = static_cast<const char*>(all.x) + before;
    row.out = static_cast<char*>(all.out) + before;
    row.grad = static_cast<const char*>(all.grad) + (all.grad ? before : 0);
    row.scratch = scratch.data();
    row.mask = all.mask;
    if (row.mask.data) {
      const int64_t size = row.mask.is_bool ? 1 : math::dtype_size(row.mask.dtype);
      row.mask.data =
          static_cast<const char*>(row.mask.data) + r * all.mask_rows.stride[0][0] * size;
    }
    backward ? cpu::kKernelsDefault.softmax->backward(row)
             : cpu::kKernelsDefault.softmax->forward(row);
  }
}

/// The number of elements that differ by more than `ulps` of their dtype, or in being a number.
int64_t far(const Array& a, const Array& b, double ulps) {
  const double eps = a.dtype() == Dtype::kF16    ? 0x1p-10
                     : a.dtype() == Dtype::kBF16 ? 0x1p-7
                     : a.dtype() == Dtype::kF32  ? 0x1p-23
                                                 : 0x1p-52;
  const double least = a.dtype() == Dtype::kF16 ? 0x1p-24 : 0x1p-126;
  int64_t count = 0;
  for (int64_t i = 0; i < a.count(); ++i) {
    const double x = a.get(i), y = b.get(i);
    const bool same =
        std::isnan(x) ? std::isnan(y) : std::fabs(x - y) <= ulps * (eps * std::fabs(y) + least);
    count += !same;
  }
  return count;
}

void agrees_with_the_cpu(const Case& c, emulation::Orders orders = emulation::Orders::kThree) {
  Data data(c);
  Array y(c.dtype, c.rows * c.length, c.offset), dx(c.dtype, c.rows * c.length, c.offset);
  const auto problems = emulation::in_all_orders(
      [&] {
        SoftmaxRows all = data.all;
        all.out = y.data();
        cuda::softmax(all, nullptr);
        all.x = y.data();
        all.grad = data.grad.data();
        all.out = dx.data();
        all.mask = {};
        cuda::softmax_backward(all, nullptr);
        auto bytes = y.bytes();
        emulation::append(bytes, dx.bytes());
        return bytes;
      },
      orders);
  CHECK(problems.empty());
  Array y_cpu(c.dtype, c.rows * c.length), dx_cpu(c.dtype, c.rows * c.length);
  SoftmaxRows all = data.all;
  all.out = y_cpu.data();
  run_cpu(all, false);
  all.x = y.data();
  all.grad = data.grad.data();
  all.out = dx_cpu.data();
  all.mask = {};
  run_cpu(all, true);
  // The running maximum of long rows rounds once more; FP64 takes exp from the C library.
  const double ulps = c.dtype == Dtype::kF32 ? 4 : c.dtype == Dtype::kF64 ? 64 : 1;
  INFO(int(c.dtype) << " " << c.length);
  CHECK(far(y, y_cpu, ulps) == 0);
  // dy - mean may cancel, so what the sums differ by shows in units of dy and not of dx.
  for (int64_t i = 0; i < dx.count(); ++i)
    if (std::fabs(dx.get(i) - dx_cpu.get(i)) <= 1e-6 * std::fabs(y.get(i)))
      dx.set(i, dx_cpu.get(i));
  CHECK(far(dx, dx_cpu, ulps) == 0);
}

}  // namespace

TEST_CASE("softmax gives the CPU's rows in every order, at all lengths of its kernels",
          "[softmax]") {
  for (const int64_t length : {1, 7, 8, 33, 255, 256, 257, 1000, 1024, 1025, 2049})
    agrees_with_the_cpu({Dtype::kF16, 5, length, 0, Masked::kNo, length % 2});
  agrees_with_the_cpu({Dtype::kF16, 37, 64}, emulation::Orders::kAll);
  for (const int64_t length : {8192, 8193, 20'001}) agrees_with_the_cpu({Dtype::kF16, 2, length});
  for (const auto dtype : {Dtype::kBF16, Dtype::kF32, Dtype::kF64})
    for (const int64_t length : {3, 200, 777, 1500, 3000, 8300})
      agrees_with_the_cpu({dtype, 3, length});
}

TEST_CASE("masks of every kind and causal rows, too", "[softmax]") {
  for (const auto masked :
       {Masked::kBool, Masked::kBoolPerRow, Masked::kAdded, Masked::kAddedStrided})
    for (const int64_t length : {9, 300, 1100, 8500}) {
      agrees_with_the_cpu({Dtype::kF16, 4, length, 0, masked});
      agrees_with_the_cpu({Dtype::kF64, 2, length, 2, masked});
    }
  for (const int64_t length : {5, 64, 300, 2100}) {
    agrees_with_the_cpu({Dtype::kF16, 14, length, 7});
    agrees_with_the_cpu({Dtype::kF16, 6, length, 3, Masked::kBool});
  }
}

TEST_CASE("NaN, infinities and rows without any element", "[softmax]") {
  for (const int64_t length : {40, 700, 1500, 9000}) {
    Case c = {Dtype::kF16, 6, length, 0, Masked::kBoolPerRow};
    Data data(c);
    auto* bits = static_cast<uint8_t*>(data.mask.data());
    for (int64_t r = 0; r < c.rows; ++r) bits[r] = r != 0;
    data.x.set(0, NAN);           // masked with its row
    data.x.set(length + 3, NAN);  // row 1
    data.x.set(2 * length + 1, INFINITY);
    for (int64_t i = 0; i < length; ++i) data.x.set(3 * length + i, -INFINITY);
    data.x.set(4 * length + length - 1, -INFINITY);
    Array y(c.dtype, c.rows * length);
    data.all.out = y.data();
    emulation::reset();
    cuda::softmax(data.all, nullptr);
    CHECK(emulation::state().errors.empty());
    for (int64_t i = 0; i < length; ++i) {
      REQUIRE(y.get(i) == 0);
      for (const int64_t row : {1, 2, 3}) REQUIRE(std::isnan(y.get(row * length + i)));
    }
    CHECK(y.get(5 * length - 1) == 0);
    CHECK(std::isfinite(y.get(4 * length)));
    CHECK(y.get(5 * length) > 0);
  }
}

TEST_CASE("bytes moved by softmax", "[softmax]") {
  const auto moved = [](const Case& c, bool backward) {
    Data data(c);
    Array out(c.dtype, c.rows * c.length);
    data.all.out = out.data();
    if (backward) data.all.grad = data.grad.data();
    emulation::reset();
    backward ? cuda::softmax_backward(data.all, nullptr) : cuda::softmax(data.all, nullptr);
    const auto& s = emulation::state();
    return std::pair(double(s.bytes_read) / double(c.rows * c.length),
                     double(s.bytes_written) / double(c.rows * c.length));
  };
  for (const int64_t length : {256, 1024, 4096}) {
    CHECK(moved({Dtype::kF16, 4, length}, false) == std::pair(2.0, 2.0));
    CHECK(moved({Dtype::kF16, 4, length}, true) == std::pair(4.0, 2.0));
    CHECK(moved({Dtype::kF16, 4, length, 0, Masked::kBool}, false) == std::pair(3.0, 2.0));
  }
  CHECK(moved({Dtype::kF16, 2, 16'384}, false) == std::pair(4.0, 2.0));
  CHECK(moved({Dtype::kF16, 2, 16'384}, true) == std::pair(8.0, 2.0));
  CHECK(moved({Dtype::kF16, 256, 256, 256}, false) == std::pair(257.0 / 256, 2.0));
  emulation::reset();
}
