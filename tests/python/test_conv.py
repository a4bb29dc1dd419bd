"""halfstep's convolutions: one rounding of the FP32 result with or without the overrides, biases in FP32, any derivative, one compiled graph."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfstep as hs
import halfstep.functional as hf
from layers import FLOATS, SIXTEEN, check_compiled, check_error, check_repeats, check_scale_exact

CASES = {
    "1d": ("conv1d", (2, 4, 20), (6, 4, 3), {}),
    "1d in groups": ("conv1d", (2, 4, 20), (6, 2, 3), dict(stride=2, groups=2, padding=1)),
    "1d same": ("conv1d", (2, 4, 20), (6, 4, 4), dict(padding="same", dilation=2)),
    "1d same, one more behind": ("conv1d", (2, 4, 20), (6, 4, 4), dict(padding="same")),
    "2d": ("conv2d", (2, 4, 9, 9), (6, 4, 3, 3), dict(padding=1)),
    "2d strided": ("conv2d", (2, 4, 9, 8), (6, 4, 3, 2), dict(stride=(2, 1), padding=(1, 0))),
    "2d dilated": ("conv2d", (2, 4, 9, 9), (6, 4, 3, 3), dict(dilation=2)),
    "2d depthwise": ("conv2d", (2, 4, 9, 9), (4, 1, 3, 3), dict(groups=4)),
    "2d same": ("conv2d", (2, 4, 9, 8), (6, 4, 2, 3), dict(padding="same")),
    "2d valid": ("conv2d", (2, 4, 9, 8), (6, 4, 2, 3), dict(padding="valid")),
    "2d one by one": ("conv2d", (2, 4, 9, 9), (6, 4, 1, 1), {}),
    "2d in parts": ("conv2d", (7, 8, 120, 100), (9, 8, 3, 3), dict(padding=1)),
    "3d": ("conv3d", (1, 2, 5, 5, 5), (3, 2, 3, 3, 3), {}),
    "3d in groups": ("conv3d", (2, 4, 5, 5, 5), (4, 2, 3, 3, 3), dict(groups=2, padding=1)),
    "1d transposed": ("conv_transpose1d", (2, 4, 9), (4, 3, 3), dict(stride=2)),
    "2d transposed": ("conv_transpose2d", (2, 4, 5, 5), (4, 3, 3, 3), dict(stride=2, output_padding=1)),
    "2d transposed, groups": ("conv_transpose2d", (2, 4, 5, 6), (4, 2, 3, 3), dict(stride=2, padding=1, groups=2, dilation=2)),
    "3d transposed": ("conv_transpose3d", (2, 4, 3, 3, 3), (4, 2, 3, 3, 3), {}),
    "unbatched": ("conv2d", (4, 9, 9), (6, 4, 3, 3), dict(padding=1)),
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def case(name, dtype, layout=None, bias_dtype=None, seed=0):
    """ours, torch's, inputs and the upstream gradient of a case."""
    torch.manual_seed(seed)
    function, x, w, kw = CASES[name]
    inputs = [torch.randn(x).to(dtype), torch.randn(w).to(dtype)]
    if layout:
        inputs = [t.contiguous(memory_format=layout) if t.dim() == len(w) else t for t in inputs]
    if bias_dtype:
        inputs.append(torch.randn(w[1] * kw.get("groups", 1) if "transpose" in function else w[0]).to(bias_dtype))
    ours, stock = (lambda *t, f=getattr(m, function): f(*t, **kw) for m in (hf, F))
    y = stock(*[t.double() for t in inputs])
    return ours, stock, inputs, torch.randn(y.shape).to(dtype)


@pytest.fixture(params=[True, False], ids=["", "overrides off"])
def overrides(request):
    hs.set_overrides(request.param)
    yield request.param
    hs.set_overrides(True)


def no_peer(*_):
    raise RuntimeError


def within_one_ulp(name, dtype, last, bias_dtype):
    """Data of one sign: no cancellation, so that 1 ULP is a bound whatever torch's error; in FP32 torch's own is the bound."""
    layout = LAST.get(len(CASES[name][2])) if last else None
    if last and not layout:
        return
    ours, stock, inputs, upstream = case(name, dtype, layout, bias_dtype)
    check_error(ours, stock, stock if dtype == torch.float32 else no_peer, [t.abs() for t in inputs], [upstream.abs()])


@pytest.mark.parametrize("name", [name for name in CASES if "parts" not in name])
def test_error_against_fp64(name):
    for dtype, last in itertools.product(FLOATS, (False, True)):
        for bias_dtype in {None, dtype, torch.float32}:
            within_one_ulp(name, dtype, last, bias_dtype)
    try:
        hs.set_overrides(False)
        for dtype in SIXTEEN:
            within_one_ulp(name, dtype, False, torch.float32)
    finally:
        hs.set_overrides(True)


