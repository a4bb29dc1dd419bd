// Checkpoints in C++: golden files of both languages, resuming, weights. What C++ and Python write
// for each other: tests/python/test_checkpoint.py.

#include "checkpoint_api.h"

using namespace halfstep;

TEST_CASE("golden files of optimizers, of both languages and of torch.optim", "[api]") {
  fixtures::Model model;
  fixtures::fill(model);
  std::vector<at::Tensor> rounded;
  for (const auto& p : model->parameters()) rounded.push_back(p.detach().to(torch::kFloat));
  for (const std::string name : {"adamw", "adamw_packed", "cpp_adamw_packed", "torch_adamw"}) {
    INFO(name);
    optim::AdamW opt(model->named_parameters(), optim::AdamWOptions(0.5));
    opt.load_state_dict(fixture(name));
    check_golden(opt, {"exp_avg", "exp_avg_sq"}, fixtures::kStep);
    check_masters(opt, name == "torch_adamw" ? rounded : fixtures::exact_weights());
  }
  for (const std::string name : {"sgd", "torch_sgd"}) {
    INFO(name);
    optim::SGD opt(model->named_parameters(), optim::SGDOptions(0.5).momentum(0.1));
    const auto& options = static_cast<optim::SGDOptions&>(opt.param_groups()[0].options());
    opt.load_state_dict(fixture(name));
    CHECK(options.momentum() == 0.9);  // a reference from before the load is still good
    check_golden(opt, {"momentum_buffer"}, name == "sgd" ? fixtures::kStep : 1);
    check_masters(opt, name == "sgd" ? fixtures::exact_weights() : rounded);
  }
}

TEST_CASE("an empty entry is a parameter that was never stepped", "[api]") {
  fixtures::Model model;
  fixtures::fill(model);
  optim::AdamW opt(model->named_parameters(), optim::AdamWOptions(0.5));
  const auto state = fixture("adamw");
  state.at("state").toGenericDict().insert_or_assign(1, StateDict());
  opt.load_state_dict(state);
  const auto entry = entry_of(opt.state_dict(), 1);
  CHECK(entry.at("step").toTensor().item<double>() == 0);
  CHECK(torch::equal(entry.at("exp_avg").toTensor(), torch::zeros({3})));
  CHECK(torch::equal(opt.master_params()[1], model->bias.detach().to(torch::kFloat)));
}

TEST_CASE("golden checkpoint and archives of C++, weights of both", "[api]") {
  const auto state = fixture("cpp_checkpoint");
  for (const bool archives : {false, true}) {
    fixtures::Model model;
    if (archives)
      halfstep::load(*model, kFixtures + "cpp_archive_model.pt");
    else
      load_state_dict(*model, state.at("model"));
    optim::AdamW opt(model->named_parameters(), optim::AdamWOptions(0.5));
    GradScaler scaler;
    if (archives) {
      torch::load(opt, kFixtures + "cpp_archive_adamw.pt");
      torch::load(scaler, kFixtures + "cpp_archive_scaler.pt");
    } else {
      opt.load_state_dict(state.at("optimizer"));
      scaler.load_state_dict(state.at("scaler"));
    }
    check_golden(opt, {"exp_avg", "exp_avg_sq"}, fixtures::kStep);
    check_masters(opt, fixtures::exact_weights());
    CHECK(model->count.item<int64_t>() == 5);
    CHECK(scaler.get_scale() == 1024);
    CHECK(scaler.stats().steps_applied == 6);
  }
  fixtures::Model model, expected;
  fixtures::fill(expected);
  halfstep::load(*model, kFixtures + "model.pt");  // an OrderedDict of torch.save
  for (const auto& item : expected->named_parameters())
    CHECK(torch::equal(model->named_parameters()[item.key()], item.value()));
  CHECK(model->count.item<int64_t>() == 5);
}

TEST_CASE("golden files of scalers, ours and torch's", "[api]") {
  for (const std::string name : {"scaler", "torch_scaler"}) {
    GradScaler scaler;
    scaler.load_state_dict(fixture(name));
    CHECK(scaler.get_scale() == 1024);
    const auto state = scaler.state_dict();
    CHECK(state.at("growth_interval").toInt() == 10);
    CHECK(state.at("_growth_tracker").toInt() == 3);
    const auto stats = scaler.stats();
    CHECK(stats.scale == 1024);
    CHECK(stats.steps_applied == (name == "scaler" ? 6 : 0));
    CHECK(std::isnan(stats.grad_norm));
  }
}

TEST_CASE("checkpoints resume to the bit", "[api]") {
  const Folder folder;
  const Task task;
  for (const std::string way : {"file", "packed", "archive"}) {
    auto net = make_net();
    cast_model(*net);
    optim::AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2).amsgrad(true));
    GradScaler scaler(GradScalerOptions().policy(policies::Dynamic().growth_interval(4)));
    for (int i = 0; i < 5; ++i) iterate(net, opt, scaler, task);
    StateDict checkpoint;
    checkpoint.insert("model", state_dict(*net)).insert("epoch", 5);
    checkpoint.insert("optimizer", opt.state_dict(way == "packed"));
    checkpoint.insert("scaler", scaler.state_dict());
    save(checkpoint, folder / "run.pt");
    torch::save(opt, folder / "opt.pt");
    torch::save(scaler, folder / "scaler.pt");

    auto other = make_net();
    cast_model(*other);
    optim::AdamW again(other->named_parameters(), optim::AdamWOptions(0.5));
    GradScaler second;
    const auto saved = load(folder / "run.pt");
    CHECK(saved.at("epoch").toInt() == 5);
    load_state_dict(*other, saved.at("model"));
    if (way == "archive") {
      torch::load(again, folder / "opt.pt");
      torch::load(second, folder / "scaler.pt");
    } else {
      again.load_state_dict(saved.at("optimizer"));
      second.load_state_dict(saved.at("scaler"));
    }
    const Warnings warnings;
    for (int i = 0; i < 5; ++i) {
      iterate(net, opt, scaler, task);
      iterate(other, again, second, task);
    }
    CHECK(everything(opt) == everything(again));
    CHECK(everything(scaler) == everything(second));
    CHECK(second.get_scale() > 65536);  // the loaded policy grew it
    CHECK(warnings.with("masters follow") == 0);
  }
}

