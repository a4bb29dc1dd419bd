"""16-bit products, attention and convolution on the CPU: one rounding of the FP32 result, and nothing else of torch changed."""

import hashlib
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import halfstep as hs
from layers import check_refused_alike

pytestmark = [pytest.mark.overrides, pytest.mark.smoke]
HALVES = [torch.float16, torch.bfloat16]


def widens(dtype):
    """Whether products of `dtype` are ours in this process."""
    name = str(dtype)[6:]
    return f"{name} products and attention: FP32" in hs._C.cpu_path()


def spacing(x, dtype):
    """Distance of neighbouring `dtype` numbers at x."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=info.tiny)))) * info.eps


def one_rounding(ours, exact, size, terms, dtype, summed=False):
    """Within one spacing of the 16-bit output plus the FP32 accumulation of `terms`, whose magnitudes add to `size`.

    `summed`: torch's autograd has added rounded products, as for an operand that was broadcast."""
    assert ours.dtype == dtype and ours.shape == exact.shape
    allowed = spacing(exact, dtype) + terms * 2.0**-24 * size + (spacing(size, dtype) if summed else 0)
    excess = (ours.double() - exact).abs() - allowed
    assert excess.numel() == 0 or excess.max() <= 0, excess.max()


def check(f, inputs, dtype, terms, summed=False):
    """f and its gradients in `dtype` against FP64 from the same 16-bit values; the incoming gradient is 16-bit as well.

    |f| at |inputs| is the size of the terms, since every f here is a sum of products."""
    half = [x.to(dtype).requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in half]
    size = [x.detach().double().abs().requires_grad_() for x in half]
    y, z, s = f(*half), f(*wide), f(*size)
    g = torch.randn(z.shape).to(dtype)
    ours = (y, *torch.autograd.grad(y, half, g))
    exact = (z, *torch.autograd.grad(z, wide, g.double()))
    sizes = (s, *torch.autograd.grad(s, size, g.double().abs()))
    for i, (a, b, c) in enumerate(zip(ours, exact, sizes)):
        one_rounding(a, b, c, terms, dtype, summed and i > 0)


# ---- linear, matmul and the products below them ---------------------------------------------------------------------------
LINEAR = [((5, 7), (3, 7)), ((2, 4, 16), (8, 16)), ((0, 7), (3, 7)), ((2, 0, 7), (3, 7)), ((7,), (3, 7)), ((2, 3, 4, 5), (6, 5)), ((4, 5), (1, 5))]
MATMUL = [((4, 5), (5, 6)), ((2, 3, 4, 5), (5, 6)), ((3, 1, 4, 5), (2, 5, 6)), ((5,), (5, 6)), ((4, 5), (5,)), ((5,), (5,)), ((2, 4, 5), (5,)), ((5,), (2, 5, 6))]


@pytest.mark.parametrize("dtype", HALVES)
def test_linear(dtype):
    for x, w in LINEAR:
        for bias in ([torch.randn(w[0])], []):
            check(F.linear, [torch.randn(x), torch.randn(w)] + bias, dtype, 64)
    if widens(dtype):  # torch's own kernel rounds the product and the sum
        check(lambda x, w, b: F.linear(x.transpose(0, 1), w, b), [torch.randn(3, 4, 5), torch.randn(6, 5), torch.randn(6)], dtype, 64)


@pytest.mark.parametrize("dtype", HALVES)
def test_matmul(dtype):
    for a, b in MATMUL:
        check(torch.matmul, [torch.randn(a), torch.randn(b)], dtype, 64, summed=len(a) != len(b) or len(a) == 4)
    check(lambda a, b: torch.einsum("bij,bjk->bik", a, b), [torch.randn(3, 4, 5), torch.randn(3, 5, 6)], dtype, 64)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m,k,n", [(2100, 300, 1100), (130, 5000, 70), (3, 5000, 1200), (1, 700, 2000), (900, 2, 3000), (257, 513, 65)])
def test_products_larger_than_a_tile(dtype, m, k, n):
    check(torch.mm, [torch.randn(m, k), torch.randn(k, n)], dtype, k + n + m)
    check(lambda a, b: torch.mm(a.t(), b.t()), [torch.randn(k, m), torch.randn(n, k)], dtype, k + n + m)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batches,m,k,n", [(5, 3, 4, 5), (70, 33, 40, 17), (3, 600, 500, 400), (2, 1100, 60, 1000), (1, 8, 8, 8)])
