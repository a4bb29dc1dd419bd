#pragma once

#include <halfstep/optim.h>

#include <map>
#include <string>
#include <vector>

#include "calls.h"

namespace halfstep::optim {

/// The tensors of one parameter group, in the order of its parameters (tied ones once).
struct Optimizer::Room {
  torch::optim::OptimizerParamGroup* group = nullptr;
  size_t index = 0;
  std::vector<const void*> listed;          ///< the group's parameters, tied ones too
  std::vector<at::Tensor> params, masters;  ///< params detached: ops may write them under autograd
  std::vector<at::Tensor> leaves;           ///< the parameters themselves, for their gradients
  std::vector<std::string> names;
  std::map<std::string, std::vector<at::Tensor>> states;
  at::Tensor steps, overflowed, lr;
  double lr_value = -1;
  std::vector<std::pair<int64_t, const void*>> seen;  ///< version and data after our last step
  std::vector<int64_t> reported;

  /// On a GPU, where the ops keep their rows of pointers between steps: device bytes and a mirror.
  std::vector<at::Tensor> stats_table, step_table;

  api::OptionalTensors grads() const;
  /// `kept` made to fit this group; empty on the CPU.
  api::Tensors table(std::vector<at::Tensor>& kept) const;
  bool has_grads() const;
  /// Arguments of a step; `state_keys` in the order of the op.
  api::StepFrame frame(const std::vector<const char*>& state_keys, const at::Tensor& control);
  const at::Tensor& device_lr();
  void remember(size_t first = 0);
  /// States of `key`, zero where there are none yet.
  std::vector<at::Tensor>& state(const std::string& key);
  /// States follow parameters that were moved to another device; a changed dtype is refused.
  void follow_move();
  /// Number of changed elements; names of changed parameters are appended.
  int64_t refresh(bool only_edited, std::string* names_changed);
  void report_overflow();
};

}  // namespace halfstep::optim

namespace halfstep {

bool is_sixteen(c10::ScalarType type);
/// "float16", as Python names it.
const char* type_name(c10::ScalarType type);

/// Bytes that an element of the tensor's storage seems to have where its dtype has fewer, else 0:
/// torch::load puts the storage of the file under the parameter, whatever the dtypes.
int64_t foreign_width(const at::Tensor& tensor);

/// What cast_model kept of a parameter: its FP32 value, taken once by the first optimizer.
at::Tensor take_exact(const at::Tensor& param);
void keep_exact(const at::Tensor& param, const at::Tensor& exact);
/// Parameters that belong to an optimizer: they cannot be cast any more.
void own(const at::Tensor& param);
void disown(const at::Tensor& param);

/// Refuses a value whose 16-bit weight would be infinite, or of another shape.
void check_fits(const at::Tensor& value, const at::Tensor& shape_of, c10::ScalarType dtype,
                const std::string& name);

}  // namespace halfstep
