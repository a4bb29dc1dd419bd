"""hs.functional.softmax against FP64 and torch: masks, causal rows, every length and layout, what is not finite, gradients, one graph under compile."""

import hashlib
import os
import subprocess
import sys

import layers
import pytest
import torch

import halfstep as hs

softmax = hs.functional.softmax
ROWS = [1, 3, 7, 16, 17, 33, 127, 256, 257, 1000, 1025, 4097, 16385]


def masked(x, mask, causal):
    """x with -inf where nothing takes part, and an additive mask added."""
    keep = torch.ones(x.shape, dtype=torch.bool)
    if mask is not None:
        keep = keep & (mask if mask.dtype == torch.bool else mask != -float("inf"))
        if mask.dtype != torch.bool:
            x = x + mask
    if causal:
        keep = keep & torch.ones(x.shape[-2:], dtype=torch.bool).tril()
    return x.masked_fill(~keep, -float("inf")), keep


def reference(x, dim=-1, scale=1.0, mask=None, causal=False):
    logits, keep = masked(x * scale, mask, causal)
    empty = ~keep.any(dim, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(dim).masked_fill(~keep, 0.0)


def eager(x, dim=-1, scale=1.0, mask=None, causal=False):
    return torch.softmax(masked(x * scale, mask, causal)[0], dim)


def check(x, dim=-1, **kw):
    """The result is within 1 ULP or torch's own error. The gradient is within 2 ULP of what the rounding of the result, from which it starts, must cost, and of
    2^-20 of the terms of its sum."""
    upstream = torch.randn(x.shape).to(x.dtype)
    results = []
    for function, dtype in ((softmax, None), (reference, torch.float64), (eager, None)):
        (y,), grads = layers.run(lambda x: function(x, dim, **kw), [x], [upstream], dtype)
        results.append((y, grads[0]))
    (y, dx), (want, want_dx), (peer, _) = results
    theirs = layers.error(peer.nan_to_num(0.0), want)  # torch has NaN where a whole row is masked
    assert layers.error(y, want) <= max(1.0, theirs)
    total = lambda t: t.sum(dim, keepdim=True)
    dy, off = upstream.double(), (y.double() - want).abs()
    around = (dy - total(want * dy)).abs()
    cost = off * around + y.double() * total(off * around) + 2.0**-20 * want * (dy.abs() + total(want * dy.abs()))
    assert dx.isfinite().all() and ((dx.double() - want_dx).abs() <= 2 * layers.ulp(want_dx, x.dtype) + 1.01 * abs(kw.get("scale", 1.0)) * cost).all()
    return y, dx


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", layers.FLOATS)
def test_lengths_and_scales(dtype):
    for n in ROWS:
        for scale in (1.0, 0.125, -3.0):
            check((2 * torch.randn(5, n)).to(dtype), scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", layers.FLOATS)
def test_long_rows(dtype):
    for n in (8191, 12288, 32769, 65536, 131072):
        check(torch.randn(2, n).to(dtype))


@pytest.mark.parametrize("dtype", layers.FLOATS)
def test_families_of_data(dtype):
    for _, x in layers.families((6, 257), dtype):
        check(x)


@pytest.mark.parametrize("dtype", layers.FLOATS)
def test_masks(dtype):
    x = (2 * torch.randn(2, 3, 13, 40)).to(dtype)
    for shape in ((40,), (13, 1), (2, 1, 1, 40), (3, 13, 40), (2, 1, 13, 40)):
        keep = torch.rand(shape) > 0.4
        y, dx = check(x, scale=0.5, mask=keep)
        assert not y[~keep.expand_as(y)].any() and not dx[~keep.expand_as(y)].any()
        added = torch.zeros(shape).masked_fill(~keep, -float("inf"))
        assert torch.equal(softmax(x, -1, 0.5, added), y)  # -inf and False are the same
        for kind in layers.FLOATS:
            check(x, scale=0.5, mask=torch.randn(shape).to(kind))
        assert torch.equal(check(x, scale=0.5, mask=keep, causal=True)[0], softmax(x, -1, 0.5, keep & torch.ones(13, 40, dtype=torch.bool).tril()))


@pytest.mark.parametrize("queries,keys", [(1, 5), (7, 7), (30, 11), (11, 30), (129, 257)])
def test_causal_is_torchs_top_left_mask(queries, keys):
    x = torch.randn(2, 3, queries, keys).half()
    y, dx = check(x, causal=True)
    triangle = torch.ones(queries, keys, dtype=torch.bool).tril()
    assert torch.equal(y, softmax(x, mask=triangle)) and not y[..., ~triangle].any() and not dx[..., ~triangle].any()
    q, k, v = torch.randn(2, queries, 8), torch.randn(2, keys, 8), torch.eye(keys).expand(2, keys, keys)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(softmax(q @ k.mT, scale=8**-0.5, causal=True) @ v, want, atol=1e-5)


def test_a_masked_row_is_zeros_and_has_no_gradient():
    for dtype in layers.FLOATS:
        x = torch.randn(3, 4, 20).to(dtype).requires_grad_()
        keep = torch.ones(3, 4, 20, dtype=torch.bool)
        keep[1, 2] = keep[0, 0] = False
        for mask in (keep, torch.zeros(keep.shape).masked_fill(~keep, -float("inf"))):
            y = softmax(x, mask=mask)
            dx, = torch.autograd.grad(y, x, torch.randn(y.shape).to(dtype))
            for row in ((1, 2), (0, 0)):
                assert not y[row].any() and not dx[row].any()
            assert y.isfinite().all() and torch.equal(y[2], softmax(x[2]))


def test_what_is_masked_is_not_looked_at():
    """Logits below -10,000 beside masked ones, and NaN or infinities under the mask."""
    x = torch.full((4, 6), -30000.0).half()
    x[:, 1] = -30001.0
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[:, 3:] = False
    for value in (0.0, 60000.0, float("inf"), -float("inf"), float("nan")):
        x[:, 3:] = value
        want = torch.tensor([1.0, 1.0, 1.0, 0, 0, 0]).half() / 3
        assert torch.equal(softmax(x, mask=keep), want.expand(4, 6))
        assert torch.equal(softmax(x, mask=torch.zeros(6).masked_fill(~keep[0], -float("inf"))), want.expand(4, 6))
        assert torch.equal(softmax(x[:3, :].T.contiguous().T, causal=True), softmax(x[:3], mask=torch.ones(3, 6, dtype=torch.bool).tril()))


@pytest.mark.parametrize("dtype", layers.FLOATS + [torch.float64])
@pytest.mark.parametrize("length", [5, 40, 3000])
def test_non_finite_logits_give_what_torch_gives(dtype, length):
    for place in (0, length // 2, length - 1):
        for value in (float("nan"), float("inf"), -float("inf")):
            x = torch.randn(2, length).to(dtype)
            x[1, place] = value
            y = softmax(x)
            assert torch.equal(y.isnan(), torch.softmax(x, -1).isnan()) and torch.equal(y[0], softmax(x[:1])[0])
            keep = torch.ones(length, dtype=torch.bool)
            keep[-1] = place == length - 1
            y = softmax(x, mask=keep)
            assert y[1].isnan().sum() == (0 if value == -float("inf") else keep.sum())
    x = torch.full((3, length), -float("inf")).to(dtype)
    assert softmax(x).isnan().all()  # as in torch: an overflow is not hidden
    y = softmax(x, mask=torch.arange(length) < 2)
    assert y[:, :2].isnan().all() and not y[:, 2:].any()


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_layouts_and_dimensions(dim):
    x = torch.randn(4, 5, 6, 7).half()
    want = softmax(x.double(), dim).half()
    for _, y in layers.layouts(x):
        check(y, dim)
        got = softmax(y, dim)
        assert (got.float() - want.float()).abs().max() <= 2**-11 and got.stride() == torch.empty_like(y).stride()
        keep = torch.rand(6, 1) > 0.5
        assert torch.equal(softmax(y, dim, mask=keep), softmax(x, dim, mask=keep))
    expanded = torch.randn(1, 9).expand(4, 9)
    assert torch.equal(softmax(expanded), softmax(expanded.contiguous()))
    assert softmax(torch.tensor(3.0)).item() == 1 and softmax(torch.zeros(0, 3)).shape == (0, 3) and softmax(torch.zeros(3, 0)).shape == (3, 0)


def test_seven_dimensions_of_a_mask_that_cannot_be_merged():
    x = torch.randn(2, 2, 2, 2, 2, 2, 2, 2, 5)
    mask = torch.rand(2, 1, 2, 1, 2, 1, 2, 1, 5) > 0.3
    assert torch.equal(softmax(x, mask=mask), softmax(x, mask=mask.expand(x.shape).contiguous()))
    keep = torch.rand(5, 2, 2, 2, 2, 2, 2, 2, 2).movedim(0, -1) > 0.3
    assert torch.equal(softmax(x, mask=keep.permute(7, 1, 5, 3, 2, 4, 6, 0, 8)), softmax(x, mask=keep.permute(7, 1, 5, 3, 2, 4, 6, 0, 8).contiguous()))


def test_derivatives_agree_with_finite_differences():
    x, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4, 4), (3, 1, 4)))
    keep = torch.rand(4, 4) > 0.3
    keep[2] = False
    for f, inputs in ((lambda x: softmax(x.sin(), 1, -0.7), (x,)), (lambda x: softmax(x, mask=keep), (x,)), (lambda x, b: softmax(x, scale=0.5, mask=b, causal=True), (x, bias))):
        assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