def test_batched_products(dtype, batches, m, k, n):
    a, b, c = torch.randn(batches, m, k), torch.randn(batches, k, n), torch.randn(m, n)
    terms = k + m + n + batches
    check(torch.bmm, [a, b], dtype, terms)
    check(lambda a, b: torch.bmm(a.transpose(1, 2), b.transpose(1, 2)), [a.transpose(1, 2).contiguous(), b.transpose(1, 2).contiguous()], dtype, terms)
    if widens(dtype):
        check(lambda c, a, b: torch.baddbmm(c, a, b, beta=0.5, alpha=2), [c, a, b], dtype, terms)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_form_of_a_product(dtype):
    a, b, c = torch.randn(6, 5).to(dtype), torch.randn(5, 4).to(dtype), torch.randn(6, 4).to(dtype)
    nan = torch.full((6, 4), float("nan")).to(dtype)
    for beta, alpha in ((1, 1), (0.5, 2), (0, 1), (0, 3)):
        wanted = beta * c.double() + alpha * (a.double() @ b.double())
        size = abs(beta) * c.double().abs() + alpha * (a.double().abs() @ b.double().abs())
        self = c if beta else nan  # a zero beta drops NaN
        kw = dict(beta=beta, alpha=alpha)
        padded = torch.zeros(6, 8, dtype=dtype)
        forms = [torch.addmm(self, a, b, **kw), self.clone().addmm_(a, b, **kw), torch.addmm(self, a, b, **kw, out=torch.empty(0, dtype=dtype)),
                 torch.addmm(self, a, b, **kw, out=padded[:, ::2]), padded[:, ::2],
                 torch.baddbmm(self[None], a[None], b[None], **kw)[0], self[None].clone().baddbmm_(a[None], b[None], **kw)[0],
                 torch.baddbmm(self[None], a[None], b[None], **kw, out=torch.empty(1, 6, 4, dtype=dtype))[0]]
        for form in forms:
            one_rounding(form, wanted, 2 * size, 16, dtype)
        assert not padded[:, 1::2].any()
    for form in (torch.mm(a, b, out=torch.empty(6, 4, dtype=dtype)), torch.bmm(a[None], b[None], out=torch.empty(1, 6, 4, dtype=dtype))[0]):
        assert torch.equal(form, a @ b)
    for m in (a, a.t().contiguous().t(), torch.randn(700, 5).to(dtype).t()):
        v = torch.randn(m.shape[1]).to(dtype)
        one_rounding(torch.mv(m, v), m.double() @ v.double(), m.double().abs() @ v.double().abs(), 800, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows,columns", [(1, 1), (3, 300), (257, 16), (64, 1025), (1030, 515)])
def test_matrix_times_vector(rows, columns, dtype):
    padded = torch.randn(rows, columns + 3).to(dtype)
    for m in (padded[:, :columns].contiguous(), padded[:, 1 : columns + 1], torch.randn(columns, rows).to(dtype).t(), padded[:, ::2][:, : columns // 2 + 1]):
        v = torch.randn(2 * m.shape[1]).to(dtype)[::2]
        one_rounding(torch.mv(m, v), m.double() @ v.double(), m.double().abs() @ v.double().abs(), m.shape[1], dtype)
    m, v = padded.clone().requires_grad_(), torch.randn(columns + 3).to(dtype).requires_grad_()
    g = torch.randn(rows).to(dtype)
    dm, dv = torch.autograd.grad(torch.mv(m, v), (m, v), g)
    assert torch.equal(dm, (g.float()[:, None] * v.detach().float()).to(dtype))
    one_rounding(dv, m.double().t() @ g.double(), m.double().abs().t() @ g.double().abs(), rows, dtype)
    assert torch.mv(torch.full((2, 3), float("inf"), dtype=dtype), torch.ones(3, dtype=dtype)).isinf().all()


def test_what_torch_refuses_is_refused_in_the_same_words():
    h = torch.float16
    a, b = torch.randn(4, 5).to(h), torch.randn(4, 5).to(h)
    calls = [lambda: torch.mm(a, b), lambda: torch.mm(a, b.t().float()), lambda: torch.bmm(a[None], b[None]), lambda: torch.mm(a, b.t()[0]),
             lambda: torch.addmm(torch.randn(3).to(h), a, b.t()), lambda: torch.mv(a, a[:, 0]),
             lambda: torch.mm(a, b.t(), out=torch.empty(4, 4)), lambda: torch.mm(a, b.t(), out=torch.empty(1, dtype=h).expand(4, 4)),
             lambda: F.conv2d(torch.randn(1, 3, 5, 5).to(h), torch.randn(2, 4, 3, 3).to(h)),
             lambda: F.conv2d(torch.randn(1, 3, 5, 5).to(h), torch.randn(2, 3, 3, 3)),
             lambda: F.conv2d(torch.randn(1, 3, 5, 5).to(h), torch.randn(2, 3, 7, 7).to(h))]
    check_refused_alike(calls)


@pytest.mark.parametrize("dtype", HALVES)
def test_non_finite_values_stay(dtype):
    a, b = torch.ones(4, 4).to(dtype), torch.ones(4, 4).to(dtype)
    a[0, 0], a[1, 1], a[2, 2] = float("inf"), float("nan"), torch.finfo(dtype).max
    b[2, 3] = torch.finfo(dtype).max
    y = a @ b
    assert torch.isinf(y[0]).all() and torch.isnan(y[1]).all() and torch.isinf(y[2, 3]) and torch.isfinite(y[3, :3]).all()
    x = torch.ones(1, 1, 5, 5).to(torch.float16)
    x[0, 0, 0, 0] = float("nan")
    y = F.conv2d(x, torch.full((1, 1, 1, 1), 40000.0).to(torch.float16) * x[0, 0, 1, 1])
    assert torch.isnan(y[0, 0, 0, 0]) and torch.isfinite(y).sum() == 24


# ---- convolution ----------------------------------------------------------------------------------------------------------
CONVS = {
    "1d": (F.conv1d, (2, 4, 20), (6, 4, 3), {}),
    "1d strided": (F.conv1d, (2, 4, 20), (6, 2, 3), dict(stride=2, groups=2, padding=1)),
    "2d": (F.conv2d, (2, 4, 9, 9), (6, 4, 3, 3), dict(padding=1)),
    "2d grouped": (F.conv2d, (2, 4, 9, 9), (6, 2, 3, 3), dict(groups=2, stride=2)),
    "2d dilated": (F.conv2d, (2, 4, 9, 9), (6, 4, 3, 3), dict(dilation=2)),
    "2d depthwise": (F.conv2d, (2, 4, 9, 9), (4, 1, 3, 3), dict(groups=4)),
    "2d same": (F.conv2d, (2, 4, 9, 8), (6, 4, 2, 3), dict(padding="same")),
    "2d one by one": (F.conv2d, (2, 4, 9, 9), (6, 4, 1, 1), {}),
    "2d in parts": (F.conv2d, (7, 8, 120, 100), (9, 8, 3, 3), dict(padding=1)),
    "3d": (F.conv3d, (1, 2, 5, 5, 5), (3, 2, 3, 3, 3), {}),
    "3d grouped": (F.conv3d, (2, 4, 5, 5, 5), (4, 2, 3, 3, 3), dict(groups=2, padding=1)),
    "1d transposed": (F.conv_transpose1d, (2, 4, 9), (4, 3, 3), dict(stride=2)),
    "2d transposed": (F.conv_transpose2d, (2, 4, 5, 5), (4, 3, 3, 3), dict(stride=2, output_padding=1)),
    "2d transposed in parts": (F.conv_transpose2d, (5, 4, 130, 120), (4, 2, 3, 3), dict(stride=2, padding=1, groups=2, dilation=2)),
    "3d transposed": (F.conv_transpose3d, (2, 4, 3, 3, 3), (4, 2, 3, 3, 3), {}),
    "unbatched": (F.conv2d, (4, 9, 9), (6, 4, 3, 3), dict(padding=1)),
}


def conv_case(name, channels_last, bias=True):
    f, x, w, kw = CONVS[name]
    out = w[1] * kw.get("groups", 1) if "transposed" in name else w[0]
    tensors = [torch.randn(x), torch.randn(w)] + ([torch.randn(out)] if bias else [])
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(w)) if channels_last else None
    if layout:
        tensors[:2] = [t.contiguous(memory_format=layout) if t.dim() == len(w) else t for t in tensors[:2]]
    return (lambda *t: f(*t, **kw)), tensors


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("dtype", HALVES)
def test_convolution(name, dtype):
    if dtype == torch.bfloat16 and not widens(dtype):
        pytest.skip("torch's kernel")
    for channels_last in (False, True):
        for bias in (True, False):
            f, tensors = conv_case(name, channels_last, bias)
            check(f, tensors, dtype, 30000 if "parts" in name else 1000)


@pytest.mark.parametrize("name", ["2d", "2d grouped", "2d transposed", "3d", "2d in parts"])
def test_only_the_gradients_asked_for(name):
    f, tensors = conv_case(name, False)
    half = [t.half() for t in tensors]
    together = [t.clone().requires_grad_() for t in half]
    y = f(*together)
    g = torch.randn_like(y)
    all_three = torch.autograd.grad(y, together, g)
    for i in range(3):
        alone = [t.clone().requires_grad_(i == j) for j, t in enumerate(half)]
        (grad,) = torch.autograd.grad(f(*alone), alone[i], g)
        one_rounding(grad, all_three[i].double(), all_three[i].double().abs().max(), 100, torch.float16)


def test_convolution_of_an_empty_batch_and_of_an_expanded_gradient():
    x, w = torch.randn(0, 3, 5, 5).half().requires_grad_(), torch.randn(2, 3, 3, 3).half().requires_grad_()
    y = F.conv2d(x, w)
    y.sum().backward()
    assert y.shape == (0, 2, 3, 3) and x.grad.shape == x.shape and not w.grad.any()
    x, w = torch.randn(2, 3, 5, 5).half().requires_grad_(), w.detach().requires_grad_()
    F.conv2d(x, w).sum().backward()
    wide = w.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.conv2d(x.detach().double(), wide).sum(), wide)
    one_rounding(w.grad, exact, exact.abs() + 20, 100, torch.float16)


def test_second_derivative_of_convolution():
    x, w = torch.randn(2, 3, 6, 6).half().requires_grad_(), torch.randn(4, 3, 3, 3).half().requires_grad_()
    (g,) = torch.autograd.grad(F.conv2d(x, w).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.float().sum(), w)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    (h,) = torch.autograd.grad(F.conv2d(*wide).square().sum(), wide[0], create_graph=True)
    (exact,) = torch.autograd.grad(h.sum(), wide[1])
    assert (second.double() - exact).abs().max() < 0.01 * exact.abs().max()


# ---- attention ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", ["plain", "causal", "mask", "additive mask", "shared mask", "scale", "other length", "many heads", "one long head", "grouped"])
def test_attention(dtype, case):
    shape = {"many heads": (3, 40, 64, 32), "one long head": (2, 3, 2100, 64), "grouped": (2, 4, 10, 16)}.get(case, (2, 3, 10, 16))
    other = {"other length": (2, 3, 7, 16), "grouped": (2, 2, 10, 16)}.get(case, shape)
    kw = {"causal": dict(is_causal=True), "mask": dict(attn_mask=torch.rand(2, 1, 10, 10) > 0.3), "additive mask": dict(attn_mask=torch.randn(2, 3, 10, 10).to(dtype)),
          "shared mask": dict(attn_mask=torch.rand(10, 10) > 0.3), "scale": dict(scale=0.7), "grouped": dict(enable_gqa=True)}.get(case, {})
    half = [torch.randn(s).to(dtype).requires_grad_() for s in (shape, other, other)]
    wide = [t.detach().double().requires_grad_() for t in half]
    y = F.scaled_dot_product_attention(*half, **kw)
    z = F.scaled_dot_product_attention(*wide, **{k: v.double() if k == "attn_mask" and v.dtype == dtype else v for k, v in kw.items()})
    g = torch.randn(shape).to(dtype)
    assert y.dtype == dtype
    for ours, exact in zip((y, *torch.autograd.grad(y, half, g)), (z, *torch.autograd.grad(z, wide, g.double()))):
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < 4 * torch.finfo(dtype).eps, error


def test_attention_is_fp32_attention_rounded_once():
    if not widens(torch.float16):
        pytest.skip("torch's kernel")
    q, k, v = (torch.randn(2, 3, 10, 16).half() for _ in range(3))
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q.float(), k.float(), v.float()).half())


