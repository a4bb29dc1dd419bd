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

/// What keeps a 16-bit weight exact: beside the weight an int16, an int8 or its rounding error in
/// its own dtype (kKahan); a full copy; or nothing, the weight rounded at random (kStochastic) or
/// to nearest (kNone). kAuto: kSplit16 for float16 and bfloat16 parameters, kNone for the others.
enum class Master { kAuto, kNone, kSplit16, kFp32, kFp64, kSplit8, kKahan, kStochastic };

/// How moments are held; parameters that are updated in FP64 keep FP64 ones.
enum class States { kFp32, kBf16, kInt8 };

/// Weights that an optimizer hands out: the exact ones, or their running means.
enum class Weights { kMaster, kEma };

/// Where load_state_dict takes the masters from: the state, or the weights as they are
/// ("from_params" in Python).
enum class LoadMasters { kSaved, kFromParams };

class GradScaler;
class Recorder;

namespace optim {

using NamedParameters = torch::OrderedDict<std::string, at::Tensor>;

/// What the options of every optimizer have beside torch's.
struct CommonOptions {
  Master master = Master::kAuto;
  States states = States::kFp32;
  /// Global, over all groups: one an optimizer, from the options that it was made with.
  std::optional<double> max_grad_norm;
  /// A running mean of the exact weights: ema += (1 - ema_decay) * (weight - ema).
  std::optional<double> ema_decay;
  /// The step leaves zeroed gradients behind, in the pass that reads them. One an optimizer.
  bool zero_grads = false;
  bool skip_nonfinite = true;
  /// kFloat: gradients of 16-bit parameters are kept, and micro-batches summed, in FP32.
  std::optional<at::ScalarType> grad_dtype;
  /// Of all rounding at random; 0 to 2^32 - 1.
  int64_t seed = 0;
};

/// The setters of CommonOptions, each returning the options themselves.
template <class Derived>
struct StepOptions : torch::optim::OptimizerCloneableOptions<Derived> {
  Master master() const { return common_.master; }
  Derived& master(Master value) { return set(common_.master, value); }
  States states() const { return common_.states; }
  Derived& states(States value) { return set(common_.states, value); }
  std::optional<double> max_grad_norm() const { return common_.max_grad_norm; }
  Derived& max_grad_norm(std::optional<double> v) { return set(common_.max_grad_norm, v); }
  std::optional<double> ema_decay() const { return common_.ema_decay; }
  Derived& ema_decay(std::optional<double> value) { return set(common_.ema_decay, value); }
  bool zero_grads() const { return common_.zero_grads; }
  Derived& zero_grads(bool value) { return set(common_.zero_grads, value); }
  bool skip_nonfinite() const { return common_.skip_nonfinite; }
  Derived& skip_nonfinite(bool value) { return set(common_.skip_nonfinite, value); }
  std::optional<at::ScalarType> grad_dtype() const { return common_.grad_dtype; }
  Derived& grad_dtype(std::optional<at::ScalarType> v) { return set(common_.grad_dtype, v); }
  int64_t seed() const { return common_.seed; }
  Derived& seed(int64_t value) { return set(common_.seed, value); }

  const CommonOptions& common() const { return common_; }
  CommonOptions& common() { return common_; }

 private:
  template <class T>
  Derived& set(T& field, const T& value) {
    field = value;
    return static_cast<Derived&>(*this);
  }
  CommonOptions common_;
};

using Betas = std::tuple<double, double>;

/// Options of AdamW and Adam; torch's names and defaults, then ours.
struct HALFSTEP_API AdamOptions : StepOptions<AdamOptions> {
  explicit AdamOptions(double lr = 1e-3) : lr_(lr) {}
  using betas_t = Betas;
  TORCH_ARG(double, lr) = 1e-3;
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = 1e-8;
  TORCH_ARG(double, weight_decay) = 0;
  TORCH_ARG(bool, amsgrad) = false;
  TORCH_ARG(bool, maximize) = false;
  /// AdamW: decay by weight_decay * lr / max_lr, apart from the size of lr. max_lr is the lr that a
  /// group begins with unless it is given.
  TORCH_ARG(bool, decouple_lr) = false;
  TORCH_ARG(std::optional<double>, max_lr) = std::nullopt;
  /// AdamW: weight_decay * weight is added to the update, as in apex, instead of multiplying the
  /// weight by 1 - lr * weight_decay first, as in torch.
  TORCH_ARG(bool, decay_in_update) = false;

