// What C++ refuses to load or cannot write, and that nothing changes then.

#include <sys/resource.h>

#include <csignal>
#include <random>

#include "checkpoint_api.h"

using namespace halfstep;

TEST_CASE("a refused state changes nothing", "[api]") {
  fixtures::Model model;
  fixtures::fill(model);
  optim::AdamW opt(model->named_parameters(), optim::AdamWOptions(0.5));
  for (auto& p : model->parameters()) p.mutable_grad() = torch::ones_like(p);
  const auto before = everything(opt);
  using Edit = std::function<void(const StateDict&)>;
  const auto group = [](const StateDict& s) -> StateDict {
    return s.at("param_groups").toList().get(0);
  };
  const std::vector<std::pair<std::string, Edit>> edits = {
      {"has no 'state' ", [](const StateDict& s) { s.at("x"); }},
      {"has format 2; this halfstep reads format 1", [](StateDict s) { s.insert("format", 2); }},
      {"is of SGD but this optimizer is AdamW", [](StateDict s) { s.insert("optimizer", "SGD"); }},
      {"has 2 parameter groups but the optimizer has 1",
       [&](const StateDict& s) { s.at("param_groups").toList().push_back(group(s)); }},
      {"has 4 parameters in group 0 but the optimizer has 3",
       [&](const StateDict& s) { group(s).at("params").toList().push_back(3); }},
      {"has no entry 2 for 'gain'",
       [](const StateDict& s) { std::ignore = s.at("state").toGenericDict().erase(2); }},
      {"of 'bias' has no 'exp_avg_sq'",
       [](const StateDict& s) { entry_of(s, 1).insert("exp_avg_sq", c10::IValue()); }},
      {"of 'bias' has no 'master'",
       [](const StateDict& s) { entry_of(s, 1).insert("master", c10::IValue()); }},
      {"'exp_avg' of 'bias' is [2] but the parameter is [3]",
       [](const StateDict& s) { entry_of(s, 1).insert("exp_avg", torch::zeros({2})); }},
      {"'exp_avg' of 'bias' is int32; expected a floating dtype",
       [](const StateDict& s) {
         entry_of(s, 1).insert("exp_avg", torch::zeros({3}, torch::kInt));
       }},
      {"'step' of 'gain' is -1", [](const StateDict& s) { entry_of(s, 2).insert("step", -1); }},
      {"'bias' does not fit float16",
       [](const StateDict& s) { entry_of(s, 1).insert("master", torch::full({3}, 1e5)); }},
      {"optimizer state is for other weights: 'bias' differs in 1 of 3 elements; load the model "
       "first or pass masters=\"from_params\" (LoadMasters::kFromParams)",
       [](const StateDict& s) { entry_of(s, 1).at("master").toTensor()[1] = 9.0; }},
      {"of 'bias' has an unknown 'momentum'",
       [](const StateDict& s) { entry_of(s, 1).insert("momentum", torch::zeros({3})); }},
      {"has an entry 7 that is no parameter's",
       [](const StateDict& s) { s.at("state").toGenericDict().insert(7, StateDict()); }},
      {"has lr of type String; expected a number",
       [&](const StateDict& s) { group(s).insert("lr", "fast"); }},
      {"parameter group 0: lr is -1", [&](const StateDict& s) { group(s).insert("lr", -1); }},
      {"betas[1] is 1.5",
       [&](const StateDict& s) {
         group(s).insert("betas", c10::ivalue::Tuple::create(c10::IValue(0.9), c10::IValue(1.5)));
       }},
      {"has amsgrad of type Int; expected True or False",
       [&](const StateDict& s) { group(s).insert("amsgrad", 1); }},
  };
  for (size_t i = 0; i < edits.size(); ++i) {
    const auto& [message, edit] = edits[i];
    INFO(message);
    StateDict state = fixture("adamw");
    if (i == 0) {
      state = StateDict();
      state.insert("param_groups", fixture("adamw").at("param_groups"));
    } else {
      edit(state);
    }
    const auto error = message_of([&] { opt.load_state_dict(state); });
    INFO(error);
    CHECK(has(error, message));
    CHECK(everything(opt) == before);
  }
  opt.load_state_dict(fixture("adamw"));
  CHECK(everything(opt) != before);
}

