// stats_in_backward: the rows made by the hooks are those of the separate pass, whatever happens to
// the gradients between. The same cases as tests/python/test_backward_stats.py.

#include "backward_stats.h"

#include <cstring>
#include <map>
#include <thread>

using namespace halfstep;
using namespace backward_stats;

namespace {

using AdamW = Open<optim::AdamW>;
using SGD = Open<optim::SGD>;

}  // namespace

TEST_CASE("the step's pass is not made: the backward's hooks read each gradient once", "[api]") {
  for (const auto dtype : {torch::kHalf, torch::kFloat}) {
    auto net = net_of(dtype);
    AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2).max_grad_norm(0.5));
    GradScaler scaler;
    const auto iteration = [&](int64_t seed) {
      opt.zero_grad();
      scaler.scale(loss_of(net, seed)).backward();
      scaler.step(opt);
      scaler.update();
    };
    {
      const Seen seen;
      iteration(0);
      CHECK((seen.passes == 1 && seen.reread == 6 && seen.rows == 0 && seen.joins == 0));
    }
    opt.stats_in_backward();
    for (int64_t seed = 0; seed < 3; ++seed) {
      const Seen seen;
      iteration(seed);
      CHECK((seen.passes == 0 && seen.reread == 0 && seen.rows == 6 && seen.joins == 1));
    }
    const Seen seen;
    opt.zero_grad();
    backward(net);
    opt.step();  // without a scaler too
    CHECK((seen.passes == 0 && seen.reread == 0 && seen.rows == 6 && seen.joins == 1));
  }
}

TEST_CASE("statistics of the backward: accumulation is that of the sum", "[api]") {
  for (const auto dtype : {torch::kHalf, torch::kFloat}) {
    auto net = net_of(dtype);
    AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2));
    opt.stats_in_backward();
    for (int64_t seed = 0; seed < 4; ++seed) {
      backward(net, seed);
      check(opt, 0);
    }
    opt.zero_grad(/*set_to_none=*/false);
    check(opt, 6);
    backward(net);
    check(opt, 0);
  }
  auto net = net_of(torch::kHalf);  // micro-batches summed in FP32
  SGD opt(net->named_parameters(), optim::SGDOptions(1e-2).grad_dtype(torch::kFloat));
  opt.stats_in_backward();
  for (int64_t seed = 0; seed < 2; ++seed) {
    backward(net, seed);
    CHECK(net->parameters()[0].grad().scalar_type() == torch::kFloat);
    check(opt, 0);
  }
}

TEST_CASE("an edited gradient is read again", "[api]") {
  const std::map<std::string, std::function<void(at::Tensor&)>> edits = {
      {"in place", [](at::Tensor& p) { p.mutable_grad().mul_(0.5); }},
      {"replaced", [](at::Tensor& p) { p.mutable_grad() = p.grad() * 2; }},
      {"replaced by its equal", [](at::Tensor& p) { p.mutable_grad() = p.grad().clone(); }},
      {"other memory", [](at::Tensor& p) { p.mutable_grad().set_data(p.grad() * 3); }},
      {"set by hand", [](at::Tensor& p) { p.mutable_grad()[0].fill_(INFINITY); }},
      {"through a view", [](at::Tensor& p) { p.grad().view({-1}).slice(0, 1).zero_(); }},
  };
  for (const auto dtype : {torch::kHalf, torch::kFloat})
    for (const auto& [name, edit] : edits) {
      INFO(name);
      auto net = net_of(dtype);
      AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2));
      opt.stats_in_backward();
      backward(net);
      at::Tensor p = net->parameters()[2];
      edit(p);
      check(opt, 1);
      check(opt, 1);  // it has no row before its next backward
    }
}

