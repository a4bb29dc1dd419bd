"""Activations, gated units and bias_dropout_add: against FP64, over the range of FP16, their gradients, masks, counts and compiled graphs."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from layers import FLOATS, SIXTEEN, check_compiled, check_error, check_repeats, check_rows_independent, check_scale_exact, error, families, layouts, run

import halfstep as hs

F, H, hf = torch.nn.functional, torch.ops.halfstep, hs.functional
ALL = FLOATS + [torch.float64]
K = (2 / torch.pi) ** 0.5


def exact_gelu_tanh(x):  # x (1 + tanh u) / 2 = x s(2u), without the cancellation
    return x * torch.sigmoid(2 * K * (x + 0.044715 * x**3))


UNARY = {
    "silu": (hf.silu, lambda x: x * torch.sigmoid(x), F.silu),
    "gelu": (hf.gelu, lambda x: x * torch.erfc(-x * 0.5**0.5) / 2, F.gelu),
    "gelu_tanh": (lambda x: hf.gelu(x, "tanh"), exact_gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "squared_relu": (hf.squared_relu, lambda x: x.relu() * x.relu(), lambda x: F.relu(x).square()),
}
GATED = {
    "swiglu": (hf.swiglu, UNARY["silu"][1], F.silu),
    "geglu": (hf.geglu, UNARY["gelu"][1], F.gelu),
    "geglu_tanh": (lambda g, u=None: hf.geglu(g, u, "tanh"), UNARY["gelu_tanh"][1], UNARY["gelu_tanh"][2]),
}


def gated(name):
    ours, exact, stock = GATED[name]
    return ours, lambda g, u: exact(g) * u, lambda g, u: stock(g) * u


def all_halves(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def normal(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", UNARY)
def test_every_16_bit_number_is_rounded_once_and_none_is_hidden(name, dtype):
    ours, exact, _ = UNARY[name]
    x = all_halves(dtype)
    finite = x[x.isfinite()]
    got = ours(finite)
    assert error(got, exact(finite.double())) <= 0.502
    rest = ours(x[~x.isfinite()])
    assert (~rest.isfinite() | ((x[~x.isfinite()] == -float("inf")) & (rest == 0) & (name == "squared_relu"))).all()
    (slope,), (want,) = run(ours, [finite], [torch.ones_like(finite)])[1], run(exact, [finite], [torch.ones_like(finite)], torch.float64)[1]
    want = torch.where(finite.abs() > 50, (finite > 0).double() if name != "squared_relu" else want, want)  # FP64's own x^3 leaves its range
    near_zero = want.abs() < 1e-2  # where the slope crosses zero FP32 cancels: an absolute bound there
    assert error(slope[~near_zero], want[~near_zero]) <= 0.51
    assert ((slope.double() - want).abs()[near_zero] <= 2e-7 + want.abs()[near_zero] * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", UNARY)
def test_unary_errors_are_at_most_torchs(name, dtype):
    for _, x in families((17, 33), dtype):
        check_error(*UNARY[name], [x], [normal(17, 33, dtype=dtype, seed=1)], ulps=5 if dtype == torch.float32 else 1)  # FP32: exp, a polynomial, a division, products


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", GATED)
def test_gated_errors_are_at_most_torchs(name, dtype):
    for kind, g in families((17, 33), dtype):
        up = normal(17, 33, dtype=dtype, seed=2)
        check_error(*gated(name), [g, up], [normal(17, 33, dtype=dtype, seed=1)], ulps=5 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("name", GATED)
def test_layouts_and_widths(name):
    ours = GATED[name][0]
    x, up, d = (normal(2, 6, 5, 7, seed=s) for s in range(3))
    want = run(ours, [x, up], [d])
    for _, a in layouts(x):
        for _, b in layouts(up):
            for _, c in layouts(d):
                outputs, grads = run(ours, [a, b], [c])
                assert all(torch.equal(p, q) for p, q in zip(outputs + grads, want[0] + want[1]))
    row = normal(1, 1, 7)
    assert torch.equal(ours(row.expand(3, 4, 7), normal(3, 4, 7)), ours(row.expand(3, 4, 7).contiguous(), normal(3, 4, 7)))
    for n in (0, 1, 15, 16, 17, 33, 4097, 70001):
        g, u = normal(n), normal(n, seed=1)
        assert torch.equal(ours(g, u), torch.cat([ours(g[:n // 3], u[:n // 3]), ours(g[n // 3:], u[n // 3:])]))
    for name, (f, _, _) in UNARY.items():
        for _, a in layouts(x):
            assert torch.equal(f(a), f(x)) and (not a.is_contiguous() or f(a).is_contiguous())
    assert hf.silu(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_one_tensor_of_both_halves_is_the_same_to_the_bit_and_nothing_is_copied():
    for shape in ((6, 10), (3, 4, 2), (14,), (2, 3, 4, 34)):
        x, width = normal(*shape), shape[-1] // 2
        d = normal(*shape[:-1], width, seed=1)
        for name, (ours, _, _) in GATED.items():
            (y,), (dx,) = run(ours, [x], [d])
            (z,), grads = run(lambda x: ours(*x.chunk(2, -1)), [x], [d])
            assert torch.equal(y, z) and torch.equal(dx, grads[0]) and dx.stride() == x.stride()
    transposed = normal(10, 6).t()
    assert torch.equal(hf.swiglu(transposed), hf.swiglu(transposed.contiguous()))
    x = normal(512, 2048)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        hf.swiglu(*x.chunk(2, -1))
    names = {e.name for e in seen.events()}
    assert "halfstep::swiglu" in names and not names & {"aten::copy_", "aten::contiguous", "aten::clone"}


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_the_tail_counts_times_a_large_factor(name):
    """What vanishes in FP16 alone is there times a scaled gradient, or times `up`."""
    ours, exact, _ = UNARY[name]
    x = all_halves(torch.float16)
    x = x[x.isfinite()]
    for d in (65504.0, -1024.0):
        (slope,), (want,) = run(ours, [x], [torch.full_like(x, d)])[1], run(exact, [x], [torch.full_like(x, d)], torch.float64)[1]
        want = torch.where(x.abs() > 50, (x > 0).double() * d, want)  # FP64's own x^3 leaves its range
        near_zero = want.abs() < 1e-2 * abs(d)
        tail = near_zero & (x < -3)
        assert error(slope[tail], want[tail]) <= 0.52
        assert ((slope.double() - want).abs()[near_zero] <= 2e-7 * abs(d) + want.abs()[near_zero] * 2.0**-10).all()
    gated = {"silu": hf.swiglu, "gelu": hf.geglu, "gelu_tanh": lambda g, u: hf.geglu(g, u, "tanh")}[name]
    want = exact(x.double()) * 65504
    fits = (want.abs() < 65000) & (x < 1)
    assert error(gated(x, torch.full_like(x, 65504.0))[fits], want[fits]) <= 0.52


def test_gate_and_up_near_the_largest_half_whose_product_fits_do_not_overflow():
    # silu(gate) rounded to FP16 before the product (as kernels that round twice do), or a product of both in FP16, is inf or off.
    gate, up = torch.tensor([65504.0, 60000.0, -0.001, 65504.0, 300.0]).half(), torch.tensor([1.0, 1.09, 65504.0, 0.5, 218.0]).half()
    want = (gate.double() * torch.sigmoid(gate.double()) * up.double())
    assert torch.equal(hf.swiglu(gate, up), want.half()) and hf.swiglu(gate, up)[:4].isfinite().all()
    over = hf.swiglu(torch.tensor([300.0, -5.0]).half(), torch.tensor([300.0, 65504.0]).half())
    assert over[0] == float("inf") and over[1].isfinite()  # beyond the range infinity is the truth
    g, u = normal(4096), normal(4096, seed=1)
    exact = F.silu(g.double()) * u.double()
    twice = F.silu(g.float()).half() * u  # the gate rounded first
    assert error(hf.swiglu(g, u), exact) <= 0.5001 < 0.9 < error(twice, exact)


def test_non_finite_numbers_are_not_hidden():
    for bad in (float("nan"), float("inf"), -float("inf")):
        for name, (ours, _, _) in GATED.items():
            x, u = normal(40), normal(40, seed=1)
            x[7] = bad
            y = ours(x, u)
            assert not y[7].isfinite() and y[:7].isfinite().all() and y[8:].isfinite().all()
            assert not ours(u, x)[7].isfinite()
            grads = run(ours, [u, u], [x])[1]
            assert not grads[0][7].isfinite() and not grads[1][7].isfinite()
        x = normal(4, 8)
        x[1, 2] = bad
        y = hf.bias_dropout_add(x, None, torch.zeros(4, 8).half(), 0.999, seed=torch.tensor([1, 2]))
        assert not y[1, 2].isfinite()  # though it is dropped


def test_outputs_that_leave_the_range_are_counted():
    for dtype, big in ((torch.float16, 300.0), (torch.bfloat16, 2e19), (torch.float32, 2e19), (torch.float64, 1e155)):
        gate, up = torch.full((5000,), 1.0, dtype=dtype), torch.full((5000,), big, dtype=dtype)
        gate[[3, 77, 4999]] = big
        gate[10], up[11] = float("inf"), float("nan")  # not finite before: not counted
        for module in (hs.nn.SwiGLU(count_overflow=True), hs.nn.GeGLU(count_overflow=True), hs.nn.GeGLU("tanh", count_overflow=True)):
            y = module(gate, up)
            module(torch.cat([gate, up]))
            assert y.isinf().sum() == 4 and module.overflowed.item() == 3 + 3
            module.overflowed = None  # the same outputs without a count
            assert torch.equal(y.nan_to_num(), module(gate, up).nan_to_num())
            assert not module.state_dict()
    assert hs.nn.SwiGLU().overflowed is None
    # 65519.99… rounds to the largest half, 65520 to infinity.
    module = hs.nn.GeGLU(count_overflow=True)
    module(torch.tensor([65504.0, 65504.0]).half(), torch.tensor([1.0, 1.0009765625]).half())
    assert module.overflowed.item() == 1


@pytest.mark.parametrize("name", list(UNARY) + list(GATED))
def test_gradients_of_first_and_second_order_agree_with_finite_differences(name):
    torch.manual_seed(0)
    x, u = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    if name in UNARY:
        calls = [(UNARY[name][0], (x,))]
    else:
        calls = [(GATED[name][0], (x, u)), (GATED[name][0], (x,))]
    for f, inputs in calls:
        assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


def test_second_derivatives_in_16_bits_are_formed_in_fp32():
    x = normal(64).requires_grad_()
    g, = torch.autograd.grad(hf.gelu(x).float().sum(), x, create_graph=True)
    second, = torch.autograd.grad(g.float().sum(), x)
    z = x.detach().double()
    want = torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5 * (2 - z * z)
    assert ((second.double() - want).abs() <= 1e-3).all()


def test_repeats_rows_and_loss_scales():
    x, u, d = normal(64, 96), normal(64, 96, seed=1), normal(64, 96, seed=2) * 2.0**-6
    check_repeats(hf.swiglu, [x, u], [d])
    check_repeats(lambda x: hf.gelu(x), [x], [d])
    check_rows_independent(hf.swiglu, [x, u], lambda inputs, rows: [t[rows] for t in inputs])
    x, u, d = x.abs() % 1 + 0.25, u.abs() % 1 + 0.25, d.abs() % 2.0**-8 + 2.0**-9  # no gradient below the normal numbers
    for name in GATED:
        check_scale_exact(GATED[name][0], [x, u], [d])
        check_scale_exact(GATED[name][0], [x.bfloat16(), u.bfloat16()], [d.bfloat16()])
    for name in UNARY:
        check_scale_exact(UNARY[name][0], [x], [d])


def dropout_arguments(dtype=torch.float16, rows=37, width=48):
    return normal(rows, width, dtype=dtype), normal(width, dtype=dtype, seed=1), normal(rows, width, dtype=dtype, seed=2)


def mask_of(seed, p, *shape):
    return hf.bias_dropout_add(torch.ones(shape), None, torch.zeros(shape), p, seed=seed) != 0


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_follows_its_mask_rounded_once_and_so_do_its_gradients(dtype, p):
    x, bias, residual = dropout_arguments(dtype)
    seed, d = torch.tensor([123, 45]), normal(37, 48, dtype=dtype, seed=3)
    mask = mask_of(seed, p, 37, 48).double()
    scale = 1 / (1 - p) if p < 1 else 0.0

    def reference(x, bias, residual):
        return residual + (x + bias) * mask * scale

    def stock(x, bias, residual):
        return residual + (x + bias) * mask.to(x.dtype) * scale

    ours = lambda *a: hf.bias_dropout_add(*a, p, seed=seed)
    if dtype in SIXTEEN:
        check_error(ours, reference, stock, [x, bias, residual], [d])
    else:  # the sum may cancel: relative to its terms
        got, want = (sum(run(f, [x, bias, residual], [d], t), []) for f, t in ((ours, None), (reference, torch.float64)))
        terms = [reference(x.double().abs(), bias.double().abs(), residual.double().abs()), d.double().abs() * scale, (d.double().abs() * scale).sum(0), d.double().abs()]
        assert all(((a.double() - b).abs() <= 2 * torch.finfo(dtype).eps * t).all() for a, b, t in zip(got, want, terms))
    without = hf.bias_dropout_add(x, None, residual, p, seed=seed)
    assert torch.equal(without, hf.bias_dropout_add(x, torch.zeros_like(bias), residual, p, seed=seed))
    assert torch.equal(hf.bias_dropout_add(x, bias, residual, p, training=False), hf.bias_dropout_add(x, bias, residual, 0.0))
    if p == 0:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(hf.bias_dropout_add(x, bias, residual, p), ((x.to(wide) + bias.to(wide)) + residual.to(wide)).to(dtype))
    if p == 1:
        assert torch.equal(hf.bias_dropout_add(x, bias, residual, p), residual)


def test_masks_keep_the_right_share_and_do_not_repeat():
    for p in (0.01, 0.1, 0.5, 0.9):
        n = 2**20
        kept = mask_of(torch.tensor([7, 9]), p, n).double().mean().item()
        assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    one, other, offset = (mask_of(torch.tensor(s), 0.5, 2**18) for s in ([7, 9], [8, 9], [7, 10]))
    for a, b in ((one, other), (one, offset), (one[1:], one[:-1]), (one[64:], one[:-64]), (one[16:], one[:-16])):
        assert abs((a == b).double().mean().item() - 0.5) < 5 * 0.5 / 2**9
    columns = one.view(-1, 64).double().mean(0)  # every place within a group
    assert ((columns - 0.5).abs() < 5 * 0.5 / 2**6).all()


def test_the_mask_depends_on_the_place_alone():
    seed = torch.tensor([-5, 2**62])
    whole = mask_of(seed, 0.4, 4096 * 3 + 77)
    assert torch.equal(mask_of(seed, 0.4, 100), whole[:100])
    assert torch.equal(mask_of(seed, 0.4, 9, 5).view(-1), whole[:45])
    x, bias, residual = dropout_arguments()
    want = run(lambda *a: hf.bias_dropout_add(*a, 0.4, seed=seed), [x, bias, residual], [x])
    for _, a in layouts(x):
        got = run(lambda *b: hf.bias_dropout_add(*b, 0.4, seed=seed), [a, bias, residual], [a])
        assert all(torch.equal(p, q) for p, q in zip(got[0] + got[1], want[0] + want[1]))
    for dtype in ALL:
        assert torch.equal(hf.bias_dropout_add(torch.ones(300, dtype=dtype), None, torch.zeros(300, dtype=dtype), 0.4, seed=seed) != 0, whole[:300])


def test_manual_seed_repeats_a_mask_and_only_the_seed_is_kept():
    x, bias, residual = dropout_arguments()
    layer = hs.nn.BiasDropoutAdd(0.3)
    torch.manual_seed(5)
    first, second = layer(x, bias, residual), layer(x, bias, residual)
    torch.manual_seed(5)
    assert torch.equal(layer(x, bias, residual), first) and not torch.equal(first, second)
    assert torch.equal(layer.eval()(x, bias, residual), hf.bias_dropout_add(x, bias, residual, 0.0))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hf.bias_dropout_add(x.requires_grad_(), bias, residual, 0.3)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.int64, 2)]
    seed = torch.tensor([1, 2])
    y = hf.bias_dropout_add(x, bias, residual, 0.3, seed=seed)
    seed[0] = 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_dropout_gradients_agree_with_finite_differences():
    x, bias, residual = (t.requires_grad_() for t in dropout_arguments(torch.float64, 5, 3))
    seed = torch.tensor([3, 4])
    for p in (0.0, 0.4, 1.0):
        f = lambda *a: hf.bias_dropout_add(*a, p, seed=seed)
        assert torch.autograd.gradcheck(f, (x, bias, residual)) and torch.autograd.gradgradcheck(f, (x, bias, residual))


def test_compiled_graphs_equal_eager():
    def make(size):
        return [normal(size, 24), normal(size, 24, seed=1)], [normal(size, 24, seed=2)]

    check_compiled(lambda g, u: hf.swiglu(hf.geglu(g, u, "tanh"), hf.squared_relu(u)) + hf.gelu(hf.silu(g)), make, (3, 8, 33))
    check_compiled(lambda g, u: hf.swiglu(torch.cat([g, u], -1)), make, (3, 8))
    seed = torch.tensor([5, 6])
    check_compiled(lambda x, r: hf.bias_dropout_add(x, x[0], r, 0.5, seed=seed), make, (3, 8))

    module, eager = hs.nn.SwiGLU(count_overflow=True), hs.nn.SwiGLU(count_overflow=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    big = torch.full((8,), 300.0).half().requires_grad_()
    for _ in range(2):
        assert torch.equal(compiled(big, big), eager(big, big))
    assert module.overflowed.item() == eager.overflowed.item() == 16


def test_compiled_dropout_draws_one_mask_for_forward_and_backward():
    torch._dynamo.reset()
    f = torch.compile(lambda x, b, r: hf.bias_dropout_add(x, b, r, 0.5), fullgraph=True, backend="aot_eager")
    x, bias, residual = torch.ones(64, 64, requires_grad=True), torch.zeros(64), torch.zeros(64, 64)
    masks = []
    for _ in range(2):
        y = f(x, bias, residual)
        dx, = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx, y.detach()) and 0.4 < (dx != 0).double().mean() < 0.6
        masks.append(dx)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_autocast_keeps_a_dtype_and_takes_the_lower_of_two(dtype):
    low, wide = normal(4, 6, dtype=dtype), normal(4, 6, dtype=torch.float32, seed=1)
    with hs.autocast("cpu", dtype):
        assert hf.swiglu(wide, wide).dtype == torch.float32 and hf.silu(wide).dtype == torch.float32
        for f in (hf.swiglu, hf.geglu):
            assert torch.equal(f(low, wide), f(low, wide.to(dtype))) and f(wide, low).dtype == dtype
        module = hs.nn.SwiGLU(count_overflow=True)
        assert module(low, wide).dtype == dtype
        y = hf.bias_dropout_add(low, wide[0], wide, 0.0)
        assert torch.equal(y, hf.bias_dropout_add(low, wide[0].to(dtype), wide.to(dtype), 0.0))
        leaf = wide.clone().requires_grad_()
        hf.swiglu(low, leaf).sum().backward()
        assert leaf.grad.dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"swiglu: up is torch.float32\[4, 6\] but gate is "):
        hf.swiglu(low, wide)


def test_modules_are_torchs():
    x = normal(5, 6)
    assert isinstance(hs.nn.GELU(), torch.nn.GELU) and isinstance(hs.nn.SiLU(), torch.nn.SiLU)
    assert torch.equal(hs.nn.GELU(approximate="tanh")(x), hf.gelu(x, "tanh")) and torch.equal(hs.nn.SiLU()(x), hf.silu(x))
    assert torch.equal(hs.nn.SquaredReLU()(x), hf.squared_relu(x)) and torch.equal(hs.nn.GeGLU("tanh")(x), hf.geglu(x, approximate="tanh"))
    y, leaf = x.clone(), x.clone().requires_grad_()
    assert hs.nn.SiLU(inplace=True)(y) is y and torch.equal(y, hf.silu(x))
    hs.nn.SiLU(inplace=True)(leaf * 1).sum().backward()
    assert torch.equal(leaf.grad, run(hf.silu, [x], [torch.ones_like(x)])[1][0])
    assert repr(hs.nn.GeGLU("tanh", True)) == "GeGLU(approximate='tanh', count_overflow=True)" and repr(hs.nn.BiasDropoutAdd(0.1)) == "BiasDropoutAdd(p=0.1)"


@pytest.mark.parametrize("call, message", [
    (lambda x: hf.swiglu(x, x[:2]), r"swiglu: up is torch.float16\[2, 6\] but gate is torch.float16\[4, 6\]"),
    (lambda x: hf.swiglu(x, x.float()), r"swiglu: up is torch.float32\[4, 6\] but gate is torch.float16\[4, 6\]"),
    (lambda x: hf.swiglu(x[:, :3]), r"swiglu: gate is torch.float16\[4, 3\] and up is missing; expected an even last dimension"),
    (lambda x: hf.geglu(x, x.to("meta")), "geglu: up is on meta but gate is on cpu"),
    (lambda x: hf.gelu(x.int()), r"gelu: x is Int\[4, 6\]; expected float16, bfloat16, float32 or float64"),
    (lambda x: hf.gelu(x, "fast"), "gelu: approximate is 'fast'; expected 'none' or 'tanh'"),
    (lambda x: hf.swiglu(x, x, torch.zeros(2, dtype=torch.int64)), r"swiglu_counted: overflowed is Long\[2\]; expected one int64 element"),
    (lambda x: H.silu_backward(x[0], x), r"silu_backward: grad is torch.float16\[6\] but x is torch.float16\[4, 6\]"),
    (lambda x: hf.bias_dropout_add(x, x[:, 0], x), r"bias_dropout_add: bias is torch.float16\[4\] but x is torch.float16\[4, 6\]"),
    (lambda x: hf.bias_dropout_add(x, None, x[0]), r"bias_dropout_add: residual is torch.float16\[6\] but x is torch.float16\[4, 6\]"),
    (lambda x: hf.bias_dropout_add(x, None, x, 1.5), "bias_dropout_add: p is 1.5; expected a probability between 0 and 1"),
    (lambda x: hf.bias_dropout_add(x, None, x, 0.5, seed=torch.tensor([1])), r"bias_dropout_add: seed is Long\[1\]; expected int64\[2\]"),
    (lambda x: H.bias_dropout_add(x, None, x, 0.5), "bias_dropout_add: p is 0.5 but seed is missing"),
])
def test_refusals_name_the_argument_and_both_values(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(normal(4, 6))
    for module in (lambda: hs.nn.GeGLU("erf"), lambda: hs.nn.BiasDropoutAdd(-0.1)):
        with pytest.raises(ValueError, match="expected"):
            module()


PROGRAM = """
import hashlib, sys, torch, halfstep
torch.set_num_threads(int(sys.argv[1]))
H, digest = torch.ops.halfstep, hashlib.sha256()
one_nan = lambda t: torch.where(t.isnan(), torch.full_like(t, float("nan")), t) if t.is_floating_point() else t  # which operand's comes through is the compiler's choice
add = lambda *ts: [digest.update(one_nan(t).contiguous().view(torch.uint8).numpy().tobytes()) for t in ts]
for i, dtype in enumerate((torch.float16, torch.bfloat16, torch.float32)):
    # torch's own normal numbers depend on the instruction set; these are whole numbers mod a prime.
    g, u, d = ((((torch.arange(301 * 333) + 7 * k) * 7919 % 64997 - 32000) / 4096).view(301, 333).to(dtype) for k in range(3))
    g[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    add(H.swiglu(g, u), *H.swiglu_backward(d, g, u), H.silu(g), H.silu_backward(d, g), H.squared_relu(g), H.squared_relu_backward(d, g))
    for form in ("none", "tanh"):
        add(H.geglu(g, u, approximate=form), *H.geglu_backward(d, g, u, approximate=form), H.gelu(g, approximate=form), H.gelu_backward(d, g, approximate=form))
    count = torch.zeros(1, dtype=torch.int64)
    add(H.swiglu_counted(g * 100, u * 100, count), count)
    seed = torch.tensor([2**61 + i, 3])
    add(H.bias_dropout_add(g, u[0], u, 0.3, seed), *H.bias_dropout_add_backward(d, 0.3, seed, True))
print(digest.hexdigest())
"""


def test_bit_equal_across_instruction_sets_and_threads():
    def digest(capability, threads):
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(threads)], env=dict(os.environ, ATEN_CPU_CAPABILITY=capability), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    reference = digest("default", 1)
    assert len(reference) == len(hashlib.sha256().hexdigest())
    for capability, threads in (("avx2", 2), ("avx512", 1), ("avx512", 2)):
        assert digest(capability, threads) == reference, f"{capability} with {threads} threads differs"
