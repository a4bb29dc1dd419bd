// Pickle bytes to trees of plain data: the opcodes that torch.save (protocol 2) and pickle.cpp
// write. Nothing is called; the few globals that stand for data are known by name.

#include <ATen/ops/empty.h>

#include <bit>
#include <map>

#include "pickle.h"

namespace halfstep::api {

namespace {

/// One place of the stack: a value, a named Python object, a storage, or a mark.
struct Item {
  enum Kind { kValue, kGlobal, kStorage, kMark } kind = kValue;
  c10::IValue value;
  std::string name;    ///< of a global, "module.name"
  at::Tensor storage;  ///< flat
};

Item item(c10::IValue value) { return {Item::kValue, std::move(value), "", {}}; }

c10::impl::GenericDict new_dict() {
  return c10::impl::GenericDict(c10::AnyType::get(), c10::AnyType::get());
}

class Unpickler {
 public:
  Unpickler(const std::string& bytes, const StorageReader& storage)
      : bytes_(bytes), storage_(storage) {}

  c10::IValue run() {
    for (;;) {
      const auto code = uint8_t(byte());
      if (code == '.') return pop_value("the result");
      if (!constant(code) && !collection(code) && !object(code))
        TORCH_CHECK(false, "opcode ", int(code), " at byte ", at_ - 1, " stands for no plain data");
    }
  }

 private:
  bool constant(uint8_t code) {
    switch (code) {
      case 0x80:  // PROTO
        if (const int protocol = byte(); protocol != 2)
          TORCH_CHECK(false, "pickle protocol ", protocol, "; expected 2");
        return true;
      case 'N':
        return push(c10::IValue());
      case 0x88:
        return push(true);
      case 0x89:
        return push(false);
      case 'K':
        return push(int64_t(little(1)));
      case 'M':
        return push(int64_t(little(2)));
      case 'J':
        return push(int64_t(int32_t(little(4))));
      case 0x8a:
        return push(long_integer());
      case 'G': {
        uint64_t bits = 0;
        for (int i = 0; i < 8; ++i) bits = bits << 8 | uint8_t(byte());
        return push(std::bit_cast<double>(bits));
      }
      case 'X':
        return push(text(little(4)));
      default:
        return false;
    }
  }

  bool collection(uint8_t code) {
    switch (code) {
      case '(':
        stack_.push_back({Item::kMark, {}, "", {}});
        return true;
      case ')':
        return push(c10::ivalue::Tuple::create(std::vector<c10::IValue>()));
      case 't':
        return push_tuple(pop_to_mark());
      case 0x85:
      case 0x86:
      case 0x87:
        return push_tuple(pop_items(code - 0x84));
      case ']':
        return push(c10::impl::GenericList(c10::AnyType::get()));
      case 'a':
        return append(pop_items(1));
      case 'e':
        return append(pop_to_mark());
      case '}':
        return push(new_dict());
      case 's':
        return set_items(pop_items(2));
      case 'u':
        return set_items(pop_to_mark());
      default:
        return false;
    }
  }

  bool object(uint8_t code) {
    switch (code) {
      case 'q':
      case 'r':
        memo_[little(code == 'q' ? 1 : 4)] = top();
        return true;
      case 'h':
      case 'j': {
        const auto known = memo_.find(little(code == 'h' ? 1 : 4));
        TORCH_CHECK(known != memo_.end(), "it refers to something that it does not hold");
        stack_.push_back(known->second);
        return true;
      }
      case '0':
        pop();
        return true;
      case 'c': {
        const std::string module = line();
        stack_.push_back({Item::kGlobal, {}, module + "." + line(), {}});
        return true;
      }
      case 'Q':
        return push_storage(pop_tuple("a storage"));
      case 'R':
        return reduce();
      case 'b':  // attributes of an OrderedDict, such as a module's versions
        pop();
        TORCH_CHECK(top().kind == Item::kValue && top().value.isGenericDict(),
                    "it sets attributes of something that is not a dict");
        return true;
      default:
        return false;
    }
  }

