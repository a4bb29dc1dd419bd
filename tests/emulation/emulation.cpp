#include "emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

thread_local Index thread_index, block_index, block_size, grid_size;

namespace {

enum class Wait { kNothing, kBarrier, kShuffle, kDone };

constexpr size_t kStack = 256 * 1024;
constexpr int kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  unsigned thread = 0;
  Wait wait = Wait::kNothing;
  const char* file = "";
  int line = 0;
  uint32_t mask = 0;
  int source = 0;
  alignas(16) char value[16] = {};
  alignas(16) char result[16] = {};
};

/// One block of threads at a time.
struct Scheduler {
  std::vector<std::unique_ptr<Fiber>> pool;
  ucontext_t main;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  int threads = 0;
  uint64_t blocks_run = 0;
  const void* main_stack = nullptr;  ///< for AddressSanitizer
  size_t main_stack_size = 0;

  void run_block(int count, const std::function<void()>& thread, std::mt19937_64& random);
  void resume(Fiber& fiber);
  void pause();
  bool settle();
  bool settle_shuffles();
  bool settle_barrier();
  void report_stuck();
};

Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

template <class... Parts>
void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  state().errors.push_back(text.str());
}

std::string place(const Fiber& fiber) {
  const std::string file(fiber.file);
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(fiber.line);
}

#if defined(__SANITIZE_ADDRESS__)
void before_switch(void** saved, const void* stack, size_t size) {
  __sanitizer_start_switch_fiber(saved, stack, size);
}
void after_switch(void* saved, const void** stack, size_t* size) {
  __sanitizer_finish_switch_fiber(saved, stack, size);
}
#else
void before_switch(void**, const void*, size_t) {}
void after_switch(void*, const void**, size_t*) {}
#endif

void enter_fiber() {
  Scheduler& s = scheduler();
  after_switch(nullptr, &s.main_stack, &s.main_stack_size);
  (*s.body)();
  s.current->wait = Wait::kDone;
  before_switch(nullptr, s.main_stack, s.main_stack_size);
  swapcontext(&s.current->context, &s.main);
}

void Scheduler::resume(Fiber& fiber) {
  current = &fiber;
  thread_index = {fiber.thread, 0, 0};
  fiber.wait = Wait::kNothing;
  void* saved = nullptr;
  before_switch(&saved, fiber.stack.get(), kStack);
  swapcontext(&main, &fiber.context);
  after_switch(saved, nullptr, nullptr);
}

void Scheduler::pause() {
  Fiber& self = *current;
  void* saved = nullptr;
  before_switch(&saved, main_stack, main_stack_size);
  swapcontext(&self.context, &main);
  after_switch(saved, &main_stack, &main_stack_size);
}

/// A warp's shuffle is complete when every lane that a mask names waits with that mask.
bool Scheduler::settle_shuffles() {
  bool progress = false;
  for (int first = 0; first < threads; first += kWarp) {
    const int lanes = std::min(kWarp, threads - first);
    for (int lane = 0; lane < lanes; ++lane) {
      const Fiber& leader = *pool[first + lane];
      if (leader.wait != Wait::kShuffle) continue;
      const uint32_t mask = leader.mask;
      bool complete = true;
      for (int other = 0; other < kWarp; ++other) {
        if (!(mask >> other & 1)) continue;
        complete &= other < lanes && pool[first + other]->wait == Wait::kShuffle &&
                    pool[first + other]->mask == mask && pool[first + other]->line == leader.line;
      }
      if (!complete) continue;
      for (int other = 0; other < lanes; ++other)
        if (mask >> other & 1) {
          Fiber& fiber = *pool[first + other];
          if (!(mask >> fiber.source & 1))
            fail("shuffle at ", place(fiber), ": thread ", fiber.thread, " reads lane ",
                 fiber.source, ", which mask ", std::hex, mask, " does not name");
          else
            std::memcpy(fiber.result, pool[first + fiber.source]->value, sizeof(fiber.result));
        }
      for (int other = 0; other < lanes; ++other)
        if (mask >> other & 1) pool[first + other]->wait = Wait::kNothing;
      progress = true;
    }
  }
  return progress;
}

bool Scheduler::settle_barrier() {
  for (int i = 0; i < threads; ++i)
    if (pool[i]->wait != Wait::kBarrier || pool[i]->line != pool[0]->line ||
        std::strcmp(pool[i]->file, pool[0]->file) != 0)
      return false;
  for (int i = 0; i < threads; ++i) pool[i]->wait = Wait::kNothing;
  return true;
}

bool Scheduler::settle() { return settle_shuffles() || settle_barrier(); }

void Scheduler::report_stuck() {
  std::map<std::string, int> where;
  const Fiber* shuffling = nullptr;
  for (int i = 0; i < threads; ++i) {
    const Fiber& fiber = *pool[i];
    if (fiber.wait == Wait::kShuffle && !shuffling) shuffling = &fiber;
    where[fiber.wait == Wait::kDone      ? "have returned"
          : fiber.wait == Wait::kBarrier ? "wait at the barrier of " + place(fiber)
                                         : "wait at the shuffle of " + place(fiber)]++;
  }
  std::ostringstream text;
  for (const auto& [what, count] : where)
    text << (text.tellp() > 0 ? ", " : "") << count << " of " << threads << " threads " << what;
  if (shuffling)
    fail("shuffle names absent lanes (mask ", std::hex, shuffling->mask, "): ", text.str());
  else
    fail("divergent barrier: ", text.str());
}

