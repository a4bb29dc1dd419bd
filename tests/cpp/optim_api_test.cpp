// The optimizers in C++: the rules a user relies on.

#include "api.h"

using namespace halfstep;

TEST_CASE("a skipped step changes nothing, in every master mode", "[api]") {
  for (const auto master : {Master::kNone, Master::kSplit16, Master::kFp32, Master::kFp64}) {
    const Task task;
    auto net = make_net();
    cast_model(*net);
    optim::AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2).master(master));
    GradScaler scaler;
    iterate(net, opt, scaler, task);
    const auto before = opt.master_params();
    opt.zero_grad();
    {
      AutocastGuard guard(torch::kCPU);
      (scaler.scale(loss_of(net, task)) * INFINITY).backward();
    }
    scaler.step(opt);
    CHECK(scaler.step_was_skipped(opt));
    scaler.update();
    const auto after = opt.master_params();
    for (size_t i = 0; i < before.size(); ++i) CHECK(torch::equal(before[i], after[i]));
    const auto stats = scaler.stats();
    CHECK(stats.steps_skipped == 1);
    CHECK(stats.scale == 32768);
    CHECK(stats.first_bad_param == "0.weight");
    CHECK(std::isnan(stats.grad_norm));
  }
}

TEST_CASE("an edited weight survives the next step and is told once, by name", "[api]") {
  for (const auto master : {Master::kNone, Master::kSplit16, Master::kFp32, Master::kFp64}) {
    torch::OrderedDict<std::string, at::Tensor> named;
    auto p = torch::randn({32}).to(torch::kHalf).set_requires_grad(true);
    named.insert("fc.weight", p);
    optim::SGD opt(named, optim::SGDOptions(1e-4).master(master));
    p.mutable_grad() = torch::ones({32}, torch::kHalf);
    opt.step();
    {
      torch::NoGradGuard no_grad;
      p.fill_(0.5);
      p[3] = -1.0;
    }
    const Warnings warnings;
    opt.step();
    opt.step();
    const auto now = p.detach().to(torch::kFloat);
    CHECK(torch::allclose(now.slice(0, 4), torch::full({28}, 0.4998), 1e-3));
    CHECK(std::abs(now[3].item<float>() + 1.0f) < 2e-3f);
    const bool copied = master == Master::kFp32 || master == Master::kFp64;
    CHECK(warnings.with("masters follow: 'fc.weight'") <= 1);
    if (copied) CHECK(warnings.with("masters follow: 'fc.weight'") == 1);
  }
}

TEST_CASE("edits behind the version counter are found on request", "[api]") {
  for (const auto master : {Master::kFp32, Master::kFp64}) {
    auto p = torch::zeros({8}, torch::kHalf).set_requires_grad(true);
    optim::SGD opt({p}, optim::SGDOptions(1.0).master(master));
    p.tensor_data().fill_(2.0);
    CHECK(opt.refresh_masters() == 8);
    CHECK(opt.refresh_masters() == 0);
    p.mutable_grad() = torch::ones({8}, torch::kHalf);
    opt.step();
    CHECK(torch::equal(p.detach(), torch::ones({8}, torch::kHalf)));
  }
}

TEST_CASE("learning-rate schedules, tied parameters, named refusals", "[api]") {
  auto p = torch::ones({3}, torch::requires_grad());
  optim::SGD opt({p, p}, optim::SGDOptions(1.0));
  torch::optim::StepLR schedule(opt, 1, 0.5);
  p.mutable_grad() = torch::ones({3});
  opt.step();
  CHECK(torch::equal(p.detach(), torch::zeros({3})));  // tied: stepped once
  schedule.step();
  schedule.step();  // torch's first call leaves the rate as it is
  opt.step();
  CHECK(torch::equal(p.detach(), torch::full({3}, -0.5)));

  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<at::Tensor>{p});
  groups.emplace_back(std::vector<at::Tensor>{p});
  CHECK(has(
      message_of([&] { optim::SGD twice(groups); }),
      "'group 1, parameter 0' is in an earlier parameter group too, as 'group 0, parameter 0'"));

  auto net = make_net();
  {
    torch::NoGradGuard no_grad;
    net->parameters()[0][0][0] = 70000;
  }
  CHECK(has(message_of([&] { cast_model(*net); }),
            "'0.weight' does not fit float16: 1 of 512 elements are at or beyond 65520"));
  CHECK(net->parameters()[2].scalar_type() == torch::kFloat);
  CHECK(has(message_of([&] { optim::AdamW bad({p}, optim::AdamWOptions(-1)); }), "lr is -1"));
  CHECK(has(message_of([] { policies::Dynamic().growth_factor(1); }), "growth_factor is 1"));
  GradScaler scaler;
  CHECK(has(message_of([&] { scaler.update(); }), "nothing was scaled yet"));
}

