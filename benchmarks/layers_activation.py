"""Activations, gated units and bias + dropout + residual add, forward and backward."""

import torch
import torch.nn.functional as F
from layers import Case

import halfstep as hs

hf = hs.functional


def tensors(count, *shape):
    return lambda dtype: [torch.randn(shape).to(dtype).requires_grad_() for _ in range(count)]


def dropout(dtype):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in ((2048, 1024), (1024,), (2048, 1024))]


CASES = [case for width in (1024, 4096) for case in (
    Case(f"swiglu 2048 x {width}", tensors(2, 2048, width), hf.swiglu, lambda g, u: F.silu(g) * u),
    Case(f"swiglu of one tensor 2048 x 2 x {width}", tensors(1, 2048, 2 * width), hf.swiglu, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
    Case(f"geglu 2048 x {width}", tensors(2, 2048, width), hf.geglu, lambda g, u: F.gelu(g) * u),
    Case(f"gelu 2048 x {width}", tensors(1, 2048, width), hf.gelu, F.gelu),
    Case(f"gelu tanh 2048 x {width}", tensors(1, 2048, width), lambda x: hf.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    Case(f"silu 2048 x {width}", tensors(1, 2048, width), hf.silu, F.silu),
    Case(f"squared relu 2048 x {width}", tensors(1, 2048, width), hf.squared_relu, lambda x: F.relu(x).square()),
)] + [Case("bias dropout add 2048 x 1024", dropout, lambda x, b, r: hf.bias_dropout_add(x, b, r, 0.1), lambda x, b, r: r + F.dropout(x + b, 0.1))]
