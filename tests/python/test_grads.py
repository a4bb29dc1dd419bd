"""grad_stats, grad_histogram, unscale_, unscale_to_ and step_control against FP64."""

import math

import numpy
import pytest
import torch

import halfstep  # noqa: F401

H = torch.ops.halfstep
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [1, 7, 15, 16, 17, 63, 1023, 1025, 4095, 4096, 4097, 70001]
pytestmark = [pytest.mark.isa, pytest.mark.smoke]


def reference(x):
    d = x.double().flatten()
    finite = torch.isfinite(d)
    small = (d != 0) & (d.abs() < 2.0**-14)
    return [int((~finite).sum()), d.square().sum().item(), d.abs().max().item() if d.numel() else 0.0, int((d == 0).sum()), int(small.sum()), d.numel()]


def families(n, dtype):
    g = torch.Generator().manual_seed(n)
    r = torch.randn(n, generator=g, dtype=torch.float64)
    yield r
    yield r * 1e-6  # FP16 subnormals and zeros
    yield torch.full((n,), 2.0**-24, dtype=torch.float64)
    yield torch.full((n,), 65504.0, dtype=torch.float64) * torch.sign(r)
    yield torch.arange(n, dtype=torch.float64) % 2048
    if dtype != torch.float16:
        yield r * 1e30  # squares overflow FP32
        yield r * 1e-30


@pytest.mark.parametrize("dtype", FLOATS)
def test_stats_against_fp64(dtype):
    for n in SIZES:
        for x in families(n, dtype):
            x = x.to(dtype)
            row = H.grad_stats([x], [])[0].tolist()
            want = reference(x)
            assert row[0] == want[0] and row[2:6] == want[2:], (n, dtype)
            assert row[1] == pytest.approx(want[1], rel=64 * 2.0**-24, abs=0), (n, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_anywhere_is_found(dtype, bad):
    n = 8200
    for at in (0, 15, 16, 4095, 4096, 8191, 8192, n - 1):
        x = torch.ones(n, dtype=dtype)
        x[at] = bad
        stats = H.grad_stats([torch.ones(3), x, torch.ones(5), x], [])
        assert stats[-1, 0] == 2 and stats[-1, 6] == 1 and stats[-1, 7] == 1
        assert stats[1, 0] == 1 and stats[1, 6] == 1 and stats[0, 6] == 0
        assert not math.isfinite(stats[-1, 1])
        assert math.isnan(stats[1, 2]) == math.isnan(bad)


def test_layouts_missing_and_empty():
    x = torch.randn(8, 6).half()
    stats = H.grad_stats([x, x.t(), x[::2, 1:], x[:1].expand(4, 6), None, torch.zeros(0)], [])
    for i, y in enumerate([x, x.t(), x[::2, 1:], x[:1].expand(4, 6)]):
        assert stats[i, 1].item() == pytest.approx(y.double().square().sum().item(), rel=1e-6)
        assert stats[i, 5] == y.numel()
    assert stats[4].abs().sum() == 0 and stats[5].abs().sum() == 0
    unaligned = torch.randn(1001).half()[1:]
    assert H.grad_stats([unaligned], [])[0, 2] == unaligned.abs().max()


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_of_a_sparse_gradient(dtype):
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 3, 3]]), torch.tensor([[1.0, 2.0], [0.0, 2.0], [4.0, 0.0]]).to(dtype), (5, 2)).coalesce()
    row = H.grad_stats([sparse._values()], [])[0].tolist()
    assert row[:6] == [0, 1 + 4 + 16 + 4, 4, 0, 0, 4]
    with pytest.raises(RuntimeError, match=r"grad_stats: grads\[0\] is sparse or of another layout"):
        H.grad_stats([sparse], [])


