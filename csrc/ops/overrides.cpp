#include "overrides.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace halfstep {

namespace {

bool enabled_at_start() {
  const char* value = std::getenv("HALFSTEP_OVERRIDES");
  return !value || std::strcmp(value, "0") != 0;
}

std::atomic<bool>& enabled_flag() {
  static std::atomic<bool> flag{enabled_at_start()};
  return flag;
}

/// Asks oneDNN through torch's own op, so that ONEDNN_MAX_CPU_ISA counts; false where torch has
/// none.
bool unit(const char* op) {
  const auto handle = c10::Dispatcher::singleton().findSchema({op, ""});
  return handle && handle->typed<bool()>().call();
}
bool has_half_unit() {
  static const bool has = unit("mkldnn::_is_mkldnn_fp16_supported");
  return has;
}
bool has_bfloat_unit() {
  static const bool has = unit("mkldnn::_is_mkldnn_bf16_supported");
  return has;
}

}  // namespace

bool overrides_enabled() { return enabled_flag().load(std::memory_order_relaxed); }
void set_overrides(bool enabled) { enabled_flag().store(enabled, std::memory_order_relaxed); }

std::string cpu_path() {
  const auto path = [](bool widens) { return widens ? "FP32, rounded once" : "stock"; };
  return std::string("float16 linear and matmul: ") + path(ops::widens_products(c10::kHalf)) +
         ", convolution: " + path(ops::widens_convolution(c10::kHalf)) +
         "; bfloat16 linear and matmul: " + path(ops::widens_products(c10::kBFloat16)) +
         ", convolution: " + path(ops::widens_convolution(c10::kBFloat16));
}

namespace ops {

bool widens_products(c10::ScalarType type) {
  if (type != c10::kHalf && type != c10::kBFloat16) return false;
  return overrides_enabled() && !(type == c10::kHalf ? has_half_unit() : has_bfloat_unit());
}

bool widens_convolution(c10::ScalarType type) {
  if (type == c10::kHalf) return overrides_enabled();
  return widens_products(type);
}

}  // namespace ops
}  // namespace halfstep
