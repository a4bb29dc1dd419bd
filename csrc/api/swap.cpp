#include <halfstep/nn.h>
#include <halfstep/swap.h>

#include <c10/util/Type.h>
#include <fnmatch.h>
#include <torch/nn/modules/container/moduledict.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>

#include <ostream>
#include <sstream>
#include <typeinfo>

namespace halfstep {

namespace {

using torch::nn::AnyModule;
using torch::nn::Module;
using torch::nn::SequentialImpl;
using ModulePtr = std::shared_ptr<Module>;

/// A class of torch's that we have too.
struct Kind {
  const char* name;
  bool (*derives)(const Module&);  ///< is torch's class, or derives from it
  bool (*exact)(const Module&);
  bool (*ours)(const Module&);
  AnyModule (*make)(const Module&);
};

template <class Stock, class Ours>
Kind kind(const char* name) {
  return {name, [](const Module& m) { return dynamic_cast<const Stock*>(&m) != nullptr; },
          [](const Module& m) { return typeid(m) == typeid(Stock); },
          [](const Module& m) { return dynamic_cast<const Ours*>(&m) != nullptr; },
          [](const Module& m) {
            return AnyModule(std::make_shared<Ours>(static_cast<const Stock&>(m)));
          }};
}

#define HALFSTEP_KIND(name) kind<torch::nn::name##Impl, nn::name##Impl>(#name)
const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all = {
      HALFSTEP_KIND(Linear),
      HALFSTEP_KIND(LayerNorm),
      HALFSTEP_KIND(GELU),
      HALFSTEP_KIND(SiLU),
      HALFSTEP_KIND(Softmax),
      HALFSTEP_KIND(CrossEntropyLoss),
      HALFSTEP_KIND(Conv1d),
      HALFSTEP_KIND(Conv2d),
      HALFSTEP_KIND(Conv3d),
      HALFSTEP_KIND(ConvTranspose1d),
      HALFSTEP_KIND(ConvTranspose2d),
      HALFSTEP_KIND(ConvTranspose3d),
  };
  return all;
}
#undef HALFSTEP_KIND

/// The kind of a module that is torch's or derives from torch's, and not ours yet.
const Kind* stock_kind(const Module& module) {
  for (const Kind& kind : kinds())
    if (kind.derives(module)) return kind.ours(module) ? nullptr : &kind;
  return nullptr;
}

/// As a program writes it: "torch::nn::ModuleList" for ModuleListImpl.
std::string class_of(const Module& module) {
  std::string name = c10::demangle(typeid(module).name());
  if (name.ends_with("Impl")) name.resize(name.size() - 4);
  return name;
}

/// Why ours cannot stand for a layer of this kind, or nothing.
std::string unsupported(const Module& module, const Kind& kind) {
  if (!kind.exact(module)) return class_of(module) + " derives from " + kind.name;
  if (const auto* gelu = dynamic_cast<const torch::nn::GELUImpl*>(&module)) {
    const std::string& form = gelu->options.approximate();
    if (form != "none" && form != "tanh")
      return "approximate is '" + form + "'; halfstep::nn::GELU has 'none' and 'tanh'";
  }
  for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
    const auto type = parameter.value().scalar_type();
    if (type != at::kHalf && type != at::kBFloat16 && type != at::kFloat && type != at::kDouble)
      return parameter.key() + " is " + c10::toString(type) +
             ", a dtype that halfstep::nn::" + kind.name + " does not have";
  }
  return "";
}

/// Why a layer that no Sequential holds stays, and what to write instead.
std::string called_by_type(const Module* parent, const Kind& kind) {
  const std::string ours = std::string("halfstep::nn::") + kind.name;
  if (!parent)
    return "it is the model itself, which its owner calls by its type; make it a " + ours;
  const std::string holder = class_of(*parent);
  if (dynamic_cast<const torch::nn::ModuleListImpl*>(parent) ||
      dynamic_cast<const torch::nn::ModuleDictImpl*>(parent))
    return "what is in a " + holder + " is called by its type; put a " + ours +
           " in, and call it as that";
  if (holder.starts_with("torch::nn::")) return "a member of " + holder + " calls it by its type";
  return "a member of " + holder + " calls it by its type; declare the member as " + ours;
}

/// Where a layer is exchanged: a registered child, and what Sequential::forward calls.
struct Place {
  SequentialImpl* list;
  std::string child;
  AnyModule* held;
  const Kind* kind;
};

