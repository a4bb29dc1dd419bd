#pragma once

// Checkpoint files: the zip with a restricted pickle that torch.save writes and that
// torch.load(weights_only=True) reads. torch's own C++ pickler tags its dicts with their types,
// which that loader refuses, and its unpickler drops the OrderedDicts that Python writes.

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <functional>
#include <string>
#include <vector>

namespace halfstep::api {

/// A tree ready to be written: the pickle, and the storages that it refers to by number.
struct Pickled {
  std::string bytes;
  std::vector<at::Tensor> storages;  ///< on the CPU, each exactly its storage
};

/// None, bool, int, float, string, tuple, list, dict and dense tensors; anything else is refused
/// with the keys that lead to it.
Pickled pickle(const c10::IValue& value);

/// The inverse: `storage(key, dtype, elements)` gives the storage of that name as a flat tensor.
using StorageReader =
    std::function<at::Tensor(const std::string& key, c10::ScalarType dtype, int64_t elements)>;
c10::IValue unpickle(const std::string& bytes, const StorageReader& storage);

/// Name of a dtype's storage class in Python ("FloatStorage"), or null.
const char* storage_name(c10::ScalarType type);
/// The dtype of such a name, or Undefined.
c10::ScalarType storage_type(const std::string& name);

}  // namespace halfstep::api
