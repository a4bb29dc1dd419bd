"""hs.functional.linear_cross_entropy: the products and the cross entropy as if apart, exact at any number of rows, a fraction of the memory."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from layers import FLOATS, check_compiled, check_repeats, error, run
from test_loss import reference

import halfstep as hs

linear_cross_entropy = hs.functional.linear_cross_entropy


def problem(rows, features, classes, dtype, seed=0, dtype_of_bias=None):
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    target = torch.randint(0, classes, (rows,), generator=random)
    return draw(rows, features).to(dtype), (draw(classes, features) / features**0.5).to(dtype), draw(classes).to(dtype), target, torch.rand(classes, generator=random) + 0.5


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", FLOATS + [torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_against_fp64(dtype, reduction):
    for smoothing, z, weighted in ((0.0, 0.0, False), (0.1, 1e-3, True)):
        x, weight, bias, target, classes = problem(601, 33, 300, dtype)
        target[5] = -100
        classes = classes if weighted else None
        options = dict(reduction=reduction, label_smoothing=smoothing, z_loss=z)
        up = [torch.full((601,), 64.0) if reduction == "none" else torch.tensor(4096.0)]
        if reduction == "none":
            up[0][7] = -3.0
        want, want_grads = run(lambda x, w, b: reference(x @ w.t() + b, target, classes, **options), [x, weight, bias], up, torch.float64)
        for scale in (None, torch.tensor(4096.0)):
            got, grads = run(lambda x, w, b: linear_cross_entropy(x, w, target, b, classes, grad_scale=scale, **options), [x, weight, bias], up)
            assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and error(got[0], want[0]) <= (64 if dtype == torch.float64 else 16)
            # One rounding: half a step of each element.
            limit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
            for g, w in zip(grads, want_grads):
                assert g.dtype == dtype and g.shape == w.shape and relative(g, w) <= limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_not_rounded(dtype):
    """Beside the unfused layers, whose logits are: the loss of each row is closer to FP64 by an order of magnitude."""
    x, weight, bias, target, _ = problem(64, 200, 500, dtype)
    exact = reference(x.double() @ weight.double().t() + bias.double(), target, reduction="none")
    fused = linear_cross_entropy(x, weight, target, bias, reduction="none")
    apart = F.cross_entropy(F.linear(x, weight, bias).float(), target, reduction="none")
    assert (fused - exact).abs().max() * 10 < (apart - exact).abs().max()


def test_32768_rows_keep_the_gradients_that_fp16_loses():
    """Liger#512: gradients of logits divided by 32,768 and rounded to FP16 before the loss scale are subnormal or zero."""
    x, weight, _, target, _ = problem(32768, 8, 64, torch.float16)
    up = [torch.tensor(65536.0)]
    _, want = run(lambda x, w: reference(x @ w.t(), target), [x, weight], up, torch.float64)
    for scale in (None, torch.tensor(65536.0)):
        _, grads = run(lambda x, w: linear_cross_entropy(x, w, target, grad_scale=scale), [x, weight], up)
        for g, w in zip(grads, want):
            assert F.cosine_similarity(g.double().flatten(), w.flatten(), dim=0) >= 0.999999
            assert (g != 0).double().mean() >= 0.999 * (w.half() != 0).double().mean()
    logits = x.float() @ weight.float().t()
    lost = torch.autograd.grad(F.cross_entropy(leaf := logits.requires_grad_(), target), leaf)[0].half()
    assert (lost == 0).double().mean() > 0.01 and (lost.abs() < 2.0**-14).double().mean() > 0.9


def test_the_gradient_of_weight_is_summed_in_fp32():
    """Liger#950: summed in the weight's own dtype, chunk after chunk, small parts are lost. Here 4 chunks and more."""
    x, weight, _, target, _ = problem(2048, 4, 8192, torch.bfloat16)
    x = x.abs()
    _, want = run(lambda x, w: reference(x @ w.t(), target), [x, weight], [torch.tensor(1.0)], torch.float64)
    _, grads = run(lambda x, w: linear_cross_entropy(x, w, target), [x, weight], [torch.tensor(1.0)])
    assert relative(grads[1], want[1]) <= 2.0**-8
    parts = sum(run(lambda x, w: linear_cross_entropy(x, w, t), [c, weight], [torch.tensor(1.0 / 16)])[1][1] for c, t in zip(x.chunk(16), target.chunk(16)))
    assert relative(parts, want[1]) > 1.5 * relative(grads[1], want[1])


