"""Quantization-aware training of an arm: layers that compute with weights, and inputs, rounded to int8 or int4 (docs/compare.md)."""

import torch

GROUP = 32  # weights under one scale of w4
KINDS = {"w8": (8, False), "w8a8": (8, True), "w4": (4, False)}  # bits of a weight, and whether inputs are rounded to int8
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


class _StraightThrough(torch.autograd.Function):
    """round() in the forward; the gradient passes as if it were not there (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx, x, bits):
        return _rounded(x, bits)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _rounded(rows, bits):
    """Rows [n, k] on the grid code * scale, |code| <= 2^(bits-1) - 1, scale = the row's largest magnitude over that: nothing is
    clipped. Computed in FP32 (FP64) and rounded once to the dtype of `rows`; a row with inf or NaN is NaN, so the scaler sees it."""
    x = rows.to(torch.promote_types(rows.dtype, torch.float32))
    top = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / top).clamp_min(torch.finfo(x.dtype).tiny)
    return (torch.round(x * scale.reciprocal()).clamp(-top, top) * scale).to(rows.dtype)


def fake_quantize(x, bits, group=None):
    """x[n, …] with one scale an index of the first dimension, or one for each `group` elements of the rest, in memory order."""
    if x.numel() == 0:
        return x
    rows = x.reshape(x.shape[0], -1)
    if group is None:
        return _StraightThrough.apply(rows, bits).reshape(x.shape)
    length = rows.shape[1]
    padded = torch.nn.functional.pad(rows, (0, -length % group))
    return _StraightThrough.apply(padded.reshape(-1, group), bits).reshape(padded.shape)[:, :length].reshape(x.shape)


class Quantized:
    """The forward of a layer whose weight is rounded on the way in. The parameter itself, its names and its state dict stay as they are."""

    def __init__(self, module, kind):
        self.module, self.inner = module, module.forward
        self.bits, self.inputs = KINDS[kind]

    def __call__(self, x, *args, **kwargs):
        weight = self.module._parameters["weight"]
        if self.inputs and x.is_floating_point():
            x = fake_quantize(x.reshape(-1, x.shape[-1]), 8).reshape(x.shape) if isinstance(self.module, torch.nn.Linear) else fake_quantize(x, 8)
        self.module._parameters["weight"] = fake_quantize(weight, self.bits, None if self.bits == 8 else GROUP)
        try:
            return self.inner(x, *args, **kwargs)
        finally:
            self.module._parameters["weight"] = weight


def quantize_(model, kind):
    """Every Linear and convolution of `model` computes with rounded weights from now on; returns their names."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]
    if not found:
        raise ValueError(f"qat={kind}: the model has no Linear and no convolution")
    for _, module in found:
        module.forward = Quantized(module, kind)
    return [name for name, _ in found]
