// The layer that a Monitor samples, computed once more in FP32: what is counted, and that the
// training sees nothing of it.

#include <ATen/record_function.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <sstream>

#include "api.h"

using namespace halfstep;

namespace {

/// The counts of one name and kind in a report, over all samples.
Shares counted(const std::string& report, const char* name, const char* kind) {
  std::ostringstream entry, row;
  entry << "{\"name\":\"" << name << "\",\"kind\":\"" << kind << "\"}";
  const size_t table = report.find("\"tensors\":[{\"name\"", report.find("\"shares\":"));
  const size_t samples = report.find("\"samples\":", table),
               known = report.find(entry.str(), table);
  if (samples == std::string::npos || known > samples) return {};
  int64_t number = -1;
  for (size_t at = table; at < known; at = report.find("{\"name\"", at + 1)) ++number;
  row << "[" << number << ",";
  Shares all;
  for (size_t at = report.find("\"rows\":[", samples); at != std::string::npos;
       at = report.find("\"rows\":[", at + 1)) {
    const size_t here = report.find(row.str(), at + 8), end = report.find("]]", at);
    if (here >= end) continue;
    std::istringstream text(report.substr(here + row.str().size(), end - here));
    Shares s;
    char comma;
    text >> s.count >> comma >> s.nonzero >> comma >> s.underflow >> comma >> s.subnormal >> comma;
    text >> s.overflow >> comma >> s.saturated >> comma >> s.lost >> comma >> s.amax;
    all += s;
  }
  return all;
}

void check_equal(const Shares& found, const Shares& expected) {
  CHECK(found.count == expected.count);
  CHECK(found.nonzero == expected.nonzero);
  CHECK(found.underflow == expected.underflow);
  CHECK(found.subnormal == expected.subnormal);
  CHECK(found.overflow == expected.overflow);
  CHECK(found.saturated == expected.saturated);
  CHECK(std::abs(found.amax - expected.amax) <= 1e-6 * expected.amax);
}

std::string unsampled(const std::string& report) {
  const size_t at = report.find("\"unsampled\":");
  return report.substr(at, report.find('}', at) + 1 - at);
}

at::Tensor spread(at::IntArrayRef sizes, int64_t low, int64_t high) {
  return torch::randn(sizes) * torch::exp2(torch::randint(low, high, sizes).to(torch::kFloat));
}

GradScaler scaler_of(double scale) {
  return GradScaler(GradScalerOptions().policy(policies::Dynamic().init_scale(scale)));
}

/// Steps in FP32 without autocast: what is computed once more is then the training to the bit.
struct Plain {
  explicit Plain(const torch::nn::Module& model, double lr = 0)
      : opt(model.parameters(), lr), monitor(model, opt, {.every = 1}) {}
  void step(const std::function<at::Tensor()>& loss) {
    opt.zero_grad();
    scaler.scale(loss()).backward();
    scaler.step(opt);
    scaler.update();
    monitor.step(scaler.stats());
  }
  torch::optim::SGD opt;
  GradScaler scaler = scaler_of(1);
  Monitor monitor;
};

/// A weight of its own, and an op of torch that is given a view of it.
struct MixImpl : torch::nn::Module {
  explicit MixImpl(int64_t features) {
    weight = register_parameter("weight", torch::randn({features, features}) * 0.2);
  }
  at::Tensor forward(const at::Tensor& x) { return torch::matmul(x, weight.t()); }
  at::Tensor weight;
};
TORCH_MODULE(Mix);

/// A linear layer on another's weight.
struct HeadImpl : torch::nn::Module {
  explicit HeadImpl(const at::Tensor& tied) { weight = register_parameter("weight", tied); }
  at::Tensor forward(const at::Tensor& x) { return torch::linear(x, weight); }
  at::Tensor weight;
};
TORCH_MODULE(Head);

/// A bit of everything that a monitor must survive.
struct MixedImpl : torch::nn::Module {
  explicit MixedImpl(const std::string& kind) : kind(kind) {
    namespace nn = torch::nn;
    embed = register_module("embed",
                            nn::Embedding(nn::EmbeddingOptions(30, 16).sparse(kind == "sparse")));
    twice = register_module("twice", nn::Linear(16, 16));
    norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({16})));
    batch = register_module("batch", nn::BatchNorm1d(16));
    conv = register_module("conv", nn::Conv1d(nn::Conv1dOptions(16, 16, 3).padding(1)));
    lstm = register_module(
        "lstm", nn::LSTM(nn::LSTMOptions(16, 16).num_layers(2).dropout(0.3).batch_first(true)));
    mix = register_module("mix", Mix(16));
    fused = register_module(
        "fused", halfstep::nn::Linear(halfstep::nn::LinearOptions(16, 16).activation("gelu")));
    unused = register_module("unused", nn::Linear(3, 3));
    head = register_module("head",
                           Head(kind == "tied" ? embed->weight : torch::randn({30, 16}) * 0.2));
    if (kind == "frozen") {
      embed->weight.requires_grad_(false);
      for (auto& p : twice->parameters()) p.requires_grad_(false);
    }
  }
  at::Tensor forward(const at::Tensor& ids) {
    at::Tensor x = embed(ids);
    for (int i = 0; i < 2; ++i) {
      x = twice(norm(torch::dropout(x, 0.3, is_training())));
      x.relu_();
    }
    x = x + conv(x.transpose(1, 2)).transpose(1, 2);
    x = x + std::get<0>(lstm(kind == "autocast" ? x.to(torch::kFloat) : x));
    x = batch(x.transpose(1, 2)).mean(-1);
    return head(x + fused(mix(x)));
  }
  std::string kind;
  torch::nn::Embedding embed{nullptr};
  torch::nn::Linear twice{nullptr}, unused{nullptr};
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::BatchNorm1d batch{nullptr};
  torch::nn::Conv1d conv{nullptr};
  torch::nn::LSTM lstm{nullptr};
  Mix mix{nullptr};
  Head head{nullptr};
  halfstep::nn::Linear fused{nullptr};
};
TORCH_MODULE(Mixed);

