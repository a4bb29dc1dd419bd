"""Activations, gated units and bias_dropout_add on the GPU: the bits of the CPU (in FP64, whose exp is the platform's, to the last places)."""

import pytest
import torch

import halfstep as hs

H, hf = torch.ops.halfstep, hs.functional
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def same(ours, host):
    if host.dtype == torch.float64:
        return torch.allclose(ours.cpu(), host, rtol=1e-14, atol=1e-300, equal_nan=True)
    return torch.equal(ours.cpu().nan_to_num(123.0, 456.0, -456.0), host.nan_to_num(123.0, 456.0, -456.0))


def numbers(dtype, *shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4
    x.view(-1)[::97] = float("inf")
    x.view(-1)[::89] = 6e4
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bits_of_the_cpu(device, dtype):
    for shape in ((300, 1024), (7, 13), (70_001,), (1,), (0, 4)):
        g, u, d = (numbers(dtype, *shape, seed=s) for s in range(3))
        a, b, c = (t.to(device) for t in (g, u, d))
        for form in ("none", "tanh"):
            assert same(H.gelu(a, approximate=form), H.gelu(g, approximate=form)) and same(H.geglu(a, b, approximate=form), H.geglu(g, u, approximate=form))
            assert same(H.gelu_backward(c, a, approximate=form), H.gelu_backward(d, g, approximate=form))
        for name in ("silu", "squared_relu"):
            assert same(getattr(H, name)(a), getattr(H, name)(g)) and same(getattr(H, name + "_backward")(c, a), getattr(H, name + "_backward")(d, g))
        assert same(H.swiglu(a, b), H.swiglu(g, u)) and all(map(same, H.swiglu_backward(c, a, b), H.swiglu_backward(d, g, u)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_operands_and_counts(device, dtype):
    x = numbers(dtype, 65, 2 * 40)
    y = x.to(device)
    assert same(hf.swiglu(y), hf.swiglu(x)) and same(hf.swiglu(y.t().contiguous().t()), hf.swiglu(x))
    assert same(hf.swiglu(*y[:, 1:79].chunk(2, -1)), hf.swiglu(*x[:, 1:79].chunk(2, -1)))
    counts = []
    for t in (x, y):
        module = hs.nn.SwiGLU(count_overflow=True).to(t.device)
        module(t)
        counts.append(module.overflowed.item())
    assert counts[0] == counts[1] and (dtype != torch.float16 or counts[0] > 0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_draws_the_mask_of_the_cpu(device, dtype, p):
    for shape in ((300, 1024), (131, 13), (3, 64)):
        x, r, d = (torch.randn(shape, generator=torch.Generator().manual_seed(s)).to(dtype) for s in range(3))
        bias, seed = x[0] * 2, torch.tensor([2**61, 2**33 + 1])
        on = [t.to(device) for t in (x, bias, r, d, seed)]
        assert same(H.bias_dropout_add(on[0], on[1], on[2], p, on[4]), H.bias_dropout_add(x, bias, r, p, seed))
        ours, host = H.bias_dropout_add_backward(on[3], p, on[4], True), H.bias_dropout_add_backward(d, p, seed, True)
        assert torch.equal(ours[0].cpu(), host[0]) and torch.equal(ours[1].cpu(), host[1])
        assert torch.equal(H.bias_dropout_add_backward(on[3], p, on[4])[0].cpu(), host[0])


@pytest.mark.needs_gpu
def test_a_captured_graph_follows_its_seed(device):
    x, residual = torch.ones(64, 64, device=device), torch.zeros(64, 64, device=device)
    seed = torch.tensor([1, 2], device=device)
    hf.bias_dropout_add(x, None, residual, 0.5, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hf.bias_dropout_add(x, None, residual, 0.5, seed=seed)
    for key in (1, 5, 9):
        seed[0] = key
        graph.replay()
        assert torch.equal(y, hf.bias_dropout_add(x, None, residual, 0.5, seed=seed))
