#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/irange.h>

#include <map>
#include <numeric>
#include <set>

#include "../math/grads.h"
#include "backward.h"
#include "memory.h"
#include "room.h"

namespace halfstep::optim {

std::string name_of(const std::vector<std::string>& names, size_t group, size_t index) {
  if (group == 0 && index < names.size()) return names[index];
  return "group " + std::to_string(group) + ", parameter " + std::to_string(index);
}

namespace {

void check_parameter(const at::Tensor& param, const std::string& name) {
  const auto type = param.scalar_type();
  TORCH_CHECK(is_sixteen(type) || type == at::kFloat || type == at::kDouble, "'", name, "' is ",
              type_name(type), "; expected float16, bfloat16, float32 or float64");
  TORCH_CHECK(param.is_non_overlapping_and_dense(), "'", name, "' has strides ", param.strides(),
              " for shape ", param.sizes(), ": its elements overlap or leave gaps");
  const auto needed = size_t(param.numel()) * c10::elementSize(type);
  TORCH_CHECK(param.storage().nbytes() >= needed, "'", name, "' is ", type_name(type),
              " but its storage holds ", param.storage().nbytes(), " of ", needed, " bytes");
  if (is_sixteen(type))
    TORCH_CHECK(at::isfinite(param.detach()).all().item<bool>(), "'", name,
                "' holds a non-finite value; a ", type_name(type),
                " weight must be below 65520 in magnitude");
}

/// Refuses a parameter that torch::load left on the storage of a file of another dtype. Parameters
/// that share a storage are views of one buffer, whatever its size.
void check_storage(const std::vector<at::Tensor>& params, size_t i, const std::string& name) {
  const int64_t width = foreign_width(params[i]);
  if (width == 0) return;
  for (size_t k = 0; k < params.size(); ++k)
    if (k != i && params[k].unsafeGetTensorImpl() != params[i].unsafeGetTensorImpl() &&
        params[k].storage().is_alias_of(params[i].storage()))
      return;
  TORCH_CHECK(false, "params[", i, "] '", name, "' is ", type_name(params[i].scalar_type()),
              " but its storage holds ", width,
              "-byte elements: loaded with torch::load? use halfstep::load");
}

}  // namespace

Optimizer::Optimizer(std::vector<Group> groups, std::vector<std::string> names,
                     std::unique_ptr<Options> defaults, const char* kind)
    : torch::optim::Optimizer(groups, std::move(defaults)), names_(std::move(names)), kind_(kind) {}

Optimizer::~Optimizer() {
  stats_in_backward(false);
  for (const auto& room : rooms_)
    for (const auto& leaf : room->leaves) disown(leaf);
}

void Optimizer::add_param_group(const Group& group) {
  make_rooms();
  const size_t g = param_groups_.size();
  if (group.has_options()) check_options(group.options(), "parameter group " + std::to_string(g));
  for (size_t i = 0; i < group.params().size(); ++i) {
    check_parameter(group.params()[i], name_of(names_, g, i));
    check_storage(group.params(), i, name_of(names_, g, i));
    for (const auto& room : rooms_)
      for (size_t k = 0; k < room->leaves.size(); ++k)
        TORCH_CHECK(!room->leaves[k].is_same(group.params()[i]), "'", name_of(names_, g, i),
                    "' is in an earlier parameter group too, as '", room->names[k], "'");
  }
  torch::optim::Optimizer::add_param_group(group);
  if (in_backward_) place_hooks();  // its first gradients are seen already
}

void Optimizer::stats_in_backward(bool enabled) {
  for (const auto& stats : backward_) stats->remove();
  backward_.clear();
  in_backward_ = enabled;
  if (enabled) place_hooks();
}

void Optimizer::place_hooks() {
  while (backward_.size() < param_groups_.size())
    backward_.push_back(std::make_shared<BackwardStats>());
  for (const auto g : c10::irange(param_groups_.size()))
    backward_[g]->follow(param_groups_[g].params());
}

void Optimizer::make_rooms() {
  bool grown = false;
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    if (g == rooms_.size()) {
      rooms_.push_back(std::make_unique<Room>());
      rooms_[g]->index = g;
      rooms_[g]->owner = this;
      complete(param_groups_[g].options());
    }
    Room& room = *rooms_[g];
    room.group = &param_groups_[g];  // the vector may have moved
    check_options(room.group->options(), "parameter group " + std::to_string(g));
    const auto& params = room.group->params();
    bool same = room.listed.size() <= params.size();
    for (size_t i = 0; same && i < room.listed.size(); ++i)
      same = room.listed[i] == params[i].unsafeGetTensorImpl();
    TORCH_CHECK(same, "parameter group ", g,
                " no longer lists the parameters that it had; parameters can only be added");
    if (room.lr.defined() && room.listed.size() == params.size()) continue;
    extend(room);
    grown = true;
  }
  if (grown) api::release_freed_memory();  // the FP32 weights that a cast model kept, among others
}

