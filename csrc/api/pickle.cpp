// Trees of plain data to pickle bytes, protocol 2.

#include "pickle.h"

#include <bit>
#include <limits>
#include <map>
#include <utility>

namespace halfstep::api {

namespace {

constexpr std::pair<c10::ScalarType, const char*> kStorages[] = {
    {at::kHalf, "HalfStorage"},   {at::kBFloat16, "BFloat16Storage"},
    {at::kFloat, "FloatStorage"}, {at::kDouble, "DoubleStorage"},
    {at::kLong, "LongStorage"},   {at::kInt, "IntStorage"},
    {at::kShort, "ShortStorage"}, {at::kChar, "CharStorage"},
    {at::kByte, "ByteStorage"},   {at::kBool, "BoolStorage"},
};

/// The tensor's storage holds this tensor and nothing else, in whatever order.
bool fills_storage(const at::Tensor& tensor) {
  return tensor.storage_offset() == 0 && tensor.is_non_overlapping_and_dense() &&
         tensor.storage().nbytes() == size_t(tensor.numel()) * tensor.element_size();
}

class Pickler {
 public:
  Pickled finish(const c10::IValue& value) {
    out_ = "\x80\x02";
    push(value);
    out_ += '.';
    return {std::move(out_), std::move(storages_)};
  }

 private:
  void push(const c10::IValue& value) {
    if (value.isNone()) {
      out_ += 'N';
    } else if (value.isBool()) {
      out_ += value.toBool() ? '\x88' : '\x89';
    } else if (value.isInt()) {
      push(value.toInt());
    } else if (value.isDouble()) {
      push(value.toDouble());
    } else if (value.isString()) {
      push(value.toStringRef());
    } else if (value.isTensor()) {
      push(value.toTensor());
    } else if (value.isTuple()) {
      push_items('(', value.toTupleRef().elements(), 't');
    } else if (value.isList()) {
      out_ += ']';
      push_items('(', value.toListRef(), 'e');
    } else if (value.isGenericDict()) {
      push(value.toGenericDict());
    } else {
      refuse("a value of type " + value.tagKind());
    }
  }

  void push(int64_t value) {
    if (value >= 0 && value < 256) {
      out_ += 'K';
      little(value, 1);
    } else if (value >= std::numeric_limits<int32_t>::min() &&
               value <= std::numeric_limits<int32_t>::max()) {
      out_ += 'J';
      little(value, 4);
    } else {
      out_ += "\x8a\x08";
      little(value, 8);
    }
  }

  void push(double value) {
    out_ += 'G';
    const auto bits = std::bit_cast<uint64_t>(value);
    for (int byte = 7; byte >= 0; --byte) out_ += char(bits >> (8 * byte));
  }

  void push(const std::string& text) {
    TORCH_CHECK(text.size() < (size_t(1) << 31), "save: a string of ", text.size(),
                " bytes is too long");
    out_ += 'X';
    little(int64_t(text.size()), 4);
    out_ += text;
  }

  template <class Items>
  void push_items(char open, const Items& items, char close) {
    out_ += open;
    int64_t index = 0;
    for (const c10::IValue& item : items) {
      path_.push_back(std::to_string(index++));
      push(item);
      path_.pop_back();
    }
    out_ += close;
  }

  void push(const c10::impl::GenericDict& dict) {
    out_ += "}(";
    for (const auto& entry : dict) {
      const c10::IValue key = entry.key();
      path_.push_back(key.isString() ? key.toStringRef()
                      : key.isInt()  ? std::to_string(key.toInt())
                                     : key.tagKind());
      if (!key.isString() && !key.isInt()) refuse("a key of type " + key.tagKind());
      push(key);
      push(entry.value());
      path_.pop_back();
    }
    out_ += 'u';
  }

  void push(const at::Tensor& tensor) {
    if (!tensor.defined()) {
      out_ += 'N';
      return;
    }
    const char* name = storage_name(tensor.scalar_type());
    if (tensor.layout() != at::kStrided || tensor.is_quantized() || !name ||
        tensor.device().is_meta())
      refuse(std::string("a tensor of ") + c10::toString(tensor.scalar_type()) + ", layout " +
             (tensor.layout() == at::kStrided ? "strided" : "not strided") + ", on " +
             tensor.device().str());
    const auto [number, placed] = store(tensor.detach());
    global("torch._utils", "_rebuild_tensor_v2");
    out_ += "((";
    push(std::string("storage"));
    global("torch", name);
    push(std::to_string(number));
    push(std::string("cpu"));
    push(placed.numel());
    out_ += "tQ";
    push(int64_t(0));  // offset
    push_numbers(placed.sizes());
    push_numbers(placed.strides());
    out_ += '\x89';  // requires_grad
    global("collections", "OrderedDict");
    out_ += ")RtR";
  }

  void push_numbers(c10::IntArrayRef numbers) {
    out_ += '(';
    for (const int64_t number : numbers) push(number);
    out_ += 't';
  }

  /// Number of the storage and the tensor in it; a tied tensor is stored once.
  std::pair<size_t, at::Tensor> store(const at::Tensor& tensor) {
    const bool whole = fills_storage(tensor);
    const void* owner = tensor.storage().unsafeGetStorageImpl();
    if (whole) {
      const auto known = stored_.find(owner);
      if (known != stored_.end()) {
        const at::Tensor& there = storages_[known->second];
        if (there.scalar_type() == tensor.scalar_type() && there.sizes() == tensor.sizes() &&
            there.strides() == tensor.strides())
          return {known->second, there};
      }
    }
    at::Tensor placed = tensor.device().is_cpu() ? tensor : tensor.cpu();
    if (!fills_storage(placed)) placed = placed.clone(at::MemoryFormat::Preserve);
    if (!fills_storage(placed)) placed = placed.clone(at::MemoryFormat::Contiguous);
    if (whole) {
      stored_.emplace(owner, storages_.size());
      kept_.push_back(tensor);  // its storage keeps its address while we compare addresses
    }
    storages_.push_back(placed);
    return {storages_.size() - 1, placed};
  }

  void global(const char* module, const char* name) {
    out_ += 'c';
    out_ += module;
    out_ += '\n';
    out_ += name;
    out_ += '\n';
  }

  void little(int64_t value, int bytes) {
    for (int byte = 0; byte < bytes; ++byte) out_ += char(uint64_t(value) >> (8 * byte));
  }

  [[noreturn]] void refuse(const std::string& what) const {
    std::string where;
    for (const auto& part : path_) where.append(where.empty() ? "" : ".").append(part);
    TORCH_CHECK(false, "save: ", what, where.empty() ? "" : " at ", where,
                " cannot be written; a checkpoint holds numbers, strings, lists, tuples, dicts and "
                "dense tensors");
  }

  std::string out_;
  std::vector<at::Tensor> storages_, kept_;
  std::map<const void*, size_t> stored_;
  std::vector<std::string> path_;
};

}  // namespace

const char* storage_name(c10::ScalarType type) {
  for (const auto& [known, name] : kStorages)
    if (known == type) return name;
  return nullptr;
}

c10::ScalarType storage_type(const std::string& name) {
  for (const auto& [type, known] : kStorages)
    if (known == name) return type;
  return c10::ScalarType::Undefined;
}

Pickled pickle(const c10::IValue& value) { return Pickler().finish(value); }

}  // namespace halfstep::api