TEST_CASE("closures are evaluated and their loss returned", "[api]") {
  auto p = torch::ones({4}, torch::requires_grad());
  optim::SGD opt({p}, optim::SGDOptions(1.0).max_grad_norm(1.0));
  const auto loss = opt.step([&] {
    opt.zero_grad();
    const auto value = p.sum();
    value.backward();
    return value;
  });
  CHECK(loss.item<double>() == 4);
  CHECK(torch::allclose(p.detach(), torch::full({4}, 0.5)));
  p.mutable_grad() = torch::full({4}, NAN);
  opt.step();
  CHECK(opt.steps_skipped() == 1);
}

TEST_CASE("groups keep their own options; another type is refused with the group's number",
          "[api]") {
  auto a = torch::ones({2}, torch::requires_grad()), b = torch::ones({2}, torch::requires_grad());
  const auto groups = [&](std::unique_ptr<torch::optim::OptimizerOptions> options) {
    std::vector<torch::optim::OptimizerParamGroup> list;
    list.emplace_back(std::vector<at::Tensor>{a});
    list.emplace_back(std::vector<at::Tensor>{b}, std::move(options));
    return list;
  };
  optim::SGD opt(groups(std::make_unique<optim::SGDOptions>(0.5)), optim::SGDOptions(0.25));
  a.mutable_grad() = torch::ones({2});
  b.mutable_grad() = torch::ones({2});
  opt.step();
  CHECK(torch::equal(a.detach(), torch::full({2}, 0.75)));
  CHECK(torch::equal(b.detach(), torch::full({2}, 0.5)));

  const std::string wrong = "parameter group 1 has options of another optimizer; this one is SGD";
  CHECK(has(message_of([&] {
              optim::SGD bad(groups(std::make_unique<optim::AdamOptions>()), optim::SGDOptions());
            }),
            wrong));
  CHECK(has(message_of([&] {
              optim::SGD bad(groups(std::make_unique<torch::optim::SGDOptions>(0.1)),
                             optim::SGDOptions());
            }),
            wrong));
  opt.param_groups()[1].set_options(std::make_unique<optim::AdamOptions>());
  CHECK(has(message_of([&] { opt.step(); }), wrong));
  opt.param_groups()[1].set_options(std::make_unique<optim::SGDOptions>(-2.0));
  CHECK(has(message_of([&] { opt.step(); }), "parameter group 1: lr is -2"));
  CHECK(torch::equal(a.detach(), torch::full({2}, 0.75)));  // nothing was written
  auto c = torch::ones({2}, torch::requires_grad());
  CHECK(has(message_of([&] {
              opt.add_param_group({{c}, std::make_unique<optim::AdamOptions>()});
            }),
            "parameter group"));
}

