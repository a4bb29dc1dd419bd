#pragma once

// What the tests of checkpoints share: the golden files, and everything that a load could touch.

#include <sstream>

#include "api.h"
#include "fixtures.h"

inline const std::string kFixtures = HALFSTEP_FIXTURES;

inline std::string bytes_of(const at::Tensor& tensor) {
  const auto flat = tensor.detach().contiguous();
  return {static_cast<const char*>(flat.const_data_ptr()), flat.nbytes()};
}

/// Every byte that an optimizer holds, its weights and its options.
inline std::string everything(halfstep::optim::Optimizer& opt) {
  std::ostringstream text;
  text << opt.state_dict(/*packed=*/true).at("param_groups");
  std::string all = text.str();
  for (const bool packed : {false, true}) {
    const auto entries = opt.state_dict(packed).at("state").toGenericDict();
    for (const auto& item : entries) {
      const halfstep::StateDict entry = item.value();
      for (const auto& key : entry.keys())
        all += entry.at(key).isTensor() ? key + bytes_of(entry.at(key).toTensor()) : key;
    }
  }
  for (const auto& param : opt.distinct_parameters()) all += bytes_of(param);
  return all;
}

inline std::string everything(const halfstep::GradScaler& scaler) {
  std::ostringstream text;
  text << c10::IValue(scaler.state_dict()) << scaler.stats().step << scaler.stats().scale
       << scaler.stats().steps_applied << scaler.get_scale();
  return text.str();
}

inline halfstep::StateDict fixture(const std::string& name) {
  return halfstep::load(kFixtures + name + ".pt");
}

inline halfstep::StateDict entry_of(const halfstep::StateDict& state, int64_t i) {
  return state.at("state").toGenericDict().at(i);
}

/// The optimizer is where the golden files were written.
inline void check_golden(halfstep::optim::Optimizer& opt, const std::vector<std::string>& keys,
                         double step) {
  const auto state = opt.state_dict();
  const auto values = fixtures::exact_weights();
  for (int64_t i = 0; i < 3; ++i) {
    const halfstep::StateDict entry = entry_of(state, i);
    CHECK(entry.at("step").toTensor().item<double>() == step);
    for (const auto& key : keys) {
      const double unit = key == "exp_avg"      ? fixtures::kMoment
                          : key == "exp_avg_sq" ? fixtures::kSquare
                                                : fixtures::kBuffer;
      CHECK(torch::equal(entry.at(key).toTensor(),
                         fixtures::counted(values[size_t(i)].sizes(), unit)));
    }
  }
  CHECK(opt.param_groups()[0].options().get_lr() == 2e-3);
}

inline void check_masters(halfstep::optim::Optimizer& opt, const std::vector<at::Tensor>& values) {
  const auto masters = opt.master_params();
  REQUIRE(masters.size() == values.size());
  for (size_t i = 0; i < values.size(); ++i) CHECK(torch::equal(masters[i], values[i]));
}
