"""hs.functional.layer_norm and rms_norm, hs.nn.LayerNorm and RMSNorm: against FP64 and against stock torch; what other libraries get wrong."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import halfstep as hs
from layers import (FLOATS, SIXTEEN, WIDTHS, check_compiled, check_repeats, check_rows_independent, check_scale_exact, error, families, layouts, run, ulp)

KINDS = ["layer_norm", "rms_norm"]


class Rounded(torch.autograd.Function):
    """x in the residual's dtype, as both libraries store it, and the gradient untouched."""

    @staticmethod
    def forward(ctx, x, dtype):
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def plain_norm(kind, h, weight, bias, eps, offset=0.0):
    """The definition, one operation after the other; over the last dimensions, as many as weight has."""
    dims = tuple(range(-weight.dim(), 0))
    if kind == "layer_norm":
        h = h - h.mean(dims, keepdim=True)
    z = h / torch.sqrt((h * h).mean(dims, keepdim=True) + eps)
    return z * (weight + offset) + (0 if bias is None else bias)


def functions(kind, eps=1e-5, residual_dtype=None, offset=0.0):
    """ours, the FP64 reference and stock torch: f(x, weight, bias) or f(x, residual, weight, bias)."""

    def ours(x, *rest):
        residual, weight, bias = rest if residual_dtype else (None, *rest)
        if kind == "layer_norm":
            return hs.functional.layer_norm(x, weight.shape, weight, bias, eps, residual)
        return hs.functional.rms_norm(x, weight.shape, weight, eps, residual, offset)

    def reference(x, *rest):
        residual, weight, bias = rest if residual_dtype else (None, *rest)
        if not residual_dtype:
            return plain_norm(kind, x, weight, bias if kind == "layer_norm" else None, eps, offset)
        h = Rounded.apply(x + residual, residual_dtype)
        return plain_norm(kind, h, weight, bias if kind == "layer_norm" else None, eps, offset), h

    def eager(x, *rest):
        residual, weight, bias = rest if residual_dtype else (None, *rest)
        h = x if residual is None else (residual + x).to(residual_dtype)
        w = (weight + offset if offset else weight).to(h.dtype)
        y = F.layer_norm(h, w.shape, w, bias.to(h.dtype), eps) if kind == "layer_norm" else F.rms_norm(h, w.shape, w, eps)
        return y if residual is None else (y.to(x.dtype), h)

    return ours, reference, eager


def parameters(shape, dtype, seed=1):
    random = torch.Generator().manual_seed(seed)
    return (1 + torch.randn(shape, generator=random) / 4).to(dtype), (torch.randn(shape, generator=random) / 4).to(dtype)


def case(rows, width, dtype, parameter_dtype=None, residual_dtype=None, seed=0):
    """Inputs and upstream gradients."""
    random = torch.Generator().manual_seed(seed)
    make = lambda d: torch.randn(rows, width, generator=random).to(d)
    inputs = [make(dtype)] + ([make(residual_dtype)] if residual_dtype else []) + list(parameters((width,), parameter_dtype or dtype, seed))
    return inputs, [make(dtype)] + ([make(residual_dtype)] if residual_dtype else [])


def check_output(kind, inputs, name=None):
    """At most one ULP of the output (or torch's own error), beside what FP32 arithmetic leaves of terms that cancel: 4 x 2^-24 of their size."""
    ours, reference, eager = functions(kind)
    x, weight, bias = (t.double() for t in inputs)
    with torch.no_grad():
        got, want, peer = ours(*inputs), reference(x, weight, bias), eager(*inputs)
        terms = (want - bias * (kind == "layer_norm")).abs() + bias.abs()
    assert got.dtype == inputs[0].dtype and torch.equal(got.isfinite(), want.to(got.dtype).isfinite()), name
    allowed = ulp(want, got.dtype) + 2.0**-22 * terms
    if peer.isfinite().all():
        allowed = allowed.maximum((peer.double() - want).abs().max())
    assert ((got.double() - want).abs() <= allowed).all(), name