/// {name of a child: the AnyModule that holds it}. Children that a derived class registered beside
/// its list have none. From the last: a layer that is both a member and in the list was registered
/// as the member first.
std::map<std::string, AnyModule*> held_children(SequentialImpl* list) {
  std::map<std::string, AnyModule*> found;
  if (!list) return found;
  const auto children = list->named_children();
  auto held = list->end();
  for (size_t i = children.size(); i-- > 0 && held != list->begin();)
    if (std::prev(held)->ptr() == children[i].value()) found[children[i].key()] = &*--held;
  return found;
}

class Swap {
 public:
  explicit Swap(const std::vector<std::string>& exclude)
      : exclude_(exclude), used_(exclude.size(), false) {}

  void plan(Module& model) {
    const std::string* hit = excluded("");
    look("", model, nullptr, {}, hit);
    children_of("", model, hit);
    for (size_t i = 0; i < exclude_.size(); ++i)
      TORCH_CHECK_VALUE(used_[i], "swap_layers_: exclude '", exclude_[i],
                        "' matches no module; the model has ", first_paths());
  }

  SwapReport carry_out() {
    std::map<ModulePtr, AnyModule> made;  // a layer in two places stays one
    for (const Place& place : places_) {
      const ModulePtr stock = place.held->ptr();
      if (place.kind->ours(*stock)) continue;  // a Sequential that the model has in two places
      auto ours = made.find(stock);
      if (ours == made.end()) ours = made.emplace(stock, place.kind->make(*stock)).first;
      place.list->replace_module(place.child, ours->second.ptr());
      *place.held = ours->second;
    }
    return std::move(report_);
  }

 private:
  /// `above`: the item that excludes the parent, and so all of it.
  void children_of(const std::string& path, Module& parent, const std::string* above) {
    auto* list = dynamic_cast<SequentialImpl*>(&parent);
    const auto held = held_children(list);
    for (const auto& child : parent.named_children()) {
      const auto entry = held.find(child.key());
      const Place place{list, child.key(), entry == held.end() ? nullptr : entry->second, nullptr};
      const std::string name = path.empty() ? child.key() : path + "." + child.key();
      const std::string *own = excluded(name), *hit = above ? above : own;
      look(name, *child.value(), &parent, place, hit);
      children_of(name, *child.value(), hit);
    }
  }

  /// `hit`: the item that excludes it, or null.
  void look(const std::string& path, const Module& module, const Module* parent, Place place,
            const std::string* hit) {
    paths_.push_back(path);
    place.kind = stock_kind(module);
    if (!place.kind) return;
    std::string why = hit ? "excluded by " + *hit : unsupported(module, *place.kind);
    if (why.empty() && !place.held) why = called_by_type(parent, *place.kind);
    if (!why.empty()) {
      report_.left.insert(path, why);
      return;
    }
    report_.swapped.insert(path, place.kind->name);
    places_.push_back(std::move(place));
  }

  /// The first item that matches, all of which are marked.
  const std::string* excluded(const std::string& path) {
    const std::string* first = nullptr;
    for (size_t i = 0; i < exclude_.size(); ++i) {
      if (fnmatch(exclude_[i].c_str(), path.c_str(), FNM_NOESCAPE) != 0) continue;
      used_[i] = true;
      if (!first) first = &exclude_[i];
    }
    return first;
  }

  std::string first_paths() const {
    std::string text;
    for (size_t i = 0; i < paths_.size() && i < 8; ++i) text += (i ? ", '" : "'") + paths_[i] + "'";
    return paths_.size() > 8 ? text + ", …" : text;
  }

  const std::vector<std::string>& exclude_;
  std::vector<bool> used_;
  std::vector<std::string> paths_;
  std::vector<Place> places_;
  SwapReport report_;
};

}  // namespace

std::string SwapReport::text() const {
  std::map<std::string, int64_t> counts;
  for (const auto& layer : swapped) ++counts[layer.value()];
  std::ostringstream out;
  out << "swapped " << swapped.size() << " layers";
  const char* before = ": ";
  for (const auto& [kind, count] : counts) {
    out << before << count << " " << kind;
    before = ", ";
  }
  for (const auto& layer : left) out << "\nleft '" << layer.key() << "': " << layer.value();
  return out.str();
}

std::ostream& operator<<(std::ostream& stream, const SwapReport& report) {
  return stream << report.text();
}

SwapReport swap_layers_(Module& model, const std::vector<std::string>& exclude) {
  Swap swap(exclude);
  swap.plan(model);
  return swap.carry_out();
}

}  // namespace halfstep
