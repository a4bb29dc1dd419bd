#pragma once

// What the tests of stats_in_backward share: a count of what is read, and hooks of a user.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/function_hook.h>

#include <mutex>

#include "api.h"

namespace backward_stats {

/// What the dispatcher saw of the ops of statistics since it was made. One at a time.
class Seen {
 public:
  Seen() {
    now_ = this;
    auto callback = at::RecordFunctionCallback(&look).needsInputs(true);
    handle_ = at::addGlobalCallback(callback.scopes({at::RecordScope::FUNCTION}));
  }
  ~Seen() {
    at::removeCallback(handle_);
    now_ = nullptr;
  }
  int rows = 0;    ///< gradients read by a hook
  int joins = 0;   ///< tables made of such rows
  int passes = 0;  ///< tables made by reading every gradient
  int reread = 0;  ///< gradients read by those two

 private:
  static std::unique_ptr<at::ObserverContext> look(const at::RecordFunction& call) {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    const std::string name = call.name();
    if (name == "halfstep::grad_stats_row_") ++now_->rows;
    if (name == "halfstep::grad_stats_rest") {
      ++now_->joins;
      now_->reread += int(call.inputs()[2].toIntVector().size());
    }
    if (name == "halfstep::grad_stats") {
      ++now_->passes;
      for (const c10::IValue& grad : call.inputs()[0].toListRef()) now_->reread += !grad.isNone();
    }
    return nullptr;
  }
  static inline Seen* now_ = nullptr;
  at::CallbackHandle handle_ = 0;
};

template <class Base>
struct Open : Base {
  using Base::Base;
  using Base::gather_stats;
};

inline torch::nn::Sequential net_of(at::ScalarType dtype) {
  torch::manual_seed(0);
  torch::nn::Sequential net(torch::nn::Linear(33, 70), torch::nn::Tanh(), torch::nn::Linear(70, 70),
                            torch::nn::Tanh(), torch::nn::Linear(70, 5));
  if (dtype != torch::kFloat) halfstep::cast_model(*net, dtype);
  return net;
}

inline at::Tensor loss_of(torch::nn::Sequential& net, int64_t seed) {
  const bool half = net->parameters()[0].scalar_type() != torch::kFloat;
  const halfstep::AutocastGuard guard(torch::kCPU, torch::kHalf, half);
  torch::manual_seed(uint64_t(seed));
  return net->forward(torch::randn({9, 33})).to(torch::kFloat).square().mean();
}

inline void backward(torch::nn::Sequential& net, int64_t seed = 0) {
  (loss_of(net, seed) * 1024).backward();
}

inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return torch::equal(a.view(torch::kLong), b.view(torch::kLong));
}

inline at::Tensor one_pass(const std::vector<at::Tensor>& params) {
  c10::List<std::optional<at::Tensor>> grads;
  for (const auto& p : params)
    grads.push_back(p.grad().defined() ? std::optional(p.grad()) : std::nullopt);
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("halfstep::grad_stats", "")
          .typed<at::Tensor(const c10::List<std::optional<at::Tensor>>&, at::TensorList)>();
  return op.call(grads, {});
}

/// The optimizer's table is that of one pass, and `reread` gradients were read for it.
template <class O>
void check(O& opt, int reread, size_t group = 0) {
  at::Tensor table;
  {
    const Seen seen;
    table = opt.gather_stats().at(group).second;
    CHECK(seen.reread == reread);
    CHECK(seen.rows == 0);
  }
  CHECK(same_bits(table, one_pass(opt.param_groups()[group].params())));
}

inline torch::autograd::PostAccumulateGradHook* hook_of(const at::Tensor& p) {
  return torch::autograd::impl::post_acc_grad_hooks(p).get();
}

/// A hook of the user.
struct Hook : torch::autograd::PostAccumulateGradHook {
  explicit Hook(std::function<void(const at::Tensor&)> does) : does_(std::move(does)) {}
  void operator()(const at::Tensor& p) override { does_(p); }
  std::function<void(const at::Tensor&)> does_;
};

inline void set_hook(const at::Tensor& p, std::function<void(const at::Tensor&)> does) {
  torch::autograd::impl::set_post_acc_grad_hooks(p, std::make_unique<Hook>(std::move(does)));
}

}  // namespace backward_stats
