#pragma once

#include <string>
#include <vector>

#include "optim.h"

namespace torch::nn {
class Module;
}

namespace halfstep {

class HALFSTEP_API CastOptions {
 public:
  /// Globs over parameter names ("layer1.norm.weight") that stay FP32, in place of the default: all
  /// norms.
  CastOptions& keep_fp32(std::vector<std::string> globs);

 private:
  friend struct CastAccess;
  std::vector<std::string> globs_;
  bool keep_norms_ = true;
};

struct CastReport {
  std::vector<std::string> cast, kept;
};

/// Casts the floating parameters of `model` to float16 or bfloat16 in place. The FP32 values are
/// kept until the first optimizer takes them, so masters begin exactly there. |w| >= 65520 is
/// refused by name before anything is changed. Run the model inside AutocastGuard.
HALFSTEP_API CastReport cast_model(torch::nn::Module& model, c10::ScalarType dtype = c10::kHalf,
                                   const CastOptions& options = {});

/// While it lives, the model holds its exact weights, or their running means, in `dtype` and is in
/// evaluation mode; after it the weights are what they were, bit for bit.
class HALFSTEP_NODISCARD_API EvaluateIn {
 public:
  EvaluateIn(torch::nn::Module& model, optim::Optimizer& optimizer,
             c10::ScalarType dtype = c10::kFloat, Weights weights = Weights::kMaster);
  ~EvaluateIn();
  EvaluateIn(const EvaluateIn&) = delete;
  EvaluateIn& operator=(const EvaluateIn&) = delete;

 private:
  torch::nn::Module& model_;
  bool training_;
  std::vector<std::pair<at::Tensor, at::Tensor>> saved_;
};

/// Parameters and buffers by name, floating ones exact in `dtype`.
HALFSTEP_API torch::OrderedDict<std::string, at::Tensor> export_state_dict(
    torch::nn::Module& model, optim::Optimizer& optimizer, c10::ScalarType dtype = c10::kFloat,
    Weights weights = Weights::kMaster);

}  // namespace halfstep