def counted(x, scale):
    """A row of grad_histogram from frexp, which shares nothing with the op."""
    x = x.double().flatten().numpy()
    with numpy.errstate(over="ignore"):
        magnitude = numpy.abs(x) / float(scale)
    finite = numpy.isfinite(x)
    row = numpy.zeros(62)
    row[0], row[1], row[2] = x.size, (x == 0).sum(), (~finite).sum()
    row[3] = magnitude[finite].max(initial=0)
    magnitude = magnitude[finite & (x != 0)]
    for value in magnitude:
        exponent = math.frexp(value)[1] - 1 if 0 < value < math.inf else -9999 if value == 0 else 9999
        row[4 if exponent < -40 else 61 if exponent > 15 else 45 + exponent] += 1
    return row


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [None, 1.0, 2.0**16, 2.0**-100, 1000.0, 0.3])
def test_histogram_against_frexp(dtype, scale):
    for n in (1, 15, 16, 17, 4097):
        for x in families(n, dtype):
            x = x.to(dtype)
            x[n // 2] = 0.0
            factor = None if scale is None else torch.tensor(scale)
            got = H.grad_histogram([x], factor)[0].numpy()
            assert (got == counted(x, 1.0 if factor is None else factor)).all(), (n, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_power_of_two_has_its_bin_and_its_neighbour_the_one_below(dtype):
    exponents = [e for e in range(-45, 20) if torch.tensor(2.0**e, dtype=dtype).item() == 2.0**e]
    assert len(exponents) >= (40 if dtype == torch.float16 else 65)
    for e in exponents:
        x = torch.tensor([2.0**e, -(2.0**e)], dtype=dtype)
        below = torch.nextafter(x[:1].abs(), torch.zeros(1, dtype=dtype)) if dtype != torch.float16 or e > -24 else None
        column = lambda e: 4 if e < -40 else 61 if e > 15 else 45 + e
        got = H.grad_histogram([x, below], None)
        assert got[0, column(e)] == 2 and got[0, 4:].sum() == 2
        if below is not None:
            exact = math.frexp(below.item())[1] - 1
            assert got[1, column(exact)] == 1 and exact < e
        shifted = H.grad_histogram([x], torch.tensor(2.0**-3))
        assert shifted[0, column(e + 3)] == 2


def test_histogram_of_whatever_is_given():
    bad = torch.tensor([1.0, math.inf, -math.inf, math.nan, 0.0, -0.0, 5.0])
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 3]]), torch.tensor([2.0, 4.0]), (5,)).coalesce()
    x = torch.randn(8, 6)
    got = H.grad_histogram([bad, None, torch.zeros(0), x.t(), x[::2, 1:], sparse._values(), torch.tensor([5e-324, 1.7e308], dtype=torch.float64)], torch.tensor(2.0))
    assert got[0, :4].tolist() == [7, 2, 3, 2.5] and got[0, 4:].sum() == 2
    assert (got[1] == 0).all() and (got[2] == 0).all()
    assert (got[3].numpy() == counted(x, 2.0)).all() and (got[4].numpy() == counted(x[::2, 1:], 2.0)).all()
    assert got[5, 45] == 1 and got[5, 46] == 1
    assert got[6, [1, 2, 4, 61]].tolist() == [0, 0, 1, 1]  # 5e-324 / 2 is 0, and still not a zero
    tiny = H.grad_histogram([torch.tensor([1e308, 0.0], dtype=torch.float64)], torch.tensor(2.0**-100))
    assert tiny[0, [1, 2, 61]].tolist() == [1, 0, 1]  # nor is 1e308 * 2^100 an inf of the gradient's


def test_histogram_errors_name_what_is_wrong():
    with pytest.raises(RuntimeError, match=r"grad_histogram: grads\[1\] is torch.int64\[3\]"):
        H.grad_histogram([torch.ones(2), torch.ones(3, dtype=torch.int64)], None)
    with pytest.raises(RuntimeError, match="grad_histogram: scale is torch.float64"):
        H.grad_histogram([torch.ones(2)], torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"grad_histogram: grads\[0\] is sparse"):
        H.grad_histogram([torch.eye(2).to_sparse()], None)


# -- rows that were made one at a time -------------------------------------------------------------
def many_grads(seed=0):
    g = torch.Generator().manual_seed(seed)
    grads = [(torch.randn(int(n), generator=g) * s).to(FLOATS[i % 4]) for i, (n, s) in enumerate(zip([1, 17, 5000, 0, 4096, 70001, 33, 9, 12], [1, 1e-6, 1e3, 1, 1e-3, 1, 1e-8, 1, 1]))]
    return [*grads, None, torch.randn(8, 6, generator=g).t(), torch.randn(8, 6, generator=g)[::2, 1:]]


def bits(table):
    return table.view(torch.int64)


@pytest.mark.parametrize("bad", [None, 2, 8])
def test_rows_of_single_gradients_give_the_bits_of_one_pass(bad):
    grads = many_grads()
    if bad is not None:
        grads[bad][-1] = math.nan
    whole = H.grad_stats(grads, [])
    rows = torch.full((len(grads), 8), -7.0, dtype=torch.float64)
    for i, grad in enumerate(grads):
        if grad is not None:
            H.grad_stats_row_(grad, rows, i)
            assert torch.equal(bits(rows[i]), bits(whole[i]))
    for stale in ([], [0], [2, 5, 11], list(range(len(grads)))):
        old = rows.clone()
        old[stale] = 99.0  # whatever they hold is not looked at
        assert torch.equal(bits(H.grad_stats_rest(grads, old, stale, [])), bits(whole)), stale