/// Masters, states and counters for parameters that the group lists and the room does not know.
/// Nothing is kept when one of them is refused.
void Optimizer::extend(Room& room) {
  const CommonOptions& rules = common(room.group->options());
  const auto& params = room.group->params();
  std::map<const void*, std::string> owned;
  for (const auto& other : rooms_)
    if (other.get() != &room)
      for (const auto i : c10::irange(other->leaves.size()))
        owned.emplace(other->leaves[i].unsafeGetTensorImpl(), other->names[i]);
  std::set<const void*> inside(room.listed.begin(), room.listed.end());
  Room grown;
  for (size_t i = room.listed.size(); i < params.size(); ++i) {
    const at::Tensor& param = params[i];
    const std::string name = name_of(names_, room.index, i);
    grown.listed.push_back(param.unsafeGetTensorImpl());
    if (!inside.insert(param.unsafeGetTensorImpl()).second) continue;  // tied: stepped once
    const auto other = owned.find(param.unsafeGetTensorImpl());
    TORCH_CHECK(other == owned.end(), "'", name, "' is in an earlier parameter group too, as '",
                other == owned.end() ? "" : other->second, "'");
    check_parameter(param, name);
    check_storage(params, i, name);
    grown.leaves.push_back(param);
    grown.params.push_back(param.detach());
    grown.names.push_back(name);
    grown.masters.push_back(at::empty({0}, param.options().dtype(at::kFloat)));
  }
  const auto n = int64_t(grown.params.size());
  const auto device = room.steps.defined() ? room.steps.device()
                      : n > 0              ? grown.params[0].device()
                                           : at::Device(at::kCPU);
  const at::Tensor zeros = at::zeros({n}, at::TensorOptions(at::kLong).device(device));
  // Nothing below is refused.
  if (!room.lr.defined()) room.lr = at::zeros({}, at::TensorOptions(at::kDouble).device(device));
  room.steps = room.steps.defined() ? at::cat({room.steps, zeros}) : zeros.clone();
  room.overflowed = room.overflowed.defined() ? at::cat({room.overflowed, zeros}) : zeros.clone();
  const size_t before = room.leaves.size();
  const auto append = [](auto& to, auto& from) { to.insert(to.end(), from.begin(), from.end()); };
  append(room.listed, grown.listed);
  append(room.leaves, grown.leaves);
  append(room.params, grown.params);
  append(room.names, grown.names);
  append(room.masters, grown.masters);
  room.reported.resize(room.leaves.size(), 0);
  std::vector<size_t> trained;
  for (const auto i : c10::irange(before, room.leaves.size())) {
    room.frozen.insert(i);
    if (room.leaves[i].requires_grad()) trained.push_back(i);
  }
  for (const char* key : state_names(room.group->options())) room.state(key);
  room.begin_emas(true);
  room.furnish(trained);
  room.remember(before);
  for (const auto& leaf : grown.leaves) {
    own(leaf);
    if (rules.grad_dtype != at::kFloat || !is_sixteen(leaf.scalar_type())) continue;
    leaf.set_grad_dtype(at::kFloat);
    if (leaf.grad().defined()) at::Tensor(leaf).mutable_grad() = leaf.grad().to(at::kFloat);
  }
}

