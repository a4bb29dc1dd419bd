#pragma once

// Test data: tensors of any dtype in emulated global memory, and the table of rows over them.

#include <cmath>
#include <memory>
#include <random>

#include "csrc/cpu/isa/kernels.h"
#include "csrc/math/half.h"
#include "cuda/kernels.h"
#include "emulation.h"

namespace emulation {

using halfstep::cuda::Row;
using halfstep::cuda::Table;
using halfstep::math::Dtype;

/// A flat array of bytes; `offset` elements of its dtype are left free at the start, so that data
/// need not be 16-byte aligned. `element_size`: for arrays of integers of another size.
class Array {
 public:
  Array(Dtype dtype, int64_t count, int64_t offset = 0, int64_t element_size = 0)
      : dtype_(dtype),
        count_(count),
        offset_(offset),
        size_(element_size > 0 ? element_size : halfstep::math::dtype_size(dtype)),
        bytes_(size_t((count + offset) * size_ + 15)) {}
  Dtype dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  void* data() {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    const uintptr_t aligned = (address + 15) / 16 * 16;
    return reinterpret_cast<char*>(aligned) + offset_ * size_;
  }
  const void* data() const { return const_cast<Array*>(this)->data(); }
  double get(int64_t i) const {
    using namespace halfstep::math;
    switch (dtype_) {
      case Dtype::kF16:
        return half_to_float(static_cast<const uint16_t*>(data())[i]);
      case Dtype::kBF16:
        return bfloat_to_float(static_cast<const uint16_t*>(data())[i]);
      case Dtype::kF32:
        return static_cast<const float*>(data())[i];
      default:
        return static_cast<const double*>(data())[i];
    }
  }
  void set(int64_t i, double x) {
    using namespace halfstep::math;
    switch (dtype_) {
      case Dtype::kF16:
        static_cast<uint16_t*>(data())[i] = float_to_half(float(x));
        break;
      case Dtype::kBF16:
        static_cast<uint16_t*>(data())[i] = float_to_bfloat(float(x));
        break;
      case Dtype::kF32:
        static_cast<float*>(data())[i] = float(x);
        break;
      default:
        static_cast<double*>(data())[i] = x;
    }
  }
  /// The elements as bytes.
  std::vector<char> bytes() const {
    const auto* begin = static_cast<const char*>(data());
    return {begin, begin + count_ * size_};
  }
  void assign(const Array& other) {
    const std::vector<char> from = other.bytes();
    if (!from.empty()) std::memcpy(data(), from.data(), from.size());
  }

 private:
  Dtype dtype_;
  int64_t count_, offset_, size_;
  Buffer<char> bytes_;
};

inline void fill_normal(Array& array, double scale, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, scale);
  for (int64_t i = 0; i < array.count(); ++i) array.set(i, normal(random));
}

/// Rows in emulated memory; `index` counts up.
class Rows {
 public:
  void add(const halfstep::math::StepTensor& tensor, int64_t numel) {
    rows_.push_back({tensor, numel, table_.chunks, int64_t(rows_.size())});
    table_.note(rows_.back());
  }
  Table table() {
    memory_ = std::make_unique<Buffer<Row>>(rows_);
    table_.rows = memory_->data();
    table_.count = int64_t(rows_.size());
    return table_;
  }

 private:
  std::vector<Row> rows_;
  Table table_;
  std::unique_ptr<Buffer<Row>> memory_;
};

inline void append(std::vector<char>& to, const std::vector<char>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace emulation
