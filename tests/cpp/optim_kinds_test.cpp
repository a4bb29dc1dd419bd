// Every rule in every master and state kind: training, skips, running means, zeroed gradients,
// checkpoints from one kind into another.

#include "checkpoint_api.h"

using namespace halfstep;

namespace {

constexpr Master kMasters[] = {Master::kNone,   Master::kSplit16, Master::kFp32,      Master::kFp64,
                               Master::kSplit8, Master::kKahan,   Master::kStochastic};
constexpr States kStates[] = {States::kFp32, States::kBf16, States::kInt8};

template <class Options>
Options in_kind(Options options, Master master, States states) {
  options.master(master).states(states).ema_decay(0.9).zero_grads(true).seed(5);
  return options;
}

using Params = std::vector<at::Tensor>;
using Made = std::unique_ptr<optim::Optimizer>;

/// All seven rules over `params`.
std::vector<std::function<Made(Params)>> rules_in(Master m, States s) {
  const auto make = [&]<class Rule, class Options>(std::in_place_type_t<Rule>, Options options) {
    options = in_kind(options, m, s);
    return std::function<Made(Params)>(
        [options](Params params) { return std::make_unique<Rule>(std::move(params), options); });
  };
  return {make(std::in_place_type<optim::AdamW>, optim::AdamOptions(1e-2).weight_decay(0.1)),
          make(std::in_place_type<optim::Adam>, optim::AdamOptions(1e-2).amsgrad(true)),
          make(std::in_place_type<optim::SGD>, optim::SGDOptions(1e-2).momentum(0.9)),
          make(std::in_place_type<optim::Lion>, optim::LionOptions(1e-3)),
          make(std::in_place_type<optim::Adagrad>,
               optim::AdagradOptions(1e-2).initial_accumulator_value(0.1)),
          make(std::in_place_type<optim::Lamb>, optim::LambOptions(1e-2)),
          make(std::in_place_type<optim::NovoGrad>, optim::NovoGradOptions(1e-2))};
}

/// FP16, BF16, FP32 and FP64 in one call.
Params mixed() {
  torch::manual_seed(3);
  Params params;
  for (const auto type : {torch::kHalf, torch::kBFloat16, torch::kFloat, torch::kDouble})
    params.push_back(torch::randn({70, 3}).to(type).set_requires_grad(true));
  return params;
}

void give_grads(const Params& params, int seed) {
  torch::manual_seed(100 + seed);
  for (const auto& p : params)
    at::Tensor(p).mutable_grad() = torch::randn({70, 3}).to(p.scalar_type());
}

Params copies(const Params& tensors) {
  Params all;
  for (const auto& t : tensors) all.push_back(t.detach().clone());
  return all;
}

bool all_equal(const Params& a, const Params& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!torch::equal(a[i].detach(), b[i].detach())) return false;
  return a.size() == b.size();
}

Params everything(optim::Optimizer& opt, const Params& params) {
  Params all = opt.state_tensors();
  all.insert(all.end(), params.begin(), params.end());
  return copies(all);
}

}  // namespace

TEST_CASE("every rule in every kind: steps, skips that change nothing, bit-equal resuming",
          "[api]") {
  for (const Master master : kMasters)
    for (const States states : kStates) {
      const auto rules = rules_in(master, states);
      for (size_t r = 0; r < rules.size(); ++r) {
        INFO("master " << int(master) << ", states " << int(states) << ", rule " << r);
        const Params params = mixed();
        const auto opt = rules[r](params);
        const Params start = copies(params);
        for (int step = 0; step < 3; ++step) give_grads(params, step), opt->step();
        for (size_t i = 0; i < params.size(); ++i) {
          CHECK(!torch::equal(params[i].detach(), start[i]));
          CHECK(params[i].detach().isfinite().all().item<bool>());
          CHECK(params[i].grad().count_nonzero().item<int64_t>() == 0);
        }
        const Params before = everything(*opt, params);
        give_grads(params, 3);
        params[1].grad()[5] = INFINITY;
        opt->step();
        CHECK(opt->steps_skipped() == 1);
        CHECK(all_equal(before, everything(*opt, params)));
        CHECK(params[0].grad().count_nonzero().item<int64_t>() == 0);

        Params other = mixed();
        const auto again = rules[r](other);
        {
          torch::NoGradGuard no_grad;
          for (size_t i = 0; i < params.size(); ++i) other[i].copy_(params[i]);
        }
        again->load_state_dict(opt->state_dict(/*packed=*/true));
        CHECK(all_equal(before, everything(*again, other)));
        for (int step = 4; step < 7; ++step) {
          give_grads(params, step), opt->step();
          give_grads(other, step), again->step();
        }
        CHECK(all_equal(everything(*opt, params), everything(*again, other)));
      }
    }
}