std::vector<std::pair<Optimizer::Room*, at::Tensor>> Optimizer::gather_stats() {
  make_rooms();
  if (in_backward_) place_hooks();  // on parameters that were added or unfrozen since
  std::vector<std::pair<Room*, at::Tensor>> stats;
  for (const auto& room : rooms_) {
    if (!room->has_grads()) continue;
    const auto grads = room->grads();
    const auto table = room->table(room->stats_table);
    stats.emplace_back(room.get(), in_backward_ ? backward_[room->index]->join(grads, table)
                                                : api::grad_stats(grads, table));
  }
  return stats;
}

void Optimizer::check_loaded_storages() const {
  for (const auto& room : rooms_)
    for (const auto i : c10::irange(room->leaves.size()))
      check_storage(room->leaves, i, room->names[i]);
}

void Optimizer::follow_edits() {
  check_loaded_storages();
  for (const auto& room : rooms_) {
    room->follow_move();
    room->thaw();
  }
  std::string changed;
  for (const auto& room : rooms_) room->refresh(true, &changed);
  if (!changed.empty())
    TORCH_WARN("weights changed since the last step; their masters follow:", changed);
}

void Optimizer::step_with(const at::Tensor& scale, const at::Tensor& found_inf,
                          const at::Tensor& clip,
                          const std::vector<std::pair<Room*, at::Tensor>>& stats, bool judged) {
  const at::NoGradGuard no_grad;
  make_rooms();
  follow_edits();
  const CommonOptions& rules = common(*defaults_);
  control_ = at::Tensor();
  if (!stats.empty() || found_inf.defined() || clip.defined() || scale.defined()) {
    const auto device = !stats.empty() ? stats[0].second.device() : found_inf.device();
    const auto there = [&](const at::Tensor& t) {
      return t.defined() ? api::OptionalTensor(api::to_device(t, device, t.scalar_type()))
                         : std::nullopt;
    };
    std::vector<at::Tensor> tables;
    for (const auto& entry : stats) tables.push_back(*there(entry.second));
    control_ = api::step_control(tables, there(scale), there(found_inf), there(clip),
                                 rules.max_grad_norm.value_or(-1.0));
    if (!judged && !rules.skip_nonfinite) control_[math::kControlFoundInf].fill_(0);
  }
  for (const auto& room : rooms_)
    if (room->has_grads()) {
      apply(*room, control_.defined() ? api::to_device(control_, room->steps.device(), at::kDouble)
                                      : control_);
      room->stepped();
    }
  for (const auto& stats : backward_) stats->forget();
  if (!judged && control_.defined() && control_.is_cpu())
    steps_skipped_ += control_.const_data_ptr<double>()[math::kControlFoundInf] != 0;
  for (const auto& room : rooms_) {
    room->remember();
    room->report_overflow();
  }
  at::autocast::clear_cache();
}

at::Tensor Optimizer::step(LossClosure closure) {
  at::Tensor loss;
  if (closure) {
    const at::AutoGradMode grad_mode(true);
    loss = closure();
  }
  const CommonOptions& rules = common(*defaults_);
  const bool needs_stats = rules.max_grad_norm || rules.skip_nonfinite;
  step_with({}, {}, {}, needs_stats ? gather_stats() : decltype(gather_stats()){}, false);
  return loss;
}

std::vector<at::Tensor> Optimizer::distinct_parameters() {
  make_rooms();
  std::vector<at::Tensor> all;
  for (const auto& room : rooms_) all.insert(all.end(), room->leaves.begin(), room->leaves.end());
  return all;
}

