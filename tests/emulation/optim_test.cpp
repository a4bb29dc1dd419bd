#include "../../cuda/optim.cu"

#include <deque>

#include "../cpp/catch.h"
#include "tensors.h"

using namespace halfstep;
using emulation::Array;
using emulation::Buffer;
using emulation::Orders;
using math::Dtype;
using math::MasterKind;
using math::StateKind;

namespace {

struct Kind {
  Dtype param;
  MasterKind master;
};
const Kind kKinds[] = {
    {Dtype::kF16, MasterKind::kSplit16},    {Dtype::kF16, MasterKind::kNone},
    {Dtype::kF16, MasterKind::kF32},        {Dtype::kF16, MasterKind::kF64},
    {Dtype::kF16, MasterKind::kSplit8},     {Dtype::kF16, MasterKind::kKahan},
    {Dtype::kF16, MasterKind::kStochastic}, {Dtype::kBF16, MasterKind::kSplit16},
    {Dtype::kBF16, MasterKind::kNone},      {Dtype::kBF16, MasterKind::kF32},
    {Dtype::kBF16, MasterKind::kF64},       {Dtype::kBF16, MasterKind::kSplit8},
    {Dtype::kBF16, MasterKind::kKahan},     {Dtype::kBF16, MasterKind::kStochastic},
    {Dtype::kF32, MasterKind::kNone},       {Dtype::kF32, MasterKind::kF64},
    {Dtype::kF64, MasterKind::kNone}};

bool is_wide(const Kind& kind) {
  return kind.param == Dtype::kF64 || kind.master == MasterKind::kF64;
}
Dtype compute_dtype(const Kind& kind) { return is_wide(kind) ? Dtype::kF64 : Dtype::kF32; }
Array master_array(const Kind& kind, int64_t count, int64_t offset) {
  switch (kind.master) {
    case MasterKind::kNone:
    case MasterKind::kStochastic:
      return Array(Dtype::kF32, 0);
    case MasterKind::kSplit8:
      return Array(Dtype::kF32, count, offset, 1);
    case MasterKind::kSplit16:
    case MasterKind::kKahan:
      return Array(Dtype::kF16, count, offset);
    case MasterKind::kF64:
      return Array(Dtype::kF64, count, offset);
    default:
      return Array(Dtype::kF32, count, offset);
  }
}
/// A parameter with all that a step of any rule needs.
struct Param {
  Kind kind;
  StateKind states;
  int64_t count;
  Dtype grad_dtype;
  Array param, master, grad, ema;
  std::deque<Array> state, exponent;  // an Array stays where it is

  Param(Kind k, StateKind s, int64_t n, Dtype g, int64_t offset)
      : kind(k),
        states(is_wide(k) ? StateKind::kWide : s),
        count(n),
        grad_dtype(g),
        param(k.param, n, offset),
        master(master_array(k, n, offset)),
        grad(g, n, offset),
        ema(compute_dtype(k), n, offset) {
    for (int i = 0; i < 3; ++i) {
      const bool coded = states == StateKind::kInt8;
      const Dtype held = states == StateKind::kBF16 ? Dtype::kBF16 : compute_dtype(k);
      state.emplace_back(held, n, offset, coded ? 1 : 0);
      exponent.emplace_back(Dtype::kF32, (n + math::kStateBlock - 1) / math::kStateBlock, 0, 1);
    }
  }

