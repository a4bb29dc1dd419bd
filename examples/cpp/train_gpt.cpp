// A small GPT of halfstep layers, trained on text in FP16 beside FP32: the job of
// examples/python/train_gpt.py without Python.
//
//   train_gpt [--text FILE] [--seeds 3] [--steps 300] [--out out]    (--help: all)
//
// The text is any file in UTF-8; out/pydoc_topics.txt unless another is given, which the Python
// program writes. Network, initial weights, data order and numbers are those of the Python program:
// on the CPU the weights of both arms are the same bits after any number of steps (same libtorch,
// same number of threads).

#include <halfstep/halfstep.h>
#include <torch/serialize.h>
#include <torch/torch.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <set>
#include <tuple>

#include "job.h"

namespace {

namespace hn = halfstep::nn;
using torch::Tensor;
using torch::indexing::Slice;

struct Options {
  std::string text, out = "out", save_weights;
  int seeds = 3, steps = 300, batch = 16, context = 128;
};

constexpr const char* kUsage =
    "usage: train_gpt [options]\n"
    "  --text FILE           a text in UTF-8; OUT/pydoc_topics.txt unless given\n"
    "  --seeds 3             paired seeds of the two arms\n"
    "  --steps 300           steps of each\n"
    "  --batch 16            windows a step\n"
    "  --context 128         characters a window\n"
    "  --out out             folder of gpt_cpp.json\n"
    "  --save-weights FILE   also write the exact weights of both arms of the first seed\n";

// ---- the network -------------------------------------------------------------------------------

/// Causal self-attention with rotary positions.
struct AttentionImpl : torch::nn::Module {
  AttentionImpl(int64_t width, int64_t heads, int64_t context)
      : heads(heads),
        qkv(register_module("qkv", hn::Linear(hn::LinearOptions(width, 3 * width).bias(false)))),
        out(register_module("out", hn::Linear(hn::LinearOptions(width, width).bias(false)))),
        rope(register_module(
            "rope",
            hn::RotaryEmbedding(hn::RotaryEmbeddingOptions(width / heads).max_seq_len(context)))) {}

  Tensor forward(const Tensor& x) {
    const int64_t batch = x.size(0), time = x.size(1), width = x.size(2);
    const auto parts =
        qkv(x).view({batch, time, 3, heads, width / heads}).permute({2, 0, 3, 1, 4}).unbind(0);
    const Tensor y = at::scaled_dot_product_attention(rope(parts[0]), rope(parts[1]), parts[2], {},
                                                      /*dropout_p=*/0.0, /*is_causal=*/true);
    return out(y.transpose(1, 2).reshape({batch, time, width}));
  }

  int64_t heads;
  hn::Linear qkv, out;
  hn::RotaryEmbedding rope;
};
TORCH_MODULE(Attention);

using Stream = std::tuple<Tensor, Tensor>;  ///< x, and the residual that it will be added to

/// (norm(x + residual), x + residual), computed in FP32 and given in the dtype of x. In Python
/// cast_model makes the norms, whose weights stay FP32, do so.
Stream in_fp32(hn::RMSNorm& norm, const Tensor& x, const Tensor& residual) {
  const auto [y, sum] = norm->forward_residual(x.to(torch::kFloat), residual.to(torch::kFloat));
  return {y.to(x.scalar_type()), sum.to(x.scalar_type())};
}

hn::RMSNorm make_norm(int64_t width) { return hn::RMSNorm(hn::RMSNormOptions({width}).eps(1e-5)); }

/// Both halves add to the residual stream inside the norm that follows.
struct BlockImpl : torch::nn::Module {
  BlockImpl(int64_t width, int64_t heads, int64_t context)
      : norm1(register_module("norm1", make_norm(width))),
        attention(register_module("attention", Attention(width, heads, context))),
        norm2(register_module("norm2", make_norm(width))),
        mlp(register_module("mlp",
                            hn::MLP(hn::MLPOptions(width, 4 * width).activation("gelu_tanh")))) {}

  Stream forward(const Tensor& x, const Tensor& before) {
    const auto [y, between] = in_fp32(norm1, x, before);
    const auto [z, after] = in_fp32(norm2, attention(y), between);
    return {mlp(z), after};
  }

