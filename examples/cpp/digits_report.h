#pragma once

// What train_digits does beside training: its options, the table and the JSON.

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace digits {

struct Options {
  std::string device = "auto", out = "out", data, save_weights;
  int seeds = 5, epochs = 30, lesson_seeds = 3, lesson_steps = 800, save_steps = 50, save_seed = 0;
};

/// Nothing after --help; a wrong argument throws.
std::optional<Options> parse(int argc, char** argv);

constexpr int kLessonTick = 50;  ///< steps of the lesson between two ticks
inline int lesson_ticks(int steps) { return (steps + kLessonTick - 1) / kLessonTick; }

/// What is kept of one seed of one arm.
struct Run {
  double accuracy = 0, step_ms = 0, bytes_per_param = 0, final_scale = 1;
  int64_t skipped = 0;
};

class Report {
 public:
  /// Makes the folder that write() needs, or throws.
  Report(const Options& options, std::string device);
  void print() const;
  /// digits_cpp.json in the output folder, with the keys of the Python program's digits.json.
  void write() const;

  std::vector<Run> fp32, mixed;
  std::vector<std::pair<std::string, std::vector<double>>> lesson = {
      {"S=1", {}}, {"dynamic", {}}, {"fp32", {}}};

 private:
  std::string device_, path_;
};

}  // namespace digits