def test_only_what_is_asked_for():
    x, weight, bias, target, _ = problem(30, 6, 9, torch.float16)
    whole = run(lambda x, w, b: linear_cross_entropy(x, w, target, b), [x, weight, bias], [torch.tensor(8.0)])
    for wanted in itertools.product((False, True), repeat=3):
        for reduction, up in (("mean", torch.tensor(8.0)), ("none", torch.full((30,), 8.0 / 30))):
            given = [t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), wanted)]
            loss = linear_cross_entropy(given[0], given[1], target, given[2], reduction=reduction)
            assert loss.requires_grad == any(wanted)
            if any(wanted):
                loss.backward(up)
            for t, w, g in zip(given, wanted, whole[1]):
                assert (t.grad is not None) == w and (not w or torch.allclose(t.grad, g, rtol=1e-2, atol=1e-4))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, target, bias), whole[0][0])


def test_shapes_and_layouts():
    x, weight, bias, target, _ = problem(24, 6, 9, torch.float32)
    want = linear_cross_entropy(x, weight, target, bias, reduction="none")
    assert torch.equal(linear_cross_entropy(x.view(4, 6, 6), weight, target.view(4, 6), bias, reduction="none"), want.view(4, 6))
    torch.testing.assert_close(linear_cross_entropy(x[0], weight, target[0], bias), want[0])
    for given, w in ((x.t().contiguous().t(), weight), (x, weight.t().contiguous().t()), (x.repeat(1, 2)[:, :6], weight)):
        torch.testing.assert_close(linear_cross_entropy(given, w, target, bias, reduction="none"), want)
        half = run(lambda x, w: linear_cross_entropy(x, w, target), [given.half(), w.half()], [torch.tensor(8.0)])[1]
        for a, b in zip(half, run(lambda x, w: linear_cross_entropy(x, w, target), [x.half(), weight.half()], [torch.tensor(8.0)])[1]):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)
    empty = run(lambda w: linear_cross_entropy(x[:0], w, target[:0], reduction="sum"), [weight], [torch.tensor(1.0)])
    assert empty[0][0] == 0 and not empty[1][0].any()


def test_ignored_rows_and_a_second_backward():
    x, weight, bias, target, _ = problem(40, 5, 7, torch.float16)
    target[::2] = -100
    x[0] = float("nan")
    _, grads = run(lambda x: linear_cross_entropy(x, weight, target, bias), [x], [torch.tensor(64.0)])
    assert not grads[0][2::2].any() and grads[0][1::2].isfinite().all()
    x[0] = 0
    for dtype, scale in itertools.product((torch.float16, torch.float32), (None, torch.tensor(32.0))):
        given = [t.to(dtype).requires_grad_() for t in (x, weight)]
        loss = linear_cross_entropy(*given, target, grad_scale=scale)
        first = [g.clone() for g in torch.autograd.grad(loss, given, torch.tensor(64.0), retain_graph=True)]
        for retain in (True, False):
            for a, b in zip(first, torch.autograd.grad(loss, given, torch.tensor(64.0), retain_graph=retain)):
                assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_scale_changes_no_bit(reduction):
    x, weight, bias, target, _ = problem(40, 5, 7, torch.float16)
    up = torch.tensor(1.0) if reduction == "mean" else torch.full((40,), 2.0**-6)
    f = lambda x, w, b: linear_cross_entropy(x, w, target, b, reduction=reduction)
    _, plain = run(f, [x, weight, bias], [up])
    for k in range(0, 13, 4):
        _, scaled = run(f, [x, weight, bias], [up * 2.0**k])
        for a, b in zip(plain, scaled):
            normal = (a.abs() >= 2.0**-14) & b.isfinite()
            assert torch.equal((a.double() * 2.0**k)[normal], b.double()[normal])


def test_derivatives_agree_with_finite_differences_and_end():
    x, weight, bias, target, classes = problem(4, 3, 5, torch.float64)
    target[1] = -100
    for reduction, scale in itertools.product(("mean", "sum", "none"), (None, torch.tensor(4.0))):
        f = lambda x, w, b: linear_cross_entropy(x, w, target, b, classes, reduction=reduction, label_smoothing=0.1, z_loss=0.05, grad_scale=scale)
        given = [t.clone().requires_grad_() for t in (x, weight, bias)]
        assert torch.autograd.gradcheck(f, given)
        grad = torch.autograd.grad(f(*given).sum(), given[0], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="is differentiable once"):
            grad.sum().backward()


def test_repeats():
    x, weight, bias, target, _ = problem(33, 16, 100, torch.float16)
    check_repeats(lambda x, w, b: linear_cross_entropy(x, w, target, b), [x, weight, bias], [torch.tensor(64.0)])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_with_dynamic_shapes(reduction):
    def inputs(size):
        x, weight, bias, target, _ = problem(size, 2 * size, 7 * size, torch.float16)
        return [x, weight, bias, target], [torch.full((size,), 8.0) if reduction == "none" else torch.tensor(64.0)]

    check_compiled(lambda x, w, b, t: linear_cross_entropy(x, w, t, b, reduction=reduction), inputs, (3, 5, 8))


