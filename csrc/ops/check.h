#pragma once

// Argument checks shared by every backend and by Meta. All of them run before anything is written.

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <ostream>
#include <string>

namespace halfstep::ops {

/// "torch.float16[4, 3]", the way errors show a tensor.
std::string describe(const at::Tensor& tensor);
/// How errors call an argument: "lr", "params[3]". Costs nothing until it is printed.
struct Name {
  const char* list;
  int64_t index = -1;
};
std::ostream& operator<<(std::ostream& out, Name name);
inline Name item(const char* list, size_t index) { return {list, int64_t(index)}; }

bool is_supported_float(at::ScalarType type);
inline bool is_sixteen(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }
/// What `type` is computed in: FP64 for FP64, FP32 for everything else.
inline at::ScalarType wide_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}
inline at::ScalarType wide_type(const at::Tensor& tensor) {
  return wide_type(tensor.scalar_type());
}
/// Dtype that the update of parameter `index` is computed in: double where it or its master is
/// FP64.
at::ScalarType compute_type(const at::Tensor& param, const at::Tensor& master);

void check_same_length(const char* op, const char* list, size_t length, const char* reference,
                       size_t expected);
/// Parameters and masters only.
void check_masters(const char* op, at::TensorList params, at::TensorList masters);
/// int64 [n] tensors: one counter a parameter.
void check_counter(const char* op, const char* name, const at::Tensor& counter, size_t length,
                   at::TensorList params);
/// A 0-d or one-element tensor of the given dtype on the parameters' device.
void check_scalar(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type);
/// Both tensors on one device.
void check_device(const char* op, Name name, const at::Tensor& tensor, Name reference_name,
                  const at::Tensor& reference);
void check_control(const char* op, const std::optional<at::Tensor>& control);
void check_values(const char* op, at::TensorList values, at::TensorList params,
                  at::TensorList masters);
void check_write_masters(at::TensorList values, at::TensorList params, at::TensorList masters,
                         const at::Tensor& overflowed);
void check_refresh_masters(at::TensorList params, at::TensorList masters,
                           const at::Tensor& changed);
/// One optimizer state in bfloat16 or int8 (uint8 where it is not signed), and its scales.
void check_state(const char* op, const at::Tensor& state, const at::Tensor& scale, bool is_signed);
void check_state_value(const at::Tensor& value, const at::Tensor& state);
void check_grads(const char* op, const c10::List<std::optional<at::Tensor>>& grads);
void check_stats_row(const at::Tensor& grad, const at::Tensor& rows, int64_t index);
void check_stats_rest(const c10::List<std::optional<at::Tensor>>& grads, const at::Tensor& rows,
                      at::IntArrayRef stale);
void check_histogram(const c10::List<std::optional<at::Tensor>>& grads,
                     const std::optional<at::Tensor>& scale);
/// unscale_ and unscale_to_.
void check_unscale(const char* op, at::TensorList grads, at::TensorList outputs,
                   const at::Tensor& inv_scale, const at::Tensor& found_inf);

/// The descriptor table of a step: none, or {device bytes, CPU bytes} with room for `rows`.
void check_table(const char* op, at::TensorList table, const at::Tensor& reference, size_t rows,
                 size_t row_bytes);

/// Tables of grad_stats.
void check_stats(const char* op, at::TensorList stats);
void check_step_control(at::TensorList stats, const std::optional<at::Tensor>& scale,
                        const std::optional<at::Tensor>& found_inf,
                        const std::optional<at::Tensor>& clip);
/// State and policy vectors of the loss scale.
void check_scale_vector(const char* op, const char* name, const at::Tensor& tensor);
void check_update_scale(const char* op, const at::Tensor& scale, const at::Tensor& state,
                        const at::Tensor& found_inf, const at::Tensor& policy, at::TensorList stats,
                        const std::optional<at::Tensor>& proposal);
void check_simulate_scale(const at::Tensor& found_inf, const at::Tensor& policy,
                          const at::Tensor& state);

}  // namespace halfstep::ops
