#include "../../cuda/optim.cu"

#include "../cpp/catch.h"
#include "tensors.h"

using namespace halfstep;
using emulation::Array;
using emulation::Buffer;
using math::Dtype;
using math::MasterKind;

namespace {

struct Kind {
  Dtype param;
  MasterKind master;
};
const Kind kKinds[] = {{Dtype::kF16, MasterKind::kSplit16},  {Dtype::kF16, MasterKind::kNone},
                       {Dtype::kF16, MasterKind::kF32},      {Dtype::kF16, MasterKind::kF64},
                       {Dtype::kBF16, MasterKind::kSplit16}, {Dtype::kBF16, MasterKind::kNone},
                       {Dtype::kBF16, MasterKind::kF32},     {Dtype::kBF16, MasterKind::kF64},
                       {Dtype::kF32, MasterKind::kNone},     {Dtype::kF32, MasterKind::kF64},
                       {Dtype::kF64, MasterKind::kNone}};

bool is_wide(const Kind& kind) {
  return kind.param == Dtype::kF64 || kind.master == MasterKind::kF64;
}
Dtype compute_dtype(const Kind& kind) { return is_wide(kind) ? Dtype::kF64 : Dtype::kF32; }
Dtype master_dtype(const Kind& kind) {
  switch (kind.master) {
    case MasterKind::kSplit16:
      return Dtype::kF16;  // two bytes an element
    case MasterKind::kF64:
      return Dtype::kF64;
    default:
      return Dtype::kF32;
  }
}

/// A parameter with all that a step needs, and a way to copy it.
struct Param {
  Kind kind;
  int64_t count;
  Dtype grad_dtype;
  Array param, master, grad, m, v, v_max;

  Param(Kind k, int64_t n, Dtype g, int64_t offset)
      : kind(k),
        count(n),
        grad_dtype(g),
        param(k.param, n, offset),
        master(master_dtype(k), k.master == MasterKind::kNone ? 0 : n, offset),
        grad(g, n, offset),
        m(compute_dtype(k), n, offset),
        v(compute_dtype(k), n, offset),
        v_max(compute_dtype(k), n, offset) {}

  math::StepTensor tensor() {
    math::StepTensor t;
    t.param = param.data();
    t.master = kind.master == MasterKind::kNone ? nullptr : master.data();
    t.grad = grad.data();
    t.state1 = m.data();
    t.state2 = v.data();
    t.state3 = v_max.data();
    t.param_dtype = kind.param;
    t.master_kind = kind.master;
    t.grad_dtype = grad_dtype;
    return t;
  }
  void assign(const Param& other) {
    param.assign(other.param);
    master.assign(other.master);
    grad.assign(other.grad);
    m.assign(other.m);
    v.assign(other.v);
    v_max.assign(other.v_max);
  }
  std::vector<char> bytes() const {
    std::vector<char> all;
    for (const Array* array : {&param, &master, &grad, &m, &v, &v_max})
      emulation::append(all, array->bytes());
    return all;
  }
};

/// Weights around and beyond what the dtypes hold; states of a run under way.
std::vector<std::unique_ptr<Param>> make_params(uint64_t seed) {
  std::vector<std::unique_ptr<Param>> params;
  const Dtype grads[] = {Dtype::kF16, Dtype::kBF16, Dtype::kF32, Dtype::kF64};
  for (const Kind& kind : kKinds)
    for (const int64_t count : {int64_t(0), int64_t(5), int64_t(2051)}) {
      const int64_t offset = int64_t(params.size() % 3);
      params.push_back(std::make_unique<Param>(kind, count, grads[params.size() % 4], offset));
      Param& p = *params.back();
      Array values(compute_dtype(kind), count);
      fill_normal(values, 0.02, ++seed);
      for (int64_t i = 0; i < count; i += 97) values.set(i, i % 2 ? 65500.0 : -65500.0);
      for (int64_t i = 1; i < count; i += 89) values.set(i, 1e-6 * double(i % 7));
      cpu::kKernelsDefault.write_masters(p.tensor(), values.data(), 0, count);
      fill_normal(p.grad, 3, ++seed);
      fill_normal(p.m, 1, ++seed);
      fill_normal(p.v, 1, ++seed);
      fill_normal(p.v_max, 1, ++seed);
      for (int64_t i = 0; i < count; ++i) {
        p.v.set(i, p.v.get(i) * p.v.get(i));
        p.v_max.set(i, p.v_max.get(i) * p.v_max.get(i));
        if (i % 97 == 0) p.grad.set(i, i % 2 ? -60000 : 60000);  // pushes outwards
        if (i % 97 == 0) p.m.set(i, p.grad.get(i));
      }
    }
  return params;
}

std::vector<std::unique_ptr<Param>> copies(const std::vector<std::unique_ptr<Param>>& params) {
  std::vector<std::unique_ptr<Param>> out;
  for (const auto& p : params) {
    out.push_back(
        std::make_unique<Param>(p->kind, p->count, p->grad_dtype, int64_t(out.size() % 3)));
    out.back()->assign(*p);
  }
  return out;
}

std::vector<char> all_bytes(const std::vector<std::unique_ptr<Param>>& params) {
  std::vector<char> bytes;
  for (const auto& p : params) emulation::append(bytes, p->bytes());
  return bytes;
}

emulation::Rows rows_of(const std::vector<std::unique_ptr<Param>>& params) {
  emulation::Rows rows;
  for (const auto& p : params) rows.add(p->tensor(), p->count);
  return rows;
}

struct Counters {
  Buffer<int64_t> steps, overflowed;
  Buffer<double> lr{1, 0.3}, control{4, 0.0};
  explicit Counters(size_t n) : steps(n, 2), overflowed(n, 0) {
    control[math::kControlMultiplier] = 0x1p-6;
  }
  cuda::StepState state() { return {steps.data(), overflowed.data(), lr.data(), control.data()}; }
};

/// The device against the CPU kernel, one step over every dtype, master and alignment at once.
/// `outwards`: the data push weights beyond FP16, where they must be kept.
template <class Device, class Host>
void compare(bool outwards, const Device& device, const Host& host) {
  const auto start = make_params(5);
  const auto expected = copies(start);
  std::vector<int64_t> kept;
  for (const auto& p : expected) kept.push_back(host(*p));
  const std::vector<char> expected_bytes = all_bytes(expected);
  int64_t total = 0;
  for (const int64_t k : kept) total += k;
  if (outwards) CHECK(total > 10);
  const auto findings = emulation::in_all_orders([&] {
    const auto params = copies(start);
    Counters counters(params.size());
    device(rows_of(params), counters);
    for (size_t i = 0; i < params.size(); ++i) {
      INFO("parameter " << i << ", " << params[i]->count << " elements");
      CHECK(params[i]->bytes() == expected[i]->bytes());
      CHECK(counters.overflowed[i] == kept[i]);
      CHECK(counters.steps[i] == 3);
    }
    return all_bytes(params);
  });
  for (const auto& finding : findings) FAIL(finding);
}

}  // namespace