/// Ten steps of two micro-batches; all that is left of them, and the report.
std::pair<std::vector<at::Tensor>, std::string> train(const std::string& kind, bool watched) {
  torch::manual_seed(3);
  Mixed model(kind);
  const bool cast = kind != "autocast" && kind != "plain" && kind != "sparse";
  if (cast) cast_model(*model);
  std::unique_ptr<torch::optim::Optimizer> opt;
  if (kind == "sparse")
    opt = std::make_unique<torch::optim::SGD>(model->parameters(), 1e-2);
  else
    opt = std::make_unique<optim::AdamW>(model->named_parameters(), optim::AdamWOptions(1e-2));
  GradScaler scaler = scaler_of(4096);
  std::optional<Monitor> monitor;
  if (watched) monitor.emplace(*model, *opt, MonitorOptions{.every = 1});
  const auto loss_of = [&] {
    AutocastGuard guard(torch::kCPU, kind != "plain" && kind != "sparse");
    const auto ids = torch::randint(30, {6, 4}), target = torch::randint(30, {6});
    return torch::nn::functional::cross_entropy(model->forward(ids).to(torch::kFloat), target);
  };
  for (int step = 0; step < 10; ++step) {
    opt->zero_grad();
    for (int micro = 0; micro < 2; ++micro) {
      const auto loss = loss_of();
      scaler.scale(step == 4 ? loss * std::numeric_limits<double>::infinity() : loss).backward();
    }
    scaler.step(*opt);
    scaler.update();
    if (monitor) monitor->step(scaler);
    model->eval();
    loss_of();  // recorded for autograd, but nothing comes back
    model->train();
    const torch::NoGradGuard no_grad;
    loss_of();
  }
  std::vector<at::Tensor> all = {torch::rand({4})};
  for (const auto& p : model->parameters()) all.push_back(p.detach());
  for (const auto& b : model->buffers()) all.push_back(b);
  if (auto* ours = dynamic_cast<optim::Optimizer*>(opt.get()))
    for (const auto& master : ours->master_params()) all.push_back(master);
  return {all, monitor ? monitor->report() : ""};
}

