#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "../ops/gather.h"

#include "common.h"

namespace halfstep::cpu {

namespace {

/// Runs body(tensor, position, begin, end) for every block in parallel; adds up what it returns.
template <class Body>
std::vector<int64_t> run_blocks(const ops::Gathered& work, const Body& body) {
  Blocks blocks;
  for (const int64_t numel : work.numels) blocks.add(numel);
  std::vector<std::atomic<int64_t>> found(work.tensors.size());
  blocks.for_each([&](size_t t, int64_t, int64_t begin, int64_t end) {
    const int64_t count = body(work.tensors[t], t, begin, end);
    if (count > 0) found[t].fetch_add(count, std::memory_order_relaxed);
  });
  return {found.begin(), found.end()};
}

/// The same for a step; what was kept from overflowing is added to `overflowed`.
template <class Body>
void run_step(const ops::Gathered& work, const at::Tensor& overflowed, const Body& body) {
  const std::vector<int64_t> kept = run_blocks(work, body);
  auto* counts = overflowed.mutable_data_ptr<int64_t>();
  for (size_t t = 0; t < kept.size(); ++t) counts[work.index[t]] += kept[t];
}

bool skipped(const std::optional<at::Tensor>& control) {
  return control && control->const_data_ptr<double>()[math::kControlFoundInf] != 0;
}
double multiplier(const std::optional<at::Tensor>& control) {
  return control ? control->const_data_ptr<double>()[math::kControlMultiplier] : 1.0;
}

template <class Rule>
struct KernelsOf;
template <>
struct KernelsOf<math::AdamRule> {
  static constexpr auto kStep = &Kernels::adam;
};
template <>
struct KernelsOf<math::SgdRule> {
  static constexpr auto kStep = &Kernels::sgd;
};
template <>
struct KernelsOf<math::LionRule> {
  static constexpr auto kStep = &Kernels::lion;
};
template <>
struct KernelsOf<math::AdagradRule> {
  static constexpr auto kStep = &Kernels::adagrad;
};
template <>
struct KernelsOf<math::LambRule> {
  static constexpr auto kStep = &Kernels::lamb;
  static constexpr auto kNorms = &Kernels::lamb_norms;
};
template <>
struct KernelsOf<math::NovoGradRule> {
  static constexpr auto kStep = &Kernels::novograd;
  static constexpr auto kNorms = &Kernels::novograd_norms;
};

/// The state of one element that some rules keep a tensor, read and written as double.
class TensorState {
 public:
  explicit TensorState(const StepTensor& tensor, int row) : data_(tensor.state[row]) {
    wide_ = tensor.param_dtype == Dtype::kF64 || tensor.master_kind == MasterKind::kF64;
  }
  double get() const {
    return !data_ ? 0 : wide_ ? *static_cast<double*>(data_) : double(*static_cast<float*>(data_));
  }
  void set(double value) const {
    if (data_ && wide_) *static_cast<double*>(data_) = value;
    if (data_ && !wide_) *static_cast<float*>(data_) = float(value);
  }

