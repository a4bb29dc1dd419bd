#pragma once

#include <halfstep/optim.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "calls.h"

namespace halfstep::optim {

/// Of a parameter by its group and place; `names` are those of the first group.
std::string name_of(const std::vector<std::string>& names, size_t group, size_t index);

/// The tensors of one parameter group, in the order of its parameters (tied ones once).
struct Optimizer::Room {
  const Optimizer* owner = nullptr;
  torch::optim::OptimizerParamGroup* group = nullptr;
  size_t index = 0;
  std::vector<const void*> listed;          ///< the group's parameters, tied ones too
  std::vector<at::Tensor> params, masters;  ///< params detached: ops may write them under autograd
  std::vector<at::Tensor> leaves;           ///< the parameters themselves, for their gradients
  std::vector<std::string> names;
  std::map<std::string, std::vector<at::Tensor>> states;
  std::map<std::string, std::vector<at::Tensor>> scales;  ///< of int8 states; empty for others
  std::vector<at::Tensor> emas;                           ///< empty without ema_decay
  at::Tensor steps, overflowed, lr;
  double lr_value = -1;
  std::vector<std::pair<int64_t, const void*>> seen;  ///< version and data after our last step
  std::vector<int64_t> reported;
  /// Parameters that required no gradient when they were added and had none since: they have
  /// neither master nor states (empty tensors stand for them).
  std::set<size_t> frozen;

  /// On a GPU, where the ops keep their rows of pointers between steps: device bytes and a mirror.
  std::vector<at::Tensor> stats_table, step_table;

  api::OptionalTensors grads() const;
  /// `kept` made to fit this group; empty on the CPU.
  api::Tensors table(std::vector<at::Tensor>& kept) const;
  bool has_grads() const;
  const CommonOptions& rules() const;
  /// Arguments of a step.
  api::StepFrame frame(const at::Tensor& control);
  /// After a step: autograd must know of what was written, and an edit not be taken for ours.
  void stepped();
  const at::Tensor& device_lr();
  void remember(size_t first = 0);

  /// Masters and states for parameters that have none; masters begin at what cast_model kept of
  /// the FP32 weights, else at the weights.
  void furnish(const std::vector<size_t>& which);
  /// Frozen parameters that got a gradient are furnished.
  void thaw();
  /// The master that parameter i has, or would have: zeros; empty for none.
  at::Tensor new_master(size_t i) const;
  /// What parameter i is updated in.
  at::ScalarType compute_type(size_t i) const;
  /// States of `key`, as before the first step where there are none yet.
  std::vector<at::Tensor>& state(const std::string& key);
  /// State `key` of parameter i as before the first step.
  void begin_state(const std::string& key, size_t i);
  /// A copy, in FP32 where it is held in less.
  at::Tensor read_state(const std::string& key, size_t i) const;
  void write_state(const std::string& key, size_t i, const at::Tensor& value);
  at::Tensor scale_of(const std::string& key, size_t i) const;
  /// Only the states of these names are kept.
  void keep(const std::vector<const char*>& names);
  /// Running means begin at the exact weights as they are; with `new_only` where there are none.
  void begin_emas(bool new_only, const std::vector<size_t>& which = {});
  /// An edit before the first step of a parameter is its initial value: its mean begins there.
  void restart_emas(const std::vector<size_t>& which);

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

/// A second moment: never negative, as an int8 state uint8 codes of its root.
bool is_signed_state(const std::string& key);
/// Whether a master holds what is left of the exact weight beside the weight itself.
bool is_remainder(const at::Tensor& master, const at::Tensor& weight);

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
