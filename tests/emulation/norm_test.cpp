#include "../../cuda/norm.cu"

#include "../cpp/catch.h"
#include "tensors.h"

using namespace halfstep;
using emulation::Array;
using emulation::Buffer;
using math::Dtype;

namespace {

struct Setting {
  int64_t rows, n;
  bool centred = true;
  Dtype x = Dtype::kF16, residual = Dtype::kF16, parameter = Dtype::kF16;
  bool has_residual = false, has_parameters = true;
  int64_t offset = 0;  ///< elements that x and y lie beyond a 16-byte boundary
};

std::unique_ptr<Array> make(Dtype dtype, int64_t count, uint64_t seed, int64_t offset = 0) {
  auto array = std::make_unique<Array>(dtype, count, offset);
  if (seed) fill_normal(*array, 1, seed);
  return array;
}

/// One forward and backward: what goes in and what comes out.
struct Run {
  Setting s;
  bool wide = s.x == Dtype::kF64;
  Dtype moment = wide ? Dtype::kF64 : Dtype::kF32;
  Dtype h_dtype = s.has_residual ? s.residual : s.x;
  int64_t count = s.rows * s.n;
  std::unique_ptr<Array> x = make(s.x, count, 1, s.offset), dy = make(s.x, count, 2, s.offset);
  std::unique_ptr<Array> residual = make(h_dtype, count, 3), dh = make(h_dtype, count, 4);
  std::unique_ptr<Array> weight = make(s.parameter, s.n, 5), bias = make(s.parameter, s.n, 6);
  std::unique_ptr<Array> y = make(s.x, count, 0, s.offset), dx = make(s.x, count, 0, s.offset);
  std::unique_ptr<Array> h = make(h_dtype, count, 0), dr = make(h_dtype, count, 0);
  std::unique_ptr<Array> mean = make(moment, s.rows, 0), rstd = make(moment, s.rows, 0);
  std::unique_ptr<Array> dweight = make(s.parameter, s.n, 0), dbias = make(s.parameter, s.n, 0);

  explicit Run(const Setting& setting) : s(setting) {}

  template <class Forward>
  Forward forward() const {
    Forward work;
    work.x = x->data();
    work.residual = s.has_residual ? residual->data() : nullptr;
    work.y = y->data();
    work.residual_out = s.has_residual ? h->data() : nullptr;
    work.mean = s.centred ? mean->data() : nullptr;
    work.rstd = rstd->data();
    work.x_dtype = s.x;
    work.residual_dtype = h_dtype;
    work.n = s.n;
    work.eps = 1e-5;
    return work;
  }
  template <class Backward>
  Backward backward() const {
    Backward work;
    work.grad_y = dy->data();
    work.grad_residual = s.has_residual ? dh->data() : nullptr;
    work.input = s.has_residual ? h->data() : x->data();
    work.mean = s.centred ? mean->data() : nullptr;
    work.rstd = rstd->data();
    work.grad_x = dx->data();
    work.grad_input = s.has_residual && s.residual != s.x ? dr->data() : nullptr;
    work.grad_dtype = s.x;
    work.input_dtype = h_dtype;
    work.n = s.n;
    return work;
  }

  void on_device() const {
    auto f = forward<cuda::NormForward>();
    auto b = backward<cuda::NormBackward>();
    f.rows = b.rows = s.rows;
    f.weight_offset = b.weight_offset = s.centred ? 0 : 1;
    f.weight_dtype = f.bias_dtype = b.weight_dtype = b.bias_dtype = s.parameter;
    if (s.has_parameters) {
      f.weight = b.weight = weight->data();
      f.bias = s.centred ? bias->data() : nullptr;
      b.grad_weight = dweight->data();
      b.grad_bias = s.centred ? dbias->data() : nullptr;
    }
    CHECK(cuda::norm_forward(f, nullptr) == cuda::kSuccess);
    Buffer<double> scratch(size_t(cuda::norm_scratch(b) / 8 + 1), NAN);
    CHECK(cuda::norm_backward(b, scratch.data(), nullptr) == cuda::kSuccess);
  }

  /// By the CPU's kernels, one block of rows.
  void on_host() const {
    const auto& k = *cpu::kKernelsDefault.norm;
    auto f = forward<cpu::NormForward>();
    auto b = backward<cpu::NormBackward>();
    const int64_t width = k.padded(s.n);
    std::vector<double> w(size_t(width), 0), c(size_t(width), 0), sums(size_t(2 * width), 0),
        scratch(size_t(2 * width), 0);
    const double offset = s.centred ? 0 : 1;
    k.parameters(s.has_parameters ? weight->data() : nullptr, s.parameter, offset, 1 + offset, s.n,
                 wide, w.data());
    k.parameters(s.has_parameters && s.centred ? bias->data() : nullptr, s.parameter, 0, -0.0, s.n,
                 wide, c.data());
    f.weight = b.weight = w.data();
    f.bias = c.data();
    k.forward(f, 0, s.rows);
    k.backward(b, 0, s.rows, sums.data(), scratch.data());
    if (!s.has_parameters) return;
    k.add_blocks(sums.data(), 1, 2 * width, 0, s.n, s.parameter, dweight->data());
    if (s.centred)
      k.add_blocks(sums.data() + width, 1, 2 * width, 0, s.n, s.parameter, dbias->data());
  }

