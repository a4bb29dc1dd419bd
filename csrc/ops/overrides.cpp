#include "overrides.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <strings.h>

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
bool supported(const char* op) {
  const auto handle = c10::Dispatcher::singleton().findSchema({op, ""});
  return handle && handle->typed<bool()>().call();
}

/// oneDNN calls BF16 supported from AVX512_CORE on, but without the BF16 instructions it computes
/// products four times slower than in FP32.
bool emulates_bfloat() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && !__builtin_cpu_supports("avx512bf16")) return true;
  const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (!limit) limit = std::getenv("DNNL_MAX_CPU_ISA");
  return limit && (!strcasecmp(limit, "AVX512_CORE") || !strcasecmp(limit, "AVX512_CORE_VNNI"));
#else
  return false;
#endif
}

bool has_half_unit() {
  static const bool has = supported("mkldnn::_is_mkldnn_fp16_supported");
  return has;
}
bool has_bfloat_unit() {
  static const bool has = supported("mkldnn::_is_mkldnn_bf16_supported") && !emulates_bfloat();
  return has;
}

}  // namespace

bool overrides_enabled() { return enabled_flag().load(std::memory_order_relaxed); }
void set_overrides(bool enabled) { enabled_flag().store(enabled, std::memory_order_relaxed); }

std::string cpu_path() {
  const auto path = [](bool widens) { return widens ? "FP32, rounded once" : "stock"; };
  const auto line = [&](const char* name, c10::ScalarType type) {
    return std::string(name) + " products and attention: " + path(ops::widens_products(type)) +
           ", convolution and backward of attention: " + path(ops::widens_convolution(type));
  };
  return line("float16", c10::kHalf) + "; " + line("bfloat16", c10::kBFloat16);
}

namespace ops {

bool has_product_unit(c10::ScalarType type) {
  if (type != c10::kHalf && type != c10::kBFloat16) return true;
  return type == c10::kHalf ? has_half_unit() : has_bfloat_unit();
}

bool widens_products(c10::ScalarType type) {
  return overrides_enabled() && !has_product_unit(type);
}

bool widens_convolution(c10::ScalarType type) {
  if (type == c10::kHalf) return overrides_enabled();
  return widens_products(type);
}

bool widens_attention_backward(c10::ScalarType type) { return widens_convolution(type); }

}  // namespace ops
}  // namespace halfstep