std::vector<at::Tensor> Optimizer::state_tensors() const {
  std::vector<at::Tensor> all;
  for (const auto& room : rooms_) {
    for (const auto& master : room->masters)
      if (master.numel() > 0) all.push_back(master);
    const auto append = [&](const std::vector<at::Tensor>& tensors) {
      for (const auto& tensor : tensors)
        if (tensor.numel() > 0) all.push_back(tensor);
    };
    for (const auto& [key, tensors] : room->states) append(tensors);
    for (const auto& [key, tensors] : room->scales) append(tensors);
    append(room->emas);
    all.push_back(room->steps);
  }
  return all;
}

std::vector<at::Tensor> Optimizer::master_params() {
  const at::NoGradGuard no_grad;
  make_rooms();
  follow_edits();
  std::vector<at::Tensor> all;
  for (const auto& room : rooms_) {
    if (room->params.empty()) continue;
    for (auto& value : api::read_masters(room->params, room->masters))
      all.push_back(std::move(value));
  }
  return all;
}

at::Tensor Optimizer::master_param(const at::Tensor& parameter) const {
  const at::NoGradGuard no_grad;
  for (const auto& room : rooms_)
    for (const auto i : c10::irange(room->leaves.size())) {
      if (!room->leaves[i].is_same(parameter)) continue;
      const at::Tensor here = parameter.detach(), master = room->masters[i];
      if (master.numel() > 0 && master.device() != here.device()) return here.to(at::kFloat);
      const bool edited = room->seen.size() <= i ||
                          room->seen[i] != std::pair<int64_t, const void*>(
                                               parameter._version(), parameter.const_data_ptr());
      // An edit since the last step is the truth; the next step makes the master follow.
      if (edited && is_remainder(master, here)) return here.to(at::kFloat);
      const at::Tensor exact = api::read_masters({here}, {master})[0];
      return at::where(exact.to(here.scalar_type()).eq(here), exact, here.to(exact.scalar_type()));
    }
  return {};
}

std::vector<at::Tensor> Optimizer::ema_params() {
  const at::NoGradGuard no_grad;
  make_rooms();
  follow_edits();
  bool any = false;
  std::vector<at::Tensor> all;
  for (const auto& room : rooms_) {
    if (room->params.empty()) continue;
    any = any || !room->emas.empty();
    // A frozen parameter has none: the exact weight.
    const auto exact = api::read_masters(room->params, room->masters);
    for (const auto i : c10::irange(exact.size()))
      all.push_back(room->emas.empty() || room->frozen.count(i) ? exact[i] : room->emas[i].clone());
  }
  TORCH_CHECK(any, "ema_params: no parameter group has an ema_decay");
  return all;
}

void Optimizer::set_master_params(const std::vector<at::Tensor>& values) {
  const at::NoGradGuard no_grad;
  make_rooms();
  const size_t expected = distinct_parameters().size();
  TORCH_CHECK(values.size() == expected, "set_master_params: values has ", values.size(),
              " entries but the optimizer has ", expected, " parameters");
  size_t k = 0;
  for (const auto& room : rooms_)
    for (const auto i : c10::irange(room->params.size()))
      check_fits(values[k++], room->params[i], room->params[i].scalar_type(), room->names[i]);
  k = 0;
  for (const auto& room : rooms_) {
    std::vector<at::Tensor> part;
    for (const auto& param : room->params) part.push_back(values[k++].to(param.device()));
    if (!part.empty())
      api::write_masters_(part, room->params, room->masters, at::zeros_like(room->overflowed));
    std::vector<size_t> every(room->params.size());
    std::iota(every.begin(), every.end(), size_t{0});
    room->restart_emas(every);
    room->remember();
  }
}

int64_t Optimizer::refresh_masters() {
  const at::NoGradGuard no_grad;
  make_rooms();
  int64_t total = 0;
  for (const auto& room : rooms_) {
    total += room->refresh(false, nullptr);
    room->remember();
  }
  return total;
}

}  // namespace halfstep::optim
