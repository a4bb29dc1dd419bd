"""Stock cross entropy of FP16 logits on the CPU: nll_loss is that of FP64 rounded once, cross entropy near it, for any number of targets and classes,
where torch sums in FP16."""

import pytest
import torch
import torch.nn.functional as F

import halfstep as hs
from layers import check_refused_alike

pytestmark = [pytest.mark.overrides, pytest.mark.smoke]
H = torch.float16
SHAPES = {"rows": (300, 7), "one class": (5, 1), "pixels": (3, 5, 70, 33), "channels_last": (3, 6, 20, 21), "line": (4, 5, 900), "volume": (2, 3, 4, 5, 6), "many": (70_000, 3), "many pixels": (2, 3, 260, 150)}


def case(shape, weighted):
    x = (torch.randn(shape) - 1.5).to(H)
    if len(shape) == 4 and shape[1] == 6:
        x = x.contiguous(memory_format=torch.channels_last)
    target = torch.randint(shape[1], shape[:1] + shape[2:])
    return x, target, torch.rand(shape[1]).to(H) + 0.5 if weighted else None


def close(ours, exact, steps=1.0):
    """Within `steps` units in the last place of FP16 (2^-24 below the normal numbers)."""
    exact = exact.double()
    step = torch.maximum(2.0 ** (torch.frexp(exact)[1].double() - 11), torch.tensor(2.0**-24, dtype=torch.float64))
    return ours.dtype == H and bool(((ours.double() - exact).abs() <= steps * step).all())


def both(f, x, *others):
    """Output and input gradient of f on FP16 tensors and on the same numbers in FP64, for one gradient of the output."""
    results = []
    for dtype in (H, torch.float64):
        leaf = x.detach().to(dtype)  # torch's own backward of channels_last raises
        leaf = (leaf if dtype == H else leaf.contiguous()).requires_grad_()
        y = f(leaf, *(t.to(dtype) if t is not None and t.is_floating_point() else t for t in others))
        g = torch.ones_like(y) * 512
        results.append((y, *torch.autograd.grad(y, leaf, g)))
    return results


def stock(f):
    """f() as torch computes it without halfstep."""
    try:
        hs.set_overrides(False)
        return f()
    finally:
        hs.set_overrides(True)


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_nll_loss_is_exact_but_for_one_rounding(shape, weighted, reduction):
    x, target, weight = case(shape, weighted)
    target.view(-1)[::3] = -7  # which is ignored
    (y, dx), (z, dz) = both(lambda x, w: F.nll_loss(x, target, w, ignore_index=-7, reduction=reduction), x, weight)
    if reduction != "sum" or z.abs() < 65504:
        assert close(y, z, 0.51)
    else:
        assert torch.isinf(y) and y.sign() == z.sign()  # what FP16 has for it
    assert close(dx, dz, 0.51) and dx.shape == x.shape


@pytest.mark.parametrize("shape", ((70_000, 3), (2, 3, 260, 150)), ids=("rows", "pixels"))
def test_more_targets_than_fp16_counts(shape):
    """Stock torch 2.11 and 2.15: the loss is NaN, and every gradient zero, above 65,504 targets."""
    x, target, _ = case(shape, False)
    (y, dx), (z, dz) = both(lambda x: F.cross_entropy(x, target), x)
    assert close(y, z, 2) and dz.abs().max() > 0 and (dx.double() - dz).norm() < 4e-3 * dz.norm()
    if torch.__version__.startswith("2.11"):
        (y, dx), _ = stock(lambda: both(lambda x: F.cross_entropy(x, target), x))
        assert y.isnan() and (dx == 0).all()


@pytest.mark.parametrize("kind, shape", (("smoothing", (16, 8192)), ("weighted smoothing", (4, 50_257)), ("smoothing", (70_000, 4)), ("probabilities", (70_000, 4))), ids=str)
def test_sums_over_classes_and_targets_do_not_overflow(kind, shape):
    """Stock torch 2.11 and 2.15: infinite or NaN."""
    x, target, weight = case(shape, kind.startswith("weighted"))
    if kind == "probabilities":
        target = torch.randn(shape).softmax(1).to(H)
    smoothing = 0.0 if kind == "probabilities" else 0.1
    f = lambda x, t, w: F.cross_entropy(x, t, w, label_smoothing=smoothing)
    (y, dx), (z, dz) = both(f, x, target, weight)
    assert close(y, z, 2) and close(dx, dz, 2)
    if torch.__version__.startswith("2.11"):
        assert not stock(lambda: f(x, target, weight)).isfinite()


