"""hs.functional.linear, hs.nn.Linear and MLP: act(x w^T + b) with one rounding, its gradients, and weight gradients that are summed in FP32."""

import os
import subprocess
import sys

import layers
import pytest
import torch
from layers import SIXTEEN

import halfstep as hs

F = torch.nn.functional
H = torch.ops.halfstep
linear = hs.functional.linear
ACTIVATIONS = {None: lambda h: h, "relu": torch.relu, "gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh")}
pytestmark = pytest.mark.smoke


def ours(activation):
    return lambda x, w, b=None: linear(x, w, b, activation)


def stock(activation):
    return lambda x, w, b=None: ACTIVATIONS[activation](F.linear(x, w, b))


def inputs_of(rows, k, n, dtype, bias=True, seed=0):
    random = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    rows = rows if isinstance(rows, tuple) else (rows,)
    x, w = make(*rows, k), make(n, k) / max(k, 1) ** 0.5
    inputs = [x.to(dtype), w.to(dtype)] + ([make(n).to(bias if isinstance(bias, torch.dtype) else dtype)] if bias else [])
    return inputs, [make(*rows, n).to(dtype)]


def flat(t):
    return t.reshape(-1, t.shape[-1])


def rms(t):
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def check_errors(activation, inputs, upstream, rounds_h=False):
    """Every element: half an ULP for its one rounding, beside the bound of an FP32 sum and what the roundings of h and dz, which are kept in
    16 bits, are multiplied by. And in the root mean square no more than stock torch, whose outputs and dz are rounded more often.

    An ULP of the result alone is no measure of a sum: where its terms cancel, the result is smaller than the error of any FP32 sum.
    """
    dtype, info = inputs[0].dtype, torch.finfo(inputs[0].dtype)
    half, unit, tiny = info.eps / 2, 2.0**-24, info.smallest_normal * info.eps
    outputs, grads = layers.run(ours(activation), inputs, upstream)
    exact_outputs, exact_grads = layers.run(stock(activation), inputs, upstream, torch.float64)
    x, w, b = [flat(t).double() if t.dim() != 1 or i == 0 else t.double() for i, t in enumerate(inputs)] + [torch.zeros(1, dtype=torch.float64)] * (3 - len(inputs))
    dy = flat(upstream[0]).double()
    h = (x @ w.t() + b).requires_grad_()
    dz, = torch.autograd.grad(ACTIVATIONS[activation](h), h, dy)
    (m, k), n, h, size = x.shape, w.shape[0], h.detach(), dz.abs()
    sum_h = (k + 4) * unit * (x.abs() @ w.abs().t() + b.abs())
    of_h = sum_h + half * h.abs() * (activation in ("gelu", "gelu_tanh")) + tiny
    of_z = dy.abs() * torch.where(h.abs() <= of_h, 1.0, 8 * unit) if activation == "relu" else dy.abs() * (1.2 * of_h + 8 * unit) * (activation is not None)
    stored_z = of_z + half * size + tiny
    y = flat(exact_outputs[0])
    bounds = [half * y.abs() + tiny + 1.2 * (of_h if rounds_h else sum_h) + 8 * unit * (y.abs() + h.abs()),
              stored_z @ w.abs() + (n + 4) * unit * (size @ w.abs()), stored_z.t() @ x.abs() + (m + 4) * unit * (size.t() @ x.abs()),
              of_z.sum(0) + (m + 4) * unit * size.sum(0)]
    peers = None
    if len(inputs) < 3 or inputs[2].dtype == dtype:
        peers = sum(layers.run(stock(activation), inputs, upstream), [])
    for i, (got, want, bound) in enumerate(zip(outputs + grads, exact_outputs + exact_grads, bounds)):
        error = (got.double() - want).abs().reshape(bound.shape)
        allowed = bound + (torch.finfo(got.dtype).eps / 2 * want.abs().reshape(bound.shape) + tiny if i else 0)
        assert got.shape == want.shape and (error <= allowed).all(), f"{i}: {(error / allowed).max():.3g} of what is allowed"
        if peers is not None and error.numel() >= 1000 and dtype != torch.float32:
            assert rms(error) <= 1.02 * rms(peers[i].double() - want), f"{i}: {rms(error):.3g}, stock torch {rms(peers[i].double() - want):.3g}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", SIXTEEN + [torch.float32])
