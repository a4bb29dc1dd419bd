#include "digits_report.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <numeric>
#include <stdexcept>

#include "job.h"

namespace digits {

namespace {

using job::json_list;
using job::json_text;
using job::mean;
using job::median;
using job::spread;

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

std::vector<double> column(const std::vector<Run>& runs, double Run::*member) {
  std::vector<double> values;
  for (const Run& run : runs) values.push_back(run.*member);
  return values;
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
  const std::map<std::string, job::Number> numbers = {
      {"--seeds", {&options.seeds, 1}},
      {"--epochs", {&options.epochs, 1}},
      {"--lesson-seeds", {&options.lesson_seeds, 1}},
      {"--lesson-steps", {&options.lesson_steps, 1}},
      {"--save-steps", {&options.save_steps, 0}},
      {"--save-seed", {&options.save_seed, 0}}};
  if (!job::parse(argc, argv, kUsage, texts, numbers)) return std::nullopt;
  if (options.device != "auto" && options.device != "cpu" && options.device != "cuda")
    throw std::invalid_argument("--device is '" + options.device + "'; expected auto, cpu or cuda");
  return options;
}

Report::Report(const Options& options, std::string device)
    : device_(std::move(device)), path_(options.out + "/digits_cpp.json") {
  job::make_folder(options.out);
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
       << ",\n \"versions\": " << job::json_versions() << "\n}\n";
  if (!file.flush()) throw std::runtime_error("cannot write " + path_);
  std::printf("\nwrote %s\n", path_.c_str());
}

}  // namespace digits
