#pragma once

// Products with a fused epilogue: descriptors, plans and the choice between fused and unfused. The
// library that computes them stands behind `Lt`, the clock behind `Stopwatch`, so that all of this
// runs without a GPU: tests/cpp/plans_test.cpp. No torch, no CUDA here.

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../math/platform.h"

namespace halfstep::cuda {

using math::Dtype;

/// What is done to a product before it is stored, by cuBLASLt's names. The aux ones also write what
/// the backward needs; kBgradB adds the columns of the second operand up on the way.
enum class Epilogue : int32_t {
  kRelu,
  kReluBias,
  kReluAux,
  kReluAuxBias,
  kGelu,
  kGeluBias,
  kGeluAux,
  kGeluAuxBias,
  kBgradB,
};

/// D = op(A) op(B), column-major as cuBLASLt counts: D is rows x columns. All that a plan depends
/// on; two problems with equal members share one.
struct Problem {
  int64_t rows = 0, columns = 0, inner = 0;
  int64_t a_stride = 0, b_stride = 0, d_stride = 0, aux_stride = 0;
  int32_t transposes_a = 0, transposes_b = 0;
  Dtype dtype{};
  Epilogue epilogue{};
  int32_t alignment = 0;  ///< bytes to which A, B and D are all aligned, at most 256
  int32_t device = 0;

  friend bool operator<(const Problem& a, const Problem& b) { return a.key() < b.key(); }
  std::array<int64_t, 13> key() const {
    return {rows,       columns,      inner,        a_stride,       b_stride,          d_stride,
            aux_stride, transposes_a, transposes_b, int64_t(dtype), int64_t(epilogue), alignment,
            device};
  }
};

/// The alignment that all of the pointers have.
inline int32_t common_alignment(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 256;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return int32_t(bits & (~bits + 1));
}

struct Pointers {
  const void *a = nullptr, *b = nullptr;
  void* d = nullptr;
  void* bias = nullptr;  ///< read, or written for kBgradB
  void* aux = nullptr;
};

/// One way to compute a product, as cuBLASLt's heuristics return it.
struct Algorithm {
  std::array<uint64_t, 8> opaque{};
  int64_t workspace = 0;
};

/// The few calls of cuBLASLt that plans need. A handle is null when its creation failed.
class Lt {
 public:
  using Handle = void*;
  using Stream = struct CUstream_st*;
  struct Operands {
    Handle product, a, b, d;
  };
  virtual ~Lt() = default;
  virtual Handle create_product(const Problem& problem) = 0;
  virtual void destroy_product(Handle product) = 0;
  virtual Handle create_layout(Dtype dtype, int64_t rows, int64_t columns, int64_t stride) = 0;
  virtual void destroy_layout(Handle layout) = 0;
  /// The best first, at most `count`, none that needs more workspace.
  virtual std::vector<Algorithm> algorithms(const Operands& operands, const Problem& problem,
                                            int64_t most_workspace, int count) = 0;
  /// False where the call was refused; nothing has been started then.
  virtual bool multiply(const Operands& operands, const Problem& problem, const Pointers& pointers,
                        const Algorithm& algorithm, void* workspace, Stream stream) = 0;
};

/// Milliseconds on the device that `work` takes. Not inside a graph capture.
using Stopwatch = std::function<double(const std::function<void()>& work)>;

/// A handle that is destroyed once, by the library that made it.
class Descriptor {
 public:
  using Destroy = void (Lt::*)(Lt::Handle);
  Descriptor() = default;
  Descriptor(Lt& lt, Lt::Handle handle, Destroy destroy)
      : lt_(&lt), handle_(handle), destroy_(destroy) {}
  ~Descriptor() {
    if (handle_) (lt_->*destroy_)(handle_);
  }
  Descriptor(Descriptor&& other) noexcept
      : lt_(other.lt_), handle_(std::exchange(other.handle_, nullptr)), destroy_(other.destroy_) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(lt_, other.lt_);
    std::swap(handle_, other.handle_);
    std::swap(destroy_, other.destroy_);
    return *this;
  }
  Lt::Handle get() const { return handle_; }

 private:
  Lt* lt_ = nullptr;
  Lt::Handle handle_ = nullptr;
  Destroy destroy_ = nullptr;
};

/// Descriptors of one problem, its algorithms, and which of them is used.
class Plan {
 public:
  static constexpr int kUnfused = -1;
  static constexpr int kCandidates = 4;  ///< the first of cuBLASLt's list is not always the best