  /// `elementwise` states and, after them, `per_tensor` ones of one element.
  math::StepTensor tensor(int elementwise = 3, int per_tensor = 0, bool with_ema = false) {
    math::StepTensor t;
    t.param = param.data();
    t.master = master.count() == 0 ? nullptr : master.data();
    t.grad = grad.data();
    for (int i = 0; i < elementwise; ++i) {
      t.state[i] = state[size_t(i)].data();
      if (states == StateKind::kInt8)
        t.exponent[i] = static_cast<int8_t*>(exponent[size_t(i)].data());
    }
    for (int i = elementwise; i < elementwise + per_tensor; ++i) t.state[i] = ema.data();
    if (with_ema) t.ema = ema.data();
    t.param_dtype = kind.param;
    t.master_kind = kind.master;
    t.grad_dtype = grad_dtype;
    t.state_kind = states;
    return t;
  }
  template <class F>
  static void each(const Param& p, const F& f) {
    f(p.param);
    f(p.master);
    f(p.grad);
    f(p.ema);
    for (const Array& a : p.state) f(a);
    for (const Array& a : p.exponent) f(a);
  }
  void assign(const Param& other) {
    std::vector<const Array*> from;
    each(other, [&](const Array& a) { from.push_back(&a); });
    size_t k = 0;
    each(*this, [&](const Array& a) { const_cast<Array&>(a).assign(*from[k++]); });
  }
  std::vector<char> bytes() const {
    std::vector<char> all;
    each(*this, [&](const Array& a) { emulation::append(all, a.bytes()); });
    return all;
  }
};

using Params = std::vector<std::unique_ptr<Param>>;

void fill_states(Param& p, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (size_t s = 0; s < 3; ++s) {
    if (p.states == StateKind::kInt8) {
      auto* codes = static_cast<uint8_t*>(p.state[s].data());
      for (int64_t i = 0; i < p.count; ++i) codes[i] = uint8_t(random() % 255);
      auto* exponents = static_cast<int8_t*>(p.exponent[s].data());
      for (int64_t i = 0; i < p.exponent[s].count(); ++i)
        exponents[i] = int8_t(int(random() % 24) - 22);
      continue;
    }
    fill_normal(p.state[s], 1, ++seed);
    for (int64_t i = 0; s > 0 && i < p.count; ++i)
      p.state[s].set(i, p.state[s].get(i) * p.state[s].get(i));
  }
}

/// Weights around and beyond what the dtypes hold; states of a run under way.
Params make_params(uint64_t seed, StateKind states = StateKind::kWide) {
  Params params;
  const Dtype grads[] = {Dtype::kF16, Dtype::kBF16, Dtype::kF32, Dtype::kF64};
  for (const Kind& kind : kKinds)
    for (const int64_t count : {int64_t(0), int64_t(5), int64_t(1027)}) {
      const int64_t offset = int64_t(params.size() % 3);
      params.push_back(
          std::make_unique<Param>(kind, states, count, grads[params.size() % 4], offset));
      Param& p = *params.back();
      Array values(compute_dtype(kind), count);
      fill_normal(values, 0.02, ++seed);
      for (int64_t i = 0; i < count; i += 97) values.set(i, i % 2 ? 65500.0 : -65500.0);
      for (int64_t i = 1; i < count; i += 89) values.set(i, 1e-6 * double(i % 7));
      cpu::kKernelsDefault.write_masters(p.tensor(), values.data(), 0, count);
      fill_normal(p.grad, 3, ++seed);
      fill_normal(p.ema, 1, ++seed);
      fill_states(p, ++seed);
      for (int64_t i = 0; i < count; i += 97) {  // pushes outwards
        p.grad.set(i, i % 2 ? -60000 : 60000);
        if (p.states == StateKind::kWide) p.state[0].set(i, p.grad.get(i));
      }
    }
  return params;
}

Params copies(const Params& params) {
  Params out;
  for (const auto& p : params) {
    out.push_back(std::make_unique<Param>(p->kind, p->states, p->count, p->grad_dtype,
                                          int64_t(out.size() % 3)));
    out.back()->assign(*p);
  }
  return out;
}

std::vector<char> all_bytes(const Params& params) {
  std::vector<char> bytes;
  for (const auto& p : params) emulation::append(bytes, p->bytes());
  return bytes;
}

emulation::Rows rows_of(const Params& params, int elementwise = 3, int per_tensor = 0,
                        bool ema = false) {
  emulation::Rows rows;
  for (const auto& p : params) rows.add(p->tensor(elementwise, per_tensor, ema), p->count);
  return rows;
}

constexpr int64_t kSeed = 11;

struct Counters {
  Buffer<int64_t> steps, overflowed;
  Buffer<double> lr{1, 0.3}, control{4, 0.0};
  bool zero_grads = false;
  explicit Counters(size_t n) : steps(n, 2), overflowed(n, 0) {
    control[math::kControlMultiplier] = 0x1p-6;
  }
  cuda::StepState state() {
    return {steps.data(), overflowed.data(), lr.data(), control.data(), 0.9, kSeed, zero_grads};
  }
};

int64_t host_step(const math::StepTensor& t, const math::AdamConstants& c, int64_t n) {
  return cpu::kKernelsDefault.adam(t, c, 0, n);
}
int64_t host_step(const math::StepTensor& t, const math::SgdConstants& c, int64_t n) {
  return cpu::kKernelsDefault.sgd(t, c, 0, n);
}
int64_t host_step(const math::StepTensor& t, const math::LionConstants& c, int64_t n) {
  return cpu::kKernelsDefault.lion(t, c, 0, n);
}
int64_t host_step(const math::StepTensor& t, const math::AdagradConstants& c, int64_t n) {
  return cpu::kKernelsDefault.adagrad(t, c, 0, n);
}
int64_t host_step(const math::StepTensor& t, const math::LambConstants& c, int64_t n) {
  return cpu::kKernelsDefault.lamb(t, c, 0, n);
}
int64_t host_step(const math::StepTensor& t, const math::NovoGradConstants& c, int64_t n) {
  return cpu::kKernelsDefault.novograd(t, c, 0, n);
}

template <class Rule>
typename Rule::Constants host_constants(const typename Rule::Numbers& numbers, int64_t index,
                                        bool zero_grads) {
  const math::StepConstants common =
      math::common_constants(0x1p-6, 0.9, zero_grads, kSeed, 3, index);
  return math::step_constants<Rule>(numbers, common, 0.3, 3);
}

template <class Rule>
cpu::Norms host_norms(const math::StepTensor& t, const typename Rule::Constants& c, int64_t n) {
  if constexpr (std::is_same_v<Rule, math::LambRule>)
    return cpu::kKernelsDefault.lamb_norms(t, c, 0, n);
  else
    return cpu::kKernelsDefault.novograd_norms(t, c, 0, n);
}

/// How a step runs beside what its numbers say.
struct Mode {
  StateKind states = StateKind::kWide;
  bool ema = false, zero_grads = false;
};

/// What the CPU kernels make of `p`; `per_tensor` states start from its first EMA element.
template <class Rule>
int64_t step_on_host(Param& p, const typename Rule::Numbers& numbers, int64_t index,
                     const Mode& mode) {
  const int elementwise = Rule::states(numbers);
  const bool ema = mode.ema && Rule::kTensorStates == 0;
  const math::StepTensor t = p.tensor(elementwise, Rule::kTensorStates, ema);
  auto c = host_constants<Rule>(numbers, index, mode.zero_grads);
  if constexpr (Rule::kNeedsNorms) {
    const cpu::Norms norms = host_norms<Rule>(t, c, p.count);
    double state = p.count > 0 ? p.ema.get(0) : 0;
    Rule::finish(c, numbers, norms.a2, norms.b2, 3, state);
    if (Rule::kTensorStates > 0 && p.count > 0) p.ema.set(0, state);
  }
  return host_step(t, c, p.count);
}

/// Bytes equal but, for rules whose norms are summed in another order on the device, for the last
/// bits of what is stored in FP32 and FP64.
template <class Rule>
void check_equal(const Param& got, const Param& expected) {
  if (!Rule::kNeedsNorms) {
    CHECK((got.bytes() == expected.bytes()));
    return;
  }
  std::vector<const Array*> other;
  Param::each(expected, [&](const Array& a) { other.push_back(&a); });
  size_t k = 0, different = 0;
  Param::each(got, [&](const Array& a) {
    different += a.bytes() != other[k]->bytes();
    ++k;
  });
  if constexpr (std::is_same_v<Rule, math::LambRule>)  // its moments do not depend on the norms
    for (size_t s = 0; s < 3; ++s) CHECK((got.state[s].bytes() == expected.state[s].bytes()));
  if (different == 0) return;
  double worst = 0;
  for (int64_t i = 0; i < got.count; ++i) {
    const double x = got.param.get(i), y = expected.param.get(i);
    worst = std::max(worst, std::fabs(x - y) / (std::fabs(y) + 1e-3));
  }
  CHECK(worst < (got.kind.param == Dtype::kF64   ? 1e-12
                 : got.kind.param == Dtype::kF32 ? 1e-6
                                                 : 9e-3));
}

/// The device against the CPU kernels, one step over every dtype, master and alignment at once.
/// `outwards`: the data push weights beyond FP16, where they must be kept.
template <class Rule>
void compare(const typename Rule::Numbers& numbers, const Mode& mode, bool outwards,
             Orders orders = Orders::kThree) {
  const auto start = make_params(5, mode.states);
  const auto expected = copies(start);
  const int elementwise = Rule::states(numbers);
  const bool ema = mode.ema && Rule::kTensorStates == 0;
  std::vector<int64_t> kept;
  int64_t total = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    kept.push_back(step_on_host<Rule>(*expected[i], numbers, int64_t(i), mode));
    total += kept.back();
  }
  if (outwards) CHECK(total > 10);
  const auto findings = emulation::in_all_orders(
      [&] {
        const auto params = copies(start);
        Counters counters(params.size());
        counters.zero_grads = mode.zero_grads;
        emulation::Rows rows = rows_of(params, elementwise, Rule::kTensorStates, ema);
        const cuda::Table table = rows.table();
        Buffer<double> scratch(size_t(cuda::step_scratch<Rule>(table) / 8 + 1), 0.0);
        CHECK(cuda::step<Rule>(table, numbers, counters.state(), scratch.data(), nullptr) == 0);
        for (size_t i = 0; i < params.size(); ++i) {
          INFO("parameter " << i << ", " << params[i]->count << " elements");
          check_equal<Rule>(*params[i], *expected[i]);
          CHECK(counters.overflowed[i] == kept[i]);
          CHECK(counters.steps[i] == 3);
        }
        return all_bytes(params);
      },
      orders);
  for (const auto& finding : findings) FAIL(finding);
}

