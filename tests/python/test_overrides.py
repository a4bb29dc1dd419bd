"""FP16 linear, matmul and convolution on the CPU: one rounding of the FP32 result, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

import halfstep as hs

pytestmark = [pytest.mark.overrides, pytest.mark.smoke]


def close(ours, exact, dtype, terms):
    """One rounding to the output dtype plus an FP32 accumulation of `terms`."""
    eps = torch.finfo(dtype).eps
    scale = exact.abs().max().clamp(min=1e-3)
    assert (ours.double() - exact).abs().max() <= scale * (eps + terms * 1.2e-7), (ours.double() - exact).abs().max()


def both(f, inputs, dtype):
    """f in `dtype` and in FP64 from the same 16-bit values: outputs and gradients, with an incoming gradient in `dtype`."""
    half = [x.to(dtype).requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in half]
    y, z = f(*half), f(*wide)
    assert y.dtype == dtype and y.shape == z.shape
    g = torch.randn(z.shape).to(dtype)
    return (y, *torch.autograd.grad(y, half, g)), (z, *torch.autograd.grad(z, wide, g.double()))


LINEAR = [((5, 7), (3, 7)), ((2, 4, 16), (8, 16)), ((0, 7), (3, 7)), ((7,), (3, 7))]
MATMUL = [((4, 5), (5, 6)), ((2, 3, 4, 5), (5, 6)), ((3, 1, 4, 5), (2, 5, 6)), ((5,), (5, 6)), ((4, 5), (5,)), ((5,), (5,)), ((2, 4, 5), (5,)), ((5,), (2, 5, 6))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear(dtype):
    for x, w in LINEAR:
        for bias in ([torch.randn(w[0])], []):
            for ours, exact in zip(*both(F.linear, [torch.randn(x), torch.randn(w)] + bias, dtype)):
                if exact.numel():
                    close(ours, exact, dtype, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matmul(dtype):
    for a, b in MATMUL:
        for ours, exact in zip(*both(torch.matmul, [torch.randn(a), torch.randn(b)], dtype)):
            close(ours, exact, dtype, 64)


CONVS = [
    (F.conv1d, (2, 4, 20), (6, 4, 3), {}),
    (F.conv2d, (2, 4, 9, 9), (6, 4, 3, 3), dict(padding=1)),
    (F.conv2d, (2, 4, 9, 9), (6, 2, 3, 3), dict(groups=2, stride=2)),
    (F.conv2d, (2, 4, 9, 9), (6, 4, 3, 3), dict(dilation=2)),
    (F.conv3d, (1, 2, 5, 5, 5), (3, 2, 3, 3, 3), {}),
    (F.conv_transpose2d, (2, 4, 5, 5), (4, 3, 3, 3), dict(stride=2, output_padding=1)),
]


@pytest.mark.parametrize("case", range(len(CONVS)))
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution(case, channels_last):
    f, x, w, kw = CONVS[case]
    out = w[1] * kw.get("groups", 1) if f is F.conv_transpose2d else w[0]
    xs = torch.randn(x)
    if channels_last and xs.dim() == 4:
        xs = xs.to(memory_format=torch.channels_last)
    for ours, exact in zip(*both(lambda *t: f(*t, **kw), [xs, torch.randn(w), torch.randn(out)], torch.float16)):
        close(ours, exact, torch.float16, 512)


def test_other_dtypes_and_switching_off_are_the_stock_kernels():
    x, w, b = torch.randn(16, 32), torch.randn(8, 32), torch.randn(8)
    i, k = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    on = [F.linear(x, w, b), x @ w.t(), F.conv2d(i, k)]
    try:
        hs.set_overrides(False)
        off = [F.linear(x, w, b), x @ w.t(), F.conv2d(i, k)]
    finally:
        hs.set_overrides(True)
    assert all(torch.equal(a, c) for a, c in zip(on, off))


def test_second_derivative_inference_and_no_grad():
    x = torch.randn(4, 5, dtype=torch.float16, requires_grad=True)
    w = torch.randn(3, 5, dtype=torch.float16, requires_grad=True)
    (g,) = torch.autograd.grad(F.linear(x, w).float().square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.float().sum(), w)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    (h,) = torch.autograd.grad(F.linear(*wide).square().sum(), wide[0], create_graph=True)
    (exact,) = torch.autograd.grad(h.sum(), wide[1])
    close(second, exact, torch.float16, 5000)  # three FP16 roundings stand between
    with torch.no_grad():
        a = F.linear(x, w)
    with torch.inference_mode():
        b = F.linear(x.detach().clone(), w.detach().clone())
    assert torch.equal(a, b.clone())


def test_autocast_takes_them():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10))
    with hs.autocast("cpu"):
        y = net(torch.randn(2, 1, 8, 8))
    assert y.dtype == torch.float16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
