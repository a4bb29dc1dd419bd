#include "../csrc/math/optim.h"

#include "floats.h"
#include "reduce.h"
#include "slot.h"
#include "table.h"

namespace halfstep::cuda {

namespace {

// adam, sgd: unscale x clip x predicated skip x update x 16-bit write, all tensors in one launch.
//   Formulas: csrc/math/optim.h. FP16/BF16/FP32/FP64 parameters, gradients of any float dtype,
//   masters none | split16 | FP32 | FP64, states in the compute type; mixed within a table.
//   adam_constants/sgd_constants: a thread a tensor counts its step and forms what is constant over
//   it. adam_chunks/sgd_chunks: a grid of resident blocks strides over chunks; a thread takes 8
//   (FP64: 4) consecutive elements, so the 16-bit arrays move 16 bytes an access. FP32 and FP64
//   tensors are two kernels, so that the rare FP64 costs the others no registers.
//   Bytes an FP16 parameter with split16 and FP32 states, Adam: gradient 2, weight 2+2, remainder
//   2+2, m 4+4, v 4+4 = 26. A thread reads its group before it writes it: a parameter may be its
//   own gradient or master. An element whose 16-bit weight would leave its range keeps weight,
//   master and states, and counts. Elementwise, hence the same bits for any grid.
// Tests: tests/emulation/optim_test.cpp (bit-equal to the CPU kernels), tests/gpu.

template <class T>
constexpr int kGroup = sizeof(T) == 8 ? 4 : 8;

__device__ bool is_skipped(const StepState& state) {
  return state.control && read_uniform(state.control + math::kControlFoundInf) != 0;
}
__device__ double multiplier(const StepState& state) {
  return state.control ? read_uniform(state.control + math::kControlMultiplier) : 1.0;
}

/// One step more for the row's parameter; returns its new step count.
__device__ int64_t count_step(const Row& row, const StepState& state) {
  const int64_t step = read(state.steps + row.index) + 1;
  write(state.steps + row.index, step);
  return step;
}

/// Row `r` of the grid's threads, one thread a row.
template <class Body>
__device__ void for_each_row(const Table& table, const Body& body) {
  for (int64_t r = int64_t(blockIdx.x) * kThreads + threadIdx.x; r < table.count;
       r += int64_t(gridDim.x) * kThreads)
    body(read(table.rows + r), r);
}

__global__ void __launch_bounds__(kThreads)
    adam_constants(Table table, AdamNumbers n, StepState state, math::AdamStep* constants) {
  if (is_skipped(state)) return;
  const double lr = read_uniform(state.lr), factor = multiplier(state);
  for_each_row(table, [&](const Row& row, int64_t r) {
    write(constants + r,
          math::adam_step_constants(n.decoupled, n.amsgrad, n.maximize, lr, n.beta1, n.beta2, n.eps,
                                    n.weight_decay, factor, count_step(row, state)));
  });
}

__global__ void __launch_bounds__(kThreads)
    sgd_constants(Table table, SgdNumbers n, StepState state, math::SgdStep* constants) {
  if (is_skipped(state)) return;
  const double lr = read_uniform(state.lr), factor = multiplier(state);
  for_each_row(table, [&](const Row& row, int64_t r) {
    write(constants + r,
          math::sgd_step_constants(n.maximize, lr, n.momentum, n.dampening, n.weight_decay,
                                   n.nesterov, factor, count_step(row, state)));
  });
}

/// body(i, lanes) for the groups of a chunk that are this thread's: elements [i, i + lanes).
template <class T, class Body>
__device__ void for_each_group(int64_t begin, int64_t end, const Body& body) {
  constexpr int kCount = kGroup<T>;
  for (int64_t i = begin + int64_t(threadIdx.x) * kCount; i < end; i += kThreads * kCount)
    body(i, end - i < kCount ? int(end - i) : kCount);
}

/// The exact weights of a group, as they are stored and as numbers.
template <class S>
struct Weights {
  static constexpr int kCount = kGroup<typename S::T>;
  Group<typename S::Param, kCount> param;
  Group<typename S::Master, kCount> master;

