"""FP16 layers that go through FP32 on the CPU: results and gradients are the FP32 kernel's rounded once, and other dtypes are the stock kernels'."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfstep as hs
from layers import check_refused_alike

pytestmark = [pytest.mark.overrides, pytest.mark.smoke]
H = torch.float16


def r(*shape):
    return torch.randn(shape)


def grid(n, h, w):
    return torch.rand(n, h, w, 2) * 2.2 - 1.1


# Functions of which each is one stock op, so that FP16 is FP32 rounded once, gradients included. (function, inputs)
ONE_OP = {
    "group norm": (lambda x, w, b: F.group_norm(x, 4, w, b), lambda: [r(6, 8, 5, 7), r(8), r(8)]),
    "group norm without weight": (lambda x: F.group_norm(x, 2), lambda: [r(3, 4, 9)]),
    "group norm in parts": (lambda x, w, b: F.group_norm(x, 4, w, b), lambda: [r(9, 8, 40, 90), r(8), r(8)]),
    "group norm of large samples": (lambda x, w, b: F.group_norm(x, 4, w, b), lambda: [r(2, 8, 190, 190), r(8), r(8)]),
    "group norm of volumes": (lambda x, w, b: F.group_norm(x, 3, w, b), lambda: [r(3, 6, 4, 5, 6), r(6), r(6)]),
    "group norm far from zero": (lambda x, w, b: F.group_norm(x, 2, w, b), lambda: [r(4, 4, 70) + 30, r(4), r(4)]),
    "group norm of short runs": (lambda x, w, b: F.group_norm(x, 2, w, b), lambda: [r(4, 6, 3, 5), r(6), r(6)]),
    "group norm of channels last": (lambda x, w, b: F.group_norm(x.contiguous(memory_format=torch.channels_last), 2, w, b), lambda: [r(4, 6, 9, 8), r(6), r(6)]),
    "max over rows": (lambda x: x.max(-1).values, lambda: [r(90, 700)]),
    "min in between": (lambda x: x.min(1, keepdim=True).values, lambda: [r(30, 40, 50)]),
    "unfold": (lambda x: F.unfold(x, 3, padding=1), lambda: [r(5, 4, 30, 40)]),
    "fold": (lambda x: F.fold(x, (12, 9), 3, stride=3), lambda: [r(2, 36, 12)]),
    "grid_sample": (lambda x, g: F.grid_sample(x, g, align_corners=False), lambda: [r(3, 4, 20, 30), grid(3, 11, 13)]),
    "grid_sample nearest": (lambda x, g: F.grid_sample(x, g, "nearest", "border", False), lambda: [r(40, 4, 30, 30), grid(40, 30, 30)]),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2, 2, 1), lambda: [r(3, 4, 6, 7, 8)]),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (3, 5)), lambda: [r(40, 6, 30, 31)]),
    "mean over rows": (lambda x: x.mean(-1), lambda: [r(70, 3000)]),
    "mean over columns": (lambda x: x.mean(0, keepdim=True), lambda: [r(700, 300)]),
    "mean of all": (lambda x: x.mean(), lambda: [r(700, 300)]),
    "mean over pixels": (lambda x: x.mean((2, 3)), lambda: [r(5, 3, 30, 40)]),
}
# Functions whose backward is several ops or reads the rounded output: the output is FP32 rounded once, gradients are near.
SEVERAL = {
    "norm over rows": (lambda x: torch.linalg.vector_norm(x, dim=-1), lambda: [r(300, 500)]),
    "largest over rows": (lambda x: torch.linalg.vector_norm(x, float("inf"), dim=-1), lambda: [r(300, 500)]),
    "pow": (lambda x: x.pow(3), lambda: [r(50, 400)]),
    "power 2.5": (lambda x: x.abs().pow(2.5), lambda: [r(50, 400)]),
    "tanh": (torch.tanh, lambda: [r(50, 400)]),
    "tanh in place": (lambda x: (x + 0).tanh_(), lambda: [r(50, 400)]),
    "square": (torch.square, lambda: [r(50, 400)]),
}
EMBEDDING = {mode: (lambda w, mode=mode: F.embedding_bag(torch.arange(600).view(60, 10) * 7 % 50, w, mode=mode), lambda: [r(50, 40)]) for mode in ("sum", "mean")}


def compare(f, make, exact):
    """exact: how many of the output and the gradients, in this order, are FP32 rounded once to the bit; the others are near."""
    torch.manual_seed(0)
    half = [t.to(H).requires_grad_() for t in make()]
    wide = [t.detach().float().requires_grad_() for t in half]
    y, z = f(*half), f(*wide)
    g = torch.randn(z.shape).to(H)
    assert y.dtype == H and y.stride() == z.stride()
    for i, (a, b) in enumerate(zip((y, *torch.autograd.grad(y, half, g)), (z, *torch.autograd.grad(z, wide, g.float())))):
        assert a.dtype == H and a.shape == b.shape
        if i < exact:
            assert torch.equal(a, b.to(H)), (i, (a.float() - b).abs().max())
        else:
            assert (a.float() - b).abs().max() <= 2e-3 * b.abs().max() + 1e-6, i


@pytest.mark.parametrize("name", ONE_OP)
def test_one_rounding(name):
    compare(*ONE_OP[name], exact=0 if "norm" in name or "mean" in name else 3)  # those sum in another order, or save 16-bit statistics


@pytest.mark.parametrize("name", SEVERAL)
def test_output_is_rounded_once(name):
    compare(*SEVERAL[name], exact=1)


@pytest.mark.parametrize("name", EMBEDDING)
def test_embedding_bag(name):
    compare(*EMBEDDING[name], exact=0)


def test_largest_and_smallest_are_found_where_torch_finds_them():
    x = torch.randint(-3, 4, (300, 200)).half()  # ties
    x[5, 7], x[5, 100], x[6, 3] = float("nan"), float("nan"), float("inf")
    x[7], x[8], x[9] = float("-inf"), float("inf"), -0.0
    for f, n in ((f, n) for f in (torch.max, torch.min) for n in (1, 15, 16, 37, 200)):
        part = x[:, :n].contiguous()
        ours, wide = f(part, -1), f(part.float(), -1)
        assert ours.values.dtype == H and ours.indices.dtype == torch.int64 and type(ours).__name__ == f.__name__
        assert torch.equal(ours.indices, wide.indices) and torch.equal(ours.values.float().nan_to_num(9e3), wide.values.nan_to_num(9e3))
        kept = f(part.view(3, 100, n), 2, keepdim=True)
        assert kept.values.shape == kept.indices.shape == (3, 100, 1) and torch.equal(kept.indices.flatten(), ours.indices)


def test_a_sample_of_group_norm_does_not_depend_on_the_others():
    torch.manual_seed(0)
    x, w, b, g = r(9, 8, 6, 7).to(H).requires_grad_(), r(8).to(H), r(8).to(H), r(9, 8, 6, 7).to(H)
    whole = F.group_norm(x, 4, w, b)
    dx, = torch.autograd.grad(whole, x, g)
    for i in range(9):
        part = x[i : i + 1].detach().requires_grad_()
        y = F.group_norm(part, 4, w, b)
        assert torch.equal(y[0], whole[i]) and torch.equal(torch.autograd.grad(y, part, g[i : i + 1])[0][0], dx[i])


def test_group_norm_passes_what_is_not_finite_on_in_its_group_alone():
    x = r(2, 4, 5, 5).to(H)
    x[0, 1, 2, 3], x[1, 2, 0, 0] = float("nan"), float("inf")
    y = F.group_norm(x, 2)
    assert y[0, :2].isnan().all() and y[0, 2:].isfinite().all() and y[1, :2].isfinite().all() and y[1, 2:].isnan().any()


@pytest.mark.parametrize("name", [*ONE_OP, *SEVERAL])
def test_never_less_accurate_than_stock(name):
    f, make = {**ONE_OP, **SEVERAL}[name]
    torch.manual_seed(0)
    inputs = make()

    def errors():
        half = [t.to(H).requires_grad_() for t in inputs]
        exact = [t.detach().double().requires_grad_() for t in half]
        y, z = f(*half), f(*exact)
        g = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(H)
        return [(a.double() - b).norm() for a, b in zip((y, *torch.autograd.grad(y, half, g)), (z, *torch.autograd.grad(z, exact, g.double())))]

    ours = errors()
    try:
        hs.set_overrides(False)
        stock = errors()
    except RuntimeError:  # avg_pool3d
        stock = None
    finally:
        hs.set_overrides(True)
    assert (stock is None) == (name == "avg_pool3d")
    for a, b in zip(ours, stock or ours):
        assert a <= 1.02 * b + 1e-9


def test_the_mean_of_large_values_does_not_overflow():
    assert torch.full((300, 400), 6e4).half().mean() == 6e4 and torch.full((300, 400), 6e4).half().mean(0)[0] == 6e4


def test_non_finite_values_stay():
    x = torch.zeros(8, 300).half()
    x[1, 2], x[3, 4], x[5, 6] = float("nan"), float("inf"), -float("inf")
    assert x.mean(-1).isnan().nonzero().tolist() == [[1]] and x.mean(-1)[3] == float("inf")
    assert x.tanh()[5, 6] == -1 and x.tanh()[1, 2].isnan() and x.pow(2)[5, 6] == float("inf")
    assert torch.linalg.vector_norm(x, dim=-1)[1].isnan()
    assert (torch.full((4, 1000), 300.0).half().pow(2) == float("inf")).all()  # 90,000 does not fit


# ---- LSTM -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kw", [{}, dict(num_layers=2, bidirectional=True), dict(bias=False, batch_first=True), dict(proj_size=3)])
def test_lstm(kw):
    torch.manual_seed(0)
    net = nn.LSTM(6, 5, **kw).half()
    wide = nn.LSTM(6, 5, **kw)
    wide.load_state_dict(net.state_dict())
    x = torch.randn(4, 3, 6).half().requires_grad_()
    w = x.detach().float().requires_grad_()
    (y, (h, c)), (z, (hz, cz)) = net(x), wide(w)
    assert all(torch.equal(a, b.half()) for a, b in ((y, z), (h, hz), (c, cz)))
    g = torch.randn(y.shape).half()
    ours = torch.autograd.grad(y, [x, *net.parameters()], g)
    for a, b in zip(ours, torch.autograd.grad(z, [w, *wide.parameters()], g.float())):
        assert torch.equal(a, b.half())
    packed = nn.utils.rnn.pack_padded_sequence(x, [4, 4, 2] if not kw.get("batch_first") else [3, 3, 2, 2], batch_first=kw.get("batch_first", False))
    assert net(packed)[0].data.dtype == H


@pytest.mark.parametrize("layer,kw", [(nn.GRU, {}), (nn.GRU, dict(num_layers=2, bidirectional=True)), (nn.RNN, {}), (nn.RNN, dict(bias=False, batch_first=True)),
                                      (nn.RNN, dict(nonlinearity="relu", num_layers=2))])
def test_other_recurrent_layers(layer, kw):
    torch.manual_seed(0)
    net, wide = layer(6, 5, **kw).half(), layer(6, 5, **kw)
    wide.load_state_dict(net.state_dict())
    x, start = torch.randn(3, 4, 6).half().requires_grad_(), torch.randn(net.num_layers * (1 + net.bidirectional), 3 if net.batch_first else 4, 5).half().requires_grad_()
    inputs = [t.detach().float().requires_grad_() for t in (x, start)]
    results = *net(x, start), *wide(*inputs)
    assert all(a.dtype == H and torch.equal(a, b.half()) for a, b in zip(results[:2], results[2:]))
    g = torch.randn(results[0].shape).half()
    for a, b in zip(torch.autograd.grad(results[0], [x, start, *net.parameters()], g), torch.autograd.grad(results[2], [*inputs, *wide.parameters()], g.float())):
        assert torch.equal(a, b.half())
    packed = [nn.utils.rnn.pack_padded_sequence(t, [3, 2, 1] if net.batch_first else [3, 3, 2, 2], batch_first=net.batch_first) for t in (x, inputs[0])]
    (y, h), (z, hz) = net(packed[0]), wide(packed[1])
    assert torch.equal(y.data, z.data.half()) and torch.equal(h, hz.half())
    with torch.no_grad():
        assert torch.equal(net(x, start)[0], results[0])


@pytest.mark.parametrize("kw", [{}, dict(nonlinearity="relu", bidirectional=True)])
def test_plain_recurrent_layers_under_autocast(kw):
    """The FP32 layer on operands rounded to FP16, its results rounded once; near stock's."""
    torch.manual_seed(0)
    net, rounded, x = nn.RNN(6, 5, **kw), nn.RNN(6, 5, **kw), torch.randn(4, 3, 6)
    rounded.load_state_dict({k: v.half().float() for k, v in net.state_dict().items()})

    def run(net, x, autocast=True):
        packed = nn.utils.rnn.pack_padded_sequence(x, [4, 4, 2])
        with hs.autocast("cpu", enabled=autocast):
            results = [t for y, h in (net(x), net(packed)) for t in (y if torch.is_tensor(y) else y.data, h)]
        g = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).half() for i, t in enumerate(results)]
        return results, torch.autograd.grad(results, list(net.parameters()), [a.to(t.dtype) for a, t in zip(g, results)])

    ours, gradients = run(net, x)
    exact, exact_gradients = run(rounded, x.half().float(), autocast=False)
    assert all(a.dtype == H and torch.equal(a, b.half()) for a, b in zip(ours, exact))
    try:
        hs.set_overrides(False)
        stock, stock_gradients = run(net, x)
    finally:
        hs.set_overrides(True)
    for a, b, c in zip((*ours, *gradients), (*exact, *exact_gradients), (*stock, *stock_gradients)):
        assert a.dtype == c.dtype and all((a.double() - t.double()).abs().max() <= 4e-3 * t.abs().max() for t in (b, c))


