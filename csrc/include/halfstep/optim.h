#pragma once

#include <c10/util/Exception.h>
#include <torch/arg.h>
#include <torch/optim/optimizer.h>
#include <torch/ordered_dict.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "export.h"
#include "state_dict.h"

namespace halfstep {

/// What keeps a weight exact: an int16 beside a 16-bit weight, a full copy, or nothing.
/// kAuto: kSplit16 for float16 and bfloat16 parameters, kNone for float32 and float64.
enum class Master { kAuto, kNone, kSplit16, kFp32, kFp64 };

/// Where load_state_dict takes the masters from: the state, or the weights as they are
/// ("from_params" in Python).
enum class LoadMasters { kSaved, kFromParams };

class GradScaler;

namespace optim {

using NamedParameters = torch::OrderedDict<std::string, at::Tensor>;

/// Options of AdamW and Adam; torch's names and defaults, then ours.
struct HALFSTEP_API AdamOptions : torch::optim::OptimizerCloneableOptions<AdamOptions> {
  explicit AdamOptions(double lr = 1e-3) : lr_(lr) {}
  using betas_t = std::tuple<double, double>;
  TORCH_ARG(double, lr) = 1e-3;
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = 1e-8;
  TORCH_ARG(double, weight_decay) = 0;
  TORCH_ARG(bool, amsgrad) = false;
  TORCH_ARG(bool, maximize) = false;
  TORCH_ARG(Master, master) = Master::kAuto;
  /// Global, over all groups: one an optimizer, from the options that it was made with.
  TORCH_ARG(std::optional<double>, max_grad_norm) = std::nullopt;
  TORCH_ARG(bool, skip_nonfinite) = true;
  /// kFloat: gradients of 16-bit parameters are kept, and micro-batches summed, in FP32.
  TORCH_ARG(std::optional<at::ScalarType>, grad_dtype) = std::nullopt;

 public:
  double get_lr() const override { return lr_; }
  void set_lr(const double value) override { lr_ = value; }
};

/// AdamW's default weight decay; its setters return AdamOptions, which AdamW takes.
struct HALFSTEP_API AdamWOptions : AdamOptions {
  explicit AdamWOptions(double lr = 1e-3) : AdamOptions(lr) { weight_decay(1e-2); }
};

struct HALFSTEP_API SGDOptions : torch::optim::OptimizerCloneableOptions<SGDOptions> {
  explicit SGDOptions(double lr = 1e-3) : lr_(lr) {}
  TORCH_ARG(double, lr) = 1e-3;
  TORCH_ARG(double, momentum) = 0;
  TORCH_ARG(double, dampening) = 0;
  TORCH_ARG(double, weight_decay) = 0;
  TORCH_ARG(bool, nesterov) = false;
  TORCH_ARG(bool, maximize) = false;
  TORCH_ARG(Master, master) = Master::kAuto;
  TORCH_ARG(std::optional<double>, max_grad_norm) = std::nullopt;
  TORCH_ARG(bool, skip_nonfinite) = true;
  /// kFloat: gradients of 16-bit parameters are kept, and micro-batches summed, in FP32.
  TORCH_ARG(std::optional<at::ScalarType>, grad_dtype) = std::nullopt;

 public:
  double get_lr() const override { return lr_; }
  void set_lr(const double value) override { lr_ = value; }
};

/// Master-weight optimizers: the update is one op a parameter group; masters, states, step counts
/// and the learning rate live on the parameters' device. A skipped step changes nothing.
class HALFSTEP_API Optimizer : public torch::optim::Optimizer {
 public:
  struct Room;  ///< the tensors of one parameter group
  ~Optimizer() override;

  /// One update from the gradients as they are. Returns the closure's loss, if any.
  at::Tensor step(LossClosure closure = nullptr) override;
  /// torch's, with the refusals of the constructor. Masters and states are made at the next step.
  void add_param_group(const torch::optim::OptimizerParamGroup& group);

  /// Copies of the exact weights, float32 (float64 where the weight or its master is).
  std::vector<at::Tensor> master_params();
  /// Sets weights and masters exactly; values that do not fit are refused before anything is
  /// written.
  void set_master_params(const std::vector<at::Tensor>& values);
  /// Masters follow weights that were edited behind the version counter; returns the elements
  /// changed.
  int64_t refresh_masters();
  /// The parameters, in the order of master_params(); tied parameters once.
  std::vector<at::Tensor> distinct_parameters();
  /// The tensors it holds for its parameters, not copies: masters, moments and step counts.
  std::vector<at::Tensor> state_tensors() const;
  /// Steps skipped without a scaler, for a non-finite gradient.
  int64_t steps_skipped() const { return steps_skipped_; }

