#include "../../cuda/grads.cu"

#include "../cpp/catch.h"
#include "tensors.h"

using namespace halfstep;
using emulation::Array;
using emulation::Buffer;
using math::Dtype;

namespace {

const Dtype kDtypes[] = {Dtype::kF16, Dtype::kBF16, Dtype::kF32, Dtype::kF64};

/// Many kinds of values: zeros of both signs, subnormals, large ones, and non-finite ones on
/// request.
std::unique_ptr<Array> make_grad(Dtype dtype, int64_t count, uint64_t seed, bool bad,
                                 int64_t offset = 0) {
  auto grad = std::make_unique<Array>(dtype, count, offset);
  fill_normal(*grad, 1e-3, seed);
  for (int64_t i = 0; i < count; i += 7) grad->set(i, i % 2 ? 0.0 : -0.0);
  for (int64_t i = 3; i < count; i += 11) grad->set(i, 3e-7 * double(i % 5 + 1));
  for (int64_t i = 5; i < count; i += 501) grad->set(i, -60000);
  if (bad && count > 0) {
    grad->set(count - 1, seed % 2 ? NAN : -INFINITY);
    grad->set(count / 2, INFINITY);
  }
  return grad;
}

struct Expected {
  double nonfinite = 0, sum = 0, amax = 0, zeros = 0, subnormals = 0;
  void add(double x) {
    const double magnitude = std::fabs(x);
    nonfinite += !std::isfinite(x);
    sum += x * x;
    amax = std::isnan(amax) || std::isnan(magnitude) ? NAN : std::max(amax, magnitude);
    zeros += x == 0;
    subnormals += magnitude > 0 && magnitude < 0x1p-14;
  }
};

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }
bool close(double a, double b) {
  return same(a, b) || std::fabs(a - b) <= 1e-6 * std::fabs(b);  // FP32 for 64 terms
}

}  // namespace

TEST_CASE("grad_stats on the device equals a plain count, whatever the order", "[grads]") {
  std::vector<std::unique_ptr<Array>> grads;
  emulation::Rows rows;
  uint64_t seed = 1;
  for (const Dtype dtype : kDtypes)
    for (const int64_t count :
         {int64_t(0), int64_t(1), int64_t(9), int64_t(4097), cuda::kChunk, 2 * cuda::kChunk + 13}) {
      ++seed;
      grads.push_back(make_grad(dtype, count, seed, seed % 5 == 0, int64_t(seed % 3)));
      math::StepTensor tensor;
      tensor.grad = grads.back()->data();
      tensor.grad_dtype = dtype;
      rows.add(tensor, count);
    }
  const cuda::Table table = rows.table();
  const auto n = int64_t(grads.size());
  std::vector<double> result;
  const auto findings = emulation::in_all_orders([&] {
    Buffer<math::BlockStats> partials{size_t(table.chunks)};
    Buffer<double> out(size_t((n + 1) * math::kStatColumns), -7.0);
    CHECK(cuda::grad_stats(table, partials.data(), out.data(), n, nullptr, nullptr) ==
          cuda::kSuccess);
    result.assign(out.data(), out.data() + out.size());
    return out.bytes();
  });
  for (const auto& finding : findings) FAIL(finding);

  Expected all;
  double first_bad = -1, elements = 0;
  for (int64_t i = 0; i < n; ++i) {
    Expected one;
    for (int64_t k = 0; k < grads[size_t(i)]->count(); ++k) {
      one.add(grads[size_t(i)]->get(k));
      all.add(grads[size_t(i)]->get(k));
    }
    const double* row = &result[size_t(i * math::kStatColumns)];
    INFO("gradient " << i);
    CHECK(row[math::kStatNonfinite] == one.nonfinite);
    CHECK(close(row[math::kStatSumSquares], one.sum));
    CHECK(same(row[math::kStatAmax], one.amax));
    CHECK(row[math::kStatZeros] == one.zeros);
    CHECK(row[math::kStatSubnormals] == one.subnormals);
    CHECK(row[math::kStatCount] == double(grads[size_t(i)]->count()));
    CHECK(row[math::kStatFoundInf] == (one.nonfinite > 0));
    elements += row[math::kStatCount];
    if (one.nonfinite > 0 && first_bad < 0) first_bad = double(i);
  }
  const double* totals = &result[size_t(n * math::kStatColumns)];
  CHECK(totals[math::kStatNonfinite] == all.nonfinite);
  CHECK(same(totals[math::kStatAmax], all.amax));
  CHECK(totals[math::kStatZeros] == all.zeros);
  CHECK(totals[math::kStatSubnormals] == all.subnormals);
  CHECK(totals[math::kStatCount] == elements);
  CHECK(totals[math::kStatFirstBad] == first_bad);
  CHECK(first_bad > 0);
}

