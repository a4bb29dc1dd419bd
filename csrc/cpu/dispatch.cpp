#include <cstdlib>
#include <cstring>

#include "isa/kernels.h"

namespace halfstep::cpu {

namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");  // the variable torch reads
  const bool only_default = wish && std::strcmp(wish, "default") == 0;
  const bool only_avx2 = wish && std::strcmp(wish, "avx2") == 0;
  if (avx512 && !only_default && !only_avx2) return kKernelsAvx512;
  if (avx2 && !only_default) return kKernelsAvx2;
#endif
  return kKernelsDefault;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace halfstep::cpu