# ---- what must not change -------------------------------------------------------------------------------------------------
def results(dtype):
    """Every op that has an override, forward and backward, in `dtype`."""
    torch.manual_seed(0)

    def r(*shape):
        return torch.randn(shape).to(dtype).requires_grad_(dtype.is_floating_point or dtype.is_complex)

    ops = [(F.linear, r(2, 3, 5), r(4, 5), r(4)), (F.linear, r(5), r(4, 5), r(4)), (torch.matmul, r(2, 3, 5), r(5, 4)), (torch.mm, r(3, 5), r(5, 4)),
           (torch.addmm, r(4), r(3, 5), r(5, 4)), (torch.bmm, r(2, 3, 5), r(2, 5, 4)), (torch.baddbmm, r(3, 4), r(2, 3, 5), r(2, 5, 4)),
           (lambda a, v: torch.mv(a.t(), v), r(5, 3), r(5))]
    if dtype.is_floating_point:
        ops += [(F.conv2d, r(2, 3, 6, 6), r(4, 3, 3, 3), r(4)), (F.conv1d, r(2, 3, 9), r(4, 3, 3)), (F.conv_transpose2d, r(2, 3, 4, 4), r(3, 2, 3, 3)),
                (F.scaled_dot_product_attention, r(2, 2, 6, 8), r(2, 2, 6, 8), r(2, 2, 6, 8))]
    out = []
    for f, *inputs in ops:
        y = f(*inputs)
        out += [y.detach()]
        if y.requires_grad:
            out += torch.autograd.grad(y, inputs, torch.ones_like(y))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.int32])
