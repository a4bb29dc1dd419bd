"""Softmax with its scale and masks, rounded once."""

from .._library import H


def softmax(x, dim=-1, scale=1.0, mask=None, causal=False):
    """softmax(scale * x + mask) along `dim`, computed in FP32 (FP64 for FP64) and rounded once to x's dtype.

    x: FP16, BF16, FP32 or FP64, any shape, any length. mask, broadcast to x's shape and never expanded in memory: bool, where True
    takes part; or of a floating dtype, added after the scale, where -inf takes no part. causal: x is [..., queries, keys] and query i
    sees the keys 0 … i (top left, as in torch's scaled_dot_product_attention); with dim=-1 only. Both may be given.

    What takes no part is an exact zero and is not looked at, be it NaN. A row of which nothing takes part is zeros, and so is its
    gradient. Otherwise as in torch: NaN or +inf in a row make it NaN, and so does -inf in all of it. The backward keeps the result only; it is
    differentiable as often as one likes. A floating mask gets a gradient. Under autocast x keeps its dtype.
    """
    return H.softmax(x, dim, float(scale), mask, causal)