TEST_CASE("parameters added later get masters at the first step that sees them", "[api]") {
  for (const bool as_group : {true, false}) {
    torch::manual_seed(0);
    const auto start = torch::randn({2, 20}).to(torch::kHalf);
    auto a = start[0].clone().set_requires_grad(true), b = start[1].clone().set_requires_grad(true);
    auto c = start[0].clone().set_requires_grad(true), d = start[1].clone().set_requires_grad(true);
    optim::AdamW late({a}, optim::AdamWOptions(1e-2)), early({c}, optim::AdamWOptions(1e-2));
    optim::AdamW other({d}, optim::AdamWOptions(1e-2));
    for (int step = 0; step < 6; ++step) {
      if (step == 3 && as_group) late.add_param_group({std::vector<at::Tensor>{b}});
      if (step == 3 && !as_group) late.param_groups()[0].params().push_back(b);
      const auto grad = torch::randn({20}).to(torch::kHalf);
      for (auto* p : {&a, &b, &c, &d}) p->mutable_grad() = grad;
      late.step();
      early.step();
      if (step >= 3) other.step();
    }
    CHECK(torch::equal(a, c));
    CHECK(torch::equal(b, d));
    CHECK(torch::equal(late.master_params()[1], other.master_params()[0]));
    CHECK(has(message_of([&] { late.add_param_group({std::vector<at::Tensor>{a}}); }),
              "is in an earlier parameter group too, as 'group 0, parameter 0'"));
    late.param_groups()[0].params().erase(late.param_groups()[0].params().begin());
    CHECK(
        has(message_of([&] { late.step(); }), "parameter group 0 no longer lists the parameters"));
  }
}

TEST_CASE("a refused late parameter leaves the optimizer usable", "[api]") {
  auto a = torch::ones({2}, torch::requires_grad());
  auto bad = torch::full({2}, INFINITY, torch::kHalf).set_requires_grad(true);
  optim::SGD opt({a}, optim::SGDOptions(1.0));
  opt.param_groups()[0].params().push_back(bad);
  a.mutable_grad() = torch::ones({2});
  for (int i = 0; i < 2; ++i)
    CHECK(has(message_of([&] { opt.step(); }), "'group 0, parameter 1' holds a non-finite value"));
  CHECK(torch::equal(a.detach(), torch::ones({2})));
  opt.param_groups()[0].params().pop_back();
  opt.step();
  CHECK(torch::equal(a.detach(), torch::zeros({2})));
}

TEST_CASE("a parameter that torch::load left on four-byte elements is named", "[api]") {
  const Folder folder;
  struct NetImpl : torch::nn::Module {
    NetImpl() { conv = register_module("conv", torch::nn::Conv2d(1, 2, 3)); }
    torch::nn::Conv2d conv{nullptr};
  };
  for (const auto wide : {torch::kFloat, torch::kDouble}) {
    const auto plain = std::make_shared<NetImpl>();
    plain->to(wide);
    {
      torch::NoGradGuard no_grad;
      plain->conv->weight.fill_(1.0);
    }
    torch::save(plain, folder / "net.pt");
    auto net = std::make_shared<NetImpl>();
    cast_model(*net);
    optim::AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2));
    torch::load(net, folder / "net.pt");
    for (auto& p : net->parameters()) p.mutable_grad() = torch::ones_like(p);
    const auto bytes = net->conv->weight.detach().clone();
    const std::string message =
        std::string("params[0] 'conv.weight' is float16 but its storage holds ") +
        (wide == torch::kFloat ? "4" : "8") +
        "-byte elements: loaded with torch::load? use halfstep::load";
    CHECK(message_of([&] { opt.step(); }) == message);
    CHECK(message_of([&] { opt.master_params(); }) == message);
    CHECK(torch::equal(net->conv->weight.detach().view(torch::kShort), bytes.view(torch::kShort)));
    CHECK(message_of([&] {
            optim::AdamW late(net->named_parameters(), optim::AdamWOptions(1e-2));
          }) == message);
    halfstep::load(*net, folder / "net.pt");
    CHECK(torch::equal(net->conv->weight.detach(), torch::ones({2, 1, 3, 3}, torch::kHalf)));
    CHECK(message_of([&] { opt.step(); }).empty());
  }
}

TEST_CASE("views of one buffer are no parameters of torch::load", "[api]") {
  const auto buffer = torch::randn({2, 8}).to(torch::kHalf);
  auto a = buffer[0].detach().set_requires_grad(true),
       b = buffer[1].detach().set_requires_grad(true);
  optim::AdamW opt({a, b}, optim::AdamWOptions(1e-2));
  a.mutable_grad() = torch::ones_like(a);
  opt.step();
  CHECK(opt.distinct_parameters().size() == 2);
}