def test_other_dtypes_are_the_stock_kernels(dtype):
    on = results(dtype)
    try:
        hs.set_overrides(False)
        off = results(dtype)
    finally:
        hs.set_overrides(True)
    assert len(on) == len(off) and all(torch.equal(a, b) for a, b in zip(on, off))


def digest():
    h = hashlib.sha256()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for t in results(dtype):
            h.update(str((t.dtype, t.shape, t.stride())).encode() + t.contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def test_switched_off_is_torch_without_halfstep():
    here = os.path.dirname(__file__)
    source = open(__file__).read()
    program = "import hashlib, torch, torch.nn.functional as F, sys\n" + source[source.index("def results("):source.index("@pytest.mark.parametrize(\"dtype\", [torch.float32, torch.float64, torch.complex64")]
    program += source[source.index("def digest("):source.index("def test_switched_off")]

    def run(first, last="print(digest())", **env):
        done = subprocess.run([sys.executable, "-c", first + program + last], capture_output=True, text=True, cwd=here,
                              env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(hs.__file__)), "OMP_NUM_THREADS": "1", **env})
        assert done.returncode == 0, done.stderr
        return done.stdout

    stock = run("", "print(digest()); assert 'halfstep' not in sys.modules")
    assert run("import halfstep\n", HALFSTEP_OVERRIDES="0") == stock
    assert run("import halfstep\nhalfstep.set_overrides(False)\n") == stock
    assert run("import halfstep\n") != stock  # on, FP16 convolution at least is another kernel