TEST_CASE("another tensor in the memory of a freed gradient is not taken for it", "[api]") {
  auto net = net_of(torch::kFloat);
  AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2));
  opt.stats_in_backward();
  backward(net);
  at::Tensor p = net->parameters()[2];
  const at::Storage memory = p.grad().storage();  // as if the allocator gave it out again
  const auto version = p.grad()._version();
  p.mutable_grad() = at::Tensor();
  for (int i = 0; i < 20; ++i) {
    const at::Tensor other = torch::empty({0}).set_(memory, 0, p.sizes(), p.strides());
    other.mul_(1.5);
    p.mutable_grad() = other.detach();
    p.mutable_grad().unsafeGetTensorImpl()->set_version_counter(uint32_t(version));
    check(opt, 1);
  }
}

TEST_CASE("statistics of the backward: gradients vanish, appear and are stepped with", "[api]") {
  auto net = net_of(torch::kHalf);
  AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2));
  opt.stats_in_backward();
  backward(net);
  at::Tensor p = net->parameters()[0];
  p.mutable_grad() = at::Tensor();
  check(opt, 0);
  p.mutable_grad() = torch::ones_like(p);
  check(opt, 1);
  opt.step();
  check(opt, 6);  // a step may have written the gradients
  backward(net);
  check(opt, 0);
  opt.zero_grad();
  CHECK(opt.gather_stats().empty());
}

TEST_CASE("statistics of the backward: unscaling is seen, clipping by the scaler writes nothing",
          "[api]") {
  for (const auto dtype : {torch::kHalf, torch::kFloat}) {
    auto net = net_of(dtype);
    AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2));
    opt.stats_in_backward();
    GradScaler scaler;
    scaler.scale(loss_of(net, 0)).backward();
    scaler.clip_grad_norm_({&opt}, 0.1);
    check(opt, 0);
    scaler.unscale_(opt);
    check(opt, 6);
    torch::nn::utils::clip_grad_norm_(net->parameters(), 1e-3);
    check(opt, 6);
    scaler.step(opt);
    scaler.update();
    CHECK(scaler.stats().grad_norm < 1.1e-3);
    // Without unscale_ torch's clip is not seen: it counts no version (docs/telemetry.md).
    opt.zero_grad();
    backward(net);
    const auto version = net->parameters()[0].grad()._version();
    torch::nn::utils::clip_grad_norm_(net->parameters(), 1e-3);
    CHECK(net->parameters()[0].grad()._version() == version);
  }
}

TEST_CASE("statistics of the backward: frozen parameters, added ones, sparse gradients", "[api]") {
  auto net = net_of(torch::kHalf);
  const auto params = net->parameters();
  at::Tensor(params[0]).set_requires_grad(false);
  SGD opt(std::vector<at::Tensor>(params.begin(), params.end() - 1), optim::SGDOptions(1e-2));
  opt.stats_in_backward();
  CHECK(hook_of(params[1]) != nullptr);
  backward(net);
  check(opt, 0);
  at::Tensor(params[0]).set_requires_grad(true);
  backward(net);
  check(opt, 1);  // it has a hook from here on
  backward(net);
  check(opt, 0);
  opt.param_groups()[0].params().push_back(params[5]);
  check(opt, 1);  // and the others keep their rows
  backward(net);
  check(opt, 0);
  at::Tensor(params[3]).set_requires_grad(false);  // keeps its gradient and its row
  backward(net);
  check(opt, 0);

  const at::Tensor extra = torch::ones({4}, torch::requires_grad());
  opt.add_param_group(torch::optim::OptimizerParamGroup({extra}));
  {
    const Seen seen;
    (extra * 3).sum().backward();
    CHECK(seen.rows == 1);
  }
  check(opt, 0, 1);

  auto table = torch::nn::Embedding(torch::nn::EmbeddingOptions(5, 2).sparse(true));
  SGD sparse({table->weight}, optim::SGDOptions(1.0));
  sparse.stats_in_backward();
  table->forward(torch::tensor({1, 3})).sum().backward();
  CHECK(has(message_of([&] { sparse.step(); }), "has a sparse gradient"));
}