 private:
  void* data_;
  bool wide_;
};

/// The pass before the update, for rules that need norms of whole tensors.
template <class Rule, class Constants>
void take_norms(const ops::Gathered& work, const typename Rule::Numbers& numbers,
                const int64_t* steps, std::vector<Constants>& constants) {
  Blocks blocks;
  for (const int64_t numel : work.numels) blocks.add(numel);
  std::vector<Norms> partial(size_t(blocks.total()));
  blocks.for_each([&, norms = kernels().*KernelsOf<Rule>::kNorms](size_t t, int64_t block,
                                                                  int64_t begin, int64_t end) {
    partial[size_t(block)] = norms(work.tensors[t], constants[t], begin, end);
  });
  for (size_t t = 0; t < constants.size(); ++t) {
    Norms sum;
    for (int64_t b = 0; b < blocks.count(t); ++b) {
      const Norms& part = partial[size_t(blocks.first(t) + b)];
      sum.a2 += part.a2;
      sum.b2 += part.b2;
    }
    const TensorState held(work.tensors[t], Rule::kStates);
    double state = held.get();
    Rule::finish(constants[t], numbers, sum.a2, sum.b2, steps[work.index[t]], state);
    held.set(state);
  }
}

struct Cpu {
  template <class Rule>
  static void run(const ops::StepArgs& args, const ops::RuleInfo& info,
                  const typename Rule::Numbers& numbers) {
    if (skipped(args.control)) return ops::zero_all(args);
    const ops::Gathered work = ops::gather(args, info);
    auto* steps = args.steps.mutable_data_ptr<int64_t>();
    const double lr = *args.lr.const_data_ptr<double>(), factor = multiplier(args.control);
    std::vector<typename Rule::Constants> constants;
    constants.reserve(work.index.size());
    for (const int64_t i : work.index) {
      const int64_t step = ++steps[i];
      const auto common =
          math::common_constants(factor, args.ema_decay, !args.zeroed.empty(), args.seed, step, i);
      constants.push_back(math::step_constants<Rule>(numbers, common, lr, step));
    }
    if constexpr (Rule::kNeedsNorms) take_norms<Rule>(work, numbers, steps, constants);
    run_step(work, args.overflowed,
             [&, step = kernels().*KernelsOf<Rule>::kStep](const StepTensor& tensor, size_t t,
                                                           int64_t begin, int64_t end) {
               return step(tensor, constants[t], begin, end);
             });
    ops::zero_copied(args, work);
  }
};

void write_counts(const at::Tensor& counts, const std::vector<int64_t>& found) {
  std::copy(found.begin(), found.end(), counts.mutable_data_ptr<int64_t>());
}

void write_masters_(at::TensorList values, at::TensorList params, at::TensorList masters,
                    const at::Tensor& overflowed) {
  ops::check_write_masters(values, params, masters, overflowed);
  const std::vector<at::Tensor> flat = ops::values_for(values, params, masters);
  write_counts(overflowed, run_blocks(ops::gather_masters(params, masters, flat),
                                      [](const StepTensor& t, size_t, int64_t begin, int64_t end) {
                                        return kernels().write_masters(t, t.state[0], begin, end);
                                      }));
}

std::vector<at::Tensor> read_masters(at::TensorList params, at::TensorList masters) {
  ops::check_masters("read_masters", params, masters);
  std::vector<at::Tensor> values = ops::empty_values(params, masters);
  run_blocks(ops::gather_masters(params, masters, values),
             [](const StepTensor& t, size_t, int64_t begin, int64_t end) {
               kernels().read_masters(t, t.state[0], begin, end);
               return int64_t{0};
             });
  return values;
}

void refresh_masters_(at::TensorList params, at::TensorList masters, const at::Tensor& changed,
                      bool dry_run) {
  ops::check_refresh_masters(params, masters, changed);
  write_counts(changed, run_blocks(ops::gather_masters(params, masters, {}),
                                   [&](const StepTensor& t, size_t, int64_t begin, int64_t end) {
                                     return kernels().refresh_masters(t, dry_run, begin, end);
                                   }));
}

/// One narrow state as the kernels see it.
StepTensor state_tensor(const at::Tensor& state, const at::Tensor& scale) {
  StepTensor t;
  t.state[0] = state.data_ptr();
  t.state_kind = ops::state_code(state.scalar_type());
  if (t.state_kind == math::StateKind::kInt8) t.exponent[0] = scale.data_ptr<int8_t>();
  return t;
}

at::Tensor read_state(const at::Tensor& state, const at::Tensor& scale, bool is_signed) {
  ops::check_state("read_state", state, scale, is_signed);
  at::Tensor value = at::empty_like(state, state.options().dtype(at::kFloat));
  Blocks blocks;
  blocks.add(state.numel());
  const StepTensor t = state_tensor(state, scale);
  blocks.for_each([&](size_t, int64_t, int64_t begin, int64_t end) {
    kernels().read_state(t, is_signed, value.data_ptr(), begin, end);
  });
  return value;
}

void write_state_(const at::Tensor& value, const at::Tensor& state, const at::Tensor& scale,
                  bool is_signed, int64_t seed) {
  ops::check_state("write_state_", state, scale, is_signed);
  ops::check_state_value(value, state);
  const at::Tensor flat = ops::in_layout_of(value, state);
  Blocks blocks;
  blocks.add(state.numel());
  const StepTensor t = state_tensor(state, scale);
  blocks.for_each([&](size_t, int64_t, int64_t begin, int64_t end) {
    kernels().write_state(t, is_signed, flat.const_data_ptr(), math::random_key(seed, 0, 0), begin,
                          end);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(halfstep, CPU, m) {
  ops::register_steps<Cpu>(m);
  m.impl("read_state", read_state);
  m.impl("write_state_", write_state_);
  m.impl("write_masters_", write_masters_);
  m.impl("read_masters", read_masters);
  m.impl("refresh_masters_", refresh_masters_);
}

}  // namespace halfstep::cpu