def test_the_gradient_of_a_mask_is_summed_over_what_it_was_broadcast_along():
    x, upstream = torch.randn(8, 4, 33, 33).half(), torch.randn(8, 4, 33, 33).half()
    for shape in ((33,), (4, 1, 33), (4, 33, 33)):
        bias = torch.randn(shape, requires_grad=True)
        got, = torch.autograd.grad(softmax(x, scale=0.2, mask=bias), bias, upstream)
        wide = bias.detach().double().requires_grad_()
        want, = torch.autograd.grad(torch.softmax(x.double() * 0.2 + wide, -1), wide, upstream.double())
        assert got.dtype == torch.float32 and (got - want).abs().max() < 1e-3 * want.abs().max()


def test_a_gradient_that_is_the_same_everywhere_gives_none():
    """The stored result does not quite sum to one; what that leaves of a common part is divided out."""
    x = torch.randn(64, 300).half().requires_grad_()
    upstream = torch.full((64, 300), 1000.0).half()
    dx, = torch.autograd.grad(softmax(x), x, upstream)
    stock, = torch.autograd.grad(torch.softmax(x, -1), x, upstream)
    assert dx.abs().max() < 1e-5 < 1e-4 < stock.abs().max()


def test_same_bits_every_time_and_in_every_batch():
    x, keep = torch.randn(6, 20, 130).half(), torch.rand(6, 1, 130) > 0.2
    layers.check_repeats(lambda x: softmax(x, scale=0.3, mask=keep, causal=True), [x], [torch.randn(x.shape).half()])
    layers.check_rows_independent(lambda x, m: softmax(x, mask=m, causal=True), [x, keep], lambda inputs, part: [t[part] for t in inputs])


