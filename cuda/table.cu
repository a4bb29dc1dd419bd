#include "table.h"

namespace halfstep::cuda {

namespace {

// upload: bytes that a launch carries by value, written to the device.
//   4 KB is what every kernel may take as parameters. Unlike a copy from pinned memory, nothing on
//   the host has to outlive the launch, and a captured graph replays with its own copy.
// Tests: tests/emulation/table_test.cpp, tests/gpu.

constexpr int64_t kPage = 4000;
struct Page {
  unsigned char bytes[kPage];
};

__global__ void write_page(unsigned char* to, Page page, int64_t size) {
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) write(to + i, page.bytes[i]);
}

}  // namespace

#if defined(__CUDA_ARCH_LIST__)
#define HALFSTEP_TEXT_OF(...) #__VA_ARGS__
#define HALFSTEP_TEXT(...) HALFSTEP_TEXT_OF(__VA_ARGS__)
const char* architectures() { return HALFSTEP_TEXT(__CUDA_ARCH_LIST__); }
#endif

Status upload(void* to, const void* host_bytes, int64_t size, Stream stream) {
  for (int64_t done = 0; done < size; done += kPage) {
    Page page;
    const int64_t some = size - done < kPage ? size - done : kPage;
    memcpy(page.bytes, static_cast<const unsigned char*>(host_bytes) + done, size_t(some));
    const Status status =
        launch(write_page, 1, 256, stream, static_cast<unsigned char*>(to) + done, page, some);
    if (status != kSuccess) return status;
  }
  return kSuccess;
}

}  // namespace halfstep::cuda
