#include <sys/stat.h>

#include <fstream>
#include <limits>
#include <sstream>

#include "api.h"

using namespace halfstep;

namespace {

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

/// By the FP16 conversion of the tensor library, element by element.
Shares counted(const at::Tensor& x, double scale) {
  Shares s;
  const at::Tensor flat = x.flatten().to(torch::kDouble);
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const double v = std::abs(flat[i].item<double>() * scale);
    const double half = at::tensor(v, torch::kDouble).to(torch::kHalf).item<double>();
    const bool some = v > 0 && std::isfinite(v);
    s.count += 1;
    s.nonzero += some;
    s.underflow += some && half == 0;
    s.subnormal += some && half > 0 && half < 0x1p-14;
    s.overflow += !std::isfinite(half);
    s.saturated += !(v <= 32752);
    if (std::isfinite(v)) s.amax = std::max(s.amax, v);
  }
  return s;
}

void check_equal(const Shares& a, const Shares& b) {
  CHECK(a.count == b.count);
  CHECK(a.nonzero == b.nonzero);
  CHECK(a.underflow == b.underflow);
  CHECK(a.subnormal == b.subnormal);
  CHECK(a.overflow == b.overflow);
  CHECK(a.saturated == b.saturated);
  CHECK(a.amax == b.amax);
}

struct Loop {
  torch::nn::Sequential net = make_net();
  std::unique_ptr<optim::AdamW> opt;
  GradScaler scaler{GradScalerOptions().policy(policies::Dynamic().init_scale(256))};
  Task task;
  Loop() {
    cast_model(*net);
    opt = std::make_unique<optim::AdamW>(net->named_parameters(), optim::AdamWOptions(1e-2));
  }
  void step(bool blow = false) {
    opt->zero_grad();
    at::Tensor loss;
    {
      AutocastGuard guard(torch::kCPU);
      loss = loss_of(net, task);
    }
    scaler.scale(blow ? loss * std::numeric_limits<double>::infinity() : loss).backward();
    scaler.step(*opt);
    scaler.update();
  }
};

}  // namespace

TEST_CASE("shares are those of FP16's own rounding", "[monitor]") {
  torch::manual_seed(1);
  const double inf = std::numeric_limits<double>::infinity();
  const at::Tensor spread =
      torch::randn({4000}) * torch::exp2(torch::randint(-45, 20, {4000}).to(torch::kFloat));
  const at::Tensor edges = at::tensor({0x1p-25, 0x1p-24, 0x1p-14, 0x1p-14 - 0x1p-25, 65504.0,
                                       65520.0, 32752.0, 0.0, -0.0, inf, -inf, std::nan("")},
                                      torch::kDouble)
                               .to(torch::kFloat);
  const at::Tensor above = torch::nextafter(edges, torch::full({}, inf)),
                   below = torch::nextafter(edges, torch::zeros({}));
  const at::Tensor x = torch::cat({spread, edges, above, below, -edges});
  for (const double scale : {1.0, 1024.0, 0.37}) check_equal(shares(x, scale), counted(x, scale));
  check_equal(shares(x.to(torch::kDouble)), counted(x, 1));
  check_equal(shares(x.narrow(0, 0, 4032).reshape({2, 2016}).t()),
              counted(x.narrow(0, 0, 4032), 1));
  const at::Tensor stored = x.to(torch::kHalf);
  CHECK(shares(x, 1, stored).lost == shares(x).underflow);
  CHECK(shares(x, 1, stored.ne(0)).lost == shares(x).underflow);
  CHECK(shares(x.to(torch::kDouble), 1, stored).lost == shares(x).underflow);
  CHECK(shares(torch::zeros({5})).headroom() == std::nullopt);
  CHECK(shares(torch::empty({0})).count == 0);
  CHECK(has(message_of([&] { shares(x, 1, stored.narrow(0, 0, 3)); }),
            "stored is [3] but reference is ["));
  CHECK(has(message_of([&] { shares(torch::ones({2}, torch::kLong)); }),
            "expected a dense floating tensor"));
}

