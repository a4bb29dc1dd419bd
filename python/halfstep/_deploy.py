"""A trained model in the precision it is to run in: what hs.evaluate measures and hs.export writes."""

import copy

import torch

from ._room import LIMIT, SIXTEEN
from .cast import _cast_floats, _Enter, _exact_weights, _hooks, _kept_modules, _Leave, _Root, cast_model
from .nn import RotaryEmbedding
from .nn._activation import _Gated

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _CastInputs:
    """On a copy in FP32 or FP64: floating inputs in its dtype."""

    def __init__(self, dtype):
        self._dtype = dtype

    def __call__(self, module, args, kwargs):
        return _cast_floats(args, self._dtype), _cast_floats(kwargs, self._dtype)


def islands_of(model):
    """The modules of a cast model that compute in FP32."""
    return [name for name, module in model.named_modules() if any(isinstance(hook, _Enter) for hook in module._forward_pre_hooks.values())]


def islands_asked(model, keep_fp32=None):
    """The names of the modules that `keep_fp32` means: classes, names or globs; None: those that cast_model kept, all norms if it was never cast."""
    if keep_fp32 is None and _hooks(model, _Root):
        return islands_of(model)
    return list(_kept_modules(model, keep_fp32))


@torch.no_grad()
def deployable(caller, model, optimizers=None, dtype=torch.float32, keep_fp32=None, weights="master"):
    """A copy of `model` for inference in `dtype`, with its exact weights, that casts its floating inputs itself; `model` is left as it is.

    In 16 bits the modules of `keep_fp32` compute in FP32 (None: those that cast_model kept, all norms if it was never cast), and a weight that
    is of that dtype already is the very weight that was trained. Weights and floating buffers of the others are rounded. ValueError for a value
    that does not fit, by name. caller: for the texts of errors.
    """
    exact = _exact_weights(caller, optimizers, weights)
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    trained = {}
    for (name, param), own in zip(model.named_parameters(), twin.parameters()):
        if param.is_floating_point():
            own.grad, own.data = None, exact.get(id(param), getattr(param, "_halfstep_exact", param)).detach().to(wide).clone()
            if param.dtype == dtype and weights == "master":
                trained[name] = param.detach().clone()
    for module in twin.modules():
        if isinstance(module, _Gated):
            module.overflowed = None  # a count of the training
    if dtype not in SIXTEEN:
        for hooks, key, _ in _hooks(twin, (_Root, _Enter, _Leave)):
            del hooks[key]
        for buffer in twin.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.to(dtype)
        twin.register_forward_pre_hook(_CastInputs(dtype), with_kwargs=True)
        return twin
    cast_model(twin, dtype, keep_fp32=islands_asked(model, keep_fp32), cast_inputs=True)
    for name, param in twin.named_parameters():
        if name in trained and param.dtype == dtype:
            param.data = trained[name]
        if hasattr(param, "_halfstep_exact"):
            del param._halfstep_exact
    inside = {id(m) for name in islands_of(twin) for m in twin.get_submodule(name).modules()}
    for name, module in twin.named_modules():
        if id(module) not in inside and not isinstance(module, RotaryEmbedding):  # its tables stay FP32: a rounded angle is a wrong position
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    _check(buffer, dtype, f"{name}.{key}" if name else key)
                    buffer.data = buffer.to(dtype)
    return twin


def _check(value, dtype, name):
    finite = value[value.isfinite()].abs()  # a mask may hold -inf
    if bool((finite >= LIMIT[dtype]).any()):
        raise ValueError(f"'{name}' does not fit {dtype}: its largest magnitude is {float(finite.max()):g}; keep it in FP32")
