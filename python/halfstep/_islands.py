"""Islands: modules of a 16-bit model that compute in FP32 from now on, and back again, with the same weights and optimizers."""

import contextlib
import fnmatch
import os

import torch
import torch._functorch.config
from torch._compile import _disable_dynamo

from . import _decisions
from ._room import SIXTEEN
from .cast import _cast_floats, _hooks, _Leave
from .optim import Masters, Optimizer


class _Wide(torch.autograd.Function):
    """A 16-bit weight as FP32; its gradient stays FP32, which the parameter's grad_dtype takes as it is."""

    @staticmethod
    def forward(ctx, weight):
        return weight.float()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Island:
    """The forward of a module in FP32: autocast is off inside, 16-bit inputs and weights are widened.

    Under autocast the output stays FP32, as a norm's does, and what computes in 16 bits casts it itself: cast back here, what made the
    layer an island would overflow again. Outside autocast the output of a cast model's island has the model's dtype.
    """

    def __init__(self, module, dtype, device):
        self.module, self.dtype, self.device, self.evaluating = module, dtype, device, False
        self.own = module.__dict__.get("forward")  # a forward that someone put on this very module
        self.inner = module.forward
        self.grad_dtypes = []
        # torch.compile runs backwards in the autocast around the whole forward, and gives a 16-bit input a 16-bit gradient: an island's
        # would be in 16 bits. It is left out of the graph, unless its weights are FP32 and the first was switched off.
        self.traced = dtype is None and getattr(torch._functorch.config, "backward_pass_autocast", None) == "off"

    def __call__(self, *args, **kwargs):
        active = torch.is_autocast_enabled(self.device)
        if self.evaluating or not active and self.dtype is None:  # hs.evaluate_in, or an FP32 model without autocast
            return self.inner(*args, **kwargs)
        compute = self._outside_the_graph if torch.compiler.is_compiling() and not self.traced else self._compute
        return compute(active, args, kwargs)

    @_disable_dynamo
    def _outside_the_graph(self, active, args, kwargs):
        return self._compute(active, args, kwargs)

    def _compute(self, active, args, kwargs):
        with torch.autocast(self.device, enabled=False), _widened(self.module) if self.dtype is not None else contextlib.nullcontext():
            output = self.inner(*_narrow_to_wide(args), **_narrow_to_wide(kwargs))
        return output if active else _cast_floats(output, self.dtype)


def _narrow_to_wide(value):
    """16-bit tensors in lists, tuples and dicts as FP32; the others as they are."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in SIXTEEN else value
    if isinstance(value, (list, tuple)):
        items = [_narrow_to_wide(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return {k: _narrow_to_wide(v) for k, v in value.items()} if isinstance(value, dict) else value


@contextlib.contextmanager
def _widened(module):
    """Inside, the 16-bit weights of `module` are FP32, and what cast_model kept in FP32 gives FP32."""
    wide, kept = {}, [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None and p.dtype in SIXTEEN]
    leaves = [hook for _, _, hook in _hooks(module, _Leave)]
    dtypes = [hook.dtype for hook in leaves]
    try:
        for owner, name, param in kept:
            if id(param) not in wide:
                wide[id(param)] = _Wide.apply(param)
            owner._parameters[name] = wide[id(param)]
        for hook in leaves:
            hook.dtype = torch.float32
        yield
    finally:
        for owner, name, param in kept:
            owner._parameters[name] = param
        for hook, dtype in zip(leaves, dtypes):
            hook.dtype = dtype


def bare(model):
    """The module inside torch.compile's wrapper; its parameters and names are the user's."""
    return getattr(model, "_orig_mod", model)


def layers(model, rules=None, caller="layers"):
    """{name: module}: the innermost modules (attention as one), or the outermost that names, globs or classes fit."""
    if rules is None:
        fits = lambda name, module: not list(module.children()) or isinstance(module, torch.nn.MultiheadAttention)
        used = rules = []
    else:
        rules = [rules] if isinstance(rules, (str, type)) else list(rules)
        used = []

        def fits(name, module):
            hits = [r for r in rules if isinstance(r, type) and isinstance(module, r) or isinstance(r, str) and fnmatch.fnmatch(name, r)]
            used.extend(hits)
            return bool(hits)
    found, inside = {}, set()
    for name, module in model.named_modules():
        if name and fits(name, module) and id(module) not in inside:
            found[name] = module
            inside.update(map(id, module.modules()))
    unused = [r for r in rules if r not in used]
    if unused:
        raise ValueError(f"{caller} has {unused[0]!r}, which fits no module (modules: {', '.join(repr(n) for n, _ in model.named_modules() if n) or 'none'})")
    return found


class Islands:
    """Which modules of a model are islands; kept on the modules, so that everyone who asks sees the same."""

    def __init__(self, model, optimizers=()):
        self.model, self._optimizers = bare(model), [o for o in optimizers if isinstance(o, (Masters, Optimizer))]
        params = list(self.model.parameters())
        self.dtype = next((p.dtype for p in params if p.dtype in SIXTEEN), None)
        self.device = params[0].device.type if params else "cpu"

    @property
    def names(self):
        """Names of the islands, in the order of the modules."""
        return [name for name, module in self.model.named_modules() if isinstance(module.__dict__.get("forward"), Island)]

    def put(self, name):
        """The module computes in FP32 from now on. A compiled model compiles anew at its next call."""
        module = self.model.get_submodule(name)
        if isinstance(module.__dict__.get("forward"), Island):
            return
        island = Island(module, self.dtype, self.device)
        for param in module.parameters():
            if param.dtype in SIXTEEN and param.requires_grad:
                island.grad_dtypes.append((param, self._lasting_grad_dtype(param)))
                _set_grad_dtype(param, torch.float32)
        module.forward = island

    def _lasting_grad_dtype(self, param):
        """Its grad_dtype, less what unscale_ made of it until the next zero_grad."""
        for optimizer in self._optimizers:
            widened = optimizer._turn.widened
            if any(p is param for p in widened):
                optimizer._turn.widened = [p for p in widened if p is not param]
                return param.dtype
        return param.grad_dtype

    def take(self, name):
        """The module computes in 16 bits again."""
        module = self.model.get_submodule(name)
        island = module.__dict__.get("forward")
        if not isinstance(island, Island):
            return
        if island.own is None:
            del module.forward
        else:
            module.forward = island.own
        for param, dtype in island.grad_dtypes:
            _set_grad_dtype(param, dtype)


def _set_grad_dtype(param, dtype):
    grad, param.grad = param.grad, None
    param.grad_dtype = dtype
    param.grad = None if grad is None else grad.to(dtype or param.dtype)


def islands_in(model):
    """The Island objects of a model, for evaluate_in."""
    return [module.__dict__["forward"] for module in model.modules() if isinstance(module.__dict__.get("forward"), Island)]


def islands_(model, names, optimizers=()):
    """Puts layers of a 16-bit model in FP32, in place, and returns their names. docs/precision.md says what an island is.

    model: trained under hs.autocast, or cast by hs.cast_model before. names: names, globs or classes of modules, or the path of a policy that
    `halfstep tune` wrote. optimizers: those that were made already. A rule that fits no module is a ValueError, and nothing is changed.
    """
    if isinstance(names, (os.PathLike, str)) and os.fspath(names).endswith(".json"):
        names = (_decisions.read_policy(names)["islands"] or "").split("|")
        names = [name for name in names if name]
    found = list(layers(bare(model), names, "islands_: names")) if names else []
    islands = Islands(model, optimizers if isinstance(optimizers, (list, tuple)) else [optimizers])
    for name in found:
        islands.put(name)
    return found