  /// Tuples of names and storages are met only as arguments, where their items are looked at.
  bool push_tuple(std::vector<Item> items) {
    bool plain = true;
    for (const auto& entry : items) plain = plain && entry.kind == Item::kValue;
    if (!plain) {
      arguments_.push_back(std::move(items));
      stack_.push_back({Item::kMark, c10::IValue(int64_t(arguments_.size() - 1)), "arguments", {}});
      return true;
    }
    std::vector<c10::IValue> values;
    for (auto& entry : items) values.push_back(std::move(entry.value));
    return push(c10::ivalue::Tuple::create(std::move(values)));
  }

  std::vector<Item> pop_tuple(const char* what) {
    Item last = pop();
    if (last.kind == Item::kMark && last.name == "arguments")
      return arguments_[size_t(last.value.toInt())];
    TORCH_CHECK(last.kind == Item::kValue && last.value.isTuple(), "the arguments of ", what,
                " are no tuple");
    std::vector<Item> items;
    for (const auto& value : last.value.toTupleRef().elements()) items.push_back(item(value));
    return items;
  }

  bool push_storage(const std::vector<Item>& id) {
    TORCH_CHECK(id.size() == 5 && id[1].kind == Item::kGlobal && id[2].value.isString() &&
                    id[4].value.isInt(),
                "a storage is described in an unknown way");
    const auto dot = id[1].name.rfind('.');
    const auto type = storage_type(id[1].name.substr(dot + 1));
    TORCH_CHECK(type != c10::ScalarType::Undefined, "it holds a ", id[1].name,
                ", which is not read here");
    stack_.push_back(
        {Item::kStorage, {}, "", storage_(id[2].value.toStringRef(), type, id[4].value.toInt())});
    return true;
  }

  bool reduce() {
    // The arguments lie above the function's name.
    TORCH_CHECK(stack_.size() >= 2 && stack_[stack_.size() - 2].kind == Item::kGlobal,
                "it calls something that has no name");
    const std::string name = stack_[stack_.size() - 2].name;
    const auto arguments = pop_tuple(name.c_str());
    pop();
    if (name == "torch._utils._rebuild_tensor_v2") return push(tensor(arguments));
    if (name == "torch._utils._rebuild_parameter" && !arguments.empty())
      return push(arguments[0].value);
    if (name == "torch.Size" && arguments.size() == 1) return push(arguments[0].value);
    if (name == "torch.device" && !arguments.empty()) return push(arguments[0].value);
    TORCH_CHECK(name == "collections.OrderedDict" && arguments.size() <= 1, "it holds a ", name,
                ", which only Python can read");
    auto dict = new_dict();
    if (arguments.size() == 1)
      for (const c10::IValue& pair : arguments[0].value.toListRef())
        dict.insert_or_assign(pair.toTupleRef().elements().at(0),
                              pair.toTupleRef().elements().at(1));
    return push(dict);
  }

  at::Tensor tensor(const std::vector<Item>& a) {
    TORCH_CHECK(a.size() >= 4 && a[0].kind == Item::kStorage && a[1].value.isInt() &&
                    a[2].value.isTuple() && a[3].value.isTuple(),
                "a tensor is described in an unknown way");
    const int64_t offset = a[1].value.toInt();
    const auto numbers = [](const c10::IValue& tuple) {
      std::vector<int64_t> list;
      for (const auto& number : tuple.toTupleRef().elements()) list.push_back(number.toInt());
      return list;
    };
    const auto sizes = numbers(a[2].value), strides = numbers(a[3].value);
    const int64_t held = a[0].storage.numel();
    bool inside = sizes.size() == strides.size() && offset >= 0 && offset <= held;
    bool empty = false;
    for (size_t i = 0; inside && i < sizes.size(); ++i) {
      inside = sizes[i] >= 0 && strides[i] >= 0;
      empty = empty || sizes[i] == 0;
    }
    int64_t last = offset;  // of the largest index; no product below overflows
    for (size_t i = 0; inside && !empty && i < sizes.size(); ++i) {
      if (sizes[i] == 1 || strides[i] == 0) continue;
      inside = strides[i] <= held && sizes[i] - 1 <= held / strides[i];
      if (inside) last += (sizes[i] - 1) * strides[i];
      inside = inside && last < held;
    }
    TORCH_CHECK(inside && (empty || last < held), "a tensor of shape ", c10::IntArrayRef(sizes),
                ", strides ", c10::IntArrayRef(strides), " and offset ", offset,
                " lies outside its storage of ", held, " elements");
    at::Tensor out = at::empty({0}, a[0].storage.options());
    out.set_(a[0].storage.storage(), offset, sizes, strides);
    return out;
  }

