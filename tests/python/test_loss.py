"""hs.functional.cross_entropy: FP32 inside, the loss scale in the only rounding, torch's definitions, and what other kernels get wrong."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from layers import FLOATS, SIXTEEN, WIDTHS, check_compiled, check_error, check_repeats, check_rows_independent, check_scale_exact, error, families, layouts, run

import halfstep as hs

cross_entropy = hs.functional.cross_entropy
H = torch.ops.halfstep
GRID = [dict(label_smoothing=s, z_loss=z, weighted=w, reduction=r) for s, z, w, r in itertools.product((0.0, 0.1), (0.0, 1e-3), (False, True), ("mean", "sum", "none"))]


def reference(logits, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0):
    """The definition, in logits' dtype: torch's smoothing and weighted mean, and z_loss * logsumexp^2.

    -log p_y is log(1 + sum of the others' exp(x_c - x_y)), which keeps its precision where p_y is nearly 1.
    """
    lse, keep = torch.logsumexp(logits, -1), target != ignore_index
    label = target.where(keep, torch.zeros_like(target))
    w = torch.ones(logits.shape[-1], dtype=logits.dtype) if weight is None else weight.to(logits.dtype)
    log_p = logits - lse[:, None]
    others = torch.logsumexp(logits.masked_fill(F.one_hot(label, logits.shape[-1]).bool(), -float("inf")), -1)
    nll = F.softplus(others - logits.gather(1, label[:, None])[:, 0], threshold=40.0)
    rows = (1 - label_smoothing) * nll * w[label] + z_loss * lse**2
    if label_smoothing:
        rows = rows - label_smoothing / logits.shape[-1] * (log_p * w).sum(-1)
    rows = rows.where(keep, torch.zeros_like(rows))
    total = (w[label] * keep).sum()
    return rows if reduction == "none" else rows.sum() / (total if reduction == "mean" else 1)


def problem(rows, classes, dtype, seed=0, spread=3.0):
    random = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=random, dtype=torch.float64) * spread).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=random)
    return logits, target, torch.rand(classes, generator=random) + 0.5


def check(logits, target, weight=None, slack=1.0, ulps=1.0, **options):
    reduction = options.get("reduction", "mean")
    upstream = torch.randn(target.shape[0], generator=torch.Generator().manual_seed(1)) if reduction == "none" else torch.tensor(3.0)
    stock = {k: v for k, v in options.items() if k != "z_loss"}
    eager = lambda x: F.cross_entropy(x, target, None if weight is None else weight.to(x.dtype), **stock).to(torch.float32)
    if options.get("z_loss"):
        eager = lambda x: reference(x, target, weight, **options)
    check_error(lambda x: cross_entropy(x, target, weight, **options), lambda x: reference(x, target, weight, **options), eager, [logits], [upstream], ulps=ulps, slack=slack)


@pytest.mark.parametrize("dtype", FLOATS)
def test_error_over_all_options(dtype):
    for options, classes in itertools.product(GRID, (2, 17, 1000)):
        options = dict(options)
        logits, target, weight = problem(7, classes, dtype)
        target[2] = -100
        # A smoothed gradient is a small difference of numbers near 1/V: in FP32 torch's error and ours differ by chance there.
        check(logits, target, weight if options.pop("weighted") else None, slack=2.0 if dtype == torch.float32 else 1.0,
              ulps=1.0 if dtype != torch.float32 else 512.0 if options["label_smoothing"] else 4.0, **options)


@pytest.mark.parametrize("dtype", FLOATS)
def test_error_over_widths(dtype):
    for classes in WIDTHS[1:]:
        check(*problem(3, classes, dtype)[:2], slack=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [8191, 16385, 50257, 131072, 128257])
def test_error_over_large_vocabularies(dtype, classes):
    check(*problem(3, classes, dtype)[:2], slack=2.0)
    logits, target, weight = problem(3, classes, dtype)
    if dtype != torch.float32:
        check(logits, target, weight, slack=4.0, label_smoothing=0.1, z_loss=1e-4)
        return
    # Where the two terms of a smoothed gradient nearly cancel, an ULP of what is left says nothing: the unit is one of the terms.
    options = dict(label_smoothing=0.1, z_loss=1e-4)
    _, (got,) = run(lambda x: cross_entropy(x, target, weight, **options), [logits], [torch.tensor(3.0)])
    _, (exact,) = run(lambda x: reference(x, target, weight, **options), [logits], [torch.tensor(3.0)], torch.float64)
    wide, w = logits.double(), weight.double()
    direct = 0.9 * w[target] + 0.1 / classes * w.sum() + 2e-4 * torch.logsumexp(wide, -1)
    terms = (wide.softmax(-1) * direct[:, None] + 0.1 / classes * w + 0.9 * w[target][:, None] * F.one_hot(target, classes)) * 3 / w[target].sum()
    # The exponential's argument, up to 27 below the largest logit, is rounded by at most 2^-20: 16 of the 24.
    assert ((got - exact).abs() / terms).max() < 24 * 2.0**-24


@pytest.mark.parametrize("dtype", FLOATS)
def test_error_over_families(dtype):
    for name, logits in families((5, 257), dtype):
        check(logits, torch.tensor([0, 256, 3, 128, 17]), slack=2.0)
    for value in (65504.0, -65504.0, 2.0**-20):
        check(torch.full((3, 33), value, dtype=dtype), torch.tensor([0, 32, 5]))
    confident = torch.zeros(4, 100, dtype=dtype)
    confident[torch.arange(4), torch.tensor([3, 4, 5, 6])] = torch.tensor([10.0, 20.0, 60.0, 65504.0]).to(dtype)
    for target in (torch.tensor([3, 4, 5, 6]), torch.tensor([0, 99, 0, 1])):
        check(confident, target, reduction="none")


def test_a_confident_row_keeps_the_precision_of_its_loss_and_of_its_label():
    """p_y is 1 to FP32's last place: the loss is log(1 + rest), not the difference of two logarithms."""
    logits = torch.zeros(1, 100)
    logits[0, 7] = 25.0
    (loss,), (grad,) = run(lambda x: cross_entropy(x, torch.tensor([7])), [logits], [torch.tensor(1.0)])
    (exact,), (want,) = run(lambda x: reference(x, torch.tensor([7])), [logits], [torch.tensor(1.0)], torch.float64)
    rest = 99 * torch.exp(torch.tensor(-25.0, dtype=torch.float64))
    assert abs(loss / torch.log1p(rest) - 1) < 1e-6 and abs(grad[0, 7] / (-rest / (1 + rest)) - 1) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS + [torch.float64])
