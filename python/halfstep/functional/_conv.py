"""Convolutions of 1 to 3 dimensions, plain and transposed."""

import torch

from .._library import H


def _entries(value, dims):
    return [value] * dims if isinstance(value, int) else list(value) * dims if len(value) == 1 else list(value)


def _batched(dims, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    """One sample without a batch dimension is a batch of one."""
    one = x.dim() == dims + 1
    settings = [_entries(v, dims) for v in (stride, padding, dilation)]
    y = H.convolution(x.unsqueeze(0) if one else x, weight, bias, *settings, transposed, _entries(output_padding, dims), groups)
    return y.squeeze(0) if one else y


def _plain(name, dims, x, weight, bias, stride, padding, dilation, groups):
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(f"{name}: padding is {padding!r}; expected numbers, 'valid' or 'same'")
        if padding == "same" and any(s != 1 for s in _entries(stride, dims)):
            raise ValueError(f"{name}: padding is 'same' but stride is {stride}; expected 1")
        total = [0] * dims if padding == "valid" else [d * (k - 1) for d, k in zip(_entries(dilation, dims), weight.shape[2:])]
        if any(t % 2 for t in total):  # one more behind than in front, as in torch
            x = torch.nn.functional.pad(x, [n for t in reversed(total) for n in (0, t % 2)])
        padding = [t // 2 for t in total]
    return _batched(dims, x, weight, bias, stride, padding, dilation, False, 0, groups)


def conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """torch.nn.functional.conv1d with one rounding on the CPU: input [N, C, L] or [C, L], weight [O, C / groups, K], bias [O].

    input and weight: one of float16, bfloat16, float32, float64; bias: that or float32, added before the rounding. padding:
    numbers, "valid" or "same". Differentiable any number of times. On a GPU torch's own kernel computes.
    """
    return _plain("conv1d", 1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """conv1d in two dimensions: input [N, C, H, W] or [C, H, W], weight [O, C / groups, Kh, Kw]; channels_last stays channels_last."""
    return _plain("conv2d", 2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """conv1d in three dimensions: input [N, C, D, H, W] or [C, D, H, W]; channels_last_3d stays channels_last_3d."""
    return _plain("conv3d", 3, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """torch.nn.functional.conv_transpose1d, as conv1d: input [N, C, L] or [C, L], weight [C, O / groups, K], bias [O]."""
    return _batched(1, input, weight, bias, stride, padding, dilation, True, output_padding, groups)


def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """conv_transpose1d in two dimensions."""
    return _batched(2, input, weight, bias, stride, padding, dilation, True, output_padding, groups)


def conv_transpose3d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """conv_transpose1d in three dimensions."""
    return _batched(3, input, weight, bias, stride, padding, dilation, True, output_padding, groups)
