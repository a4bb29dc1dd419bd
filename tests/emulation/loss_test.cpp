#include "../../cuda/loss.cu"

#include <algorithm>
#include <cmath>

#include "../cpp/catch.h"
#include "tensors.h"

using namespace halfstep;
using emulation::Array;
using emulation::Buffer;
using math::Dtype;

namespace {

struct Problem {
  Dtype dtype;
  int64_t rows, classes, offset = 0, gap = 0;
  bool weighted = false, has_nan = false;
  double smoothing = 0, z_loss = 0;
};

/// Everything that a call reads, in emulated memory; every fourth row is ignored, the last row's
/// label is out of range.
struct Data {
  explicit Data(const Problem& p)
      : problem(p),
        stride(p.classes + p.gap),
        is_double(p.dtype == Dtype::kF64),
        logits(p.dtype, p.rows * (p.classes + p.gap), p.offset),
        weights(is_double ? Dtype::kF64 : Dtype::kF32, p.classes),
        labels(size_t(p.rows)),
        upstream(size_t(p.rows)) {
    fill_normal(logits, 3, 1);
    for (int64_t i = 0; i < p.classes; ++i) weights.set(i, 0.5 + double(i % 7) / 4);
    for (int64_t i = 0; i < p.rows; ++i) {
      labels[size_t(i)] = i % 4 == 3 ? -100 : (i * 5 + 2) % p.classes;
      upstream[size_t(i)] = float(1 + i % 3);
    }
    if (p.has_nan) logits.set(0, NAN);
  }
  math::CrossEntropy numbers() const {
    math::CrossEntropy c;
    c.classes = problem.classes;
    c.smoothing = problem.smoothing;
    c.z_loss = problem.z_loss;
    c.weight_sum = double(problem.classes);
    if (problem.weighted) c.weights = weights.data();
    return c;
  }
  cuda::LossRows call() {
    cuda::LossRows c;
    c.numbers = numbers();
    c.logits = logits.data();
    c.dtype = c.grad_dtype = problem.dtype;
    c.rows = problem.rows;
    c.stride = stride;
    c.labels = labels.data();
    c.upstream = {upstream.data(), false};
    c.per_row = true;
    return c;
  }
  Problem problem;
  int64_t stride;
  bool is_double;
  Array logits, weights;
  Buffer<int64_t> labels;
  Buffer<float> upstream;
};

/// What the kernels write.
struct Results {
  explicit Results(const Data& d)
      : stats(d.is_double ? Dtype::kF64 : Dtype::kF32, 2 * d.problem.rows),
        losses(size_t(d.problem.rows), 0.0),
        sums(2, 0.0),
        grad(d.problem.dtype, d.problem.rows * d.problem.classes, d.problem.offset) {}
  Array stats;
  Buffer<double> losses, sums;
  Array grad;
};

void run(Data& d, Results& r, bool forms, bool backward) {
  cuda::LossRows call = d.call();
  cuda::loss_sums(call, r.sums.data(), nullptr);
  call.sums = r.sums.data();
  call.stats = r.stats.data();
  call.losses = r.losses.data();
  if (forms) call.grad = r.grad.data();
  cuda::loss_forward(call, nullptr);
  if (!backward) return;
  call.grad = r.grad.data();
  cuda::loss_backward(call, nullptr);
}

/// The distance of two values in steps of the dtype; 0 for two NaN.
double steps(double a, double b, Dtype dtype) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) == std::isnan(b) ? 0 : 1e9;
  const int digits = dtype == Dtype::kF16    ? 11
                     : dtype == Dtype::kBF16 ? 8
                     : dtype == Dtype::kF32  ? 24
                                             : 53;
  const int lowest = dtype == Dtype::kF16 ? -24 : dtype == Dtype::kF64 ? -1074 : -149;
  const double magnitude = std::max(std::fabs(a), std::fabs(b));
  if (magnitude == 0) return 0;
  return std::fabs(a - b) / std::ldexp(1.0, std::max(std::ilogb(magnitude) - digits + 1, lowest));
}

/// Against the CPU kernels: FP64 losses to FP32's precision, gradients to the last places.
void compare(const Data& d, const Results& r, bool has_grad) {
  const cpu::LossKernels& k = *cpu::kKernelsDefault.loss;
  math::CrossEntropy c = d.numbers();
  if (c.weights) {
    c.weight_sum = 0;
    for (int64_t i = 0; i < c.classes; ++i) c.weight_sum += d.weights.get(i);
  }
  const int64_t size = math::dtype_size(d.problem.dtype);
  Array expected(d.problem.dtype, c.classes);
  double worst = 0, worst_loss = 0;
  for (int64_t i = 0; i < d.problem.rows; ++i) {
    const auto* row = static_cast<const char*>(d.logits.data()) + i * d.stride * size;
    math::RowStats stats;
    const double loss = k.loss(c, row, d.problem.dtype, d.labels[size_t(i)], stats);
    const double got = r.losses[size_t(i)];
    worst_loss =
        std::max(worst_loss, std::isnan(loss) || std::isnan(got)
                                 ? (std::isnan(loss) == std::isnan(got) ? 0 : 1e9)
                                 : std::fabs(got - loss) / std::max(std::fabs(loss), 1e-3));
    if (!has_grad) continue;
    k.gradient(c, row, d.problem.dtype, d.labels[size_t(i)], stats, d.upstream[size_t(i)],
               expected.data());
    for (int64_t j = 0; j < c.classes; ++j)
      worst =
          std::max(worst, steps(r.grad.get(i * c.classes + j), expected.get(j), d.problem.dtype));
  }
  const bool is_sixteen = size == 2;
  // With smoothing an FP32 gradient is a small difference; 64 steps of it are 2^-18.
  CHECK(worst <= (is_sixteen ? 1 : 64));
  CHECK(worst_loss <= (d.is_double ? 1e-13 : 1e-6));
}

