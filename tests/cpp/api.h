#pragma once

// What the tests of the C++ classes share.

#include <dirent.h>
#include <halfstep/halfstep.h>
#include <torch/torch.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "catch.h"

inline torch::nn::Sequential make_net() {
  torch::manual_seed(0);
  return torch::nn::Sequential(torch::nn::Linear(16, 32), torch::nn::ReLU(),
                               torch::nn::Linear(32, 2));
}

struct Task {
  at::Tensor x = torch::randn({64, 16});
  at::Tensor y = (x.select(1, 0) > 0).to(torch::kLong);
};

inline at::Tensor loss_of(torch::nn::Sequential& net, const Task& task) {
  return torch::nn::functional::cross_entropy(net->forward(task.x).to(torch::kFloat), task.y);
}

inline double iterate(torch::nn::Sequential& net, torch::optim::Optimizer& opt,
                      halfstep::GradScaler& scaler, const Task& task) {
  opt.zero_grad();
  at::Tensor loss;
  {
    halfstep::AutocastGuard guard(torch::kCPU);
    loss = loss_of(net, task);
  }
  scaler.scale(loss).backward();
  scaler.step(opt);
  scaler.update();
  return loss.item<double>();
}

/// What the call throws, or nothing.
inline std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

inline bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// Warnings of torch while it lives.
class Warnings : c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { texts_.push_back(warning.msg()); }
  /// How many of them have `part`.
  int with(const std::string& part) const {
    int count = 0;
    for (const auto& text : texts_) count += has(text, part);
    return count;
  }

 private:
  std::vector<std::string> texts_;
  c10::WarningUtils::WarningHandlerGuard guard_{this};
};

/// A folder of its own, removed at the end. POSIX calls: libtorch.so exports parts of an old
/// std::filesystem.
class Folder {
 public:
  Folder() {
    const char* base = std::getenv("TMPDIR");
    path_ = std::string(base ? base : "/tmp") + "/halfstep_XXXXXX";
    REQUIRE(::mkdtemp(path_.data()));
  }
  ~Folder() {
    for (const auto& name : names()) ::unlink((*this / name).c_str());
    ::rmdir(path_.c_str());
  }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  std::vector<std::string> names() const {
    std::vector<std::string> all;
    DIR* folder = ::opendir(path_.c_str());
    while (const dirent* entry = ::readdir(folder))
      if (entry->d_name[0] != '.') all.push_back(entry->d_name);
    ::closedir(folder);
    return all;
  }

 private:
  std::string path_;
};

inline std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}
inline void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}
