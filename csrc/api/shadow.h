#pragma once

// One layer of a training step computed once more in FP32, op by op: what FP16 loses in it. The
// same as python/halfstep/_shadow.py, which has the hooks of a module for it (docs/monitor.md).

#include <halfstep/optim.h>
#include <halfstep/shares.h>

#include <c10/util/intrusive_ptr.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "replay.h"

namespace torch::nn {
class Module;
}

namespace halfstep::api {

struct LayerParameter {
  std::string name;
  at::Tensor tensor;
  bool shared = false;  ///< another layer has it too
  bool first = true;    ///< and this one is the first
};
struct Layer {
  std::string name;
  std::vector<LayerParameter> parameters;
  std::shared_ptr<const torch::nn::Module> module;  ///< does not own the model itself
};

/// What owns parameters: "blocks.0.fc" of "blocks.0.fc.weight". One that has only parameters of
/// layers before it is none: its ops are theirs.
std::vector<Layer> layers_of(const torch::nn::Module& model);

/// What was counted in one tensor. kind: weight, activation, activation gradient, weight gradient.
struct Counted {
  std::string name;
  const char* kind;
  Shares shares;
};

/// Watches one layer in the thread that makes it, from watch() to finish(), mostly one step.
///
/// Each op call with one of the layer's parameters among its arguments is computed again in FP32 on
/// the exact weights, from the arguments that it got; its gradients in FP32 from the gradients that
/// came back to its results. A call counts if one came back. Ops inside an op are its own affair.
/// What only shows or casts a parameter stands for it, and an op that writes into the result of a
/// call (`y += bias`) goes on with that call. Nothing is thrown: error() says why the layer cannot
/// be computed so. The training sees no difference.
class Shadow : public std::enable_shared_from_this<Shadow> {
 public:
  /// `layers`: all of the model. `ours`: knows the exact weights; may be null.
  static std::shared_ptr<Shadow> watch(const std::vector<Layer>& layers, size_t which,
                                       const optim::Optimizer* ours);
  ~Shadow();

  /// No more watching. What was counted in the step; empty where no call was one of training, or
  /// with an error.
  std::vector<Counted> finish();
  const std::string& error() const { return error_; }

  /// An op from before it runs to behind it: null where it is none of the layer's.
  struct Pending;
  std::shared_ptr<Pending> before(const c10::OperatorHandle& op,
                                  c10::ArrayRef<c10::IValue> inputs) noexcept;
  void behind(Pending& pending, c10::ArrayRef<c10::IValue> outputs) noexcept;

 private:
  struct Call;
  struct Arrival;
  class Stored;
  using Key = const c10::TensorImpl*;
  /// Of tensors that are known again: their memory is not used for others while this lives.
  using Weak = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Follower {  ///< a tensor that shows a parameter
    Weak tensor;
    at::Tensor wide;
    const LayerParameter* of;
  };
  struct Result {  ///< of a call
    Weak tensor;
    uint32_t version;  ///< of its values
    std::shared_ptr<Call> call;
    size_t index;
  };

  Shadow(const std::vector<Layer>& layers, size_t which, const optim::Optimizer* ours);
  void unwatch();
  void forget();
  /// What goes wrong in `look` is kept, and ends the watching; the user's step goes on.
  void guarded(const std::string& what, const std::function<void()>& look) noexcept;

  const LayerParameter* parameter_of(const at::Tensor& tensor) const;
  bool is_call(const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> inputs) const;
  const LayerParameter* shown(const c10::FunctionSchema& schema,
                              c10::ArrayRef<c10::IValue> inputs) const;
  void make_leaves();
  at::Tensor exact(const at::Tensor& parameter) const;
  at::Tensor stand_in(const at::Tensor& tensor, bool written, Pending& pending);
  void follow(const LayerParameter* parameter, const std::vector<at::Tensor>& outputs,
              const std::vector<at::Tensor>& wide);
  void add_call(Pending& pending, const std::vector<at::Tensor>& outputs,
                const std::vector<at::Tensor>& wide, bool trains);
  void listen(const std::shared_ptr<Call>& call, size_t index, const at::Tensor& source);
  void came(Call& call, size_t index, int64_t version, const at::Tensor& grad) noexcept;
  void stored(const at::Tensor& parameter) noexcept;
  std::vector<Counted> counted();

  Layer layer_;
  const optim::Optimizer* ours_;
  std::unordered_map<Key, const LayerParameter*> own_;  ///< into layer_
  std::unordered_map<Key, bool> others_;  ///< parameters of other layers: whether of no second one
  std::mutex mutex_;                      ///< gradients come in the threads of their devices
  bool watching_ = false;
  std::string error_;
  std::unordered_map<Key, at::Tensor> leaves_;  ///< the exact weights in FP32
  std::unordered_map<Key, Follower> followers_;
  std::unordered_map<Key, Result> results_;
  std::vector<std::shared_ptr<Call>> calls_;
  std::vector<Arrival> arrivals_;                ///< gradients, in their order
  std::unordered_map<Key, at::Tensor> nonzero_;  ///< where .grad was not 0
};

/// From here on the ops of this thread are shown to the shadow. shadow_watch.cpp.
void show_ops(const std::shared_ptr<Shadow>& shadow);
/// And from here on not; no callback stays where none is watched.
void hide_ops(const Shadow* shadow);

}  // namespace halfstep::api