TEST_CASE("states of other weights, other optimizers, other files", "[api]") {
  const Folder folder;
  fixtures::Model model;
  fixtures::fill(model);
  optim::AdamW opt(model->named_parameters(), optim::AdamWOptions(0.5));
  {
    torch::NoGradGuard no_grad;
    model->weight[0][0] += 1;
  }
  const auto before = everything(opt);
  CHECK(has(message_of([&] { opt.load_state_dict(fixture("adamw")); }),
            "is for other weights: 'weight' differs in 1 of 6 elements"));
  CHECK(has(message_of([&] { opt.load_state_dict(fixture("adamw_packed")); }),
            "is for other weights: 'weight' differs; load the model first"));
  CHECK(everything(opt) == before);
  for (const std::string name : {"adamw", "adamw_packed"}) {
    opt.load_state_dict(fixture(name), LoadMasters::kFromParams);
    check_golden(opt, {"exp_avg", "exp_avg_sq"}, fixtures::kStep);
    CHECK(torch::equal(opt.master_params()[0], model->weight.detach().to(torch::kFloat)));
  }
  optim::SGD sgd(model->named_parameters(), optim::SGDOptions(0.5));
  optim::Adam adam(model->named_parameters());
  const auto state = everything(sgd);
  CHECK(has(message_of([&] { sgd.load_state_dict(fixture("adamw")); }),
            "is of AdamW but this optimizer is SGD"));
  CHECK(has(message_of([&] { sgd.load_state_dict(fixture("torch_adamw")); }),
            "is of AdamW but this optimizer is SGD"));
  CHECK(has(message_of([&] { adam.load_state_dict(fixture("torch_adamw")); }),
            "is of AdamW but this optimizer is Adam"));
  CHECK(has(message_of([&] { adam.load_state_dict(fixture("masters_rmsprop")); }),
            "is of Masters(RMSprop) but this optimizer is Adam"));
  CHECK(has(message_of([&] { torch::load(sgd, kFixtures + "cpp_archive_adamw.pt"); }),
            "is of AdamW but this optimizer is SGD"));
  CHECK(has(message_of([&] { torch::load(sgd, kFixtures + "cpp_archive_scaler.pt"); }),
            "holds no halfstep optimizer"));
  GradScaler scaler;
  CHECK(has(message_of([&] { torch::load(scaler, kFixtures + "cpp_archive_adamw.pt"); }),
            "holds no halfstep GradScaler"));
  write_bytes(folder / "short.pt", read_bytes(kFixtures + "cpp_archive_adamw.pt").substr(0, 2000));
  CHECK(!message_of([&] { torch::load(sgd, folder / "short.pt"); }).empty());
  CHECK(everything(sgd) == state);
}

TEST_CASE("a refused scaler state changes nothing", "[api]") {
  using Edit = std::function<void(StateDict)>;
  const std::vector<std::pair<std::string, Edit>> edits = {
      {"scale inf", [](StateDict s) { s.insert("scale", INFINITY); }},
      {"scale 0", [](StateDict s) { s.insert("scale", 0.0); }},
      {"'growth_interval' is String", [](StateDict s) { s.insert("growth_interval", "often"); }},
      {"growth_factor is 0.5", [](StateDict s) { s.insert("growth_factor", 0.5); }},
      {"_growth_tracker -1", [](StateDict s) { s.insert("_growth_tracker", -1); }},
      {"format 2", [](StateDict s) { StateDict(s.at("halfstep")).insert("format", 2); }},
      {"'state' is ", [](StateDict s) { StateDict(s.at("halfstep")).insert("state", 1.0); }},
      {"policy kind 9",
       [](StateDict s) { StateDict(s.at("halfstep")).at("policy").toList().set(0, 9.0); }},
      {"hysteresis is 0",
       [](StateDict s) { StateDict(s.at("halfstep")).at("policy").toList().set(7, 0.0); }},
  };
  for (const bool used : {false, true}) {
    GradScaler scaler(GradScalerOptions().policy(policies::preset("megatron")));
    if (used) scaler.scale(torch::ones({1}));
    const auto before = everything(scaler);
    for (const auto& [message, edit] : edits) {
      INFO(message);
      const auto state = fixture("scaler");
      edit(state);
      CHECK(has(message_of([&] { scaler.load_state_dict(state); }), message));
      CHECK(everything(scaler) == before);
    }
    CHECK(has(message_of([&] { scaler.load_state_dict(StateDict()); }), "state is empty"));
    CHECK(has(message_of([&] { scaler.load_state_dict(StateDict().insert("scale", 1.0)); }),
              "scaler state has no 'growth_factor' (keys: scale)"));
  }
}