TEST_CASE("grad_stats reads 2 bytes an FP16 gradient and leaves absent rows zero", "[grads]") {
  const int64_t count = 20 * cuda::kChunk;
  const auto grad = make_grad(Dtype::kF16, count, 1, false);
  math::StepTensor tensor;
  tensor.grad = grad->data();
  tensor.grad_dtype = Dtype::kF16;
  emulation::Rows rows;
  rows.add(tensor, count);
  const cuda::Table table = rows.table();
  Buffer<math::BlockStats> partials{size_t(table.chunks)};
  Buffer<double> out(3 * math::kStatColumns, -7.0);
  emulation::reset();
  cuda::grad_stats(table, partials.data(), out.data(), 2, nullptr, nullptr);
  const double per_element = double(emulation::state().bytes_read) / double(count);
  INFO(per_element << " bytes read an element");
  CHECK(per_element >= 2.0);
  CHECK(per_element <= 2.02);
  CHECK(double(emulation::state().bytes_written) / double(count) <= 0.01);
  for (int k = 0; k < math::kStatColumns; ++k) CHECK(out[size_t(math::kStatColumns + k)] == 0);
}

TEST_CASE("rows that are known already give the bits of reading them all", "[grads]") {
  std::vector<std::unique_ptr<Array>> grads;
  emulation::Rows all;
  std::vector<math::StepTensor> tensors;
  std::vector<int64_t> numels;
  for (int64_t i = 0; i < 260; ++i) {  // more rows than threads add at a time
    numels.push_back(i == 7 ? 0 : i == 8 ? cuda::kChunk + 5 : 3 + i % 11);
    grads.push_back(make_grad(kDtypes[i % 4], numels.back(), uint64_t(i), i == 40 || i == 171));
    math::StepTensor tensor;
    tensor.grad = grads.back()->data();
    tensor.grad_dtype = kDtypes[i % 4];
    tensors.push_back(tensor);
    all.add(tensor, numels.back());
  }
  const auto n = int64_t(grads.size());
  const size_t cells = size_t((n + 1) * math::kStatColumns);
  Buffer<double> expected(cells, -7.0), known(cells - size_t(math::kStatColumns), -7.0);
  {
    const cuda::Table table = all.table();
    Buffer<math::BlockStats> partials{size_t(table.chunks)};
    cuda::grad_stats(table, partials.data(), expected.data(), n, nullptr, nullptr);
    cuda::grad_stats_rows(table, partials.data(), known.data(), nullptr);
  }
  CHECK(std::memcmp(known.data(), expected.data(), known.bytes().size()) == 0);
  for (const int64_t every : {3, 1000}) {  // some, and all but the first are known
    emulation::Rows rows;
    for (int64_t i = 0; i < n; ++i)
      rows.add(tensors[size_t(i)], i % every == 0 ? numels[size_t(i)] : cuda::kKnown);
    const cuda::Table table = rows.table();
    const auto findings = emulation::in_all_orders(
        [&] {
          Buffer<math::BlockStats> partials{size_t(table.chunks)};
          Buffer<double> out(cells, -7.0);
          CHECK(cuda::grad_stats(table, partials.data(), out.data(), n, known.data(), nullptr) ==
                cuda::kSuccess);
          CHECK(out.bytes() == expected.bytes());
          return out.bytes();
        },
        emulation::Orders::kThree);  // of the kernel itself all orders are tested above
    for (const auto& finding : findings) FAIL(finding);
  }
}

TEST_CASE("grad_histogram is bit-equal to the CPU kernel, whatever the order", "[grads]") {
  std::vector<std::unique_ptr<Array>> grads;
  emulation::Rows rows;
  uint64_t seed = 1;
  for (const Dtype dtype : kDtypes)
    for (const int64_t count :
         {int64_t(0), int64_t(1), int64_t(9), int64_t(4097), 5 * cuda::kChunk + 13}) {
      ++seed;
      grads.push_back(make_grad(dtype, count, seed, seed % 3 == 0, int64_t(seed % 3)));
      math::StepTensor tensor;
      tensor.grad = grads.back()->data();
      tensor.grad_dtype = dtype;
      rows.add(tensor, count);
    }
  const cuda::Table table = rows.table();
  const auto n = int64_t(grads.size());
  for (const float scale : {1.0f, 1024.0f, 0x1p-30f, 3.7f}) {
    Buffer<float> factor(1, scale);
    std::vector<double> expected;
    for (const auto& grad : grads) {
      math::Histogram sum;
      cpu::kKernelsDefault.grad_histogram(grad->data(), grad->dtype(), double(scale), grad->count(),
                                          sum);
      for (const int64_t count : sum.counts) expected.push_back(double(count));
      double* row = &expected[expected.size() - math::kHistColumns];
      row[math::kHistCount] = double(grad->count());
      row[math::kHistAmax] = sum.amax / double(scale);
    }
    expected.resize(size_t((n + 1) * math::kHistColumns));  // one gradient is missing
    const auto findings = emulation::in_all_orders([&] {
      Buffer<int64_t> partials{size_t(table.chunks * math::kHistColumns)};
      Buffer<double> out(expected.size(), -7.0);
      CHECK(cuda::grad_histogram(table, {factor.data(), false}, partials.data(), out.data(), n + 1,
                                 nullptr) == cuda::kSuccess);
      CHECK(std::memcmp(out.data(), expected.data(), out.bytes().size()) == 0);
      return out.bytes();
    });
    for (const auto& finding : findings) FAIL(finding);
  }
}