TEST_CASE("a checkpoint of any kind loads into any other", "[api]") {
  for (const bool packed : {false, true})
    for (const Master from : kMasters)
      for (const States states : kStates) {
        Params params = mixed();
        const auto source = rules_in(from, states)[0](params);
        give_grads(params, 1), source->step();
        const StateDict saved = source->state_dict(packed);
        const Params exact = source->master_params();
        for (const Master to : kMasters) {
          INFO("packed " << packed << ", from " << int(from) << " to " << int(to));
          Params other = mixed();
          {
            torch::NoGradGuard no_grad;
            for (size_t i = 0; i < params.size(); ++i) other[i].copy_(params[i]);
          }
          const auto target = rules_in(to, States::kFp32)[0](other);
          const bool lacks = from == Master::kNone || from == Master::kStochastic;
          const bool needs = to != Master::kNone && to != Master::kStochastic;
          // Beside an FP32 parameter only an FP64 master is held.
          if ((lacks && needs) || (to == Master::kFp64 && from != Master::kFp64)) {
            CHECK(has(message_of([&] { target->load_state_dict(saved); }), "has no 'master'"));
            target->load_state_dict(saved, LoadMasters::kFromParams);
          } else {
            target->load_state_dict(saved);
          }
          if (from == Master::kFp64 || to == Master::kFp64) continue;  // other dtypes of state
          const Params held = target->master_params();
          if (to == Master::kFp32 && !lacks)
            for (size_t i = 0; i < held.size(); ++i) CHECK(torch::equal(held[i], exact[i]));
          for (int64_t i = 0; i < 4; ++i) {
            const auto a = entry_of(source->state_dict(), i), b = entry_of(target->state_dict(), i);
            for (const char* key : {"exp_avg", "exp_avg_sq", "step", "ema"})
              CHECK(torch::equal(a.at(key).toTensor(), b.at(key).toTensor()));
          }
        }
      }
}

TEST_CASE("running means begin at the exact weight and follow the FP64 recurrence", "[api]") {
  const auto exact = torch::randn({200});
  auto p = exact.to(torch::kHalf).set_requires_grad(true);
  optim::SGD opt({p}, optim::SGDOptions(0.1).ema_decay(0.95));
  opt.set_master_params({exact});
  CHECK(torch::equal(opt.ema_params()[0], exact));
  auto mean = exact.to(torch::kDouble);
  for (int step = 0; step < 50; ++step) {
    p.mutable_grad() = torch::randn({200}).to(torch::kHalf);
    opt.step();
    mean += 0.05 * (opt.master_params()[0].to(torch::kDouble) - mean);
  }
  const auto off = (opt.ema_params()[0].to(torch::kDouble) - mean).abs().max().item<double>();
  CHECK(off < 1e-6);
  CHECK(off > 0);
  optim::SGD none({p}, optim::SGDOptions(0.1));
  CHECK(has(message_of([&] { none.ema_params(); }), "no parameter group has an ema_decay"));
}