def test_error_of_a_batch_that_is_taken_in_parts():
    for bias_dtype in (None, torch.float16):
        within_one_ulp("2d in parts", torch.float16, False, bias_dtype)


@pytest.mark.parametrize("name", ["1d", "2d", "2d depthwise", "3d", "2d transposed"])
def test_fp16_is_the_fp32_result_rounded_once(name, overrides):
    ours, stock, inputs, upstream = case(name, torch.float16, bias_dtype=torch.float32)
    given = [t.clone().requires_grad_() for t in inputs]
    y = ours(*given)
    wide = [t.float().requires_grad_() for t in inputs]
    z = stock(*wide)
    assert torch.equal(y, z.half())
    for a, b in zip(torch.autograd.grad(y, given, upstream), torch.autograd.grad(z, wide, upstream.float())):
        assert torch.equal(a, b.to(a.dtype))
    assert given[2].grad_fn is None and a.dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOATS)
def test_layout_of_results(dtype):
    for name in ("2d", "2d depthwise", "3d", "2d transposed", "2d strided"):
        for layout in (torch.contiguous_format, LAST[len(CASES[name][2])]):
            ours, _, inputs, upstream = case(name, dtype, layout)
            inputs = [t.requires_grad_() for t in inputs]
            y = ours(*inputs)
            for t in (y, *torch.autograd.grad(y, inputs, upstream)):
                assert t.is_contiguous(memory_format=layout), name


def test_empty_batch():
    for dtype in FLOATS:
        for transposed in (False, True):
            x, w = torch.randn(0, 3, 5, 5).to(dtype).requires_grad_(), torch.randn(3, 3, 3, 3).to(dtype).requires_grad_()
            b = torch.randn(3, requires_grad=True)
            y = (hf.conv_transpose2d if transposed else hf.conv2d)(x, w, b)
            grads = torch.autograd.grad(y.sum(), [x, w, b])
            assert y.shape == (0, 3, 7, 7) if transposed else (0, 3, 3, 3)
            assert [g.shape for g in grads] == [x.shape, w.shape, b.shape] and not grads[1].any() and not grads[2].any()


def test_derivatives_of_any_order():
    for name in ("1d in groups", "2d dilated", "2d transposed", "2d same"):
        function, x, w, kw = CASES[name]
        torch.manual_seed(0)
        x, w = (x[0], x[1], *[min(n, 5) for n in x[2:]]), w
        inputs = [torch.randn(x, dtype=torch.float64, requires_grad=True), torch.randn(w, dtype=torch.float64, requires_grad=True)]
        inputs.append(torch.randn(w[1] * kw.get("groups", 1) if "transpose" in function else w[0], dtype=torch.float64, requires_grad=True))
        f = lambda *t: getattr(hf, function)(*t, **kw)
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True) and torch.autograd.gradgradcheck(f, inputs, fast_mode=True)
    x, w = torch.randn(1, 2, 4, 4).half().requires_grad_(), torch.randn(2, 2, 3, 3).half().requires_grad_()
    (g,) = torch.autograd.grad(hf.conv2d(x, w).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(g.float().sum(), w)[0].dtype == torch.float16


def test_only_the_gradients_asked_for():
    for dtype in FLOATS:
        ours, _, inputs, upstream = case("2d", dtype, bias_dtype=torch.float32)
        whole = torch.autograd.grad(ours(*[t.requires_grad_() for t in inputs]), inputs, upstream)
        for wanted in itertools.product((False, True), repeat=3):
            given = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted)]
            if any(wanted):
                found = torch.autograd.grad(ours(*given), [t for t in given if t.requires_grad], upstream)
                assert all(torch.equal(a, b) for a, b in zip(found, itertools.compress(whole, wanted)))


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_repeats_and_loss_scales(dtype):
    ours, _, inputs, upstream = case("2d", dtype, bias_dtype=torch.float32)
    check_repeats(ours, inputs, [upstream], times=20)
    check_scale_exact(ours, inputs, [upstream.sign() * (torch.rand(upstream.shape) + 1).to(dtype) / 1024], range(0, 13, 4))