TEST_CASE("statistics of the backward can be turned off and do not outlive the optimizer",
          "[api]") {
  auto net = net_of(torch::kHalf);
  const auto params = net->parameters();
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> alone(
      torch::ones({2}).getIntrusivePtr());
  {
    std::vector<at::Tensor> given = params;
    given.push_back(torch::ones({2}, torch::requires_grad()));
    alone = given.back().getIntrusivePtr();
    auto opt = std::make_unique<AdamW>(given, optim::AdamWOptions(1e-2));
    given.clear();
    opt->stats_in_backward(false);
    for (const auto& p : params) CHECK(hook_of(p) == nullptr);
    opt->stats_in_backward();
    opt->stats_in_backward();
    {
      const Seen seen;
      backward(net);
      CHECK(seen.rows == 6);  // one hook each
    }
    opt->stats_in_backward(false);
    for (const auto& p : params) CHECK(hook_of(p) == nullptr);
    backward(net);
    {
      const Seen seen;
      opt->gather_stats();
      CHECK((seen.passes == 1 && seen.joins == 0));
    }
    opt->stats_in_backward();
    for (const auto& p : params) CHECK(hook_of(p) != nullptr);
    CHECK(!alone.expired());
  }
  CHECK(alone.expired());
  for (const auto& p : params) CHECK(hook_of(p) == nullptr);
  const Seen seen;
  backward(net);
  CHECK(seen.rows == 0);
}

TEST_CASE("hooks of the user and of other optimizers stay where they are", "[api]") {
  auto net = net_of(torch::kFloat);
  const auto params = net->parameters();
  int first = 0, later = 0;
  set_hook(params[2], [&](const at::Tensor& p) { ++first, p.grad().mul_(2); });
  auto opt = std::make_unique<AdamW>(params, optim::AdamWOptions(1e-2));
  auto other = std::make_unique<AdamW>(params, optim::AdamWOptions(1e-2));
  opt->stats_in_backward();
  other->stats_in_backward();
  backward(net);
  CHECK(first == 1);
  check(*opt, 0);  // what the user's hook wrote was read
  check(*other, 0);
  opt.reset();  // its hook stands between the two others
  backward(net);
  CHECK(first == 2);
  check(*other, 0);
  set_hook(params[4], [&](const at::Tensor&) { ++later; });  // replaces ours
  backward(net);
  CHECK(later == 1);
  check(*other, 1);
  backward(net);  // ours came back behind it
  CHECK(later == 2);
  check(*other, 0);
  other->stats_in_backward(false);
  {
    const Seen seen;
    backward(net);
    CHECK((first == 5 && later == 3 && seen.rows == 0));
  }

  // A hook that wraps ours keeps it, and it finds nobody when it is off.
  other->stats_in_backward();
  std::shared_ptr<torch::autograd::PostAccumulateGradHook> ours(
      std::move(torch::autograd::impl::post_acc_grad_hooks(params[0])));
  set_hook(params[0], [ours](const at::Tensor& p) { (*ours)(p); });
  ours.reset();
  backward(net);
  check(*other, 0);
  other.reset();
  backward(net);
  // One that turns them off while it runs.
  AdamW last(params, optim::AdamWOptions(1e-2));
  set_hook(params[1], [&](const at::Tensor&) { last.stats_in_backward(false); });
  last.stats_in_backward();
  backward(net);
  check(last, 6);
}

TEST_CASE("statistics of the backward in other threads, and beside a monitor", "[api]") {
  auto net = net_of(torch::kFloat);
  AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2));
  opt.stats_in_backward();
  std::thread([&] { backward(net); }).join();
  check(opt, 0);
  std::vector<at::Tensor> losses;
  for (int64_t seed = 0; seed < 8; ++seed) losses.push_back(loss_of(net, seed));
  std::vector<std::thread> threads;
  for (const auto& loss : losses) threads.emplace_back([loss] { loss.backward(); });
  for (auto& thread : threads) thread.join();
  // Hooks of one parameter that ran at the same time leave its row to be read again.
  CHECK(same_bits(opt.gather_stats().at(0).second, one_pass(net->parameters())));
  backward(net);
  check(opt, 0);

  Monitor monitor(*net, opt, {.every = 1});
  GradScaler scaler;
  for (int64_t seed = 0; seed < 6; ++seed) {
    const Seen seen;
    opt.zero_grad();
    scaler.scale(loss_of(net, seed)).backward();
    scaler.step(opt);
    scaler.update();
    monitor.step(scaler);
    CHECK((seen.rows == 6 && seen.joins == 1));
  }
  opt.stats_in_backward(false);
  const Seen seen;
  backward(net);
  CHECK(seen.rows == 0);
}

