#pragma once

// What callbacks of RecordFunction need that look at the ops of a run.

#include <ATen/core/Tensor.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace halfstep::api {

/// Inside, ops are neither recorded nor cast: those of the observer itself.
struct Unobserved {
  at::DisableRecordFunctionGuard unrecorded;
  c10::impl::ExcludeDispatchKeyGuard uncast{c10::autocast_dispatch_keyset};
};

/// One more running, of what `count` counts, until the end of the scope or an exception.
class Running {
 public:
  explicit Running(int& count) : count_(count) { ++count_; }
  ~Running() { --count_; }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  int& count_;
};

/// Whether an op writes into this argument.
inline bool is_written(const c10::Argument& argument) {
  return argument.alias_info() && argument.alias_info()->isWrite();
}

/// visit(tensor, index) of each tensor of an argument or a result; index: in its list, or -1.
template <class Visit>
void each_tensor(const c10::IValue& value, Visit&& visit) {
  if (value.isTensor()) return visit(value.toTensor(), int64_t(-1));
  if (!value.isList()) return;
  const c10::ArrayRef<c10::IValue> items = value.toListRef();
  for (size_t i = 0; i < items.size(); ++i)
    if (items[i].isTensor()) visit(items[i].toTensor(), int64_t(i));
}

}  // namespace halfstep::api
