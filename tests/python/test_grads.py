"""grad_stats, unscale_, unscale_to_ and step_control against FP64."""

import math

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