TEST_CASE("grad_histogram reads 2 bytes an FP16 gradient", "[grads]") {
  const int64_t count = 8 * cuda::kChunk;
  const auto grad = make_grad(Dtype::kF16, count, 1, false);
  math::StepTensor tensor;
  tensor.grad = grad->data();
  tensor.grad_dtype = Dtype::kF16;
  emulation::Rows rows;
  rows.add(tensor, count);
  const cuda::Table table = rows.table();
  Buffer<int64_t> partials{size_t(table.chunks * math::kHistColumns)};
  Buffer<double> out(size_t(math::kHistColumns), -7.0);
  emulation::reset();
  cuda::grad_histogram(table, {}, partials.data(), out.data(), 1, nullptr);
  const double read = double(emulation::state().bytes_read) / double(count);
  INFO(read << " bytes read an element");
  CHECK(read >= 2.0);
  CHECK(read <= 2.05);
  CHECK(double(emulation::state().bytes_written) / double(count) <= 0.04);
}

TEST_CASE("unscale is bit-equal to the CPU kernel for every pair of dtypes", "[grads]") {
  for (const Dtype in : kDtypes)
    for (const Dtype out : kDtypes)
      for (const int64_t count : {int64_t(1), int64_t(1031), cuda::kChunk + 3})
        for (const bool bad : {false, true}) {
          const auto grad = make_grad(in, count, 4, bad, count % 3);
          Array expected(out, count);
          Buffer<float> inv_scale(1, 0x1p-10f);
          // In the range of the smallest dtype, or the store itself may overflow.
          const bool flag = halfstep::cpu::kKernelsDefault.unscale(
              grad->data(), in, expected.data(), out, 0x1p-10f, count);
          const auto findings = emulation::in_all_orders([&] {
            Array result(out, count, count % 2);
            Buffer<float> found_inf(1, 0.0f);
            math::StepTensor tensor;
            tensor.grad = grad->data();
            tensor.grad_dtype = in;
            tensor.param = result.data();
            tensor.param_dtype = out;
            emulation::Rows rows;
            rows.add(tensor, count);
            cuda::unscale(rows.table(), inv_scale.data(), found_inf.data(), nullptr);
            CHECK(found_inf[0] == float(flag));
            CHECK(result.bytes() == expected.bytes());
            return result.bytes();
          });
          for (const auto& finding : findings) FAIL(finding);
        }
}

TEST_CASE("step_control adds any number of groups and folds scale and clip", "[grads]") {
  for (const int groups : {0, 1, 64, 65, 150}) {
    Buffer<double> rows(size_t(std::max(groups, 1) * math::kStatColumns), 0.0), control(4, -1.0);
    std::vector<const double*> totals;
    double sum = 0;
    for (int i = 0; i < groups; ++i) {
      rows[size_t(i * math::kStatColumns + math::kStatSumSquares)] = i + 1;
      totals.push_back(rows.data() + i * math::kStatColumns);
      sum += i + 1;
    }
    Buffer<float> scale(1, 4.0f), found(1, 0.0f);
    Buffer<double> clip(1, 0.5);
    emulation::reset();
    cuda::step_control(totals.data(), groups, {scale.data(), false}, {found.data(), false},
                       {clip.data(), true}, 2.0, control.data(), nullptr);
    double expected[4];
    math::write_control(expected, sum, false, 4, 2.0, 0.5);
    CHECK(std::memcmp(expected, control.data(), sizeof(expected)) == 0);
    if (groups > 0) {
      rows[size_t((groups - 1) * math::kStatColumns + math::kStatFoundInf)] = 1;
      cuda::step_control(totals.data(), groups, {}, {}, {}, -1, control.data(), nullptr);
      CHECK(control[math::kControlFoundInf] == 1);
    }
    found[0] = NAN;
    cuda::step_control(totals.data(), 0, {}, {found.data(), false}, {}, -1, control.data(),
                       nullptr);
    CHECK(control[math::kControlFoundInf] == 1);
    CHECK(emulation::state().errors.empty());
  }
}
