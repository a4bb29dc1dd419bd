#pragma once

// What the files of csrc/ops and the classes above them share with the dispatcher: typed lookup of
// registered ops, derivatives that end, and casting under autocast.

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <initializer_list>
#include <optional>
#include <string>

namespace halfstep::ops {

/// Keep the result in a function-local static: the lookup takes a lock.
template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// For backward ops that have no derivative of their own: `outputs`, computed below autograd from
/// `inputs`, raise "<op> is differentiable once" when somebody asks for it.
/// Undefined tensors are left out.
void differentiable_once(const char* op, std::initializer_list<const at::Tensor*> inputs,
                         std::initializer_list<at::Tensor*> outputs);

/// While it lives, autocast is off in this thread: an autocast kernel calls its op again.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};
/// The tensor in the dtype that autocast has for its device, where it is floating and lies there.
at::Tensor autocast_to_lower(const at::Tensor& tensor, at::DeviceType device);
std::optional<at::Tensor> autocast_to_lower(const std::optional<at::Tensor>& tensor,
                                            at::DeviceType device);

}  // namespace halfstep::ops