def test_autocast():
    x, w, b = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    for dtype in SIXTEEN:
        with hs.autocast("cpu", dtype=dtype):
            y = hf.conv2d(x, w, b)
            assert torch.equal(y, hf.conv2d(x.to(dtype), w.to(dtype), b)) and y.dtype == dtype
            assert hf.conv2d(x.double(), w.double()).dtype == torch.float64
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), [x, w, b]))


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_one_graph_with_dynamic_shapes(name):
    dims = int(name[-2])

    def make_inputs(n):
        torch.manual_seed(n)
        x = torch.randn(n, 4, *[n + 4] * dims).half()
        if n % 2 and dims == 2:
            x = x.contiguous(memory_format=torch.channels_last)
        inputs = [x, torch.randn(4, 2, *[3] * dims).half(), torch.randn(8 if "transpose" in name else 4)][:3]
        if "transpose" in name:
            inputs[2] = torch.randn(4)
        return inputs, [torch.randn(getattr(F, name)(*[t.float() for t in inputs], groups=2, padding=1).shape).half()]

    check_compiled(lambda x, w, b: getattr(hf, name)(x, w, b, padding=1, groups=2), make_inputs, (2, 4, 6))


def test_errors_name_the_argument_and_both_values():
    x, w = torch.randn(2, 4, 5, 5).half(), torch.randn(6, 4, 3, 3).half()
    for args, kw, words in (
        ((x.int(), w), {}, "input is Int[2, 4, 5, 5]; expected float16"), ((x, w.float()), {}, "weight is torch.float32[6, 4, 3, 3] but input is torch.float16[2, 4, 5, 5]"),
        ((x, w, torch.randn(6).bfloat16()), {}, "bias is torch.bfloat16[6] but input is torch.float16"), ((x, w, torch.randn(5)), {}, "bias is torch.float32[5]; expected 6 elements"),
        ((x, w), dict(groups=2), "in 2 groups"), ((x, w), dict(stride=0), "stride is [0, 0]"), ((x, w), dict(padding=(1,) * 3), "padding is [1, 1, 1]"),
        ((x, torch.randn(6, 4, 7, 7).half()), {}, "too small for weight torch.float16[6, 4, 7, 7]"), ((x[0, 0, 0], w), {}, "3 to 5 dimensions")):
        with pytest.raises(RuntimeError) as error:
            hf.conv2d(*args, **kw)
        assert words in str(error.value), str(error.value)
    with pytest.raises(RuntimeError, match="output_padding is"):
        hf.conv_transpose2d(x, w.transpose(0, 1).contiguous(), output_padding=1)
    with pytest.raises(ValueError, match="stride is 2; expected 1"):
        hf.conv2d(x, w, padding="same", stride=2)
    with pytest.raises(ValueError, match="'full'; expected"):
        hf.conv2d(x, w, padding="full")


MODULES = [("Conv1d", (4, 6, 3), dict(padding="same"), (2, 4, 9)), ("Conv2d", (4, 6, 3), dict(groups=2, stride=2), (2, 4, 9, 9)), ("Conv2d", (4, 6, 3), dict(padding=2, padding_mode="reflect"), (2, 4, 9, 9)),
           ("Conv3d", (2, 3, 2), {}, (1, 2, 4, 4, 4)), ("ConvTranspose1d", (4, 6, 3), dict(stride=2), (2, 4, 9)), ("ConvTranspose2d", (4, 6, 3), dict(stride=2, groups=2), (2, 4, 5, 5)), ("ConvTranspose3d", (2, 3, 2), {}, (1, 2, 3, 3, 3))]


@pytest.mark.parametrize("name,args,kw,shape", MODULES)
def test_modules_are_torchs_with_another_forward(name, args, kw, shape, overrides):
    torch.manual_seed(0)
    stock = getattr(nn, name)(*args, **kw)
    ours = getattr(hs.nn, name)(*args, **kw)
    ours.load_state_dict(stock.state_dict())
    assert isinstance(ours, getattr(nn, name)) and str(ours) == str(stock)
    x = torch.randn(shape)
    assert torch.allclose(ours(x), stock(x), atol=1e-6)
    swapped = getattr(nn, name)(*args, **kw)
    swapped.load_state_dict(stock.state_dict())
    swapped.__class__ = getattr(hs.nn, name)
    assert torch.equal(swapped(x), ours(x)) and list(swapped.state_dict()) == list(stock.state_dict())
    ours.weight.data = ours.weight.data.half()  # the bias stays FP32
    exact = stock.double()
    exact.weight.data = ours.weight.data.double()
    assert torch.allclose(ours(x.half()).double(), exact(x.half().double()), rtol=1e-3, atol=1e-4)
    if "Transpose" in name:
        size = [s + 1 for s in ours(x.half()).shape[2:]] if kw.get("stride") else None
        if size:
            assert list(ours(x.half(), output_size=size).shape[2:]) == size
