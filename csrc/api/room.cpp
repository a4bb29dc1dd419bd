// The tensors of one parameter group: gradients, states, running means, edits and moves.

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/irange.h>

#include <algorithm>

#include "../math/states.h"
#include "room.h"

namespace halfstep {

bool is_signed_state(const std::string& key) {
  return key != "exp_avg_sq" && key != "max_exp_avg_sq" && key != "sum";
}

bool is_remainder(const at::Tensor& master, const at::Tensor& weight) {
  const auto type = master.scalar_type();
  return master.numel() > 0 &&
         (type == at::kShort || type == at::kChar || type == weight.scalar_type());
}

}  // namespace halfstep

namespace halfstep::optim {

namespace {

/// Dtype of the tensor that keeps a parameter exact, or Undefined for none.
at::ScalarType master_type(Master mode, at::ScalarType param) {
  if (mode == Master::kAuto) mode = is_sixteen(param) ? Master::kSplit16 : Master::kNone;
  if (mode == Master::kNone || mode == Master::kStochastic || param == at::kDouble)
    return at::ScalarType::Undefined;
  if (mode == Master::kFp64) return at::kDouble;
  if (param == at::kFloat) return at::ScalarType::Undefined;
  switch (mode) {
    case Master::kFp32:
      return at::kFloat;
    case Master::kSplit8:
      return at::kChar;
    case Master::kKahan:
      return param;
    default:
      return at::kShort;
  }
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

const CommonOptions& Optimizer::Room::rules() const { return owner->common(group->options()); }

api::StepFrame Optimizer::Room::frame(const at::Tensor& control) {
  const CommonOptions& options = rules();
  api::StepFrame f;
  f.params = params;
  const auto given = grads();
  if (owner->common(*owner->defaults_).zero_grads) {
    for (const auto i : c10::irange(given.size())) {
      const api::OptionalTensor grad = given.get(i);
      f.zeroed.push_back(grad ? *grad : at::empty({0}, steps.options().dtype(at::kFloat)));
    }
  } else {
    f.grads = given;
  }
  f.masters = masters;
  const auto keys = owner->state_names(group->options());
  const auto append = [&](const std::vector<at::Tensor>& tensors) {
    f.states.insert(f.states.end(), tensors.begin(), tensors.end());
  };
  for (const char* key : keys) append(state(key));
  for (const char* key : keys)
    if (const auto held = scales.find(key); held != scales.end()) append(held->second);
  f.emas = emas;
  f.ema_decay = options.ema_decay.value_or(1.0);
  f.stochastic = options.master == Master::kStochastic;
  f.seed = options.seed + (int64_t(index) << 32);
  f.steps = steps;
  f.overflowed = overflowed;
  f.lr = device_lr();
  if (control.defined()) f.control = control;
  f.table = table(step_table);
  return f;
}

void Optimizer::Room::stepped() {
  const bool zeroes = owner->common(*owner->defaults_).zero_grads;
  for (const auto i : c10::irange(leaves.size())) {
    const at::Tensor& grad = leaves[i].grad();
    if (!grad.defined()) continue;
    params[i].unsafeGetTensorImpl()->bump_version();
    if (zeroes) grad.unsafeGetTensorImpl()->bump_version();
  }
}

bool Optimizer::Room::has_grads() const {
  for (const auto& leaf : leaves)
    if (leaf.grad().defined()) return true;
  return false;
}

api::Tensors Optimizer::Room::table(std::vector<at::Tensor>& kept) const {
  constexpr int64_t kRow = 128;  // bytes that hold one row (cuda/kernels.h)
  if (!steps.defined() || !steps.is_cuda()) return {};
  const auto bytes = kRow * int64_t(params.size());
  if (kept.empty() || kept[0].device() != steps.device() || kept[0].numel() < bytes) {
    const auto options = at::TensorOptions(at::kByte);
    kept = {at::empty({bytes}, options.device(steps.device())), at::zeros({bytes}, options)};
  }
  return kept;
}

const at::Tensor& Optimizer::Room::device_lr() {
  const double value = group->options().get_lr();
  if (value != lr_value) lr.fill_(lr_value = value);
  return lr;
}

void Optimizer::Room::remember(size_t first) {
  seen.resize(leaves.size());
  for (const auto i : c10::irange(first, leaves.size()))
    seen[i] = {int64_t(leaves[i]._version()), leaves[i].const_data_ptr()};
}

at::ScalarType Optimizer::Room::compute_type(size_t i) const {
  const bool wide =
      params[i].scalar_type() == at::kDouble || masters[i].scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

at::Tensor Optimizer::Room::new_master(size_t i) const {
  const at::Tensor& param = params[i];
  const auto type = master_type(rules().master, param.scalar_type());
  return type == at::ScalarType::Undefined ? at::empty({0}, param.options().dtype(at::kFloat))
                                           : at::zeros_like(param, param.options().dtype(type));
}

void Optimizer::Room::furnish(const std::vector<size_t>& which) {
  if (which.empty()) return;
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> exact, weights, fresh;
  for (const size_t i : which) {
    params[i] = leaves[i].detach();  // a frozen parameter may have got other memory
    const at::Tensor kept = take_exact(leaves[i]), &param = params[i];
    exact.push_back(!kept.defined() ? param
                                    : at::where(kept.to(param.scalar_type()) == param, kept,
                                                param.to(kept.scalar_type())));
    weights.push_back(param);
    fresh.push_back(new_master(i));
  }
  const at::Tensor overflowed = at::zeros({int64_t(which.size())}, steps.options());
  api::write_masters_(exact, weights, fresh, overflowed);
  // Inside a captured graph this raises: each replay would begin the masters and states anew.
  if (!overflowed.is_cpu()) overflowed.cpu();
  for (const auto k : c10::irange(which.size())) {
    masters[which[k]] = fresh[k];
    frozen.erase(which[k]);
  }
  for (auto& [key, tensors] : states)
    for (const size_t i : which) begin_state(key, i);
  begin_emas(false, which);
}

void Optimizer::Room::thaw() {
  std::vector<size_t> which;
  for (const size_t i : frozen)
    if (leaves[i].grad().defined()) which.push_back(i);
  furnish(which);
}

std::vector<at::Tensor>& Optimizer::Room::state(const std::string& key) {
  auto& tensors = states[key];
  while (tensors.size() < params.size()) {
    tensors.emplace_back();
    begin_state(key, tensors.size() - 1);
  }
  return tensors;
}

void Optimizer::Room::begin_state(const std::string& key, size_t i) {
  const at::Tensor& param = params[i];
  const auto options = param.options();
  auto type = compute_type(i);
  at::Tensor& held = states[key][i];
  const char* single = owner->tensor_state();
  const bool present = frozen.count(i) == 0;
  if (single && key == single) {
    held = at::zeros({present ? 1 : 0}, options.dtype(type));
    return;
  }
  const States kind = rules().states;
  at::Tensor scale = at::empty({0}, options.dtype(at::kChar));
  if (type == at::kFloat && kind == States::kBf16) type = at::kBFloat16;
  if (type == at::kFloat && kind == States::kInt8) {
    type = is_signed_state(key) ? at::kChar : at::kByte;
    const auto blocks = (param.numel() + math::kStateBlock - 1) / math::kStateBlock;
    if (present) scale = at::full({blocks}, math::kLowestExponent, options.dtype(at::kChar));
  }
  held = present ? at::zeros_like(param, options.dtype(type)) : at::empty({0}, options.dtype(type));
  if (kind == States::kInt8) {
    auto& all = scales[key];
    if (all.size() <= i) all.resize(i + 1, at::empty({0}, options.dtype(at::kChar)));
    all[i] = scale;
  }
  if (!present) return;
  const double initial = owner->initial(group->options(), key);
  if (initial != 0)
    write_state(key, i, at::full_like(param, initial, options.dtype(compute_type(i))));
}

at::Tensor Optimizer::Room::scale_of(const std::string& key, size_t i) const {
  const auto type = states.at(key)[i].scalar_type();
  if (type == at::kChar || type == at::kByte) return scales.at(key)[i];
  return at::empty({0}, steps.options().dtype(at::kChar));
}

at::Tensor Optimizer::Room::read_state(const std::string& key, size_t i) const {
  const at::Tensor& held = states.at(key)[i];
  if (held.scalar_type() == at::kFloat || held.scalar_type() == at::kDouble) return held.clone();
  return api::read_state(held, scale_of(key, i), is_signed_state(key));
}

void Optimizer::Room::write_state(const std::string& key, size_t i, const at::Tensor& value) {
  const at::Tensor& held = states.at(key)[i];
  if (held.scalar_type() == at::kFloat || held.scalar_type() == at::kDouble)
    held.copy_(value.reshape(held.sizes()));
  else
    api::write_state_(value.to(at::kFloat), held, scale_of(key, i), is_signed_state(key),
                      rules().seed);
}

void Optimizer::Room::keep(const std::vector<const char*>& names) {
  const auto gone = [&](const auto& entry) {
    return std::none_of(names.begin(), names.end(),
                        [&](const char* name) { return entry.first == name; });
  };
  std::erase_if(states, gone);
  std::erase_if(scales, gone);
}

void Optimizer::Room::begin_emas(bool new_only, const std::vector<size_t>& which) {
  if (!rules().ema_decay && emas.empty()) return;
  std::vector<size_t> fresh = which;
  if (new_only)
    for (const auto i : c10::irange(emas.size(), params.size())) fresh.push_back(i);
  emas.resize(params.size());
  std::vector<at::Tensor> weights, kept;
  for (const size_t i : fresh)
    if (frozen.count(i)) emas[i] = at::empty({0}, params[i].options().dtype(at::kFloat));
  std::erase_if(fresh, [&](size_t i) { return frozen.count(i) > 0; });
  if (fresh.empty()) return;
  for (const size_t i : fresh) weights.push_back(params[i]), kept.push_back(masters[i]);
  const auto exact = api::read_masters(weights, kept);
  for (const auto k : c10::irange(fresh.size())) emas[fresh[k]] = exact[k];
}

void Optimizer::Room::restart_emas(const std::vector<size_t>& which) {
  if (emas.empty() || which.empty()) return;
  const at::Tensor host = steps.cpu();
  std::vector<size_t> fresh;
  for (const size_t i : which)
    if (host.const_data_ptr<int64_t>()[i] == 0) fresh.push_back(i);
  begin_emas(false, fresh);
}

void Optimizer::Room::follow_move() {
  for (const auto i : c10::irange(leaves.size()))
    TORCH_CHECK(leaves[i].scalar_type() == params[i].scalar_type(), "'", names[i], "' is ",
                type_name(leaves[i].scalar_type()), " but was ", type_name(params[i].scalar_type()),
                " when the optimizer was made; cast the model first, then make the optimizer");
  if (leaves.empty() || leaves[0].device() == steps.device()) return;
  const auto move = [&](at::Tensor& tensor) { tensor = tensor.to(leaves[0].device()); };
  move(steps), move(overflowed), move(lr);
  for (auto& master : masters) move(master);
  for (auto* map : {&states, &scales})
    for (auto& [key, tensors] : *map)
      for (auto& tensor : tensors) move(tensor);
  for (auto& ema : emas) move(ema);
}

int64_t Optimizer::Room::refresh(bool only_edited, std::string* changed_names) {
  std::vector<at::Tensor> weights, kept;
  std::vector<size_t> which, candidates;
  for (const auto i : c10::irange(leaves.size())) {
    const bool edited =
        seen[i] != std::make_pair(int64_t(leaves[i]._version()),
                                  static_cast<const void*>(leaves[i].const_data_ptr()));
    if (edited) params[i] = leaves[i].detach();
    if (edited || !only_edited) candidates.push_back(i);
    if (masters[i].numel() == 0 || (only_edited && !edited)) continue;
    weights.push_back(params[i]);
    kept.push_back(masters[i]);
    which.push_back(i);
  }
  if (which.empty()) {
    restart_emas(candidates);
    return 0;
  }
  const at::Tensor changed = at::zeros({int64_t(which.size())}, steps.options());
  api::refresh_masters_(weights, kept, changed, false);
  restart_emas(candidates);
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
    const int64_t elements = count - reported[i];
    TORCH_WARN("'", names[i], "' would leave ", type_name(params[i].scalar_type()), " range (",
               elements, elements > 1 ? " elements" : " element", ", step ",
               steps.const_data_ptr<int64_t>()[i], "): keep it in FP32 or lower lr");
    reported[i] = count;
  }
}

}  // namespace halfstep::optim
