#include <halfstep/state_dict.h>

namespace halfstep {

namespace {

c10::impl::GenericDict no_entries() {
  return c10::impl::GenericDict(c10::AnyType::get(), c10::AnyType::get());
}

c10::impl::GenericDict dict_of(const c10::IValue& value) {
  TORCH_CHECK(value.isGenericDict(), "expected a state dict but got ", value.tagKind());
  return value.toGenericDict();
}

}  // namespace

StateDict::StateDict() : entries_(no_entries()) {}
StateDict::StateDict(const c10::IValue& value) : entries_(dict_of(value)) {}
StateDict::StateDict(const torch::OrderedDict<std::string, at::Tensor>& tensors)
    : entries_(no_entries()) {
  for (const auto& item : tensors) insert(item.key(), item.value());
}

StateDict& StateDict::insert(const std::string& key, c10::IValue value) {
  entries_.insert_or_assign(key, std::move(value));
  return *this;
}
StateDict& StateDict::insert(const std::string& key, const StateDict& value) {
  entries_.insert_or_assign(key, value.entries_);
  return *this;
}

bool StateDict::contains(const std::string& key) const { return entries_.contains(key); }

c10::IValue StateDict::at(const std::string& key) const {
  const auto entry = entries_.find(key);
  if (entry != entries_.end()) return entry->value();
  std::string known;
  for (const auto& name : keys()) known += (known.empty() ? "" : ", ") + name;
  TORCH_CHECK(false, "the state dict has no '", key, "' (keys: ", known, ")");
}

std::vector<std::string> StateDict::keys() const {
  std::vector<std::string> names;
  for (const auto& entry : entries_)
    if (entry.key().isString()) names.push_back(entry.key().toStringRef());
  return names;
}

size_t StateDict::size() const { return entries_.size(); }
StateDict::operator c10::IValue() const { return entries_; }

}  // namespace halfstep