 public:
  double get_lr() const override { return lr_; }
  void set_lr(const double value) override { lr_ = value; }
};

/// AdamW's default weight decay; its setters return AdamOptions, which AdamW takes.
struct HALFSTEP_API AdamWOptions : AdamOptions {
  explicit AdamWOptions(double lr = 1e-3) : AdamOptions(lr) { weight_decay(1e-2); }
};

struct HALFSTEP_API SGDOptions : StepOptions<SGDOptions> {
  explicit SGDOptions(double lr = 1e-3) : lr_(lr) {}
  TORCH_ARG(double, lr) = 1e-3;
  TORCH_ARG(double, momentum) = 0;
  TORCH_ARG(double, dampening) = 0;
  TORCH_ARG(double, weight_decay) = 0;
  TORCH_ARG(bool, nesterov) = false;
  TORCH_ARG(bool, maximize) = false;

 public:
  double get_lr() const override { return lr_; }
  void set_lr(const double value) override { lr_ = value; }
};

struct HALFSTEP_API LionOptions : StepOptions<LionOptions> {
  explicit LionOptions(double lr = 1e-4) : lr_(lr) {}
  TORCH_ARG(double, lr) = 1e-4;
  TORCH_ARG(Betas, betas) = std::make_tuple(0.9, 0.99);
  TORCH_ARG(double, weight_decay) = 0;
  TORCH_ARG(bool, maximize) = false;

 public:
  double get_lr() const override { return lr_; }
  void set_lr(const double value) override { lr_ = value; }
};

struct HALFSTEP_API AdagradOptions : StepOptions<AdagradOptions> {
  explicit AdagradOptions(double lr = 1e-2) : lr_(lr) {}
  TORCH_ARG(double, lr) = 1e-2;
  TORCH_ARG(double, lr_decay) = 0;
  TORCH_ARG(double, weight_decay) = 0;
  TORCH_ARG(double, initial_accumulator_value) = 0;
  TORCH_ARG(double, eps) = 1e-10;
  TORCH_ARG(bool, maximize) = false;

 public:
  double get_lr() const override { return lr_; }
  void set_lr(const double value) override { lr_ = value; }
};

struct HALFSTEP_API LambOptions : StepOptions<LambOptions> {
  explicit LambOptions(double lr = 1e-3) : lr_(lr) {}
  TORCH_ARG(double, lr) = 1e-3;
  TORCH_ARG(Betas, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = 1e-6;
  TORCH_ARG(double, weight_decay) = 0.01;
  TORCH_ARG(bool, bias_correction) = true;
  TORCH_ARG(bool, grad_averaging) = true;
  /// Scales by the norms also where weight_decay is 0 (apex: use_nvlamb).
  TORCH_ARG(bool, always_adapt) = false;
  TORCH_ARG(bool, maximize) = false;

 public:
  double get_lr() const override { return lr_; }
  void set_lr(const double value) override { lr_ = value; }
};

struct HALFSTEP_API NovoGradOptions : StepOptions<NovoGradOptions> {
  explicit NovoGradOptions(double lr = 1e-3) : lr_(lr) {}
  TORCH_ARG(double, lr) = 1e-3;
  TORCH_ARG(Betas, betas) = std::make_tuple(0.95, 0.98);
  TORCH_ARG(double, eps) = 1e-8;
  TORCH_ARG(double, weight_decay) = 0;
  TORCH_ARG(bool, grad_averaging) = false;
  TORCH_ARG(bool, maximize) = false;

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
  /// A copy of one parameter's exact weight; undefined where it is not held here.
  at::Tensor master_param(const at::Tensor& parameter) const;
  /// Copies of the running means, in the same order; the exact weight where a parameter has none.
  std::vector<at::Tensor> ema_params();
  /// Sets weights and masters exactly; values that do not fit are refused before anything is
  /// written.
  void set_master_params(const std::vector<at::Tensor>& values);
  /// Masters follow weights that were edited behind the version counter; returns the elements
  /// changed.
  int64_t refresh_masters();
  /// The parameters, in the order of master_params(); tied parameters once.
  std::vector<at::Tensor> distinct_parameters();
  /// The tensors it holds for its parameters, not copies: masters, moments with their scales,
  /// running means and step counts.
  std::vector<at::Tensor> state_tensors() const;
  /// The statistics of each gradient are taken in a hook as it appears in the backward, instead of
  /// in a pass of the step over all of them; the step is the same, bit for bit. A gradient that was
  /// replaced or edited since is read again. Edits that count no version are not seen: `.data()`,
  /// which torch::nn::utils::clip_grad_norm_ and clip_grad_value_ write through, collectives, other
  /// libraries; leave it off there. A hook that a parameter has goes on running, before ours; one
  /// that is set later replaces ours until the next step, which puts it back behind. Every backward
  /// of an accumulation reads the sum anew: measure first (docs/telemetry.md). Call it while no
  /// backward runs.
  void stats_in_backward(bool enabled = true);
  /// Steps skipped without a scaler, for a non-finite gradient.
  int64_t steps_skipped() const { return steps_skipped_; }

