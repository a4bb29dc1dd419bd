#pragma once

// Gradient statistics made while the gradients appear, in the backward, so that the step need not
// read them again. The same as python/halfstep/_backward.py.

#include <halfstep/optim.h>

#include <c10/util/intrusive_ptr.h>

#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "calls.h"

namespace halfstep::optim {

/// The rows of grad_stats of one group's parameters, each with the gradient that it describes. The
/// hooks hold it weakly. see() is called in the threads of the backward, the rest in the
/// optimizer's own.
class Optimizer::BackwardStats : public std::enable_shared_from_this<BackwardStats> {
 public:
  /// A hook on every parameter of the group's list that can have a gradient and has none of ours.
  void follow(const std::vector<at::Tensor>& listed);
  /// Takes the hooks off.
  void remove();
  /// grad_stats(grads), bit for bit; only gradients without a valid row are read.
  at::Tensor join(const api::OptionalTensors& grads, api::Tensors table);
  /// The step is over: it may have written the gradients (zeroed them), so a row is used once.
  void forget();

 private:
  class Hook;
  /// A gradient as it was read. The weak reference keeps the address from being given to another.
  struct Known {
    c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor;
    int64_t version;
    const void* data;
  };

  /// What is known of row i, and who is writing it: backward passes in several threads call the
  /// hooks of a parameter at the same time.
  struct Row {
    std::optional<Known> known;
    int readers = 0;
    bool contested = false;  ///< there was more than one since there was none
  };
  /// One of the readers of row i, from its start to its end.
  class Reading;

  /// Reads the gradient of parameter i, which was just written, while it is in the cache.
  void see(size_t i, const at::Tensor& grad);
  at::Tensor rows_on(c10::Device device);
  /// Whether row i still describes `grad`: the same tensor, in the same memory, not written since.
  bool fresh(size_t i, const at::Tensor& grad) const;

  size_t listed_ = 0;  ///< entries of the group's list that are known here
  std::set<const void*> inside_;
  std::vector<at::Tensor> params_;             ///< tied ones once, as in the group's room
  std::vector<std::weak_ptr<size_t>> placed_;  ///< one a parameter, alive while its hook is
  std::mutex mutex_;                           ///< of the two below; no op runs under it
  at::Tensor rows_;
  std::vector<Row> known_;
};

}  // namespace halfstep::optim