  Plan(Lt& lt, const Problem& problem, int64_t most_workspace) : lt_(lt), problem_(problem) {
    const auto layout = [&](int64_t rows, int64_t columns, int64_t stride) {
      return Descriptor(lt, lt.create_layout(problem.dtype, rows, columns, stride),
                        &Lt::destroy_layout);
    };
    const Problem& p = problem;
    product_ = Descriptor(lt, lt.create_product(p), &Lt::destroy_product);
    a_ = p.transposes_a ? layout(p.inner, p.rows, p.a_stride) : layout(p.rows, p.inner, p.a_stride);
    b_ = p.transposes_b ? layout(p.columns, p.inner, p.b_stride)
                        : layout(p.inner, p.columns, p.b_stride);
    d_ = layout(p.rows, p.columns, p.d_stride);
    if (product_.get() && a_.get() && b_.get() && d_.get())
      algorithms_ = lt.algorithms(operands(), p, most_workspace, kCandidates);
    if (algorithms_.empty()) choice_ = kUnfused;
  }

  const std::optional<int>& choice() const { return choice_; }
  /// Bytes for the chosen algorithm, or for any of them as long as none is chosen.
  int64_t workspace() const {
    int64_t most = 0;
    for (size_t i = 0; i < algorithms_.size(); ++i)
      if (!choice_ || *choice_ == int(i)) most = std::max(most, algorithms_[i].workspace);
    return most;
  }

  /// Times the unfused way and every algorithm, and keeps the quickest for good.
  void choose(const Pointers& pointers, void* workspace, Lt::Stream stream,
              const std::function<void()>& unfused, const Stopwatch& stopwatch) {
    int best = kUnfused;
    double least = stopwatch(unfused);
    for (int i = 0; i < int(algorithms_.size()); ++i) {
      bool ran = true;
      const double time = stopwatch([&] { ran = ran && run(i, pointers, workspace, stream); });
      if (!ran || !(time < least)) continue;
      best = i;
      least = time;
    }
    choice_ = best;
  }

  bool run(int index, const Pointers& pointers, void* workspace, Lt::Stream stream) {
    return lt_.multiply(operands(), problem_, pointers, algorithms_[size_t(index)], workspace,
                        stream);
  }

 private:
  Lt::Operands operands() const { return {product_.get(), a_.get(), b_.get(), d_.get()}; }

  Lt& lt_;
  Problem problem_;
  Descriptor product_, a_, b_, d_;
  std::vector<Algorithm> algorithms_;
  std::optional<int> choice_;
};

/// Plans of a process. A plan is made, measured and chosen at its problem's first use outside of a
/// capture, and stays: the same call gives the same bits from then on.
class Plans {
 public:
  /// Memory for the workspace, alive until the call has been queued.
  using Allocate = std::function<void*(int64_t bytes)>;
  /// What the caller knows of this call.
  struct Call {
    Lt::Stream stream = nullptr;
    bool may_measure = true;  ///< not while a graph is captured
    Allocate allocate;
    std::function<void()> unfused;
    Stopwatch stopwatch;
  };

  Plans(Lt& lt, int64_t most_workspace) : lt_(lt), most_workspace_(most_workspace) {}

  /// Computes the problem fused. False where it is not to be, or not known to be, quicker: then the
  /// caller computes it unfused, and nothing has been started but measurements.
  bool run(const Problem& problem, const Pointers& pointers, const Call& call) {
    const std::lock_guard<std::mutex> lock(mutex_);  // descriptors carry a call's pointers
    auto found = plans_.find(problem);
    if (found == plans_.end()) {
      if (!call.may_measure || plans_.size() >= kMost) return false;
      found = plans_.emplace(problem, std::make_unique<Plan>(lt_, problem, most_workspace_)).first;
    }
    Plan& plan = *found->second;
    if (plan.choice() == Plan::kUnfused) return false;
    if (!plan.choice() && !call.may_measure) return false;
    void* workspace = plan.workspace() > 0 ? call.allocate(plan.workspace()) : nullptr;
    if (!plan.choice()) plan.choose(pointers, workspace, call.stream, call.unfused, call.stopwatch);
    return plan.choice() != Plan::kUnfused &&
           plan.run(*plan.choice(), pointers, workspace, call.stream);
  }

  size_t size() const { return plans_.size(); }
  /// Problems that get a plan: where every batch has another length, the later ones are unfused.
  static constexpr size_t kMost = 1024;

 private:
  Lt& lt_;
  int64_t most_workspace_;
  std::mutex mutex_;
  std::map<Problem, std::unique_ptr<Plan>> plans_;
};

}  // namespace halfstep::cuda