  bool append(std::vector<Item> items) {
    TORCH_CHECK(top().kind == Item::kValue && top().value.isList(), "it appends to no list");
    auto list = top().value.toList();
    for (auto& entry : items) list.push_back(plain(entry, "an item of a list"));
    return true;
  }

  bool set_items(std::vector<Item> items) {
    TORCH_CHECK(top().kind == Item::kValue && top().value.isGenericDict() && items.size() % 2 == 0,
                "it sets items of no dict");
    auto dict = top().value.toGenericDict();
    for (size_t i = 0; i < items.size(); i += 2) {
      const c10::IValue key = plain(items[i], "a key");
      TORCH_CHECK(key.isString() || key.isInt(), "a key is ", key.tagKind(),
                  "; expected a string or an integer");
      dict.insert_or_assign(key, plain(items[i + 1], "a value"));
    }
    return true;
  }

  /// A dtype or another named object that is met as data is read as its name.
  c10::IValue plain(Item& entry, const char* what) {
    if (entry.kind == Item::kGlobal) return entry.name;
    TORCH_CHECK(entry.kind == Item::kValue, what, " is no plain data");
    return entry.value;
  }

  template <class T>
  bool push(T value) {
    stack_.push_back(item(c10::IValue(std::move(value))));
    return true;
  }

  Item& top() {
    TORCH_CHECK(!stack_.empty(), "it ends too early");
    return stack_.back();
  }
  Item pop() {
    Item last = std::move(top());
    stack_.pop_back();
    return last;
  }
  c10::IValue pop_value(const char* what) {
    Item last = pop();
    return plain(last, what);
  }
  std::vector<Item> pop_items(size_t count) {
    TORCH_CHECK(stack_.size() >= count, "it ends too early");
    std::vector<Item> items(stack_.end() - ptrdiff_t(count), stack_.end());
    stack_.resize(stack_.size() - count);
    return items;
  }
  std::vector<Item> pop_to_mark() {
    size_t start = stack_.size();
    while (start > 0 && !(stack_[start - 1].kind == Item::kMark && stack_[start - 1].name.empty()))
      --start;
    TORCH_CHECK(start > 0, "it closes what was not opened");
    auto items = pop_items(stack_.size() - start);
    stack_.pop_back();
    return items;
  }

  char byte() {
    TORCH_CHECK(at_ < bytes_.size(), "it ends too early");
    return bytes_[at_++];
  }
  uint64_t little(int count) {
    uint64_t value = 0;
    for (int i = 0; i < count; ++i) value |= uint64_t(uint8_t(byte())) << (8 * i);
    return value;
  }
  int64_t long_integer() {
    const int count = uint8_t(byte());
    TORCH_CHECK(count <= 8, "an integer has ", count, " bytes; expected at most 8");
    uint64_t value = little(count);
    if (count > 0 && count < 8 && value >> (8 * count - 1)) value |= ~uint64_t(0) << (8 * count);
    return int64_t(value);
  }
  std::string text(uint64_t length) {
    TORCH_CHECK(length <= bytes_.size() - at_, "it ends too early");
    at_ += length;
    return bytes_.substr(at_ - length, length);
  }
  std::string line() {
    const auto end = bytes_.find('\n', at_);
    TORCH_CHECK(end != std::string::npos, "it ends too early");
    const std::string found = bytes_.substr(at_, end - at_);
    at_ = end + 1;
    return found;
  }

  const std::string& bytes_;
  const StorageReader& storage_;
  size_t at_ = 0;
  std::vector<Item> stack_;
  std::map<uint64_t, Item> memo_;
  std::vector<std::vector<Item>> arguments_;
};

}  // namespace

c10::IValue unpickle(const std::string& bytes, const StorageReader& storage) {
  return Unpickler(bytes, storage).run();
}

}  // namespace halfstep::api
