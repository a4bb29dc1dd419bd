"""FP16 products in tiles (csrc/cpu/tiles), on a BF16 matrix unit or in FP32: exact products, FP32 sums, and IEEE's infinities. tests/cpp/tiles_test.cpp has the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import halfstep as hs

pytestmark = pytest.mark.overrides
in_tiles = pytest.mark.skipif("large float16 products" not in hs._C.cpu_path(), reason="torch's products are as good here, or the tiles are hidden")
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
H = torch.ops.halfstep
SIZES = [(64, 128, 256), (33, 1100, 70), (600, 65, 513), (257, 520, 1100)]


def integers(*shape):
    """Numbers that need all 11 bits of FP16."""
    return torch.randint(-2047, 2048, shape).half()


@in_tiles
@pytest.mark.parametrize("m,n,k", SIZES)
def test_every_bit_of_both_operands_counts(m, n, k):
    a, few = integers(m, k), torch.randint(-1, 2, (k, n)).half()
    wanted = a.double() @ few.double()
    exact = wanted.to(torch.float16)
    assert torch.equal(a @ few, exact)
    assert torch.equal(few.t() @ a.t(), exact.t())
    # Layouts, forms, and results that are not contiguous.
    turned = a.t().contiguous().t()
    assert torch.equal(turned @ few, exact) and torch.equal(turned @ few.t().contiguous().t(), exact)
    for out in (torch.empty(m, n).half(), torch.empty(n, m).half().t(), torch.zeros(m, 2 * n).half()[:, ::2]):
        assert torch.equal(torch.mm(a, few, out=out), exact)
    bias, matrix = integers(n), integers(m, n)
    assert torch.equal(torch.addmm(bias, a, few), (wanted + bias.double()).half())
    assert torch.equal(torch.addmm(matrix, a, few, beta=0.5), (wanted + 0.5 * matrix.double()).half())
    assert torch.equal(torch.addmm(matrix, a, few, beta=0), exact)
    assert torch.equal(torch.nn.functional.linear(a, few.t().contiguous(), bias), (wanted + bias.double()).half())
    batch = torch.stack([a, -a, 2 * few[:1, :1] * a])
    assert torch.equal(torch.bmm(batch, few.expand(3, k, n)), torch.stack([b.double() @ few.double() for b in batch]).half())
    assert torch.equal(torch.baddbmm(matrix, batch, few.expand(3, k, n)), torch.stack([b.double() @ few.double() + matrix.double() for b in batch]).half())


@in_tiles
def test_in_place_out_of_itself_and_in_several_pieces_of_columns():
    a, few, matrix = integers(40, 8192), torch.randint(-1, 2, (8192, 1100)).half(), integers(40, 1100)
    a[:, 40:] = 0  # sums stay exact, and in the range
    product = a.double() @ few.double()
    for beta, alpha in ((1, 1), (0.5, 1), (1, 2)):
        exact = (beta * matrix.double() + alpha * product).half()
        assert torch.equal(torch.addmm(matrix, a, few, beta=beta, alpha=alpha), exact)
        assert torch.equal(matrix.clone().addmm_(a, few, beta=beta, alpha=alpha), exact)
        itself = matrix.clone()
        assert torch.equal(torch.addmm(itself, a, few, beta=beta, alpha=alpha, out=itself), exact)
        assert torch.equal(matrix.clone()[None].baddbmm_(a[None], few[None], beta=beta, alpha=alpha)[0], exact)


@in_tiles
def test_weight_gradients_into_memory_of_any_layout():
    dz, x = integers(64, 128), torch.randint(-1, 2, (64, 256)).half()
    exact = dz.double().t() @ x.double()
    wide = torch.zeros(128, 512)
    for into in (torch.zeros(128, 256), torch.zeros(256, 128).t(), wide[:, ::2], torch.zeros(130, 300)[1:129, 5:261]):
        H.linear_wgrad_(into, dz, x)
        assert torch.equal(into.double(), exact)
    assert not wide[:, 1::2].any()
    with pytest.raises(RuntimeError):
        H.linear_wgrad_(torch.zeros(128, 1).expand(128, 256), dz, x)


@in_tiles
def test_cross_entropy_of_a_layer():
    x, w, target = torch.randn(300, 130).half(), (torch.randn(1000, 130) / 11).half(), torch.randint(1000, (300,))
    ours, exact = [[t.clone().to(dtype).requires_grad_() for t in (x, w)] for dtype in (torch.float16, torch.float64)]
    hs.functional.linear_cross_entropy(*ours, target, reduction="sum").backward()
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), target, reduction="sum").backward()
    for a, b in zip(ours, exact):
        assert ((a.grad.double() - b.grad).abs() <= 2.0**-11 * b.grad.abs() + 2.0**-15 * b.grad.abs().max()).all()
    arrives = torch.ones(300)
    arrives.view(torch.int32)[7] = 0x7FFFFFFF  # the NaN that GPUs make
    dx, dw = torch.autograd.grad(hs.functional.linear_cross_entropy(*ours, target, reduction="none"), ours, arrives)
    assert dx[7].isnan().all() and dw.isnan().all() and dx[:7].isfinite().all()


@in_tiles
@pytest.mark.parametrize("family", ["normal", "subnormal", "large", "cancelling"])
def test_the_error_is_that_of_an_fp32_product(family):
    a, b = torch.randn(300, 700), torch.randn(700, 200)
    if family == "subnormal":
        a, b = a * 2.0**-20, b * 2.0**-10
    elif family == "large":
        a, b = a * 1e4, b * 0.01
    elif family == "cancelling":
        a, b = torch.cat([a, a], 1), torch.cat([b, -b * (1 + 2.0**-9)])
    a, b = a.half(), b.half()
    into = torch.zeros(a.shape[0], b.shape[1])
    H.linear_wgrad_(into, a.t().contiguous(), b)  # the sum before it is rounded
    wanted, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    error = ((into.double() - wanted).abs() / size).max()
    stock = ((a.float() @ b.float()).double() - wanted).abs().div(size).max()
    assert error <= max(2 * stock, 2.0**-21)


@in_tiles
def test_infinities_and_nan_are_those_of_ieee():
    a, b = torch.randn(64, 300).half(), torch.randn(300, 128).half()
    a[3, 5], a[4, 6], b[7, 9], b[8, 10] = torch.inf, torch.nan, -torch.inf, torch.nan
    a[:, 7] = 0  # times an infinity
    b[5] = 1     # which BF16 holds whole, so that its second part is 0
    wanted = a.float() @ b.float()
    for got in (a @ b, torch.addmm(torch.zeros(128).half(), a, b), torch.bmm(a[None], b[None])[0], hs.functional.linear(a, b.t().contiguous())):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.isposinf(), wanted.isposinf()) and torch.equal(got.isneginf(), wanted.isneginf())
        assert torch.allclose(got.float(), wanted, rtol=2e-3, atol=2e-3, equal_nan=True)
    assert wanted.isinf().any() and wanted.isfinite().any()


@in_tiles
def test_no_nan_is_lost_between_the_parts():
    """Rounding the bits of a NaN whose payload is all ones would make it a zero."""
    odd = torch.tensor([0x7FFF], dtype=torch.int16).view(torch.float16)
    x, w, dy = torch.randn(64, 128).half(), torch.randn(256, 128).half(), torch.randn(64, 256).half()
    _, saved = H.linear_forward(x, w, None, "gelu")
    saved[5, 7] = odd[0]
    dx, dw, _ = H.linear_backward(dy, x, w, saved, "gelu", [True, True, False], torch.float16, None)
    assert dx[5].isnan().all() and dw[7].isnan().all() and dx[:5].isfinite().all() and dw[:7].isfinite().all()
    x[3, 4] = odd[0]
    assert (x @ w.t())[3].isnan().all()


@in_tiles
def test_results_beyond_fp16_are_infinite():
    a = torch.full((64, 300), 60000.0).half()
    assert torch.equal(a @ a.t(), torch.full((64, 64), torch.inf).half())


@in_tiles
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
def test_a_layer_with_its_gradients(activation):
    """dz is held to 16 bits or more there, so that a weight gradient in FP32 is far better than one of a dz in FP16."""
    x, w, b, dy = torch.randn(700, 130).half(), (torch.randn(96, 130) / 11).half(), torch.randn(96), torch.randn(700, 96).half()
    y, saved = H.linear_forward(x, w, b, activation)
    h = x.double() @ w.double().t() + b.double()
    act = {None: lambda t: t, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh")}[activation]
    assert ((y.double() - act(h)).abs() <= 2.0**-11 * act(h).abs() + 2.0**-20 * (1 + h.abs())).all()
    dx, dw, db = H.linear_backward(dy, x, w, saved, activation, [True] * 3, torch.float32, torch.float32)
    at = (saved.double() if activation and "gelu" in activation else h).requires_grad_()
    dz, = torch.autograd.grad(act(at), at, dy.double())
    for got, wanted, size, rounding in ((dw, dz.t() @ x.double(), dz.abs().t() @ x.double().abs(), 0), (dx, dz @ w.double(), dz.abs() @ w.double().abs(), 2.0**-11)):
        assert ((got.double() - wanted).abs() <= 2.0**-15 * size + rounding * wanted.abs()).all()
        assert (got.double() - wanted).norm() <= (2.0**-16 + rounding) * size.norm()


@in_tiles
def test_bits_do_not_depend_on_threads_or_on_other_rows():
    a, b = torch.randn(700, 1100).half(), torch.randn(1100, 600).half()
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(a @ b)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert all(torch.equal(a @ b, results[0]) for _ in range(20))
    assert torch.equal(a[100:164] @ b, results[0][100:164]) and torch.equal(a @ b[:, 40:104], results[0][:, 40:104])


@in_tiles
def test_second_derivatives_and_compile():
    a, b = torch.randn(64, 256).half().requires_grad_(), torch.randn(256, 128).half().requires_grad_()
    product = torch.compile(lambda a, b: torch.nn.functional.linear(a, b.t()), fullgraph=True)
    assert torch.equal(product(a, b), a @ b)
    g = torch.randn(64, 128).half().requires_grad_()
    first, = torch.autograd.grad(a @ b, a, g, create_graph=True)
    second, = torch.autograd.grad(first.float().sum(), g)
    assert torch.allclose(second.double(), b.detach().double().sum(0).expand(64, 128), atol=0.1)


def path_with(**settings):
    program = "import torch, halfstep as hs; a = torch.randn(256, 256).half(); assert (a @ a).isfinite().all(); print(hs._C.cpu_path())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **settings, "PYTHONPATH": str(Path(hs.__file__).parents[1])})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("hidden", [{"HALFSTEP_TILES": "0"}, {"ATEN_CPU_CAPABILITY": "default"}, {"HALFSTEP_OVERRIDES": "0"}])
def test_they_can_be_hidden(hidden):
    assert "large float16 products" not in path_with(**{"HALFSTEP_TILES": "1", **hidden})


@pytest.mark.parametrize("hidden", [{"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, {"ATEN_CPU_CAPABILITY": "avx2"}])
def test_the_matrix_unit_can_be_hidden(hidden):
    assert "matrix unit" not in path_with(**hidden)


@pytest.mark.skipif("avx2" not in CPU, reason="no AVX2")
def test_where_vector_tiles_are_taken():
    no_unit = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    taken = "large float16 products: widened on the way into FP32 vector tiles"
    assert taken in path_with(HALFSTEP_TILES="1", **no_unit)
    assert (taken in path_with(HALFSTEP_TILES="", **no_unit)) == ("AuthenticAMD" in CPU)


@in_tiles
@pytest.mark.parametrize("rows", [4096, 65536])
def test_a_gradient_that_is_added_up_keeps_what_is_small_beside_it(rows):
    """Each term is less than half of a last place of the 1 it is added to; and one sum of 65,536 terms would lose a digit."""
    into = torch.ones(128, 256)
    H.linear_wgrad_(into, torch.full((rows, 128), 2.0**-13).half(), torch.full((rows, 256), 2.0**-12).half())
    assert torch.equal(into, torch.full((128, 256), 1 + rows * 2.0**-25))
    torch.manual_seed(0)
    dz, x = torch.rand(rows, 64).half(), torch.rand(rows, 32).half()
    into = torch.zeros(64, 32)
    H.linear_wgrad_(into, dz, x)
    exact = dz.double().t() @ x.double()
    assert ((into.double() - exact).abs() / exact).max() < 1e-6