  hn::RMSNorm norm1;
  Attention attention;
  hn::RMSNorm norm2;
  hn::MLP mlp;
};
TORCH_MODULE(Block);

/// forward(tokens, targets): the mean cross entropy; the head shares the embedding's weight.
struct GPTImpl : torch::nn::Module {
  GPTImpl(int64_t vocabulary, int64_t context)
      : embedding(register_module("embedding", torch::nn::Embedding(vocabulary, kWidth))),
        blocks(register_module("blocks", torch::nn::ModuleList())) {
    for (int64_t i = 0; i < kLayers; ++i) blocks->push_back(Block(kWidth, kHeads, context));
    norm = register_module("norm", make_norm(kWidth));
    // With a weight of its own first, as in Python, so that what is drawn after it is the same.
    loss = register_module("loss", hn::LinearCrossEntropyLoss(kWidth, vocabulary));
    for (const auto& item : named_parameters())
      if (item.value().dim() == 2 && item.key() != "loss.weight")
        torch::nn::init::normal_(item.value(), 0, deviation(item.key()));
    const hn::LinearCrossEntropyLossOptions options(kWidth, vocabulary);
    loss = replace_module("loss", hn::LinearCrossEntropyLoss(options, embedding->weight));
  }

  Tensor forward(const Tensor& tokens, const Tensor& targets) {
    Tensor x = embedding(tokens), residual = torch::zeros_like(x);
    for (const auto& block : *blocks)
      std::tie(x, residual) = block->as<Block>()->forward(x, residual);
    std::tie(x, residual) = in_fp32(norm, x, residual);
    return loss(x.flatten(0, 1), targets.flatten());
  }

  torch::nn::Embedding embedding;
  torch::nn::ModuleList blocks;
  hn::RMSNorm norm{nullptr};
  hn::LinearCrossEntropyLoss loss{nullptr};

 private:
  static constexpr int64_t kLayers = 4, kWidth = 128, kHeads = 4;

  /// Smaller where a block adds to the residual stream.
  static double deviation(const std::string& name) {
    const bool adds = name.ends_with("out.weight") || name.ends_with("fc2.weight");
    return adds ? 0.02 / std::sqrt(2.0 * kLayers) : 0.02;
  }
};
TORCH_MODULE(GPT);

// ---- the text ----------------------------------------------------------------------------------

/// The next code point of UTF-8, from `at` on; all bits where the bytes are none.
char32_t next_code_point(const std::string& bytes, size_t& at) {
  const auto first = static_cast<unsigned char>(bytes[at++]);
  if (first < 0x80) return first;
  const int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : first >= 0xc2 ? 1 : 0;
  if (more == 0 || first >= 0xf8 || at + size_t(more) > bytes.size()) return ~char32_t(0);
  char32_t point = first & (0x3f >> more);
  for (int i = 0; i < more; ++i) {
    const auto byte = static_cast<unsigned char>(bytes[at++]);
    if ((byte & 0xc0) != 0x80) return ~char32_t(0);
    point = point << 6 | (byte & 0x3f);
  }
  return point;
}

/// The characters of a file in UTF-8; every end of a line is "\n", as Python reads it.
std::u32string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path,
              "; --text FILE names a text, and examples/python/train_gpt.py writes this one");
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  std::u32string text;
  for (size_t at = 0; at < bytes.size();) {
    const size_t start = at;
    const char32_t point = next_code_point(bytes, at);
    TORCH_CHECK(point != ~char32_t(0), path, ", byte ", start, ": not UTF-8");
    if (point == U'\n' && start > 0 && bytes[start - 1] == '\r') continue;
    text += point == U'\r' ? U'\n' : point;
  }
  return text;
}

/// The characters as codes; the last tenth is held out.
class Text {
 public:
  Text(const std::string& path, int64_t context) : context_(context) {
    const std::u32string text = read_text(path);
    const auto n = int64_t(text.size()), least = 10 * (context + 1);
    TORCH_CHECK(n >= least, path, " has ", n, " characters; expected at least ", least,
                ", ten windows of --context ", context);
    const std::set<char32_t> alphabet(text.begin(), text.end());
    std::map<char32_t, int64_t> code;
    for (const char32_t c : alphabet) code.emplace(c, int64_t(code.size()));
    std::vector<int64_t> codes;
    for (const char32_t c : text) codes.push_back(code[c]);
    const Tensor all = torch::tensor(codes);
    vocabulary = int64_t(alphabet.size());
    windows_ = all.slice(0, 0, n - n / 10).unfold(0, context + 1, 1);
    held_out_ = all.slice(0, n - n / 10);
  }