TEST_CASE("a file is whole or absent, and names itself when it is neither", "[api]") {
  const Folder folder;
  const auto path = folder / "run.pt";
  const auto big = torch::arange(200000, torch::kFloat);
  save(StateDict().insert("weights", big), path);
  const auto before = read_bytes(path);
  CHECK(has(message_of([&] { save(StateDict().insert("device", c10::Device("cpu")), path); }),
            "save: a value of type Device at device cannot be written"));
  const auto full = [&](const StateDict& state) {  // as on a full disk
    std::signal(SIGXFSZ, SIG_IGN);
    rlimit limit{};
    getrlimit(RLIMIT_FSIZE, &limit);
    const rlimit small{100000, limit.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    const auto message = message_of([&] { save(state, path); });
    setrlimit(RLIMIT_FSIZE, &limit);
    return message;
  };
  CHECK(has(full(StateDict().insert("weights", big + 1)), "save: cannot write '" + path + "'"));
  CHECK(read_bytes(path) == before);
  CHECK(folder.names() == std::vector<std::string>{"run.pt"});
  CHECK(torch::equal(load(path).at("weights").toTensor(), big));
  CHECK(has(message_of([&] { save(StateDict(), folder / "none/run.pt"); }),
            "none/run.pt': No such file"));
  CHECK(has(message_of([&] { load(folder / "none.pt"); }), "none.pt': No such file"));
  CHECK(has(message_of([&] { load(kFixtures + "cpp_archive_adamw.pt"); }),
            "it is an archive of torch::save; read it with torch::load"));
  REQUIRE(::symlink("run.pt", (folder / "latest.pt").c_str()) == 0);
  REQUIRE(::symlink("new.pt", (folder / "next.pt").c_str()) == 0);
  save(StateDict().insert("step", 1), folder / "latest.pt");  // a link keeps pointing where it does
  save(StateDict().insert("step", 2), folder / "next.pt");
  CHECK(load(path).at("step").toInt() == 1);
  CHECK(load(folder / "new.pt").at("step").toInt() == 2);
  for (const double share : {0.0, 0.3, 0.9, 0.999}) {
    write_bytes(path, before.substr(0, size_t(share * double(before.size()))));
    CHECK(has(message_of([&] { load(path); }), "cannot read '" + path + "' as a checkpoint: "));
    fixtures::Model model;
    CHECK(has(message_of([&] { halfstep::load(*model, path); }), "cannot read '" + path + "'"));
  }
}

TEST_CASE("damaged bytes are refused or read, never followed", "[api]") {
  const Folder folder;
  const auto path = folder / "damaged.pt";
  std::mt19937 random(0);
  int refused = 0;
  for (const std::string name : {"adamw", "model", "cpp_checkpoint"}) {
    const std::string good = read_bytes(kFixtures + name + ".pt");
    for (int i = 0; i < 300; ++i) {
      std::string bad = good;
      for (int k = 0; k < 3; ++k) bad[random() % bad.size()] = char(random());
      write_bytes(path, bad);
      refused += !message_of([&] { load(path); }).empty();
    }
  }
  CHECK(refused > 100);
}