TEST_CASE("training is the same bits with a monitor", "[monitor]") {
  const auto train = [](bool watched) {
    Loop loop;
    std::optional<Monitor> mon;
    if (watched) mon.emplace(*loop.net, *loop.opt, MonitorOptions{.every = 1});
    for (int i = 0; i < 8; ++i) {
      loop.step(i == 3);
      if (mon) mon->step(loop.scaler);
    }
    auto all = loop.opt->master_params();
    for (const auto& p : loop.net->parameters()) all.push_back(p.detach().clone());
    return all;
  };
  const auto a = train(true), b = train(false);
  for (size_t i = 0; i < a.size(); ++i) CHECK(torch::equal(a[i], b[i]));
}

TEST_CASE("the report holds scale, skips, layers in turn and every gradient's headroom",
          "[monitor]") {
  Folder folder;
  Loop loop;
  const std::string live = folder / "live.json", path = folder / "monitor.json";
  {
    Monitor mon(*loop.net, *loop.opt, {.every = 2, .live = live});
    CHECK(has(text_of(live), "\"state\":\"running\""));
    mon.step(loop.scaler.stats());  // before the first step: its scale is known
    for (int i = 0; i < 6; ++i) {
      loop.step(i == 2);
      mon.step(loop.scaler);
    }
    mon.step(loop.scaler.stats());  // nothing new
    mon.write_json(path);
    CHECK(has(message_of([&] { mon.write_json(folder / "none/at/all"); }), "none/at/all"));
  }
  const std::string report = text_of(path);
  CHECK(has(report, "{\"format\":\"halfstep-monitor\",\"version\":1,\"every\":2,"));
  CHECK(has(report,
            "\"scale\":{\"steps\":6,\"points\":[[1,256],[4,128]],\"skipped\":[3],\"longest\":1,"));
  CHECK(has(report, "\"unsampled\":{}"));
  CHECK(has(report, "{\"name\":\"0.weight\",\"kind\":\"weight\",\"nonzero\":"));
  CHECK(has(report, "{\"name\":\"2.bias\",\"kind\":\"weight gradient\",\"nonzero\":"));
  CHECK(has(report, "{\"name\":\"0\",\"kind\":\"activation\",\"nonzero\":"));
  CHECK(has(report, "\"headroom\":{\"name\":\""));
  CHECK(has(text_of(live), "\"state\":\"ended\""));
  CHECK(has(text_of(live), "\"step\":6,\"scale\":128,\"skipped\":1"));
}

TEST_CASE("an exception ends the status as failed, and errors name what is wrong", "[monitor]") {
  Folder folder;
  Loop loop;
  const std::string live = folder / "live";
  try {
    Monitor mon(*loop.net, *loop.opt, {.live = live});
    throw std::runtime_error("stop");
  } catch (const std::runtime_error&) {
    CHECK(has(text_of(live), "\"state\":\"failed\""));
  }
  const auto refused = [&](MonitorOptions options) {
    return message_of([&] { Monitor(*loop.net, *loop.opt, std::move(options)); });
  };
  CHECK(has(refused({.every = 0}), "every is 0; expected a whole number from 1"));
  CHECK(has(refused({.aliases = {"wandb"}}), "aliases has 'wandb'"));
  CHECK(has(refused({.live = folder / "no/such/folder/live"}), "no/such/folder/live"));
  CHECK(has(refused({.tensorboard = live}), "it is a file"));
}

TEST_CASE("a weight that was edited is looked at as it is", "[monitor]") {
  Loop loop;
  const at::Tensor weight = loop.net->named_parameters()["0.weight"];
  CHECK(torch::equal(loop.opt->master_param(weight), loop.opt->master_params()[0]));
  {
    const torch::NoGradGuard no_grad;
    weight.fill_(0.5);
  }
  CHECK(torch::equal(loop.opt->master_param(weight), torch::full({32, 16}, 0.5)));
  CHECK(!loop.opt->master_param(torch::ones({2})).defined());
}

TEST_CASE("event files of TensorBoard are row by row what their records are", "[monitor]") {
  Folder folder;
  TensorBoardWriter writer(folder / "a");
  const std::string first = text_of(writer.path());
  writer.scalar("amp/loss_scale", 65536, 3, 12.5);
  writer.flush();
  CHECK(first.find("brain.Event:2") != std::string::npos);
  CHECK(text_of(writer.path()) ==
        first + TensorBoardWriter::record("amp/loss_scale", 65536, 3, 12.5));
  TensorBoardWriter other(folder / "a");
  CHECK(other.path() != writer.path());
  for (const auto& path : {writer.path(), other.path()}) ::unlink(path.c_str());
  ::rmdir((folder / "a").c_str());
}