  /// [batch, context + 1], in an order that the generator decides.
  Tensor rows(int64_t batch, const at::Generator& order) const {
    return windows_.index_select(0, torch::randint(windows_.size(0), {batch}, order, torch::kLong));
  }

  /// Bits per character on the held-out text, in windows side by side.
  double bits(GPT& model) const {
    const torch::NoGradGuard no_grad;
    const Tensor windows = held_out_.slice(0, 0, 40'000).unfold(0, context_ + 1, context_);
    std::vector<Tensor> losses;
    for (const Tensor& part : windows.split(32))
      losses.push_back(loss_of(model, part).to(torch::kFloat) * part.size(0));
    return (torch::stack(losses).sum() / windows.size(0) / std::log(2.0)).item<double>();
  }

  /// Of every character of each row from those before it.
  static Tensor loss_of(GPT& model, const Tensor& rows) {
    return model(rows.index({Slice(), Slice(0, -1)}), rows.index({Slice(), Slice(1)}));
  }

  int64_t vocabulary = 0;

 private:
  int64_t context_;
  Tensor windows_, held_out_;
};

// ---- training ----------------------------------------------------------------------------------

/// What is kept of one seed of one arm.
struct Run {
  double bits = 0, step_ms = 0;
  int64_t skipped = 0;
};

using Weights = std::vector<c10::IValue>;  ///< (name, tensor)

/// FP32, or FP16 weights with exact masters and a dynamic loss scale.
class Arm {
 public:
  Arm(bool mixed, uint64_t seed, const Text& text, const Options& options)
      : mixed_(mixed),
        steps_(options.steps),
        model_(nullptr),
        scaler_(halfstep::GradScalerOptions().enabled(mixed)) {
    torch::manual_seed(seed);
    model_ = GPT(text.vocabulary, options.context);
    if (mixed) halfstep::cast_model(*model_);
    optimizer_ = std::make_unique<halfstep::optim::AdamW>(model_->named_parameters(),
                                                          halfstep::optim::AdamWOptions(kRate)
                                                              .betas({0.9, 0.95})
                                                              .weight_decay(0.1)
                                                              .max_grad_norm(1.0));
  }

  void step(int step, const Tensor& rows) {
    optimizer_->param_groups()[0].options().set_lr(kRate * share_of_rate(step));
    optimizer_->zero_grad();
    Tensor loss;
    {
      const halfstep::AutocastGuard guard(torch::kCPU, mixed_);
      loss = Text::loss_of(model_, rows);
    }
    scaler_.scale(loss).backward();
    scaler_.step(*optimizer_);
    scaler_.update();
  }

  double bits(const Text& text) {
    const halfstep::AutocastGuard guard(torch::kCPU, mixed_);
    return text.bits(model_);
  }

  int64_t skipped() const { return mixed_ ? scaler_.stats().steps_skipped : 0; }

  void add_weights(Weights& weights) {
    for (const auto& item : halfstep::export_state_dict(*model_, *optimizer_))
      weights.emplace_back(
          c10::ivalue::Tuple::create({(mixed_ ? "mixed." : "fp32.") + item.key(), item.value()}));
  }

 private:
  static constexpr double kRate = 2e-3;

  /// 50 steps up, and half a cosine down to a tenth.
  double share_of_rate(int step) const {
    const double cosine = std::cos(M_PI * step / steps_);
    return std::min(1.0, (step + 1) / 50.0) * (0.1 + 0.9 * 0.5 * (1 + cosine));
  }