def test_row_errors_name_what_is_wrong():
    rows = torch.zeros(2, 8, dtype=torch.float64)
    before = rows.clone()
    with pytest.raises(RuntimeError, match=r"grad_stats_row_: index is 2 but rows is torch.float64\[2, 8\]"):
        H.grad_stats_row_(torch.ones(3), rows, 2)
    with pytest.raises(RuntimeError, match="grad_stats_row_: grad is torch.int64"):
        H.grad_stats_row_(torch.ones(3, dtype=torch.int64), rows, 0)
    with pytest.raises(RuntimeError, match=r"grad_stats_row_: grad is sparse"):
        H.grad_stats_row_(torch.eye(2).to_sparse(), rows, 0)
    with pytest.raises(RuntimeError, match=r"grad_stats_rest: rows is torch.float64\[2, 8\] but grads has 1 entries"):
        H.grad_stats_rest([torch.ones(3)], rows, [], [])
    with pytest.raises(RuntimeError, match="grad_stats_rest: stale holds 5 but grads has 2 entries"):
        H.grad_stats_rest([torch.ones(3), None], rows, [5], [])
    with pytest.raises(RuntimeError, match=r"rows is torch.float32\[2, 8\]; expected contiguous torch.float64\[n, 8\]"):
        H.grad_stats_rest([torch.ones(3), None], rows.float(), [], [])
    assert torch.equal(rows, before)


def test_norm_of_many_blocks_is_accurate():
    x = torch.full((3_000_000,), 1e-3, dtype=torch.float16)
    assert H.grad_stats([x], [])[0, 1].item() == pytest.approx(float(x[0]) ** 2 * 3_000_000, rel=64 * 2.0**-24)  # FP32 for 64 terms, then FP64


@pytest.mark.parametrize("dtype", FLOATS)
def test_unscale_matches_one_rounding(dtype):
    for n in (1, 16, 33, 5000):
        x = (torch.randn(n) * 3).to(dtype)
        want = (x.double() * (1 / 3 if dtype == torch.float64 else float(torch.tensor(1 / 3))))
        inv = torch.tensor(1 / 3)
        want = (x.double() * inv.double()).to(dtype) if dtype == torch.float64 else (x.float() * inv).to(dtype)
        y, flag = x.clone(), torch.zeros(())
        H.unscale_([y], inv, flag, [])
        assert torch.equal(y, want) and flag == 0
        out = torch.empty(n)
        H.unscale_to_([out], [x], inv, flag, [])
        assert torch.allclose(out, x.float() * inv, rtol=2e-7, atol=0)


def test_unscale_sees_overflow_before_and_after_the_multiply():
    # stock torch checks before only: BF16 3e38 times 4 is inf with found_inf still 0
    x, flag = torch.tensor([3e38]).bfloat16(), torch.zeros(())
    H.unscale_([x], torch.tensor(4.0), flag, [])
    assert flag == 1
    x, flag = torch.tensor([math.inf, 1.0]), torch.zeros(())
    H.unscale_([x], torch.tensor(0.0), flag, [])
    assert flag == 1


def test_small_gradients_survive_unscaling_to_fp32():
    scaled = (torch.randn(10_000, dtype=torch.float64) * 1e-7 * 2**16).half()
    assert (scaled == 0).float().mean() < 1e-3
    out = torch.empty(10_000)
    H.unscale_to_([out], [scaled], torch.tensor(2.0**-16), torch.zeros(()), [])
    assert torch.equal(out.double(), scaled.double() * 2.0**-16)


def test_control():
    stats = [H.grad_stats([torch.full((4,), 8.0)], []), H.grad_stats([torch.full((9,), 8.0).half()], [])]
    norm = math.sqrt(13 * 64) / 4
    control = H.step_control(stats, torch.tensor(4.0), None, None, 1.0).tolist()
    assert control == [0.0, pytest.approx(1 / (norm + 1e-6) / 4), pytest.approx(norm), pytest.approx(1 / (norm + 1e-6))]
    assert H.step_control(stats, torch.tensor(4.0), None, None, 1e9).tolist()[1] == 0.25
    for flag in (1.0, 2.0, 0.5, math.nan):  # not only == 1
        control = H.step_control(stats, None, torch.tensor(flag), None, -1.0)
        assert control[0] == 1 and torch.isnan(control[2])


def test_errors_name_what_is_wrong():
    with pytest.raises(RuntimeError, match=r"grad_stats: grads\[1\] is torch.int64\[3\]"):
        H.grad_stats([torch.ones(2), torch.ones(3, dtype=torch.int64)], [])
    with pytest.raises(RuntimeError, match=r"unscale_to_: outputs\[0\] is torch.float32\[3\] but grads\[0\] is torch.float16\[2\]"):
        H.unscale_to_([torch.ones(3)], [torch.ones(2).half()], torch.tensor(1.0), torch.zeros(()), [])
    with pytest.raises(RuntimeError, match="unscale_: inv_scale is torch.float64"):
        H.unscale_([torch.ones(3)], torch.tensor(1.0, dtype=torch.float64), torch.zeros(()), [])