# A gradient is a sum of terms that cancel: its error is measured against their size, not against what is left.
def check_close(kind, inputs, upstream, residual_dtype=None, eps=1e-5, offset=0.0, slack=1.0):
    ours, reference, eager = functions(kind, eps, residual_dtype, offset)
    got, got_grads = run(ours, inputs, upstream)
    want, want_grads = run(reference, inputs, upstream, torch.float64)
    try:
        peer, peer_grads = run(eager, inputs, upstream)
    except RuntimeError:
        peer = peer_grads = None
    for i, (g, w) in enumerate(zip(got + got_grads, want + want_grads)):
        if w is None:
            assert g is None
            continue
        p = None if peer is None else (peer + peer_grads)[i]
        scale = w.abs().amax(-1, keepdim=True) if w.dim() > 1 else w.abs().amax()
        unit = torch.finfo(g.dtype).eps * scale.clamp(min=torch.finfo(g.dtype).tiny)
        if g.dtype == torch.float32:
            unit = unit * 4
        measured, allowed = ((g.double() - w).abs() / unit).max().item(), 1.0
        if p is not None and p.isfinite().all():
            allowed = max(allowed, slack * ((p.double() - w).abs() / unit).max().item())
        assert measured <= allowed, f"{i}: error {measured:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_output_is_as_near_fp64_as_torch_or_within_one_ulp_at_every_width(kind, dtype):
    for width in WIDTHS:
        check_output(kind, case(5, width, dtype, seed=width)[0], width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_at_every_width(kind, dtype):
    for width in WIDTHS[3:]:
        inputs, upstream = case(9, width, dtype, seed=width)
        check_close(kind, inputs, upstream)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [8191, 12288, 16383, 16385, 32769, 65536, 131072])
def test_long_rows(kind, dtype, width):
    inputs, upstream = case(3, width, dtype, seed=width)
    check_close(kind, inputs, upstream)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 3, 131, 133, 4097])
def test_numbers_of_rows(kind, rows):
    inputs, upstream = case(rows, 24, torch.float16, seed=rows)
    if rows:
        check_close(kind, inputs, upstream)
    else:
        outputs, grads = run(functions(kind)[0], inputs, upstream)
        assert outputs[0].shape == (0, 24) and not any(g.any() for g in grads if g is not None)
    wide, upstream = case(rows, 1, torch.float32)
    outputs, grads = run(functions(kind)[0], wide, upstream)
    assert outputs[0].shape == (rows, 1) and outputs[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SIXTEEN + [torch.float32])
