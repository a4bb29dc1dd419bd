#include "file.h"

#include <ATen/ops/empty.h>
#include <caffe2/serialize/inline_container.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>

#include "pickle.h"

namespace halfstep::api {

namespace {

// POSIX calls, not std::filesystem: libtorch.so exports parts of an old copy of it, and a program
// linked with both may call a mixture.
using caffe2::serialize::PyTorchStreamReader;
using caffe2::serialize::PyTorchStreamWriter;

/// Runs `read` on the open file; whatever goes wrong is told with the file's name.
template <class Read>
auto reading(const std::string& path, Read read) {
  struct stat what {};
  TORCH_CHECK(::stat(path.c_str(), &what) == 0, "cannot read '", path, "': ", std::strerror(errno));
  TORCH_CHECK(S_ISREG(what.st_mode), "cannot read '", path, "': it is not a file");
  try {
    PyTorchStreamReader reader(path);
    return read(reader);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, "cannot read '", path,
                "' as a checkpoint: ", error.what_without_backtrace());
  } catch (const std::exception& error) {
    TORCH_CHECK(false, "cannot read '", path, "' as a checkpoint: ", error.what());
  }
}

std::string record(PyTorchStreamReader& reader, const std::string& name) {
  const auto [data, size] = reader.getRecord(name);
  return std::string(static_cast<const char*>(data.get()), size);
}

at::Tensor storage(PyTorchStreamReader& reader, const std::string& key, c10::ScalarType type,
                   int64_t elements) {
  auto [data, size] = reader.getRecord("data/" + key);
  const auto width = int64_t(c10::elementSize(type));
  TORCH_CHECK(elements >= 0 && int64_t(size) % width == 0 && elements == int64_t(size) / width,
              "storage ", key, " holds ", size, " bytes; expected ", elements, " elements of ",
              width);
  at::Tensor flat = at::empty({0}, at::TensorOptions(type));
  c10::Storage held(c10::Storage::use_byte_size_t(), size, std::move(data), nullptr, false);
  return flat.set_(std::move(held), 0, {elements}, {1});
}

}  // namespace

namespace {

std::string folder_of(const std::string& path) {
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? "./" : path.substr(0, slash + 1);
}

/// What a link, or a chain of them, names.
std::string followed(std::string path) {
  for (int hop = 0; hop < 40; ++hop) {
    char target[4096];
    const ssize_t size = ::readlink(path.c_str(), target, sizeof target);
    if (size < 0) break;
    path = (target[0] == '/' ? "" : folder_of(path)) + std::string(target, size_t(size));
  }
  return path;
}

}  // namespace

int write_all(int descriptor, const void* data, size_t size) noexcept {
  const char* next = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(descriptor, next, size);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    next += written, size -= size_t(written);
  }
  return 0;
}

AtomicFile::AtomicFile(const std::string& path) {
  // A link keeps pointing where it does: the file it names is what is replaced.
  target_ = followed(path);
  static std::atomic<unsigned> count{0};
  for (int attempt = 0; attempt < 100 && descriptor_ < 0; ++attempt) {
    temporary_ = target_ + ".tmp." + std::to_string(::getpid()) + "." + std::to_string(count++);
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor_ < 0 && errno != EEXIST) break;
  }
  TORCH_CHECK(descriptor_ >= 0, "save: cannot write '", path, "': ", std::strerror(errno));
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, size_t size) noexcept {
  if (error_ == 0) error_ = write_all(descriptor_, data, size);
}

void AtomicFile::commit(bool sync) {
  if (error_ == 0 && sync && ::fsync(descriptor_) != 0) error_ = errno;
  TORCH_CHECK(error_ == 0, "save: cannot write '", target_, "': ", std::strerror(error_));
  TORCH_CHECK(::rename(temporary_.c_str(), target_.c_str()) == 0, "save: cannot write '", target_,
              "': ", std::strerror(errno));
  ::close(descriptor_);
  descriptor_ = -1;
  if (!sync) return;
  const int entry = ::open(folder_of(target_).c_str(), O_RDONLY | O_CLOEXEC);
  if (entry < 0) return;  // a folder that cannot be opened for reading: the file itself is safe
  ::fsync(entry);
  ::close(entry);
}

bool is_archive(const std::string& path) {
  return reading(path,
                 [](PyTorchStreamReader& reader) { return reader.hasRecord("constants.pkl"); });
}

c10::IValue read_file(const std::string& path) {
  return reading(path, [](PyTorchStreamReader& reader) {
    TORCH_CHECK(!reader.hasRecord("constants.pkl"),
                "it is an archive of torch::save; read it with torch::load");
    TORCH_CHECK(reader.hasRecord("data.pkl"), "it has no data.pkl");
    if (reader.hasRecord("byteorder"))
      TORCH_CHECK(record(reader, "byteorder") == "little",
                  "its numbers are big-endian; this machine's are little-endian");
    // One storage may be met more than once, by tied tensors.
    std::map<std::string, at::Tensor> known;
    return unpickle(record(reader, "data.pkl"),
                    [&](const std::string& key, c10::ScalarType type, int64_t elements) {
                      auto& held = known[key];
                      if (!held.defined()) held = storage(reader, key, type, elements);
                      TORCH_CHECK(held.scalar_type() == type && held.numel() == elements,
                                  "storage ", key, " is described in two ways");
                      return held;
                    });
  });
}

void write_file(const c10::IValue& value, const std::string& path) {
  const Pickled tree = pickle(value);
  AtomicFile file(path);
  {
    // The sink reports no failure: the writer would write again from its destructor.
    PyTorchStreamWriter writer([&](const void* data, size_t size) {
      file.write(data, size);
      return size;
    });
    writer.writeRecord("data.pkl", tree.bytes.data(), tree.bytes.size());
    writer.writeRecord("byteorder", "little", 6);
    for (size_t i = 0; i < tree.storages.size(); ++i)
      writer.writeRecord("data/" + std::to_string(i), tree.storages[i].const_data_ptr(),
                         tree.storages[i].storage().nbytes());
    writer.writeEndOfFile();
  }
  file.commit();
}

}  // namespace halfstep::api