TEST_CASE("adam on the device is bit-equal to the CPU kernel", "[optim]") {
  for (const bool decoupled : {false, true})
    for (const bool amsgrad : {false, true}) {
      const cuda::AdamNumbers n = {0.9, 0.999, 1e-8, 1e-3, decoupled, amsgrad, amsgrad};
      compare(
          !n.maximize,
          [&](emulation::Rows rows, Counters& counters) {
            const cuda::Table table = rows.table();
            Buffer<math::AdamStep> constants(size_t(table.count), math::AdamStep());
            CHECK(cuda::adam_step(table, n, counters.state(), constants.data(), nullptr) == 0);
          },
          [&](Param& p) {
            const auto c = math::adam_step_constants(decoupled, amsgrad, n.maximize, 0.3, n.beta1,
                                                     n.beta2, n.eps, n.weight_decay, 0x1p-6, 3);
            return cpu::kKernelsDefault.adam(p.tensor(), c, 0, p.count);
          });
    }
}

TEST_CASE("sgd on the device is bit-equal to the CPU kernel", "[optim]") {
  for (const double momentum : {0.0, 0.9})
    for (const bool nesterov : {false, true}) {
      const cuda::SgdNumbers n = {momentum, 0.1, 1e-3, nesterov, nesterov};
      compare(
          !n.maximize,
          [&](emulation::Rows rows, Counters& counters) {
            const cuda::Table table = rows.table();
            Buffer<math::SgdStep> constants(size_t(table.count), math::SgdStep());
            CHECK(cuda::sgd_step(table, n, counters.state(), constants.data(), nullptr) == 0);
          },
          [&](Param& p) {
            const auto c = math::sgd_step_constants(n.maximize, 0.3, n.momentum, n.dampening,
                                                    n.weight_decay, n.nesterov, 0x1p-6, 3);
            return cpu::kKernelsDefault.sgd(p.tensor(), c, 0, p.count);
          });
    }
}

TEST_CASE("a skipped step writes nothing, whatever the flag is", "[optim]") {
  for (const double flag : {1.0, 2.0, double(NAN)}) {
    const auto params = make_params(7);
    const std::vector<char> before = all_bytes(params);
    Counters counters(params.size());
    counters.control[math::kControlFoundInf] = flag;
    emulation::Rows rows = rows_of(params);
    const cuda::Table table = rows.table();
    Buffer<math::AdamStep> adam(size_t(table.count), math::AdamStep());
    Buffer<math::SgdStep> sgd(size_t(table.count), math::SgdStep());
    emulation::reset();
    cuda::adam_step(table, {0.9, 0.999, 1e-8, 0.1, true, true, false}, counters.state(),
                    adam.data(), nullptr);
    cuda::sgd_step(table, {0.9, 0, 0.1, true, false}, counters.state(), sgd.data(), nullptr);
    CHECK(all_bytes(params) == before);
    CHECK(emulation::state().bytes_written == 0);
    CHECK(emulation::state().errors.empty());
    for (size_t i = 0; i < params.size(); ++i) {
      CHECK(counters.steps[i] == 2);
      CHECK(counters.overflowed[i] == 0);
    }
  }
}

