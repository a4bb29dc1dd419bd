"""Softmax of attention scores, causal and masked, and rotary embeddings."""

import torch

import halfstep as hs
from layers import Case


def scores(batch, heads, length):
    def inputs(dtype):
        triangle = torch.ones(length, length, dtype=torch.bool).tril()
        keep = torch.rand(batch, 1, 1, length) > 0.2
        return torch.randn(batch, heads, length, length).to(dtype).requires_grad_(), triangle, keep

    return inputs


def stock_causal(x, triangle, keep):
    return torch.softmax((x * 0.125).masked_fill(~triangle, -float("inf")), -1)


def stock_masked(x, triangle, keep):
    return torch.softmax((x * 0.125).masked_fill(~keep, -float("inf")), -1)


def heads(dtype):
    angles = torch.outer(torch.arange(256.0), 10000.0 ** (-torch.arange(32.0) / 32))
    return torch.randn(8, 256, 4, 64).to(dtype).requires_grad_(), angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def stock_rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


CASES = []
for shape in ((8, 4, 256), (8, 8, 512)):
    size = " x ".join(map(str, (*shape, shape[-1])))
    CASES += [Case(f"softmax {size}", scores(*shape), lambda x, t, k: hs.functional.softmax(x, scale=0.125), lambda x, t, k: torch.softmax(x * 0.125, -1)),
              Case(f"softmax causal {size}", scores(*shape), lambda x, t, k: hs.functional.softmax(x, scale=0.125, causal=True), stock_causal),
              Case(f"softmax masked {size}", scores(*shape), lambda x, t, k: hs.functional.softmax(x, scale=0.125, mask=k), stock_masked)]
CASES.append(Case("rope 8 x 256 x 4 x 64", heads, lambda x, c, s: hs.functional.rope(x, c, s), stock_rope))
CASES.append(Case("rope interleaved 8 x 256 x 4 x 64", heads, lambda x, c, s: hs.functional.rope(x, c, s, interleaved=True),
                  lambda x, c, s: torch.stack([x[..., ::2] * c.to(x.dtype) - x[..., 1::2] * s.to(x.dtype), x[..., 1::2] * c.to(x.dtype) + x[..., ::2] * s.to(x.dtype)], -1).flatten(-2)))
