"""Casting a model to 16 bits without losing the low bits, and taking it back to FP32 or FP64."""

import contextlib
import fnmatch
from dataclasses import dataclass, field

import torch

from ._room import SIXTEEN, check_fits, dtype_name, owned
from .optim import Masters, Optimizer

_NORMS = (torch.nn.modules.batchnorm._NormBase, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm, torch.nn.LocalResponseNorm)


@dataclass
class CastReport:
    """What cast_model did, by parameter name."""

    dtype: torch.dtype
    cast: list = field(default_factory=list)
    kept: list = field(default_factory=list)

    def __str__(self):
        return f"{len(self.cast)} parameters cast to {str(self.dtype).removeprefix('torch.')}, {len(self.kept)} kept in FP32"


def _kept_modules(model, keep_fp32):
    """The outermost modules that stay FP32; a rule that fits nothing is refused."""
    if keep_fp32 is None:
        rules = list(_NORMS)
    else:
        rules = [keep_fp32] if isinstance(keep_fp32, (str, type)) else list(keep_fp32)
    used, kept = set(), {}
    for name, module in model.named_modules():
        for rule in rules:
            if isinstance(rule, type) and isinstance(module, rule) or isinstance(rule, str) and name and fnmatch.fnmatch(name, rule):
                used.add(rule)
                kept[name] = module
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            kept[name] = module  # its statistics stay FP32, and its weights must be of their dtype
    unused = [r for r in rules if r not in used]
    if keep_fp32 is not None and unused:
        raise ValueError(f"cast_model: keep_fp32 has {unused[0]!r}, which fits no module (modules: {', '.join(repr(n) for n, _ in model.named_modules() if n) or 'none'})")
    inside = lambda name: any("" in kept or name.startswith(outer + ".") for outer in kept if outer != name)
    return {name: module for name, module in kept.items() if not inside(name)}


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

    keep_fp32: classes, module names or globs that stay FP32; None keeps all norms. Norms with running statistics always
    stay: torch computes them in the dtype of those. The FP32 values are remembered until
    the first optimizer takes them, so masters begin exactly there. cast_inputs: the model casts floating inputs itself;
    without it FP32 input outside autocast is refused. Buffers are untouched, tied weights stay tied. Everything is
    checked before anything is changed: |w| >= 65520 is refused by name.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"cast_model: dtype is {dtype}; expected torch.float16 or torch.bfloat16")
    if grad_dtype not in (None, "param", "fp32", torch.float32):
        raise ValueError(f"cast_model: grad_dtype is {grad_dtype!r}; expected None, 'param' or 'fp32'")
    kept_modules, chosen = _kept_modules(model, keep_fp32), {}
    kept = {id(p) for module in kept_modules.values() for p in module.parameters()}
    for name, param in model.named_parameters():
        if not param.is_floating_point() or id(param) in kept:
            continue
        if owned(param):
            raise RuntimeError(f"cast_model: '{name}' already belongs to an optimizer; cast the model first, then make the optimizer")
        check_fits(param, torch.empty(param.shape, dtype=dtype, device="meta"), name)
        chosen[name] = param
    report = CastReport(dtype, list(chosen), [n for n, p in model.named_parameters() if id(p) in kept])
    for param in chosen.values():
        exact, grad = getattr(param, "_halfstep_exact", param.detach()), param.grad
        param.grad = None
        param.data = exact.to(dtype)
        if grad_dtype in ("fp32", torch.float32):
            param.grad_dtype = torch.float32
        if grad is not None:
            param.grad = grad.to(torch.float32 if grad_dtype in ("fp32", torch.float32) else dtype)
        if param.requires_grad:
            param._halfstep_exact = exact
    _install_hooks(model, kept_modules.values(), dtype, cast_inputs)
    return report


class _Root:
    """On the cast model: casts floating inputs, or refuses FP32 ones where nothing else would cast them."""

    def __init__(self, dtype, cast_inputs):
        self.dtype, self.cast_inputs, self.evaluating = dtype, cast_inputs, False

    def __call__(self, module, args, kwargs):
        if self.evaluating:
            return None
        if self.cast_inputs:
            return _cast_floats(args, self.dtype), _cast_floats(kwargs, self.dtype)
        first = next(module.parameters(), None)
        device = "cpu" if first is None else first.device.type
        if not torch.is_autocast_enabled(device) and _has_wide_float(list(args) + list(kwargs.values())):
            raise RuntimeError(f"model was cast to {dtype_name(self.dtype)}: run it inside hs.autocast, or cast_model(…, cast_inputs=True)")
        return None


class _Enter:
    """On a kept module: its floating inputs become FP32."""

    def __call__(self, module, args, kwargs):
        return _cast_floats(args, torch.float32), _cast_floats(kwargs, torch.float32)


