#pragma once

// The golden files of tests/fixtures: one small model in a known state. Every value follows from
// its place, so that readers in either language know it (tests/fixtures/make.py has the same).

#include <halfstep/halfstep.h>
#include <torch/torch.h>

#include <string>

namespace fixtures {

/// Element k is (k + 1) * unit, rounded once.
inline at::Tensor counted(at::IntArrayRef sizes, double unit, at::ScalarType type = at::kFloat) {
  const auto numel = c10::multiply_integers(sizes);
  return (torch::arange(1, numel + 1, torch::kDouble) * unit).to(type).reshape(sizes);
}

/// An FP16 weight and bias, and an FP32 gain.
struct ModelImpl : torch::nn::Module {
  explicit ModelImpl(at::ScalarType type = at::kHalf) {
    weight = register_parameter("weight", torch::zeros({2, 3}, type));
    bias = register_parameter("bias", torch::zeros({3}, type));
    gain = register_parameter("gain", torch::zeros({3}));
    count = register_buffer("count", torch::zeros({}, torch::kLong));
  }
  at::Tensor weight, bias, gain, count;
};
TORCH_MODULE(Model);

inline std::vector<at::Tensor> exact_weights() {
  return {counted({2, 3}, 0.1), counted({3}, 0.01), counted({3}, 1.0)};
}

inline void fill(Model& model) {
  torch::NoGradGuard no_grad;
  const auto values = exact_weights();
  model->weight.copy_(values[0]);
  model->bias.copy_(values[1]);
  model->gain.copy_(values[2]);
  model->count.fill_(5);
}

constexpr double kStep = 7, kMoment = 1e-3, kSquare = 1e-6, kBuffer = 1e-2;

/// The optimizer's state in the golden files.
inline halfstep::StateDict with_state(halfstep::optim::Optimizer& opt) {
  const auto values = exact_weights();
  opt.set_master_params(values);
  const halfstep::StateDict state = opt.state_dict();
  const auto entries = state.at("state").toGenericDict();
  for (int64_t i = 0; i < 3; ++i) {
    halfstep::StateDict entry = entries.at(i);
    entry.at("step").toTensor().fill_(kStep);
    for (const auto& [key, unit] : {std::pair<const char*, double>{"exp_avg", kMoment},
                                    {"exp_avg_sq", kSquare},
                                    {"momentum_buffer", kBuffer}})
      if (entry.contains(key)) entry.insert(key, counted(values[size_t(i)].sizes(), unit));
  }
  opt.load_state_dict(state);
  return opt.state_dict();
}

/// The scaler's state in the golden files: 1024, growing every 10, 3 clean steps since a skip.
inline halfstep::StateDict scaler_state(const halfstep::GradScaler& scaler) {
  halfstep::StateDict state = scaler.state_dict();
  state.insert("scale", 1024.0).insert("growth_interval", int64_t(10));
  state.insert("_growth_tracker", int64_t(3));
  c10::impl::GenericList numbers(c10::AnyType::get());
  for (const double number : {1024., 3., 1., 3., 6., 1., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0.})
    numbers.push_back(number);
  halfstep::StateDict own = state.at("halfstep");
  own.insert("state", numbers).insert("updates", int64_t(7));
  return state;
}

/// AdamW with narrow masters and states as in adamw_int8_packed.pt: element k of a code is k + 1,
/// under scales of 2^-10.
inline halfstep::StateDict with_codes(halfstep::optim::AdamW& opt) {
  const halfstep::StateDict state = opt.state_dict(/*packed=*/true);
  const auto entries = state.at("state").toGenericDict();
  for (const auto& item : entries) {
    halfstep::StateDict entry = item.value();
    entry.at("step").toTensor().fill_(kStep);
    for (const auto& key : {"exp_avg", "exp_avg_sq", "remainder"}) {
      if (!entry.contains(key)) continue;
      const at::Tensor held = entry.at(key).toTensor();
      entry.insert(key, counted(held.sizes(), 1, held.scalar_type()));
    }
    for (const auto& key : {"exp_avg_scale", "exp_avg_sq_scale"})
      entry.at(key).toTensor().fill_(-10);
    entry.insert("ema", counted(entry.at("ema").toTensor().sizes(), 1e-2));
  }
  opt.load_state_dict(state);
  return opt.state_dict(/*packed=*/true);
}

/// What C++ writes: files of halfstep::save, and archives of torch::save.
inline void write_all(const std::string& folder) {
  Model model;
  fill(model);
  halfstep::optim::AdamW adamw(model->named_parameters(), halfstep::optim::AdamWOptions(2e-3));
  halfstep::GradScaler scaler;
  scaler.load_state_dict(scaler_state(scaler));
  halfstep::StateDict checkpoint;
  checkpoint.insert("optimizer", with_state(adamw));
  checkpoint.insert("model", halfstep::state_dict(*model));
  checkpoint.insert("scaler", scaler.state_dict());
  halfstep::save(checkpoint, folder + "cpp_checkpoint.pt");
  halfstep::save(adamw.state_dict(/*packed=*/true), folder + "cpp_adamw_packed.pt");
  Model narrow;
  fill(narrow);
  halfstep::optim::AdamW coded(narrow->named_parameters(), halfstep::optim::AdamWOptions(2e-3)
                                                               .master(halfstep::Master::kSplit8)
                                                               .states(halfstep::States::kInt8)
                                                               .ema_decay(0.9));
  halfstep::save(with_codes(coded), folder + "cpp_adamw_int8_packed.pt");
  torch::save(model, folder + "cpp_archive_model.pt");
  torch::save(adamw, folder + "cpp_archive_adamw.pt");
  torch::save(scaler, folder + "cpp_archive_scaler.pt");
}

}  // namespace fixtures
