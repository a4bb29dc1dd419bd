#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/irange.h>
#include <torch/serialize/archive.h>

#include <set>

#include "../math/grads.h"
#include "room.h"

namespace halfstep::optim {

namespace {

bool is_sixteen(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

/// Dtype of the tensor that keeps a parameter exact, or Undefined for none.
at::ScalarType master_type(Master mode, at::ScalarType param) {
  if (mode == Master::kAuto) mode = is_sixteen(param) ? Master::kSplit16 : Master::kNone;
  if (mode == Master::kNone || param == at::kDouble) return at::ScalarType::Undefined;
  if (mode == Master::kFp64) return at::kDouble;
  if (param == at::kFloat) return at::ScalarType::Undefined;
  return mode == Master::kFp32 ? at::kFloat : at::kShort;
}

void check_parameter(const at::Tensor& param, const std::string& name) {
  const auto type = param.scalar_type();
  TORCH_CHECK(is_sixteen(type) || type == at::kFloat || type == at::kDouble, "'", name, "' is ",
              type, "; expected float16, bfloat16, float32 or float64");
  TORCH_CHECK(param.is_non_overlapping_and_dense(), "'", name, "' has strides ", param.strides(),
              " for shape ", param.sizes(), ": its elements overlap or leave gaps");
  const auto needed = size_t(param.numel()) * c10::elementSize(type);
  TORCH_CHECK(param.storage().nbytes() >= needed, "'", name, "' is ", type,
              " but its storage holds ", param.storage().nbytes(), " of ", needed, " bytes");
  if (is_sixteen(type))
    TORCH_CHECK(at::isfinite(param.detach()).all().item<bool>(), "'", name,
                "' holds a non-finite value; a ", type, " weight must be below 65520 in magnitude");
}

}  // namespace

api::OptionalTensors Optimizer::Room::grads() const {
  api::OptionalTensors list;
  for (const auto i : c10::irange(leaves.size())) {
    const at::Tensor& grad = leaves[i].grad();
    TORCH_CHECK(!grad.defined() || !grad.is_sparse(), "'", names[i],
                "' has a sparse gradient; this optimizer supports dense gradients only");
    list.push_back(grad.defined() ? api::OptionalTensor(grad) : std::nullopt);
  }
  return list;
}

bool Optimizer::Room::has_grads() const {
  for (const auto& leaf : leaves)
    if (leaf.grad().defined()) return true;
  return false;
}

const at::Tensor& Optimizer::Room::device_lr() {
  const double value = group->options().get_lr();
  if (value != lr_value) lr.fill_(lr_value = value);
  return lr;
}

void Optimizer::Room::remember() {
  seen.clear();
  for (const auto& leaf : leaves)
    seen.emplace_back(int64_t(leaf._version()), leaf.const_data_ptr());
}

int64_t Optimizer::Room::refresh(bool only_edited, std::string* changed_names) {
  std::vector<at::Tensor> weights, kept;
  std::vector<size_t> which;
  for (const auto i : c10::irange(leaves.size())) {
    const bool edited =
        seen[i] != std::make_pair(int64_t(leaves[i]._version()),
                                  static_cast<const void*>(leaves[i].const_data_ptr()));
    if (edited) params[i] = leaves[i].detach();
    if (masters[i].numel() == 0 || (only_edited && !edited)) continue;
    weights.push_back(params[i]);
    kept.push_back(masters[i]);
    which.push_back(i);
  }
  if (which.empty()) return 0;
  const at::Tensor changed = at::zeros({int64_t(which.size())}, steps.options());
  api::refresh_masters_(weights, kept, changed, false);
  const at::Tensor host = changed.cpu();
  int64_t total = 0;
  for (const auto k : c10::irange(which.size())) {
    const int64_t count = host.const_data_ptr<int64_t>()[k];
    total += count;
    if (count > 0 && changed_names) *changed_names += " '" + names[which[k]] + "'";
  }
  return total;
}

void Optimizer::Room::report_overflow() {
  if (!overflowed.is_cpu()) return;  // a GPU is not waited for
  for (const auto i : c10::irange(params.size())) {
    const int64_t count = overflowed.const_data_ptr<int64_t>()[i];
    if (count == reported[i]) continue;
    TORCH_WARN("'", names[i], "' would leave ", params[i].scalar_type(), " range (",
               count - reported[i], " element(s), step ", steps.const_data_ptr<int64_t>()[i],
               "): keep it in FP32 or lower lr");
    reported[i] = count;
  }
}

Optimizer::Optimizer(std::vector<torch::optim::OptimizerParamGroup> groups,
                     std::vector<std::string> names,
                     std::unique_ptr<torch::optim::OptimizerOptions> defaults, const char* kind)
    : torch::optim::Optimizer(groups, std::move(defaults)), names_(std::move(names)), kind_(kind) {}

Optimizer::~Optimizer() = default;

void Optimizer::make_rooms() {
  std::set<const void*> owned;
  for (const auto& room : rooms_)
    for (const auto& leaf : room->leaves) owned.insert(leaf.unsafeGetTensorImpl());
  for (size_t g = 0; g < param_groups_.size(); ++g) {
    if (g < rooms_.size()) {
      rooms_[g]->group = &param_groups_[g];  // the vector may have moved
      continue;
    }
    auto room = std::make_unique<Room>();
    room->group = &param_groups_[g];
    room->index = g;
    const Common rules = common(param_groups_[g].options());
    std::set<const void*> inside;
    std::vector<at::Tensor> exact;
    const auto& params = param_groups_[g].params();
    for (size_t i = 0; i < params.size(); ++i) {
      const at::Tensor& param = params[i];
      const std::string name = g == 0 && i < names_.size() ? names_[i]
                                                           : "group " + std::to_string(g) +
                                                                 ", parameter " + std::to_string(i);
      if (!inside.insert(param.unsafeGetTensorImpl()).second) continue;  // tied: stepped once
      TORCH_CHECK(owned.count(param.unsafeGetTensorImpl()) == 0, "'", name,
                  "' is in an earlier parameter group too");
      check_parameter(param, name);
      const auto type = master_type(rules.master, param.scalar_type());
      const bool wide = param.scalar_type() == at::kDouble || type == at::kDouble;
      const at::Tensor weight = param.detach();
      room->leaves.push_back(param);
      room->params.push_back(weight);
      room->names.push_back(name);
      room->masters.push_back(type == at::ScalarType::Undefined
                                  ? at::empty({0}, weight.options().dtype(at::kFloat))
                                  : at::zeros_like(weight, weight.options().dtype(type)));
      for (const char* key : state_names(param_groups_[g].options()))
        room->states[key].push_back(
            at::zeros_like(weight, weight.options().dtype(wide ? at::kDouble : at::kFloat)));
      const at::Tensor kept = take_exact(param);
      exact.push_back(!kept.defined() ? weight
                                      : at::where(kept.to(weight.scalar_type()) == weight, kept,
                                                  weight.to(kept.scalar_type())));
    }
    const auto device = room->params.empty() ? at::Device(at::kCPU) : room->params[0].device();
    const auto n = int64_t(room->params.size());
    room->steps = at::zeros({n}, at::TensorOptions(at::kLong).device(device));
    room->overflowed = at::zeros({n}, at::TensorOptions(at::kLong).device(device));
    room->lr = at::zeros({}, at::TensorOptions(at::kDouble).device(device));
    room->reported.assign(size_t(n), 0);
    if (n > 0)
      api::write_masters_(exact, room->params, room->masters, at::zeros_like(room->overflowed));
    room->remember();
    owned.insert(inside.begin(), inside.end());
    rooms_.push_back(std::move(room));
  }
}

std::vector<std::pair<Optimizer::Room*, at::Tensor>> Optimizer::gather_stats() {
  make_rooms();
  std::vector<std::pair<Room*, at::Tensor>> stats;
  for (const auto& room : rooms_)
    if (room->has_grads()) stats.emplace_back(room.get(), api::grad_stats(room->grads()));
  return stats;
}

void Optimizer::follow_edits() {
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
  const Common rules = common(*defaults_);
  control_ = at::Tensor();
  if (!stats.empty() || found_inf.defined() || clip.defined() || scale.defined()) {
    const auto device = !stats.empty() ? stats[0].second.device() : found_inf.device();
    const auto there = [&](const at::Tensor& t) {
      return t.defined() ? api::OptionalTensor(t.to(device, t.scalar_type(), true)) : std::nullopt;
    };
    std::vector<at::Tensor> tables;
    for (const auto& entry : stats) tables.push_back(*there(entry.second));
    control_ = api::step_control(tables, there(scale), there(found_inf), there(clip),
                                 rules.max_grad_norm.value_or(-1.0));
    if (!judged && !rules.skip_nonfinite) control_[math::kControlFoundInf].fill_(0);
  }
  for (const auto& room : rooms_)
    if (room->has_grads())
      apply(*room,
            control_.defined() ? control_.to(room->steps.device(), at::kDouble, true) : control_);
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
  const Common rules = common(*defaults_);
  const bool needs_stats = rules.max_grad_norm || rules.skip_nonfinite;
  step_with({}, {}, {}, needs_stats ? gather_stats() : decltype(gather_stats()){}, false);
  return loss;
}

std::vector<at::Tensor> Optimizer::distinct_parameters() const {
  std::vector<at::Tensor> all;
  for (const auto& room : rooms_) all.insert(all.end(), room->leaves.begin(), room->leaves.end());
  return all;
}

std::vector<at::Tensor> Optimizer::state_tensors() const {
  std::vector<at::Tensor> all;
  for (const auto& room : rooms_) {
    for (const auto& master : room->masters)
      if (master.numel() > 0) all.push_back(master);
    for (const auto& [key, tensors] : room->states)
      all.insert(all.end(), tensors.begin(), tensors.end());
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

// ---- checkpoints
// ---------------------------------------------------------------------------------

void Optimizer::save(torch::serialize::OutputArchive& archive) const {
  c10::Dict<std::string, at::Tensor> state;
  for (const auto& room : rooms_)
    for (const auto i : c10::irange(room->params.size())) {
      const std::string at = std::to_string(room->index) + "." + std::to_string(i) + ".";
      state.insert(at + "step", room->steps[int64_t(i)].clone());
      for (const auto& [key, tensors] : room->states) state.insert(at + key, tensors[i].clone());
      state.insert(at + "master", api::read_masters({room->params[i]}, {room->masters[i]})[0]);
    }
  archive.write("halfstep_format", c10::IValue(int64_t(1)));
  archive.write("halfstep_optimizer", c10::IValue(std::string(kind_)));
  archive.write("halfstep_state", c10::IValue(state));
}

void Optimizer::load(torch::serialize::InputArchive& archive) {
  const at::NoGradGuard no_grad;
  make_rooms();
  c10::IValue format, kind, saved;
  TORCH_CHECK(archive.try_read("halfstep_format", format) &&
                  archive.try_read("halfstep_optimizer", kind) &&
                  archive.try_read("halfstep_state", saved),
              "the file holds no halfstep optimizer");
  TORCH_CHECK(format.toInt() == 1, "optimizer state has format ", format.toInt(),
              "; this halfstep reads format 1");
  TORCH_CHECK(kind.toStringRef() == kind_, "optimizer state is of ", kind.toStringRef(),
              " but this optimizer is ", kind_);
  const auto state = saved.toGenericDict();
  std::vector<std::pair<at::Tensor, at::Tensor>> copies;  // target, value: written after all checks
  size_t used = 0;
  for (const auto& room : rooms_)
    for (const auto i : c10::irange(room->params.size())) {
      const std::string at = std::to_string(room->index) + "." + std::to_string(i) + ".";
      const auto find = [&](const std::string& key) {
        TORCH_CHECK(state.contains(at + key), "optimizer state of '", room->names[i], "' has no '",
                    key, "'");
        ++used;
        return state.at(at + key).toTensor();
      };
      copies.emplace_back(room->steps[int64_t(i)], find("step"));
      for (const auto& [key, tensors] : room->states) {
        copies.emplace_back(tensors[i], find(key));
        TORCH_CHECK(copies.back().second.sizes() == tensors[i].sizes(), "optimizer state '", key,
                    "' of '", room->names[i], "' is ", copies.back().second.sizes(),
                    " but the parameter is ", tensors[i].sizes());
      }
      const at::Tensor value = find("master").to(room->params[i].device());
      check_fits(value, room->params[i], room->params[i].scalar_type(), room->names[i]);
      const at::Tensor weight = at::zeros_like(room->params[i]);
      const at::Tensor master = at::zeros_like(room->masters[i]);
      api::write_masters_({value}, {weight}, {master}, at::zeros({1}, room->steps.options()));
      const auto differs = (weight != room->params[i]).sum().item<int64_t>();
      TORCH_CHECK(differs == 0, "optimizer state is for other weights: '", room->names[i],
                  "' differs in ", differs, " of ", weight.numel(),
                  " elements; load the model first");
      copies.emplace_back(room->masters[i], master);
    }
  TORCH_CHECK(used == state.size(), "optimizer state has ", state.size(),
              " entries but this optimizer has ", used);
  for (auto& [target, value] : copies) target.copy_(value);
}

}  // namespace halfstep::optim
