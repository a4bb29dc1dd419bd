#pragma once

// What the 16-bit kernels share that compute in FP32: which tensors they take, the guard they run
// under, the division into pieces, and the memory for a piece's FP32 copy.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

namespace halfstep::cpu {

/// FP32 elements that a kernel holds of one operand at a time: 4 MiB. Larger copies leave the
/// caches, and fresh pages for them cost more than the conversion: 16 M elements took 16 ms into
/// new memory and 2 ms into used memory.
constexpr int64_t kPiece = int64_t(1) << 20;

/// Keys below BackendSelect. A kernel registered there for an op that has a CPU kernel already is
/// called for every device and takes some of the CPU kernel's calls; autograd, functorch, autocast
/// and tracing have had their turn.
inline c10::DispatchKeySet below_select(c10::DispatchKeySet keys) {
  return keys &
         c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect);
}
/// Whether the CPU kernel would be next: not for sparse, nested or MKLDNN tensors, other devices,
/// nor fake tensors, which are CPU tensors run through the Meta kernel.
inline bool reaches_cpu(c10::DispatchKeySet keys) {
  return below_select(keys).highestPriorityTypeId() == c10::DispatchKey::CPU;
}

/// Nothing inside is recorded for a gradient or cast back to 16 bits.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

/// Whether dimensions have names, which newer torch (2.15) does not know.
template <class T>
bool has_names(const T& tensor) {
  if constexpr (requires { tensor.has_names(); }) return tensor.has_names();
  return false;
}

/// `total` in even parts of at most `most`.
inline int64_t even_part(int64_t total, int64_t most) {
  most = std::max<int64_t>(most, 1);
  const int64_t parts = std::max<int64_t>((total + most - 1) / most, 1);
  return (total + parts - 1) / parts;
}

/// Memory for the whole of which `part` is a part, dimensions in the same order in memory.
at::Tensor whole_like(const at::Tensor& part, at::IntArrayRef sizes, at::ScalarType type);

/// FP32 memory for one operand, used for one piece after another. What fits in kPiece elements
/// comes from three buffers that the thread keeps for its next call; only pages once used are
/// resident.
class Wide {
 public:
  explicit Wide(int64_t numel);
  ~Wide();
  Wide(const Wide&) = delete;
  Wide& operator=(const Wide&) = delete;

  void* data() const { return memory_.get(); }
  /// Contiguous memory of that shape.
  at::Tensor shaped(at::IntArrayRef sizes) const;
  /// The piece in FP32, its dimensions in the same order in memory.
  at::Tensor operator()(const at::Tensor& piece) const;

 private:
  c10::DataPtr memory_;
  bool keep_;
};

}  // namespace halfstep::cpu
