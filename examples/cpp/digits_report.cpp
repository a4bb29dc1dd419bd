#include "digits_report.h"

#include <halfstep/version.h>
#include <torch/version.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <sstream>
#include <stdexcept>

namespace digits {

namespace {

constexpr const char* kUsage =
    "usage: train_digits [options]\n"
    "  --device auto|cpu|cuda   auto: the GPU where torch and halfstep have CUDA\n"
    "  --seeds 5                paired seeds of the two arms\n"
    "  --epochs 30              epochs of each\n"
    "  --lesson-seeds 3         seeds of the sigmoid lesson\n"
    "  --lesson-steps 800       steps of each\n"
    "  --out out                folder of digits_cpp.json\n"
    "  --data FILE              examples/data/digits.csv\n"
    "  --save-weights FILE      only train one seed's mixed arm, and write its exact weights\n"
    "  --save-steps 50          after so many steps\n"
    "  --save-seed 0            of this seed\n";

int parse_number(const std::string& name, const std::string& text, int lowest) {
  int value = 0;
  const auto [next, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || next != text.data() + text.size() || value < lowest)
    throw std::invalid_argument(name + " is '" + text + "'; expected a whole number from " +
                                std::to_string(lowest));
  return value;
}

std::vector<double> column(const std::vector<Run>& runs, double Run::*member) {
  std::vector<double> values;
  for (const Run& run : runs) values.push_back(run.*member);
  return values;
}

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / double(values.size());
}

/// The sample's standard deviation.
double spread(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  const double center = mean(values);
  double squares = 0;
  for (const double value : values) squares += (value - center) * (value - center);
  return std::sqrt(squares / double(values.size() - 1));
}

std::string scale_range(std::vector<double> scales) {
  const auto [low, high] = std::minmax_element(scales.begin(), scales.end());
  char text[64];
  std::snprintf(text, sizeof text, *low == *high ? "%g" : "%g to %g", *low, *high);
  return text;
}

void print_arm(const char* name, const std::vector<Run>& runs) {
  const auto accuracy = column(runs, &Run::accuracy);
  int64_t skipped = 0;
  for (const Run& run : runs) skipped += run.skipped;
  std::printf("%-8s%9.2f ± %4.2f%12.2f%16.2f%18s%9lld\n", name, mean(accuracy), spread(accuracy),
              median(column(runs, &Run::step_ms)), runs[0].bytes_per_param,
              scale_range(column(runs, &Run::final_scale)).c_str(),
              static_cast<long long>(skipped));
}

template <class Values>
std::string json_list(const Values& values) {
  std::ostringstream out;
  out.precision(17);
  out << "[";
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << "]";
  return out.str();
}

std::string json_text(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

std::string json_arm(const std::vector<Run>& runs) {
  std::vector<int64_t> skipped;
  for (const Run& run : runs) skipped.push_back(run.skipped);
  const auto list = [&](double Run::*member) { return json_list(column(runs, member)); };
  return "{\"accuracy\": " + list(&Run::accuracy) + ",\n   \"step_ms\": " + list(&Run::step_ms) +
         ",\n   \"bytes_per_param\": " + list(&Run::bytes_per_param) +
         ",\n   \"final_scale\": " + list(&Run::final_scale) +
         ",\n   \"skipped\": " + json_list(skipped) + "}";
}

}  // namespace

std::optional<Options> parse(int argc, char** argv) {
  Options options;
#ifdef DIGITS_CSV
  options.data = DIGITS_CSV;
#else
  options.data = "examples/data/digits.csv";
#endif
  const std::map<std::string, std::string*> texts = {{"--device", &options.device},
                                                     {"--out", &options.out},
                                                     {"--data", &options.data},
                                                     {"--save-weights", &options.save_weights}};
  const std::map<std::string, std::pair<int*, int>> numbers = {
      {"--seeds", {&options.seeds, 1}},
      {"--epochs", {&options.epochs, 1}},
      {"--lesson-seeds", {&options.lesson_seeds, 1}},
      {"--lesson-steps", {&options.lesson_steps, 1}},
      {"--save-steps", {&options.save_steps, 0}},
      {"--save-seed", {&options.save_seed, 0}}};
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i], value;
    if (name == "--help" || name == "-h") {
      std::fputs(kUsage, stdout);
      return std::nullopt;
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
      *number->second.first = parse_number(name, value, number->second.second);
  }
  if (options.device != "auto" && options.device != "cpu" && options.device != "cuda")
    throw std::invalid_argument("--device is '" + options.device + "'; expected auto, cpu or cuda");
  return options;
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

Report::Report(const Options& options, std::string device)
    : device_(std::move(device)), path_(options.out + "/digits_cpp.json") {
  std::error_code error;
  std::filesystem::create_directories(options.out, error);
  if (!std::filesystem::is_directory(options.out))
    throw std::runtime_error("--out " + options.out + " is not a folder and cannot be made one");
}

void Report::print() const {
  std::printf("\ndigits, convolutional net, %zu paired seeds, %s\n", fp32.size(), device_.c_str());
  std::printf("%8s%16s%12s%16s%18s%9s\n", "", "accuracy %", "ms a step", "bytes a param",
              "loss scale", "skipped");
  print_arm("fp32", fp32);
  print_arm("mixed", mixed);
  std::vector<double> pairs;
  for (size_t i = 0; i < fp32.size(); ++i) pairs.push_back(mixed[i].accuracy - fp32[i].accuracy);
  std::printf("mixed - fp32, paired: %+.2f ± %.2f points\n", mean(pairs), spread(pairs));
  std::printf("\nseven sigmoid layers, FP16 weights, %zu seeds: what the loss scale is for\n",
              lesson[0].second.size());
  for (const auto& [name, values] : lesson)
    std::printf("%-8s%9.2f ± %4.2f\n", name.c_str(), mean(values), spread(values));
}

void Report::write() const {
  std::vector<size_t> seeds(fp32.size());
  std::iota(seeds.begin(), seeds.end(), 0);
  std::ofstream file(path_);
  file << "{\n \"arms\": {\n  \"fp32\": " << json_arm(fp32) << ",\n  \"mixed\": " << json_arm(mixed)
       << "\n },\n \"sigmoid\": {";
  for (const auto& [name, values] : lesson)
    file << (&name == &lesson[0].first ? "" : ", ") << json_text(name) << ": " << json_list(values);
  file << "},\n \"seeds\": " << json_list(seeds) << ",\n \"device\": " << json_text(device_)
       << ",\n \"versions\": {\"halfstep\": " << json_text(HALFSTEP_VERSION)
       << ", \"torch\": " << json_text(TORCH_VERSION)
       << ", \"compiler\": " << json_text(__VERSION__) << "}\n}\n";
  if (!file.flush()) throw std::runtime_error("cannot write " + path_);
  std::printf("\nwrote %s\n", path_.c_str());
}

}  // namespace digits