TEST_CASE("evaluation and export in the running means", "[api]") {
  const Task task;
  auto net = make_net();
  cast_model(*net);
  optim::AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2).ema_decay(0.5));
  GradScaler scaler;
  for (int i = 0; i < 3; ++i) iterate(net, opt, scaler, task);
  const auto means = opt.ema_params(), masters = opt.master_params();
  CHECK(!torch::equal(means[0], masters[0]));
  {
    EvaluateIn in(*net, opt, torch::kFloat, Weights::kEma);
    CHECK(torch::equal(net->parameters()[0], means[0]));
  }
  CHECK(net->parameters()[0].scalar_type() == torch::kHalf);
  CHECK(torch::equal(export_state_dict(*net, opt, torch::kFloat, Weights::kEma)["0.weight"],
                     means[0]));
  CHECK(torch::equal(export_state_dict(*net, opt)["0.weight"], masters[0]));
}

TEST_CASE("zeroed gradients: after an unscale_ too, in the parameter's dtype, with a new version",
          "[api]") {
  const Task task;
  for (const bool unscale : {false, true}) {
    auto net = make_net();
    cast_model(*net);
    optim::AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2).zero_grads(true));
    GradScaler scaler;
    {
      AutocastGuard guard(torch::kCPU);
      scaler.scale(loss_of(net, task)).backward();
    }
    const auto grad = net->parameters()[0].grad();
    const auto version = grad._version();
    if (unscale) scaler.unscale_(opt);
    scaler.step(opt);
    scaler.update();
    for (const auto& p : net->parameters()) {
      CHECK(p.grad().scalar_type() == p.scalar_type());
      CHECK(p.grad().count_nonzero().item<int64_t>() == 0);
    }
    if (!unscale) CHECK(grad._version() > version);
  }
}

TEST_CASE("edits survive the next step where the master is a remainder", "[api]") {
  for (const auto master : {Master::kSplit16, Master::kSplit8, Master::kKahan, Master::kStochastic})
    for (const auto type : {torch::kHalf, torch::kBFloat16}) {
      auto p = torch::randn({64}).to(type).set_requires_grad(true);
      optim::SGD opt({p}, optim::SGDOptions(1e-6).master(master));
      p.mutable_grad() = torch::ones({64}, type);
      opt.step();
      {
        torch::NoGradGuard no_grad;
        p.fill_(0.5);
        p[3] = 0;
      }
      opt.step();
      CHECK(torch::allclose(p.detach().to(torch::kFloat).slice(0, 4), torch::full({60}, 0.5), 0,
                            type == torch::kHalf ? 5e-4 : 4e-3));
      CHECK(std::abs(p[3].item<float>()) < 1e-5f);
    }
}

TEST_CASE("options of the rules: refusals, defaults, decay apart from lr", "[api]") {
  auto p = torch::ones({4}, torch::requires_grad());
  const auto refused = [&](const std::function<void()>& call, const std::string& text) {
    INFO(text);
    CHECK(has(message_of(call), text));
  };
  refused([&] { optim::Lion bad({p}, optim::LionOptions().betas({0.9, 1.0})); }, "betas[1] is 1");
  refused([&] { optim::Adagrad bad({p}, optim::AdagradOptions().lr_decay(-1)); }, "lr_decay is -1");
  refused([&] { optim::Lamb bad({p}, optim::LambOptions().eps(-1)); }, "eps is -1");
  refused([&] { optim::NovoGrad bad({p}, optim::NovoGradOptions(-1)); }, "lr is -1");
  refused([&] { optim::SGD bad({p}, optim::SGDOptions().ema_decay(2)); }, "ema_decay is 2");
  refused([&] { optim::SGD bad({p}, optim::SGDOptions().seed(-1)); }, "seed is -1");
  refused([&] { optim::Adam bad({p}, optim::AdamOptions().decouple_lr(true)); },
          "decouple_lr is an option of AdamW, not Adam");
  refused([&] { optim::AdamW bad({p}, optim::AdamWOptions(0).decouple_lr(true)); },
          "decouple_lr divides by max_lr, which is 0");
  CHECK(optim::NovoGradOptions().betas() == std::make_tuple(0.95, 0.98));

  optim::AdamW opt({p}, optim::AdamWOptions(0.5).decouple_lr(true).weight_decay(0.1).eps(1e30));
  opt.param_groups()[0].options().set_lr(0.25);
  p.mutable_grad() = torch::ones({4});
  opt.step();  // eps leaves the decay alone: 1 - 0.25 / 0.5 * 0.1
  CHECK(torch::allclose(p.detach(), torch::full({4}, 0.95), 1e-6));
}

