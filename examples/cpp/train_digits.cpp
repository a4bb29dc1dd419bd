// Digits in FP32 and in mixed precision, side by side, and the lesson of the loss scale: the job of
// examples/python/train_digits.py without Python.
//
//   train_digits [--device auto|cpu|cuda] [--seeds 5] [--epochs 30] [--out out]    (--help: all)
//
// Network, initial weights, data order and numbers are those of the Python program: on the CPU the
// weights of the mixed arm are the same bits after any number of steps (same libtorch, same number
// of threads). The FP32 arm agrees to rounding only: torch::optim::AdamW computes a moment as
// beta1 * m + (1 - beta1) * g where Python's torch.optim.AdamW computes m + (1 - beta1) * (g - m).

#include <halfstep/halfstep.h>
#include <torch/serialize.h>
#include <torch/torch.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <fstream>
#include <map>
#include <memory>

#include "digits_report.h"
#include "job.h"

namespace {

using torch::Tensor;

struct Data {
  Tensor x, y, test_x, test_y;
};

/// 64 pixels from 0 to 16 and the digit, as a line of text.
void parse_line(const std::string& line, const std::string& where, float* pixels, int64_t* digit) {
  const char *at = line.data(), *const end = at + line.size();
  for (int i = 0; i < 65; ++i) {
    const int highest = i < 64 ? 16 : 9;
    int value = -1;
    const auto [next, error] = std::from_chars(at, end, value);
    TORCH_CHECK(error == std::errc() && value >= 0 && value <= highest, where, ": field ", i + 1,
                " is '", std::string(at, std::find(at, end, ',')), "'; expected 0 to ", highest);
    if (i < 64)
      pixels[i] = float(value);
    else
      *digit = value;
    TORCH_CHECK(i < 64 ? next < end && *next == ',' : next == end, where,
                ": expected 64 pixels and a digit, separated by commas");
    at = next + 1;
  }
}

Data read_digits(const std::string& path, torch::Device device) {
  std::ifstream file(path);
  TORCH_CHECK(file, "cannot read ", path, "; --data FILE names a copy of examples/data/digits.csv");
  std::vector<float> pixels;
  std::vector<int64_t> digits;
  for (std::string line; std::getline(file, line);) {
    pixels.resize(pixels.size() + 64);
    digits.push_back(0);
    parse_line(line, path + ", line " + std::to_string(digits.size()),
               pixels.data() + pixels.size() - 64, &digits.back());
  }
  const auto n = int64_t(digits.size());
  TORCH_CHECK(n > 1400, path, " has ", n, " lines; expected more than 1400, the training set");
  const Tensor order = torch::randperm(n, at::make_generator<at::CPUGeneratorImpl>(0));
  const Tensor x =
      (torch::tensor(pixels).view({n, 1, 8, 8}).index_select(0, order) / 16).to(device);
  const Tensor y = torch::tensor(digits).index_select(0, order).to(device);
  return {x.slice(0, 0, 1400), y.slice(0, 0, 1400), x.slice(0, 1400), y.slice(0, 1400)};
}

torch::nn::Sequential conv_net() {
  using namespace torch::nn;
  // One push_back a line: the arguments of Sequential(…) may be made from last to first, and then
  // draw each other's random weights.
  Sequential net;
  net->push_back(Conv2d(Conv2dOptions(1, 32, 3).padding(1)));
  net->push_back(ReLU());
  net->push_back(Conv2d(Conv2dOptions(32, 64, 3).padding(1)));
  net->push_back(ReLU());
  net->push_back(MaxPool2d(2));
  net->push_back(Flatten());
  net->push_back(Linear(1024, 128));
  net->push_back(ReLU());
  net->push_back(Linear(128, 10));
  return net;
}

torch::nn::Sequential sigmoid_net() {
  using namespace torch::nn;
  Sequential net;
  net->push_back(Flatten());
  for (int i = 0; i < 7; ++i) {
    net->push_back(Linear(64, 64));
    net->push_back(Sigmoid());
  }
  net->push_back(Linear(64, 10));
  for (const auto& module : net->children())
    if (auto* linear = module->as<Linear>()) {
      init::xavier_uniform_(linear->weight, 0.7);
      init::zeros_(linear->bias);
    }
  return net;
}

/// One way to train: FP32, or FP16 weights with exact masters and a loss-scaling policy.
class Arm {
 public:
  /// `make(model, mixed)` gives the optimizer, once the model has its device and dtype.
  template <class Make>
  Arm(bool mixed, torch::nn::Sequential net, torch::Device on, Make make,
      halfstep::policies::Rule policy = halfstep::policies::Dynamic())
      : model(std::move(net)),
        scaler(halfstep::GradScalerOptions().policy(policy).enabled(mixed)),
        mixed_(mixed),
        device_(on) {
    model->to(device_);
    if (mixed_) halfstep::cast_model(*model);
    optimizer = make(model, mixed_);
  }