/// Draws more random numbers in FP32, where it then fails.
at::Tensor only_half(const at::Tensor& x, const at::Tensor& weight) {
  torch::rand({int64_t(x.element_size())});
  TORCH_CHECK(x.scalar_type() == at::kHalf, "x is not FP16,\nand more of it");
  return x.matmul(weight);
}

TORCH_LIBRARY(halfstep_monitor_test, library) {
  library.def("only_half(Tensor x, Tensor weight) -> Tensor", only_half);
}

}  // namespace

TEST_CASE("a sampled layer is counted as in FP64", "[monitor]") {
  torch::manual_seed(1);
  const bool unscales = GENERATE(false, true), zeroes = GENERATE(false, true);
  torch::nn::Sequential net(torch::nn::Linear(40, 60));
  const auto fc = net->ptr<torch::nn::LinearImpl>(0);
  {
    const torch::NoGradGuard no_grad;
    fc->weight.copy_(spread({60, 40}, -30, 3));
    fc->weight.slice(1, 0, 40, 5).fill_(-0.0);
  }
  cast_model(*net);
  optim::SGD opt(net->named_parameters(), optim::SGDOptions(1e-30).zero_grads(zeroes));
  GradScaler scaler = scaler_of(1024);
  Monitor monitor(*net, opt, {.every = 1});
  monitor.step(scaler.stats());  // before the first step: its scale is known
  at::Tensor x = spread({1, 40}, -20, 4), grad, stored;
  x.slice(1, 0, 40, 7).zero_();
  const auto masters = opt.master_params();
  at::Tensor input = x.to(torch::kHalf).requires_grad_();
  at::Tensor loss;
  {
    AutocastGuard guard(torch::kCPU);
    at::Tensor y = net->forward(input);
    y.register_hook([&](const at::Tensor& g) { grad = g.clone(); });
    loss = (y.to(torch::kFloat) * spread({1, 60}, -30, 4)).sum();
  }
  scaler.scale(loss).backward();
  stored = fc->weight.grad().clone();
  if (unscales) scaler.unscale_(opt);
  scaler.step(opt);
  scaler.update();
  monitor.step(scaler);
  const auto wide = [](const at::Tensor& t) { return t.detach().to(torch::kDouble); };
  const auto single = [](const at::Tensor& t) { return t.to(torch::kFloat).to(torch::kDouble); };
  const at::Tensor w = wide(masters[0]), b = wide(masters[1]), g = wide(grad), in = wide(input);
  const at::Tensor weight_gradient = single(g.t().matmul(in));
  const std::string report = monitor.report();
  check_equal(counted(report, "0.weight", "weight"), shares(w));
  check_equal(counted(report, "0.bias", "weight"), shares(b));
  check_equal(counted(report, "0", "activation"), shares(single(in.matmul(w.t()) + b)));
  check_equal(counted(report, "0", "activation gradient"), shares(single(g.matmul(w))));
  check_equal(counted(report, "0.bias", "weight gradient"), shares(g[0]));
  const Shares gradient = counted(report, "0.weight", "weight gradient");
  check_equal(gradient, shares(weight_gradient));
  CHECK(gradient.lost == shares(weight_gradient, 1.0, stored).lost);
  CHECK(gradient.lost == gradient.underflow);
  CHECK(gradient.underflow > 100);
  CHECK(gradient.nonzero > gradient.underflow + 60 * 20);
  CHECK(has(report, "\"scale\":1024,\"rows\""));
  CHECK(has(report, "\"underflow\":{\"name\":\"0.weight\",\"share\":0."));
  CHECK(unsampled(report) == "\"unsampled\":{}");
}

