#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include "export.h"

namespace halfstep {

/// Autocast for this thread while the guard lives, as torch.autocast in Python. The state before it
/// is restored, and the cache of cast weights is cleared when the outermost guard ends.
class HALFSTEP_NODISCARD_API AutocastGuard {
 public:
  explicit AutocastGuard(c10::DeviceType device, c10::ScalarType dtype = c10::kHalf,
                         bool enabled = true);
  explicit AutocastGuard(c10::Device device, c10::ScalarType dtype = c10::kHalf,
                         bool enabled = true);
  AutocastGuard(c10::DeviceType device, bool enabled);
  AutocastGuard(c10::Device device, bool enabled);
  ~AutocastGuard();
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  c10::DeviceType device_;
  c10::ScalarType previous_dtype_;
  bool previous_enabled_;
};

}  // namespace halfstep