  HALFSTEP_FN void read(const math::StepTensor& tensor, int64_t i, int lanes) {
    param = read_group<kCount>(static_cast<const typename S::Param*>(tensor.param), i, lanes);
    if constexpr (S::kHasMaster)
      master = read_group<kCount>(static_cast<const typename S::Master*>(tensor.master), i, lanes);
    else
      master = {};
  }
  HALFSTEP_FN typename S::T get(int k) const { return S::join(param.x[k], master.x[k]); }
  HALFSTEP_FN void set(int k, typename S::T x) { S::split(x, param.x[k], master.x[k]); }
  HALFSTEP_FN void write(const math::StepTensor& tensor, int64_t i, int lanes) const {
    write_group<kCount>(static_cast<typename S::Param*>(tensor.param), i, lanes, param);
    write_master(tensor, i, lanes);
  }
  HALFSTEP_FN void write_master(const math::StepTensor& tensor, int64_t i, int lanes) const {
    if constexpr (S::kHasMaster)
      write_group<kCount>(static_cast<typename S::Master*>(tensor.master), i, lanes, master);
  }
};

template <class S>
__device__ int adam_group(const math::StepTensor& tensor, const math::AdamStep& c, int64_t i,
                          int lanes) {
  using T = typename S::T;
  constexpr int kCount = kGroup<T>;
  auto *exp_avg = static_cast<T*>(tensor.state1), *exp_avg_sq = static_cast<T*>(tensor.state2),
       *largest = static_cast<T*>(tensor.state3);
  const auto grad = read_floats<T, kCount>(tensor.grad, tensor.grad_dtype, i, lanes);
  Weights<S> weights;
  weights.read(tensor, i, lanes);
  auto m = read_group<kCount>(exp_avg, i, lanes), v = read_group<kCount>(exp_avg_sq, i, lanes);
  Group<T, kCount> v_max = {};
  if (c.amsgrad) v_max = read_group<kCount>(largest, i, lanes);
  int kept = 0;
  HALFSTEP_UNROLL
  for (int k = 0; k < kCount; ++k) {
    T p = weights.get(k), new_m = m.x[k], new_v = v.x[k], new_max = v_max.x[k];
    math::adam_update(c, grad.x[k], p, new_m, new_v, new_max);
    if (S::leaves_range(p)) {
      kept += k < lanes;
      continue;
    }
    weights.set(k, p);
    m.x[k] = new_m;
    v.x[k] = new_v;
    v_max.x[k] = new_max;
  }
  weights.write(tensor, i, lanes);
  write_group<kCount>(exp_avg, i, lanes, m);
  write_group<kCount>(exp_avg_sq, i, lanes, v);
  if (c.amsgrad) write_group<kCount>(largest, i, lanes, v_max);
  return kept;
}

template <class S>
__device__ int sgd_group(const math::StepTensor& tensor, const math::SgdStep& c, int64_t i,
                         int lanes) {
  using T = typename S::T;
  constexpr int kCount = kGroup<T>;
  auto* buffers = static_cast<T*>(tensor.state1);
  const auto grad = read_floats<T, kCount>(tensor.grad, tensor.grad_dtype, i, lanes);
  Weights<S> weights;
  weights.read(tensor, i, lanes);
  Group<T, kCount> buffer = {};
  if (c.momentum != 0) buffer = read_group<kCount>(buffers, i, lanes);
  int kept = 0;
  HALFSTEP_UNROLL
  for (int k = 0; k < kCount; ++k) {
    T p = weights.get(k), new_buffer = buffer.x[k];
    math::sgd_update(c, grad.x[k], p, new_buffer);
    if (S::leaves_range(p)) {
      kept += k < lanes;
      continue;
    }
    weights.set(k, p);
    buffer.x[k] = new_buffer;
  }
  weights.write(tensor, i, lanes);
  if (c.momentum != 0) write_group<kCount>(buffers, i, lanes, buffer);
  return kept;
}

/// Rows computed in T: group(slot, tensor, constants of the row, i, lanes) for every group; what it
/// returns is added to counts[row.index].
template <class T, class Constants, class GroupBody>
__device__ void for_each_slot(const Table& table, const Constants* constants, int64_t* counts,
                              const GroupBody& group) {
  for_each_chunk(table, [&](const Row& row, int64_t position, int64_t, int64_t begin, int64_t end) {
    if (!is_computed_in<T>(row.tensor)) return;
    const math::StepTensor tensor = row.tensor;
    const Constants c = constants ? read_uniform(constants + position) : Constants();
    int64_t count = 0;
    with_slot<T>(tensor, [&](auto slot) {
      for_each_group<T>(begin, end,
                        [&](int64_t i, int lanes) { count += group(slot, tensor, c, i, lanes); });
    });
    if (count > 0) add_count(counts + row.index, count);
  });
}

struct Nothing {};
constexpr const Nothing* kNothing = nullptr;

template <class T>
__global__ void __launch_bounds__(kThreads)
    adam_chunks(Table table, StepState state, const math::AdamStep* constants) {
  if (is_skipped(state)) return;
  for_each_slot<T>(table, constants, state.overflowed,
                   [](auto slot, const math::StepTensor& tensor, const math::AdamStep& c, int64_t i,
                      int lanes) { return adam_group<decltype(slot)>(tensor, c, i, lanes); });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sgd_chunks(Table table, StepState state, const math::SgdStep* constants) {
  if (is_skipped(state)) return;
  for_each_slot<T>(table, constants, state.overflowed,
                   [](auto slot, const math::StepTensor& tensor, const math::SgdStep& c, int64_t i,
                      int lanes) { return sgd_group<decltype(slot)>(tensor, c, i, lanes); });
}

// ---- masters -----------------------------------------------------------------------------------
// write_masters, read_masters, refresh_masters: between exact values and what is held. One read and
// one write of each array. Tests as above.

template <class T>
__global__ void __launch_bounds__(kThreads) write_master_chunks(Table table, int64_t* counts) {
  for_each_slot<T>(table, kNothing, counts,
                   [](auto slot, const math::StepTensor& tensor, Nothing, int64_t i, int lanes) {
                     using S = decltype(slot);
                     constexpr int kCount = kGroup<T>;
                     const auto values =
                         read_group<kCount>(static_cast<const T*>(tensor.state1), i, lanes);
                     Weights<S> weights;
                     weights.read(tensor, i, lanes);
                     int left = 0;
                     HALFSTEP_UNROLL
                     for (int k = 0; k < kCount; ++k) {
                       if (S::leaves_range(values.x[k]))
                         left += k < lanes;
                       else
                         weights.set(k, values.x[k]);
                     }
                     weights.write(tensor, i, lanes);
                     return left;
                   });
}

template <class T>
__global__ void __launch_bounds__(kThreads) read_master_chunks(Table table) {
  for_each_slot<T>(table, kNothing, nullptr,
                   [](auto slot, const math::StepTensor& tensor, Nothing, int64_t i, int lanes) {
                     constexpr int kCount = kGroup<T>;
                     Weights<decltype(slot)> weights;
                     weights.read(tensor, i, lanes);
                     Group<T, kCount> values;
                     HALFSTEP_UNROLL
                     for (int k = 0; k < kCount; ++k) values.x[k] = weights.get(k);
                     write_group<kCount>(static_cast<T*>(tensor.state1), i, lanes, values);
                     return 0;
                   });
}

/// Masters whose rounding is not the weight. Values are compared, so -0 equals +0; NaN equals NaN.
template <class T>
__global__ void __launch_bounds__(kThreads)
    refresh_master_chunks(Table table, bool dry_run, int64_t* counts) {
  for_each_slot<T>(
      table, kNothing, counts,
      [=](auto slot, const math::StepTensor& tensor, Nothing, int64_t i, int lanes) {
        using S = decltype(slot);
        constexpr int kCount = kGroup<T>;
        if constexpr (!S::kHasMaster) {
          return 0;
        } else {
          Weights<S> weights;
          weights.read(tensor, i, lanes);
          int changed = 0;
          HALFSTEP_UNROLL
          for (int k = 0; k < kCount; ++k) {
            typename S::Param rounded;
            typename S::Master scratch;
            S::split(weights.get(k), rounded, scratch);
            const T held = S::weight(weights.param.x[k]), expected = S::weight(rounded);
            const bool differs = expected != held && (expected == expected || held == held);
            if (k >= lanes || !differs) continue;
            ++changed;
            S::split(held, rounded, weights.master.x[k]);
          }
          if (changed > 0 && !dry_run) weights.write_master(tensor, i, lanes);
          return changed;
        }
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

}  // namespace

Status adam_step(const Table& table, const AdamNumbers& numbers, const StepState& state,
                 math::AdamStep* constants, Stream stream) {
  const Status status = launch(adam_constants, blocks_for_rows(table), kThreads, stream, table,
                               numbers, state, constants);
  return status != kSuccess ? status
                            : launch_both(table, adam_chunks<float>, adam_chunks<double>, stream,
                                          state, constants);
}

Status sgd_step(const Table& table, const SgdNumbers& numbers, const StepState& state,
                math::SgdStep* constants, Stream stream) {
  const Status status = launch(sgd_constants, blocks_for_rows(table), kThreads, stream, table,
                               numbers, state, constants);
  return status != kSuccess
             ? status
             : launch_both(table, sgd_chunks<float>, sgd_chunks<double>, stream, state, constants);
}

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

}  // namespace halfstep::cuda
