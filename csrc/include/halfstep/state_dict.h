#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/ordered_dict.h>

#include <string>
#include <vector>

#include "export.h"

namespace halfstep {

/// What a checkpoint holds, as in Python: a dict of tensors, numbers, strings, lists, tuples and
/// dicts. A handle: copies share the entries.
///   halfstep::StateDict checkpoint;
///   checkpoint.insert("model", halfstep::state_dict(*net));
///   checkpoint.insert("optimizer", opt.state_dict());
///   checkpoint.insert("epoch", 3);
class HALFSTEP_API StateDict {
 public:
  StateDict();
  /// The dict in `value`, as at() returns it; anything else is refused.
  StateDict(const c10::IValue& value);  // NOLINT: implicit, so that at() can be passed on
  /// What export_state_dict returns.
  StateDict(const torch::OrderedDict<std::string, at::Tensor>& tensors);  // NOLINT: implicit

  /// Sets an entry, new or not.
  StateDict& insert(const std::string& key, c10::IValue value);
  StateDict& insert(const std::string& key, const StateDict& value);
  bool contains(const std::string& key) const;
  /// The entry; a missing one raises with the keys that there are.
  c10::IValue at(const std::string& key) const;
  /// The keys that are strings, in their order.
  std::vector<std::string> keys() const;
  size_t size() const;
  operator c10::IValue() const;  // NOLINT: it is one

 private:
  c10::impl::GenericDict entries_;
};

}  // namespace halfstep
