// The scaler in C++: the rules a user relies on.

#include "api.h"

using namespace halfstep;

TEST_CASE("400 overflows leave a scale above zero, and the next step is right", "[api]") {
  auto p = torch::ones({4}, torch::requires_grad());
  optim::SGD opt({p}, optim::SGDOptions(1.0));
  GradScaler scaler(GradScalerOptions().policy(policies::preset("torch")));
  for (int i = 0; i < 400; ++i) {
    opt.zero_grad();
    (scaler.scale(p.sum()) * INFINITY).backward();
    scaler.step(opt);
    scaler.update();
  }
  CHECK(scaler.get_scale() == 0x1p-126);
  opt.zero_grad();
  scaler.scale(p.sum()).backward();
  scaler.step(opt);
  scaler.update();
  CHECK(torch::equal(p.detach(), torch::zeros({4})));
}

TEST_CASE("clip over optimizers, stock ones too, equals torch's clip", "[api]") {
  auto a = torch::zeros({50}, torch::requires_grad()),
       b = torch::zeros({50}, torch::requires_grad());
  const auto ga = torch::randn({50}) * 3, gb = torch::randn({50});
  optim::SGD ours({a}, optim::SGDOptions(1.0));
  torch::optim::SGD stock({b}, torch::optim::SGDOptions(1.0));
  GradScaler scaler;
  scaler.scale((a * ga).sum() + (b * gb).sum()).backward();
  const auto norm = scaler.clip_grad_norm_({&ours, &stock}, 1.0);
  scaler.step(ours);
  scaler.step(stock);
  scaler.update();
  const auto want = torch::cat({ga, gb}).norm();
  CHECK(torch::allclose(norm, want));
  CHECK(torch::allclose(a.detach(), -ga / (want + 1e-6), 1e-5));
  CHECK(torch::allclose(b.detach(), -gb / (want + 1e-6), 1e-5));
}

TEST_CASE("unscale_ gives FP32 gradients to FP16 parameters", "[api]") {
  auto p = torch::ones({4}, torch::kHalf).set_requires_grad(true);
  optim::SGD opt({p}, optim::SGDOptions(1.0));
  GradScaler scaler;
  scaler.scale((p * 1e-3).sum().to(torch::kFloat) * 1e-3).backward();
  scaler.unscale_(opt);
  CHECK(p.grad().scalar_type() == torch::kFloat);
  CHECK(torch::allclose(p.grad(), torch::full({4}, 1e-6), 1e-2));
  CHECK(has(message_of([&] { scaler.unscale_(opt); }), "already been called"));
  scaler.step(opt);
  CHECK(has(message_of([&] { scaler.step(opt); }), "step() has already been called"));
  scaler.update();
}

TEST_CASE("an overflow in one of two optimizers skips that one only", "[api]") {
  auto a = torch::ones({4}, torch::requires_grad()), b = torch::ones({4}, torch::requires_grad());
  auto c = torch::ones({4}, torch::requires_grad());
  optim::SGD first({a}, optim::SGDOptions(1.0)), second({b}, optim::SGDOptions(1.0));
  torch::optim::SGD stock({c}, torch::optim::SGDOptions(1.0));
  GradScaler scaler;
  scaler.scale(a.sum() + c.sum()).backward();
  (scaler.scale(b.sum()) * INFINITY).backward();
  scaler.step(first);
  scaler.step(second);
  scaler.step(stock);
  CHECK(!scaler.step_was_skipped(first));
  CHECK(scaler.step_was_skipped(second));
  CHECK(!scaler.step_was_skipped(stock));
  CHECK(scaler.step_was_skipped());
  scaler.update();
  CHECK(scaler.step_was_skipped(second));  // known until the next iteration
  CHECK(torch::equal(a.detach(), torch::zeros({4})));
  CHECK(torch::equal(b.detach(), torch::ones({4})));
  CHECK(torch::equal(c.detach(), torch::zeros({4})));
  CHECK(scaler.get_scale() == 32768);
  CHECK(scaler.stats().steps_skipped == 1);
  CHECK(has(message_of([&] { scaler.update(); }), "no inf checks were recorded"));
}

