"""Rotary position embedding (Su et al., arXiv 2104.09864)."""

from .._library import H


def rope(x, cos, sin, interleaved=False):
    """Turns pairs of the last dimension of x by an angle each: (a, b) to (a cos - b sin, b cos + a sin).

    x: [..., dim], FP16, BF16, FP32 or FP64. cos, sin: [..., pairs], any floating dtype (FP32 tables keep the angles exact), broadcast to
    x's shape but for the last dimension: [seq, pairs] for x [..., seq, dim]; [seq, 1, pairs] for x [..., seq, heads, dim]. Pair i is
    elements i and pairs + i, or with `interleaved` 2i and 2i + 1; what lies after the 2 * pairs first elements passes unchanged.

    Computed in FP32 (FP64 for FP64), rounded once. The backward turns by the negative angle; cos and sin get no gradient.
    torch.ops.halfstep.rope_(x, cos, sin, interleaved, False) does the same in place.
    """
    return H.rope(x, cos, sin, interleaved, False)