@pytest.mark.parametrize("residual_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_residual_stream_keeps_its_dtype_and_gets_its_gradient(kind, dtype, residual_dtype):
    for width, parameter_dtype in ((7, torch.float32), (300, None)):
        inputs, upstream = case(70, width, dtype, parameter_dtype, residual_dtype)
        outputs, grads = run(functions(kind, residual_dtype=residual_dtype)[0], inputs, upstream)
        assert [o.dtype for o in outputs] == [dtype, residual_dtype] and [g.dtype for g in grads if g is not None] == [t.dtype for t in inputs][: len(grads) - (kind == "rms_norm")]
        assert torch.equal(outputs[1], (inputs[0].float() + inputs[1].float()).to(residual_dtype))
        check_close(kind, inputs, upstream, residual_dtype)
    # Only one of the two outputs is used, only one of the two inputs wants a gradient.
    check_close(kind, inputs, [upstream[0], None], residual_dtype)
    check_close(kind, inputs, [None, upstream[1]], residual_dtype)
    function = functions(kind, residual_dtype=residual_dtype)[0]
    full = run(function, inputs, upstream)[1]
    for wanted in (0, 1, 2):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        grad, = torch.autograd.grad(function(*leaves), leaves[wanted], upstream)
        assert torch.equal(grad, full[wanted])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_families_of_data(kind, dtype):
    upstream = torch.randn(6, 257, generator=torch.Generator().manual_seed(5)).to(dtype)
    for name, x in families((6, 257), dtype):
        if name == "alternating largest" and kind == "layer_norm" and dtype != torch.float16:
            continue  # x - mean leaves FP32
        inputs = [x, *parameters((257,), dtype)]
        check_output(kind, inputs, name)
        grads = run(functions(kind)[0], inputs, [upstream])[1]
        assert all(g.isfinite().all() for g in grads if g is not None), name


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_give_the_same_bits(kind):
    x, residual, upstream = (torch.randn(4, 6, 5, 8, generator=torch.Generator().manual_seed(s)).half() for s in range(3))
    weight, bias = parameters((5, 8), torch.float16)
    function = functions(kind, residual_dtype=torch.float16)[0]
    want = run(function, [x, residual, weight, bias], [upstream, upstream])
    for name, other in layouts(x):
        for given in ([other, residual, weight, bias], [x, dict(layouts(residual))[name], weight, bias], [x, residual, weight.t().contiguous().t(), bias]):
            got = run(function, given, [upstream, dict(layouts(upstream))[name]])
            assert all(torch.equal(a, b) for a, b in zip(want[0] + want[1], got[0] + got[1]) if a is not None), name
    expanded = torch.ones(1, 1, 1, 1, dtype=torch.float16).expand(4, 6, 5, 8)
    a, b = (run(function, [x, residual, weight, bias], [u, u])[1] for u in (expanded, expanded.contiguous()))
    assert all(torch.equal(p, q) for p, q in zip(a, b) if p is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_several_normalised_dimensions_and_absent_parameters(kind):
    x = torch.randn(3, 4, 5, 6).half()
    flat = functions(kind)[0](x.reshape(12, 30), *[p.reshape(30) for p in parameters((5, 6), torch.float16)])
    assert torch.equal(functions(kind)[0](x, *parameters((5, 6), torch.float16)).reshape(12, 30), flat)
    one, none = torch.ones(6).half(), torch.zeros(6).half()
    function = getattr(hs.functional, kind)
    bare = function(x, 6, eps=1e-5)
    assert torch.equal(bare, function(x, (6,), one, eps=1e-5)) and torch.equal(bare, function(x, [6], eps=1e-5))
    if kind == "layer_norm":
        assert torch.equal(bare, function(x, 6, None, none)) and torch.equal(function(x, 6, one, none), bare)
    else:
        assert torch.equal(function(x, 6, none, 1e-5, weight_offset=1.0), bare) and torch.equal(function(x, 6, None, 1e-5, weight_offset=1.0), function(x, 6, one * 2, 1e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_one_derivative_only(kind):
    for residual in (None, torch.float64):
        inputs, _ = case(3, 5, torch.float64, residual_dtype=residual)
        inputs = [t.requires_grad_() for t in inputs[: len(inputs) - (kind == "rms_norm")]]
        function = functions(kind, residual_dtype=residual, offset=0.5 if kind == "rms_norm" else 0.0)[0]
        call = function if kind == "layer_norm" else lambda *a: function(*a, None)
        assert torch.autograd.gradcheck(call, inputs)
        outputs = call(*inputs)
        grad, = torch.autograd.grad(outputs[0] if residual else outputs, inputs[0], torch.ones_like(inputs[0]), create_graph=True)
        with pytest.raises(RuntimeError, match=f"halfstep::{kind}_backward is differentiable once"):
            grad.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_hundred_runs_give_the_same_bits_and_rows_do_not_see_each_other(kind, dtype):
    inputs, upstream = case(200, 65, dtype, residual_dtype=dtype)
    function = functions(kind, residual_dtype=dtype)[0]
    check_repeats(function, inputs, upstream)
    check_rows_independent(function, inputs, lambda all, part: [all[0][part], all[1][part], *all[2:]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_loss_scale_is_exact(kind, dtype):
    inputs, upstream = case(130, 96, dtype, torch.float32)
    # Every term scales with the gradient; 2^-14 keeps the largest scale finite in FP16.
    check_scale_exact(functions(kind)[0], inputs, [upstream[0] * 2.0**-10], range(0, 25, 4) if dtype != torch.float16 else range(0, 17, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_stay_in_their_row(kind):
    for bad in (float("nan"), float("inf"), -float("inf")):
        for column in (0, 15, 16, 40):
            inputs, upstream = case(5, 41, torch.float16)
            clean = run(functions(kind)[0], inputs, upstream)
            inputs[0][2, column] = bad
            outputs, grads = run(functions(kind)[0], inputs, upstream)
            rest = torch.tensor([0, 1, 3, 4])
            assert torch.equal(outputs[0][rest], clean[0][0][rest]) and torch.equal(grads[0][rest], clean[1][0][rest])
            assert not outputs[0][2].isfinite().all() and not grads[0][2].isfinite().any() and not grads[1].isfinite().all()


def test_rows_of_65504_do_not_overflow():
    x = torch.full((3, 1024), 65504.0).half()
    assert torch.equal(hs.functional.rms_norm(x, 1024, eps=1e-5), torch.ones(3, 1024).half())
    assert not hs.functional.layer_norm(x, 1024).any()
    x[:, ::2] *= -1
    assert torch.equal(hs.functional.layer_norm(x, 1024), x.sign())
    huge = torch.full((2, 100), 3e38).where(torch.arange(100) % 2 == 0, torch.tensor(-3e38))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.allclose(hs.functional.layer_norm(huge.to(dtype), 100).float(), huge.sign(), atol=1e-2)


def test_a_residual_sum_beyond_the_range_is_infinite_in_fp16_and_fine_in_fp32():
    x = torch.full((1, 64), 40000.0).half()
    assert hs.functional.rms_norm(x, 64, residual=x)[1].isinf().all()
    y, h = hs.functional.rms_norm(x, 64, residual=x.float())
    assert torch.equal(h, torch.full((1, 64), 80000.0)) and torch.equal(y, torch.ones(1, 64).half())


@pytest.mark.parametrize("dtype", FLOATS + [torch.float64])
def test_constant_rows_with_a_tiny_eps_give_zeros_and_finite_gradients(dtype):
    # pytorch#41527: FP16 layer norm of zeros with eps 1e-12 was NaN.
    for value in (0.0, 0.7, 1e-3, 1000.1):
        x = torch.full((4, 300), value, dtype=dtype).requires_grad_()
        y = hs.functional.layer_norm(x, 300, eps=1e-12)
        assert not y.any()
        y.backward(torch.randn(4, 300).to(dtype))
        assert not x.grad.isnan().any()


def test_a_large_mean_costs_no_digits():
    x = (1e3 + 1e-2 * torch.randn(8, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).float().requires_grad_()
    upstream = torch.randn(8, 2000, generator=torch.Generator().manual_seed(1))
    y = hs.functional.layer_norm(x, 2000, eps=1e-12)
    exact = x.detach().double().requires_grad_()
    want = F.layer_norm(exact, (2000,), eps=1e-12)
    grad, = torch.autograd.grad(y, x, upstream)
    want_grad, = torch.autograd.grad(want, exact, upstream.double())
    assert (y - want).abs().max() < 1e-6 and ((grad - want_grad).abs().max() < 1e-6 * want_grad.abs().max())
    # An outlier where the first elements lie moves the point that sums are taken around.
    with torch.no_grad():
        x[:, :16] = 5e4
        assert (hs.functional.layer_norm(x, 2000) - F.layer_norm(x.double(), (2000,))).abs().max() < 1e-5


def test_what_other_libraries_lose():
    # unsloth: RMSNorm without a gradient of its weight.
    x, weight = torch.randn(8, 64).half(), torch.ones(64).half().requires_grad_()
    hs.functional.rms_norm(x, 64, weight, 1e-5).sum().backward()
    assert weight.grad.abs().min() > 0
    # apex, memory-efficient: x is recovered from y by dividing by a clamped weight, so weights near zero spoil gradients.
    inputs, upstream = case(16, 64, torch.float32)
    inputs[1][::2] = 1e-9
    inputs[1][1::4] = 0.0
    for kind in KINDS:
        check_close(kind, inputs, upstream)
    # apex#411: 2^16 rows and more.
    inputs, upstream = case(70001, 8, torch.float16)
    check_close("layer_norm", inputs, upstream)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_weights_gradient_over_many_rows_is_rounded_once(dtype):
    # Liger#950: summed in 16 bits, the gradient stops growing.
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = [x, torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)]
    for kind in KINDS:
        ours, reference, _ = functions(kind)
        upstream = ours(*inputs)  # so that every term of the sum is positive
        got, want = run(ours, inputs, [upstream])[1][1], run(reference, inputs, [upstream], torch.float64)[1][1]
        assert error(got, want) <= 0.51


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32])
def test_one_compiled_graph_with_dynamic_shapes(kind, residual_dtype):
    def make(size):
        inputs, upstream = case(size, 48, torch.float16, torch.float32, residual_dtype, seed=size)
        return inputs, upstream

    check_compiled(functions(kind, residual_dtype=residual_dtype)[0], make, [5, 130, 17])


@pytest.mark.slow
def test_compiled_with_inductor():
    module = hs.nn.LayerNorm(32).half()
    x, residual = torch.randn(7, 32).half().requires_grad_(), torch.randn(7, 32).half()
    compiled = torch.compile(module, fullgraph=True)
    for a, b in zip(compiled(x, residual), module(x, residual)):
        assert torch.equal(a, b)


def test_autocast_leaves_the_dtype_of_x_alone():
    module = hs.nn.LayerNorm(16)
    for dtype in FLOATS:
        with hs.autocast("cpu"):
            y = module(torch.randn(3, 16).to(dtype))
        assert y.dtype == dtype and module.weight.dtype == torch.float32


@pytest.mark.parametrize("make", [lambda nn: nn.LayerNorm((4, 8)), lambda nn: nn.LayerNorm(8, eps=1e-3, bias=False), lambda nn: nn.LayerNorm(8, elementwise_affine=False),
                                  lambda nn: nn.RMSNorm(8), lambda nn: nn.RMSNorm((4, 8), eps=1e-3, elementwise_affine=False)])
def test_modules_take_the_place_of_torchs(make):
    stock, ours = make(torch.nn), make(hs.nn)
    assert isinstance(ours, type(stock)) and repr(ours) == repr(stock)
    for p in stock.parameters():
        torch.nn.init.uniform_(p)
    ours.load_state_dict(stock.state_dict())
    for dtype in FLOATS:
        x, cast = torch.randn(3, 4, 8).to(dtype), copy.deepcopy(ours).to(dtype)
        exact = copy.deepcopy(stock).to(dtype).double()
        if isinstance(stock, torch.nn.RMSNorm) and stock.eps is None:
            exact.eps = torch.finfo(dtype).eps  # that of x's dtype
        want = exact(x.double())
        assert (cast(x).double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()
    before, ids = stock(x), [id(p) for p in stock.parameters()]
    stock.__class__ = getattr(hs.nn, stock.__class__.__name__)
    assert torch.allclose(stock(x), before, atol=1e-6) and [id(p) for p in stock.parameters()] == ids
    y, h = stock(x, x)
    assert torch.equal(h, x + x) and torch.equal(y, stock(h))


def test_a_weight_around_zero():
    module = hs.nn.RMSNorm(8, eps=1e-5, weight_offset=1.0)
    x = torch.randn(3, 8)
    assert not module.weight.any() and "weight_offset=1.0" in repr(module)
    assert torch.equal(module(x), hs.nn.RMSNorm(8, eps=1e-5)(x))
    inputs, upstream = case(20, 33, torch.float16)
    check_close("rms_norm", inputs, upstream, offset=1.0)


def test_refusals_name_what_was_given():
    x, w = torch.randn(3, 4), torch.ones(4)
    f, r = hs.functional.layer_norm, hs.functional.rms_norm
    for call, message in [
        (lambda: f(x, 5), r"layer_norm: x is torch.float32\[3, 4\] but normalized_shape is \[5\]"),
        (lambda: f(x, []), r"layer_norm: normalized_shape is \[\]; expected at least one dimension"),
        (lambda: r(x, (2, 3, 4)), r"rms_norm: x is torch.float32\[3, 4\] but normalized_shape is \[2, 3, 4\]"),
        (lambda: f(x, 4, torch.ones(3)), r"layer_norm: weight is torch.float32\[3\] but normalized_shape is \[4\]"),
        (lambda: f(x, 4, w, torch.ones(1, 4)), r"layer_norm: bias is torch.float32\[1, 4\] but normalized_shape is \[4\]"),
        (lambda: f(x, 4, w.half()), r"layer_norm: weight is torch.float16\[4\] but x is torch.float32\[3, 4\]; expected x's dtype or float32"),
        (lambda: f(x, 4, eps=-1.0), "layer_norm: eps is -1; expected 0 or more"),
        (lambda: r(x.int(), 4, eps=1.0), r"rms_norm: x is Int\[3, 4\]; expected float16"),
        (lambda: r(x, 4, eps=1e-5, residual=torch.ones(4)), r"rms_norm: residual is torch.float32\[4\] but x is torch.float32\[3, 4\]"),
        (lambda: r(x, 4, eps=1e-5, residual=x.double()), "residual is torch.float64.* but x is torch.float32.*; float64 goes with float64 only"),
        (lambda: f(x.to("meta"), 4, w), "layer_norm: weight is on cpu but x is on meta"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_sums_of_a_row_are_fp32_for_64_terms_of_a_lane():
    """2^24 + 1 is 2^24 in FP32: the ones that follow in the same 64 terms are lost, those after them are not. Two sums take packs in turn."""
    x = torch.zeros(1, 128, 2, 16)
    x[0, :, 0, 0] = 1.0
    x[0, 0, 0, 0] = 2.0**12
    _, _, rstd = torch.ops.halfstep.rms_norm(x.reshape(1, 4096), [4096], None, 0.0, 0.0, None)
    assert rstd.item() == torch.tensor(((2**24 + 64) / 4096) ** -0.5, dtype=torch.float64).float().item()


def test_rms_norm_of_a_row_whose_squares_vanish_is_infinite_without_eps():
    y, _, _ = torch.ops.halfstep.rms_norm(torch.full((1, 32), 1e-30), [32], None, 0.0, 0.0, None)
    assert torch.equal(y, torch.nn.functional.rms_norm(torch.full((1, 32), 1e-30), (32,), eps=0.0)) and y.isinf().all()


PROGRAM = r"""
import hashlib, numpy, sys, torch, halfstep
H = torch.ops.halfstep
torch.set_num_threads(int(sys.argv[1]))
digest, rng = hashlib.sha256(), numpy.random.default_rng(0)
random = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(numpy.float32))
floats = [torch.float16, torch.bfloat16, torch.float32]
def add(*tensors):
    for t in tensors:
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"-")
for rows, n in ((3, 1), (700, 17), (130, 1025), (70, 5000), (40_000, 3)):
    for dtype, other in [(d, o) for d in floats for o in floats + [None]] + [(torch.float64, torch.float64)]:
        x, w, b = random(rows, n).to(dtype) * 3 + 1, random(n), random(n)
        residual = None if other is None else random(rows, n).to(other)
        y, out, mean, rstd = H.layer_norm(x, [n], w, b, 1e-5, residual)
        h = x if other is None else out
        add(y, out, mean, rstd, *H.layer_norm_backward(random(rows, n).to(dtype), None if other is None else h.clone(), h, [n], w, b, mean, rstd, [True] * 4))
        y, out, rstd = H.rms_norm(x, [n], w, 1e-5, 1.0, residual)
        add(y, out, rstd, *H.rms_norm_backward(random(rows, n).to(dtype), None, h, [n], w, 1.0, rstd, [True] * 3))
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_bit_equal_across_instruction_sets_and_threads():
    def digest(capability, threads):
        done = subprocess.run([sys.executable, "-c", PROGRAM, str(threads)], env=dict(os.environ, ATEN_CPU_CAPABILITY=capability), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    reference = digest("default", 1)
    assert len(reference) == 64
    for capability, threads in (("avx2", 1), ("avx512", 1), ("avx512", 2)):
        assert digest(capability, threads) == reference, f"{capability} with {threads} threads differs"