def test_a_loss_scale_changes_no_bit():
    x = torch.randn(8, 50).half()
    layers.check_scale_exact(lambda x: softmax(x, scale=0.5), [x], [(torch.randn(x.shape) * 2.0**-4).half()], range(0, 13, 2))
    layers.check_scale_exact(lambda x: softmax(x), [x.float()], [torch.randn(x.shape)])


def test_it_compiles_into_one_graph():
    keep = torch.rand(3, 1, 200) > 0.3

    def make(n):
        return [torch.randn(2, 3, n, n).half(), torch.randn(n)], [torch.randn(2, 3, n, n).half()]

    layers.check_compiled(lambda x, bias: softmax(x * 2, scale=0.5, mask=bias, causal=True), make, (8, 33, 100))
    layers.check_compiled(lambda x, bias: softmax(x, mask=keep[..., : x.shape[-1]]), make, (9, 34))


def test_under_autocast_x_keeps_its_dtype():
    for dtype in layers.FLOATS:
        with hs.autocast("cpu"):
            assert softmax(torch.randn(3, 4).to(dtype)).dtype == dtype


def test_the_module():
    x = torch.randn(2, 3, 5, 5)
    assert isinstance(hs.nn.Softmax(-1), torch.nn.Softmax) and not hs.nn.Softmax(-1).state_dict()
    assert torch.equal(hs.nn.Softmax(dim=1)(x), softmax(x, 1))
    keep = torch.rand(5) > 0.5
    assert torch.equal(hs.nn.Softmax(-1, scale=0.5, causal=True)(x, keep), softmax(x, -1, 0.5, keep, True))
    for shape in ((5,), (4, 5), (2, 4, 5), (2, 3, 4, 5)):
        y = torch.randn(shape)
        assert torch.allclose(hs.nn.Softmax()(y), y.softmax(0 if y.dim() in (1, 3) else 1))
    assert repr(hs.nn.Softmax(1, scale=2.0)) == "Softmax(dim=1, scale=2.0, causal=False)"


