// State dicts of optimizers: format 1, the same in Python (python/halfstep/checkpoint.py).

#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/irange.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "../math/states.h"
#include "room.h"

namespace halfstep::optim {

namespace {

c10::impl::GenericList new_list() { return c10::impl::GenericList(c10::AnyType::get()); }

std::string keys_of(const StateDict& dict) {
  std::string text;
  for (const auto& key : dict.keys()) text += (text.empty() ? "" : ", ") + key;
  return text;
}

/// Over the bits of a 16-bit weight: what shows that a remainder belongs to another weight.
int64_t checksum(const at::Tensor& weight) {
  constexpr int64_t kBlock = int64_t(1) << 20;  // sums of a block stay below 2^57
  const at::Tensor bits = weight.contiguous().view(at::kShort).flatten();
  const at::Tensor places =
      at::arange(1, 2 * std::min(kBlock, bits.numel()) + 1, 2, bits.options().dtype(at::kLong));
  uint64_t total = 0;
  for (int64_t start = 0; start < bits.numel(); start += kBlock) {
    const at::Tensor block = bits.slice(0, start, std::min(start + kBlock, bits.numel()));
    const at::Tensor sum = ((block.to(at::kLong) + 1) * places.slice(0, 0, block.numel())).sum();
    total = (total * 1000003 + uint64_t(sum.item<int64_t>())) & ((uint64_t(1) << 62) - 1);
  }
  return int64_t(total);
}

/// A state dict that was read, with refusals that say what it lacks.
struct Saved {
  bool ours = false;
  c10::impl::GenericDict state;
  std::vector<StateDict> groups;

  explicit Saved(const StateDict& dict)
      : state(c10::impl::GenericDict(c10::AnyType::get(), c10::AnyType::get())) {
    for (const char* key : {"state", "param_groups"})
      TORCH_CHECK(dict.contains(key), "optimizer state has no '", key, "' (keys: ", keys_of(dict),
                  ")");
    ours = dict.contains("format");
    if (ours) {
      const c10::IValue format = dict.at("format");
      TORCH_CHECK(format.isInt() && format.toInt() == 1, "optimizer state has format ", format,
                  "; this halfstep reads format 1");
    }
    TORCH_CHECK(dict.at("state").isGenericDict() && dict.at("param_groups").isList(),
                "optimizer state has a 'state' of type ", dict.at("state").tagKind(),
                " and 'param_groups' of type ", dict.at("param_groups").tagKind(),
                "; expected a dict and a list");
    state = dict.at("state").toGenericDict();
    const c10::IValue list = dict.at("param_groups");
    for (const c10::IValue& group : list.toListRef()) groups.emplace_back(group);
  }

  /// Ours says it; of torch's files the hyperparameters tell.
  std::string kind(const StateDict& dict) const {
    if (dict.contains("optimizer") && dict.at("optimizer").isString())
      return dict.at("optimizer").toStringRef();
    if (groups.empty()) return "";
    if (groups[0].contains("betas") && groups[0].contains("eps")) {
      if (!groups[0].contains("decoupled_weight_decay")) return "Adam or AdamW";
      return groups[0].at("decoupled_weight_decay").toBool() ? "AdamW" : "Adam";
    }
    if (groups[0].contains("lr_decay") && groups[0].contains("initial_accumulator_value"))
      return "Adagrad";
    return groups[0].contains("momentum") && groups[0].contains("dampening")
               ? "SGD"
               : "an optimizer with " + keys_of(groups[0]);
  }

  /// Numbers of the parameters of a group, in the file's order.
  std::vector<int64_t> listed(size_t group) const {
    TORCH_CHECK(groups[group].contains("params") && groups[group].at("params").isList(),
                "optimizer state has no 'params' in group ", group);
    std::vector<int64_t> numbers;
    const c10::IValue list = groups[group].at("params");
    for (const c10::IValue& number : list.toListRef()) numbers.push_back(number.toInt());
    return numbers;
  }