def test_the_loss_is_wide(dtype):
    logits, target, _ = problem(3, 10, dtype)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (3,))):
        loss = cross_entropy(logits, target, reduction=reduction)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == shape
    scaled = cross_entropy(logits, target) * 65536  # an FP16 loss would be infinite here
    assert scaled.isfinite()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes_of_torch(reduction):
    images, labels = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
    labels[0, 1] = -100
    for given, target in ((images, labels), (images[0, :, 0, 0], labels[0, 0, 0]), (images[:, :, 0, 0], labels[:, 0, 0]), (images.half(), labels)):
        up = [torch.randn(target.shape) if reduction == "none" else torch.tensor(2.0)]
        ours, grads = run(lambda x: cross_entropy(x, target, reduction=reduction), [given], up)
        want, want_grads = run(lambda x: F.cross_entropy(x, target, reduction=reduction), [given.float()], up)
        torch.testing.assert_close(ours, want)
        torch.testing.assert_close(grads[0].float(), want_grads[0], rtol=1e-3, atol=1e-6)


def test_layouts_are_read_and_gradients_arrive_in_any():
    logits, target, _ = problem(6, 9, torch.float16)
    want = run(lambda x: cross_entropy(x, target, reduction="none"), [logits], [torch.arange(6.0)])
    for name, given in layouts(logits):
        got = run(lambda x: cross_entropy(x, target, reduction="none"), [given], [torch.arange(12.0)[::2] / 2])
        assert torch.equal(got[0][0], want[0][0]) and torch.equal(got[1][0], want[1][0]), name
    padded = torch.full((6, 16), 9.0, dtype=torch.float16)
    padded[:, :9] = logits
    assert torch.equal(cross_entropy(padded[:, :9], target, reduction="none"), want[0][0])
    expanded = logits[:1].expand(6, 9)
    assert torch.equal(cross_entropy(expanded, target), cross_entropy(expanded.contiguous(), target))
    up = torch.tensor(2.0).expand(6)
    assert run(lambda x: cross_entropy(x, target, reduction="none"), [logits], [up])[1][0].isfinite().all()