  std::vector<const Array*> results() const {
    return {y.get(),  h.get(),  mean.get(),    rstd.get(),
            dx.get(), dr.get(), dweight.get(), dbias.get()};
  }
};

double unit(Dtype dtype) {
  return dtype == Dtype::kF16    ? 0x1p-10
         : dtype == Dtype::kBF16 ? 0x1p-7
         : dtype == Dtype::kF32  ? 0x1p-23
                                 : 0x1p-52;
}

/// Within one ULP of 16 bits, a few of FP32 and FP64, of the largest element nearby.
void compare(const Run& device, const Run& host) {
  const auto ours = device.results(), theirs = host.results();
  for (size_t r = 0; r < ours.size(); ++r) {
    const Array &a = *ours[r], &b = *theirs[r];
    double largest = 1, worst = 0;
    for (int64_t i = 0; i < a.count(); ++i) largest = std::max(largest, std::fabs(b.get(i)));
    const bool per_element = r < 4 && math::dtype_size(a.dtype()) == 2;
    for (int64_t i = 0; i < a.count(); ++i) {
      const double scale = per_element ? std::max(1.0, std::fabs(b.get(i))) : largest;
      const double error = std::fabs(a.get(i) - b.get(i)) / scale;
      worst = std::isnan(error) ? 1e9 : std::max(worst, error);
    }
    INFO("result " << r << ", " << device.s.rows << " x " << device.s.n);
    CHECK(worst <= (math::dtype_size(a.dtype()) == 2 ? 1 : 16) * unit(a.dtype()));
  }
}

void check(const Setting& setting, emulation::Orders orders = emulation::Orders::kThree) {
  const Run host(setting), device(setting);
  host.on_host();
  const auto findings = emulation::in_all_orders(
      [&] {
        device.on_device();
        std::vector<char> all;
        for (const Array* array : device.results()) emulation::append(all, array->bytes());
        return all;
      },
      orders);
  for (const auto& finding : findings) FAIL(finding);
  compare(device, host);
}

}  // namespace

TEST_CASE("norms on the device agree with the CPU's, whatever the order and the width", "[norm]") {
  check({70, 33}, emulation::Orders::kAll);
  for (const int64_t n : {1, 8, 255, 256, 257, 1000, 1025, 2049, 4097, 8192})
    check({n < 300 ? 11 : 3, n, n % 2 == 0});
}

TEST_CASE("rows beyond the registers and FP64 are read again", "[norm]") {
  check({3, 8193});
  check({9, 8200, false, Dtype::kF32, Dtype::kF32, Dtype::kF32, true});
  check({19, 40, true, Dtype::kF64, Dtype::kF64, Dtype::kF64, true});
  check({2, 2100, false, Dtype::kF64, Dtype::kF64, Dtype::kF32});
}

TEST_CASE("every dtype of x, residual and parameters, absent parameters, odd addresses", "[norm]") {
  int k = 0;
  for (const Dtype x : {Dtype::kF16, Dtype::kBF16, Dtype::kF32})
    for (const Dtype residual : {Dtype::kF16, Dtype::kBF16, Dtype::kF32}) {
      ++k;
      check({13, k % 2 ? 65 : 520, k % 3 != 0, x, residual, k % 2 ? x : Dtype::kF32, true, k != 5,
             k % 4});
    }
}

TEST_CASE("each operand of a norm is read once and written once", "[norm]") {
  // Ten rows of 256 threads a block; 64 rows are 8 units of 8.
  for (const bool residual : {false, true})
    for (const int64_t n : {1024, 8192}) {
      const Run run({64, n, true, Dtype::kF16, Dtype::kF16, Dtype::kF16, residual});
      auto f = run.forward<cuda::NormForward>();
      f.rows = 64;
      emulation::reset();
      cuda::norm_forward(f, nullptr);
      const double elements = double(64 * n), moments = 2 * 4 * 64;
      CHECK(double(emulation::state().bytes_read) == elements * (residual ? 4 : 2));
      CHECK(double(emulation::state().bytes_written) == elements * (residual ? 4 : 2) + moments);
      auto b = run.backward<cuda::NormBackward>();
      b.rows = 64;
      b.grad_weight = run.dweight->data();
      b.grad_bias = run.dbias->data();
      b.weight_dtype = b.bias_dtype = Dtype::kF16;
      Buffer<char> scratch{size_t(cuda::norm_scratch(b))};
      emulation::reset();
      cuda::norm_backward(b, scratch.data(), nullptr);
      const double partials = 8 * 2 * 4 * double(n);
      CHECK(double(emulation::state().bytes_read) <=
            elements * (residual ? 6 : 4) + partials + moments * 8);
      CHECK(double(emulation::state().bytes_read) >= elements * (residual ? 6 : 4) + partials);
      CHECK(double(emulation::state().bytes_written) ==
            elements * 2 + partials + 2 * 2 * double(n));
      CHECK(emulation::state().errors.empty());
    }
  emulation::reset();
}
