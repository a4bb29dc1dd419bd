#pragma once

// Launchers of the CUDA kernels: the only header of this folder that csrc includes. Pointers are
// device pointers unless said otherwise, sizes are elements, nothing allocates or synchronises, and
// everything runs on `stream`. A launcher returns a CUDA error code, 0 when the kernel was started.

#include "../csrc/math/grads.h"
#include "../csrc/math/linear.h"
#include "../csrc/math/optim.h"
#include "../csrc/math/scale_statistics.h"

struct CUstream_st;

namespace halfstep::cuda {

using Stream = CUstream_st*;
using Status = int;
constexpr Status kSuccess = 0;

/// Work is cut into chunks of this many elements of one tensor; a block of threads takes one at a
/// time. 64 elements a thread: the FP32 terms of one FP16 sum of squares.
constexpr int64_t kChunk = 16384;

/// One tensor (and what belongs to it) in the table that a kernel strides over.
struct Row {
  math::StepTensor tensor;
  int64_t numel = 0;
  int64_t first_chunk = 0;  ///< chunks of all rows before this one
  int64_t index = 0;        ///< position in the lists of the op
};

static_assert(sizeof(Row) <= 128, "callers of the step ops keep 128 bytes a row");

/// Rows on the device, with what the host knows of them.
struct Table {
  const Row* rows = nullptr;
  int64_t count = 0;
  int64_t chunks = 0;
  bool has_single = false;  ///< rows computed in FP32
  bool has_double = false;  ///< rows computed in FP64
  bool is_plain = true;     ///< no row has BF16 or int8 states, or an EMA

  void note(const Row& row) {
    const math::StepTensor& t = row.tensor;
    const bool wide = t.param_dtype == math::Dtype::kF64 || t.master_kind == math::MasterKind::kF64;
    (wide ? has_double : has_single) = true;
    is_plain = is_plain && t.state_kind == math::StateKind::kWide && !t.ema;
    chunks += (row.numel + kChunk - 1) / kChunk;
  }
};

/// Compute capabilities that this library was compiled for, "750,800,900".
const char* architectures();

/// Writes `size` host bytes to `to`. They travel as kernel parameters, so the host copy may change
/// at once, and a captured graph holds its own.
Status upload(void* to, const void* host_bytes, int64_t size, Stream stream);

/// A number on the device, or its absence.
struct Scalar {
  const void* data = nullptr;
  bool is_double = false;
};

// ---- grads -------------------------------------------------------------------------------------
/// Size of a row whose numbers are known already: it has no chunks.
constexpr int64_t kKnown = -1;
/// result: float64 [n + 1, kStatColumns]. Row table.rows[r].index is filled from tensor.grad, or
/// from the same row of `known` where its numel is kKnown; the others are zeroed, row n holds the
/// totals. partials: table.chunks entries of scratch.
Status grad_stats(const Table& table, math::BlockStats* partials, double* result, int64_t n,
                  const double* known, Stream stream);
/// Only the rows of `table`: neither the others nor the totals are written.
Status grad_stats_rows(const Table& table, math::BlockStats* partials, double* result,
                       Stream stream);
/// result: float64 [n, kHistColumns]; rows as in grad_stats, without totals. partials:
/// table.chunks * kHistColumns entries of scratch.
Status grad_histogram(const Table& table, Scalar scale, int64_t* partials, double* result,
                      int64_t n, Stream stream);
/// tensor.param = tensor.grad * inv_scale, rounded once to param_dtype; *found_inf = 1 when an
/// element is non-finite before or after. May run in place.
Status unscale(const Table& table, const float* inv_scale, float* found_inf, Stream stream);

/// control: float64 [kControlEntries]; totals: host array of `count` pointers to last rows of
/// grad_stats.
Status step_control(const double* const* totals, int64_t count, Scalar scale, Scalar found_inf,
                    Scalar clip, double max_norm, double* control, Stream stream);

// ---- scale -------------------------------------------------------------------------------------
/// What policies look at, of the `rows` rows of one grad_stats table, added to *view; `first`
/// starts it.
Status view_stats(const double* table, int64_t rows, const double* policy, bool first,
                  math::GradView* view, Stream stream);
/// view may be null.
Status update_scale(float* scale, double* state, Scalar found_inf, const double* policy,
                    const math::GradView* view, Scalar proposal, Stream stream);
Status simulate_scale(const float* found_inf, int64_t steps, const double* policy,
                      const double* state, double* scales, Stream stream);
Status init_scale_state(const double* policy, double* state, Stream stream);

// ---- linear ------------------------------------------------------------------------------------
/// Matrices are row-major and contiguous. product_dtype: float32, or y's dtype; then y may be the
/// product. bias and saved (a mask or h in y_dtype, csrc/math/linear.h) may be null.
struct EpilogueForward {
  const void* product = nullptr;
  const void* bias = nullptr;
  void* y = nullptr;
  void* saved = nullptr;
  int64_t rows = 0, columns = 0;
  math::Dtype product_dtype{}, bias_dtype{}, y_dtype{};
  math::Activation activation{};
};
Status epilogue_forward(const EpilogueForward& work, Stream stream);

/// dz (dtype) and sums ([ceil(rows / kBiasRows), columns] in the compute type) may be null.
struct EpilogueBackward {
  const void* dy = nullptr;
  const void* saved = nullptr;
  void* dz = nullptr;
  void* sums = nullptr;
  int64_t rows = 0, columns = 0;
  math::Dtype dtype{};
  math::Activation activation{};
};
Status epilogue_backward(const EpilogueBackward& work, Stream stream);
/// The sum of the rows, added in FP64 and rounded once.
Status add_rows(const void* sums, bool is_double, int64_t rows, int64_t columns, void* out,
                math::Dtype dtype, Stream stream);

// ---- optim -------------------------------------------------------------------------------------
/// Per-parameter counters and the numbers that change with the step. control may be null.
struct StepState {
  int64_t* steps;
  int64_t* overflowed;
  const double* lr;
  const double* control;
  double ema_decay = 0;
  int64_t seed = 0;
  bool zero_grads = false;
};
/// Bytes of scratch for a step, 16-byte aligned.
template <class Rule>
int64_t step_scratch(const Table& table);
/// One step of a rule of csrc/math/optim.h; compiled for those that optim.cu lists. With
/// control[0] != 0 nothing is written but scratch and, with zero_grads, the gradients.
template <class Rule>
Status step(const Table& table, const typename Rule::Numbers& numbers, const StepState& state,
            void* scratch, Stream stream);
/// tensor.state[0] holds values of the compute type. counts[index] += elements that do not fit.
Status write_masters(const Table& table, int64_t* counts, Stream stream);
Status read_masters(const Table& table, Stream stream);
/// counts[index] += masters that do not round to their weight.
Status refresh_masters(const Table& table, bool dry_run, int64_t* counts, Stream stream);
/// FP32 values (tensor.param) of tensor.state[0], which is BF16 or int8, and back.
Status read_state(const Table& table, bool is_signed, Stream stream);
Status write_state(const Table& table, bool is_signed, uint32_t random, Stream stream);

}  // namespace halfstep::cuda