TEST_CASE("another order of the parameters is followed by name or refused", "[api]") {
  const auto build = [](const std::vector<std::string>& names) {
    torch::OrderedDict<std::string, at::Tensor> named;
    for (const auto& name : names)
      named.insert(name, torch::full({4}, double(name[0])).set_requires_grad(true));
    return named;
  };
  const auto first = build({"a", "b", "c"});
  optim::Lion opt(first, optim::LionOptions(1e-3));
  for (const auto& item : first) item.value().mutable_grad() = item.value().detach().clone();
  opt.step();
  const auto moved = build({"c", "a", "b"});
  optim::Lion other(moved, optim::LionOptions(1e-3));
  other.load_state_dict(opt.state_dict());
  for (int64_t i = 0; i < 3; ++i)
    CHECK(torch::equal(entry_of(other.state_dict(), i).at("exp_avg").toTensor(),
                       entry_of(opt.state_dict(), (i + 2) % 3).at("exp_avg").toTensor()));
  const auto stranger = build({"b", "a", "x"});
  optim::Lion none(stranger, optim::LionOptions(1e-3));
  CHECK(has(message_of([&] { none.load_state_dict(opt.state_dict()); }),
            "has 'b' at another place in group 0, and no 'x'"));
  const auto renamed = build({"x", "y", "z"});
  optim::Lion by_place(renamed, optim::LionOptions(1e-3));
  by_place.load_state_dict(opt.state_dict());
  CHECK(entry_of(by_place.state_dict(), 0).at("step").toTensor().item<float>() == 1);
}

TEST_CASE("golden files of every kind, read and written as they were", "[api]") {
  const auto kind = [](auto options) { return options.master(Master::kSplit8).ema_decay(0.9); };
  const auto check = [](optim::Optimizer& opt, const std::string& name) {
    INFO(name);
    const auto saved = fixture(name);
    opt.load_state_dict(saved);
    const auto written = opt.state_dict(/*packed=*/name.ends_with("packed"));
    for (int64_t i = 0; i < 3; ++i) {
      const auto a = entry_of(saved, i), b = entry_of(written, i);
      CHECK(a.keys().size() == b.keys().size());
      for (const auto& key : a.keys()) {
        INFO(key);
        if (a.at(key).isTensor())
          CHECK((a.at(key).toTensor().scalar_type() == b.at(key).toTensor().scalar_type() &&
                 torch::equal(a.at(key).toTensor(), b.at(key).toTensor())));
        else
          CHECK(a.at(key).toInt() == b.at(key).toInt());
      }
    }
  };
  fixtures::Model model;
  fixtures::fill(model);
  const auto params = model->named_parameters();
  optim::AdamW coded(params, kind(optim::AdamWOptions(0.5)).states(States::kInt8));
  check(coded, "adamw_int8_packed");
  check(coded, "cpp_adamw_int8_packed");
  optim::Lion lion(params, optim::LionOptions().master(Master::kKahan).states(States::kBf16));
  check(lion, "lion_kahan_packed");
  optim::Adagrad adagrad(params, optim::AdagradOptions());
  check(adagrad, "adagrad");
  CHECK(static_cast<optim::AdagradOptions&>(adagrad.param_groups()[0].options())
            .initial_accumulator_value() == 0.5);
  optim::Lamb lamb(params, optim::LambOptions().master(Master::kStochastic).ema_decay(0.9));
  check(lamb, "lamb");
  const auto& options = static_cast<optim::LambOptions&>(lamb.param_groups()[0].options());
  CHECK((options.seed() == 5 && options.ema_decay() == 0.5));
  optim::NovoGrad novograd(params, optim::NovoGradOptions());
  check(novograd, "novograd");
  optim::Adagrad stock(params, optim::AdagradOptions());
  stock.load_state_dict(fixture("torch_adagrad"));
  check_golden(stock, {}, fixtures::kStep);
}