const Mode kModes[] = {{},
                       {StateKind::kWide, true, true},
                       {StateKind::kBF16, false, false},
                       {StateKind::kInt8, true, false}};

}  // namespace

TEST_CASE("adam on the device is bit-equal to the CPU kernel", "[optim]") {
  for (const Mode& mode : kModes)
    for (const auto decay : {math::Decay::kGradient, math::Decay::kWeight, math::Decay::kUpdate}) {
      const bool amsgrad = decay == math::Decay::kWeight, wide = mode.states == StateKind::kWide;
      compare<math::AdamRule>(
          {0.9, 0.999, 1e-8, 1e-3, 0, decay, amsgrad, amsgrad}, mode, wide && !amsgrad,
          decay == math::Decay::kWeight && !mode.ema ? Orders::kAll : Orders::kThree);
    }
}

TEST_CASE("sgd on the device is bit-equal to the CPU kernel", "[optim]") {
  for (const Mode& mode : kModes)
    for (const double momentum : {0.0, 0.9}) {
      const bool wide = mode.states == StateKind::kWide;
      compare<math::SgdRule>({momentum, 0.1, 1e-3, false, false}, mode, wide);
      compare<math::SgdRule>({momentum, 0.0, 1e-3, momentum != 0, true}, mode, false);
    }
}

