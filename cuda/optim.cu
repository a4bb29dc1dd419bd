#include "table.h"
#include "weights.h"

namespace halfstep::cuda {

namespace {

// steps: unscale x clip x predicated skip x update x 16-bit write (x EMA x zeroed gradient), all
//   tensors in one launch. Rules: csrc/math/optim.h. FP16/BF16/FP32/FP64 parameters, gradients of
//   any float dtype, every master and state of csrc/math/states.h; mixed within a table.
//   step_constants: a thread a tensor counts its step and forms what is constant over it.
//   step_chunks: a grid of resident blocks strides over chunks; a thread takes 8 (FP64: 4)
//   consecutive elements, so the 16-bit arrays move 16 bytes an access. FP32 and FP64 tensors are
//   two kernels, so that the rare FP64 costs the others no registers. Rules with norms (LAMB,
//   NovoGrad) read everything once more before: norm_chunks, then a block a tensor adds up the
//   chunks in one fixed tree and finishes the constants.
//   Bytes an FP16 parameter with split16 and FP32 states, Adam: gradient 2, weight 2+2, remainder
//   2+2, m 4+4, v 4+4 = 26; with int8 states m 1+1, v 1+1 and 4 scales for 128 elements.
//   A thread reads its group before it writes it: a parameter may be its own gradient or master.
//   An element whose 16-bit weight would leave its range keeps weight, master and states, and
//   counts. Elementwise, hence the same bits for any grid.
// Tests: tests/emulation/optim_test.cpp (bit-equal to the CPU kernels), tests/gpu.

__device__ bool is_skipped(const StepState& state) {
  return state.control && read_uniform(state.control + math::kControlFoundInf) != 0;
}
__device__ double multiplier(const StepState& state) {
  return state.control ? read_uniform(state.control + math::kControlMultiplier) : 1.0;
}

/// Row `r` of the grid's threads, one thread a row.
template <class Rule>
__global__ void __launch_bounds__(kThreads)
    step_constants(Table table, typename Rule::Numbers numbers, StepState state,
                   typename Rule::Constants* constants) {
  if (is_skipped(state)) return;
  const double lr = read_uniform(state.lr), factor = multiplier(state);
  for (int64_t r = int64_t(blockIdx.x) * kThreads + threadIdx.x; r < table.count;
       r += int64_t(gridDim.x) * kThreads) {
    const int64_t index = read(&table.rows[r].index);
    const int64_t step = read(state.steps + index) + 1;
    write(state.steps + index, step);
    const math::StepConstants common =
        math::common_constants(factor, state.ema_decay, state.zero_grads, state.seed, step, index);
    write(constants + r, math::step_constants<Rule>(numbers, common, lr, step));
  }
}

/// body(i, lanes) for the groups of a chunk that are this thread's: elements [i, i + lanes). All
/// threads of the block make the same number of calls, some of them with no lanes.
template <class T, class Body>
__device__ void for_each_group(int64_t begin, int64_t end, const Body& body) {
  constexpr int kCount = kGroup<T>;
  for (int64_t first = begin; first < end; first += kThreads * kCount) {
    const int64_t i = first + int64_t(threadIdx.x) * kCount, left = end - i;
    body(i, left >= kCount ? kCount : left > 0 ? int(left) : 0);
  }
}

/// kPlain: the common states in the compute type, nothing else.
template <class Rule, class T, bool kPlain>
struct GroupStates {
  static constexpr int kStates = kPlain ? Rule::kCommonStates : Rule::kStates;
  Group<T, kGroup<T>> s[kStates];

