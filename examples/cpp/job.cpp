#include "job.h"

#include <c10/util/Exception.h>
#include <halfstep/version.h>
#include <torch/version.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <numeric>
#include <stdexcept>

namespace job {

namespace {

int parse_number(const std::string& name, const std::string& text, int lowest) {
  int value = 0;
  const auto [next, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || next != text.data() + text.size() || value < lowest)
    throw std::invalid_argument(name + " is '" + text + "'; expected a whole number from " +
                                std::to_string(lowest));
  return value;
}

}  // namespace

bool parse(int argc, char** argv, const char* usage,
           const std::map<std::string, std::string*>& texts,
           const std::map<std::string, Number>& numbers) {
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i], value;
    if (name == "--help" || name == "-h") {
      std::fputs(usage, stdout);
      return false;
    }
    const auto equals = name.find('=');
    const bool joined = equals != std::string::npos;
    if (joined) {
      value = name.substr(equals + 1);
      name.resize(equals);
    }
    const auto text = texts.find(name);
    const auto number = numbers.find(name);
    if (text == texts.end() && number == numbers.end())
      throw std::invalid_argument("unknown argument '" + name + "'; --help lists them");
    if (!joined && ++i == argc) throw std::invalid_argument(name + " needs a value");
    if (!joined) value = argv[i];
    if (value.empty()) throw std::invalid_argument(name + " needs a value");
    if (text != texts.end())
      *text->second = value;
    else
      *number->second.value = parse_number(name, value, number->second.lowest);
  }
  return true;
}

int run(const char* program, const std::function<void()>& body) {
  try {
    body();
    return 0;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s: %s\n", program, error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", program, error.what());
  }
  return 1;
}

void Progress::tick() {
  ++done_;
  const int filled = int(40LL * done_ / total_);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start_;
  std::fprintf(stderr, "\r[%s%s] %d/%d  %.0f s%s", std::string(size_t(filled), '#').c_str(),
               std::string(size_t(40 - filled), '.').c_str(), done_, total_, seconds.count(),
               done_ == total_ ? "\n" : "");
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
}

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / double(values.size());
}

double spread(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  const double center = mean(values);
  double squares = 0;
  for (const double value : values) squares += (value - center) * (value - center);
  return std::sqrt(squares / double(values.size() - 1));
}

void make_folder(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (!std::filesystem::is_directory(path))
    throw std::runtime_error("--out " + path + " is not a folder and cannot be made one");
}

std::string json_text(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

std::string json_versions() {
  return "{\"halfstep\": " + json_text(HALFSTEP_VERSION) +
         ", \"torch\": " + json_text(TORCH_VERSION) + ", \"compiler\": " + json_text(__VERSION__) +
         "}";
}

}  // namespace job
