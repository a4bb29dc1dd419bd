"""What FP16 loses, layer by layer, against an FP32 run of the same batch on the exact weights (docs/compare.md)."""

import contextlib
import math
from dataclasses import dataclass, fields

import torch

from ._library import _C
from ._recording import OVERFLOW, SMALLEST, number
from .cast import evaluate_in
from .optim import Masters, Optimizer

TO_NORMAL = 2.0**-14 - 2.0**-25  # from here the nearest FP16 number is normal: the tie goes to the even one, 2^-14
SATURATED = 32752.0  # half of the largest FP16 number
KINDS = ("weight", "activation", "activation gradient", "weight gradient")


@dataclass
class Shares:
    """Counts over the elements of one tensor, or of several added up. amax: the largest |x * scale|."""

    count: int = 0
    nonzero: int = 0     #: finite and not 0 in the FP32 reference; -0 is 0
    underflow: int = 0   #: of these, 0 in FP16: |x * scale| <= 2^-25
    subnormal: int = 0   #: of these, subnormal in FP16
    overflow: int = 0    #: inf in FP16: |x * scale| >= 65520, or already inf or NaN
    saturated: int = 0   #: |x * scale| > 32752, overflow too
    lost: int = 0        #: of the non-zeros, those that the 16-bit run has as 0; 0 where it was not compared
    amax: float = 0.0

    def __add__(self, other):
        return Shares(*[max(a, b) if f.name == "amax" else a + b for f, a, b in ((f, getattr(self, f.name), getattr(other, f.name)) for f in fields(Shares))])

    @property
    def headroom(self):
        """Bits between the largest magnitude and the end of FP16; None without one."""
        return math.log2(65504.0 / self.amax) if self.amax > 0 and math.isfinite(self.amax) else None


@torch.no_grad()
def counts(reference, scale=1.0, stored=None):
    """The numbers of shares(), in the order of the fields of Shares, as one float64 tensor on the device; nothing waits for it."""
    x = reference.detach()
    if x.device.type == "cpu" and x.dtype == torch.float32 and scale == 1.0:
        return torch.tensor(_C.shares(x, scale, stored), dtype=torch.float64)  # one pass
    x, total = (x.double() * scale).abs(), torch.count_nonzero
    nan, infinite, zeros, small = total(x != x), total(x == math.inf), total(x == 0), total(x <= SMALLEST)
    lost = torch.zeros_like(nan) if stored is None else total((x > 0) & (x < math.inf) & (stored.detach() != 0).logical_not())
    amax = torch.where(x < math.inf, x, 0).amax() if x.numel() else torch.zeros_like(nan)
    return torch.stack([n.double() for n in (torch.full_like(nan, x.numel()), x.numel() - nan - infinite - zeros, small - zeros, total(x < TO_NORMAL) - small,
                                             total(x >= OVERFLOW) + nan, total(x > SATURATED) + nan, lost, amax)])


def shares(reference, scale=1.0, stored=None):
    """Shares of an FP32 (or wider) tensor at a scale. x * scale is exact: both have 24 bits, and the product is taken in FP64.

    `stored`: what the 16-bit run has in its place, any dtype, for `lost`.
    """
    return of_counts(counts(reference, scale, stored).tolist())


def of_counts(numbers):
    """Shares of the eight numbers of counts()."""
    return Shares(*map(int, numbers[:7]), numbers[7])


@contextlib.contextmanager
def _leaves(model):
    """Inside, the parameters of `model` are FP32 leaves of their own and its buffers copies; {name: leaf}."""
    copies, kept = {}, []
    for module in model.modules():
        kept.append((module, dict(module._parameters), dict(module._buffers)))
        for name, param in module._parameters.items():
            if param is not None:
                module._parameters[name] = copies.setdefault(id(param), torch.nn.Parameter(param.detach().clone(), requires_grad=param.requires_grad))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
    try:
        yield dict(model.named_parameters())
    finally:
        for module, params, buffers in kept:
            module._parameters.update(params)
            module._buffers.update(buffers)


@contextlib.contextmanager
def with_rng(state):
    """Inside, random numbers are those from `state` on (of rng_state()); after it, as if none had been drawn."""
    now = rng_state()
    set_rng_state(state)
    try:
        yield
    finally:
        set_rng_state(now)


def rng_state():
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None


def set_rng_state(state):
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])


class _Watch:
    """Shares of the outputs of the innermost modules and of the gradients that come back to them."""

    def __init__(self, model, scale, found):
        self._scale, self._found = scale, found
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in model.named_modules() if name and not list(module.children())]

    def _add(self, name, kind, tensor, scale):
        self._found[name, kind] = self._found.get((name, kind), Shares()) + shares(tensor, scale)

    def _hook(self, name):
        def look(module, args, output):
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                self._add(name, "activation", output, 1.0)
                if output.requires_grad:
                    output.register_hook(lambda grad: self._add(name, "activation gradient", grad, self._scale))
        return look

    def close(self):
        for handle in self._handles:
            handle.remove()


def against_fp32(model, optimizers, loss, batch, scale, rng=None):
    """{(name, kind): Shares} of one training batch, from an FP32 forward and backward on the exact weights.

    model, optimizers: as they are between backward and step, with the 16-bit gradients in .grad. loss(model, batch) -> scalar
    tensor. scale: what the gradients carry. rng: rng_state() before the 16-bit forward, so that dropout falls alike. Weights,
    gradients, buffers and random numbers are afterwards what they were.

    Weights and activations are looked at as they are, gradients times the scale. Of weight gradients `lost` compares with
    .grad: non-zero in FP32 and 0 there, whether it vanished in this tensor or on the way to it.
    """
    found = {}
    stored = {name: param.grad for name, param in model.named_parameters()}
    training = {module: module.training for module in model.modules()}
    ours = [o for o in optimizers if isinstance(o, (Optimizer, Masters))]
    with with_rng(rng or rng_state()), evaluate_in(model, ours, torch.float32), _leaves(model) as leaves:
        for module, was in training.items():
            module.training = was
        for name, leaf in leaves.items():
            if leaf.is_floating_point():
                found[name, "weight"] = shares(leaf)
        watch = _Watch(model, scale, found)
        try:
            with torch.enable_grad():
                value = loss(model, batch)
                wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
                grads = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
        finally:
            watch.close()
    for name, grad in zip(wanted, grads):
        if grad is not None:
            kept = stored[name]
            dense = lambda g: g.to_dense() if g.is_sparse else g
            found[name, "weight gradient"] = shares(dense(grad), scale, None if kept is None else dense(kept))
    return found


# -- in a report -----------------------------------------------------------------------------------
def _pack(shares):
    return [number(x) for x in (shares.count, shares.nonzero, shares.underflow, shares.subnormal, shares.overflow, shares.saturated, shares.lost, shares.amax)]


def packed_samples(samples, every):
    """The samples as the report has them: names and kinds once, a row of numbers a tensor and sample."""
    tensors = list(dict.fromkeys(key for _, _, found in samples for key in found))
    rows = [{"step": step, "scale": number(scale), "rows": [[i, *_pack(found[key])] for i, key in enumerate(tensors) if key in found]} for step, scale, found in samples]
    return {"every": every, "tensors": [{"name": name, "kind": kind} for name, kind in tensors], "samples": rows}


def unpacked(entry):
    """Shares of a row of packed_samples."""
    return Shares(*[int(x) for x in entry[1:8]], float(entry[8]))
