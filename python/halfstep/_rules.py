"""Lion, Adagrad, LAMB and NovoGrad. Formulas and sources: docs/optimizers.md."""

from ._library import step_op
from .optim import Optimizer


class Lion(Optimizer):
    """Lion (Chen et al. 2023): steps by the sign of a blend of momentum and gradient; decoupled weight decay."""

    _op = staticmethod(step_op("lion_step_"))

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False, **ours):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), weight_decay=weight_decay, maximize=maximize), **ours)

    def _state_names(self, group):
        return ["exp_avg"]

    def _numbers(self, g):
        return {"beta1": g["betas"][0], "beta2": g["betas"][1], "weight_decay": g["weight_decay"], "maximize": g["maximize"]}


class Adagrad(Optimizer):
    """torch.optim.Adagrad's rule on exact masters."""

    _op = staticmethod(step_op("adagrad_step_"))

    def __init__(self, params, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10, foreach=None, *, maximize=False, **ours):
        defaults = dict(lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, initial_accumulator_value=initial_accumulator_value, eps=eps, maximize=maximize)
        super().__init__(params, defaults, foreach=foreach, **ours)

    def _check_options(self, options):
        super()._check_options(options)
        for key in ("lr_decay", "initial_accumulator_value"):
            if not options[key] >= 0:
                raise ValueError(f"{key} is {options[key]}; expected a number >= 0")

    def _state_names(self, group):
        return ["sum"]

    def _initial(self, group):
        return {"sum": group["initial_accumulator_value"]}

    def _numbers(self, g):
        return {key: g[key] for key in ("lr_decay", "eps", "weight_decay", "maximize")}


class Lamb(Optimizer):
    """LAMB (You et al. 2020) as in apex: Adam's direction plus the decay, scaled for each tensor by |weight| / |update|.

    always_adapt: scale also where weight_decay is 0 (apex calls it use_nvlamb).
    """

    _op = staticmethod(step_op("lamb_step_"))
    _norm_pass = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, *, bias_correction=True, grad_averaging=True,
                 always_adapt=False, maximize=False, **ours):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, bias_correction=bias_correction,
                                      grad_averaging=grad_averaging, always_adapt=always_adapt, maximize=maximize), **ours)

    def _state_names(self, group):
        return ["exp_avg", "exp_avg_sq"]

    def _numbers(self, g):
        return {"beta1": g["betas"][0], "beta2": g["betas"][1], **{key: g[key] for key in ("eps", "weight_decay", "bias_correction", "grad_averaging", "always_adapt", "maximize")}}


class NovoGrad(Optimizer):
    """NovoGrad (Ginsburg et al. 2019): one second moment a tensor, of the gradient's norm."""

    _op = staticmethod(step_op("novograd_step_"))
    _tensor_states = ("exp_avg_sq",)
    _norm_pass = True

    def __init__(self, params, lr=1e-3, betas=(0.95, 0.98), eps=1e-8, weight_decay=0.0, *, grad_averaging=False, maximize=False, **ours):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, grad_averaging=grad_averaging, maximize=maximize), **ours)

    def _state_names(self, group):
        return ["exp_avg", "exp_avg_sq"]

    def _numbers(self, g):
        return {"beta1": g["betas"][0], "beta2": g["betas"][1], **{key: g[key] for key in ("eps", "weight_decay", "grad_averaging", "maximize")}}