def test_layouts_are_those_of_the_stock_kernels():
    def strides():
        found = []
        for name in CONVS:
            if "parts" in name:
                continue
            for channels_last in (False, True):
                f, tensors = conv_case(name, channels_last)
                half = [t.half().requires_grad_() for t in tensors]
                y = f(*half)
                for t in (y, *torch.autograd.grad(y.sum(), half)):
                    found.append([s for s, n in zip(t.stride(), t.shape) if n > 1])
        q = torch.randn(2, 6, 3, 8).half().transpose(1, 2).requires_grad_()
        y = F.scaled_dot_product_attention(q, q, q)
        return found + [y.stride(), torch.autograd.grad(y.sum(), q)[0].stride()]

    ours = strides()
    try:
        hs.set_overrides(False)
        assert ours == strides()
    finally:
        hs.set_overrides(True)


# ---- autograd, functorch, autocast, compilers ------------------------------------------------------------------------------
def test_second_derivative_inference_and_no_grad():
    x = torch.randn(4, 5, dtype=torch.float16, requires_grad=True)
    w = torch.randn(3, 5, dtype=torch.float16, requires_grad=True)
    for f in (F.linear, lambda x, w: torch.matmul(x, w.t())):
        (g,) = torch.autograd.grad(f(x, w).float().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(g.float().sum(), w)
        wide = [t.detach().double().requires_grad_() for t in (x, w)]
        (h,) = torch.autograd.grad(f(*wide).square().sum(), wide[0], create_graph=True)
        (exact,) = torch.autograd.grad(h.sum(), wide[1])
        assert (second.double() - exact).abs().max() < 0.01 * exact.abs().max()
    with torch.no_grad():
        a = F.linear(x, w)
    with torch.inference_mode():
        b = F.linear(x.detach().clone(), w.detach().clone())
        c = F.linear(x, w)
    assert torch.equal(a, b.clone()) and torch.equal(a, c.clone()) and torch.equal(a, F.linear(x, w))


def test_the_graph_keeps_16_bit_tensors():
    kept = []
    x, w, k = torch.randn(6, 5).half().requires_grad_(), torch.randn(3, 5).half().requires_grad_(), torch.randn(2, 1, 3, 3).half().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        F.linear(x, w, torch.zeros(3).half())
        torch.bmm(x[None], w.t()[None])
        F.conv2d(x[None, None], k)
    assert kept and set(kept) == {torch.float16}


def test_functorch():
    from torch.func import grad, jacfwd, jacrev, jvp, vmap

    net = torch.nn.Linear(8, 5).half()
    w, b = net.weight.detach(), net.bias.detach()
    x = torch.randn(4, 8).half()
    wide = lambda x: F.linear(x, w.double(), b.double())
    loss = lambda f: lambda x: f(x).square().sum()
    near = lambda a, b: (a.double() - b).abs().max() < 0.005 * b.abs().max()
    xd = x.double()
    assert near(grad(loss(net))(x), grad(loss(wide))(xd))
    assert near(vmap(grad(loss(net)))(x), vmap(grad(loss(wide)))(xd))
    assert near(vmap(net)(x), wide(xd))
    assert near(jvp(net, (x,), (x,))[1], F.linear(xd, w.double()))
    assert near(jacrev(net)(x[0]), w.double()) and near(jacfwd(net)(x[0]), w.double())
    many = torch.randn(4, 3, 8).half()
    assert near(vmap(F.linear)(x, many), vmap(F.linear)(xd, many.double()))
    conv, images = torch.nn.Conv2d(2, 3, 3).half(), torch.randn(3, 1, 2, 6, 6).half()
    of_weight = lambda w, i: F.conv2d(i, w, conv.bias.detach().to(w.dtype)).square().sum()
    weight = conv.weight.detach()
    assert near(vmap(grad(of_weight), in_dims=(None, 0))(weight, images), vmap(grad(of_weight), in_dims=(None, 0))(weight.double(), images.double()))
    with torch.autograd.forward_ad.dual_level():
        dual = net(torch.autograd.forward_ad.make_dual(x, x))
        assert near(torch.autograd.forward_ad.unpack_dual(dual).tangent, F.linear(xd, w.double()))


def test_autocast_takes_them():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 10))
    with hs.autocast("cpu"):
        y = net(torch.randn(2, 1, 8, 8))
        assert y.dtype == torch.float16
        y.float().sum().backward()  # also under autocast: nothing inside is cast back
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    a, b = torch.randn(6, 5).half(), torch.randn(5, 4).half()
    with hs.autocast("cpu"):
        inside = [torch.mm(a, b, out=torch.empty(6, 4).half()), F.conv2d(a[None, None], b[None, None])]
    assert torch.equal(inside[0], a @ b) and torch.equal(inside[1], F.conv2d(a[None, None], b[None, None]))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = torch.nn.Conv2d(8, 8, 3, groups=4)
        self.first, self.qkv, self.last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 48), torch.nn.Linear(16, 5)

    def forward(self, x):
        y = self.first(self.grouped(self.conv(x).relu()).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(y).reshape(y.shape[0], -1, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.last(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) + y).mean(1)


def compiled_like_eager(backend):
    for layout in (torch.contiguous_format, torch.channels_last):
        torch._dynamo.reset()
        net = Net().half().to(memory_format=layout)
        x = torch.randn(4, 3, 8, 8).half().contiguous(memory_format=layout)
        compiled = torch.compile(net, backend=backend)
        eager, ours = net(x), compiled(x)
        near = lambda a, b: (a.double() - b.double()).abs().max() <= 0.01 * b.double().abs().max()
        assert near(ours, eager)
        params = list(net.parameters())
        for a, b in zip(torch.autograd.grad(ours.float().sum(), params), torch.autograd.grad(eager.float().sum(), params)):
            assert near(a, b)
        with torch.no_grad():
            assert near(compiled(x), eager)
        with torch.inference_mode():
            assert near(compiled(x), eager)


def test_compile():
    compiled_like_eager("aot_eager")


@pytest.mark.slow
def test_inductor():
    compiled_like_eager("inductor")


def test_export_and_trace():
    net, x = Net().half(), torch.randn(4, 3, 8, 8).half()
    eager = net(x)
    program = torch.export.export(net, (x,))
    near = lambda a: (a.double() - eager.double()).abs().max() <= 0.01 * eager.double().abs().max()
    assert near(program.module()(x)) and near(program.run_decompositions().module()(x))
    names = {str(n.target) for n in program.graph.nodes}
    assert {"aten.linear.default", "aten.conv2d.default"} <= names  # the graph holds torch's ops, not ours
    traced = torch.jit.trace(net.conv, x)
    y = traced(x)
    assert "aten::_convolution" in str(traced.inlined_graph) and torch.equal(y, net.conv(x))
    y.float().sum().backward()
    assert net.conv.weight.grad.any()


def test_other_kinds_of_tensors_go_past():
    h = torch.float16
    dense, sparse = torch.randn(4, 5), torch.eye(4).to_sparse()
    assert torch.equal(torch.sparse.mm(sparse, dense), dense) and torch.equal(torch.mm(sparse, dense), dense)
    assert torch.mm(torch.empty(3, 4, dtype=h, device="meta"), torch.empty(4, 5, dtype=h, device="meta")).shape == (3, 5)
    assert F.conv2d(torch.empty(1, 3, 5, 5, dtype=h, device="meta"), torch.empty(2, 3, 3, 3, dtype=h, device="meta")).shape == (1, 2, 3, 3)
    net = torch.nn.Linear(5, 3).half()
    rows = [torch.randn(2, 5).to(h), torch.randn(3, 5).to(h)]
    nested = net(torch.nested.nested_tensor(rows, layout=torch.jagged))
    for ours, row in zip(nested.unbind(), rows):
        one_rounding(ours.detach(), net(row).detach().double(), 4, 8, h)


def test_threads_share_nothing():
    a, b = torch.randn(3, 40, 60).half(), torch.randn(3, 60, 50).half()
    x, k = torch.randn(2, 3, 20, 20).half(), torch.randn(4, 3, 3, 3).half()
    wanted = [torch.bmm(a, b), torch.mm(a[0], b[0]), F.conv2d(x, k)]
    wrong = []

    def work():
        for _ in range(20):
            found = [torch.bmm(a, b), torch.mm(a[0], b[0]), F.conv2d(x, k)]
            wrong.extend(1 for f, w in zip(found, wanted) if not torch.allclose(f, w, rtol=2e-3, atol=1e-2))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_doctor_names_the_path():
    done = subprocess.run([sys.executable, "-m", "halfstep.cli", "doctor"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(hs.__file__)), "HALFSTEP_OVERRIDES": "1"})
    assert hs._C.cpu_path() in done.stdout
    try:
        hs.set_overrides(False)
        assert "FP32" not in hs._C.cpu_path()
    finally:
        hs.set_overrides(True)
    hidden = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}  # oneDNN calls BF16 supported there and emulates it
    done = subprocess.run([sys.executable, "-c", "import halfstep; print(halfstep._C.cpu_path())"], capture_output=True, text=True,
                          env={**os.environ, **hidden, "PYTHONPATH": os.path.dirname(os.path.dirname(hs.__file__))})
    assert "float16 products and attention: FP32" in done.stdout and "bfloat16 products and attention: FP32" in done.stdout