  /// What hs.optim's state_dict() returns in Python: torch's keys in FP32 (FP64) and `master`, or,
  /// packed, the int16 remainder as it is held. All tensors are copies.
  StateDict state_dict(bool packed = false);
  /// Takes ours or torch.optim's, from either language: options, moments, masters. Load the model
  /// first. Everything is checked first; a refused load leaves the optimizer as it was.
  void load_state_dict(const StateDict& state, LoadMasters masters = LoadMasters::kSaved);
  /// For torch::save and torch::load: state_dict() as an archive, which only C++ reads.
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 protected:
  friend class halfstep::GradScaler;
  using Options = torch::optim::OptimizerOptions;
  using Group = torch::optim::OptimizerParamGroup;
  Optimizer(std::vector<Group> groups, std::vector<std::string> names,
            std::unique_ptr<Options> defaults, const char* kind);

  /// Refuses options of another type, and values out of range; `where` begins the message.
  virtual void check_options(const Options& options, const std::string& where) const = 0;
  virtual std::vector<const char*> state_names(const Options& options) const = 0;
  virtual void apply(Room& room, const at::Tensor& control) = 0;
  /// What every options type has.
  struct Common {
    Master master;
    std::optional<double> max_grad_norm;
    bool skip_nonfinite;
    std::optional<at::ScalarType> grad_dtype;
  };
  virtual Common common(const Options& options) const = 0;
  /// torch's names of the hyperparameters, with their values.
  virtual void write_options(const Options& options, StateDict& out) const = 0;
  /// `options` with the hyperparameters of `saved`.
  virtual std::unique_ptr<Options> read_options(const Options& options,
                                                const StateDict& saved) const = 0;
  /// In place, so that references to a group's options stay good.
  virtual void assign_options(Options& to, const Options& from) const = 0;

  void make_rooms();
  void extend(Room& room);
  void check_loaded_storages() const;
  std::vector<std::pair<Room*, at::Tensor>> gather_stats();
  void step_with(const at::Tensor& scale, const at::Tensor& found_inf, const at::Tensor& clip,
                 const std::vector<std::pair<Room*, at::Tensor>>& stats, bool judged);
  void follow_edits();

  std::vector<std::unique_ptr<Room>> rooms_;
  std::vector<std::string> names_;
  const char* kind_;
  at::Tensor control_;
  int64_t steps_skipped_ = 0;
};

/// torch.optim.Adam's rule (weight decay added to the gradient) on exact masters.
class HALFSTEP_API Adam : public Optimizer {
 public:
  explicit Adam(std::vector<at::Tensor> params, AdamOptions options = AdamOptions());
  explicit Adam(const NamedParameters& params, AdamOptions options = AdamOptions());
  explicit Adam(std::vector<torch::optim::OptimizerParamGroup> groups,
                AdamOptions options = AdamOptions());

 protected:
  Adam(std::vector<torch::optim::OptimizerParamGroup> groups, std::vector<std::string> names,
       std::unique_ptr<AdamOptions> defaults, bool decoupled);
  void check_options(const Options& options, const std::string& where) const override;
  std::vector<const char*> state_names(const Options&) const override;
  void apply(Room& room, const at::Tensor& control) override;
  Common common(const Options& options) const override;
  void write_options(const Options& options, StateDict& out) const override;
  std::unique_ptr<Options> read_options(const Options& options,
                                        const StateDict& saved) const override;
  void assign_options(Options& to, const Options& from) const override;

 private:
  bool decoupled_ = false;
};

/// torch.optim.AdamW's rule (decoupled weight decay) on exact masters.
class HALFSTEP_API AdamW : public Adam {
 public:
  explicit AdamW(std::vector<at::Tensor> params, AdamOptions options = AdamWOptions());
  explicit AdamW(const NamedParameters& params, AdamOptions options = AdamWOptions());
  explicit AdamW(std::vector<torch::optim::OptimizerParamGroup> groups,
                 AdamOptions options = AdamWOptions());
};

/// torch.optim.SGD's rule (momentum, dampening, nesterov, weight decay) on exact masters.
class HALFSTEP_API SGD : public Optimizer {
 public:
  explicit SGD(std::vector<at::Tensor> params, SGDOptions options = SGDOptions());
  explicit SGD(const NamedParameters& params, SGDOptions options = SGDOptions());
  explicit SGD(std::vector<torch::optim::OptimizerParamGroup> groups,
               SGDOptions options = SGDOptions());

 protected:
  void check_options(const Options& options, const std::string& where) const override;
  std::vector<const char*> state_names(const Options&) const override;
  void apply(Room& room, const at::Tensor& control) override;
  Common common(const Options& options) const override;
  void write_options(const Options& options, StateDict& out) const override;
  std::unique_ptr<Options> read_options(const Options& options,
                                        const StateDict& saved) const override;
  void assign_options(Options& to, const Options& from) const override;
};

}  // namespace optim
}  // namespace halfstep