  /// What hs.optim's state_dict() returns in Python: torch's keys in FP32 (FP64), `master` and
  /// `ema`, or, packed, what is held in less as it is held. All tensors are copies.
  StateDict state_dict(bool packed = false);
  /// Takes ours or torch.optim's, from either language: options, moments, masters. Load the model
  /// first. Everything is checked first; a refused load leaves the optimizer as it was.
  void load_state_dict(const StateDict& state, LoadMasters masters = LoadMasters::kSaved);
  /// For torch::save and torch::load: state_dict() as an archive, which only C++ reads.
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

 protected:
  friend class halfstep::GradScaler;
  friend class halfstep::Recorder;
  class BackwardStats;
  using Options = torch::optim::OptimizerOptions;
  using Group = torch::optim::OptimizerParamGroup;
  Optimizer(std::vector<Group> groups, std::vector<std::string> names,
            std::unique_ptr<Options> defaults, const char* kind);

  /// Refuses options of another type, and values out of range; `where` begins the message.
  virtual void check_options(const Options& options, const std::string& where) const = 0;
  /// Options of a new group that follow from others.
  virtual void complete(Options& options) const = 0;
  /// In the order of the op; with the name of the state of one element, if there is one, last.
  virtual std::vector<const char*> state_names(const Options& options) const = 0;
  /// Of state_names, the one of one element a parameter; or null.
  virtual const char* tensor_state() const = 0;
  /// What the state begins at.
  virtual double initial(const Options& options, const std::string& state) const = 0;
  virtual void apply(Room& room, const at::Tensor& control) = 0;
  virtual const CommonOptions& common(const Options& options) const = 0;
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
  void place_hooks();

  std::vector<std::unique_ptr<Room>> rooms_;
  std::vector<std::string> names_;
  const char* kind_;
  at::Tensor control_;
  int64_t steps_skipped_ = 0;
  bool in_backward_ = false;
  std::vector<std::shared_ptr<BackwardStats>> backward_;  ///< by group, where in_backward_
};

/// What an optimizer does by the type of its options (csrc/api/optim_rules.cpp).
template <class O>
class HALFSTEP_API Rule : public Optimizer {
 protected:
  Rule(std::vector<at::Tensor> params, O options, const char* kind);
  Rule(const NamedParameters& params, O options, const char* kind);
  Rule(std::vector<torch::optim::OptimizerParamGroup> groups, O options, const char* kind);

  void check_options(const Options& options, const std::string& where) const override;
  void complete(Options& options) const override;
  std::vector<const char*> state_names(const Options& options) const override;
  const char* tensor_state() const override;
  double initial(const Options& options, const std::string& state) const override;
  void apply(Room& room, const at::Tensor& control) override;
  const CommonOptions& common(const Options& options) const override;
  void write_options(const Options& options, StateDict& out) const override;
  std::unique_ptr<Options> read_options(const Options& options,
                                        const StateDict& saved) const override;
  void assign_options(Options& to, const Options& from) const override;

