"""A scale for gradients in the middle of a graph."""

import torch

from .._library import H


def scale_gradient(x, scale):
    """x, with a gradient that is multiplied by `scale` on its way back.

    The product is formed in FP32 (FP64 for FP64) and rounded once to the gradient's dtype. `scale`: a number, or one
    floating-point element on x's device, which is read there: a graph that was captured or compiled follows its contents.
    """
    if not isinstance(scale, torch.Tensor):
        scale = torch.full((), float(scale), dtype=torch.float64, device=x.device)
    return H.scale_gradient(x, scale)