  Tensor step(const Tensor& x, const Tensor& y) {
    optimizer->zero_grad();
    Tensor output;
    {
      const halfstep::AutocastGuard guard(device_, mixed_);
      output = model->forward(x);
    }
    const Tensor loss = torch::nn::functional::cross_entropy(output.to(torch::kFloat), y);
    scaler.scale(loss).backward();
    scaler.step(*optimizer);
    scaler.update();
    return loss.detach();
  }

  double accuracy(const Tensor& x, const Tensor& y) {
    const torch::NoGradGuard no_grad;
    const halfstep::AutocastGuard guard(device_, mixed_);
    model->eval();
    const Tensor right = (model->forward(x).argmax(1) == y).to(torch::kFloat).mean();
    model->train();
    return 100 * right.item<double>();
  }

  /// Bytes of distinct storages of weights, gradients and optimizer state, per parameter.
  double held_bytes() const {
    std::map<const void*, size_t> storages;
    const auto count = [&](const Tensor& t) {
      if (t.defined()) storages[t.storage().data()] = t.storage().nbytes();
    };
    int64_t elements = 0;
    for (const Tensor& param : model->parameters()) {
      elements += param.numel();
      count(param);
      count(param.grad());
    }
    if (const auto* ours = dynamic_cast<halfstep::optim::Optimizer*>(optimizer.get())) {
      for (const Tensor& t : ours->state_tensors()) count(t);
    } else {
      for (const auto& [key, state] : optimizer->state()) {
        const auto& moments = dynamic_cast<const torch::optim::AdamWParamState&>(*state);
        count(moments.exp_avg());
        count(moments.exp_avg_sq());
      }
    }
    double bytes = 0;
    for (const auto& [key, size] : storages) bytes += double(size);
    return bytes / double(elements);
  }

  torch::nn::Sequential model;
  std::unique_ptr<torch::optim::Optimizer> optimizer;
  halfstep::GradScaler scaler;

 private:
  bool mixed_;
  torch::Device device_;
};

using OptimizerPtr = std::unique_ptr<torch::optim::Optimizer>;

Arm conv_arm(bool mixed, uint64_t seed, torch::Device device) {
  torch::manual_seed(seed);
  return Arm(mixed, conv_net(), device, [](auto& model, bool is_mixed) -> OptimizerPtr {
    using namespace halfstep::optim;
    if (is_mixed)
      return std::make_unique<AdamW>(model->named_parameters(),
                                     AdamWOptions(2e-3).weight_decay(1e-2));
    return std::make_unique<torch::optim::AdamW>(
        model->parameters(), torch::optim::AdamWOptions(2e-3).weight_decay(1e-2));
  });
}

/// Batches of 100 rows, each epoch in a new order: torch.randperm with a generator of its own.
class Batches {
 public:
  Batches(uint64_t seed, int64_t rows, torch::Device device)
      : order_(at::make_generator<at::CPUGeneratorImpl>(seed)), rows_(rows), device_(device) {}

  int64_t per_epoch() const { return (rows_ + 99) / 100; }
  Tensor next() {
    if (at_ == epoch_.size()) {
      epoch_ = torch::randperm(rows_, order_).to(device_).split(100);
      at_ = 0;
    }
    return epoch_[at_++];
  }

