#pragma once

// What the training programs here share: arguments, a progress bar, numbers of paired seeds, JSON.

#include <chrono>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace job {

/// Where a whole number from `lowest` goes.
struct Number {
  int* value;
  int lowest;
};

/// Takes "--name value" and "--name=value". False after --help, which prints `usage`; a wrong
/// argument throws.
bool parse(int argc, char** argv, const char* usage,
           const std::map<std::string, std::string*>& texts,
           const std::map<std::string, Number>& numbers);

/// What main returns: 0, or 1 after "program: what was thrown", in one line on stderr.
int run(const char* program, const std::function<void()>& body);

/// A bar on stderr.
class Progress {
 public:
  explicit Progress(int total) : total_(total) {}
  void tick();

 private:
  int total_, done_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

double median(std::vector<double> values);
double mean(const std::vector<double>& values);
/// The sample's standard deviation; 0 of fewer than two.
double spread(const std::vector<double>& values);

/// Makes the folder of --out where there is none, or throws.
void make_folder(const std::string& path);

std::string json_text(const std::string& text);
template <class Values>
std::string json_list(const Values& values) {
  std::ostringstream out;
  out.precision(17);
  out << "[";
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << "]";
  return out.str();
}
/// {"halfstep": …, "torch": …, "compiler": …}
std::string json_versions();

}  // namespace job