TEST_CASE("training is the same bits with a monitor, and every layer is sampled", "[monitor]") {
  const std::string kind = GENERATE("cast", "autocast", "plain", "tied", "frozen", "sparse");
  CAPTURE(kind);
  const auto [with, report] = train(kind, true);
  const auto [without, none] = train(kind, false);
  REQUIRE(with.size() == without.size());
  for (size_t i = 0; i < with.size(); ++i)
    CHECK(at::equal(with[i].nan_to_num(), without[i].nan_to_num()));
  CHECK(unsampled(report) == "\"unsampled\":{\"unused\":\"not called in a sampled step\"}");
  using Row = std::pair<const char*, const char*>;
  for (const auto& [name, what] :
       {Row("twice", "activation"), Row("twice.weight", "weight"),
        Row("norm.bias", "weight gradient"), Row("batch", "activation gradient"),
        Row("conv.weight", "weight gradient"), Row("lstm", "activation gradient"),
        Row("lstm.weight_hh_l1", "weight gradient"), Row("mix.weight", "weight gradient"),
        Row("fused", "activation"), Row("fused.bias", "weight gradient"),
        Row("embed", "activation")}) {
    CAPTURE(name, what);
    CHECK(counted(report, name, what).count > 0);
  }
  CHECK((counted(report, "twice.weight", "weight gradient").count == 0) == (kind == "frozen"));
  CHECK((counted(report, "embed.weight", "weight gradient").count == 0) == (kind == "frozen"));
  // Two calls in each of two micro-batches: none of the evaluations.
  CHECK(counted(report, "twice", "activation").count == 4 * 6 * 4 * 16);
  CHECK(counted(report, "mix", "activation").count == 2 * 6 * 16);
  // With the tied weight, embedding and head are one layer: the first and the tenth sample.
  const int64_t embedded = 2 * 6 * 4 * 16, tied = 2 * (embedded + 2 * 6 * 30);
  CHECK(counted(report, "embed", "activation").count == (kind == "tied" ? tied : embedded));
}

TEST_CASE("in FP32 what is computed once more is the training to the bit", "[monitor]") {
  torch::manual_seed(2);
  torch::nn::LSTM lstm(torch::nn::LSTMOptions(8, 8).num_layers(2).dropout(0.5).batch_first(true));
  Plain run(*lstm);
  at::Tensor y, h;
  const at::Tensor x = spread({4, 5, 8}, -12, 2).requires_grad_();
  run.step([&] {
    const auto [all, last] = lstm->forward(x);  // draws random numbers in the op
    y = all;
    h = std::get<0>(last);
    return y.square().sum() + h.sum();
  });
  const std::string report = run.monitor.report();
  check_equal(counted(report, "(model)", "activation gradient"), shares(x.grad()));
  for (const auto& item : lstm->named_parameters()) {
    CAPTURE(item.key());
    check_equal(counted(report, item.key().c_str(), "weight gradient"),
                shares(item.value().grad()));
    CHECK(counted(report, item.key().c_str(), "weight gradient").lost == 0);
  }
  // Results, the last hidden states, the last cells.
  CHECK(counted(report, "(model)", "activation").count == y.numel() + 2 * h.numel());
}

