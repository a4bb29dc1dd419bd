#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "export.h"

namespace halfstep {

/// One TensorBoard event file of scalars in a folder, which TensorBoard shows as one run; without
/// protobuf. The Python package writes the same bytes.
class HALFSTEP_API TensorBoardWriter {
 public:
  /// Makes the folder where it is missing. Throws c10::Error, with the path, where it cannot write.
  explicit TensorBoardWriter(const std::string& folder);
  ~TensorBoardWriter();
  TensorBoardWriter(TensorBoardWriter&&) noexcept;
  TensorBoardWriter& operator=(TensorBoardWriter&&) noexcept;

  /// `value`, as FP32, under `tag` at `step`. wall_time: seconds since 1970; now unless given.
  void scalar(const std::string& tag, double value, int64_t step,
              std::optional<double> wall_time = std::nullopt);
  /// Throws c10::Error where what was written so far did not get to the disk.
  void flush();
  const std::string& path() const;

  /// The bytes of a file's first record, and of a scalar's.
  static std::string first_record(double wall_time);
  static std::string record(const std::string& tag, double value, int64_t step, double wall_time);

 private:
  struct File;
  std::unique_ptr<File> file_;
};

}  // namespace halfstep
