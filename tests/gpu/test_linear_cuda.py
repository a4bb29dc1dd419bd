"""linear on the GPU: against FP64 and the CPU, fused against unfused, captured."""

import warnings

import pytest
import torch

import halfstep as hs

H = torch.ops.halfstep
F = torch.nn.functional
ACTIVATIONS = {None: lambda h: h, "relu": torch.relu, "gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh")}
SIXTEEN = [torch.float16, torch.bfloat16]


def operands(device, dtype, rows, k, n, seed=0):
    random = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    return [t.to(dtype).to(device) for t in (make(rows, k), make(n, k) / k**0.5, make(n), make(rows, n))]


def everything(x, w, b, dy, activation, weight_dtype=None):
    y, saved = H.linear_forward(x, w, b, activation)
    return [y, *H.linear_backward(dy, x, w, saved, activation, [True, True, b is not None], weight_dtype or x.dtype, None if b is None else b.dtype)]


def exact(x, w, b, dy, activation):
    leaves = [t.double().cpu().requires_grad_() for t in (x, w, b) if t is not None]
    y = ACTIVATIONS[activation](F.linear(*leaves))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double().cpu())]


def stock(x, w, b, dy, activation):
    leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
    y = ACTIVATIONS[activation](F.linear(*leaves))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def errors(results, expected):
    return [(r.double().cpu() - e).abs().max().item() / max(e.abs().max().item(), 1e-30) for r, e in zip(results, expected)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", SIXTEEN + [torch.float32, torch.float64])
@pytest.mark.parametrize("rows,k,n", [(1, 1, 1), (3, 17, 5), (65, 33, 129), (256, 64, 256), (1000, 136, 264)])
@pytest.mark.parametrize("bias", [True, False])
def test_errors_are_those_of_stock_torch(device, activation, dtype, rows, k, n, bias):
    x, w, b, dy = operands(device, dtype, rows, k, n)
    b = b if bias else None
    want = exact(x, w, b, dy, activation)
    for got, peer in zip(errors(everything(x, w, b, dy, activation), want), errors(stock(x, w, b, dy, activation), want)):
        # In FP32 and FP64 both errors are those of sums in one order or another.
        assert got <= max(1.01 * peer, torch.finfo(dtype).eps * (1 if dtype in SIXTEEN else 32))


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", None])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_fused_equals_unfused_within_one_ulp_of_the_largest(device, activation, dtype):
    x, w, b, dy = operands(device, dtype, 512, 256, 1024)
    fused = everything(x, w, b, dy, activation)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch warns of its own products without CUBLAS_WORKSPACE_CONFIG
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unfused = everything(x, w, b, dy, activation)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, e in zip(fused, unfused):
        assert (a.double() - e.double()).abs().max() <= torch.finfo(dtype).eps * e.double().abs().max() * 2
    assert all(torch.equal(a, e) for a, e in zip(fused, everything(x, w, b, dy, activation)))  # chosen once


def test_cublaslts_mask_has_our_layout(device):
    """Where RELU_AUX_BIAS is chosen its bits are read by our backward, so they must mean the same."""
    x, w, b, _ = operands(device, torch.float16, 384, 128, 520)
    y, mask = H.linear_forward(x, w, b, "relu")
    bits = ((mask.cpu().unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(384, -1)[:, :520].bool()
    assert torch.equal(bits, y.cpu() > 0)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_weight_gradients_in_fp32(device, dtype):
    x, w, b, dy = operands(device, dtype, 300, 72, 40)
    want = exact(x, w, b, dy, None)[2]
    got = everything(x, w, b, dy, None, torch.float32)[2]
    assert got.dtype == torch.float32 and (got.double().cpu() - want).abs().max() <= 1e-5 * want.abs().max()
    into = torch.ones(40, 72, device=device)
    H.linear_wgrad_(into, dy, x)
    assert (into.double().cpu() - 1 - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_device_agrees_with_the_cpu(device):
    for activation in ACTIVATIONS:
        given = operands("cpu", torch.float16, 130, 48, 72)
        host = everything(*given, activation)
        ours = everything(*[t.to(device) for t in given], activation)
        for a, e in zip(ours, host):
            assert (a.cpu().double() - e.double()).abs().max() <= 2 * torch.finfo(torch.float16).eps * e.double().abs().max()


@pytest.mark.needs_gpu
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_step_can_be_captured_and_replayed(device, activation, warm):
    rows = 256 + 8 * warm + 16 * list(ACTIVATIONS).index(activation)  # problems that are new where they should be
    x, w, b, dy = operands(device, torch.float16, rows, 64, 128)
    if warm:
        everything(x, w, b, dy, activation)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.mm(x, w.t())  # cuBLAS makes its workspace
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = everything(x, w, b, dy, activation)
    for seed in range(3):
        fresh = operands(device, torch.float16, rows, 64, 128, seed + 1)
        for to, value in zip((x, w, b, dy), fresh):
            to.copy_(value)
        graph.replay()
        want = exact(*fresh, activation)
        assert max(errors(results, want)) <= 4e-3
