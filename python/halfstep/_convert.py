"""From our optimizers to torch.optim's of the same name, and back, over the same parameters."""

import inspect

import torch

from . import checkpoint, optim
from ._room import SIXTEEN, dtype_name, warn


def _group_options(groups, known):
    """The groups with what both sides know of their options, and the parameters themselves."""
    kept = lambda group: {k: v for k, v in group.items() if k in known or k == "params"}
    named = lambda group: {**kept(group), "params": list(zip(group["param_names"], group["params"])) if "param_names" in group else list(group["params"])}
    return [named(group) for group in groups]


def _options_of(cls):
    return set(inspect.signature(cls).parameters) - {"params", "foreach", "fused", "capturable", "differentiable"}


def to_torch(optimizer, **options):
    """torch.optim's class of the same name over the same parameters, with hyperparameters, moments and step counts.

    Its weights are the parameters as they are: masters and running means stay behind. torch keeps the moments of a 16-bit
    parameter in the parameter's dtype, which is warned of by name; export FP32 weights first to keep them.
    """
    if not isinstance(optimizer, optim.Optimizer):
        raise TypeError(f"to_torch: {type(optimizer).__name__} is not a halfstep optimizer")
    state = checkpoint.torch_state(optimizer)
    cls = getattr(torch.optim, type(optimizer).__name__)
    sixteen = [name for room in optimizer._rooms for param, name in zip(room.params, room.names) if param.dtype in SIXTEEN]
    if sixteen and state["state"]:
        more = f" and {len(sixteen) - 3} more" if len(sixteen) > 3 else ""
        dtype = next(dtype_name(p.dtype) for room in optimizer._rooms for p in room.params if p.dtype in SIXTEEN)
        warn(f"to_torch: torch.optim keeps the moments of {', '.join(map(repr, sixteen[:3]))}{more} in {dtype}")
    made = cls(_group_options(optimizer.param_groups, _options_of(cls)), **options)
    state["param_groups"] = [{**there, **saved, **{k: options[k] for k in options}} for there, saved in zip(made.state_dict()["param_groups"], state["param_groups"])]
    made.load_state_dict(state)
    return made


def from_torch(optimizer, **options):
    """Our class of the same name over the same parameters, with hyperparameters, moments and step counts; `options` are ours (master, states, …)."""
    name = type(optimizer).__name__
    cls = getattr(optim, name, None)
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, optim.Optimizer) or cls is None or type(optimizer) is not getattr(torch.optim, name, None):
        raise TypeError(f"from_torch: {type(optimizer).__module__}.{name} has no counterpart here; hs.optim.Masters steps any optimizer on masters")
    made = cls(_group_options(optimizer.param_groups, _options_of(cls)), **options)
    made.load_state_dict(optimizer.state_dict(), masters="from_params")
    return made