TEST_CASE("calls of a sampled step", "[monitor]") {
  torch::manual_seed(4);
  torch::nn::Linear fc(6, 6);
  Plain run(*fc);
  const at::Tensor x = torch::randn({5, 3, 6});
  at::Tensor y;
  SECTION("a bias that is added in place goes on with the call") {
    run.step([&] {
      y = fc(x);
      return y.square().sum();
    });
    const std::string report = run.monitor.report();
    check_equal(counted(report, "(model)", "activation"), shares(y));
    check_equal(counted(report, "bias", "weight gradient"), shares(fc->bias.grad()));
    check_equal(counted(report, "weight", "weight gradient"), shares(fc->weight.grad()));
    CHECK(counted(report, "(model)", "activation gradient").count == 0);
  }
  SECTION("results that are edited in place are counted as they were") {
    at::Tensor before;
    run.step([&] {
      y = fc(x);
      before = y.detach().clone();
      y.relu_();
      return y.square().sum();
    });
    const std::string report = run.monitor.report();
    check_equal(counted(report, "(model)", "activation"), shares(before));
    check_equal(counted(report, "weight", "weight gradient"), shares(fc->weight.grad()));
  }
  SECTION("the same where the results are a view") {
    at::Tensor before;
    run.step([&] {
      y = torch::linear(x, fc->weight, fc->bias);
      CHECK(y.is_view());
      before = y.detach().clone();
      y.relu_();
      return y.square().sum();
    });
    const std::string report = run.monitor.report();
    check_equal(counted(report, "(model)", "activation"), shares(before));
    check_equal(counted(report, "bias", "weight gradient"), shares(fc->bias.grad()));
  }
  SECTION("a gradient of a gradient is none") {
    const at::Tensor in = x[0].clone().requires_grad_();
    run.step([&] {
      y = fc(in);
      const auto g = torch::autograd::grad({y.square().sum()}, {in}, {}, true, true);
      return g[0].square().sum() + y.sum();
    });
    CHECK(counted(run.monitor.report(), "(model)", "activation").count == y.numel());
  }
  SECTION("two backwards through one call are two gradients") {
    const at::Tensor in = x[0].clone().requires_grad_();
    run.step([&] {
      y = fc(in);
      y.sum().backward({}, true);
      return y.square().sum();
    });
    const std::string report = run.monitor.report();
    CHECK(counted(report, "(model)", "activation").count == y.numel());
    CHECK(counted(report, "(model)", "activation gradient").count == 2 * in.numel());
    check_equal(counted(report, "weight", "weight gradient"), shares(fc->weight.grad()));
  }
  SECTION("an input that the op itself writes is counted as it was") {
    const at::Tensor in = x.clone().requires_grad_();
    run.step([&] {
      y = in * 1;
      y.mul_(fc->bias);
      return y.square().sum();
    });
    const std::string report = run.monitor.report();
    check_equal(counted(report, "(model)", "activation"), shares(y));
    check_equal(counted(report, "(model)", "activation gradient"), shares(in.grad()));
    check_equal(counted(report, "bias", "weight gradient"), shares(fc->bias.grad()));
  }
}

TEST_CASE("an op with a tied weight is one of the layer of which it has another parameter",
          "[monitor]") {
  struct TiedImpl : torch::nn::Module {
    TiedImpl() {
      auto second = register_module("head", Head(embed->weight));
      bias = second->register_parameter("bias", torch::zeros({5}));
    }
    torch::nn::Embedding embed = register_module("embed", torch::nn::Embedding(5, 4));
    at::Tensor bias;
  };
  torch::manual_seed(6);
  const auto net = std::make_shared<TiedImpl>();
  Plain run(*net);
  for (int step = 0; step < 2; ++step)
    run.step([&] {
      const at::Tensor x = net->embed(torch::arange(3));
      return torch::linear(x, net->embed->weight, net->bias).square().sum();
    });
  const std::string report = run.monitor.report();
  CHECK(counted(report, "embed", "activation").count == 3 * 4);
  CHECK(counted(report, "head", "activation").count == 3 * 5);
  CHECK(counted(report, "head", "activation gradient").count == 3 * 4);
  CHECK(counted(report, "embed.weight", "weight gradient").count == 2 * 5 * 4);
  CHECK(counted(report, "embed.weight", "weight gradient").lost == 0);
  check_equal(counted(report, "head.bias", "weight gradient"), shares(net->bias.grad()));
}

TEST_CASE("a layer that cannot be computed in FP32 is named, and training goes on", "[monitor]") {
  torch::manual_seed(5);
  torch::nn::Sequential net(Mix(8), Mix(8));
  cast_model(*net);
  optim::SGD opt(net->named_parameters(), optim::SGDOptions(1e-2));
  GradScaler scaler = scaler_of(256);
  Monitor monitor(*net, opt, {.every = 1});
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("halfstep_monitor_test::only_half", "")
                      .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
  for (int step = 0; step < 4; ++step) {
    opt.zero_grad();
    AutocastGuard guard(torch::kCPU, false);
    const at::Tensor x = torch::randn({4, 8}).to(torch::kHalf);
    torch::manual_seed(9);
    const at::Tensor h = op.call(x, net->ptr<MixImpl>(0)->weight), drawn = torch::rand({2});
    torch::manual_seed(9);
    torch::rand({2});
    CHECK(torch::equal(torch::rand({2}), drawn));
    const at::Tensor loss = net->ptr<MixImpl>(1)->forward(h).to(torch::kFloat).square().mean();
    scaler.scale(loss).backward();
    scaler.step(opt);
    scaler.update();
    monitor.step(scaler);
  }
  const std::string report = monitor.report();
  CHECK(unsampled(report) ==
        "\"unsampled\":{\"0\":\"halfstep_monitor_test::only_half: x is not FP16,\"}");
  CHECK(counted(report, "1", "activation").count == 3 * 4 * 8);  // in the place of the other too
  CHECK(scaler.stats().steps_applied == 4);
}