def test_ignored_rows_are_zero_whatever_they_hold():
    for dtype in FLOATS:
        logits, target, _ = problem(4, 20, dtype)
        logits[1], logits[2] = float("nan"), float("inf")
        target[1:3] = 7
        for scale in (None, torch.tensor(4.0)):
            (loss,), (grad,) = run(lambda x: cross_entropy(x, target, ignore_index=7, reduction="none", label_smoothing=0.1, z_loss=1e-3, grad_scale=scale), [logits], [torch.ones(4)])
            assert not loss[1:3].any() and not grad[1:3].any() and grad[0].any() and loss.isfinite().all() and grad.isfinite().all()


def test_only_ignored_rows_give_nan_and_zero_gradients_as_in_torch():
    target = torch.full((3,), -100)
    (loss,), (grad,) = run(lambda x: cross_entropy(x, target), [torch.randn(3, 5)], [torch.tensor(1.0)])
    assert loss.isnan() and F.cross_entropy(torch.randn(3, 5), target).isnan() and not grad.any()
    assert cross_entropy(torch.randn(3, 5), target, reduction="sum") == 0
    empty = torch.zeros(0, dtype=torch.int64)
    assert cross_entropy(torch.randn(0, 5), empty).isnan() and cross_entropy(torch.randn(0, 5), empty, reduction="none").shape == (0,)


def test_a_bad_row_is_nan_and_the_others_are_not():
    for value in (float("nan"), float("inf")):
        for position in (0, 15, 16, 39):
            logits, target, _ = problem(3, 40, torch.float16)
            logits[1, position] = value
            (loss,), (grad,) = run(lambda x: cross_entropy(x, target, reduction="none"), [logits], [torch.ones(3)])
            assert loss.isnan().tolist() == [False, True, False] and grad[1].isnan().all() and grad[::2].isfinite().all()
    logits[1] = -float("inf")
    assert cross_entropy(logits, target, reduction="none").isnan().tolist() == [False, True, False]
    logits = torch.randn(1, 40)
    logits[0, 3:9] = -float("inf")  # masked classes
    (loss,), (grad,) = run(lambda x: cross_entropy(x, torch.tensor([0])), [logits], [torch.tensor(1.0)])
    assert loss.isfinite() and not grad[0, 3:9].any() and grad.isfinite().all()
    assert cross_entropy(logits, torch.tensor([4])) == float("inf")


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_scale_changes_no_bit(dtype, reduction):
    logits, target, weight = problem(8, 50, dtype, spread=0.5)
    up = torch.tensor(2.0**-8) if reduction == "mean" else torch.full((8,), 2.0**-10)
    check_scale_exact(lambda x: cross_entropy(x, target, weight, label_smoothing=0.1, z_loss=1e-4, reduction=reduction), [logits], [up])


@pytest.mark.parametrize("dtype", FLOATS)
def test_grad_scale_gives_the_same_bits_where_nothing_leaves_the_range(dtype):
    for options in GRID:
        options = dict(options)
        logits, target, weight = problem(6, 40, dtype, spread=0.5)
        target[3] = -100
        weight = weight if options.pop("weighted") else None
        for scale, arrives in ((1024.0, 1024.0), (1024.0, 256.0), (1.0, 1024.0)):
            up = [torch.full((6,), arrives) if options["reduction"] == "none" else torch.tensor(arrives)]
            plain = run(lambda x: cross_entropy(x, target, weight, **options), [logits], up)
            hinted = run(lambda x: cross_entropy(x, target, weight, grad_scale=torch.tensor(scale), **options), [logits], up)
            normal = (plain[1][0] == 0) | (plain[1][0].double().abs() >= torch.finfo(dtype).smallest_normal * 2048)
            assert torch.equal(plain[0][0], hinted[0][0]) and torch.equal(plain[1][0][normal], hinted[1][0][normal])
            if scale == arrives:
                assert torch.equal(plain[1][0], hinted[1][0])


