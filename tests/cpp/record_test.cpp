// Recording a run in C++: the file, and what a recorder leaves as it was. Its lines are compared
// with Python's in tests/python/test_trace_cpp.py.

#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <csignal>
#include <limits>
#include <sstream>

#include "api.h"

using namespace halfstep;

namespace {

std::vector<std::string> lines_of(const std::string& path) {
  std::istringstream text(read_bytes(path));
  std::vector<std::string> lines;
  for (std::string line; std::getline(text, line);) lines.push_back(line);
  return lines;
}

/// How many lines begin so.
int64_t count(const std::string& path, const std::string& start) {
  const auto lines = lines_of(path);
  return std::count_if(lines.begin(), lines.end(),
                       [&](const std::string& line) { return line.starts_with(start); });
}

at::Tensor half(std::initializer_list<double> values) {
  return torch::tensor(std::vector<double>(values), torch::kDouble).to(torch::kHalf);
}

/// One weight and its optimizer, stepped with gradients that a test gives.
struct One {
  at::Tensor weight = torch::zeros({2}).to(torch::kHalf).set_requires_grad(true);
  optim::SGD opt;
  GradScaler scaler;
  explicit One(policies::Rule rule = policies::Static(4))
      : opt(named(weight), optim::SGDOptions(0.0)),
        scaler(GradScalerOptions().policy(std::move(rule))) {}
  static optim::NamedParameters named(const at::Tensor& weight) {
    optim::NamedParameters names;
    names.insert("w", weight);
    return names;
  }
  void step(std::optional<double> by_hand = std::nullopt) { step(half({8, 0}), by_hand); }
  void step(const at::Tensor& grad, std::optional<double> by_hand = std::nullopt) {
    scaler.scale(torch::tensor(1.5));
    weight.mutable_grad() = grad.clone();
    scaler.step(opt);
    scaler.update(by_hand);
  }
};

}  // namespace

TEST_CASE("a trace to the letter: two optimizers, every third histogram", "[record]") {
  Folder folder;
  const std::string path = folder / "run.trace";
  One ours{policies::Dynamic().init_scale(4)};
  GradScaler& scaler = ours.scaler;
  auto b = torch::zeros({3}, torch::requires_grad());
  torch::optim::SGD stock({b}, torch::optim::SGDOptions(0.0));
  const double inf = std::numeric_limits<double>::infinity();
  {
    Recorder recorder(scaler, path, 3);
    for (int step = 0; step < 5; ++step) {
      scaler.scale(torch::tensor(1.5));
      scaler.scale(torch::tensor({step == 2 ? inf : 1.0}));
      ours.weight.mutable_grad() = half({8, 0});
      b.mutable_grad() = torch::tensor({1.0, step == 3 ? inf : 2.0, 0.0}, torch::kFloat);
      scaler.step(ours.opt);
      scaler.step(stock);
      scaler.update();
      // Each line is written at once, with the recorder open.
      CHECK(recorder.rows() == step + 1);
      CHECK(count(path, "{\"step\":") == step + 1);
      CHECK(read_bytes(path).back() == '\n');
    }
  }
  const auto lines = lines_of(path);
  REQUIRE(lines.size() == 9);
  CHECK(lines[0] == R"({"format":"halfstep-trace","version":1,"every":3})");
  CHECK(lines[1].starts_with(
      R"x({"policy":"Dynamic(init_scale=4)","vector":[1,4,2,0.5,2000,6.103515625e-05,)x"));
  CHECK(has(lines[1], R"(],"state":[4,0,1,0,)"));
  CHECK(lines[2] == R"({"tensor":0,"name":"w","optimizer":1,"dtype":"float16","numel":2})");
  CHECK(lines[3] ==
        R"({"tensor":1,"name":"group 0, parameter 0","optimizer":2,"dtype":"float32","numel":3})");
  const std::string w = "[0,2,1,0,2,0,8,64,42,[1]]";
  CHECK(lines[4] == R"({"step":1,"scale":4,"loss":2.5,"found_inf":0,"grads":[)" + w +
                        ",[1,3,1,0,0.5,0,2,5,39,[1,1]]]}");
  CHECK(lines[5] == R"({"step":2,"scale":4,"loss":2.5,"found_inf":0})");
  CHECK(lines[6] == R"({"step":3,"scale":4,"loss":"inf","found_inf":0})");
  CHECK(lines[7] == R"({"step":4,"scale":4,"loss":2.5,"found_inf":1,"grads":[)" + w +
                        R"(,[1,3,1,1,0.25,0,"inf","inf",39,[1]]]})");
  CHECK(lines[8] == R"({"step":5,"scale":2,"loss":2.5,"found_inf":0})");
}

