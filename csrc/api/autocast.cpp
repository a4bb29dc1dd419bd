#include <halfstep/autocast.h>

#include <ATen/autocast_mode.h>

namespace halfstep {

AutocastGuard::AutocastGuard(c10::DeviceType device, c10::ScalarType dtype, bool enabled)
    : device_(device),
      previous_dtype_(at::autocast::get_autocast_dtype(device)),
      previous_enabled_(at::autocast::is_autocast_enabled(device)) {
  // The cache holds one cast a weight, whatever the dtype: an inner guard of another dtype starts
  // anew.
  if (dtype != previous_dtype_) at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(device, enabled);
  at::autocast::set_autocast_dtype(device, dtype);
  at::autocast::increment_nesting();
}

AutocastGuard::AutocastGuard(c10::Device device, c10::ScalarType dtype, bool enabled)
    : AutocastGuard(device.type(), dtype, enabled) {}
AutocastGuard::AutocastGuard(c10::DeviceType device, bool enabled)
    : AutocastGuard(device, c10::kHalf, enabled) {}
AutocastGuard::AutocastGuard(c10::Device device, bool enabled)
    : AutocastGuard(device.type(), c10::kHalf, enabled) {}

AutocastGuard::~AutocastGuard() {
  const bool outermost = at::autocast::decrement_nesting() == 0;
  if (outermost || at::autocast::get_autocast_dtype(device_) != previous_dtype_)
    at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(device_, previous_enabled_);
  at::autocast::set_autocast_dtype(device_, previous_dtype_);
}

}  // namespace halfstep