  HALFSTEP_FN void read(const StepTensor& tensor, int64_t i, int lanes) {
    HALFSTEP_UNROLL
    for (int k = 0; k < kStates; ++k) {
      if (k >= Rule::kFewestStates && !tensor.state[k])
        s[k] = {};
      else if (kPlain)
        s[k] = read_group<kGroup<T>>(static_cast<const T*>(tensor.state[k]), i, lanes);
      else if (Rule::is_signed(k))
        s[k] = read_states<true, T>(tensor, k, i, lanes);
      else
        s[k] = read_states<false, T>(tensor, k, i, lanes);
    }
  }
  HALFSTEP_FN void write(const StepTensor& tensor, int64_t i, int lanes, uint32_t random) const {
    HALFSTEP_UNROLL
    for (int k = 0; k < kStates; ++k) {
      if (k >= Rule::kFewestStates && !tensor.state[k]) continue;
      if (kPlain)
        write_group<kGroup<T>>(static_cast<T*>(tensor.state[k]), i, lanes, s[k]);
      else if (Rule::is_signed(k))
        write_states<true, T>(tensor, k, i, lanes, s[k], random);
      else
        write_states<false, T>(tensor, k, i, lanes, s[k], random);
    }
  }
};

template <class T>
HALFSTEP_FN void zero_group(const StepTensor& tensor, int64_t i, int lanes) {
  constexpr int kCount = kGroup<T>;
  write_floats<T, kCount>(tensor.grad, tensor.grad_dtype, i, lanes, Group<T, kCount>{});
}

template <class Rule, class T, bool kPlain>
__device__ int step_group(const StepTensor& tensor, const typename Rule::Constants& c, int64_t i,
                          int lanes) {
  constexpr int kCount = kGroup<T>;
  const auto grad = read_floats<T, kCount>(tensor.grad, tensor.grad_dtype, i, lanes);
  Group<T, kCount> weights = read_weights<T>(tensor, i, lanes), ema = {};
  GroupStates<Rule, T, kPlain> states;
  states.read(tensor, i, lanes);
  if (!kPlain && tensor.ema) ema = read_group<kCount>(static_cast<const T*>(tensor.ema), i, lanes);
  int kept = 0;
  HALFSTEP_UNROLL
  for (int k = 0; k < kCount; ++k) {
    T p = weights.x[k], s[Rule::kStates] = {};
    HALFSTEP_UNROLL
    for (int j = 0; j < states.kStates; ++j) s[j] = states.s[j].x[k];
    Rule::update(c, grad.x[k], p, s);
    if (leaves_range(tensor.param_dtype, p)) {
      kept += k < lanes;
    } else {
      weights.x[k] = p;
      HALFSTEP_UNROLL
      for (int j = 0; j < states.kStates; ++j) states.s[j].x[k] = s[j];
    }
    if (!kPlain) ema.x[k] = math::fma(T(c.ema_blend), weights.x[k] - ema.x[k], ema.x[k]);
  }
  if (!kPlain && c.zero_grads) zero_group<T>(tensor, i, lanes);
  write_weights<T>(tensor, i, lanes, weights, c.random);
  states.write(tensor, i, lanes, c.random);
  if (!kPlain && tensor.ema) write_group<kCount>(static_cast<T*>(tensor.ema), i, lanes, ema);
  return kept;
}

/// Rows computed in T: body(row, position, chunk, i, lanes) for every group; what it returns is
/// added to counts[row.index].
template <class T, class Body>
__device__ void for_each_row_group(const Table& table, int64_t* counts, const Body& body) {
  for_each_chunk(table, [&](const Row& row, int64_t position, int64_t, int64_t begin, int64_t end) {
    if (!is_computed_in<T>(row.tensor)) return;
    const StepTensor tensor = row.tensor;
    int64_t count = 0;
    for_each_group<T>(begin, end,
                      [&](int64_t i, int lanes) { count += body(tensor, position, i, lanes); });
    if (count > 0) add_count(counts + row.index, count);
  });
}

// At least two blocks a multiprocessor, so 128 registers a thread. kPlain: the table's rows have
// FP32 states and no EMA, and no gradient is zeroed: what most steps are, in fewer registers.
template <class Rule, class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 2)
    step_chunks(Table table, StepState state, const typename Rule::Constants* constants) {
  const bool skip = is_skipped(state);
  if (skip && !state.zero_grads) return;
  for_each_chunk(table, [&](const Row& row, int64_t position, int64_t, int64_t begin, int64_t end) {
    if (!is_computed_in<T>(row.tensor)) return;
    const StepTensor tensor = row.tensor;
    if (skip) {
      for_each_group<T>(begin, end, [&](int64_t i, int lanes) { zero_group<T>(tensor, i, lanes); });
      return;
    }
    const typename Rule::Constants c = read_uniform(constants + position);
    int64_t kept = 0;
    for_each_group<T>(begin, end, [&](int64_t i, int lanes) {
      kept += step_group<Rule, T, kPlain>(tensor, c, i, lanes);
    });
    if (kept > 0) add_count(state.overflowed + row.index, kept);
  });
}

// ---- norms -------------------------------------------------------------------------------------
/// Sums of squares of a chunk, as a rule's norms() gives them.
struct NormPair {
  double a2, b2;
};

template <class Rule, class T>
__global__ void __launch_bounds__(kThreads)
    norm_chunks(Table table, StepState state, const typename Rule::Constants* constants,
                NormPair* partials) {
  HALFSTEP_SHARED(double, first, kWarps);
  HALFSTEP_SHARED(double, second, kWarps);
  if (is_skipped(state)) return;
  for_each_chunk(
      table, [&](const Row& row, int64_t position, int64_t chunk, int64_t begin, int64_t end) {
        if (!is_computed_in<T>(row.tensor)) return;
        const StepTensor tensor = row.tensor;
        const typename Rule::Constants c = read_uniform(constants + position);
        NormPair sum = {0, 0};
        for_each_group<T>(begin, end, [&](int64_t i, int lanes) {
          constexpr int kCount = kGroup<T>;
          const auto grad = read_floats<T, kCount>(tensor.grad, tensor.grad_dtype, i, lanes);
          const auto weights = read_weights<T>(tensor, i, lanes);
          GroupStates<Rule, T, false> states;
          states.read(tensor, i, lanes);
          HALFSTEP_UNROLL
          for (int k = 0; k < kCount; ++k) {
            T s[Rule::kStates], a, b;
            HALFSTEP_UNROLL
            for (int j = 0; j < Rule::kStates; ++j) s[j] = states.s[j].x[k];
            Rule::norms(c, grad.x[k], weights.x[k], s, a, b);
            if (k >= lanes) continue;
            sum.a2 = math::fma(double(a), double(a), sum.a2);
            sum.b2 = math::fma(double(b), double(b), sum.b2);
          }
        });
        __syncthreads();  // nobody still reads the sums before
        sum.a2 = reduce_block(sum.a2, Sum(), first);
        sum.b2 = reduce_block(sum.b2, Sum(), second);
        if (threadIdx.x == 0) write(partials + chunk, sum);
      });
}

/// A block a tensor: its chunks into its constants and, where the rule has one, its state.
template <class Rule>
__global__ void __launch_bounds__(kThreads)
    finish_norms(Table table, typename Rule::Numbers numbers, StepState state,
                 typename Rule::Constants* constants, const NormPair* partials) {
  HALFSTEP_SHARED(double, first, kWarps);
  HALFSTEP_SHARED(double, second, kWarps);
  if (is_skipped(state)) return;
  for (int64_t r = blockIdx.x; r < table.count; r += gridDim.x) {
    const Row row = read_uniform(table.rows + r);
    NormPair sum = {0, 0};
    for (int64_t chunk = threadIdx.x; chunk < chunks_of(row.numel); chunk += kThreads) {
      const NormPair part = read(partials + row.first_chunk + chunk);
      sum.a2 += part.a2;
      sum.b2 += part.b2;
    }
    __syncthreads();  // nobody still reads the sums before
    sum.a2 = reduce_block(sum.a2, Sum(), first);
    sum.b2 = reduce_block(sum.b2, Sum(), second);
    if (threadIdx.x != 0) continue;
    const bool wide = is_computed_in<double>(row.tensor);
    void* held = Rule::kTensorStates > 0 ? row.tensor.state[Rule::kStates] : nullptr;
    double value = 0;
    if (held) value = wide ? read(static_cast<double*>(held)) : read(static_cast<float*>(held));
    typename Rule::Constants c = read(constants + r);
    Rule::finish(c, numbers, sum.a2, sum.b2, read(state.steps + row.index), value);
    write(constants + r, c);
    if (held && wide) write(static_cast<double*>(held), value);
    if (held && !wide) write(static_cast<float*>(held), float(value));
  }
}

// ---- masters -----------------------------------------------------------------------------------
// write_masters, read_masters, refresh_masters: between exact values and what is held. One read and
// one write of each array. Tests as above.

template <class T>
__global__ void __launch_bounds__(kThreads) write_master_chunks(Table table, int64_t* counts) {
  for_each_row_group<T>(table, counts, [](const StepTensor& tensor, int64_t, int64_t i, int lanes) {
    constexpr int kCount = kGroup<T>;
    const auto values = read_group<kCount>(static_cast<const T*>(tensor.state[0]), i, lanes);
    Group<T, kCount> weights = read_weights<T>(tensor, i, lanes);
    int left = 0;
    HALFSTEP_UNROLL
    for (int k = 0; k < kCount; ++k) {
      if (leaves_range(tensor.param_dtype, values.x[k]))
        left += k < lanes;
      else
        weights.x[k] = values.x[k];
    }
    write_weights<T>(tensor, i, lanes, weights, 0);
    return left;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) read_master_chunks(Table table) {
  for_each_row_group<T>(table, nullptr,
                        [](const StepTensor& tensor, int64_t, int64_t i, int lanes) {
                          write_group<kGroup<T>>(static_cast<T*>(tensor.state[0]), i, lanes,
                                                 read_weights<T>(tensor, i, lanes));
                          return 0;
                        });
}

/// The 16-bit weight, or the narrower one, that goes with an exact value.
template <class T>
HALFSTEP_FN T rounded_weight(const StepTensor& t, T x) {
  if (!is_sixteen(t.param_dtype)) return t.param_dtype == Dtype::kF32 ? T(float(x)) : x;
  const bool split = t.master_kind == MasterKind::kSplit16 || t.master_kind == MasterKind::kSplit8;
  const uint16_t bits =
      split ? split_weight(t.param_dtype, float(x)) : to_sixteen(t.param_dtype, narrow(x));
  return T(from_sixteen(t.param_dtype, bits));
}

/// Masters whose rounding is not the weight. Values are compared, so -0 equals +0; NaN equals NaN.
template <class T>
__global__ void __launch_bounds__(kThreads)
    refresh_master_chunks(Table table, bool dry_run, int64_t* counts) {
  for_each_row_group<T>(
      table, counts, [=](const StepTensor& tensor, int64_t, int64_t i, int lanes) {
        constexpr int kCount = kGroup<T>;
        if (!tensor.master) return 0;
        const auto held = read_floats<T, kCount>(tensor.param, tensor.param_dtype, i, lanes);
        const Group<T, kCount> exact = read_weights<T>(tensor, i, lanes);
        int changed = 0;
        for (int k = 0; k < lanes; ++k) {
          const T weight = held.x[k], expected = rounded_weight(tensor, exact.x[k]);
          const bool differs = expected != weight && (expected == expected || weight == weight);
          if (!differs) continue;
          ++changed;
          Group<T, kCount> fresh = {};  // alone: the others keep their bits
          fresh.x[0] = weight;
          if (!dry_run) write_weights<T>(tensor, i + k, 1, fresh, 0, false);
        }
        return changed;
      });
}

// ---- one narrow state --------------------------------------------------------------------------
// read_state, write_state: tensor.param holds the values in FP32.

__global__ void __launch_bounds__(kThreads) read_state_chunks(Table table, bool is_signed) {
  for_each_row_group<float>(
      table, nullptr, [=](const StepTensor& tensor, int64_t, int64_t i, int lanes) {
        const auto x = is_signed ? read_states<true, float>(tensor, 0, i, lanes)
                                 : read_states<false, float>(tensor, 0, i, lanes);
        write_group<kGroup<float>>(static_cast<float*>(tensor.param), i, lanes, x);
        return 0;
      });
}

__global__ void __launch_bounds__(kThreads)
    write_state_chunks(Table table, bool is_signed, uint32_t random) {
  for_each_row_group<float>(
      table, nullptr, [=](const StepTensor& tensor, int64_t, int64_t i, int lanes) {
        auto x = read_group<kGroup<float>>(static_cast<const float*>(tensor.param), i, lanes);
        HALFSTEP_UNROLL
        for (int k = 0; k < kGroup<float>; ++k) x.x[k] = math::quiet(x.x[k]);
        if (is_signed)
          write_states<true, float>(tensor, 0, i, lanes, x, random);
        else
          write_states<false, float>(tensor, 0, i, lanes, x, random);
        return 0;
      });
}

/// The FP32 and the FP64 kernel, each where the table has rows for it.
template <class... Parameters, class... Arguments>
Status launch_both(const Table& table, void (*single)(Table, Parameters...),
                   void (*wide)(Table, Parameters...), Stream stream, Arguments... arguments) {
  Status status = kSuccess;
  if (table.has_single)
    status = launch(single, grid_for(single, kThreads, table.chunks), kThreads, stream, table,
                    arguments...);
  if (table.has_double && status == kSuccess)
    status =
        launch(wide, grid_for(wide, kThreads, table.chunks), kThreads, stream, table, arguments...);
  return status;
}

int64_t blocks_for_rows(const Table& table) { return (table.count + kThreads - 1) / kThreads; }

/// Constants of all rows, to a multiple of 16 bytes.
template <class Rule>
int64_t constants_bytes(const Table& table) {
  return (table.count * int64_t(sizeof(typename Rule::Constants)) + 15) / 16 * 16;
}

}  // namespace

template <class Rule>
int64_t step_scratch(const Table& table) {
  const int64_t partials = Rule::kNeedsNorms ? table.chunks * int64_t(sizeof(NormPair)) : 0;
  return constants_bytes<Rule>(table) + partials;
}

template <class Rule>
Status step(const Table& table, const typename Rule::Numbers& numbers, const StepState& state,
            void* scratch, Stream stream) {
  auto* constants = static_cast<typename Rule::Constants*>(scratch);
  Status status = launch(step_constants<Rule>, blocks_for_rows(table), kThreads, stream, table,
                         numbers, state, constants);
  if constexpr (Rule::kNeedsNorms) {
    auto* partials =
        reinterpret_cast<NormPair*>(static_cast<char*>(scratch) + constants_bytes<Rule>(table));
    if (status == kSuccess)
      status = launch_both(table, norm_chunks<Rule, float>, norm_chunks<Rule, double>, stream,
                           state, constants, partials);
    if (status == kSuccess)
      status = launch(finish_norms<Rule>, grid_for(finish_norms<Rule>, kThreads, table.count),
                      kThreads, stream, table, numbers, state, constants, partials);
  }
  if (status != kSuccess) return status;
  const bool plain =
      table.is_plain && !state.zero_grads && Rule::states(numbers) <= Rule::kCommonStates;
  const auto single = plain ? step_chunks<Rule, float, true> : step_chunks<Rule, float, false>;
  return launch_both(table, single, step_chunks<Rule, double, false>, stream, state, constants);
}

#define HALFSTEP_STEP(Rule)                                                                    \
  template int64_t step_scratch<math::Rule>(const Table&);                                     \
  template Status step<math::Rule>(const Table&, const math::Rule::Numbers&, const StepState&, \
                                   void*, Stream);
HALFSTEP_STEP(AdamRule)
HALFSTEP_STEP(SgdRule)
HALFSTEP_STEP(LionRule)
HALFSTEP_STEP(AdagradRule)
HALFSTEP_STEP(LambRule)
HALFSTEP_STEP(NovoGradRule)
#undef HALFSTEP_STEP

Status write_masters(const Table& table, int64_t* counts, Stream stream) {
  return launch_both(table, write_master_chunks<float>, write_master_chunks<double>, stream,
                     counts);
}
Status read_masters(const Table& table, Stream stream) {
  return launch_both(table, read_master_chunks<float>, read_master_chunks<double>, stream);
}
Status refresh_masters(const Table& table, bool dry_run, int64_t* counts, Stream stream) {
  return launch_both(table, refresh_master_chunks<float>, refresh_master_chunks<double>, stream,
                     dry_run, counts);
}

Status read_state(const Table& table, bool is_signed, Stream stream) {
  return launch(read_state_chunks, grid_for(read_state_chunks, kThreads, table.chunks), kThreads,
                stream, table, is_signed);
}
Status write_state(const Table& table, bool is_signed, uint32_t random, Stream stream) {
  return launch(write_state_chunks, grid_for(write_state_chunks, kThreads, table.chunks), kThreads,
                stream, table, is_signed, random);
}

}  // namespace halfstep::cuda