TEST_CASE("bins from the first that is not empty to the last, and none", "[record]") {
  Folder folder;
  One run{policies::Static(1)};
  Recorder recorder(run.scaler, folder / "t");
  run.step(half({0, 0}));
  run.step(half({0x1p-24, 1}));
  run.step(half({NAN, -INFINITY}));
  recorder.close();
  const auto lines = lines_of(folder / "t");
  CHECK(has(lines[3], R"("grads":[[0,2,2,0,0,0,0,0,0,[]]]})"));
  CHECK(has(lines[4], R"("grads":[[0,2,0,0,1,1,1,1.0000000000000036,17,[1,)"));
  CHECK(std::count(lines[4].begin(), lines[4].end(), ',') == 4 + 9 + 24);
  CHECK(has(lines[5], R"("grads":[[0,2,0,2,0,0,"nan","nan",0,[]]]})"));
}

TEST_CASE("training is the same bits with a recorder as without", "[record]") {
  const bool unscale = GENERATE(false, true);
  Folder folder;
  std::vector<std::vector<at::Tensor>> ends;
  std::vector<double> scales;
  for (const bool recorded : {false, true}) {
    torch::nn::Sequential net = make_net();
    cast_model(*net);
    optim::AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2));
    GradScaler scaler(
        GradScalerOptions().policy(policies::Dynamic().init_scale(0x1p24).growth_interval(3)));
    std::unique_ptr<Recorder> recorder;
    if (recorded) recorder = std::make_unique<Recorder>(scaler, folder / "t", 2);
    const Task task;
    for (int step = 0; step < 15; ++step) {
      opt.zero_grad();
      AutocastGuard guard(torch::kCPU);
      scaler.scale(loss_of(net, task)).backward();
      if (unscale) scaler.unscale_(opt);
      scaler.step(opt);
      scaler.update();
    }
    ends.push_back(opt.master_params());
    scales.push_back(scaler.get_scale());
    CHECK(scaler.stats().steps_skipped > 2);
  }
  CHECK(scales[0] == scales[1]);
  for (size_t i = 0; i < ends[0].size(); ++i) CHECK(torch::equal(ends[0][i], ends[1][i]));
  CHECK(count(folder / "t", "{\"step\":") == 15);
  CHECK(count(folder / "t", "{\"tensor\":") == 4);
}

TEST_CASE("a scale set by hand and a loaded state are in the trace", "[record]") {
  Folder folder;
  const std::string path = folder / "t";
  One run{policies::Dynamic().growth_interval(1).init_scale(4)};
  run.scaler.scale(torch::tensor(1.0));
  const StateDict state = run.scaler.state_dict();
  Recorder recorder(run.scaler, path);
  run.step();
  run.step(32.0);
  run.scaler.load_state_dict(state);
  run.step();
  recorder.close();
  const auto lines = lines_of(path);
  REQUIRE(lines.size() == 7);
  CHECK(has(lines[3], R"({"step":1,"scale":4,"loss":2.5,)"));  // the loss before the recording too
  CHECK(has(lines[4], R"({"step":2,"scale":8,"loss":1.5,"found_inf":0,"set":32,"grads":)"));
  CHECK(lines[5] == lines[1]);
  CHECK(has(lines[6], R"({"step":3,"scale":4,)"));
}

TEST_CASE("a scale that is set without a step is recorded", "[record]") {
  Folder folder;
  One run{policies::Dynamic().init_scale(8)};
  Recorder recorder(run.scaler, folder / "t");
  run.step(half({INFINITY, 0}));
  run.scaler.scale(torch::tensor(2.5));
  run.scaler.update(64.0);
  run.step();
  recorder.close();
  const auto lines = lines_of(folder / "t");
  REQUIRE(lines.size() == 6);
  CHECK(has(lines[3], R"({"step":1,"scale":8,"loss":1.5,"found_inf":1,)"));
  CHECK(lines[4] == R"({"step":2,"scale":4,"loss":2.5,"found_inf":0,"set":64,"grads":[]})");
  CHECK(has(lines[5], R"({"step":3,"scale":64,"loss":1.5,"found_inf":0,)"));
}

