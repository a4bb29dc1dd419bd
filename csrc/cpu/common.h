#pragma once

// What the CPU glue shares: the division of work over threads, and numbers held in tensors.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "isa/kernels.h"

namespace halfstep::cpu {

/// The one element of a float32 or float64 tensor.
inline double number(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? *tensor.const_data_ptr<double>()
                                             : double(*tensor.const_data_ptr<float>());
}

/// Blocks of math::kBlock elements of many tensors, numbered in one run, so that threads share the
/// work by blocks and not by tensors. Results never depend on how the blocks are divided.
class Blocks {
 public:
  void add(int64_t numel) {
    numels_.push_back(numel);
    first_.push_back(total());
    end_ = total() + (numel + math::kBlock - 1) / math::kBlock;
  }
  int64_t total() const { return end_; }
  int64_t first(size_t tensor) const { return first_[tensor]; }
  int64_t count(size_t tensor) const { return (numels_[tensor] + math::kBlock - 1) / math::kBlock; }

  /// body(tensor, block, begin, end) for every block, in parallel.
  template <class Body>
  void for_each(const Body& body) const {
    constexpr int64_t kGrain = 8;  // 32,768 elements: below that a thread costs more than it brings
    at::parallel_for(0, total(), kGrain, [&](int64_t begin, int64_t end) {
      size_t tensor =
          size_t(std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin()) - 1;
      for (int64_t block = begin; block < end; ++block) {
        while (block >= first_[tensor] + count(tensor)) ++tensor;
        const int64_t start = (block - first_[tensor]) * math::kBlock;
        body(tensor, block, start, std::min(start + math::kBlock, numels_[tensor]));
      }
    });
  }

 private:
  std::vector<int64_t> numels_, first_;
  int64_t end_ = 0;
};

}  // namespace halfstep::cpu