def test_what_torch_refuses_of_group_norm_is_refused_in_the_same_words():
    x, two = torch.randn(2, 4, 16).half(), torch.ones(2, 2).half()
    norm, backward = torch.native_group_norm, torch.ops.aten.native_group_norm_backward
    calls = [lambda: norm(x, None, None, 2, 4, 20, 2, 1e-5), lambda: norm(x, None, None, 2, 8, 16, 2, 1e-5), lambda: norm(torch.randn(2, 5, 16).half(), None, None, 2, 5, 16, 2, 1e-5),
             lambda: norm(x, torch.ones(3).half(), None, 2, 4, 16, 2, 1e-5), lambda: norm(x, None, torch.ones(5).half(), 2, 4, 16, 2, 1e-5),
             lambda: backward(x, x, two[:1, :1].clone(), two, None, 2, 4, 16, 2, [True] * 3), lambda: backward(x[:1].clone(), x, two, two, None, 2, 4, 16, 2, [True] * 3)]
    check_refused_alike(calls)


@pytest.mark.skipif(not hasattr(torch.Tensor, "refine_names"), reason="this torch has no named tensors")
def test_names_of_dimensions_stay():
    with pytest.warns(UserWarning, match="Named tensors"):
        x = torch.randn(3, 40, names=("rows", "columns")).half()
    assert x.max("columns").values.names == ("rows",)
    assert x.mv(torch.randn(40).half()).names == ("rows",)


