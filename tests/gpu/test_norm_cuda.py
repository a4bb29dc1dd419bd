"""LayerNorm and RMSNorm on the GPU against the CPU's kernels: the same but for the order of sums; every operand on any device it may lie on."""

import pytest
import torch

import halfstep as hs

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WIDTHS = [1, 7, 8, 255, 256, 257, 768, 1024, 1025, 2048, 4096, 4097, 8192, 8193, 16384, 65536, 131072]
KINDS = ["layer_norm", "rms_norm"]


def call(kind, x, weight, bias, residual):
    if kind == "layer_norm":
        return hs.functional.layer_norm(x, weight.shape, weight, bias, 1e-5, residual)
    return hs.functional.rms_norm(x, weight.shape, weight, 1e-5, residual, 0.5)


def results(kind, device, inputs, upstream):
    """Outputs and gradients on the CPU, of leaves that lie on `device`."""
    leaves = [None if t is None else t.to(device).detach().requires_grad_() for t in inputs]
    outputs = call(kind, *leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(outputs, wanted, [u.to(device) for u in upstream[: len(outputs)]], allow_unused=True)
    return [t.detach().cpu() for t in (*outputs, *grads) if t is not None]


def case(rows, width, dtype, parameter_dtype, residual_dtype):
    random = torch.Generator().manual_seed(rows + width)
    make = lambda shape, d: torch.randn(shape, generator=random).to(d)
    residual = None if residual_dtype is None else make((rows, width), residual_dtype)
    return ([make((rows, width), dtype), 1 + make(width, parameter_dtype) / 4, make(width, parameter_dtype), residual],
            [make((rows, width), dtype), make((rows, width), residual_dtype or dtype)])


def check(kind, device, inputs, upstream):
    for a, b in zip(results(kind, device, inputs, upstream), results(kind, "cpu", inputs, upstream)):
        unit = torch.finfo(b.dtype).eps * (1 if b.element_size() == 2 else 16)
        scale = b.double().abs().amax(-1, keepdim=True).clamp(min=1e-3)
        assert a.dtype == b.dtype and ((a.double() - b.double()).abs() / scale).max() <= unit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(device, kind, dtype, width):
    check(kind, device, *case(5, width, dtype, dtype, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("residual", FLOATS[:3])
@pytest.mark.parametrize("rows", [1, 133, 4099])
def test_residual_and_parameters_of_their_own_dtype(device, kind, dtype, residual, rows):
    check(kind, device, *case(rows, 384, dtype, torch.float32, residual))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_65504_nan_in_its_row_and_unaligned_rows(device, kind):
    inputs, upstream = case(40, 129, torch.float16, torch.float16, torch.float16)
    check(kind, device, [inputs[0][1:, 1:], inputs[1][1:], inputs[2][1:], inputs[3][1:, 1:]], [u[1:, 1:] for u in upstream])
    inputs[0].fill_(65504.0)[:, ::2] *= -1
    inputs[3] = None
    assert all(t.isfinite().all() for t in results(kind, device, inputs, upstream)[:2])
    inputs[0][3, 5] = float("nan")
    y = results(kind, device, inputs, upstream)[0]
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_runs_give_the_same_bits(device, kind):
    for width in (200, 1000, 9000):
        inputs, upstream = case(300, width, torch.float16, torch.float32, torch.float32)
        first = results(kind, device, inputs, upstream)
        for _ in range(100 if device.type == "cuda" else 3):
            assert all(torch.equal(a, b) for a, b in zip(first, results(kind, device, inputs, upstream)))


@pytest.mark.needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_follows_its_inputs(device, kind):
    inputs, upstream = ([None if t is None else t.to(device) for t in part] for part in case(64, 768, torch.float16, torch.float32, torch.float16))
    leaves = [t.requires_grad_() for t in inputs]

    def step():
        outputs = call(kind, *leaves)
        return outputs + torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            leaves[0].copy_(torch.randn(64, 768))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step()) if a is not None)


@pytest.mark.needs_gpu
def test_2_to_the_31_elements(device):
    if torch.cuda.get_device_properties(device).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    x = torch.zeros(2**20 + 1, 2048, dtype=torch.float16, device=device)
    x[-1] = torch.arange(2048, device=device) % 7
    x.requires_grad_()
    weight = torch.ones(2048, device=device, requires_grad=True)
    y = hs.functional.rms_norm(x, 2048, weight, 1e-5)
    assert torch.equal(y[-1], hs.functional.rms_norm(x[-1:], 2048, weight, 1e-5)[0]) and not y[:-1].any()
    y.backward(y.detach())
    assert torch.allclose(weight.grad, y.detach()[-1].float() ** 2)