class _Leave:
    """On a kept module: its floating outputs become the model's dtype."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, module, args, output):
        return _cast_floats(output, self.dtype)


def _hooks(model, kinds):
    """[(dict of hooks, key, hook)] of the given kinds in `model`."""
    return [(hooks, key, hook) for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)
            for key, hook in list(hooks.items()) if isinstance(hook, kinds)]


def _install_hooks(model, kept_modules, dtype, cast_inputs):
    for hooks, key, _ in _hooks(model, (_Root, _Enter, _Leave)):  # of an earlier cast, of this model or of a part
        del hooks[key]
    model.register_forward_pre_hook(_Root(dtype, cast_inputs), with_kwargs=True)
    for module in kept_modules:
        if module is not model:
            module.register_forward_pre_hook(_Enter(), with_kwargs=True)
            module.register_forward_hook(_Leave(dtype))


def _as_list(optimizers):
    return list(optimizers) if isinstance(optimizers, (list, tuple)) else [] if optimizers is None else [optimizers]


def _owned(optimizer):
    """[(parameter, name)] of one of our optimizers, in the order of its master_params()."""
    if isinstance(optimizer, Masters):
        return [(p, name) for (p, _), name in zip(optimizer._pairs, optimizer._names)]
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not a halfstep optimizer and has no masters; leave it out")
    return [pair for room in optimizer._rooms for pair in zip(room.params, room.names)]


def _exact_weights(caller, optimizers, weights):
    """{id(parameter): exact value} from the optimizers' masters, or their running means."""
    if weights not in ("master", "ema"):
        raise ValueError(f"{caller}: weights is {weights!r}; expected 'master' or 'ema'")
    exact = {}
    for optimizer in _as_list(optimizers):
        owned = _owned(optimizer)
        if weights == "ema" and isinstance(optimizer, Masters):
            raise ValueError(f"{caller}: {type(optimizer).__name__} keeps no running mean of its weights")
        values = optimizer.ema_params() if weights == "ema" else optimizer.master_params()
        exact.update({id(p): value for (p, _), value in zip(owned, values)})
    if weights == "ema" and not exact:
        raise ValueError(f"{caller}: weights='ema' needs the optimizers that keep the running means")
    return exact


@contextlib.contextmanager
def evaluate_in(model, optimizers=None, dtype=torch.float32, weights="master"):
    """Inside, `model` holds its exact weights in `dtype` (FP16, FP32 or FP64) and casts floating inputs; after it, the
    weights are what they were, bit for bit. weights="ema": the optimizers' running means instead."""
    from ._islands import islands_in  # built on this module

    exact = _exact_weights("evaluate_in", optimizers, weights)
    tensors = [t for t in list(model.parameters()) + list(model.buffers()) if t.is_floating_point()]
    value_of = lambda t: exact.get(id(t), getattr(t, "_halfstep_exact", t.data)).detach()
    if dtype in SIXTEEN:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                check_fits(value_of(tensor), torch.empty(tensor.shape, dtype=dtype, device="meta"), name)
    saved = [(t, t.data) for t in tensors]
    training = {module: module.training for module in model.modules()}
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: (_cast_floats(args, dtype), _cast_floats(kwargs, dtype)), with_kwargs=True)
    roots = [r for _, _, r in _hooks(model, _Root)] + islands_in(model)  # all of them leave dtypes alone here
    bypassed = _hooks(model, (_Enter, _Leave))
    before = [r.evaluating for r in roots]
    order = [(hooks, dict(hooks)) for hooks in {id(h): h for h, _, _ in bypassed}.values()]
    try:
        with torch.no_grad():
            for tensor in tensors:
                tensor.data = value_of(tensor).to(dtype)
        for root in roots:
            root.evaluating = True
        for hooks, key, _ in bypassed:
            del hooks[key]
        model.eval()
        with torch.no_grad(), torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
            yield model
    finally:
        hook.remove()
        for hooks, items in order:
            hooks.clear()
            hooks.update(items)
        for tensor, data in saved:
            tensor.data = data
        for root, was in zip(roots, before):
            root.evaluating = was
        for module, was in training.items():
            module.training = was
        for optimizer in _as_list(optimizers):
            optimizer._remember()


@torch.no_grad()
def export_state_dict(model, optimizers=None, dtype=torch.float32, weights="master"):
    """model.state_dict() with the exact weights (weights="ema": their running means) in `dtype`; floating buffers in `dtype`, the rest as it is."""
    exact = _exact_weights("export_state_dict", optimizers, weights)
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
        if not isinstance(state_dict[key], torch.Tensor):
            raise ValueError(f"load_state_dict: '{key}' is {type(state_dict[key]).__name__}; expected a tensor")
        check_fits(state_dict[key], target, key)
        if key in named:
            values[id(named[key])] = state_dict[key]
    taken, targets = set(), []
    for optimizer in _as_list(optimizers):
        pairs = _owned(optimizer)
        for param, name in pairs:
            if id(param) not in values:
                raise ValueError(f"load_state_dict: '{name}' of {type(optimizer).__name__} is not a parameter of the model")
        targets.append((optimizer, [p for p, _ in pairs]))
    for optimizer, params in targets:
        optimizer.set_master_params([values[id(p)] for p in params])
        taken.update(map(id, params))
    for key, target in own.items():
        if isinstance(target, torch.Tensor) and id(named.get(key, target)) not in taken:
            target.copy_(state_dict[key])
            if hasattr(named.get(key), "_halfstep_exact"):
                named[key]._halfstep_exact = state_dict[key].detach().to(torch.float32).clone()
