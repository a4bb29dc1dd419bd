"""hs.functional.scale_gradient: forward the same, the gradient times a scale, rounded once; refused by name; one graph under compile."""

import pytest
import torch
from torch._dynamo.utils import counters

import halfstep as hs

scale_gradient = hs.functional.scale_gradient
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gradient(x, scale, upstream):
    leaf = x.detach().requires_grad_()
    y = scale_gradient(leaf, scale)
    assert torch.equal(y, x) and y.data_ptr() == leaf.data_ptr() and y.dtype == x.dtype  # nothing is copied
    y.backward(upstream)
    return leaf.grad


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 8.0, 0.3, 2.0**20, 2.0**-20])
@pytest.mark.parametrize("shape", [(17, 5), (), (0,)])
def test_the_gradient_is_the_product_rounded_once(dtype, scale, shape):
    upstream = torch.randn(shape).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.tensor(scale, dtype=wide)
    want = (upstream.to(wide) * factor).to(dtype)
    for given in (scale, torch.tensor(scale), torch.tensor([scale], dtype=torch.float64)):
        if dtype == torch.float64 and isinstance(given, torch.Tensor) and given.dtype == torch.float32:
            want_here = (upstream * given.double()).to(dtype)
        else:
            want_here = want
        got = gradient(torch.randn(shape).to(dtype), given, upstream)
        assert got.dtype == dtype and got.shape == torch.Size(shape) and torch.equal(got, want_here)


def test_a_scale_beyond_fp16_range_is_not_rounded_to_infinity():
    got = gradient(torch.ones(4).half(), torch.tensor(2.0**20), torch.full((4,), 2.0**-20).half())
    assert torch.equal(got, torch.ones(4).half())


def test_non_finite_gradients_stay():
    upstream = torch.tensor([float("nan"), float("inf"), -float("inf"), 6e4]).half()
    got = gradient(torch.ones(4).half(), 2.0, upstream)
    assert got[0].isnan() and got[1:].tolist() == [float("inf"), -float("inf"), float("inf")]


def test_layouts():
    upstream = torch.randn(2, 3, 4, 5).half().to(memory_format=torch.channels_last)
    assert torch.equal(gradient(torch.randn(2, 3, 4, 5).half(), 2.0, upstream), upstream * 2)
    expanded = torch.ones(1, 5).expand(4, 5)
    assert torch.equal(gradient(torch.randn(4, 5), 2.0, expanded), torch.full((4, 5), 2.0))
    x = torch.randn(8, 6).t()[::2]
    assert torch.equal(gradient(x, 3.0, torch.ones_like(x)), torch.full_like(x, 3.0))


def test_derivatives_of_higher_order_agree_with_finite_differences():
    x, scale = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.tensor(1.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: scale_gradient(x.sin(), scale), (x,)) and torch.autograd.gradgradcheck(lambda x: scale_gradient(x.sin(), scale), (x,))
    # With a scale the first derivative is that of scale * f, and so are all later ones.
    two = torch.tensor(2.0, dtype=torch.float64)
    g, = torch.autograd.grad(scale_gradient(x, two).pow(3).sum(), x, create_graph=True)
    assert torch.allclose(g, 2 * 3 * x.detach() ** 2)
    h, = torch.autograd.grad(g.sum(), x)
    # d/dx of 2 * 3 y^2 with y = scale_gradient(x): the gradient of y is scaled again on its way to x.
    assert torch.allclose(h, 2 * 2 * 6 * x.detach())


def test_two_scales_that_cancel_leave_the_weights_gradient_and_shift_what_is_between():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)
    x, seen = torch.randn(16, 8), []
    want = torch.autograd.grad(second(first(x).relu()).mean(), first.weight)[0]
    y = scale_gradient(first(scale_gradient(x, 1.0)), 1 / 64)
    y.register_hook(lambda g: seen.append(g.clone()))
    got = torch.autograd.grad(second(scale_gradient(y.relu(), 64.0)).mean(), first.weight)[0]
    assert torch.equal(got, want)  # powers of two are exact


def test_without_grad_and_in_inference_mode():
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert not scale_gradient(x, 2.0).requires_grad
    with torch.inference_mode():
        assert torch.equal(scale_gradient(x, 2.0), x)
    assert not scale_gradient(torch.randn(3), 2.0).requires_grad


def test_refusals_name_what_was_given():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"scale_gradient: scale is .*\[2\]; expected one floating-point element"):
        scale_gradient(x, torch.ones(2))
    with pytest.raises(RuntimeError, match="scale_gradient: scale is .*Int"):
        scale_gradient(x, torch.tensor(2, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="scale_gradient: x is Int; expected a real floating-point dtype"):
        scale_gradient(torch.ones(3, dtype=torch.int32), 2.0)
    with pytest.raises(RuntimeError, match="scale_gradient: x is ComplexFloat"):
        scale_gradient(torch.ones(3, dtype=torch.complex64), 2.0)
    with pytest.raises(RuntimeError, match="scale_gradient: scale is on meta but x is on cpu"):
        scale_gradient(x, torch.ones((), device="meta"))
    with pytest.raises(RuntimeError, match="scale_gradient: scale requires grad"):
        scale_gradient(x, torch.ones((), requires_grad=True))
    scale = torch.tensor(2.0)
    y = scale_gradient(x, scale)
    scale.fill_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_compiles_into_one_graph_and_follows_the_scales_contents(backend, dtype):
    torch._dynamo.reset()
    counters.clear()

    def f(x, w, scale):
        return scale_gradient(x * w, scale) * 2

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    scale = torch.tensor(4.0)
    for value in (4.0, 0.5, 2.0**12):
        scale.fill_(value)
        results = []
        for call in (f, compiled):
            x, w = torch.arange(6.0).to(dtype).requires_grad_(), torch.full((6,), 3.0).to(dtype).requires_grad_()
            y = call(x, w, scale)
            y.sum().backward()
            results.append((y.detach(), x.grad, w.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results))
        assert torch.equal(results[0][1], torch.full((6,), 6 * value).to(dtype))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