TEST_CASE("found_inf counts whatever its value", "[api]") {
  auto p = torch::ones({4}, torch::requires_grad());
  optim::SGD opt({p}, optim::SGDOptions(1.0));
  GradScaler scaler;
  (scaler.scale(p.sum()) * NAN).backward();
  scaler.unscale_(opt);
  scaler.step(opt);
  scaler.update();
  CHECK(torch::equal(p.detach(), torch::ones({4})));
  CHECK(scaler.get_scale() == 32768);
}

TEST_CASE("a stock optimizer under our scaler trains, skips, and is told when FP16 flushes",
          "[api]") {
  const Task task;
  auto net = make_net();
  torch::optim::AdamW opt(net->parameters(), torch::optim::AdamWOptions(2e-2));
  GradScaler scaler;
  const double first = iterate(net, opt, scaler, task);
  double last = 0;
  for (int i = 0; i < 30; ++i) last = iterate(net, opt, scaler, task);
  CHECK(last < 0.5 * first);
  const auto before = net->parameters()[0].detach().clone();
  opt.zero_grad();
  (scaler.scale(loss_of(net, task)) * INFINITY).backward();
  scaler.step(opt);
  CHECK(scaler.step_was_skipped(opt));
  scaler.update();
  CHECK(torch::equal(net->parameters()[0].detach(), before));
  CHECK(scaler.stats().first_bad_param == "parameter 0");

  auto h = torch::ones({4}, torch::kHalf).set_requires_grad(true);
  torch::optim::SGD narrow({h}, torch::optim::SGDOptions(1.0));
  const Warnings warnings;
  for (int i = 0; i < 3; ++i) {
    h.mutable_grad() = torch::full({4}, 1e-4, torch::kHalf);  // unscaled below FP16
    scaler.step(narrow);
    scaler.update();
  }
  CHECK(warnings.with("unscaling FP16 gradients in place set 4 small values to zero") == 1);
}

TEST_CASE("gradients clipped to zero behind the scaler's back are told once", "[api]") {
  auto p = torch::ones({4}, torch::kHalf).set_requires_grad(true);
  optim::SGD opt({p}, optim::SGDOptions(1.0));
  GradScaler scaler;
  const Warnings warnings;
  for (int i = 0; i < 4; ++i) {
    opt.zero_grad();
    scaler.scale(p.sum().to(torch::kFloat) * 1e-4).backward();
    p.mutable_grad().mul_(0);  // what torch's clip does with an infinite norm
    scaler.step(opt);
    scaler.update();
    CHECK(warnings.with("all gradients were exactly zero in two steps running") == (i > 0));
  }
  CHECK(scaler.stats().zero_share == 1);
}