TEST_CASE("lion and adagrad on the device are bit-equal to the CPU kernels", "[optim]") {
  for (const Mode& mode : kModes) {
    compare<math::LionRule>({0.9, 0.99, 1e-2, false}, mode, false);
    compare<math::AdagradRule>({0.1, 1e-10, 1e-3, false}, mode, false);
  }
}

TEST_CASE("lamb and novograd on the device agree with the CPU kernels", "[optim]") {
  for (const Mode& mode : kModes) {
    compare<math::LambRule>(
        {0.9, 0.999, 1e-6, 1e-2, true, true, false, false}, mode, false,
        mode.ema || mode.states != StateKind::kWide ? Orders::kThree : Orders::kAll);
    compare<math::NovoGradRule>({0.95, 0.98, 1e-8, 1e-3, false, false}, mode, false);
  }
}

TEST_CASE("narrow states are read and written as on the CPU", "[optim]") {
  for (const StateKind states : {StateKind::kBF16, StateKind::kInt8})
    for (const bool is_signed : {true, false})
      for (const int64_t count : {int64_t(1), int64_t(127), int64_t(2051)}) {
        Param p({Dtype::kF32, MasterKind::kNone}, states, count, Dtype::kF32, 0);
        Array values(Dtype::kF32, count);
        fill_normal(values, 1e-5, 3);
        for (int64_t i = 0; i < count; ++i)
          if (!is_signed || i % 50 == 0) values.set(i, std::fabs(values.get(i)) * (i % 40 ? 1 : 0));
        if (count > 100) values.set(77, NAN);
        const math::StepTensor host = p.tensor(1);
        cpu::kKernelsDefault.write_state(host, is_signed, values.data(), 99, 0, count);
        std::vector<float> read(static_cast<size_t>(count));
        cpu::kKernelsDefault.read_state(host, is_signed, read.data(), 0, count);
        const std::vector<char> codes = p.state[0].bytes(), exponents = p.exponent[0].bytes();
        const auto findings = emulation::in_all_orders([&] {
          Param q({Dtype::kF32, MasterKind::kNone}, states, count, Dtype::kF32, 0);
          q.param.assign(values);
          emulation::Rows rows;
          rows.add(q.tensor(1), count);
          CHECK(cuda::write_state(rows.table(), is_signed, 99, nullptr) == 0);
          CHECK((q.state[0].bytes() == codes));
          if (states == StateKind::kInt8) CHECK((q.exponent[0].bytes() == exponents));
          CHECK(cuda::read_state(rows.table(), is_signed, nullptr) == 0);
          CHECK(std::memcmp(q.param.data(), read.data(), size_t(count) * 4) == 0);
          return q.bytes();
        });
        for (const auto& finding : findings) FAIL(finding);
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
    Buffer<double> scratch(
        size_t(cuda::step_scratch<math::LambRule>(table) + 100 * int64_t(params.size())), 0.0);
    emulation::reset();
    const auto run = [&](auto rule, const auto& numbers) {
      cuda::step<decltype(rule)>(table, numbers, counters.state(), scratch.data(), nullptr);
    };
    run(math::AdamRule(),
        math::AdamNumbers{0.9, 0.999, 1e-8, 0.1, 0, math::Decay::kWeight, true, false});
    run(math::SgdRule(), math::SgdNumbers{0.9, 0, 0.1, true, false});
    run(math::LionRule(), math::LionNumbers{0.9, 0.99, 0.1, false});
    run(math::AdagradRule(), math::AdagradNumbers{0.1, 1e-10, 0.1, false});
    run(math::LambRule(), math::LambNumbers{0.9, 0.999, 1e-6, 0.1, true, true, false, false});
    run(math::NovoGradRule(), math::NovoGradNumbers{0.95, 0.98, 1e-8, 0.1, false, false});
    CHECK((all_bytes(params) == before));
    CHECK(emulation::state().bytes_written == 0);
    CHECK(emulation::state().errors.empty());
    for (size_t i = 0; i < params.size(); ++i) {
      CHECK(counters.steps[i] == 2);
      CHECK(counters.overflowed[i] == 0);
    }
  }
}

