#include "backward.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <c10/util/irange.h>

#include "../math/grads.h"
#include "stored_hook.h"

namespace halfstep::optim {

namespace {

at::Tensor empty_rows(size_t count, c10::Device device) {
  return at::zeros({int64_t(count), math::kStatColumns},
                   at::TensorOptions(at::kDouble).device(device));
}

}  // namespace

/// Stands behind a hook that was there, so that it reads what that one leaves.
class Optimizer::BackwardStats::Hook : public api::StoredHook {
 public:
  Hook(const std::shared_ptr<BackwardStats>& to, std::shared_ptr<size_t> index)
      : StoredHook(to.get()), to_(to), index_(std::move(index)) {}
  void operator()(const at::Tensor& parameter) override {
    const auto to = to_;  // copies: the other hook may take this one off
    const size_t i = *index_;
    go_on(parameter);
    if (const auto there = to.lock()) there->see(i, parameter.grad());
  }

 private:
  std::weak_ptr<BackwardStats> to_;
  std::shared_ptr<size_t> index_;
};

void Optimizer::BackwardStats::follow(const std::vector<at::Tensor>& listed) {
  for (; listed_ < listed.size(); ++listed_)
    if (inside_.insert(listed[listed_].unsafeGetTensorImpl()).second)
      params_.push_back(listed[listed_]);
  if (placed_.size() < params_.size()) {
    at::Tensor grown = rows_;
    if (grown.defined())
      grown = at::cat({grown, empty_rows(params_.size() - placed_.size(), grown.device())});
    placed_.resize(params_.size());
    const std::lock_guard<std::mutex> lock(mutex_);
    rows_ = grown;
    known_.resize(params_.size());
  }
  for (const auto i : c10::irange(params_.size())) {
    if (!params_[i].requires_grad() || !placed_[i].expired()) continue;
    const auto index = std::make_shared<size_t>(i);
    api::StoredHook::link(params_[i], std::make_unique<Hook>(shared_from_this(), index));
    placed_[i] = index;
  }
}

void Optimizer::BackwardStats::remove() {
  for (const auto& param : params_) api::StoredHook::unlink(param, this);
}

at::Tensor Optimizer::BackwardStats::rows_on(c10::Device device) {
  size_t count = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (rows_.defined() && rows_.device() == device) return rows_;
    count = known_.size();
  }
  const at::Tensor made = empty_rows(count, device);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (rows_.defined() && rows_.device() == device) return rows_;
  rows_ = made;  // the parameters were moved: what was known is of gradients elsewhere
  for (Row& row : known_) row.known.reset();
  return rows_;
}

class Optimizer::BackwardStats::Reading {
 public:
  Reading(BackwardStats& of, size_t i) : of_(of), i_(i) {
    const std::lock_guard<std::mutex> lock(of_.mutex_);
    Row& row = of_.known_[i_];
    row.known.reset();
    if (row.readers++ > 0) row.contested = true;
  }
  ~Reading() {
    const std::lock_guard<std::mutex> lock(of_.mutex_);
    Row& row = of_.known_[i_];
    if (--row.readers == 0) row.contested = false;
  }
  Reading(const Reading&) = delete;
  Reading& operator=(const Reading&) = delete;

 private:
  BackwardStats& of_;
  const size_t i_;
};

void Optimizer::BackwardStats::see(size_t i, const at::Tensor& grad) {
  const at::NoGradGuard no_grad;
  const Reading reading(*this, i);
  // An inference tensor counts no versions.
  if (!grad.defined() || grad.layout() != at::kStrided || grad.is_inference()) return;
  const auto version = int64_t(grad._version());  // of before: another thread may add to it now
  const at::Tensor rows = rows_on(grad.device());
  api::grad_stats_row_(grad, rows, int64_t(i));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!rows.is_same(rows_) || known_[i].contested || version != int64_t(grad._version())) return;
  known_[i].known =
      Known{decltype(Known::tensor)(grad.getIntrusivePtr()), version, grad.const_data_ptr()};
}

bool Optimizer::BackwardStats::fresh(size_t i, const at::Tensor& grad) const {
  const auto& known = known_[i].known;
  return known && known->tensor.lock().get() == grad.unsafeGetTensorImpl() &&
         known->version == int64_t(grad._version()) && known->data == grad.const_data_ptr();
}

at::Tensor Optimizer::BackwardStats::join(const api::OptionalTensors& grads, api::Tensors table) {
  std::vector<int64_t> stale;
  std::optional<c10::Device> device;
  size_t there = 0;
  at::Tensor rows;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    rows = rows_;
    for (const auto i : c10::irange(grads.size())) {
      const api::OptionalTensor grad = grads.get(i);
      if (!grad) continue;
      if (!device) device = grad->device();
      ++there;
      if (!fresh(i, *grad)) stale.push_back(int64_t(i));
    }
  }
  if (stale.size() == there || *device != rows.device()) return api::grad_stats(grads, table);
  return api::grad_stats_rest(grads, rows, stale, table);
}

void Optimizer::BackwardStats::forget() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Row& row : known_) row.known.reset();
}

}  // namespace halfstep::optim