TEST_CASE("ops are looked at in steps that are sampled, and in no others", "[monitor]") {
  torch::nn::Linear fc(3, 3);
  torch::optim::SGD opt(fc->parameters(), 0.1);
  GradScaler scaler = scaler_of(1);
  REQUIRE(!at::hasThreadLocalCallbacks());
  std::optional<Monitor> monitor;
  monitor.emplace(*fc, opt, MonitorOptions{.every = 3});
  const auto step = [&] {
    fc->zero_grad();
    scaler.scale(fc(torch::ones({2, 3})).sum()).backward();
    scaler.step(opt);
    scaler.update();
    monitor->step(scaler.stats());
  };
  for (const bool next : {false, true, false, false, true, false, false, true}) {
    step();
    CHECK(at::hasThreadLocalCallbacks() == next);
  }
  Monitor other(*fc, opt, {.every = 1});
  const at::Tensor loss = fc(torch::ones({2, 3})).sum();
  monitor.reset();  // between forward and backward, beside another one
  CHECK(at::hasThreadLocalCallbacks());
  loss.backward();
  other.close();
  CHECK(!at::hasThreadLocalCallbacks());
}

TEST_CASE("two monitors of one model count the same", "[monitor]") {
  torch::nn::Linear fc(torch::nn::LinearOptions(3, 5).bias(false));
  fc->to(torch::kHalf);
  optim::SGD opt(fc->parameters(), optim::SGDOptions(0.1));
  GradScaler scaler = scaler_of(1);
  Monitor first(*fc, opt, {.every = 1}), second(*fc, opt, {.every = 1});
  const at::Tensor x = torch::full({2, 3}, 1e-4, torch::kHalf);
  for (int i = 0; i < 4; ++i) {
    opt.zero_grad();
    scaler.scale((fc(x) * 1e-4).sum()).backward();  // 2e-8, which FP16 holds as 0
    scaler.step(opt);
    scaler.update();
    first.step(scaler);
    second.step(scaler);
  }
  for (const Monitor* monitor : {&first, &second}) {
    const Shares found = counted(monitor->report(), "weight", "weight gradient");
    CHECK(found.count == 4 * 15);
    CHECK(found.lost == 4 * 15);
  }
}

TEST_CASE("an op that throws is none of the layer's calls", "[monitor]") {
  torch::nn::Linear fc(3, 5);
  Plain run(*fc);
  for (int i = 0; i < 2; ++i)
    run.step([&] {
      CHECK_THROWS(torch::linear(torch::ones({2, 4}), fc->weight));
      return fc(torch::ones({2, 3})).sum();
    });
  const std::string report = run.monitor.report();
  CHECK(unsampled(report) == "\"unsampled\":{}");
  CHECK(counted(report, "(model)", "activation").count == 2 * 2 * 5);
}

TEST_CASE("a hook that waits for a gradient stays with its parameter", "[monitor]") {
  struct Hook : torch::autograd::PostAccumulateGradHook {
    explicit Hook(int& calls) : calls(calls) {}
    void operator()(const at::Tensor&) override { ++calls; }
    int& calls;
  };
  int calls = 0;
  torch::nn::Linear fc(3, 3);
  auto& slot = torch::autograd::impl::post_acc_grad_hooks(fc->weight);
  slot = std::make_unique<Hook>(calls);
  const void* mine = slot.get();
  {
    Plain run(*fc);
    CHECK(slot.get() != mine);
    for (int i = 0; i < 3; ++i) run.step([&] { return fc(torch::ones({2, 3})).sum(); });
    CHECK(calls == 3);
  }
  CHECK(slot.get() == mine);
}
