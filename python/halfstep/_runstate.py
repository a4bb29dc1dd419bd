"""A run's state kept in memory and given back to the bit; and its learning rate lowered so that schedulers go on from there."""

import copy
import random
import sys

import torch

from ._shares import rng_state, set_rng_state
from .optim import Masters, Optimizer


def _random_numbers():
    numpy = sys.modules.get("numpy")
    return rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_random_numbers(state):
    set_rng_state(state[0])
    random.setstate(state[1])
    if state[2] is not None:
        sys.modules["numpy"].random.set_state(state[2])


class unseen:
    """A context: what happens inside draws no random numbers and leaves each module's train() or eval() as it was."""

    def __init__(self, model):
        self._model = model

    def __enter__(self):
        self._random, self._training = _random_numbers(), [(module, module.training) for module in self._model.modules()]

    def __exit__(self, *exception):
        _set_random_numbers(self._random)
        for module, was in self._training:
            module.training = was


class RunState:
    """Copies of weights, buffers, optimizers (packed: remainders and codes as they are held), scaler, schedulers and random numbers."""

    @torch.no_grad()
    def __init__(self, model, optimizers, scaler, schedulers):
        self._model, self._optimizers, self._scaler, self._schedulers = model, optimizers, scaler, schedulers
        self._tensors = [(t, t.detach().clone()) for t in self._held()]
        self._states = [_optimizer_state(optimizer) for optimizer in optimizers]
        self._scale = None if scaler is None else copy.deepcopy(scaler.state_dict())
        self._schedules = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]
        self._random = _random_numbers()

    def _held(self):
        return [*self._model.parameters(), *self._model.buffers()]

    @torch.no_grad()
    def restore(self):
        """Everything is what it was. Gradients are left: the next zero_grad() drops them."""
        if {id(t) for t in self._held()} != {id(t) for t, _ in self._tensors}:
            raise RuntimeError("rewind: parameters or buffers of the model were replaced since the last good state")
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for optimizer, state in zip(self._optimizers, self._states):
            optimizer.load_state_dict(state if isinstance(optimizer, Optimizer) else copy.deepcopy(state))  # torch's keep the tensors that they load
        if self._scaler is not None:
            self._scaler.load_state_dict(copy.deepcopy(self._scale))
        for scheduler, state in zip(self._schedulers, self._schedules):
            scheduler.load_state_dict(copy.deepcopy(state))
        _set_random_numbers(self._random)


def _optimizer_state(optimizer):
    state = optimizer.state_dict(packed=True) if isinstance(optimizer, Optimizer) else optimizer.state_dict()
    if isinstance(optimizer, (Masters, Optimizer)):  # its tensors are copies already, those of the groups are not
        return {**state, "param_groups": copy.deepcopy(state["param_groups"])}
    return copy.deepcopy(state)


# -- the learning rate -----------------------------------------------------------------------------
def _each(schedulers):
    """Schedulers and those inside them."""
    for scheduler in schedulers:
        inner = getattr(scheduler, "scheduler", None)  # SkipAware's
        yield from _each([*([] if inner is None else [inner]), *getattr(scheduler, "_schedulers", [])])
        if inner is None:
            yield scheduler


@torch.no_grad()
def lower_lr(optimizers, schedulers, factor):
    """Multiplies every learning rate by `factor`: of the groups, and what schedulers compute theirs from. Returns the new ones of all groups."""
    schedulers, written = list(_each(schedulers)), set()

    def times(value):
        """In place where it is a tensor, which a captured step reads and groups may share."""
        if not isinstance(value, torch.Tensor):
            return value * factor
        if id(value) not in written:
            written.add(id(value))
            value.mul_(factor)
        return value

    for optimizer in optimizers:
        cycles = any(isinstance(s, torch.optim.lr_scheduler.OneCycleLR) and s.optimizer is optimizer for s in schedulers)
        for group in optimizer.param_groups:
            group.update({key: times(group[key]) for key in ("lr", "initial_lr", *(("max_lr", "min_lr") if cycles else ())) if key in group})
    for scheduler in schedulers:
        for key in ("base_lrs", "max_lrs", "min_lrs", "_last_lr"):
            if isinstance(getattr(scheduler, key, None), (list, tuple)):
                setattr(scheduler, key, [v * factor for v in getattr(scheduler, key)])
        for key in ("eta_min", "default_min_lr"):
            if hasattr(scheduler, key):
                setattr(scheduler, key, getattr(scheduler, key) * factor)
    return [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]


def has_scheduler(optimizer):
    """Whether one of torch's schedulers sets this optimizer's learning rate."""
    return getattr(optimizer.step, "_wrapped_by_lr_sched", False)