def test_a_gradient_below_fp16_is_kept_by_the_scale_and_lost_by_rounding_first():
    """Liger#512: at 32,768 rows each gradient is below 2^-15; rounded to FP16 before the loss scale, most are zero."""
    logits, target, _ = problem(32768, 16, torch.float16, spread=4.0)
    exact = run(lambda x: reference(x, target), [logits], [torch.tensor(65536.0)], torch.float64)[1][0]
    early = run(lambda x: F.cross_entropy(x.float(), target), [logits], [torch.tensor(1.0)])[1][0] * 65536
    for scale in (None, torch.tensor(65536.0)):
        grad = run(lambda x: cross_entropy(x, target, grad_scale=scale), [logits], [torch.tensor(65536.0)])[1][0]
        assert F.cosine_similarity(grad.double().flatten(), exact.flatten(), dim=0) >= 0.999999
        assert (grad != 0).double().mean() >= 0.99 and (early != 0).double().mean() <= 0.8


def test_a_second_backward_gives_the_same_gradient():
    logits, target, _ = problem(4, 30, torch.float16, spread=0.5)
    for scale in (None, torch.tensor(512.0)):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, target, grad_scale=scale)
        first = torch.autograd.grad(loss, leaf, torch.tensor(1024.0), retain_graph=True)[0].clone()
        for _ in range(2):
            assert torch.equal(torch.autograd.grad(loss, leaf, torch.tensor(1024.0), retain_graph=True)[0], first)
        assert torch.equal(torch.autograd.grad(loss, leaf, torch.tensor(2048.0))[0], first * 2)


def test_rescaling_by_one_touches_nothing():
    grad = torch.randn(3, 4).half()
    bits, version = grad.clone(), grad.data_ptr()
    H.rescale_gradient_(grad, torch.tensor(1024.0), torch.tensor(1024.0))
    assert torch.equal(grad, bits) and grad.data_ptr() == version
    H.rescale_gradient_(grad, torch.tensor([1.0, 2.0, 4.0]), None)
    assert torch.equal(grad, (bits.float() * torch.tensor([[1.0], [2.0], [4.0]])).half())
    assert torch.equal(H.rescale_gradient(bits.float(), torch.tensor(3.0), torch.tensor(2.0), torch.float16), (bits.float() * 1.5).half())


def test_classes_zero_and_the_ignored_label_are_never_confused():
    """apex: padding_idx is 0 unless told, so class 0 is never learned; and the label -100 is read before it is masked."""
    logits, _, _ = problem(4, 6, torch.float16)
    target = torch.tensor([0, -100, 5, -100])
    (loss,), (grad,) = run(lambda x: cross_entropy(x, target, reduction="none"), [logits], [torch.ones(4)])
    assert loss[0] > 0 and grad[0, 0] < 0 and not loss[1::2].any() and not grad[1::2].any()
    far = torch.full((4,), -(2**62))
    assert not cross_entropy(logits, far, ignore_index=-(2**62), reduction="none").any()


def test_the_log_sum_is_not_rounded_to_16_bits():
    """apex keeps it in FP16 unless half_to_float: near 12 its step is 2^-7, the loss's error then as large."""
    logits, target, _ = problem(64, 50_000, torch.float16, spread=1.0)
    exact = reference(logits.double(), target, reduction="none")
    assert error(cross_entropy(logits, target, reduction="none"), exact) <= 4  # ULP of FP32
    assert (exact - exact.half().double()).abs().max() > 1e-3


def test_reduction_none_weighs_each_row():
    """Liger#968: with reduction none the gradient took the first row's."""
    logits, target, _ = problem(5, 30, torch.float32)
    arrives = torch.tensor([1.0, 0.0, -2.0, 0.5, 1e3])
    grad = run(lambda x: cross_entropy(x, target, reduction="none"), [logits], [arrives])[1][0]
    plain = run(lambda x: cross_entropy(x, target, reduction="none"), [logits], [torch.ones(5)])[1][0]
    torch.testing.assert_close(grad, plain * arrives[:, None])


