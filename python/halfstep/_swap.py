"""Swaps the stock layers of a model for halfstep's, in place."""

import fnmatch
from collections import Counter
from dataclasses import dataclass

import torch

from . import nn


def _ours():
    """{torch's class: ours}, for every module of hs.nn that is torch's module of that name, computed otherwise."""
    return {getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if hasattr(torch.nn, name) and issubclass(getattr(nn, name), getattr(torch.nn, name))}


@dataclass(frozen=True)
class SwapReport:
    """What swap_layers_ did: `swapped` {module path: class name}, `left` {module path: why} for layers of a kind that could have been."""

    swapped: dict
    left: dict

    def __str__(self):
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(self.swapped.values()).items()))
        lines = [f"swapped {len(self.swapped)} layers" + (f": {kinds}" if kinds else "")]
        return "\n".join(lines + [f"left '{name}': {why}" for name, why in self.left.items()])

    __repr__ = __str__


def swap_layers_(model, exclude=()):
    """Turns the torch.nn layers of `model` that hs.nn has into hs.nn's, in place, and returns a SwapReport.

    Each module stays the object it is, with its parameters, buffers, hooks, names and state dict; only its class changes, so optimizers,
    tied weights and references from elsewhere stay right. `exclude`: paths, globs ("head", "blocks.0.*") or classes that stay stock, with all that is in them.
    Classes that derive from torch's, and modules with a parametrization, are left: what they compute is not known. Swapping twice changes nothing.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"swap_layers_: model is {type(model).__name__}; expected torch.nn.Module")
    exclude = [exclude] if isinstance(exclude, (str, type)) else list(exclude)
    for item in exclude:
        if not isinstance(item, (str, type)):
            raise TypeError(f"swap_layers_: exclude holds {item!r}; expected a path, a glob or a class")
    ours, swapped, left, used, excluded = _ours(), {}, {}, set(), {}
    named = list(model.named_modules())
    for name, module in named:
        hit = [item for item in exclude if (isinstance(module, item) if isinstance(item, type) else fnmatch.fnmatchcase(name, item))]
        used.update(hit)
        parent = name.rpartition(".")[0] if name else None  # it comes first
        hit = excluded[name] = excluded.get(parent) or hit
        stock = next((cls for cls in type(module).__mro__ if cls in ours), None)
        if stock is None or isinstance(module, ours[stock]):
            continue
        if hit:
            left[name] = f"excluded by {hit[0] if isinstance(hit[0], str) else hit[0].__name__}"
        elif torch.nn.utils.parametrize.is_parametrized(module):
            left[name] = f"{stock.__name__} with a parametrization"
        elif type(module) is not stock:
            left[name] = f"{type(module).__name__} derives from {stock.__name__}"
        else:
            swapped[name] = stock.__name__
    for item in exclude:
        if isinstance(item, str) and item not in used:
            raise ValueError(f"swap_layers_: exclude {item!r} matches no module; the model has {', '.join(repr(n) for n, _ in named[:8])}{', …' if len(named) > 8 else ''}")
    modules = dict(named)
    for name, kind in swapped.items():
        modules[name].__class__ = getattr(nn, kind)
    return SwapReport(swapped, left)