def test_lstm_trains_under_autocast():
    """Stock torch 2.11 raises here: oneDNN has no FP16 training primitive for it."""
    torch.manual_seed(0)
    net, x = nn.LSTM(6, 5, num_layers=2), torch.randn(4, 3, 6)
    with hs.autocast("cpu"):
        y, _ = net(x)
    exact, _ = net(x)
    assert y.dtype == H and torch.allclose(y.float(), exact, atol=2e-3)
    ours = torch.autograd.grad(y.float().square().sum(), list(net.parameters()))
    for a, b in zip(ours, torch.autograd.grad(exact.square().sum(), list(net.parameters()))):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 0.01 * b.abs().max()


# ---- what must not change -------------------------------------------------------------------------------------------------
def results(dtype):
    torch.manual_seed(0)
    out = []
    for f, make in (*ONE_OP.values(), *SEVERAL.values(), *EMBEDDING.values()):
        try:
            inputs = [t.to(dtype).requires_grad_() for t in make()]
            y = f(*inputs)
        except RuntimeError:
            continue
        out += [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]
    lstm = nn.LSTM(6, 5).to(dtype)
    y = lstm(torch.randn(4, 3, 6).to(dtype))[0]
    return [t.detach() for t in (*out, y, *torch.autograd.grad(y.sum(), list(lstm.parameters())))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_stock_kernels(dtype):
    on = results(dtype)
    try:
        hs.set_overrides(False)
        off = results(dtype)
    finally:
        hs.set_overrides(True)
    assert len(on) == len(off) and all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(on, off))


def test_functorch_second_derivatives_and_meta():
    x = torch.randn(60, 50).half()
    near = lambda a, b: (a.double() - b).abs().max() < 0.01 * b.abs().max() + 1e-6
    f = lambda x: F.group_norm(x.tanh().pow(2), 5).mean(-1).sum() + torch.linalg.vector_norm(x, dim=-1).sum()
    assert near(torch.func.grad(f)(x), torch.func.grad(f)(x.double()))
    assert near(torch.func.vmap(lambda x: x.tanh())(x), x.double().tanh())
    assert torch.empty(60, 50, dtype=H, device="meta").tanh().shape == (60, 50)
    y = x.requires_grad_()
    (g,) = torch.autograd.grad(y.tanh().sum(), y, create_graph=True)
    assert torch.autograd.grad(g.sum(), y)[0].abs().max() > 0


def test_the_import_warns_of_nothing():
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import halfstep"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(hs.__file__))})
    assert done.returncode == 0 and "verrid" not in done.stderr, done.stderr
