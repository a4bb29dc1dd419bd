#pragma once

// A tensor has one hook behind the accumulation of its gradient. Ours are links of a chain that
// ends in the hook of the user, if there is one.

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <utility>

namespace halfstep::api {

class StoredHook : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit StoredHook(const void* owner) : owner_(owner) {}

  /// Puts `hook` in front of what `parameter`, a leaf that requires a gradient, has.
  static void link(const at::Tensor& parameter, std::unique_ptr<StoredHook> hook) {
    auto& first = torch::autograd::impl::post_acc_grad_hooks(parameter);
    hook->next_ = std::move(first);
    first = std::move(hook);
  }
  /// Takes the one of `owner` out of the chain; those of others stay. One behind a hook of the
  /// user cannot be reached, so it must do without its owner.
  static void unlink(const at::Tensor& parameter, const void* owner) {
    if (!torch::autograd::impl::get_autograd_meta(parameter)) return;
    auto* at = &torch::autograd::impl::post_acc_grad_hooks(parameter);
    while (auto* hook = dynamic_cast<StoredHook*>(at->get())) {
      if (hook->owner_ != owner) {
        at = &hook->next_;
        continue;
      }
      auto next = std::move(hook->next_);  // apart: the assignment ends the hook
      *at = std::move(next);
      return;
    }
  }

 protected:
  /// The hook that was there before.
  void go_on(const at::Tensor& parameter) {
    if (next_) (*next_)(parameter);
  }

 private:
  const void* owner_;
  std::unique_ptr<PostAccumulateGradHook> next_;
};

}  // namespace halfstep::api
