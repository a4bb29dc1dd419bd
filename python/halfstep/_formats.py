"""The state dicts of other projects' loss scalers: to and from ours. Keys: docs/policies.md."""

from dataclasses import replace

import torch

from . import policies
from ._library import H

SCALE, TRACKER, HYSTERESIS, CLEAN, LAST_BAD, GROWN = 0, 1, 2, 3, 7, 12
# What makes a rule another one: a state fits only a policy that has these as the project has them.
_SHAPE = ("refill", "tolerance", "window_follows_scale", "growth_delay", "repeat_delay", "recover_interval", "floor")
_FREE = {"modulus": ("recover_interval",), "fairseq": ("tolerance", "floor")}  # numbers of the user's there
_PRESET = {"torch": "torch", "modulus": "modulus", "apex": "apex", "megatron": "megatron", "deepspeed": "deepspeed", "paddle": "paddle", "colossalai": "colossalai", "fairseq": "fairseq"}
#: name: the keys that tell it
FORMATS = {
    "modulus": ("scale", "_growth_tracker", "max_scale", "recover_threshold", "recover_growth_interval"),
    "torch": ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"),
    "apex": ("loss_scaler0",),
    "megatron": ("scale", "growth_tracker", "hysteresis_tracker"),
    "deepspeed": ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window"),
    "paddle": ("scale", "incr_ratio", "decr_ratio", "incr_every_n_steps", "decr_every_n_nan_or_inf", "incr_count", "decr_count", "use_dynamic_loss_scaling"),
    "colossalai": ("scale", "growth_factor", "backoff_factor", "hysteresis"),
    "fairseq": ("loss_scale",),
}


def detect_format(state_dict):
    """The format of a scaler's state dict, or None."""
    return next((name for name, keys in FORMATS.items() if all(key in state_dict for key in keys)), None)


def _fits(policy, name, call):
    """Refuses a policy whose rule is not of the format's kind."""
    project = policies.preset(_PRESET[name])
    if not isinstance(policy, policies.Dynamic):
        raise ValueError(f"{call}: the policy is {type(policy).__name__}, but the state of {name} is of a Dynamic one: policies.preset({_PRESET[name]!r})")
    for field in (f for f in _SHAPE if f not in _FREE.get(name, ())):
        mine, theirs = getattr(policy, field), getattr(project, field)
        if field == "refill" and policy.hysteresis == 1 and name != "paddle":
            continue  # nothing to refill
        if mine != theirs:
            raise ValueError(f"{call}: the policy has {field} {mine!r} but {name}'s is {theirs!r}: policies.preset({_PRESET[name]!r})")
    if name not in ("megatron", "colossalai", "paddle") and policy.hysteresis != project.hysteresis:
        raise ValueError(f"{call}: the policy has hysteresis {policy.hysteresis}, which {name}'s state cannot hold")
    if name in ("apex", "deepspeed", "fairseq") and policy.backoff_factor * policy.growth_factor != 1:
        raise ValueError(f"{call}: the policy has growth_factor {policy.growth_factor} and backoff_factor {policy.backoff_factor}, but {name} has one factor and its inverse")


def _number(state_dict, key, name, least=0.0):
    value = state_dict[key]
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)) and not hasattr(value, "item"):
        raise ValueError(f"the {name} state's '{key}' is {value!r}; expected a number")
    value = float(value.item() if hasattr(value, "item") else value)
    if not least <= value < float("inf"):
        raise ValueError(f"the {name} state's '{key}' is {value}; expected a finite number of at least {least:g}")
    return value


# -- export ----------------------------------------------------------------------------------------
def _torch(p, n):
    return {"scale": n[SCALE], "growth_factor": p.growth_factor, "backoff_factor": p.backoff_factor, "growth_interval": p.growth_interval, "_growth_tracker": int(n[TRACKER])}


def _modulus(p, n):
    return {**_torch(p, n), "max_scale": p.max_scale, "recover_threshold": p.recover_below, "recover_growth_interval": p.recover_interval}


def _apex(p, n):
    return {"loss_scaler0": {"loss_scale": n[SCALE], "unskipped": int(n[TRACKER])}}


def _megatron(p, n):
    return {"scale": torch.tensor([n[SCALE]], dtype=torch.float32), "growth_tracker": int(n[TRACKER]), "hysteresis_tracker": int(n[HYSTERESIS])}


def _deepspeed(p, n):
    since = int(n[TRACKER]) + (p.growth_interval + p.growth_delay if n[GROWN] else 0)  # clean steps since the last bad one, but for whole intervals
    return {"dynamic_loss_scale": True, "cur_scale": n[SCALE], "cur_iter": since, "last_overflow_iter": -1, "scale_factor": p.growth_factor, "scale_window": p.growth_interval}


def _paddle(p, n):
    return {"scale": torch.tensor([n[SCALE]], dtype=torch.float32), "incr_ratio": p.growth_factor, "decr_ratio": p.backoff_factor, "incr_every_n_steps": p.growth_interval,
            "decr_every_n_nan_or_inf": p.hysteresis, "incr_count": int(n[TRACKER]), "decr_count": p.hysteresis - int(n[HYSTERESIS]), "use_dynamic_loss_scaling": True}


def _colossalai(p, n):
    return {"scale": torch.tensor([n[SCALE]], dtype=torch.float32), "growth_factor": p.growth_factor, "backoff_factor": p.backoff_factor, "hysteresis": p.hysteresis}