def test_refusals_name_what_was_given():
    x = torch.randn(4, 5)
    for args, text in (((torch.ones(3, dtype=torch.int64),), r"softmax: x is torch.int64\[3\]"), ((x, 2), r"softmax: dim is 2 but x is torch.float32\[4, 5\]"),
                       ((x, -3), "softmax: dim is -3"), ((x, -1, float("inf")), "softmax: scale is inf; expected a finite number"),
                       ((x, 0, 1.0, None, True), r"softmax: causal needs dim = -1 and \[..., queries, keys\], but dim is 0"), ((x[0], -1, 1.0, None, True), "causal needs"),
                       ((x, -1, 1.0, torch.ones(4, dtype=torch.bool)), r"softmax: mask is Bool\[4\], which does not broadcast to x, torch.float32\[4, 5\]"),
                       ((x, -1, 1.0, torch.ones(5, dtype=torch.int32)), r"softmax: mask is Int\[5\]"), ((x, -1, 1.0, torch.ones(5, device="meta")), "softmax: mask is on meta but x is on cpu")):
        with pytest.raises(RuntimeError, match=text):
            softmax(*args)
    with pytest.raises(RuntimeError, match=r"softmax_backward: grad is torch.float16\[4, 5\] but y is torch.float32\[4, 5\]"):
        torch.ops.halfstep.softmax_backward(x.half(), x, -1, 1.0, False)
    y = softmax(x.requires_grad_())
    y.data.mul_(1)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


PROGRAM = r"""
import hashlib, numpy, sys, torch, halfstep as hs
torch.set_num_threads(int(sys.argv[1]))
rng, digest = numpy.random.default_rng(0), hashlib.sha256()
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for n in (1, 15, 16, 33, 300, 5000):
        x, g = (torch.from_numpy(rng.standard_normal((4, 2, 30, n)) * s).to(dtype) for s in (4, 1))
        keep, bias = torch.from_numpy(rng.random((2, 1, n)) > .3), torch.from_numpy(rng.standard_normal((30, n))).half()
        for kw in (dict(scale=.3), dict(causal=True), dict(mask=keep), dict(mask=bias, causal=True)):
            leaf = x.clone().requires_grad_()
            y = hs.functional.softmax(leaf, **kw); y.backward(g)
            for t in (y.detach(), leaf.grad): digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
        cos, sin = (torch.from_numpy(rng.standard_normal((30, (n + 1) // 2))).float() for _ in range(2))
        if n > 1:
            for interleaved in (False, True):
                digest.update(hs.functional.rope(x, cos[:, : n // 2], sin[:, : n // 2], interleaved).view(torch.uint8).numpy().tobytes())
# scale x before its rounding is 320 above its rounding, which is the row's largest
row, scale = torch.tensor([129 * 2.0**26, 0.0]).bfloat16(), 1 + 40 * 2.0**-23
assert hs.functional.softmax(row, -1, scale).tolist() == [1, 0]
print(digest.hexdigest())
"""


def digest(capability, threads):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(threads)], env=dict(os.environ, ATEN_CPU_CAPABILITY=capability), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_bit_equal_across_instruction_sets_and_threads():
    expected = digest("default", 1)
    assert len(expected) == len(hashlib.sha256().hexdigest())
    for capability, threads in (("avx2", 1), ("avx512", 1), ("avx512", 2)):
        assert digest(capability, threads) == expected, f"{capability} with {threads} threads differs"