TEST_CASE("a skipped step zeroes the gradients all the same, and nothing else", "[optim]") {
  const auto params = make_params(7, StateKind::kInt8), expected = copies(params);
  for (const auto& p : expected)
    for (int64_t i = 0; i < p->count; ++i) p->grad.set(i, 0.0);
  Counters counters(params.size());
  counters.control[math::kControlFoundInf] = 1;
  counters.zero_grads = true;
  emulation::Rows rows = rows_of(params, 2, 0, true);
  const cuda::Table table = rows.table();
  Buffer<double> scratch(size_t(cuda::step_scratch<math::AdamRule>(table)), 0.0);
  emulation::reset();
  cuda::step<math::AdamRule>(table, {0.9, 0.999, 1e-8, 0.1, 0, math::Decay::kWeight, false, false},
                             counters.state(), scratch.data(), nullptr);
  CHECK((all_bytes(params) == all_bytes(expected)));
  CHECK(emulation::state().errors.empty());
}

TEST_CASE("masters are written, read and refreshed as on the CPU", "[optim]") {
  const auto start = make_params(9);
  for (const auto& p : start)  // values to write; some do not fit 16 bits
    for (int64_t i = 0; i < p->count; ++i)
      p->state[0].set(i, i % 31 == 0 ? 3.4e38 : p->state[0].get(i) * 0.1);
  const auto expected = copies(start);
  std::vector<int64_t> left, changed;
  for (const auto& p : expected)
    left.push_back(
        cpu::kKernelsDefault.write_masters(p->tensor(), p->state[0].data(), 0, p->count));
  for (const auto& p : expected) {
    for (int64_t i = 0; i < p->count; i += 5) p->param.set(i, double(i) - 3.0);  // edits
    changed.push_back(cpu::kKernelsDefault.refresh_masters(p->tensor(), false, 0, p->count));
    math::StepTensor tensor = p->tensor();
    cpu::kKernelsDefault.read_masters(tensor, p->state[1].data(), 0, p->count);
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
      tensor.state[0] = p->state[1].data();
      values.add(tensor, p->count);
    }
    CHECK(cuda::read_masters(values.table(), nullptr) == 0);
    for (size_t i = 0; i < params.size(); ++i) {
      INFO("parameter " << i << ": dtype " << int(params[i]->kind.param) << ", master "
                        << int(params[i]->kind.master));
      CHECK((params[i]->bytes() == expected[i]->bytes()));
    }
    return all_bytes(params);
  });
  for (const auto& finding : findings) FAIL(finding);
}