void Scheduler::run_block(int count, const std::function<void()>& thread, std::mt19937_64& random) {
  threads = count;
  body = &thread;
  ++blocks_run;
  while (int(pool.size()) < count) pool.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *pool[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter_fiber, 0);
    fiber.thread = unsigned(i);
    fiber.wait = Wait::kNothing;
  }
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (;;) {
    if (state().thread_order == Order::kBackward) std::sort(order.rbegin(), order.rend());
    if (state().thread_order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
    for (const int i : order)
      if (pool[i]->wait == Wait::kNothing) resume(*pool[i]);
    bool all_done = true;
    for (int i = 0; i < count; ++i) all_done &= pool[i]->wait == Wait::kDone;
    if (all_done) return;
    if (settle()) continue;
    report_stuck();
    return;  // the fibers that wait are given up
  }
}

/// Start of each registered range and its size.
std::map<uintptr_t, size_t>& ranges() {
  static std::map<uintptr_t, size_t> instance;
  return instance;
}

void wait_at(Wait wait, const char* file, int line) {
  Fiber& fiber = *scheduler().current;
  fiber.wait = wait;
  fiber.file = file;
  fiber.line = line;
  scheduler().pause();
}

}  // namespace

State& state() {
  static State instance;
  return instance;
}

void reset() {
  state().errors.clear();
  state().bytes_read = state().bytes_written = state().launches = 0;
}

void barrier(const char* file, int line) { wait_at(Wait::kBarrier, file, line); }

void exchange(uint32_t mask, void* value, size_t size, int source, const char* file, int line) {
  Fiber& fiber = *scheduler().current;
  if (size > sizeof(fiber.value)) std::abort();
  if (!(mask >> (fiber.thread % kWarp) & 1))
    fail("shuffle at ", file, ":", line, ": thread ", fiber.thread, " is not in its own mask ",
         std::hex, mask);
  std::memcpy(fiber.value, value, size);
  std::memcpy(fiber.result, value, size);
  fiber.mask = mask;
  fiber.source = source;
  wait_at(Wait::kShuffle, file, line);
  std::memcpy(value, fiber.result, size);
}

uint32_t vote(uint32_t mask, bool predicate, const char* file, int line) {
  uint32_t all = predicate ? 1u << (thread_index.x % kWarp) : 0;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    uint32_t other = all;
    exchange(mask, &other, sizeof(other), int(thread_index.x % kWarp) ^ distance, file, line);
    all |= other;
  }
  return all;
}

bool access(const void* at, size_t size, size_t alignment, bool writes) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  const char* verb = writes ? "write" : "read";
  if (address % alignment != 0) {
    fail("misaligned ", verb, " of ", size, " bytes by thread ", thread_index.x, " of block ",
         block_index.x);
    return false;
  }
  auto range = ranges().upper_bound(address);
  if (range != ranges().begin()) {
    --range;
    if (address + size <= range->first + range->second) return true;
    if (address < range->first + range->second + 65536) {
      fail("out-of-bounds ", verb, " of ", size, " bytes, ",
           int64_t(address + size - range->first - range->second), " beyond a buffer of ",
           range->second, ", by thread ", thread_index.x, " of block ", block_index.x);
      return false;
    }
  }
  fail("out-of-bounds ", verb, " of ", size, " bytes outside every buffer by thread ",
       thread_index.x, " of block ", block_index.x);
  return false;
}

void count_read(size_t size) { state().bytes_read += int64_t(size); }
void count_write(size_t size) { state().bytes_written += int64_t(size); }

void begin_shared(void* memory, size_t size, uint64_t& last_block) {
  if (last_block == scheduler().blocks_run) return;
  last_block = scheduler().blocks_run;
  std::memset(memory, 0xcd, size);
}

void run(int64_t blocks, int threads, const std::function<void()>& thread) {
  ++state().launches;
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(state().seed);
  if (state().block_order == Order::kBackward) std::reverse(order.begin(), order.end());
  if (state().block_order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
  block_size = {unsigned(threads), 1, 1};
  grid_size = {unsigned(blocks), 1, 1};
  const size_t before = state().errors.size();
  for (const int64_t block : order) {
    block_index = {unsigned(block), 0, 0};
    scheduler().run_block(threads, thread, random);
    if (state().errors.size() > before) return;
  }
}

void register_range(const void* begin, size_t size) {
  ranges()[reinterpret_cast<uintptr_t>(begin)] = size;
}
void unregister_range(const void* begin) { ranges().erase(reinterpret_cast<uintptr_t>(begin)); }

std::vector<std::string> in_all_orders(const std::function<std::vector<char>()>& body,
                                       Orders which) {
#if defined(__SANITIZE_ADDRESS__)
  const std::vector<int64_t> grids = {3};  // slower, and sizes of grids are the plain build's part
#else
  const std::vector<int64_t> grids = {1, 3, 64};
#endif
  const char* names[] = {"forward", "backward", "shuffled"};
  const State saved = state();
  std::vector<std::string> findings;
  std::vector<char> first;
  bool have_first = false;
  for (const Order blocks : {Order::kForward, Order::kBackward, Order::kShuffled})
    for (const Order threads : {Order::kForward, Order::kBackward, Order::kShuffled})
      for (const int64_t resident : grids) {
        const bool diagonal = blocks == threads && resident == grids[size_t(blocks) % grids.size()];
        if (which == Orders::kThree && !diagonal) continue;
        reset();
        state().block_order = blocks;
        state().thread_order = threads;
        state().resident_blocks = resident;
        state().seed = uint64_t(resident) * 7919 + 1;
        const std::vector<char> result = body();
        for (const auto& error : state().errors) findings.push_back(error);
        if (!have_first) first = result;
        have_first = true;
        if (result != first)
          findings.push_back(std::string("the result depends on the order: blocks ") +
                             names[int(blocks)] + ", threads " + names[int(threads)] + ", " +
                             std::to_string(resident) + " resident blocks");
      }
  state() = saved;
  return findings;
}

}  // namespace emulation