TEST_CASE("casting after the optimizer was made is refused; so is another dtype in the step",
          "[api]") {
  auto net = make_net();
  {
    optim::AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2));
    CHECK(has(message_of([&] { cast_model(*net); }),
              "cast_model: '0.weight' already belongs to an optimizer; cast the model first"));
    CHECK(net->parameters()[0].scalar_type() == torch::kFloat);
    for (auto& p : net->parameters()) p.mutable_grad() = torch::ones_like(p);
    net->to(torch::kDouble);
    CHECK(has(message_of([&] { opt.step(); }),
              "'0.weight' is float64 but was float32 when the optimizer was made"));
    net->to(torch::kFloat);
    CHECK(message_of([&] { opt.step(); }).empty());
  }
  CHECK(cast_model(*net).cast.size() == 4);  // the optimizer is gone
}

TEST_CASE("freezing, unfreezing and gradients that vanish", "[api]") {
  const Task task;
  auto net = make_net();
  cast_model(*net);
  optim::AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2));
  GradScaler scaler;
  const auto step_count = [&](int64_t i) {
    const StateDict entry = opt.state_dict().at("state").toGenericDict().at(i);
    return entry.at("step").toTensor().item<float>();
  };
  iterate(net, opt, scaler, task);
  auto frozen = net->parameters()[0];
  const auto before = opt.master_params();
  frozen.set_requires_grad(false);
  iterate(net, opt, scaler, task);
  const auto between = opt.master_params();
  CHECK(torch::equal(between[0], before[0]));
  CHECK(!torch::equal(between[1], before[1]));
  frozen.set_requires_grad(true);
  iterate(net, opt, scaler, task);
  CHECK(!torch::equal(opt.master_params()[0], before[0]));
  CHECK(step_count(0) == 2);  // counts are a parameter's own
  CHECK(step_count(1) == 3);
  CHECK(scaler.stats().steps_applied == 3);
  const auto weights = state_dict(*net);
  for (auto& p : net->parameters()) p.mutable_grad() = at::Tensor();
  opt.step();
  for (const auto& item : net->named_parameters())
    CHECK(torch::equal(item.value(), weights.at(item.key()).toTensor()));
}