/// Bytes {read, written} an element of an Adam step over one large parameter.
std::pair<double, double> adam_bytes(Kind kind, const Mode& mode) {
  const int64_t count = 8 * cuda::kChunk;
  Param p(kind, mode.states, count, kind.param, 0);
  emulation::Rows rows;
  rows.add(p.tensor(2, 0, mode.ema), count);
  const cuda::Table table = rows.table();
  Counters counters(1);
  counters.zero_grads = mode.zero_grads;
  Buffer<double> scratch(size_t(cuda::step_scratch<math::AdamRule>(table)), 0.0);
  emulation::reset();
  cuda::step<math::AdamRule>(table, {0.9, 0.999, 1e-8, 0.1, 0, math::Decay::kWeight, false, false},
                             counters.state(), scratch.data(), nullptr);
  return {double(emulation::state().bytes_read) / double(count),
          double(emulation::state().bytes_written) / double(count)};
}

TEST_CASE("bytes that an Adam step moves a parameter", "[optim]") {
  struct Case {
    const char* name;
    Kind kind;
    Mode mode;
    double read, written;
  };
  const Kind split = {Dtype::kF16, MasterKind::kSplit16};
  const double scales = 2.0 / 128;  // two int8 exponents a block
  const Case cases[] = {
      {"split16", split, {}, 14, 12},
      {"split16, BF16 states", split, {StateKind::kBF16, false, false}, 10, 8},
      {"split16, int8 states", split, {StateKind::kInt8, false, false}, 8 + scales, 6 + scales},
      {"split16, EMA", split, {StateKind::kWide, true, false}, 18, 16},
      {"split16, gradients zeroed", split, {StateKind::kWide, false, true}, 14, 14},
      {"split8, int8 states",
       {Dtype::kF16, MasterKind::kSplit8},
       {StateKind::kInt8, false, false},
       7 + scales,
       5 + scales},
      {"kahan, BF16 states",
       {Dtype::kBF16, MasterKind::kKahan},
       {StateKind::kBF16, false, false},
       10,
       8},
      {"stochastic, int8 states",
       {Dtype::kBF16, MasterKind::kStochastic},
       {StateKind::kInt8, false, false},
       6 + scales,
       4 + scales},
      {"FP32 master", {Dtype::kF16, MasterKind::kF32}, {}, 14, 14},
      {"FP64 master", {Dtype::kF16, MasterKind::kF64}, {}, 26, 26},
      {"FP32", {Dtype::kF32, MasterKind::kNone}, {}, 16, 12},
  };
  for (const Case& c : cases) {
    const auto [read, written] = adam_bytes(c.kind, c.mode);
    INFO(c.name << ": " << read << " bytes read, " << written << " written");
    CHECK(read >= c.read - 0.01);  // a scale is one access of the threads that share it
    CHECK(read <= c.read + 0.05);
    CHECK(written >= c.written);
    CHECK(written <= c.written + 0.02);
  }
}

TEST_CASE("a parameter may be its own gradient", "[optim]") {
  const Kind kind = {Dtype::kF32, MasterKind::kNone};
  Param p(kind, StateKind::kWide, 100, Dtype::kF32, 0),
      q(kind, StateKind::kWide, 100, Dtype::kF32, 0);
  fill_normal(p.param, 1, 3);
  q.assign(p);
  const math::SgdNumbers numbers = {0, 0, 0, false, false};
  math::StepTensor host = q.tensor(0), device = p.tensor(0);
  host.grad = host.param;
  device.grad = device.param;
  host_step(host, host_constants<math::SgdRule>(numbers, 0, false), 100);
  emulation::Rows rows;
  rows.add(device, 100);
  Counters counters(1);
  const cuda::Table table = rows.table();
  Buffer<double> scratch(size_t(cuda::step_scratch<math::SgdRule>(table)), 0.0);
  cuda::step<math::SgdRule>(table, numbers, counters.state(), scratch.data(), nullptr);
  CHECK((p.param.bytes() == q.param.bytes()));
}
