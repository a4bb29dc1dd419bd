// The harness itself: faults are planted, and each must be caught; the same kernel without the
// fault must pass.

#include <memory>

#include "../cpp/catch.h"
#include "cuda/reduce.h"

using emulation::Buffer;

namespace {

bool reports(const std::vector<std::string>& findings, const std::string& text) {
  for (const auto& finding : findings)
    if (finding.find(text) != std::string::npos) return true;
  return false;
}

std::vector<std::string> run_once(const std::function<void()>& body) {
  emulation::reset();
  body();
  return emulation::state().errors;
}

enum class Fault { kNone, kMissingBarrier, kDivergentBarrier, kReturnsEarly };

/// Reverses 64 numbers through shared memory.
void reverse(const int* from, int* to, Fault fault) {
  HALFSTEP_SHARED(int, shared, 64);
  const int i = int(threadIdx.x);
  if (fault == Fault::kReturnsEarly && i >= 60) return;
  shared[i] = emulation::read(from + i);
  if (fault == Fault::kDivergentBarrier) {
    if (i < 32)
      __syncthreads();
    else
      __syncthreads();
  } else if (fault != Fault::kMissingBarrier) {
    __syncthreads();
  }
  emulation::write(to + i, shared[63 - i]);
}

std::vector<char> reversed(Fault fault) {
  Buffer<int> from(64), to(64);
  for (int i = 0; i < 64; ++i) from[size_t(i)] = i;
  halfstep::cuda::launch(reverse, 1, 64, nullptr, from.data(), to.data(), fault);
  return to.bytes();
}

/// A sum over lanes with the mask that the fault asks for.
void sum_lanes(int* to, uint32_t mask, int active) {
  if (int(threadIdx.x) >= active) return;
  int value = int(threadIdx.x);
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_down_sync(mask, value, distance);
  if (threadIdx.x == 0) emulation::write(to, value);
}

void read_lane_outside(int* to) {
  const int value = __shfl_xor_sync(0x0000ffffu, int(threadIdx.x), 16);
  emulation::write(to + threadIdx.x, value);
}

void fill(int* to, int64_t count) { emulation::write(to + threadIdx.x % count, 1); }
void fill_beyond(int* to, int64_t count) { emulation::write(to + threadIdx.x + 0 * count, 1); }
void read_before(const int* from, int* to) { emulation::write(to, emulation::read(from - 1)); }
void write_wide(int* to) {
  struct alignas(16) Four {
    int x[4];
  };
  emulation::write(reinterpret_cast<Four*>(to + 1), Four{});
}

/// What a float atomicAdd does: the sum is rounded in the order in which threads arrive.
void add_in_any_order(const float* from, float* to) {
  emulation::write(
      to, emulation::read(to) + emulation::read(from + blockIdx.x * blockDim.x + threadIdx.x));
}
void add_in_a_tree(const float* from, float* to) {
  using namespace halfstep::cuda;
  HALFSTEP_SHARED(float, shared, kWarps);
  const float sum = reduce_block(emulation::read(from + threadIdx.x), Sum(), shared);
  if (threadIdx.x == 0) emulation::write(to, sum);
}

Buffer<float>& uneven() {
  static Buffer<float> values(256);
  for (size_t i = 0; i < 256; ++i) values[i] = 1.0f / float(i + 1) + (i % 3 ? 1e4f : 0.0f);
  return values;
}

}  // namespace

TEST_CASE("a missing barrier shows as a result that depends on the order", "[harness]") {
  CHECK(emulation::in_all_orders([] { return reversed(Fault::kNone); }).empty());
  CHECK(reports(emulation::in_all_orders([] { return reversed(Fault::kMissingBarrier); }),
                "the result depends on the order"));
}

