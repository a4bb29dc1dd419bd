"""LayerNorm and RMSNorm, with a residual stream that is added on the way in and handed on."""

import torch

from .._library import H


def _shape(normalized_shape):
    return [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, residual=None):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimensions, `normalized_shape` (an int, or ints).

    x: float16, bfloat16, float32 or float64, any layout; the result has its shape and dtype. weight, bias: of normalized_shape, in x's dtype or
    float32. Computed in FP32 (FP64 for FP64) and rounded once. With `residual` (x's shape; any of the three 16- and 32-bit dtypes, its own) the
    result is (y, new_residual): new_residual = x + residual in the residual's dtype, and y is formed of it. A backward is one op, differentiable once.
    """
    y, new_residual, _, _ = H.layer_norm(x, _shape(normalized_shape), weight, bias, eps, residual)
    return y if residual is None else (y, new_residual)


def rms_norm(x, normalized_shape, weight=None, eps=None, residual=None, weight_offset=0.0):
    """x / sqrt(mean of x^2 + eps) * (weight + weight_offset) over the last dimensions; dtypes, residual and result as in `layer_norm`.

    eps: torch.finfo(x.dtype).eps unless given, as in torch.nn.functional.rms_norm. weight_offset: 1.0 for weights that are stored around zero.
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y, new_residual, _ = H.rms_norm(x, _shape(normalized_shape), weight, eps, weight_offset, residual)
    return y if residual is None else (y, new_residual)