def test_autocast_casts_what_is_multiplied():
    x, weight, bias, target, classes = problem(9, 4, 6, torch.float32)
    want = linear_cross_entropy(x.half(), weight.half(), target, bias.half(), classes)
    weight.requires_grad_()
    with hs.autocast("cpu"):
        loss = linear_cross_entropy(x, weight, target, bias, classes)
    assert torch.equal(loss, want) and loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.dtype == torch.float32


def test_errors_name_the_argument():
    x, weight, bias, target, _ = problem(3, 4, 6, torch.float32)
    for message, call in {
        r"linear_cross_entropy: weight is torch.float16\[6, 4\] but x is torch.float32\[3, 4\]": lambda: linear_cross_entropy(x, weight.half(), target),
        r"weight is torch.float32\[6, 3\] but x is": lambda: linear_cross_entropy(x, weight[:, :3], target),
        r"bias is torch.float32\[5\] but weight is torch.float32\[6, 4\]": lambda: linear_cross_entropy(x, weight, target, bias[:5]),
        r"target is torch.int64\[2\] but x is torch.float32\[3, 4\]": lambda: linear_cross_entropy(x, weight, target[:2]),
        r"target is Int\[3\]; expected int64": lambda: linear_cross_entropy(x, weight, target.int()),
        r"target\[0\] is 6; expected a class from 0 to 5": lambda: linear_cross_entropy(x, weight, target * 0 + 6),
        r"class_weight is torch.float32\[4\]; expected 6": lambda: linear_cross_entropy(x, weight, target, None, torch.ones(4)),
        r"class_weight requires grad": lambda: linear_cross_entropy(x, weight, target, None, torch.ones(6, requires_grad=True)),
        r"reduction is 'avg'": lambda: linear_cross_entropy(x, weight, target, reduction="avg"),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_the_module_owns_or_shares_its_weight():
    weights = torch.rand(6)
    torch.manual_seed(0)
    head = hs.nn.LinearCrossEntropyLoss(4, 6, bias=True, class_weight=weights, label_smoothing=0.1)
    torch.manual_seed(0)
    plain = torch.nn.Linear(4, 6)
    assert torch.equal(head.weight, plain.weight) and torch.equal(head.bias, plain.bias) and set(head.state_dict()) == {"weight", "bias", "class_weight"}
    x, target = torch.randn(2, 5, 4), torch.randint(0, 6, (2, 5))
    want = hs.functional.cross_entropy(plain(x).flatten(0, 1), target.flatten(), head.class_weight, label_smoothing=0.1)
    torch.testing.assert_close(head(x, target), want)
    torch.testing.assert_close(head.logits(x), plain(x))
    embedding = torch.nn.Embedding(6, 4, dtype=torch.float16)
    tied = hs.nn.LinearCrossEntropyLoss(4, 6, weight=embedding.weight)
    assert tied.weight is embedding.weight and tied.bias is None
    tied(x.half(), target, grad_scale=torch.tensor(8.0)).backward()
    assert embedding.weight.grad.dtype == torch.float16
    with pytest.raises(ValueError, match=r"weight is Parameter \(6, 4\); expected a Parameter of shape \(6, 5\)"):
        hs.nn.LinearCrossEntropyLoss(5, 6, weight=embedding.weight)


PEAK = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import halfstep as hs
def peak(): return int([l for l in open("/proc/self/status") if l.startswith("VmHWM")][0].split()[1]) * 1024
torch.manual_seed(0)
x, w = torch.randn(4096, 64).half().requires_grad_(), torch.randn(16384, 64).half().requires_grad_()
target = torch.randint(0, 16384, (4096,))
small = (x[:8].detach().requires_grad_(), w[:64].detach().requires_grad_(), target[:8] % 64)
fused = lambda x, w, t: hs.functional.linear_cross_entropy(x, w, t)
apart = lambda x, w, t: torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), t)
f = fused if sys.argv[1] == "fused" else apart
f(*small).backward()  # what a first call brings along
before = peak()
f(x, w, target).backward(torch.tensor(1024.0, dtype=torch.float32 if f is fused else torch.float16))
print(peak() - before)
"""


def test_peak_memory_is_at_most_a_quarter():
    root = os.path.dirname(os.path.dirname(hs.__file__))
    peaks = {kind: int(subprocess.run([sys.executable, "-c", PEAK, kind, root], capture_output=True, text=True, check=True).stdout) for kind in ("fused", "apart")}
    assert 0 < peaks["fused"] <= 0.25 * peaks["apart"], peaks
