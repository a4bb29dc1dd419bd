#pragma once

// What the CUDA glue shares: the stream, errors, scratch memory, and the table of rows.

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "../../cuda/kernels.h"
#include "../ops/gather.h"

namespace halfstep::cuda {

/// Makes `tensor`'s device current; kernels run on its current stream.
class Place {
 public:
  explicit Place(const at::Tensor& tensor)
      : device_(tensor.device()),
        guard_(device_),
        stream_(c10::cuda::getCurrentCUDAStream(device_.index()).stream()) {}
  Stream stream() const { return stream_; }
  c10::Device device() const { return device_; }
  /// Uninitialised bytes from torch's allocator, safe to drop once the kernels are queued.
  at::Tensor scratch(int64_t bytes) const;

 private:
  c10::Device device_;
  c10::DeviceGuard guard_;
  Stream stream_;
};

/// Raises with the op's name when a launcher failed.
void check(const char* op, Status status);

/// The table on the device. `table` is the op's argument of that name: empty (or a graph is being
/// captured), and the rows go to scratch memory at each call; or {device bytes, CPU bytes}, kept by
/// the caller between calls: rows are uploaded only when one of them changed. The CPU tensor
/// mirrors what the device holds.
class DeviceTable {
 public:
  DeviceTable(const char* op, const Place& place, const std::vector<Row>& rows,
              at::TensorList table);
  const Table& get() const { return table_; }

 private:
  Table table_;
  at::Tensor memory_;
};

/// Rows of `numels`, numbered in one run of chunks.
std::vector<Row> make_rows(const std::vector<math::StepTensor>& tensors,
                           const std::vector<int64_t>& numels, const std::vector<int64_t>& index);
inline std::vector<Row> make_rows(const ops::Gathered& work) {
  return make_rows(work.tensors, work.numels, work.index);
}

Scalar scalar(const std::optional<at::Tensor>& tensor);

}  // namespace halfstep::cuda
