#pragma once

// CUDA kernels as plain C++ on the CPU: one fiber a thread, one block at a time. Barriers and
// shuffles are the points where a fiber waits for others; the order of blocks and of the threads
// within a block is chosen by the test, so that a result that depends on it shows. What no real
// GPU would forgive, and what it would forgive silently, is reported: a barrier that not all
// threads reach, a shuffle that names absent lanes, an access outside the buffers of the test, a
// misaligned vector access. Bytes of global memory are counted.
//
// It does not show: speed, occupancy, races within a warp, memory order, PTX.

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum class Order { kForward, kBackward, kShuffled };

/// Settings and findings of this process.
struct State {
  Order block_order = Order::kForward;
  Order thread_order = Order::kForward;
  uint64_t seed = 1;
  int64_t resident_blocks = 3;  ///< what a persistent grid is told the device holds
  std::vector<std::string> errors;
  int64_t bytes_read = 0, bytes_written = 0, launches = 0;
};
State& state();
/// Forgets errors and counts.
void reset();

// ---- what kernels see --------------------------------------------------------------------------
extern thread_local Index thread_index, block_index, block_size, grid_size;

void barrier(const char* file, int line);
/// Bytes of `value` in lane `source` of the caller's warp.
void exchange(uint32_t mask, void* value, size_t size, int source, const char* file, int line);
uint32_t vote(uint32_t mask, bool predicate, const char* file, int line);

template <class T>
T shuffle_down(uint32_t mask, T value, int distance, const char* file, int line) {
  const int lane = int(thread_index.x % 32), source = lane + distance;
  exchange(mask, &value, sizeof(value), source < 32 ? source : lane, file, line);
  return value;
}
template <class T>
T shuffle_xor(uint32_t mask, T value, int lanes, const char* file, int line) {
  exchange(mask, &value, sizeof(value), int(thread_index.x % 32) ^ lanes, file, line);
  return value;
}

/// False, and an error recorded, for an access outside every registered buffer or misaligned.
bool access(const void* at, size_t size, size_t alignment, bool writes);
void count_read(size_t size);
void count_write(size_t size);

template <class T>
T read(const T* from) {
  if (!access(from, sizeof(T), alignof(T), false)) return T{};
  count_read(sizeof(T));
  return *from;
}
template <class T>
T read_uniform(const T* from) {
  if (!access(from, sizeof(T), alignof(T), false)) return T{};
  if (thread_index.x == 0) count_read(sizeof(T));
  return *from;
}
template <class T>
void write(T* to, const T& value) {
  if (!access(to, sizeof(T), alignof(T), true)) return;
  count_write(sizeof(T));
  *to = value;
}

/// Shared memory of a block starts as garbage: what an earlier block left there must not help.
void begin_shared(void* memory, size_t size, uint64_t& last_block);

/// Runs `thread` once for every thread of the grid.
void run(int64_t blocks, int threads, const std::function<void()>& thread);

// ---- what tests use ----------------------------------------------------------------------------
void register_range(const void* begin, size_t size);
void unregister_range(const void* begin);

/// Global memory: exactly as large as asked for, so that AddressSanitizer sees its ends too.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, const T& value = T()) : data_(new T[count]), count_(count) {
    for (size_t i = 0; i < count; ++i) data_[i] = value;
    register_range(data_, count * sizeof(T));
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    for (size_t i = 0; i < count_; ++i) data_[i] = values[i];
  }
  ~Buffer() {
    unregister_range(data_);
    delete[] data_;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  std::vector<char> bytes() const {
    const auto* begin = reinterpret_cast<const char*>(data_);
    return {begin, begin + count_ * sizeof(T)};
  }

 private:
  T* data_;
  size_t count_;
};

/// Calls `body` (which starts from fresh data and returns its results as bytes) in every order of
/// blocks and threads and for several sizes of a persistent grid. Returns what was reported, and
/// one line for each order whose result is not that of the first. kThree: forward, backward and
/// shuffled only, each with another grid, for one more of many similar cases.
enum class Orders { kAll, kThree };
std::vector<std::string> in_all_orders(const std::function<std::vector<char>()>& body,
                                       Orders which = Orders::kAll);

}  // namespace emulation

// ---- the CUDA names that kernel sources use
// ------------------------------------------------------
#define __global__
#define __device__
#define __launch_bounds__(...)
#define HALFSTEP_SHARED(type, name, count) \
  static type name[count];                 \
  static uint64_t name##_block;            \
  emulation::begin_shared(name, sizeof(name), name##_block)
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size
#define __syncthreads() emulation::barrier(__FILE__, __LINE__)
#define __shfl_down_sync(mask, value, distance) \
  emulation::shuffle_down(mask, value, distance, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  emulation::shuffle_xor(mask, value, lanes, __FILE__, __LINE__)
#define __ballot_sync(mask, predicate) emulation::vote(mask, predicate, __FILE__, __LINE__)

namespace halfstep::cuda {

using Stream = struct CUstream_st*;

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream,
           Arguments&&... arguments) {
  // Parameters travel by value: what the caller changes later is not seen.
  const std::tuple<std::decay_t<Parameters>...> values(static_cast<Parameters>(arguments)...);
  emulation::run(blocks, threads, [&] { std::apply(kernel, values); });
  return 0;
}

template <class... Parameters>
int64_t resident_blocks(void (*)(Parameters...), int) {
  return emulation::state().resident_blocks;
}

}  // namespace halfstep::cuda