TEST_CASE("a frozen parameter has neither master nor states until its first gradient", "[api]") {
  const auto states = GENERATE(States::kFp32, States::kInt8);
  const auto kind = GENERATE(Master::kSplit16, Master::kFp32, Master::kFp64);
  CAPTURE(int(states), int(kind));
  torch::manual_seed(3);
  const at::Tensor start = torch::randn({64}), gradient = torch::randn({64}, torch::kHalf);
  const auto make = [&] {  // its second layer is frozen
    torch::nn::Sequential net(torch::nn::Linear(8, 8), torch::nn::Linear(8, 8));
    {
      const torch::NoGradGuard no_grad;
      for (auto& p : net->parameters()) p.copy_(start.slice(0, 0, p.numel()).view(p.sizes()));
    }
    for (auto& item : net->named_parameters())
      if (item.key().starts_with("1.")) item.value().set_requires_grad(false);
    cast_model(*net);
    return net;
  };
  const auto options =
      optim::AdamWOptions(1e-2).master(kind).states(states).ema_decay(0.9).max_grad_norm(1.0);
  auto net = make();
  optim::AdamW opt(net->named_parameters(), options);
  const auto give = [&](const char* layer) {
    for (auto& item : net->named_parameters())
      if (item.key().starts_with(layer))
        item.value().mutable_grad() =
            gradient.slice(0, 0, item.value().numel()).view(item.value().sizes()).clone();
  };
  give("0.");
  opt.step();
  // Entries as Python writes them: none for what is frozen.
  const StateDict saved = opt.state_dict();
  const auto entries = saved.at("state").toGenericDict();
  CHECK(StateDict(entries.at(0)).contains("exp_avg"));
  CHECK(StateDict(entries.at(2)).size() == 0);
  const auto exact = opt.ema_params();
  CHECK(torch::equal(exact[2], net->named_parameters()["1.weight"].detach().to(exact[2].dtype())));
  // The masters of 72 elements are all that is held.
  int64_t held = 0;
  for (const auto& tensor : opt.state_tensors()) held += tensor.numel();
  const bool coded = states == States::kInt8 && kind != Master::kFp64;
  const int64_t scales = coded ? 2 * 2 : 0;  // two states of two tensors of one block each
  CHECK(held == 4 * 72 + scales + 4 /* step counts */);

  // Unfrozen, it trains as if it had joined now: like a new optimizer over it alone.
  for (auto& p : net->parameters()) p.set_requires_grad(true);
  opt.zero_grad();
  give("1.");
  torch::OrderedDict<std::string, at::Tensor> alone;
  for (auto& item : net->named_parameters())
    if (item.key().starts_with("1.")) {
      const at::Tensor twin = item.value().detach().clone().set_requires_grad(true);
      twin.mutable_grad() = item.value().grad().clone();
      alone.insert(item.key(), twin);
    }
  optim::AdamW fresh(alone, options);
  opt.step();
  fresh.step();
  CHECK(StateDict(opt.state_dict().at("state").toGenericDict().at(2)).contains("exp_avg"));
  for (const auto& item : alone)
    CHECK(torch::equal(item.value(), net->named_parameters()[item.key()]));

  // A file in which it is frozen leaves it frozen, one in which it was trained gives it states.
  auto other = make();
  {
    const torch::NoGradGuard no_grad;
    for (auto& item : other->named_parameters())
      item.value().copy_(net->named_parameters()[item.key()]);
  }
  optim::AdamW reader(other->named_parameters(), options);
  reader.load_state_dict(saved, LoadMasters::kFromParams);
  CHECK(StateDict(reader.state_dict().at("state").toGenericDict().at(2)).size() == 0);
  reader.load_state_dict(opt.state_dict());
  const auto loaded = reader.master_params(), trained = opt.master_params();
  for (size_t i = 0; i < loaded.size(); ++i) CHECK(torch::equal(loaded[i], trained[i]));
  CHECK(StateDict(reader.state_dict().at("state").toGenericDict().at(2)).contains("exp_avg"));
}

TEST_CASE("grad_dtype(kFloat) sums micro-batches in FP32", "[api]") {
  for (const bool fp32 : {false, true}) {
    auto p = torch::zeros({1}, torch::kHalf).set_requires_grad(true);
    auto options = optim::SGDOptions(1.0);
    if (fp32) options.grad_dtype(torch::kFloat);
    optim::SGD opt({p}, options);
    for (int i = 0; i < 4096; ++i) (p * 1.0).sum().backward();
    CHECK(p.grad().scalar_type() == (fp32 ? torch::kFloat : torch::kHalf));
    CHECK(p.grad().item<float>() == (fp32 ? 4096 : 2048));
    opt.step();
    CHECK(p.item<float>() == (fp32 ? -4096 : -2048));
    opt.zero_grad();
    (p * 1.0).sum().backward();
    CHECK(p.grad().scalar_type() == (fp32 ? torch::kFloat : torch::kHalf));
  }
  auto p = torch::zeros({1}, torch::kHalf).set_requires_grad(true);
  CHECK(
      has(message_of([&] { optim::SGD bad({p}, optim::SGDOptions().grad_dtype(torch::kDouble)); }),
          "grad_dtype is float64; expected float32"));
}

TEST_CASE("a weight that would leave float16 keeps its value, is counted and named", "[api]") {
  torch::OrderedDict<std::string, at::Tensor> named;
  auto p = torch::full({4}, 65000.0).to(torch::kHalf).set_requires_grad(true);
  named.insert("fc.weight", p);
  optim::SGD opt(named, optim::SGDOptions(1.0));
  p.mutable_grad() = torch::tensor({-1000.0, 1.0, 1.0, -2000.0}).to(torch::kHalf);
  const Warnings warnings;
  opt.step();
  CHECK(p[0].item<float>() == 64992);  // 65000 as FP16
  CHECK(p[3].item<float>() == 64992);
  CHECK(warnings.with("'fc.weight' would leave float16 range (2 elements, step 1): keep it in FP32 "
                      "or lower lr") == 1);
}