TEST_CASE("a divergent barrier is reported with its places", "[harness]") {
  const auto two = run_once([] { reversed(Fault::kDivergentBarrier); });
  CHECK(reports(two, "divergent barrier: 32 of 64 threads wait at the barrier of harness_test"));
  const auto early = run_once([] { reversed(Fault::kReturnsEarly); });
  CHECK(reports(early, "4 of 64 threads have returned"));
}

TEST_CASE("a shuffle with a bad mask is reported", "[harness]") {
  Buffer<int> to(64);
  using halfstep::cuda::launch;
  CHECK(run_once([&] { launch(sum_lanes, 1, 32, nullptr, to.data(), 0xffffffffu, 32); }).empty());
  CHECK(to[0] == 496);
  CHECK(reports(run_once([&] { launch(sum_lanes, 1, 32, nullptr, to.data(), 0xffffffffu, 20); }),
                "shuffle names absent lanes"));
  CHECK(reports(run_once([&] { launch(sum_lanes, 1, 20, nullptr, to.data(), 0xffffffffu, 20); }),
                "shuffle names absent lanes"));
  CHECK(reports(run_once([&] { launch(sum_lanes, 1, 32, nullptr, to.data(), 0x0000ffffu, 32); }),
                "is not in its own mask"));
  CHECK(reports(run_once([&] { launch(read_lane_outside, 1, 16, nullptr, to.data()); }),
                "which mask ffff does not name"));
}

TEST_CASE("accesses outside the buffers are reported", "[harness]") {
  using halfstep::cuda::launch;
  Buffer<int> to(60), other(60);
  CHECK(run_once([&] { launch(fill, 1, 64, nullptr, to.data(), int64_t(60)); }).empty());
  CHECK(reports(run_once([&] { launch(fill_beyond, 1, 64, nullptr, to.data(), int64_t(60)); }),
                "out-of-bounds write of 4 bytes, 4 beyond a buffer of 240, by thread 60"));
  CHECK(reports(run_once([&] { launch(read_before, 1, 1, nullptr, other.data(), to.data()); }),
                "out-of-bounds read of 4 bytes"));
  CHECK(reports(run_once([&] { launch(write_wide, 1, 1, nullptr, to.data()); }),
                "misaligned write of 16 bytes"));
}

TEST_CASE("a reduction in order of arrival is reported, a tree is not", "[harness]") {
  using halfstep::cuda::launch;
  const auto atomic = [] {
    Buffer<float> to(1, 0.0f);
    launch(add_in_any_order, 4, 64, nullptr, uneven().data(), to.data());
    return to.bytes();
  };
  const auto tree = [] {
    Buffer<float> to(1, 0.0f);
    launch(add_in_a_tree, 1, 256, nullptr, uneven().data(), to.data());
    return to.bytes();
  };
  CHECK(reports(emulation::in_all_orders(atomic), "the result depends on the order: blocks"));
  CHECK(emulation::in_all_orders(tree).empty());
}

TEST_CASE("a vote gathers the lanes' predicates", "[harness]") {
  Buffer<uint32_t> to(1);
  const auto kernel = +[](uint32_t* out) {
    const uint32_t votes = __ballot_sync(0xffffffffu, threadIdx.x % 3 == 0);
    if (threadIdx.x == 0) emulation::write(out, votes);
  };
  CHECK(run_once([&] { halfstep::cuda::launch(kernel, 1, 32, nullptr, to.data()); }).empty());
  CHECK(to[0] == 0x49249249u);
}

TEST_CASE("bytes are counted, uniform reads once a block", "[harness]") {
  Buffer<int> from(64), to(64);
  const auto kernel = +[](const int* a, int* b) {
    const int shared_by_all = emulation::read_uniform(a);
    emulation::write(b + threadIdx.x, shared_by_all + emulation::read(a + threadIdx.x));
  };
  CHECK(run_once([&] {
          halfstep::cuda::launch(kernel, 1, 64, nullptr, from.data(), to.data());
        }).empty());
  CHECK(emulation::state().bytes_read == 4 + 256);
  CHECK(emulation::state().bytes_written == 256);
}
