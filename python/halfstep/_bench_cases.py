"""What `halfstep bench` measures: layers and optimizer steps, in two sizes (docs/bench.md)."""

import dataclasses
import math
import re
from typing import Callable

import torch
import torch.nn.functional as F

from . import functional as hf
from . import optim
from .amp import GradScaler

SIZES = {  # what a CPU does in a few milliseconds, and what fills a GPU
    "small": dict(parameters=16_384_000, product=1024, rows=1024, batch=8),
    "large": dict(parameters=131_072_000, product=4096, rows=8192, batch=64),
}
FLOATS = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16, "FP64": torch.float64}
TENSORS = 4  # of the optimizer step
MODES = {  # arm: dtype of the parameters and arguments of hs.optim.AdamW
    "FP16, split16": (torch.float16, {}),
    "FP16, split16, BF16 states": (torch.float16, {"states": "bf16"}),
    "FP16, split16, int8 states": (torch.float16, {"states": "int8"}),
    "FP16, FP32 masters": (torch.float16, {"master": "fp32"}),
    "FP32 weights (autocast)": (torch.float32, {}),
}
STOCK_STEP = "torch: unscale, clip, AdamW (fused)"


@dataclasses.dataclass
class Case:
    """`inputs`: shapes of what is differentiated, ("weight", shape) of the size that layers begin with, and what is not differentiated: ("labels", range, shape),
    ("angles", shape). `ours` and `stock` take them in that order."""

    name: str
    inputs: list
    ours: Callable
    stock: Callable

    def make(self, dtype, device):
        random = torch.Generator().manual_seed(0)
        for entry in self.inputs:
            if entry[0] == "labels":
                yield torch.randint(entry[1], entry[2], generator=random).to(device)
            elif entry[0] == "weight":  # larger ones would give subnormal probabilities and slopes, on which a CPU is slow
                yield (torch.randn(entry[1], generator=random) * math.prod(entry[1][1:]) ** -0.5).to(device, dtype).requires_grad_()
            elif entry[0] == "angles":  # cosines and sines are FP32 tables
                yield torch.randn(entry[1], generator=random).to(device)
            else:
                yield torch.randn(entry, generator=random).to(device, dtype).requires_grad_()


def _rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _causal(x):
    below = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
    return x.masked_fill(~below, -torch.inf).softmax(-1)


def cases(size):
    """[Case] of a size; in the names, rows x columns."""
    n, b = SIZES[size]["rows"], SIZES[size]["batch"]
    return [
        Case(f"linear + GELU, {n} x 1024 x 1024", [(n, 1024), ("weight", (1024, 1024)), (1024,)], lambda x, w, c: hf.linear(x, w, c, "gelu"), lambda x, w, c: F.gelu(F.linear(x, w, c))),
        Case(f"layer norm, {2 * n} x 1024", [(2 * n, 1024), (1024,), (1024,)], lambda x, w, c: hf.layer_norm(x, 1024, w, c), lambda x, w, c: F.layer_norm(x, (1024,), w, c)),
        Case(f"SwiGLU, {n} x 2048", [(n, 2048), (n, 2048)], hf.swiglu, lambda gate, up: F.silu(gate) * up),
        Case(f"causal softmax, {2 * b} x 256 x 256", [(2 * b, 256, 256)], lambda x: hf.softmax(x, causal=True), _causal),
        Case(f"rope, {b} x 8 x 256 x 64", [(b, 8, 256, 64), ("angles", (256, 32)), ("angles", (256, 32))], hf.rope, _rope),
        Case(f"cross entropy, {n // 2} x 8192", [(n // 2, 8192), ("labels", 8192, (n // 2,))], hf.cross_entropy, lambda x, y: F.cross_entropy(x.float(), y)),
        Case(f"linear + cross entropy, {n // 2} x 256 x 8192", [(n // 2, 256), ("weight", (8192, 256)), ("labels", 8192, (n // 2,))], lambda x, w, y: hf.linear_cross_entropy(x, w, y),
             lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y)),
        Case(f"convolution 3 x 3, {b} x 32 x 28 x 28", [(b, 32, 28, 28), ("weight", (32, 32, 3, 3))], lambda x, w: hf.conv2d(x, w, padding=1), lambda x, w: F.conv2d(x, w, padding=1)),
    ]


def layer_run(case, function, dtype, device):
    """A function: one forward and backward."""
    inputs = list(case.make(dtype, device))
    wanted = [t for t in inputs if t.requires_grad]
    with torch.no_grad():
        y = function(*inputs)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) if y.dim() else torch.full_like(y, 1024.0)
    return lambda: torch.autograd.grad(function(*inputs), wanted, upstream)


def product_run(dtype, device, size):
    """A function: one product of two matrices of size x size."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=random).to(device, dtype) for _ in range(2))
    return lambda: a @ b


def step_run(arm, device, parameters):
    """(run, the bytes a parameter that a step moves). run(now) is one step: it returns the seconds of the finite check with the clip norm, and of the update, by the clock `now`."""
    dtype, options = MODES.get(arm, (torch.float32, None))
    random = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(parameters // TENSORS, generator=random).mul_(0.02).to(device, dtype)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(p)
    ours = options is not None
    opt = optim.AdamW(params, max_grad_norm=1.0, **options) if ours else torch.optim.AdamW(params, fused=True)
    scaler = (GradScaler if ours else torch.amp.GradScaler)(device, init_scale=1.0)  # torch's unscales in place: a larger scale would shrink the gradients, which are kept
    scaler.scale(torch.ones(1, device=device))
    if not ours:
        def run(now):
            start = now()
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            middle = now()
            scaler.step(opt)
            scaler.update()
            return middle - start, now() - middle

        return run, 48.0  # unscaling reads and writes 4 bytes, clipping reads 4, then reads and writes 4; AdamW reads 16 and writes 12
    gather, spent = opt._gather_stats, [0.0]

    def gathered(now, *args, **kwargs):
        start = now()
        try:
            return gather(*args, **kwargs)
        finally:
            spent[0] += now() - start

    def run(now):
        spent[0] = 0.0
        opt._gather_stats = lambda *args, **kwargs: gathered(now, *args, **kwargs)
        start = now()
        scaler.step(opt)
        scaler.update()
        return spent[0], now() - start - spent[0]

    return run, float(re.search(r"moves ([\d.]+) bytes", repr(opt))[1])