TEST_CASE("closures through scaler.step: ours, stock, and one that evaluates again", "[api]") {
  torch::manual_seed(0);
  const auto matrix = torch::randn({12, 6}), wanted = torch::randn({12});
  const auto loss_at = [&](const at::Tensor& p) { return (matrix.mv(p) - wanted).square().sum(); };
  auto p = torch::zeros({6}, torch::requires_grad());
  GradScaler scaler;
  const auto closure_of = [&](torch::optim::Optimizer& opt, at::Tensor& at, int* calls,
                              int bad_call) {
    return [&, calls, bad_call] {
      opt.zero_grad();
      const auto loss = loss_at(at);
      (scaler.scale(loss) * (++*calls == bad_call ? INFINITY : 1.0)).backward();
      return loss;
    };
  };
  const double start = loss_at(p).item<double>();
  int calls = 0;
  optim::SGD ours({p}, optim::SGDOptions(1e-3));
  torch::optim::SGD stock({p}, torch::optim::SGDOptions(1e-3));
  for (auto* opt : std::initializer_list<torch::optim::Optimizer*>{&ours, &stock}) {
    calls = 0;
    const auto loss = scaler.step(*opt, closure_of(*opt, p, &calls, 0));
    scaler.update();
    CHECK(calls == 1);
    CHECK(loss.item<double>() <= start);
  }
  CHECK(loss_at(p).item<double>() < start);

  // LBFGS under the scaler follows LBFGS alone to the bit: scales are powers of two.
  auto q = p.detach().clone().set_requires_grad(true);
  const auto options = torch::optim::LBFGSOptions(0.5).max_iter(4);
  torch::optim::LBFGS scaled({p}, options), plain({q}, options);
  const auto plain_step = [&] {
    plain.step([&] {
      plain.zero_grad();
      const auto loss = loss_at(q);
      loss.backward();
      return loss;
    });
  };
  for (int step = 0; step < 3; ++step) {
    calls = 0;
    scaler.step(scaled, closure_of(scaled, p, &calls, 0));
    scaler.update();
    plain_step();
    CHECK(calls > 1);
    CHECK(torch::equal(p, q));
  }
  // A non-finite gradient in the third evaluation takes the whole step back, state included.
  const double scale = scaler.get_scale();
  calls = 0;
  scaler.step(scaled, closure_of(scaled, p, &calls, 3));
  CHECK(scaler.step_was_skipped(scaled));
  scaler.update();
  CHECK(calls == 3);
  CHECK(torch::equal(p, q));
  CHECK(scaler.get_scale() == scale / 2);
  for (int step = 0; step < 2; ++step) {
    calls = 0;
    scaler.step(scaled, closure_of(scaled, p, &calls, 0));
    scaler.update();
    plain_step();
    CHECK(torch::equal(p, q));
  }
}

TEST_CASE("micro-batches: one step of the sum, once", "[api]") {
  for (const bool fp32 : {false, true}) {
    const auto start = torch::randn({16}).to(torch::kHalf);
    auto p = start.clone().set_requires_grad(true);
    auto options = optim::SGDOptions(1.0);
    if (fp32) options.grad_dtype(torch::kFloat);
    optim::SGD opt({p}, options);
    GradScaler scaler;
    const auto masters = opt.master_params()[0];
    for (int round = 0; round < 2; ++round) {
      opt.zero_grad();
      for (int i = 0; i < 4; ++i)
        scaler.scale((p * 0.25).sum().to(torch::kFloat) * 0.25).backward();
      if (round == 1) {
        scaler.unscale_(opt);
        CHECK(torch::equal(p.grad(), torch::full({16}, 0.25)));
      }
      scaler.step(opt);
      scaler.update();
    }
    CHECK(torch::equal(opt.master_params()[0], masters - 0.25 - 0.25));
    opt.zero_grad();
    scaler.scale(p.sum().to(torch::kFloat) * 1e-3).backward();
    CHECK(p.grad().scalar_type() == (fp32 ? torch::kFloat : torch::kHalf));
  }
}

TEST_CASE("disabled: the plain loop; another device is refused", "[api]") {
  const Task task;
  auto net = make_net();
  optim::AdamW opt(net->parameters(), optim::AdamWOptions(2e-2));
  GradScaler off(GradScalerOptions().enabled(false));
  const double first = iterate(net, opt, off, task);
  for (int i = 0; i < 20; ++i) iterate(net, opt, off, task);
  CHECK(iterate(net, opt, off, task) < first);
  CHECK(off.get_scale() == 1);
  CHECK(off.state_dict().size() == 0);
  CHECK(!off.step_was_skipped());
  GradScaler cuda(GradScalerOptions().device(torch::kCUDA));
  CHECK(has(message_of([&] { cuda.scale(torch::ones({1})); }),
            "GradScaler was made for cuda but the loss is on cpu"));
}