TEST_CASE("what a state dict holds comes back as it was", "[api]") {
  const Folder folder;
  const auto a = torch::randn({3, 4});
  StateDict out;
  out.insert("none", c10::IValue()).insert("true", true).insert("big", int64_t(1) << 40);
  out.insert("small", int64_t(-70000)).insert("real", 0.1).insert("text", "a\nb");
  out.insert("pair", c10::ivalue::Tuple::create(c10::IValue(1), c10::IValue(a)));
  for (const auto type : {torch::kHalf, torch::kBFloat16, torch::kDouble, torch::kLong, torch::kInt,
                          torch::kShort, torch::kChar, torch::kByte, torch::kBool})
    out.insert(c10::toString(type), (a * 10).to(type));
  out.insert("tied", a).insert("turned", a.t()).insert("part", a.slice(1, 1, 3));
  out.insert("last", torch::randn({2, 3, 4, 5}).to(at::MemoryFormat::ChannelsLast));
  out.insert("empty", torch::empty({0, 3})).insert("one", torch::tensor(2.5));
  save(out, folder / "all.pt");
  const auto in = load(folder / "all.pt");
  REQUIRE(in.keys() == out.keys());
  for (const auto& key : out.keys()) {
    INFO(key);
    const auto x = out.at(key), y = in.at(key);
    REQUIRE(x.tagKind() == y.tagKind());
    if (x.isTensor()) {
      CHECK(torch::equal(x.toTensor(), y.toTensor()));
      CHECK(x.toTensor().scalar_type() == y.toTensor().scalar_type());
    } else if (!x.isTuple()) {
      CHECK(x == y);
    }
  }
  CHECK(in.at("last").toTensor().is_contiguous(at::MemoryFormat::ChannelsLast));
  const auto pair = in.at("pair").toTuple();
  CHECK(pair->elements()[1].toTensor().is_alias_of(in.at("tied").toTensor()));  // stored once
  CHECK(has(message_of([&] { in.at("nothing"); }), "the state dict has no 'nothing' (keys: none"));
  c10::impl::GenericList list(c10::AnyType::get());
  list.push_back(c10::Device("cpu"));
  CHECK(has(message_of([&] { save(StateDict().insert("a", list), folder / "bad.pt"); }),
            "a value of type Device at a.0 cannot be written"));
}

TEST_CASE("weights: exact with an optimizer, converted, or refused by name", "[api]") {
  const Folder folder;
  auto plain = make_net(), net = make_net();
  torch::save(plain, folder / "archive.pt");
  save(state_dict(*plain), folder / "state.pt");
  for (const std::string name : {"archive.pt", "state.pt"}) {
    {
      torch::NoGradGuard no_grad;
      net = make_net();
      for (auto& p : net->parameters()) p.zero_();
    }
    cast_model(*net);
    halfstep::load(*net, folder / name);
    optim::AdamW opt(net->parameters(), optim::AdamWOptions(1e-2).master(Master::kFp32));
    CHECK(torch::equal(opt.master_params()[0], plain->parameters()[0].detach()));
    CHECK(torch::equal(net->parameters()[0], plain->parameters()[0].to(torch::kHalf)));
    auto narrow = torch::nn::Sequential(torch::nn::Linear(16, 8));
    const auto before = narrow->parameters()[0].detach().clone();
    CHECK(has(message_of([&] { halfstep::load(*narrow, folder / name); }),
              name == "state.pt" ? "not in the model '2.weight'" : "'0.weight' is [8, 16]"));
    CHECK(torch::equal(narrow->parameters()[0], before));
  }
  // With the optimizer there, weights and masters are set together.
  optim::AdamW opt(net->named_parameters(), optim::AdamWOptions(1e-2));
  const StateDict exact(export_state_dict(*plain, opt));
  load_state_dict(*net, {&opt}, exact);
  CHECK(torch::equal(export_state_dict(*net, opt)["2.weight"], plain->parameters()[2].detach()));
  auto wide = state_dict(*plain);
  wide.at("2.bias").toTensor()[0] = 70000;
  const auto before = everything(opt);
  CHECK(has(message_of([&] { load_state_dict(*net, {&opt}, wide); }),
            "'2.bias' does not fit float16: 1 of 2"));
  CHECK(has(message_of([&] { load_state_dict(*net, {&opt}, StateDict()); }),
            "missing '0.weight', '0.bias', '2.weight', '2.bias', not in the model nothing"));
  wide.insert("2.bias", torch::zeros({2}, torch::kLong));
  CHECK(has(message_of([&] { load_state_dict(*net, wide); }),
            "'2.bias' is float16 but the value is int64"));
  CHECK(everything(opt) == before);
}