def test_repeats_and_rows():
    logits, target, weight = problem(9, 1000, torch.float16)
    check_repeats(lambda x: cross_entropy(x, target, weight, label_smoothing=0.1), [logits], [torch.tensor(8.0)])
    check_rows_independent(lambda x, t: cross_entropy(x, t, reduction="none"), [logits, target], lambda inputs, part: [x[part] for x in inputs])


def test_derivatives_agree_with_finite_differences_and_end():
    logits, target, weight = problem(3, 5, torch.float64, spread=1.0)
    target[1] = -100
    for reduction, z, smoothing in itertools.product(("mean", "sum", "none"), (0.0, 0.1), (0.0, 0.2)):
        for scale in (None, torch.tensor(4.0)):
            f = lambda x: cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing, z_loss=z, grad_scale=scale)
            assert torch.autograd.gradcheck(f, (logits.requires_grad_(),))
    for scale in (None, torch.tensor(4.0)):
        grad = torch.autograd.grad(cross_entropy(logits, target, grad_scale=scale), logits, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="is differentiable once"):
            grad.sum().backward()


@pytest.mark.parametrize("scale", [None, torch.tensor(1024.0)])
def test_one_graph_with_dynamic_shapes(scale):
    def inputs(size):
        logits, target, _ = problem(size, 7 * size, torch.float16)
        return [logits, target], [torch.tensor(1024.0)]

    check_compiled(lambda x, t: cross_entropy(x, t, label_smoothing=0.1, grad_scale=scale), inputs, (3, 5, 8))


def test_autocast_leaves_the_dtype():
    logits, target, _ = problem(3, 10, torch.float16)
    with hs.autocast("cpu"):
        assert torch.equal(cross_entropy(logits, target), cross_entropy(logits.clone(), target))
        assert cross_entropy(logits.float(), target).dtype == torch.float32


def test_errors_name_the_argument():
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    for message, call in {
        r"cross_entropy: target\[1\] is 5; expected a class from 0 to 4, or ignore_index -100": lambda: cross_entropy(logits, torch.tensor([0, 5, 2])),
        r"cross_entropy: target\[2\] is -1": lambda: cross_entropy(logits, torch.tensor([0, 1, -1])),
        r"target is torch.float32\[3, 5\]; expected int64 class indices \(class probabilities": lambda: cross_entropy(logits, logits.softmax(1)),
        r"target is torch.int64\[2\] but logits is torch.float32\[3, 5\]": lambda: cross_entropy(logits, target[:2]),
        r"logits is torch.float32\[3, 0\]: no classes": lambda: cross_entropy(logits[:, :0], target),
        r"reduction is 'avg'; expected 'mean', 'sum' or 'none'": lambda: cross_entropy(logits, target, reduction="avg"),
        r"label_smoothing is 1.5": lambda: cross_entropy(logits, target, label_smoothing=1.5),
        r"z_loss is -1": lambda: cross_entropy(logits, target, z_loss=-1.0),
        r"weight is torch.float32\[4\]; expected 5": lambda: cross_entropy(logits, target, torch.ones(4)),
        r"weight requires grad": lambda: cross_entropy(logits, target, torch.ones(5, requires_grad=True)),
        r"grad_scale is torch.float32\[2\]; expected one": lambda: cross_entropy(logits, target, grad_scale=torch.ones(2)),
        r"grad_scale requires grad": lambda: cross_entropy(logits, target, grad_scale=torch.ones((), requires_grad=True)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_the_module_is_torchs_with_a_z_loss():
    logits, target, weight = problem(4, 6, torch.float16)
    ours = hs.nn.CrossEntropyLoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.1, z_loss=1e-3)
    assert isinstance(ours, torch.nn.CrossEntropyLoss) and list(ours.state_dict()) == list(torch.nn.CrossEntropyLoss(weight).state_dict())
    assert torch.equal(ours(logits, target), cross_entropy(logits, target, weight, 2, "sum", 0.1, 1e-3))
    leaf = logits.clone().requires_grad_()
    ours(leaf, target, grad_scale=torch.tensor(8.0)).backward()
    assert leaf.grad.dtype == torch.float16