  /// The same in the order of `names`: by name where both sides have names, else by place. `names`
  /// is empty where the optimizer knows none.
  std::vector<int64_t> params(size_t group, const std::vector<std::string>& names) const {
    const std::vector<int64_t> numbers = listed(group);
    if (names.empty() || !groups[group].contains("param_names")) return numbers;
    const c10::IValue list = groups[group].at("param_names");
    if (!list.isList() || list.toListRef().size() != numbers.size() ||
        names.size() != numbers.size())
      return numbers;
    std::map<std::string, int64_t> by_name;
    std::vector<std::string> there;
    for (const c10::IValue& name : list.toListRef()) there.push_back(name.toStringRef());
    for (size_t i = 0; i < there.size(); ++i) by_name[there[i]] = numbers[i];
    const std::string *missing = nullptr, *moved = nullptr;
    std::vector<int64_t> ordered;
    for (size_t i = 0; i < names.size(); ++i) {
      const auto found = by_name.find(names[i]);
      if (found == by_name.end()) {
        if (!missing) missing = &names[i];
        continue;
      }
      if (there[i] != names[i] && !moved) moved = &names[i];
      ordered.push_back(found->second);
    }
    if (!missing) return ordered;
    TORCH_CHECK(!moved, "optimizer state has '", *moved, "' at another place in group ", group,
                ", and no '", *missing, "': is it of another model?");
    return numbers;
  }