def _fairseq(p, n):
    return {"loss_scale": n[SCALE]}


_WRITE = {"torch": _torch, "modulus": _modulus, "apex": _apex, "megatron": _megatron, "deepspeed": _deepspeed, "paddle": _paddle, "colossalai": _colossalai, "fairseq": _fairseq}


def export_state(policy, numbers, format):
    """The state of a scaler as another project's. What that cannot hold is refused by name; ColossalAI's and fairseq's hold no counters."""
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(sorted(FORMATS))}")
    _fits(policy, format, f"state_dict(format={format!r})")
    return _WRITE[format](policy, numbers)


def export_losses(states, format):
    """The states of a scaler of several losses as one of another project's: apex alone has such."""
    if len(states) > 1 and format != "apex":
        raise ValueError(f"state_dict(format={format!r}): this GradScaler has losses={len(states)}, but the state of {format} holds one scale")
    return states[0] if len(states) == 1 else {f"loss_scaler{which}": state["loss_scaler0"] for which, state in enumerate(states)}


# -- import ----------------------------------------------------------------------------------------
def _read(state, policy, name):
    """(policy with the numbers that the file holds, {entry of the state: value})."""
    number = lambda key, least=0.0: _number(state, key, name, least)
    if name == "modulus":
        policy = replace(policy, growth_factor=number("growth_factor"), backoff_factor=number("backoff_factor"), growth_interval=int(number("growth_interval")),
                         max_scale=number("max_scale"), recover_below=number("recover_threshold"), recover_interval=int(number("recover_growth_interval")))
        return policy, {SCALE: number("scale"), TRACKER: number("_growth_tracker")}
    if name == "apex":
        others = [key for key in state if key != "loss_scaler0"]
        if others:
            raise ValueError(f"the apex state has '{others[0]}' beside 'loss_scaler0', but this GradScaler has one scale")
        state = state["loss_scaler0"]
        return policy, {SCALE: number("loss_scale"), TRACKER: number("unskipped")}
    if name == "megatron":
        return policy, {SCALE: number("scale"), TRACKER: number("growth_tracker"), HYSTERESIS: number("hysteresis_tracker", -float("inf"))}
    if name == "deepspeed":
        factor, window = number("scale_factor"), int(number("scale_window", 1))
        policy = replace(policy, growth_factor=factor, backoff_factor=1 / factor, growth_interval=window)
        since = int(number("cur_iter") - number("last_overflow_iter", -1.0)) - 1
        grown = since > window
        return policy, {SCALE: number("cur_scale"), TRACKER: (since - 1) % window if grown else since, CLEAN: since, GROWN: float(grown)}
    if name == "paddle":
        if not state["use_dynamic_loss_scaling"]:
            raise ValueError("the paddle state's 'use_dynamic_loss_scaling' is False: use GradScaler(policy=policies.Static(scale))")
        bad = int(number("decr_every_n_nan_or_inf", 1))
        policy = replace(policy, growth_factor=number("incr_ratio"), backoff_factor=number("decr_ratio"), growth_interval=int(number("incr_every_n_steps", 1)), hysteresis=bad)
        return policy, {SCALE: number("scale"), TRACKER: number("incr_count"), HYSTERESIS: bad - number("decr_count")}
    if name == "colossalai":
        policy = replace(policy, growth_factor=number("growth_factor"), backoff_factor=number("backoff_factor"), hysteresis=int(number("hysteresis", 1)))
        return policy, {SCALE: number("scale")}
    return policy, {SCALE: number("loss_scale")}


def import_state(state_dict, policy, format=None):
    """Our state dict of another project's, for a scaler with `policy`. Ours and torch's pass through; an unknown one is left to be refused by its keys."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(sorted(FORMATS))}")
    name = detect_format(state_dict) if format is None else format
    if name is not None:
        missing = [key for key in FORMATS[name] if key not in state_dict]
        if missing:
            raise ValueError(f"the {name} state has no '{missing[0]}' (keys: {', '.join(map(str, state_dict))})")
    if name in (None, "torch") or "halfstep" in state_dict:
        return state_dict
    _fits(policy, name, f"load_state_dict({name})")
    policy, entries = _read(state_dict, policy, name)
    numbers = H.init_scale_state(policy.vector()).tolist()
    for index, value in entries.items():
        numbers[index] = value
    return {**_torch(policy, numbers), "halfstep": {"format": 1, "state": numbers, "policy": policy.vector().tolist(), "updates": 0}}


def states_of_losses(state_dict, losses):
    """The states of a scaler of so many losses, one by one."""
    own = state_dict.get("halfstep") or {}
    more = own.get("losses", [])
    if not isinstance(more, list):
        raise ValueError(f"scaler state 'losses' is {more!r}; expected a list of the states of the losses from 1 on")
    if losses == 1 and not more or not state_dict:  # an empty one is refused as such
        return [state_dict]
    states = [state_dict, *more]
    if not own and "loss_scaler0" in state_dict:  # apex's
        for which in range(len(state_dict)):
            if f"loss_scaler{which}" not in state_dict:
                raise ValueError(f"the apex state has no 'loss_scaler{which}' (keys: {', '.join(map(str, state_dict))})")
        states = [{"loss_scaler0": state_dict[f"loss_scaler{which}"]} for which in range(len(state_dict))]
    if len(states) != losses:
        raise ValueError(f"scaler state is of {len(states)} loss{'es' if len(states) > 1 else ''} but this GradScaler has losses={losses}")
    return states
