#include "overrides.h"

#include "../cpu/isa/kernels.h"
#include "../cpu/tiles/tiles.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <strings.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

/// The limit that oneDNN keeps to; null without one.
const char* isa_limit() {
  const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (!limit) limit = std::getenv("DNNL_MAX_CPU_ISA");
  const bool none = !limit || !*limit || !strcasecmp(limit, "ALL") || !strcasecmp(limit, "DEFAULT");
  return none ? nullptr : limit;
}

/// oneDNN calls BF16 supported from AVX512_CORE on, but without the BF16 instructions it computes
/// products four times slower than in FP32.
bool emulates_bfloat() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && !__builtin_cpu_supports("avx512bf16")) return true;
  const char* limit = isa_limit();
  return limit && (!strcasecmp(limit, "AVX512_CORE") || !strcasecmp(limit, "AVX512_CORE_VNNI"));
#else
  return false;
#endif
}

#if defined(HALFSTEP_AMX)
constexpr bool kCompiled = true;
#else
constexpr bool kCompiled = false;
#endif

bool is_set_to(const char* variable, const char* value) {
  const char* set = std::getenv(variable);
  return set && !std::strcmp(set, value);
}

/// Intel AMX, and what it multiplies.
struct MatrixUnit {
  bool bfloat = false, half = false;
  MatrixUnit() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__builtin_cpu_supports("avx512bw") || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
      return;
    const bool tiles = edx >> 24 & 1;
    bfloat = tiles && (edx >> 22 & 1);
    half = tiles && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 21 & 1);
#endif
  }
  /// A process must ask Linux for the unit's registers; its threads then have them.
  static bool granted() {
#if defined(__x86_64__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }
  static bool allowed() {
    if (is_set_to("HALFSTEP_TILES", "0") || is_set_to("ATEN_CPU_CAPABILITY", "default") ||
        is_set_to("ATEN_CPU_CAPABILITY", "avx2"))
      return false;
    const char* limit = isa_limit();
    return !limit || strcasestr(limit, "AMX");
  }
};

/// There our FP32 products are quicker than MKL's, which torch takes.
bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
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
  const char* tiles = ops::prefers_matrix_unit(c10::kHalf)
                          ? "; large float16 products: exact, on the BF16 matrix unit"
                      : ops::widens_products(c10::kHalf) && ops::has_vector_tiles()
                          ? "; large float16 products: widened on the way into FP32 vector tiles"
                          : "";
  return line("float16", c10::kHalf) + "; " + line("bfloat16", c10::kBFloat16) + tiles;
}

namespace ops {

bool has_unit(c10::ScalarType type) {
  if (type == c10::kHalf) return has_half_unit();
  return type != c10::kBFloat16 || has_bfloat_unit();
}

bool has_matrix_unit() {
  static const bool has =
      kCompiled && MatrixUnit().bfloat && MatrixUnit::allowed() && MatrixUnit::granted();
  return has;
}

bool has_vector_tiles() {
  static const bool has = cpu::kernels().vector_tiles && !has_half_unit() && !has_matrix_unit() &&
                          !is_set_to("HALFSTEP_TILES", "0") &&
                          (is_amd() || is_set_to("HALFSTEP_TILES", "1"));
  return has;
}

bool has_half_matrix_unit() {
  static const bool has = has_half_unit() && MatrixUnit().half;
  return has;
}

bool prefers_matrix_unit(c10::ScalarType type) {
  return type == c10::kHalf && has_matrix_unit() && !has_half_matrix_unit() && overrides_enabled();
}

bool widens_products(c10::ScalarType type) { return overrides_enabled() && !has_unit(type); }

bool widens_convolution(c10::ScalarType type) {
  if (type == c10::kHalf) return overrides_enabled();
  return widens_products(type);
}

bool widens_attention_backward(c10::ScalarType type) { return widens_convolution(type); }

bool widens_layers(c10::ScalarType type) { return type == c10::kHalf && overrides_enabled(); }

}  // namespace ops
}  // namespace halfstep