namespace {

struct Run {
  std::vector<at::Tensor> masters;
  std::vector<double> numbers;  ///< what the scaler said after each step
  int skips = 0;
};

/// Two optimizers under one scaler, whose scale begins too high.
template <class O, class Options>
Run train(const Options& options, int micro, bool on) {
  auto net = net_of(torch::kHalf);
  const auto params = net->parameters();
  O first(std::vector<at::Tensor>(params.begin(), params.begin() + 2), options);
  O second(std::vector<at::Tensor>(params.begin() + 2, params.end()), options);
  GradScaler scaler(GradScalerOptions().policy(
      policies::Dynamic().init_scale(std::pow(2.0, 24)).growth_interval(3)));
  if (on) first.stats_in_backward(), second.stats_in_backward();
  Run run;
  for (int64_t step = 0; step < 20; ++step) {
    first.zero_grad(step % 2 == 0), second.zero_grad(step % 2 == 0);
    for (int64_t i = 0; i < micro; ++i)
      scaler.scale(loss_of(net, step * micro + i) / micro).backward();
    if (step % 4 == 1) scaler.unscale_(first);
    if (step % 4 == 2) scaler.clip_grad_norm_({&first, &second}, 0.2);
    scaler.step(first), scaler.step(second);
    scaler.update();
    run.skips += scaler.step_was_skipped();
    const ScalerStats stats = scaler.stats();
    run.numbers.insert(run.numbers.end(), {stats.scale, stats.grad_norm, stats.amax});
    for (const auto& [name, of] : scaler.tensor_stats())
      run.numbers.insert(run.numbers.end(), {of.norm, of.amax, double(of.nonfinite)});
  }
  for (auto* opt : {&first, &second})
    for (const auto& value : opt->master_params()) run.masters.push_back(value);
  return run;
}

template <class O, class Options>
void check_same(Options options) {
  options.max_grad_norm(0.5);
  for (const bool zero_grads : {false, true})
    for (const int micro : {1, 3}) {
      options.zero_grads(zero_grads);
      const Run off = train<O>(options, micro, false), on = train<O>(options, micro, true);
      CHECK((off.skips > 2 && off.skips < 18 && on.skips == off.skips));
      REQUIRE((on.masters.size() == 6 && on.numbers.size() == 20 * (3 + 6 * 3)));
      for (size_t i = 0; i < 6; ++i) CHECK(torch::equal(off.masters[i], on.masters[i]));
      const auto bytes = on.numbers.size() * sizeof(double);
      CHECK(std::memcmp(off.numbers.data(), on.numbers.data(), bytes) == 0);
    }
}

}  // namespace

TEST_CASE("training is the same bits with statistics in the backward as without", "[api]") {
  check_same<optim::AdamW>(optim::AdamWOptions(1e-2));
  check_same<optim::Adam>(optim::AdamOptions(1e-2).states(States::kInt8));
  check_same<optim::SGD>(optim::SGDOptions(1e-2).momentum(0.9).grad_dtype(torch::kFloat));
  check_same<optim::Lion>(optim::LionOptions(1e-3).master(Master::kKahan));
  check_same<optim::Adagrad>(optim::AdagradOptions(1e-2).master(Master::kFp32));
  check_same<optim::Lamb>(optim::LambOptions(1e-2).master(Master::kStochastic));
  check_same<optim::NovoGrad>(optim::NovoGradOptions(1e-2).ema_decay(0.9));
}
