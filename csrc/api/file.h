#pragma once

#include <ATen/core/ivalue.h>

#include <string>

namespace halfstep::api {

/// Writes all of it; 0, or the errno of what went wrong.
int write_all(int descriptor, const void* data, size_t size) noexcept;

/// A file that appears at `path` whole, on commit(), or not at all.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Never throws: a failure is kept for commit().
  void write(const void* data, size_t size) noexcept;
  /// Syncs the file and its folder, and renames. Without `sync` a reader sees all of it or nothing
  /// just as well, but a machine that loses power may keep neither.
  void commit(bool sync = true);

 private:
  std::string target_, temporary_;
  int descriptor_ = -1;
  int error_ = 0;
};

/// Whether the file is an archive of torch::save, a TorchScript module rather than plain data.
bool is_archive(const std::string& path);
/// The tree in a file of torch.save. Errors name the file.
c10::IValue read_file(const std::string& path);
void write_file(const c10::IValue& value, const std::string& path);

}  // namespace halfstep::api