TEST_CASE("a parameter of another dtype or size is another tensor, wherever its optimizer lies",
          "[record]") {
  Folder folder;
  GradScaler scaler;
  Recorder recorder(scaler, folder / "t");
  std::optional<torch::optim::SGD> opt;  // one after the other in the same place
  for (const auto& weight : {torch::zeros({2}, at::kHalf), torch::zeros({3})}) {
    const auto w = weight.clone().requires_grad_();
    opt.emplace(std::vector<at::Tensor>{w}, torch::optim::SGDOptions(0.0));
    scaler.scale(torch::tensor(1.0));
    w.mutable_grad() = torch::ones_like(weight);
    scaler.step(*opt);
    scaler.update();
  }
  recorder.close();
  const auto lines = lines_of(folder / "t");
  REQUIRE(lines.size() == 6);
  CHECK(has(lines[2], R"("dtype":"float16","numel":2})"));
  CHECK(has(lines[4], R"({"tensor":1,)"));
  CHECK(has(lines[4], R"("dtype":"float32","numel":3})"));
}

TEST_CASE("recording that begins within an iteration starts with the next", "[record]") {
  Folder folder;
  One run;
  run.scaler.scale(torch::tensor(1.0));
  run.weight.mutable_grad() = half({1, 1});
  run.scaler.unscale_(run.opt);
  Recorder recorder(run.scaler, folder / "t");
  run.scaler.step(run.opt);
  run.scaler.update();
  CHECK(recorder.rows() == 0);
  run.step();
  CHECK(recorder.rows() == 1);
  CHECK(has(lines_of(folder / "t").back(), R"({"step":1,"scale":4,"loss":1.5,)"));
}

TEST_CASE("sparse gradients are looked at as the sum that they are, tied weights once",
          "[record]") {
  Folder folder;
  auto w = torch::zeros({4, 2}, torch::requires_grad());
  torch::optim::SGD opt({w, w}, torch::optim::SGDOptions(0.0));
  GradScaler scaler(GradScalerOptions().policy(policies::Static(2)));
  Recorder recorder(scaler, folder / "t");
  scaler.scale(torch::tensor(1.0));
  w.mutable_grad() = torch::sparse_coo_tensor(torch::tensor({{1, 1}}), torch::ones({2, 2}), {4, 2});
  scaler.unscale_(opt);
  scaler.update();
  recorder.close();
  CHECK(has(lines_of(folder / "t").back(), R"("grads":[[0,2,0,0,1,0,2,8,41,[2]]]})"));
}

TEST_CASE("scaler and recorder end in any order", "[record]") {
  Folder folder;
  const std::string path = folder / "t";
  auto run = std::make_unique<One>();
  auto recorder = std::make_unique<Recorder>(run->scaler, path);
  run->step();
  GradScaler moved = std::move(run->scaler);
  run->scaler = std::move(moved);  // the recording goes along
  run->step();
  run.reset();
  CHECK(recorder->rows() == 2);
  CHECK(recorder->path() == path);
  recorder->close();
  recorder->close();
  CHECK(count(path, "{\"step\":") == 2);
  recorder.reset();

  One other;
  {
    Recorder first(other.scaler, path);
    other.step();
  }
  other.step();  // of a recorder that is gone
  CHECK(count(path, "{\"step\":") == 1);
  Recorder second(other.scaler, path);
  second.close();
  other.step();
  CHECK(second.rows() == 0);
  CHECK(lines_of(path).size() == 1);
}

TEST_CASE("what cannot be recorded is refused by name, and nothing changes", "[record]") {
  Folder folder;
  const std::string path = folder / "t", other = folder / "other";
  write_bytes(other, "kept");
  One run;
  Recorder recorder(run.scaler, path);
  CHECK(has(message_of([&] { Recorder(run.scaler, other); }),
            "is being recorded into '" + path + "' already"));
  recorder.close();
  CHECK(has(message_of([&] { Recorder(run.scaler, other, 0); }),
            "Recorder: every is 0; expected a whole number from 1"));
  GradScaler disabled(GradScalerOptions().enabled(false)), two(GradScalerOptions().losses(2));
  CHECK(has(message_of([&] { Recorder(disabled, other); }), "disabled"));
  CHECK(has(message_of([&] { Recorder(two, other); }), "losses=2; a trace holds the scale of one"));
  CHECK(read_bytes(other) == "kept");
  const std::string nowhere = folder / "no/where";
  CHECK(has(message_of([&] { Recorder(run.scaler, nowhere); }),
            "path is '" + nowhere + "', which cannot be written: No such file"));
  CHECK(has(message_of([&] { Recorder(run.scaler, folder / ""); }), "Is a directory"));
  CHECK(has(message_of([&] { Recorder(run.scaler, "/dev/full"); }),
            "path is '/dev/full', which cannot be written: No space left"));
  run.step();
  CHECK(lines_of(path).size() == 1);
  Recorder again(run.scaler, other);  // a file that is there is overwritten, as in Python
  CHECK(read_bytes(other) == "{\"format\":\"halfstep-trace\",\"version\":1,\"every\":1}\n");
}