TEST_CASE("stats describe the step that was just made", "[api]") {
  torch::OrderedDict<std::string, at::Tensor> named;
  auto p = torch::zeros({4}, torch::requires_grad());
  named.insert("fc.weight", p);
  optim::SGD opt(named, optim::SGDOptions(1.0));
  GradScaler scaler(GradScalerOptions().policy(policies::Dynamic().init_scale(4)));
  CHECK(scaler.stats().step == 0);
  CHECK(scaler.stats().scale == 4);
  scaler.scale((p * torch::tensor({3.0, 4.0, 0.0, 0.0})).sum()).backward();
  scaler.step(opt);
  scaler.update();
  auto stats = scaler.stats();
  CHECK(stats.step == 1);
  CHECK(stats.grad_norm == 5);
  CHECK(stats.amax == 16);
  CHECK(stats.zero_share == 0.5);
  CHECK(stats.steps_applied == 1);
  CHECK(stats.clean_steps == 1);
  CHECK(stats.first_bad_param.empty());
  p.mutable_grad() = torch::full({4}, NAN);
  scaler.step(opt);
  scaler.update();
  stats = scaler.stats();
  CHECK(stats.step == 2);
  CHECK(stats.last_found_inf);
  CHECK(stats.consecutive_skips == 1);
  CHECK(stats.first_bad_param == "fc.weight");
  CHECK(std::isnan(stats.grad_norm));
}

TEST_CASE("tensor_stats name each gradient of the newest update", "[api]") {
  torch::OrderedDict<std::string, at::Tensor> named;
  auto p = torch::zeros({4}, torch::requires_grad()), q = torch::zeros({2}, torch::requires_grad());
  auto silent = torch::zeros({2}, torch::requires_grad());
  named.insert("fc.weight", p), named.insert("fc.bias", silent);
  optim::SGD opt(named, optim::SGDOptions(1.0));
  torch::optim::SGD stock({q}, torch::optim::SGDOptions(1.0));
  GradScaler scaler(GradScalerOptions().policy(policies::Dynamic().init_scale(4)));
  CHECK(scaler.tensor_stats().empty());
  scaler.scale((p * torch::tensor({3.0, 4.0, 0.0, 1e-6})).sum() + q.sum() * 2).backward();
  scaler.step(opt);
  scaler.step(stock);
  scaler.update();
  auto stats = scaler.tensor_stats();
  CHECK(stats.size() == 2);
  CHECK(stats.at("fc.weight").amax == 16);
  CHECK(std::abs(stats.at("fc.weight").norm - 5) < 1e-6);
  CHECK(stats.at("fc.weight").zero_share == 0.25);
  CHECK(stats.at("fc.weight").subnormal_share == 1.0 / 3);
  CHECK(stats.at("fc.weight").count == 4);
  CHECK(stats.at("parameter 0").amax == 2);  // unscaled before it is looked at
  p.mutable_grad() = torch::full({4}, INFINITY);
  scaler.step(opt);
  scaler.update();
  stats = scaler.tensor_stats();
  CHECK(stats.size() == 1);
  CHECK(stats.at("fc.weight").nonfinite == 4);
}

TEST_CASE("a scaler that steps no more says why, and once", "[api]") {
  struct Case {
    double loss, min_scale;
    int silent;
    const char* diagnosis;
  };
  for (const Case& c :
       {Case{NAN, 1, 2, "loss is not finite"}, Case{INFINITY, 0x1p-100, 19, "loss is not finite"},
        Case{1, 0x1p-100, 19, "gradients overflow"}, Case{1, 1, 2, "scale is at its floor"}}) {
    auto p = torch::zeros({4}, torch::requires_grad());
    optim::SGD opt({p}, optim::SGDOptions(0.0));
    GradScaler scaler(
        GradScalerOptions().policy(policies::Dynamic().init_scale(1).min_scale(c.min_scale)));
    const Warnings said;
    for (int i = 1; i <= c.silent + 3; ++i) {
      scaler.scale(torch::full({}, c.loss));
      p.mutable_grad() = torch::full({4}, INFINITY);
      scaler.step(opt);
      scaler.update();
      CHECK(scaler.stats().diagnosis == (i <= c.silent ? "" : c.diagnosis));
    }
    CHECK(said.with("steps in a row were skipped") == 1);
    p.mutable_grad() = torch::zeros({4});
    scaler.scale(torch::full({}, 1.0));
    scaler.step(opt);
    scaler.update();
    CHECK(scaler.stats().diagnosis.empty());
  }
}