@pytest.mark.parametrize("f", (F.cross_entropy, lambda x, target: F.nll_loss(x.log_softmax(1), target)), ids=("cross_entropy", "nll_loss"))
def test_compiled(f):
    x, target, _ = case((70_000, 3), False)
    (y, dx), _ = both(lambda x: F.cross_entropy(x, target), x)
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(f, fullgraph=True, dynamic=True)(leaf, target)
    (d,) = torch.autograd.grad(compiled, leaf, torch.ones_like(compiled) * 512)
    assert compiled.dtype == H and close(compiled, y, 2) and (d.double() - dx.double()).norm() < 4e-3 * dx.double().norm()


@pytest.mark.parametrize("shape", ((8, 3), (2, 3, 4, 5)), ids=str)
def test_a_given_sum_of_weights_counts(shape):
    """DTensor hands each rank the sum over all of them."""
    x, target, _ = case(shape, False)
    backward = torch.ops.aten.nll_loss_backward if len(shape) == 2 else torch.ops.aten.nll_loss2d_backward
    run = lambda total: backward(torch.ones((), dtype=H), x, target, None, 1, -100, torch.tensor(total, dtype=H))
    assert torch.equal(run(100.0), stock(lambda: run(100.0))) and run(100.0).min() == torch.tensor(-0.01, dtype=H)
    assert torch.equal(run(float(target.numel())) != 0, run(100.0) != 0) and run(float(target.numel())).min() == torch.tensor(-1 / target.numel(), dtype=H)


def test_one_rounding():
    x = torch.tensor([[-2048.0], [-1.0], [-(2.0**-24)]]).to(H)
    assert F.nll_loss(x, torch.zeros(3, dtype=torch.long), reduction="sum") == 2050  # 2049 + 2^-24: by way of FP32 it is 2048


def test_every_run_and_number_of_threads_gives_the_same_bits():
    x, target, weight = case((2, 3, 260, 150), True)
    run = lambda: both(lambda x, w: F.nll_loss(x, target, w), x, weight)[0]
    first, threads = run(), torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for _ in range(10):
                assert all(torch.equal(a, b) for a, b in zip(first, run()))
    finally:
        torch.set_num_threads(threads)


def test_nothing_but_ignored_targets():
    x, target, _ = case((40, 5), False)
    target.fill_(-100)
    (y, dx), (z, dz) = both(lambda x: F.cross_entropy(x, target), x)
    assert y.isnan() and z.isnan() and (dx == 0).all() and (dz == 0).all()


def test_byte_targets_and_one_sample():
    x, target, _ = case((40, 5), False)
    assert torch.equal(F.nll_loss(x, target.byte()), F.nll_loss(x, target))
    assert torch.equal(F.nll_loss(x[3], target[3]), -x[3, target[3]])


def test_second_derivative():
    x, target, _ = case((30, 5), False)
    results = []
    for dtype in (H, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        (d,) = torch.autograd.grad(F.cross_entropy(leaf, target) * 64, leaf, create_graph=True)
        results.append(torch.autograd.grad(d.square().sum(), leaf)[0].double())
    assert (results[0] - results[1]).norm() < 1e-2 * results[1].norm()


def test_under_autocast():
    """Which computes it in FP32, with or without us."""
    x, target, _ = case((70_000, 3), False)
    with hs.autocast("cpu"):
        y = F.cross_entropy(x, target)
    assert abs(y.item() - F.cross_entropy(x.double(), target).item()) < 2e-3


def test_what_torch_refuses_is_refused_in_the_same_words():
    x, target, weight = case((6, 5), True)
    image, plane, _ = case((2, 5, 4, 3), False)
    high, low = target.clone(), plane.clone()
    high[4], low[0, 1, 2] = 5, -1
    backward, one = torch.ops.aten.nll_loss_backward, torch.ones((), dtype=H)
    calls = [lambda: F.nll_loss(x, high), lambda: F.nll_loss(image, low), lambda: F.nll_loss(x, target[:4]), lambda: F.nll_loss(x, target, weight[:3]),
             lambda: F.nll_loss(x, target, weight.float()), lambda: F.nll_loss(x, target.float()), lambda: torch.ops.aten.nll_loss2d_forward(image, plane[:, :2], None, 1, -100),
             lambda: backward(torch.ones(3, dtype=H), x, target, None, 0, -100, one),
             lambda: backward(one, x, target, None, 1, -100, torch.ones(2, dtype=H)), lambda: backward(one, x, target, None, 1, -100, one.float()), lambda: backward(one.view(1, 1), x, target, None, 1, -100, one),
             lambda: F.cross_entropy(x, target.half()), lambda: F.cross_entropy(x, target.half(), label_smoothing=0.1), lambda: F.cross_entropy(x, target, weight[:2], label_smoothing=0.1)]
    check_refused_alike(calls)
