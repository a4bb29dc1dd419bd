#include "common.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <cuda_runtime_api.h>

#include <cstring>

namespace halfstep::cuda {

void check(const char* op, Status status) {
  TORCH_CHECK(status == kSuccess, op, ": ", cudaGetErrorName(cudaError_t(status)), ": ",
              cudaGetErrorString(cudaError_t(status)));
}

at::Tensor Place::scratch(int64_t bytes) const {
  return at::empty({bytes}, at::TensorOptions(at::kByte).device(device_));
}

std::vector<Row> make_rows(const std::vector<math::StepTensor>& tensors,
                           const std::vector<int64_t>& numels, const std::vector<int64_t>& index) {
  std::vector<Row> rows;
  rows.reserve(tensors.size());
  int64_t chunks = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    rows.push_back({tensors[i], numels[i], chunks, index[i]});
    chunks += (numels[i] + kChunk - 1) / kChunk;
  }
  return rows;
}

DeviceTable::DeviceTable(const char* op, const Place& place, const std::vector<Row>& rows,
                         at::TensorList table) {
  table_.count = int64_t(rows.size());
  for (const Row& row : rows) table_.note(row);
  const auto bytes = int64_t(rows.size() * sizeof(Row));
  // A capture only records the upload, which the mirror must not take for done.
  const bool captures =
      c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  if (table.empty() || captures) {
    memory_ = place.scratch(bytes);
    check(op, upload(memory_.data_ptr(), rows.data(), bytes, place.stream()));
  } else {
    memory_ = table[0];
    auto* mirror = table[1].mutable_data_ptr<uint8_t>();
    if (std::memcmp(mirror, rows.data(), size_t(bytes)) != 0) {
      check(op, upload(memory_.data_ptr(), rows.data(), bytes, place.stream()));
      std::memcpy(mirror, rows.data(), size_t(bytes));
    }
  }
  table_.rows = static_cast<const Row*>(memory_.data_ptr());
}

Scalar scalar(const std::optional<at::Tensor>& tensor) {
  if (!tensor) return {};
  return {tensor->const_data_ptr(), tensor->scalar_type() == at::kDouble};
}

}  // namespace halfstep::cuda

/// For Python's cuda_status: what this library was compiled for.
extern "C" __attribute__((visibility("default"))) const char* halfstep_cuda_architectures() {
  return halfstep::cuda::architectures();
}
