#pragma once

// Launchers of the CUDA kernels: the only header of this folder that csrc includes. Pointers are
// device pointers unless said otherwise, sizes are elements, nothing allocates or synchronises, and
// everything runs on `stream`. A launcher returns a CUDA error code, 0 when the kernel was started.

#include "../csrc/math/activation.h"
#include "../csrc/math/grads.h"
#include "../csrc/math/linear.h"
#include "../csrc/math/loss.h"
#include "../csrc/math/optim.h"
#include "../csrc/math/rope.h"
#include "../csrc/math/scale_statistics.h"
#include "../csrc/math/softmax.h"

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
  math::LinearActivation activation{};
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
  math::LinearActivation activation{};
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

// ---- norm --------------------------------------------------------------------------------------
/// LayerNorm (mean given) and RMSNorm (mean null) of contiguous rows; csrc/math/norm.h. T is double
/// where x is FP64, else float. weight and bias may be null.
struct NormForward {
  const void* x = nullptr;         ///< [rows, n]
  const void* residual = nullptr;  ///< or null: then x is what is normalised
  const void* weight = nullptr;
  const void* bias = nullptr;
  void* y = nullptr;             ///< x's dtype
  void* residual_out = nullptr;  ///< x + residual in the residual's dtype
  void* mean = nullptr;          ///< T [rows]
  void* rstd = nullptr;          ///< T [rows]
  math::Dtype x_dtype = {}, residual_dtype = {}, weight_dtype = {}, bias_dtype = {};
  int64_t rows = 0, n = 0;
  double eps = 0, weight_offset = 0;
};
Status norm_forward(const NormForward& work, Stream stream);

struct NormBackward {
  const void* grad_y = nullptr;         ///< [rows, n]
  const void* grad_residual = nullptr;  ///< gradient of residual_out, input's dtype, or null
  const void* input = nullptr;          ///< what was normalised
  const void* weight = nullptr;
  const void* mean = nullptr;  ///< T [rows]
  const void* rstd = nullptr;  ///< T [rows]
  void* grad_x = nullptr;      ///< grad_y's dtype, or null
  void* grad_input = nullptr;  ///< the same in input's dtype, or null
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;
  math::Dtype grad_dtype = {}, input_dtype = {}, weight_dtype = {}, bias_dtype = {};
  int64_t rows = 0, n = 0;
  double weight_offset = 0;
};
/// Bytes of scratch, 0 where neither weight nor bias gets a gradient.
int64_t norm_scratch(const NormBackward& work);
Status norm_backward(const NormBackward& work, void* scratch, Stream stream);
// ---- activation --------------------------------------------------------------------------------
/// `rows` rows of `width` elements; row r of operand k (inputs, then outputs, in the launcher's
/// order) begins r * stride[k] elements after the operand's first.
struct Spans {
  int64_t rows = 1, width = 0;
  int64_t stride[6] = {};
};
Status activation_forward(math::Activation activation, math::Dtype dtype, const Spans& spans,
                          const void* x, void* y, Stream stream);
Status activation_backward(math::Activation activation, math::Dtype dtype, const Spans& spans,
                           const void* grad, const void* x, void* dx, Stream stream);
/// overflowed may be null.
Status gated(math::Activation activation, math::Dtype dtype, const Spans& spans, const void* gate,
             const void* up, void* y, int64_t* overflowed, Stream stream);
Status gated_backward(math::Activation activation, math::Dtype dtype, const Spans& spans,
                      const void* grad, const void* gate, const void* up, void* dgate, void* dup,
                      Stream stream);

/// Rows whose bias gradient is summed in FP32.
constexpr int64_t kDropoutRows = 64;
/// Contiguous operands. Null: seed (nothing is drawn), bias, bias_gradient.
struct DropoutArguments {
  int64_t numel = 0;
  int64_t width = 1;  ///< length of the bias
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;
  double scale = 1;
  const void* x = nullptr;  ///< the gradient in the backward
  const void* bias = nullptr;
  const void* residual = nullptr;
  void* y = nullptr;
  void* bias_gradient = nullptr;
  /// Scratch, with a bias gradient: 2 entries for every 64 elements begun; [row blocks, width] of
  /// the compute type.
  uint32_t* bits = nullptr;
  void* partials = nullptr;
};
Status dropout_add(math::Dtype dtype, const DropoutArguments& arguments, Stream stream);
/// y = x factor; with a bias gradient also its sums over rows.
Status dropout_backward(math::Dtype dtype, const DropoutArguments& arguments, Stream stream);
// ---- softmax, rope -----------------------------------------------------------------------------
Status softmax(const math::SoftmaxRows& all, Stream stream);
Status softmax_backward(const math::SoftmaxRows& all, Stream stream);
Status rope(const math::RopeRows& all, Stream stream);
// ---- loss --------------------------------------------------------------------------------------
/// Rows of logits and what belongs to them. T: float, double for FP64 logits.
struct LossRows {
  math::CrossEntropy numbers;  ///< weights: T; weight_sum: looked at without weights only
  const void* logits = nullptr;
  math::Dtype dtype = math::Dtype::kF32;
  int64_t rows = 0;
  int64_t stride = 0;  ///< elements from one row to the next
  const int64_t* labels = nullptr;
  const double* sums = nullptr;  ///< of loss_sums
  bool is_mean = false;          ///< gradients are divided by sums[0]
  void* stats = nullptr;         ///< T [rows, 2]
  double* losses = nullptr;      ///< [rows]
  Scalar upstream;               ///< what arrives for the losses; 1 where it is null
  bool per_row = false;          ///< upstream has `rows` elements
  void* grad = nullptr;          ///< [rows, classes], or null
  math::Dtype grad_dtype = math::Dtype::kF32;
};
/// sums: [2], the sum of the labels' weights, labels that are not classes left out, and the sum of
/// all weights.
Status loss_sums(const LossRows& rows, double* sums, Stream stream);
/// Losses and stats, and the gradient where grad is set. A label that is neither a class nor the
/// ignored one makes loss and gradient of its row NaN.
Status loss_forward(const LossRows& rows, Stream stream);
/// The gradient from stats. It may be written over the logits where the dtypes are the same.
Status loss_backward(const LossRows& rows, Stream stream);
/// out, one float or double: the sum of `losses`, divided by sums[0] for a mean.
Status loss_total(const double* losses, int64_t rows, const double* sums, bool is_mean, void* out,
                  bool is_double, Stream stream);
/// out = grad * factor / divisor (1 where null), rows of `length` elements; factor has one element,
/// or one for each row. In place a factor of 1 leaves the memory alone.
struct Rescale {
  const void* grad = nullptr;
  math::Dtype dtype = math::Dtype::kF32;
  void* out = nullptr;
  math::Dtype out_dtype = math::Dtype::kF32;
  int64_t rows = 0, length = 0;
  Scalar factor, divisor;
  bool per_row = false;
};
Status rescale_rows(const Rescale& rescale, Stream stream);

}  // namespace halfstep::cuda
