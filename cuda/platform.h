#pragma once

// One door to the machine for every kernel: nvcc and a GPU, or a C++ compiler and the emulation of
// tests/emulation. A kernel file includes no other system header, starts kernels through launch()
// only, and touches global memory through memory.h only, so that it stays valid C++.

#include "../csrc/math/platform.h"
#include "kernels.h"

#if defined(__CUDA_ARCH__)
#define HALFSTEP_UNROLL _Pragma("unroll")
#else
#define HALFSTEP_UNROLL
#endif

#if defined(HALFSTEP_EMULATION)
#include "emulation.h"
#else

#include <cuda_runtime.h>

/// `count` elements shared by the threads of a block, uninitialised.
#define HALFSTEP_SHARED(type, name, count) __shared__ type name[count]

namespace halfstep::cuda {

/// Starts `kernel` on `blocks` x `threads`; returns the CUDA error code.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream,
              Arguments&&... arguments) {
  if (blocks == 0) return kSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  return Status(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

/// Blocks of `kernel` that the current device holds at once: the size of a grid that strides over
/// its work. Asked once per kernel and device.
template <class... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int threads) {
  constexpr int kDevices = 64;
  static thread_local struct {
    const void* kernel;
    int64_t blocks[kDevices];
  } known[16] = {};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 1;
  auto* entry = known;
  while (entry < known + 15 && entry->kernel && entry->kernel != (const void*)kernel) ++entry;
  if (entry->kernel != (const void*)kernel) *entry = {(const void*)kernel, {}};
  if (entry->blocks[device] == 0) {
    int per_processor = 0, processors = 0;
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0) !=
            cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
      return 1;
    entry->blocks[device] = int64_t(per_processor) * processors;
  }
  return entry->blocks[device];
}

}  // namespace halfstep::cuda

#endif

namespace halfstep::cuda {

/// A grid for `chunks` pieces of work: all of them at once, or as many as are resident.
template <class... Parameters>
int64_t grid_for(void (*kernel)(Parameters...), int threads, int64_t chunks) {
  const int64_t resident = resident_blocks(kernel, threads);
  return chunks < resident ? chunks : resident;
}

}  // namespace halfstep::cuda