  bool mixed_;
  int steps_;
  GPT model_;
  std::unique_ptr<halfstep::optim::AdamW> optimizer_;
  halfstep::GradScaler scaler_;
};

double milliseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

Run train(bool mixed, int seed, const Text& text, const Options& options, job::Progress& progress,
          Weights& weights) {
  Arm arm(mixed, uint64_t(seed), text, options);
  const auto order = at::make_generator<at::CPUGeneratorImpl>(uint64_t(seed));
  std::vector<double> times;
  for (int step = 0; step < options.steps; ++step) {
    const Tensor rows = text.rows(options.batch, order);
    const double start = milliseconds();
    arm.step(step, rows);
    times.push_back(milliseconds() - start);
    progress.tick();
  }
  if (seed == 0) arm.add_weights(weights);
  return {arm.bits(text), job::median(times), arm.skipped()};
}

/// As Python's torch.load(path, weights_only=True) reads them: tuples of (name, tensor), since it
/// refuses the type tag of a dict.
void save_weights(const Weights& weights, const std::string& path) {
  const auto bytes = torch::pickle_save(c10::ivalue::Tuple::create(weights));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), std::streamsize(bytes.size()));
  TORCH_CHECK(file.flush(), "cannot write ", path);
}

// ---- the report --------------------------------------------------------------------------------

struct Results {
  std::vector<Run> fp32, mixed;
  std::vector<double> differences() const {
    std::vector<double> all;
    for (size_t i = 0; i < fp32.size(); ++i) all.push_back(mixed[i].bits - fp32[i].bits);
    return all;
  }
};

void print_arm(const char* name, const std::vector<Run>& runs) {
  std::vector<double> bits, times;
  int64_t skipped = 0;
  for (const Run& run : runs) {
    bits.push_back(run.bits);
    times.push_back(run.step_ms);
    skipped += run.skipped;
  }
  std::printf("%-6s %20.4f %12.1f %8lld\n", name, job::mean(bits), job::median(times),
              static_cast<long long>(skipped));
}

void print(const Results& results) {
  std::printf("\n%-6s %20s %12s %8s\n", "arm", "bits per character", "ms per step", "skipped");
  print_arm("fp32", results.fp32);
  print_arm("mixed", results.mixed);
  const auto differences = results.differences();
  std::printf("mixed - fp32, paired: %+.4f bits (standard deviation %.4f, %zu seeds)\n",
              job::mean(differences), job::spread(differences), differences.size());
}

std::string json_arm(const std::vector<Run>& runs) {
  std::ostringstream out;
  out.precision(17);
  for (const Run& run : runs)
    out << (&run == &runs[0] ? "[" : ", ") << "{\"bits\": " << run.bits
        << ", \"step_ms\": " << run.step_ms << ", \"skipped\": " << run.skipped << "}";
  return out.str() + "]";
}

/// With the keys of the Python program's gpt.json.
void write(const Results& results, const Options& options) {
  const std::string path = options.out + "/gpt_cpp.json";
  std::ofstream file(path);
  file << "{\n \"arms\": {\n  \"fp32\": " << json_arm(results.fp32)
       << ",\n  \"mixed\": " << json_arm(results.mixed)
       << "\n },\n \"difference\": " << job::json_list(results.differences())
       << ",\n \"steps\": " << options.steps << ",\n \"versions\": " << job::json_versions()
       << "\n}\n";
  TORCH_CHECK(file.flush(), "cannot write ", path);
  std::printf("\nwrote %s\n", path.c_str());
}

void run_job(const Options& options) {
  const std::string path = options.text.empty() ? options.out + "/pydoc_topics.txt" : options.text;
  const Text text(path, options.context);
  job::make_folder(options.out);
  job::Progress progress(2 * options.seeds * options.steps);
  Results results;
  Weights weights;
  for (int seed = 0; seed < options.seeds; ++seed)
    for (const bool mixed : {false, true})
      (mixed ? results.mixed : results.fp32)
          .push_back(train(mixed, seed, text, options, progress, weights));
  print(results);
  write(results, options);
  if (!options.save_weights.empty()) save_weights(weights, options.save_weights);
}

}  // namespace

int main(int argc, char** argv) {
  return job::run("train_gpt", [&] {
    Options options;
    if (job::parse(argc, argv, kUsage,
                   {{"--text", &options.text},
                    {"--out", &options.out},
                    {"--save-weights", &options.save_weights}},
                   {{"--seeds", {&options.seeds, 1}},
                    {"--steps", {&options.steps, 1}},
                    {"--batch", {&options.batch, 1}},
                    {"--context", {&options.context, 1}}}))
      run_job(options);
  });
}