TEST_CASE("masters are written, read and refreshed as on the CPU", "[optim]") {
  const auto start = make_params(9);
  for (const auto& p : start)  // values to write; some do not fit 16 bits
    for (int64_t i = 0; i < p->count; ++i) p->m.set(i, i % 31 == 0 ? 3.4e38 : p->m.get(i) * 0.1);
  const auto expected = copies(start);
  std::vector<int64_t> left, changed;
  for (const auto& p : expected)
    left.push_back(cpu::kKernelsDefault.write_masters(p->tensor(), p->m.data(), 0, p->count));
  for (const auto& p : expected) {
    for (int64_t i = 0; i < p->count; i += 5) p->param.set(i, double(i) - 3.0);  // edits
    changed.push_back(cpu::kKernelsDefault.refresh_masters(p->tensor(), false, 0, p->count));
    math::StepTensor tensor = p->tensor();
    cpu::kKernelsDefault.read_masters(tensor, p->v.data(), 0, p->count);
  }
  const auto findings = emulation::in_all_orders([&] {
    const auto params = copies(start);
    Buffer<int64_t> counts(params.size(), 0);
    emulation::Rows rows = rows_of(params);
    const cuda::Table table = rows.table();
    CHECK(cuda::write_masters(table, counts.data(), nullptr) == 0);
    for (size_t i = 0; i < params.size(); ++i) {
      CHECK(counts[i] == left[i]);
      counts[i] = 0;
      for (int64_t k = 0; k < params[i]->count; k += 5) params[i]->param.set(k, double(k) - 3.0);
    }
    CHECK(cuda::refresh_masters(table, true, counts.data(), nullptr) == 0);
    for (size_t i = 0; i < params.size(); ++i) {
      CHECK(counts[i] == changed[i]);
      counts[i] = 0;
    }
    CHECK(cuda::refresh_masters(table, false, counts.data(), nullptr) == 0);
    emulation::Rows values;
    for (const auto& p : params) {
      math::StepTensor tensor = p->tensor();
      tensor.state1 = p->v.data();
      values.add(tensor, p->count);
    }
    CHECK(cuda::read_masters(values.table(), nullptr) == 0);
    CHECK(all_bytes(params) == all_bytes(expected));
    return all_bytes(params);
  });
  for (const auto& finding : findings) FAIL(finding);
}

TEST_CASE("an Adam step moves 26 bytes an FP16 parameter with split16", "[optim]") {
  const int64_t count = 8 * cuda::kChunk;
  Param p({Dtype::kF16, MasterKind::kSplit16}, count, Dtype::kF16, 0);
  emulation::Rows rows;
  rows.add(p.tensor(), count);
  const cuda::Table table = rows.table();
  Counters counters(1);
  Buffer<math::AdamStep> constants(1, math::AdamStep());
  emulation::reset();
  cuda::adam_step(table, {0.9, 0.999, 1e-8, 0.1, true, false, false}, counters.state(),
                  constants.data(), nullptr);
  const double read = double(emulation::state().bytes_read) / double(count);
  const double written = double(emulation::state().bytes_written) / double(count);
  INFO(read << " bytes read, " << written << " written");
  CHECK(read >= 14.0);
  CHECK(read <= 14.02);
  CHECK(written >= 12.0);
  CHECK(written <= 12.01);
}

TEST_CASE("a parameter may be its own gradient", "[optim]") {
  Param p({Dtype::kF32, MasterKind::kNone}, 100, Dtype::kF32, 0), q(p.kind, 100, Dtype::kF32, 0);
  fill_normal(p.param, 1, 3);
  q.assign(p);
  const auto c = math::sgd_step_constants(false, 0.5, 0, 0, 0, false, 1, 1);
  cpu::kKernelsDefault.sgd(
      [&] {
        auto t = q.tensor();
        t.grad = t.param;
        return t;
      }(),
      c, 0, 100);
  emulation::Rows rows;
  math::StepTensor tensor = p.tensor();
  tensor.grad = tensor.param;
  rows.add(tensor, 100);
  Counters counters(1);
  counters.steps[0] = 0;
  counters.lr[0] = 0.5;
  counters.control[math::kControlMultiplier] = 1;
  Buffer<math::SgdStep> constants(1, math::SgdStep());
  cuda::sgd_step(rows.table(), {0, 0, 0, false, false}, counters.state(), constants.data(),
                 nullptr);
  CHECK(p.param.bytes() == q.param.bytes());
}