@pytest.mark.parametrize("rows,k,n", [(5, 1, 1), (1, 7, 1), (3, 1, 17), (67, 33, 129), (130, 64, 256), ((2, 3, 5), 16, 31), ((), 9, 4), (700, 80, 130)])
def test_errors_are_those_of_one_rounding_and_at_most_those_of_stock_torch(activation, dtype, rows, k, n):
    for bias in (True, False):
        inputs, upstream = inputs_of(rows, k, n, dtype, bias)
        check_errors(activation, inputs, upstream, rounds_h=dtype == torch.bfloat16)


def one_rounding_error(activation, inputs):
    """In ULP, where the result is large beside the error of an FP32 sum."""
    exact = ACTIVATIONS[activation](F.linear(*(t.double() for t in inputs)))
    large = exact.abs() >= 2.0**-4
    return layers.error(linear(*inputs, activation)[large], exact[large])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_rounding_in_fp16(activation):
    inputs, _ = inputs_of(300, 64, 200, torch.float16)
    assert one_rounding_error(activation, inputs) <= 0.52


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_bias_in_fp32_is_added_as_it_is(activation, dtype):
    inputs, upstream = inputs_of(70, 24, 40, dtype, bias=torch.float32)
    inputs[2] += 1e-4
    check_errors(activation, inputs, upstream)
    assert one_rounding_error(activation, inputs) <= 0.52


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_families_of_data(activation):
    weight = torch.eye(40, dtype=torch.float16)
    weight[3, 5] = weight[7, 2] = 0.5
    for name, x in layers.families((66, 40), torch.float16):
        inputs = [x, weight, torch.zeros(40, dtype=torch.float16)]
        layers.check_error(ours(activation), stock(activation), stock(activation), inputs, [torch.ones(66, 40, dtype=torch.float16)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layouts_of_every_operand(activation):
    (x, w, b), (dy,) = inputs_of((4, 9), 24, 18, torch.float16)
    expected = layers.run(ours(activation), [x, w, b], [dy])
    for which in range(4):
        tensors = [x, w, b, dy]
        for name, laid_out in layers.layouts(tensors[which]):
            given = tensors[:which] + [laid_out] + tensors[which + 1:]
            got = layers.run(ours(activation), given[:3], given[3:])
            for a, e in zip(sum(got, []), sum(expected, [])):
                assert torch.allclose(a.float(), e.float(), rtol=2e-3, atol=2e-3), (which, name)
    x.requires_grad_()
    g, = torch.autograd.grad(linear(x, w, b, activation).sum(), x)  # an expanded gradient
    assert torch.allclose(g.float(), torch.autograd.grad(linear(x, w, b, activation), x, torch.ones_like(dy))[0].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape,n", [((0, 5), 3), ((4, 0), 3), ((2, 0, 5), 3), ((4, 5), 0), ((0,), 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_empty(shape, n, dtype):
    for activation in ACTIVATIONS:
        x, w, b = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(n, shape[-1]).to(dtype).requires_grad_(), torch.randn(n).to(dtype).requires_grad_()
        y = linear(x, w, b, activation)
        assert torch.allclose(y, stock(activation)(x, w, b), atol=2e-3)
        dx, dw, db = torch.autograd.grad(y.sum(), (x, w, b))
        assert dx.shape == x.shape and dw.shape == w.shape and not dw.any()
        want = torch.autograd.grad(stock(activation)(x, w, b).sum(), b)[0]
        assert torch.allclose(db, want, atol=1e-2)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_a_pre_activation_beyond_fp16_whose_activation_fits(activation):
    """h = -80,000: its activation is 0, its slope is 0; h = +80,000 is infinite in FP16, and so is the activation."""
    x = torch.tensor([[200.0, 200.0], [-200.0, -200.0], [1.0, 1.0]]).half().requires_grad_()
    w = torch.full((3, 2), 200.0).half().requires_grad_()
    y = linear(x, w, None, activation)
    assert y[0].tolist() == [float("inf")] * 3 and y[1].abs().max() == 0 and (y[2] == 400).all()
    dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    assert dx.isfinite().all() and not dx[1].any() and (dx[[0, 2]] == 600).all() and dw.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_finite_values_stay(activation):
    x = torch.randn(4, 8).half()
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    w = torch.rand(5, 8).half() + 0.1
    y = linear(x, w, None, activation)
    assert y[1].isnan().all() and (y[2] == float("inf")).all() and y[[0, 3]].isfinite().all()
    x = torch.randn(4, 8).half().abs().requires_grad_()
    upstream = torch.ones(4, 5).half()
    upstream[1, 2] = float("nan")
    dx, = torch.autograd.grad(linear(x, w, None, activation), x, upstream)
    assert dx[1].isnan().all() and dx[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_agree_with_finite_differences(activation):
    (x, w, b), _ = inputs_of((3, 2), 5, 19, torch.float64)
    given = [t.requires_grad_() for t in (x, w, b)]
    assert torch.autograd.gradcheck(ours(activation), given)
    if activation is None:
        assert torch.autograd.gradgradcheck(ours(activation), given)
    else:
        g, = torch.autograd.grad(linear(x, w, b, activation).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_backward is differentiable once"):
            g.sum().backward()


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_hundred_runs_are_bit_equal(activation, dtype):
    inputs, upstream = inputs_of(130, 40, 70, dtype)
    layers.check_repeats(ours(activation), inputs, upstream)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_scale_exactly(activation):
    inputs, (dy,) = inputs_of(65, 24, 40, torch.float16)
    inputs[2] = inputs[2].abs() + 4  # slopes near one: dz is a normal number too
    layers.check_scale_exact(ours(activation), inputs, [dy.sign() * (1 + dy.abs() % 1) * 2.0**-12], exponents=range(0, 19, 6))


def test_the_epilogue_of_a_row_is_its_own():
    """One product for all rows: their activations, masks and dz do not depend on how many there are."""
    x, w = torch.randn(150, 33).half(), torch.eye(33).half()
    for activation in ("relu", "gelu", "gelu_tanh"):
        layers.check_rows_independent(ours(activation), [x, w], lambda inputs, part: [inputs[0][part], inputs[1]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_graph_with_dynamic_shapes_equal_to_eager(activation, dtype):
    layers.check_compiled(ours(activation), lambda rows: inputs_of((rows, 3), 16, 24, dtype, seed=rows), [4, 7, 33])


def test_what_is_kept_for_the_backward():
    x, w, b = torch.randn(6, 8).half(), torch.randn(130, 8).half(), torch.randn(130).half()
    h = F.linear(x.double(), w.double(), b.double())
    y, mask = H.linear_forward(x, w, b, "relu")
    bits = ((mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(6, -1)
    assert mask.shape == (6, 32) and torch.equal(bits[:, :130].bool(), y > 0) and not bits[:, 130:].any()
    for activation in ("gelu", "gelu_tanh"):
        y, kept = H.linear_forward(x, w, b, activation)
        assert kept.dtype == torch.float16 and layers.error(kept, h) <= 0.51
    assert H.linear_forward(x, w, b, None)[1].numel() == 0
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), "relu")
    assert sum(t.numel() * t.element_size() for t in saved) == 2 * (x.numel() + w.numel()) + 6 * 32


@pytest.mark.parametrize("dtype", SIXTEEN + [torch.float32])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1500])
def test_the_bias_gradient_is_summed_before_rounding(dtype, rows):
    inputs, upstream = inputs_of(rows, 4, 37, dtype)
    for activation in ACTIVATIONS:
        _, grads = layers.run(ours(activation), inputs, upstream)
        _, exact = layers.run(stock(activation), inputs, upstream, torch.float64)
        if dtype == torch.float16 and activation in (None, "relu"):
            assert layers.error(grads[2], exact[2]) <= 0.6
        else:
            assert torch.allclose(grads[2].double(), exact[2], rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=rows * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_weight_gradient_is_added_in_fp32(dtype):
    (x, w, _), (dz,) = inputs_of((40, 30), 17, 9, dtype)
    start = torch.randn(9, 17)
    into = start.clone()
    H.linear_wgrad_(into, dz, x)
    rows, columns = dz.double().flatten(0, 1), x.double().flatten(0, 1)
    exact, bound = start.double() + rows.t() @ columns, 2**-21 * (start.double().abs() + rows.abs().t() @ columns.abs())
    assert ((into - exact).abs() <= bound).all()
    before = into.clone()
    H.linear_wgrad_(into, dz[:0], x[:0])
    assert torch.equal(into, before)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weights_whose_gradients_are_summed_in_fp32_get_unrounded_ones(dtype, activation):
    torch.manual_seed(0)
    layer = hs.nn.Linear(24, 18, activation=activation, dtype=dtype)
    optimizer = hs.optim.AdamW(layer.parameters(), lr=1e-3, grad_dtype="fp32")
    exact = 0
    for seed in range(3):
        (x, _), (dy,) = inputs_of(50, 24, 18, dtype, bias=False, seed=seed)
        layer(x).backward(dy)
        _, grads = layers.run(stock(activation), [x, layer.weight.detach(), layer.bias.detach()], [dy], torch.float64)
        exact = exact + grads[1]
    assert layer.weight.grad.dtype == torch.float32
    error = (layer.weight.grad - exact).abs().max() / exact.abs().max()
    assert error <= (2e-6 if activation in (None, "relu") else 2 * torch.finfo(dtype).eps)
    if activation in (None,):  # and what rounding each micro-batch to 16 bits would have cost
        assert error < torch.finfo(dtype).eps / 100
    optimizer.step()


def test_under_autocast_operands_are_cast_and_the_weight_once():
    x, w, b = torch.randn(8, 16, requires_grad=True), torch.randn(12, 16, requires_grad=True), torch.randn(12, requires_grad=True)
    for dtype in SIXTEEN:
        with torch.autocast("cpu", dtype):
            y = linear(x, w, b, "gelu")
        assert torch.equal(y, linear(x.to(dtype), w.to(dtype), b.to(dtype), "gelu")) and y.dtype == dtype
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), (x, w, b)))
    with torch.autocast("cpu", enabled=False):
        assert linear(x, w, b, "gelu").dtype == torch.float32
    with hs.autocast("cpu"), torch.profiler.profile() as profile:
        (linear(x, w) + linear(x, w)).sum().backward()
    assert [e.count for e in profile.key_averages() if e.key == "halfstep::linear_backward"] == [2]


def test_only_wanted_gradients_are_computed():
    for wanted in ([0], [1], [2], [0, 1], [1, 2], []):
        (x, w, b), (dy,) = inputs_of(9, 6, 5, torch.float16)
        tensors = [x, w, b]
        for i in wanted:
            tensors[i].requires_grad_()
        y = linear(*tensors, "gelu")
        assert y.requires_grad == bool(wanted)
        if wanted:
            y.backward(dy)
        assert [t.grad is not None for t in tensors] == [i in wanted for i in range(3)]
    with torch.no_grad():
        assert not linear(x.requires_grad_(), w).requires_grad


def test_modules_are_torchs():
    torch.manual_seed(0)
    stock_layer = torch.nn.Linear(6, 4)
    layer = hs.nn.Linear(6, 4, activation="relu")
    layer.load_state_dict(stock_layer.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), stock_layer(x).relu()) and list(layer.state_dict()) == ["weight", "bias"]
    assert "activation='relu'" in repr(layer) and "activation" not in repr(hs.nn.Linear(6, 4))
    stock_layer.__class__ = hs.nn.Linear
    assert torch.equal(stock_layer(x), F.linear(x, stock_layer.weight, stock_layer.bias)) and stock_layer.activation is None
    assert isinstance(layer, torch.nn.Linear) and hs.nn.Linear(6, 4, bias=False).bias is None
    net = hs.nn.MLP(6, 24, 5, activation="gelu_tanh")
    assert torch.allclose(net(x), net.fc2(F.gelu(F.linear(x, net.fc1.weight, net.fc1.bias), approximate="tanh")), atol=1e-6)
    assert hs.nn.MLP(6, 24)(x).shape == (3, 6) and hs.nn.MLP(6, 24, bias=False).fc2.bias is None
    with pytest.raises(ValueError, match="Linear: activation is 'swish'"):
        hs.nn.Linear(2, 2, activation="swish")


def test_refusals_name_both_values():
    x, w, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for arguments, message in [
        ((x, torch.randn(5, 3), b), r"linear: x is Float\[3, 4\] but weight is Float\[5, 3\]"),
        ((x, w.half(), b), r"linear: weight is Half\[5, 4\] but x is Float\[3, 4\]; expected one dtype"),
        ((x, w, torch.randn(4)), r"linear: bias is Float\[4\] but weight is Float\[5, 4\]"),
        ((x.half(), w.half(), b.bfloat16()), r"linear: bias is BFloat16\[5\] but x is Half\[3, 4\]"),
        ((x.double(), w.double(), b), r"linear: bias is Float\[5\] but x is Double"),
        ((x.int(), w.int(), None), r"linear: x is Int\[3, 4\]"),
        ((torch.tensor(1.0), w, b), r"linear: x is Float\[\]; expected"),
        ((x, torch.randn(4), None), r"linear: weight is Float\[4\]; expected"),
        ((x, w.to("meta"), None), r"weight.*meta.*cpu"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            linear(*arguments)
    with pytest.raises(ValueError, match="activation is 'tanh'; expected None, 'relu', 'gelu' or 'gelu_tanh'"):
        linear(x, w, b, "tanh")
    into = torch.zeros(5, 4)
    for arguments, message in [((into.half(), x[:, :1].expand(3, 5), x), r"into is Half\[5, 4\]; expected Float\[5, 4\]"),
                               ((into, torch.zeros(2, 5), x), r"dz is Float\[2, 5\] but x is Float\[3, 4\]")]:
        with pytest.raises(RuntimeError, match=message):
            H.linear_wgrad_(*arguments)
    with pytest.raises(RuntimeError, match=r"saved is Float\[0\]; expected Byte\[3, 16\]"):
        H.linear_backward(torch.zeros(3, 5), x, w, torch.empty(0), "relu", [True] * 3, torch.float32, torch.float32)


PROGRAM = r"""
import hashlib, numpy, sys, torch, halfstep as hs
torch.set_num_threads(int(sys.argv[1]))
H, digest = torch.ops.halfstep, hashlib.sha256()
rng = numpy.random.default_rng(0)
add = lambda *ts: [digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for t in ts if t.numel()]
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    for n in (1, 15, 16, 33, 200):
        # A product with one term an element is exact, whatever the library that computes it.
        x = torch.from_numpy(rng.standard_normal((150, 1)) * 2).to(dtype); w = torch.ones(n, 1, dtype=dtype)
        b = torch.from_numpy(rng.standard_normal(n)).to(dtype if dtype == torch.float64 else torch.float32)
        dy = torch.from_numpy(rng.standard_normal((150, n))).to(dtype)
        for activation in (None, "relu", "gelu", "gelu_tanh"):
            y, saved = H.linear_forward(x, w, b, activation)
            add(y, saved, H.linear_backward(dy, x, w, saved, activation, [False, False, True], dtype, b.dtype)[2])
            add(H.linear_backward(dy, x, w, saved, activation, [False, False, True], dtype, dtype)[2])
print(digest.hexdigest())
"""


def test_epilogues_are_bit_equal_over_instruction_sets_and_threads():
    digests = {subprocess.run([sys.executable, "-c", PROGRAM, threads], env=dict(os.environ, ATEN_CPU_CAPABILITY=capability), capture_output=True, text=True, check=True).stdout
               for capability in ("default", "avx2", "avx512") for threads in (("1", "2") if capability == "avx512" else ("2",))}
    assert len(digests) == 1


HIDDEN = r"""
import sys; sys.path.insert(0, "tests/python")
import test_linear as t, torch, halfstep as hs
hs.set_overrides(len(sys.argv) == 1)
for dtype in (torch.float16, torch.bfloat16):
    for activation in t.ACTIVATIONS:
        for rows, k, n in ((3, 1, 17), (130, 64, 257), (700, 80, 130)):
            inputs, upstream = t.inputs_of(rows, k, n, dtype)
            t.check_errors(activation, inputs, upstream)
        inputs, _ = t.inputs_of(300, 64, 200, dtype)
        assert t.one_rounding_error(activation, inputs) <= 0.52, (dtype, activation)
print("done")
"""


@pytest.mark.parametrize("overrides", [[], ["off"]])
def test_without_16_bit_units_every_result_is_rounded_once(overrides):
    environment = dict(os.environ, ONEDNN_MAX_CPU_ISA="AVX2")
    result = subprocess.run([sys.executable, "-c", HIDDEN, *overrides], env=environment, capture_output=True, text=True, cwd=os.path.dirname(__file__) + "/../..")
    assert result.stdout == "done\n", result.stderr[-2000:]


def test_a_weight_too_large_to_widen_at_once_is_taken_in_columns():
    (x, w, b), _ = inputs_of(3, 1100, 4000, torch.float16)
    for activation in ("relu", "gelu"):
        y, saved = H.linear_forward(x, w, b.float(), activation)
        assert one_rounding_error(activation, (x, w, b.float())) <= 0.55
        if activation == "relu":
            bits = ((saved.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(3, -1)
            assert torch.equal(bits[:, :4000].bool(), y > 0)
