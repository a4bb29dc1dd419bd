"""Softmax and rope on the GPU against the CPU: rope to the bit, softmax to 1 ULP of 16 bits and 4 of FP32."""

import pytest
import torch

import halfstep as hs

FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def close(a, b, dtype):
    a, b, info = a.cpu().double(), b.cpu().double(), torch.finfo(dtype)
    assert torch.equal(a.isnan(), b.isnan())
    unit = torch.exp2(torch.floor(torch.log2(b.abs().clamp(min=info.smallest_normal)))) * info.eps
    return ((a - b).abs().nan_to_num(0) <= (4 if dtype == torch.float32 else 1) * unit).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [1, 7, 256, 257, 1024, 1500, 8192, 8193, 131072])
def test_softmax(device, dtype, length):
    generator = torch.Generator().manual_seed(length)
    x = (2 * torch.randn(2, 3, 5, length, generator=generator)).to(dtype)
    dy = torch.randn(x.shape, generator=generator).to(dtype)
    keep = torch.rand(3, 1, length, generator=generator) > 0.3
    bias = torch.randn(5, length, generator=generator).half()
    for kw in (dict(), dict(scale=-0.5), dict(mask=keep, causal=True), dict(mask=bias), dict(mask=bias.float().t().contiguous().t())):
        there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
        y = hs.functional.softmax(x.to(device), **there)
        assert close(y, hs.functional.softmax(x, **kw), dtype)
        causal, scale = kw.get("causal", False), kw.get("scale", 1.0)
        dx = torch.ops.halfstep.softmax_backward(dy.to(device), y, -1, scale, causal).cpu().double()
        want = torch.ops.halfstep.softmax_backward(dy, y.cpu(), -1, scale, causal).double()
        assert ((dx - want).abs() <= 2 * torch.finfo(dtype).eps * want.abs() + 1e-5 * y.cpu().double() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps).all()


def test_softmax_is_deterministic(device):
    x = torch.randn(64, 3000, device=device).half()
    first = hs.functional.softmax(x)
    assert all(torch.equal(hs.functional.softmax(x), first) for _ in range(100))


@pytest.mark.parametrize("dtype", FLOATS + [torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(device, dtype, interleaved):
    for pairs, width in ((32, 64), (5, 13), (16, 80)):
        x, angles = torch.randn(2, 4, 33, width).to(dtype), torch.randn(33, pairs)
        cos, sin = angles.cos(), angles.sin()
        want = hs.functional.rope(x, cos, sin, interleaved)
        y = x.to(device)
        assert torch.equal(hs.functional.rope(y, cos.to(device), sin.to(device), interleaved).cpu(), want)
        torch.ops.halfstep.rope_(y, cos.to(device), sin.to(device), interleaved, False)
        assert torch.equal(y.cpu(), want)