  /// Empty for a parameter that was never stepped; ours has an entry for every parameter.
  StateDict entry(int64_t number, const std::string& name) const {
    const auto found = state.find(number);
    TORCH_CHECK(found != state.end() || !ours, "optimizer state has no entry ", number, " for '",
                name, "'");
    return found == state.end() ? StateDict() : StateDict(found->value());
  }
};

/// One state of a file. Of int8 codes both the value and the codes with their scales.
struct LoadedState {
  at::Tensor value;  ///< undefined: as before the first step
  at::Tensor codes, scale;
};

/// What one parameter will hold.
struct ParamPlan {
  at::Tensor weight, master;  ///< master undefined: none is held
  at::Tensor ema;             ///< undefined: it begins at the weight
  bool present = false;       ///< the file says something of it
  int64_t step = 0;
  std::vector<std::pair<std::string, LoadedState>> states;
};

int64_t step_of(const StateDict& entry, const std::string& name) {
  const c10::IValue value = entry.at("step");
  TORCH_CHECK(
      (value.isTensor() && value.toTensor().numel() == 1) || value.isInt() || value.isDouble(),
      "optimizer state 'step' of '", name, "' is ", value.tagKind(), "; expected one number");
  const double step =
      value.isTensor() ? value.toTensor().item<double>() : value.toScalar().toDouble();
  TORCH_CHECK(std::isfinite(step) && step >= 0, "optimizer state 'step' of '", name, "' is ", step,
              "; expected a number >= 0");
  return int64_t(step);
}

/// An entry on the parameter's device: of its shape or `numel` elements in one dimension, and
/// floating or of one of `types`.
at::Tensor tensor_of(const StateDict& entry, const std::string& key, const at::Tensor& weight,
                     const std::string& name, std::vector<at::ScalarType> types = {},
                     std::optional<int64_t> numel = std::nullopt) {
  const c10::IValue value = entry.at(key);
  TORCH_CHECK(value.isTensor() && value.toTensor().defined(), "optimizer state '", key, "' of '",
              name, "' is ", value.tagKind(), "; expected a tensor");
  const at::Tensor tensor = value.toTensor();
  if (numel) {
    TORCH_CHECK((tensor.dim() == 1 || *numel == 1) && tensor.numel() == *numel, "optimizer state '",
                key, "' of '", name, "' is ", tensor.sizes(), " but [", *numel, "] is expected");
  } else {
    TORCH_CHECK(tensor.sizes() == weight.sizes(), "optimizer state '", key, "' of '", name, "' is ",
                tensor.sizes(), " but the parameter is ", weight.sizes());
  }
  std::string expected = types.empty() ? "a floating dtype" : "";
  for (const auto type : types)
    expected += (expected.empty() ? "" : " or ") + std::string(type_name(type));
  TORCH_CHECK(types.empty() ? tensor.is_floating_point()
                            : std::count(types.begin(), types.end(), tensor.scalar_type()) > 0,
              "optimizer state '", key, "' of '", name, "' is ", type_name(tensor.scalar_type()),
              "; expected ", expected);
  return tensor.to(weight.device());
}

/// One state; int8 codes are read with their scales. `single`: the state has one element.
LoadedState state_of(const StateDict& entry, const std::string& key, const at::Tensor& weight,
                     const std::string& name, bool single) {
  const c10::IValue value = entry.at(key);
  const bool coded = value.isTensor() && (value.toTensor().scalar_type() == at::kChar ||
                                          value.toTensor().scalar_type() == at::kByte);
  if (single) return {tensor_of(entry, key, weight, name, {}, 1), {}, {}};
  if (!coded) return {tensor_of(entry, key, weight, name), {}, {}};
  const std::string scale_key = key + "_scale";
  TORCH_CHECK(entry.contains(scale_key), "optimizer state of '", name, "' has no '", scale_key,
              "' (keys: ", keys_of(entry), ")");
  const bool is_signed = is_signed_state(key);
  LoadedState loaded;
  loaded.codes = tensor_of(entry, key, weight, name, {is_signed ? at::kChar : at::kByte});
  loaded.scale = tensor_of(entry, scale_key, weight, name, {at::kChar},
                           (weight.numel() + math::kStateBlock - 1) / math::kStateBlock)
                     .contiguous();
  TORCH_CHECK(loaded.codes.is_non_overlapping_and_dense(), "optimizer state '", key, "' of '", name,
              "' has strides ", loaded.codes.strides(), " for shape ", loaded.codes.sizes(),
              ": its elements overlap or leave gaps");
  loaded.value = api::read_state(loaded.codes, loaded.scale, is_signed);
  return loaded;
}

bool has_value(const StateDict& entry, const char* key) {
  return entry.contains(key) && !entry.at(key).isNone();
}

/// The exact value that the saved master stands for, or the weight where none was saved.
at::Tensor exact_value(const StateDict& entry, const at::Tensor& weight, const std::string& name,
                       bool ours, LoadMasters masters) {
  constexpr const char* kHint =
      "; load the model first or pass masters=\"from_params\" "
      "(LoadMasters::kFromParams)";
  if (masters == LoadMasters::kFromParams || entry.size() == 0) return weight;
  if (has_value(entry, "remainder")) {
    const at::Tensor remainder =
        tensor_of(entry, "remainder", weight, name, {at::kShort, at::kChar, weight.scalar_type()});
    TORCH_CHECK(entry.contains("weight_checksum") && entry.at("weight_checksum").isInt(),
                "optimizer state of '", name, "' has no 'weight_checksum' (keys: ", keys_of(entry),
                ")");
    TORCH_CHECK(entry.at("weight_checksum").toInt() == checksum(weight),
                "optimizer state is for other weights: '", name, "' differs", kHint);
    const at::Tensor beside = at::empty_like(weight, remainder.scalar_type());
    beside.copy_(remainder);
    return api::read_masters({weight}, {beside})[0];
  }
  if (has_value(entry, "master")) return tensor_of(entry, "master", weight, name);
  TORCH_CHECK(!ours, "optimizer state of '", name, "' has no 'master' (keys: ", keys_of(entry),
              "); pass masters=\"from_params\" (LoadMasters::kFromParams) to take it from the "
              "weights");
  return weight;
}

at::Tensor plan_master(const StateDict& entry, const at::Tensor& weight, const at::Tensor& held,
                       const std::string& name, bool ours, LoadMasters masters) {
  if (held.numel() == 0) return {};
  const at::Tensor value = exact_value(entry, weight, name, ours, masters);
  check_fits(value, weight, weight.scalar_type(), name);
  if (masters == LoadMasters::kSaved && has_value(entry, "remainder") &&
      entry.at("remainder").toTensor().scalar_type() == held.scalar_type())
    return at::empty_like(held).copy_(entry.at("remainder").toTensor());  // to the bit
  const at::Tensor rounded = at::zeros_like(weight), fresh = at::zeros_like(held);
  api::write_masters_({value}, {rounded}, {fresh},
                      at::zeros({1}, weight.options().dtype(at::kLong)));
  const at::Tensor other =
      (rounded != weight).logical_and(rounded.isnan().logical_and(weight.isnan()).logical_not());
  const auto differs = other.sum().item<int64_t>();
  TORCH_CHECK(differs == 0, "optimizer state is for other weights: '", name, "' differs in ",
              differs, " of ", weight.numel(),
              " elements; load the model first or pass masters=\"from_params\" "
              "(LoadMasters::kFromParams)");
  return fresh;
}

/// Moments and step. Torch's SGD counts no steps: a buffer means that at least one was taken.
void plan_states(ParamPlan& plan, const StateDict& entry, const std::vector<const char*>& names,
                 const char* single, const std::string& name, bool ours) {
  const bool stepped = entry.size() > 0;
  const bool counts = ours || names.empty() || std::string(names[0]) != "momentum_buffer";
  const auto lacks = [&](const std::string& key) {
    return "optimizer state of '" + name + "' has no '" + key + "' (keys: " + keys_of(entry) + ")";
  };
  TORCH_CHECK(!stepped || entry.contains("step") || (!ours && (!counts || names.empty())),
              lacks("step"));
  if (entry.contains("step")) plan.step = step_of(entry, name);
  bool filled = false;
  for (const char* key : names) {
    const bool present = has_value(entry, key);
    TORCH_CHECK(present || !stepped || !counts, lacks(key));
    const bool one = single && std::string(single) == key;
    plan.states.emplace_back(
        key, present ? state_of(entry, key, plan.weight, name, one) : LoadedState());
    filled = filled || present;
  }
  if (!counts) plan.step = filled ? std::max<int64_t>(plan.step, 1) : 0;
}

/// The running mean, or undefined where it begins at the loaded weight.
at::Tensor plan_ema(const StateDict& entry, const at::Tensor& weight, const std::string& name) {
  if (!has_value(entry, "ema")) return {};
  at::Tensor value = tensor_of(entry, "ema", weight, name);
  check_fits(value, weight, weight.scalar_type(), name);
  return value;
}

void check_keys(const StateDict& entry, const std::string& name) {
  static const std::set<std::string> known = [] {
    std::set<std::string> all = {"step", "master", "remainder", "weight_checksum", "ema"};
    for (const std::string key :
         {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum"})
      all.insert({key, key + "_scale"});
    return all;
  }();
  for (const auto& key : entry.keys())
    TORCH_CHECK(known.count(key) > 0, "optimizer state of '", name, "' has an unknown '", key, "'");
}

}  // namespace

/// One state of a checked load.
static void fill_state(Optimizer::Room& room, const std::string& key, size_t i,
                       const LoadedState& loaded) {
  room.state(key);
  if (!loaded.value.defined()) return room.begin_state(key, i);
  const at::Tensor& held = room.states.at(key)[i];
  if (loaded.codes.defined() && loaded.codes.scalar_type() == held.scalar_type() &&
      loaded.codes.strides() == held.strides()) {
    held.copy_(loaded.codes);
    room.scale_of(key, i).copy_(loaded.scale);
  } else {
    room.write_state(key, i, loaded.value);
  }
}

StateDict Optimizer::state_dict(bool packed) {
  const at::NoGradGuard no_grad;
  make_rooms();
  follow_edits();
  c10::impl::GenericDict state(c10::AnyType::get(), c10::AnyType::get());
  auto groups = new_list();
  for (const auto& room : rooms_) {
    auto numbers = new_list(), names = new_list();
    const auto keys = state_names(room->group->options());
    for (const auto i : c10::irange(room->params.size())) {
      StateDict entry;  // empty for a frozen parameter: it has neither master nor states
      names.push_back(room->names[i]);
      numbers.push_back(int64_t(state.size()));
      if (room->frozen.count(i)) {
        state.insert(int64_t(state.size()), entry);
        continue;
      }
      entry.insert("step", room->steps[int64_t(i)].to(at::kFloat));
      for (const char* key : keys) {
        const at::Tensor& held = room->state(key)[i];
        entry.insert(key, packed ? held.clone() : room->read_state(key, i));
        if (packed && (held.scalar_type() == at::kChar || held.scalar_type() == at::kByte))
          entry.insert(std::string(key) + "_scale", room->scale_of(key, i).clone());
      }
      const at::Tensor& master = room->masters[i];
      if (packed && is_remainder(master, room->params[i])) {
        entry.insert("remainder", master.clone());
        entry.insert("weight_checksum", checksum(room->params[i]));
      } else if (master.numel() > 0) {
        entry.insert("master", api::read_masters({room->params[i]}, {master})[0]);
      }
      if (!room->emas.empty()) entry.insert("ema", room->emas[i].clone());
      state.insert(int64_t(state.size()), entry);
    }
    StateDict group;
    write_options(room->group->options(), group);
    if (!names_.empty() && room->index == 0) group.insert("param_names", names);
    group.insert("params", numbers);
    groups.push_back(group);
  }
  StateDict out;
  out.insert("format", int64_t(1)).insert("optimizer", std::string(kind_));
  out.insert("state", state).insert("param_groups", groups);
  return out;
}

void Optimizer::load_state_dict(const StateDict& dict, LoadMasters masters) {
  const at::NoGradGuard no_grad;
  make_rooms();
  check_loaded_storages();
  const Saved saved(dict);
  const std::string kind = saved.kind(dict);
  TORCH_CHECK(kind.empty() || kind == kind_ ||
                  (kind == "Adam or AdamW" && std::string(kind_).starts_with("Adam")),
              "optimizer state is of ", kind, " but this optimizer is ", kind_);
  TORCH_CHECK(saved.groups.size() == rooms_.size(), "optimizer state has ", saved.groups.size(),
              " parameter groups but the optimizer has ", rooms_.size());
  std::vector<std::unique_ptr<Options>> options;
  std::vector<std::vector<ParamPlan>> plans;
  std::set<int64_t> used;
  for (const auto& room : rooms_) {
    room->follow_move();
    const bool named = !names_.empty() && room->index == 0;
    const auto numbers =
        saved.params(room->index, named ? room->names : std::vector<std::string>());
    TORCH_CHECK(numbers.size() == room->params.size(), "optimizer state has ", numbers.size(),
                " parameters in group ", room->index, " but the optimizer has ",
                room->params.size());
    options.push_back(read_options(room->group->options(), saved.groups[room->index]));
    check_options(*options.back(), "parameter group " + std::to_string(room->index));
    plans.emplace_back();
    for (const auto i : c10::irange(numbers.size())) {
      used.insert(numbers[i]);
      const std::string& name = room->names[i];
      const StateDict entry = saved.entry(numbers[i], name);
      if (saved.ours) check_keys(entry, name);
      ParamPlan plan;
      plan.present = entry.size() > 0;
      plan.weight = room->leaves[i].detach();
      plan_states(plan, entry, state_names(*options.back()), tensor_state(), name, saved.ours);
      const at::Tensor held = room->frozen.count(i) ? room->new_master(i) : room->masters[i];
      plan.master = plan_master(entry, plan.weight, held, name, saved.ours, masters);
      if (!room->emas.empty()) plan.ema = plan_ema(entry, plan.weight, name);
      plans.back().push_back(std::move(plan));
    }
  }
  for (const auto& item : saved.state)
    TORCH_CHECK(!saved.ours || (item.key().isInt() && used.count(item.key().toInt()) > 0),
                "optimizer state has an entry ", item.key(), " that is no parameter's");
  // Nothing below is refused.
  for (const auto r : c10::irange(rooms_.size())) {
    Room& room = *rooms_[r];
    assign_options(room.group->options(), *options[r]);
    room.lr_value = -1;
    room.keep(state_names(room.group->options()));
    for (const auto i : c10::irange(room.params.size())) {
      const ParamPlan& plan = plans[r][i];
      room.params[i] = plan.weight;
      if (room.frozen.count(i)) {
        if (!plan.present) continue;
        room.furnish({size_t(i)});  // frozen here from the start, but not there
      }
      room.steps[int64_t(i)].fill_(plan.step);
      for (const auto& [key, loaded] : plan.states) fill_state(room, key, i, loaded);
      if (plan.master.defined()) room.masters[i].copy_(plan.master);
      if (plan.ema.defined())
        room.emas[i].copy_(plan.ema);
      else if (!room.emas.empty())
        room.begin_emas(false, {size_t(i)});
    }
    room.remember();
  }
}

void Optimizer::save(torch::serialize::OutputArchive& archive) const {
  // Masters of weights edited since the last step follow them first, which a step would do too.
  archive.write("halfstep_optimizer", c10::IValue(const_cast<Optimizer*>(this)->state_dict()));
}

void Optimizer::load(torch::serialize::InputArchive& archive) {
  c10::IValue saved;
  TORCH_CHECK(archive.try_read("halfstep_optimizer", saved),
              "the file holds no halfstep optimizer");
  load_state_dict(saved);
}

}  // namespace halfstep::optim