TEST_CASE("a disk that is full ends the trace and not the training", "[record]") {
  Folder folder;
  const std::string path = folder / "t";
  One run{policies::Static(2)};
  Recorder recorder(run.scaler, path);
  run.step();
  const std::string before = read_bytes(path);
  Warnings warnings;
  const auto old = std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
  rlimit small = limit;
  small.rlim_cur = before.size() + 10;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  run.step();
  run.step();
  ::setrlimit(RLIMIT_FSIZE, &limit);
  std::signal(SIGXFSZ, old);
  run.step();  // there is room again, but nothing may follow a part of a line
  CHECK(warnings.with("Recorder: '" + path + "' cannot be written any more (File too large)") == 1);
  CHECK(run.scaler.stats().steps_applied == 4);
  CHECK(read_bytes(path) == before + R"({"step":2,)");
  CHECK(has(message_of([&] { recorder.close(); }),
            "path is '" + path + "', which cannot be written: File too large"));
  recorder.close();
  CHECK(warnings.with("cannot be written") == 1);
}

TEST_CASE("a policy is told in words, as in Python", "[record]") {
  struct Mine : policies::Policy {
    at::Tensor update(policies::Numbers&, const policies::Stats& stats) override {
      return stats.scale;
    }
  };
  const auto told = [](GradScalerOptions options) {
    Folder folder;
    GradScaler scaler(std::move(options));
    auto w = torch::zeros({1}, torch::requires_grad());
    optim::SGD opt({w}, optim::SGDOptions(0.0));
    Recorder recorder(scaler, folder / "t");
    scaler.scale(torch::tensor(1.0));
    w.mutable_grad() = torch::ones({1});
    scaler.step(opt);
    const std::string line = lines_of(folder / "t")[1];
    return line.substr(11, line.find('"', 11) - 11);
  };
  const auto rule = [&](const policies::Rule& rule) {
    return told(GradScalerOptions().policy(rule));
  };
  CHECK(told(GradScalerOptions().policy(std::make_shared<Mine>())) == "Mine");
  CHECK(rule(policies::Dynamic()) == "Dynamic()");
  CHECK(rule(policies::Static(1024)) == "Static(scale=1024)");
  CHECK(rule(policies::LogMax().sigmas(2).decays(0.5, 0.75)) ==
        "LogMax(sigmas=2, mean_decay=0.5, variance_decay=0.75)");
  CHECK(rule(policies::Occupancy(1e-3).edge(0.25)) == "Occupancy(target=0.001, edge=0.25)");
  CHECK(rule(policies::Underflow(1e-2, policies::Reduce::kWeighted).least(7).headroom(4)) ==
        "Underflow(target=0.01, reduce='weighted', headroom=4, least=7)");
  CHECK(rule(policies::Dynamic()
                 .init_scale(0x1p20)
                 .growth_interval(7)
                 .hysteresis(2)
                 .refill(policies::Refill::kBackoff)
                 .tolerance(0.25)
                 .window_follows_scale()
                 .skip_limit(9)
                 .on_limit(policies::OnLimit::kRaise)
                 .growth_delay(1, 2)
                 .recover(64, 100)
                 .floor(policies::Floor::kKeep)
                 .floor_is_limit()
                 .arithmetic(policies::Arithmetic::kSingle)
                 .faithful_to(policies::Bounds::kTorch)) ==
        "Dynamic(init_scale=1.04858e+06, growth_interval=7, hysteresis=2, refill='backoff', "
        "tolerance=0.25, window_follows_scale=True, skip_limit=9, on_limit='raise', "
        "faithful_to='torch', growth_delay=1, repeat_delay=2, recover_below=64, "
        "recover_interval=100, floor='keep', floor_is_limit=True, arithmetic='single')");
  CHECK(rule(policies::Dynamic().skip_limit(1).on_limit([](const ScalerStats&) {})) ==
        "Dynamic(skip_limit=1, on_limit=callback)");
}
