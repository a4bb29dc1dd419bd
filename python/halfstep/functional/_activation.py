"""Activations, gated units, and bias + dropout + residual add."""

import torch

from .._library import H


def gelu(x, approximate="none"):
    """x Φ(x), Φ the normal distribution (Hendrycks and Gimpel, arXiv 1606.08415); "tanh": their approximation of it.

    Any shape and layout; float16, bfloat16, float32, float64. Computed in FP32 (FP64 for FP64), rounded once.
    """
    return H.gelu(x, approximate=approximate)


def silu(x):
    """x / (1 + exp(-x)); shapes and dtypes as in gelu."""
    return H.silu(x)


def squared_relu(x):
    """max(x, 0)² (So et al., arXiv 2109.08668); shapes and dtypes as in gelu."""
    return H.squared_relu(x)


def swiglu(gate, up=None, overflowed=None):
    """silu(gate) · up (Shazeer, arXiv 2002.05202), the product in FP32 (FP64 for FP64) and rounded once.

    gate, up: one shape, dtype and device; views of a wider tensor are read in place. Without `up`, gate is [..., 2F] with gate
    and up side by side, and the result [..., F]. `overflowed`: one int64 element beside gate, which grows by the number of
    results that left the dtype's range although gate and up are finite.
    """
    if overflowed is None:
        return H.swiglu(gate, up)
    return H.swiglu_counted(gate, up, overflowed)


def geglu(gate, up=None, approximate="none", overflowed=None):
    """gelu(gate) · up; approximate as in gelu, the rest as in swiglu."""
    if overflowed is None:
        return H.geglu(gate, up, approximate=approximate)
    return H.geglu_counted(gate, up, overflowed, approximate=approximate)


def bias_dropout_add(x, bias, residual, p=0.5, training=True, seed=None):
    """residual + dropout(x + bias), in FP32 (FP64 for FP64) and rounded once.

    x, residual: one shape and dtype. bias: None or [F], F the last dimension of x. p: the probability that an element is
    dropped; the others are divided by 1 - p. training=False: nothing is dropped.

    `seed`: int64 [2] on x's device, key and offset of Philox4x32-10. The mask depends on it and on the place of an element in
    row-major order only: not on device, threads or layout. It is drawn anew in the backward, so nothing but the seed is kept;
    do not write it in between. None: torch's generator of the device gives one, so torch.manual_seed repeats the mask.
    """
    p = float(p) if training else 0.0
    if seed is None and 0.0 < p < 1.0:
        seed = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
    return H.bias_dropout_add(x, bias, residual, p, seed)