 private:
  at::Generator order_;
  int64_t rows_;
  torch::Device device_;
  std::vector<Tensor> epoch_;
  size_t at_ = 0;
};

double milliseconds(torch::Device device) {
  if (device.is_cuda()) torch::cuda::synchronize();
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

digits::Run train(bool mixed, int seed, const Data& data, torch::Device device, int epochs,
                  job::Progress& progress) {
  Arm arm = conv_arm(mixed, uint64_t(seed), device);
  Batches batches(uint64_t(seed), data.x.size(0), device);
  std::vector<double> times;
  for (int64_t step = 1; step <= epochs * batches.per_epoch(); ++step) {
    const Tensor rows = batches.next();
    const double start = milliseconds(device);
    arm.step(data.x.index_select(0, rows), data.y.index_select(0, rows));
    times.push_back(milliseconds(device) - start);
    if (step % batches.per_epoch() == 0) progress.tick();
  }
  digits::Run run;
  run.accuracy = arm.accuracy(data.test_x, data.test_y);
  run.step_ms = job::median(times);
  run.bytes_per_param = arm.held_bytes();
  run.final_scale = arm.scaler.get_scale();
  run.skipped = mixed ? arm.scaler.stats().steps_skipped : 0;
  return run;
}

double sigmoid_lesson(const std::string& name, int seed, const Data& data, torch::Device device,
                      int steps, job::Progress& progress) {
  torch::manual_seed(uint64_t(seed));
  using namespace halfstep::policies;
  const Rule policy = name == "S=1" ? Rule(Static(1.0)) : Dynamic().growth_interval(100);
  const auto make = [](auto& model, bool is_mixed) -> OptimizerPtr {
    using namespace halfstep::optim;
    if (is_mixed) return std::make_unique<Adam>(model->named_parameters(), AdamOptions(5e-3));
    return std::make_unique<torch::optim::Adam>(model->parameters(),
                                                torch::optim::AdamOptions(5e-3));
  };
  Arm arm(name != "fp32", sigmoid_net(), device, make, policy);
  for (int step = 1; step <= steps; ++step) {
    arm.step(data.x, data.y);
    if (step % digits::kLessonTick == 0 || step == steps) progress.tick();
  }
  return arm.accuracy(data.test_x, data.test_y);
}

/// The exact weights of one seed's mixed arm after some steps, as Python's
/// torch.load(path, weights_only=True) reads them: tuples of (name, tensor), since it refuses the
/// type tag of a dict.
void save_weights(const digits::Options& options, const Data& data, torch::Device device) {
  const auto seed = uint64_t(options.save_seed);
  Arm arm = conv_arm(true, seed, device);
  Batches batches(seed, data.x.size(0), device);
  for (int step = 0; step < options.save_steps; ++step) {
    const Tensor rows = batches.next();
    arm.step(data.x.index_select(0, rows), data.y.index_select(0, rows));
  }
  auto& ours = dynamic_cast<halfstep::optim::Optimizer&>(*arm.optimizer);
  std::vector<c10::IValue> weights;
  for (const auto& item : halfstep::export_state_dict(*arm.model, ours))
    weights.emplace_back(c10::ivalue::Tuple::create({item.key(), item.value().cpu()}));
  const auto bytes = torch::pickle_save(c10::ivalue::Tuple::create(weights));
  std::ofstream file(options.save_weights, std::ios::binary);
  file.write(bytes.data(), std::streamsize(bytes.size()));
  TORCH_CHECK(file.flush(), "cannot write ", options.save_weights);
}

torch::Device choose_device(const std::string& name) {
  const std::string status = halfstep::cuda_status();
  TORCH_CHECK(name != "cuda" || status == "ready", "--device cuda: halfstep's CUDA side is ",
              status);
  return name != "cpu" && status == "ready" ? torch::kCUDA : torch::kCPU;
}

void run_job(const digits::Options& options) {
  const torch::Device device = choose_device(options.device);
  const Data data = read_digits(options.data, device);
  if (!options.save_weights.empty()) return save_weights(options, data, device);
  digits::Report report(options, device.str());  // --out is made before a minute of training
  job::Progress progress(2 * options.seeds * options.epochs +
                         3 * options.lesson_seeds * digits::lesson_ticks(options.lesson_steps));
  for (int seed = 0; seed < options.seeds; ++seed)
    for (const bool mixed : {false, true})
      (mixed ? report.mixed : report.fp32)
          .push_back(train(mixed, seed, data, device, options.epochs, progress));
  for (auto& [name, values] : report.lesson)
    for (int seed = 0; seed < options.lesson_seeds; ++seed)
      values.push_back(sigmoid_lesson(name, seed, data, device, options.lesson_steps, progress));
  report.print();
  report.write();
}

}  // namespace

int main(int argc, char** argv) {
  return job::run("train_digits", [&] {
    const auto options = digits::parse(argc, argv);
    if (options) run_job(*options);
  });
}