 private:
  Rule(std::vector<torch::optim::OptimizerParamGroup> groups, std::vector<std::string> names,
       O options, const char* kind);
};
extern template class Rule<AdamOptions>;
extern template class Rule<SGDOptions>;
extern template class Rule<LionOptions>;
extern template class Rule<AdagradOptions>;
extern template class Rule<LambOptions>;
extern template class Rule<NovoGradOptions>;

/// torch.optim.Adam's rule (weight decay added to the gradient) on exact masters.
class HALFSTEP_API Adam : public Rule<AdamOptions> {
 public:
  explicit Adam(std::vector<at::Tensor> params, AdamOptions options = AdamOptions())
      : Rule(std::move(params), options, "Adam") {}
  explicit Adam(const NamedParameters& params, AdamOptions options = AdamOptions())
      : Rule(params, options, "Adam") {}
  explicit Adam(std::vector<torch::optim::OptimizerParamGroup> groups,
                AdamOptions options = AdamOptions())
      : Rule(std::move(groups), options, "Adam") {}
};

/// torch.optim.AdamW's rule (decoupled weight decay) on exact masters.
class HALFSTEP_API AdamW : public Rule<AdamOptions> {
 public:
  explicit AdamW(std::vector<at::Tensor> params, AdamOptions options = AdamWOptions())
      : Rule(std::move(params), options, "AdamW") {}
  explicit AdamW(const NamedParameters& params, AdamOptions options = AdamWOptions())
      : Rule(params, options, "AdamW") {}
  explicit AdamW(std::vector<torch::optim::OptimizerParamGroup> groups,
                 AdamOptions options = AdamWOptions())
      : Rule(std::move(groups), options, "AdamW") {}
};

/// torch.optim.SGD's rule (momentum, dampening, nesterov, weight decay) on exact masters.
class HALFSTEP_API SGD : public Rule<SGDOptions> {
 public:
  explicit SGD(std::vector<at::Tensor> params, SGDOptions options = SGDOptions())
      : Rule(std::move(params), options, "SGD") {}
  explicit SGD(const NamedParameters& params, SGDOptions options = SGDOptions())
      : Rule(params, options, "SGD") {}
  explicit SGD(std::vector<torch::optim::OptimizerParamGroup> groups,
               SGDOptions options = SGDOptions())
      : Rule(std::move(groups), options, "SGD") {}
};

/// Lion (Chen et al. 2023): steps by the sign of a blend of momentum and gradient.
class HALFSTEP_API Lion : public Rule<LionOptions> {
 public:
  explicit Lion(std::vector<at::Tensor> params, LionOptions options = LionOptions())
      : Rule(std::move(params), options, "Lion") {}
  explicit Lion(const NamedParameters& params, LionOptions options = LionOptions())
      : Rule(params, options, "Lion") {}
  explicit Lion(std::vector<torch::optim::OptimizerParamGroup> groups,
                LionOptions options = LionOptions())
      : Rule(std::move(groups), options, "Lion") {}
};

/// torch.optim.Adagrad's rule on exact masters.
class HALFSTEP_API Adagrad : public Rule<AdagradOptions> {
 public:
  explicit Adagrad(std::vector<at::Tensor> params, AdagradOptions options = AdagradOptions())
      : Rule(std::move(params), options, "Adagrad") {}
  explicit Adagrad(const NamedParameters& params, AdagradOptions options = AdagradOptions())
      : Rule(params, options, "Adagrad") {}
  explicit Adagrad(std::vector<torch::optim::OptimizerParamGroup> groups,
                   AdagradOptions options = AdagradOptions())
      : Rule(std::move(groups), options, "Adagrad") {}
};

/// LAMB (You et al. 2020) as in apex: Adam's direction, scaled for each tensor by its norms.
class HALFSTEP_API Lamb : public Rule<LambOptions> {
 public:
  explicit Lamb(std::vector<at::Tensor> params, LambOptions options = LambOptions())
      : Rule(std::move(params), options, "Lamb") {}
  explicit Lamb(const NamedParameters& params, LambOptions options = LambOptions())
      : Rule(params, options, "Lamb") {}
  explicit Lamb(std::vector<torch::optim::OptimizerParamGroup> groups,
                LambOptions options = LambOptions())
      : Rule(std::move(groups), options, "Lamb") {}
};

/// NovoGrad (Ginsburg et al. 2019): one second moment a tensor, of the gradient's norm.
class HALFSTEP_API NovoGrad : public Rule<NovoGradOptions> {
 public:
  explicit NovoGrad(std::vector<at::Tensor> params, NovoGradOptions options = NovoGradOptions())
      : Rule(std::move(params), options, "NovoGrad") {}
  explicit NovoGrad(const NamedParameters& params, NovoGradOptions options = NovoGradOptions())
      : Rule(params, options, "NovoGrad") {}
  explicit NovoGrad(std::vector<torch::optim::OptimizerParamGroup> groups,
                    NovoGradOptions options = NovoGradOptions())
      : Rule(std::move(groups), options, "NovoGrad") {}
};

}  // namespace optim
}  // namespace halfstep
