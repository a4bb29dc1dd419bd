// A file is a row of records: length (uint64), masked CRC-32C of these eight bytes, the bytes,
// their masked CRC-32C. Each holds one Event in protocol-buffer encoding: wall_time = 1 (double),
// step = 2 (varint), file_version = 3 (string, in the first), summary = 5, which holds value = 1
// {tag = 1 (string), simple_value = 2 (float)}.

#include <halfstep/tensorboard.h>

#include <c10/util/Exception.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace halfstep {

namespace {

constexpr std::array<uint32_t, 256> kTable = [] {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t byte = i;
    for (int bit = 0; bit < 8; ++bit) byte = byte >> 1 ^ (byte & 1 ? 0x82F63B78u : 0u);
    table[i] = byte;
  }
  return table;
}();

uint32_t masked_crc(const std::string& data) {
  uint32_t crc = 0xFFFFFFFFu;
  for (const char c : data) crc = crc >> 8 ^ kTable[(crc ^ uint8_t(c)) & 255];
  crc = ~crc;
  return (crc >> 15 | crc << 17) + 0xA282EAD8u;
}

/// Little-endian, as protocol buffers and TFRecord write numbers.
template <class T>
std::string raw(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

std::string varint(uint64_t number) {
  std::string out;
  for (; number > 127; number >>= 7) out += char((number & 127) | 128);
  out += char(number);
  return out;
}

std::string field(int number, const std::string& bytes) {
  return varint(uint64_t(number) << 3 | 2).append(varint(bytes.size())).append(bytes);
}

std::string event(double wall_time, int64_t step, const std::string& rest) {
  std::string data(1, '\x09');
  data += raw(wall_time);
  if (step != 0) data.append(1, '\x10').append(varint(uint64_t(step)));
  data += rest;
  const std::string length = raw(uint64_t(data.size()));
  return length + raw(masked_crc(length)) + data + raw(masked_crc(data));
}

double now() {
  timeval time{};
  ::gettimeofday(&time, nullptr);
  return double(time.tv_sec) + 1e-6 * double(time.tv_usec);
}

// POSIX calls, not std::filesystem: see file.cpp.
void make_folder(const std::string& folder) {
  for (size_t at = 1; at <= folder.size(); ++at)
    if (at == folder.size() || folder[at] == '/') ::mkdir(folder.substr(0, at).c_str(), 0777);
  struct stat what {};
  TORCH_CHECK(::stat(folder.c_str(), &what) == 0 && S_ISDIR(what.st_mode),
              "cannot make the folder '", folder,
              "': ", S_ISREG(what.st_mode) ? "it is a file" : std::strerror(errno));
}

}  // namespace

struct TensorBoardWriter::File {
  std::string path;
  std::FILE* file = nullptr;
  explicit File(std::string name) : path(std::move(name)), file(std::fopen(path.c_str(), "wbx")) {
    TORCH_CHECK(file, "cannot write '", path, "': ", std::strerror(errno));
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { std::fclose(file); }
};

TensorBoardWriter::TensorBoardWriter(const std::string& folder) {
  make_folder(folder);
  static std::atomic<unsigned> count{0};
  char host[256] = "host";
  ::gethostname(host, sizeof host - 1);
  const double time = now();
  file_ = std::make_unique<File>(folder + "/events.out.tfevents." + std::to_string(int64_t(time)) +
                                 "." + host + "." + std::to_string(::getpid()) + "." +
                                 std::to_string(count++));
  const std::string first = first_record(time);
  std::fwrite(first.data(), 1, first.size(), file_->file);
  flush();
}
TensorBoardWriter::~TensorBoardWriter() = default;
TensorBoardWriter::TensorBoardWriter(TensorBoardWriter&&) noexcept = default;
TensorBoardWriter& TensorBoardWriter::operator=(TensorBoardWriter&&) noexcept = default;

std::string TensorBoardWriter::first_record(double wall_time) {
  return event(wall_time, 0, field(3, "brain.Event:2"));
}

std::string TensorBoardWriter::record(const std::string& tag, double value, int64_t step,
                                      double wall_time) {
  std::string entry = field(1, tag);
  entry.append(1, '\x15').append(raw(float(value)));
  return event(wall_time, step, field(5, field(1, entry)));
}

void TensorBoardWriter::scalar(const std::string& tag, double value, int64_t step,
                               std::optional<double> wall_time) {
  const std::string bytes = record(tag, value, step, wall_time.value_or(now()));
  std::fwrite(bytes.data(), 1, bytes.size(), file_->file);  // a failure is kept for flush()
}

void TensorBoardWriter::flush() {
  TORCH_CHECK(std::fflush(file_->file) == 0 && !std::ferror(file_->file), "cannot write '",
              file_->path, "': ", std::strerror(errno));
}

const std::string& TensorBoardWriter::path() const { return file_->path; }

}  // namespace halfstep
