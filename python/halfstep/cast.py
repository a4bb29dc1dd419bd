"""Casting a model to 16 bits without losing the low bits, and taking it back to FP32 or FP64."""

import contextlib
import fnmatch
from dataclasses import dataclass, field

import torch

from .optim import Masters, Optimizer, check_fits

_NORMS = (torch.nn.modules.batchnorm._NormBase, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm, torch.nn.LocalResponseNorm)


@dataclass
class CastReport:
    """What cast_model did, by parameter name."""

    dtype: torch.dtype
    cast: list = field(default_factory=list)
    kept: list = field(default_factory=list)

    def __str__(self):
        return f"{len(self.cast)} parameters cast to {str(self.dtype).removeprefix('torch.')}, {len(self.kept)} kept in FP32"


def _keeps(module, name, keep_fp32):
    if keep_fp32 is None:
        return isinstance(module, _NORMS)
    for rule in keep_fp32:
        if isinstance(rule, type) and isinstance(module, rule):
            return True
        if isinstance(rule, str) and name and fnmatch.fnmatch(name, rule):
            return True
    return False


def _cast_floats(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        items = [_cast_floats(v, dtype) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {k: _cast_floats(v, dtype) for k, v in value.items()}
    return value


def _has_wide_float(value):
    if isinstance(value, torch.Tensor):
        return value.dtype in (torch.float32, torch.float64)
    if isinstance(value, (list, tuple)):
        return any(map(_has_wide_float, value))
    return isinstance(value, dict) and any(map(_has_wide_float, value.values()))


@torch.no_grad()
def cast_model(model, dtype=torch.float16, keep_fp32=None, grad_dtype=None, cast_inputs=False):
    """Casts the floating parameters of `model` to `dtype` in place; returns a CastReport.

    keep_fp32: classes, module names or globs that stay FP32; None keeps all norms. The FP32 values are remembered until
    the first optimizer takes them, so masters begin exactly there. cast_inputs: the model casts floating inputs itself;
    without it FP32 input outside autocast is refused. Buffers are untouched, tied weights stay tied. Everything is
    checked before anything is changed: |w| >= 65520 is refused by name.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"cast_model: dtype is {dtype}; expected torch.float16 or torch.bfloat16")
    if grad_dtype not in (None, "param", "fp32", torch.float32):
        raise ValueError(f"cast_model: grad_dtype is {grad_dtype!r}; expected None, 'param' or 'fp32'")
    kept_modules, kept, chosen = [], set(), {}
    for module_name, module in model.named_modules():
        if _keeps(module, module_name, keep_fp32):
            kept_modules.append(module)
            kept.update(id(p) for p in module.parameters())
    for name, param in model.named_parameters():
        if not param.is_floating_point() or id(param) in kept:
            continue
        owner = getattr(param, "_halfstep_optimizer", None)
        if owner is not None and owner() is not None:
            raise RuntimeError(f"cast_model: '{name}' already belongs to an optimizer; cast the model first, then make the optimizer")
        check_fits(param, torch.empty(param.shape, dtype=dtype, device="meta"), name)
        chosen[name] = param
    report = CastReport(dtype, list(chosen), [n for n, p in model.named_parameters() if id(p) in kept])
    for param in chosen.values():
        exact = param.detach()
        param.data = exact.to(dtype)
        if param.requires_grad:
            param._halfstep_exact = exact
        if grad_dtype in ("fp32", torch.float32):
            param.grad_dtype = torch.float32
    _install_hooks(model, kept_modules, dtype, cast_inputs)
    return report


def _install_hooks(model, kept_modules, dtype, cast_inputs):
    def root(module, args, kwargs):
        device = next(module.parameters()).device.type
        if cast_inputs:
            return _cast_floats(args, module._halfstep_dtype), _cast_floats(kwargs, module._halfstep_dtype)
        if not module._halfstep_evaluating and not torch.is_autocast_enabled(device) and _has_wide_float(list(args) + list(kwargs.values())):
            name = str(dtype).removeprefix("torch.")
            raise RuntimeError(f"model was cast to {name}: run it inside hs.autocast, or cast_model(…, cast_inputs=True)")
        return None

    def enter(module, args, kwargs):
        return _cast_floats(args, torch.float32), _cast_floats(kwargs, torch.float32)

    def leave(module, args, output):
        return _cast_floats(output, model._halfstep_dtype)

    if not hasattr(model, "_halfstep_dtype"):
        model.register_forward_pre_hook(root, with_kwargs=True)
        for module in kept_modules:
            if module is model:
                continue
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave)
    model._halfstep_dtype, model._halfstep_evaluating = dtype, False


def _as_list(optimizers):
    return list(optimizers) if isinstance(optimizers, (list, tuple)) else [] if optimizers is None else [optimizers]


def _exact_weights(optimizers):
    """{id(parameter): exact value} from the optimizers' masters."""
    exact = {}
    for optimizer in _as_list(optimizers):
        if isinstance(optimizer, Masters):
            exact.update({id(p): m for (p, _), m in zip(optimizer._pairs, optimizer.master_params())})
        elif isinstance(optimizer, Optimizer):
            params = [p for room in optimizer._rooms for p in room.params]
            exact.update({id(p): m for p, m in zip(params, optimizer.master_params())})
    return exact


@contextlib.contextmanager
def evaluate_in(model, optimizers=None, dtype=torch.float32, weights="master"):
    """Inside, `model` holds its exact weights in `dtype` (FP16, FP32 or FP64) and casts floating inputs; after it, the
    weights are what they were, bit for bit."""
    if weights != "master":
        raise ValueError(f"evaluate_in: weights is {weights!r}; expected 'master'")
    exact = _exact_weights(optimizers)
    tensors = [t for t in list(model.parameters()) + list(model.buffers()) if t.is_floating_point()]
    saved = [(t, t.data) for t in tensors]
    cast_dtype, training = getattr(model, "_halfstep_dtype", None), model.training
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: (_cast_floats(args, dtype), _cast_floats(kwargs, dtype)),
                                           with_kwargs=True, prepend=False)
    kept = []
    try:
        with torch.no_grad():
            for tensor in tensors:
                value = exact.get(id(tensor), getattr(tensor, "_halfstep_exact", tensor.data))
                tensor.data = value.detach().to(dtype)
        if cast_dtype is not None:
            model._halfstep_dtype, model._halfstep_evaluating = dtype, True
            kept = _bypass(model)
        model.eval()
        with torch.no_grad(), torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
            yield model
    finally:
        hook.remove()
        for module, pre, post in kept:
            module._forward_pre_hooks.update(pre)
            module._forward_hooks.update(post)
        for tensor, data in saved:
            tensor.data = data
        if cast_dtype is not None:
            model._halfstep_dtype, model._halfstep_evaluating = cast_dtype, False
        model.train(training)
        for optimizer in _as_list(optimizers):
            for room in getattr(optimizer, "_rooms", []):
                room.remember()


def _bypass(model):
    """Takes the FP32 casts off the kept modules while the whole model is in one dtype."""
    removed = []
    for module in model.modules():
        pre = {k: h for k, h in module._forward_pre_hooks.items() if getattr(h, "__qualname__", "").startswith("_install_hooks.<locals>.enter")}
        post = {k: h for k, h in module._forward_hooks.items() if getattr(h, "__qualname__", "").startswith("_install_hooks.<locals>.leave")}
        for k in pre:
            del module._forward_pre_hooks[k]
        for k in post:
            del module._forward_hooks[k]
        if pre or post:
            removed.append((module, pre, post))
    return removed


@torch.no_grad()
def export_state_dict(model, optimizers=None, dtype=torch.float32, weights="master"):
    """model.state_dict() with the exact weights in `dtype`; floating buffers in `dtype`, the rest as it is."""
    if weights != "master":
        raise ValueError(f"export_state_dict: weights is {weights!r}; expected 'master'")
    exact = _exact_weights(optimizers)
    named = dict(model.named_parameters(remove_duplicate=False))
    out = {}
    for key, value in model.state_dict(keep_vars=True).items():
        source = named.get(key, value)
        if isinstance(value, torch.Tensor):
            value = exact.get(id(source), getattr(source, "_halfstep_exact", value)).detach()
            value = (value.to(dtype) if value.is_floating_point() else value).clone()
        out[key] = value
    return out


@torch.no_grad()
def load_state_dict(model, optimizers, state_dict):
    """Sets weights and masters exactly from an FP32 or FP64 state dict. Everything is checked before anything changes."""
    own = model.state_dict(keep_vars=True)
    missing, unknown = sorted(set(own) - set(state_dict)), sorted(set(state_dict) - set(own))
    if missing or unknown:
        raise ValueError(f"load_state_dict: missing {missing or 'nothing'}, not in the model {unknown or 'nothing'}")
    named = dict(model.named_parameters(remove_duplicate=False))
    values = {}
    for key, target in own.items():
        if not isinstance(target, torch.Tensor):
            continue
        check_fits(state_dict[key], target, key)
        if key in named:
            values[id(named[key])] = state_dict[key]
    taken = set()
    for optimizer in _as_list(optimizers):
        params = [p for room in optimizer._rooms for p in room.params] if isinstance(optimizer, Optimizer) else [p for p, _ in optimizer._pairs]
        if any(id(p) not in values for p in params):
            raise ValueError("load_state_dict: the optimizer has a parameter that is not in the model")
        if isinstance(optimizer, Optimizer):
            optimizer.set_master_params([values[id(p)] for p in params])
        else:
            for p, copy in optimizer._pairs:
                copy.copy_(values[id(p)])
                p.copy_(values[id(p)])
        taken.update(map(id, params))
    for key, target in own.items():
        if isinstance(target, torch.Tensor) and id(named.get(key, target)) not in taken:
            target.copy_(state_dict[key])
            if hasattr(named.get(key), "_halfstep_exact"):
                named[key]._halfstep_exact = state_dict[key].detach().to(torch.float32).clone()