const std::vector<Problem> kProblems = {
    {Dtype::kF16, 9, 33},
    {Dtype::kF16, 5, 1000, 1, 3, true, false, 0.1, 1e-3},
    {Dtype::kBF16, 4, 257, 3, 0, false, false, 0.1},
    {Dtype::kF32, 5, 129, 0, 1, true},
    {Dtype::kF64, 3, 65, 0, 0, true, false, 0.2, 1e-2},
    {Dtype::kF16, 4, 1},
    {Dtype::kF16, 3, 40, 0, 0, false, true},
    {Dtype::kF16, 2, 20'483},  // does not fit shared memory
};

}  // namespace

TEST_CASE("cross entropy agrees with the CPU kernels, formed in the forward or the backward",
          "[loss]") {
  for (const Problem& p : kProblems) {
    Data d(p);
    for (const bool forms : {false, true}) {
      CAPTURE(int(p.dtype), p.classes, forms);
      const auto reports = emulation::in_all_orders(
          [&] {
            Results r(d);
            run(d, r, forms, !forms);
            std::vector<char> bytes = r.stats.bytes();
            emulation::append(bytes, r.losses.bytes());
            emulation::append(bytes, r.grad.bytes());
            return bytes;
          },
          emulation::Orders::kThree);
      CHECK(reports.empty());
      Results r(d);
      run(d, r, forms, !forms);
      compare(d, r, true);
      double total = 0;
      for (size_t i = 0; i < size_t(p.rows); ++i)
        if (d.labels[i] >= 0) total += p.weighted ? d.weights.get(d.labels[i]) : 1;
      CHECK(std::fabs(r.sums[0] - total) <= 1e-9 * total);
    }
  }
  emulation::reset();
}

TEST_CASE("a label that is no class makes its row NaN and is never an address", "[loss]") {
  for (const int64_t bad : {int64_t(33), int64_t(-1), int64_t(1) << 62}) {
    emulation::reset();
    Data d({Dtype::kF16, 3, 33, 0, 0, true});
    d.labels[1] = bad;
    Results r(d);
    run(d, r, true, true);
    CHECK(emulation::state().errors.empty());
    CHECK(std::isnan(r.losses[1]));
    CHECK(std::isfinite(r.losses[0]));
    CHECK(std::isfinite(r.losses[2]));
    for (int64_t j = 0; j < 33; ++j) {
      CHECK(std::isnan(r.grad.get(33 + j)));
      CHECK(std::isfinite(r.grad.get(j)));
    }
  }
  emulation::reset();
}

TEST_CASE("a logit is read once and its gradient written once where the row fits shared memory",
          "[loss]") {
  const auto moved = [](int64_t classes, bool forms) {
    Data d({Dtype::kF16, 3, classes});
    d.labels[2] = 5;
    Results r(d);
    emulation::reset();
    run(d, r, forms, false);
    const double logits = double(3 * classes);
    return std::pair(double(emulation::state().bytes_read) / logits,
                     double(emulation::state().bytes_written) / logits);
  };
  const auto [read, written] = moved(4096, true);
  CHECK(read < 2.05);
  CHECK(written < 2.05);
  const auto [loss_read, loss_written] = moved(4096, false);
  CHECK(loss_read < 2.05);
  CHECK(loss_written < 0.05);
  const auto [long_read, long_written] = moved(24'576, true);
  CHECK(long_read < 4.05);
  CHECK(long_read > 3.9);
  CHECK(long_written < 2.05);
  emulation::reset();
}

TEST_CASE("the sum of the losses and a gradient's new scale", "[loss]") {
  Buffer<double> losses(std::vector<double>(1000, 0.5)), sums(std::vector<double>{250, 0});
  Buffer<float> out(1, 0.0f);
  cuda::loss_total(losses.data(), 1000, sums.data(), true, out.data(), false, nullptr);
  CHECK(out[0] == 2);
  cuda::loss_total(losses.data(), 1000, sums.data(), false, out.data(), false, nullptr);
  CHECK(out[0] == 500);
  Buffer<float> arrives(std::vector<float>{8, 16, 8}), scale(1, 8.0f);
  Array grad(Dtype::kF16, 3 * 100), copy(Dtype::kF32, 3 * 100);
  fill_normal(grad, 1, 4);
  const std::vector<char> before = grad.bytes();
  cuda::Rescale call;
  call.grad = call.out = grad.data();
  call.dtype = call.out_dtype = Dtype::kF16;
  call.rows = 3;
  call.length = 100;
  call.factor = {arrives.data(), false};
  call.divisor = {scale.data(), false};
  emulation::reset();
  cuda::rescale_rows(call, nullptr);  // factor 1: the first element serves all rows
  CHECK(emulation::state().bytes_written == 0);
  CHECK((grad.bytes() == before));
  call.per_row = true;
  call.out = copy.data();
  call.out_dtype = Dtype::kF32;
  cuda::rescale_rows(call, nullptr);
  for (int64_t i = 0; i < 300; ++i) CHECK(copy.get(i) == grad.get(i) * (i / 100 == 1 ? 2 : 1));
  CHECK(emulation::state().errors.empty());
  emulation::reset();
}
