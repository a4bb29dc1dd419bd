"""Every op on the GPU against the CPU: bit-equal where results are elementwise, to the last ULP of FP64 sums else."""

import pytest
import torch

import halfstep as hs

H = torch.ops.halfstep
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MODES = [(torch.float16, "split16"), (torch.float16, "fp32"), (torch.float16, "fp64"), (torch.float16, "none"), (torch.bfloat16, "split16"),
         (torch.bfloat16, "fp32"), (torch.bfloat16, "none"), (torch.float32, "none"), (torch.float32, "fp64"), (torch.float64, "none")]
RULES = [("AdamW", dict(lr=1e-2, weight_decay=0.1)), ("Adam", dict(lr=1e-2, weight_decay=0.1, amsgrad=True, maximize=True)), ("SGD", dict(lr=0.1)),
         ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)), ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.5, maximize=True))]


def layouts(numbers):
    """One tensor of numbers as contiguous, transposed, channels_last, and 2 bytes off alignment."""
    yield numbers
    yield numbers.reshape(2, -1).t().contiguous().t()
    yield numbers[: numbers.numel() // 24 * 24].reshape(2, 3, -1, 4).to(memory_format=torch.channels_last)
    yield torch.cat([numbers[:1], numbers])[1:]


def mixed_grads(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40_000, generator=generator) * 10.0 ** torch.randint(-7, 4, (40_000,), generator=generator)
    x[::7] = 0.0
    return x.to(dtype)


def spoiled(tensor, value):
    """A copy whose last element is `value`."""
    tensor = tensor.clone()
    tensor[tuple(size - 1 for size in tensor.shape)] = value
    return tensor


def same(a, b):
    return torch.equal(a.cpu().nan_to_num(123.0, 456.0, -456.0), b.cpu().nan_to_num(123.0, 456.0, -456.0))


@pytest.mark.parametrize("bad", [None, float("inf"), float("nan")])
def test_grad_stats(device, bad):
    grads = [g for i, dtype in enumerate(FLOATS) for g in layouts(mixed_grads(dtype, i))] + [None, torch.zeros(0)]
    if bad is not None:
        grads[5] = spoiled(grads[5], bad)
    ours, host = H.grad_stats([None if g is None else g.to(device) for g in grads], []).cpu(), H.grad_stats(grads, [])
    for column in (0, 2, 3, 4, 5, 6, 7):
        assert same(ours[:, column], host[:, column]), column
    sums, expected = ours[:, 1], host[:, 1]
    finite = expected.isfinite()
    assert (sums.isfinite() == finite).all()
    assert ((sums - expected).abs()[finite] <= 1e-6 * expected[finite]).all()  # 64 terms in FP32
    assert ours[-1, 6] == (-1 if bad is None else 5)


@pytest.mark.parametrize("scale", [None, 1024.0, 3.7])
def test_grad_histogram(device, scale):
    grads = [g for i, dtype in enumerate(FLOATS) for g in layouts(mixed_grads(dtype, i))] + [None, torch.zeros(0)]
    grads[5] = spoiled(grads[5], float("nan"))
    factor = None if scale is None else torch.tensor(scale)
    ours = H.grad_histogram([None if g is None else g.to(device) for g in grads], None if scale is None else factor.to(device))
    assert torch.equal(ours.cpu(), H.grad_histogram(grads, factor))


def test_rows_of_single_gradients_give_the_bits_of_one_pass(device):
    grads = [mixed_grads(dtype, i).to(device) for i, dtype in enumerate(FLOATS * 80)]
    rows = torch.zeros(len(grads), 8, dtype=torch.float64, device=device)
    for i, grad in enumerate(grads):
        H.grad_stats_row_(grad, rows, i)
    whole = H.grad_stats(grads, [])
    rows[3] = -1
    assert torch.equal(H.grad_stats_rest(grads, rows, [3], []), whole)


def test_grad_stats_is_deterministic(device):
    grads = [mixed_grads(dtype, 3).to(device) for dtype in FLOATS] * 40
    first = H.grad_stats(grads, [])
    for _ in range(100):
        assert torch.equal(H.grad_stats(grads, []), first)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out", FLOATS)
def test_unscale(device, dtype, out):
    for bad in (False, True):
        for grad in layouts(mixed_grads(dtype, 1)):
            if bad:
                grad = spoiled(grad, float("nan"))
            results = []
            for place in ("cpu", device):
                target, found = torch.zeros_like(grad, dtype=out, device=place), torch.zeros((), device=place)
                H.unscale_to_([target], [grad.to(place)], torch.tensor(2.0**-10, device=place), found, [])
                results += [target, found]
            assert same(results[0], results[2]) and same(results[1], results[3])


@pytest.mark.parametrize("dtype,master", MODES)
@pytest.mark.parametrize("rule,kw", RULES)
def test_steps_are_bit_equal_to_the_cpu(device, dtype, master, rule, kw):
    def run(place):
        params = [torch.nn.Parameter(p.to(place)) for p in layouts(torch.randn(40_000, generator=torch.Generator().manual_seed(0)).to(dtype))]
        opt = getattr(hs.optim, rule)(params, master=master, max_grad_norm=None, **kw)
        scaler = hs.GradScaler(init_scale=256.0, growth_interval=3)
        scaler.scale(torch.ones((), device=place))
        for step in range(7):
            for i, p in enumerate(params):
                grad = next(g for k, g in enumerate(layouts(mixed_grads(torch.float32, 10 * step + i))) if k == i).clamp(-100, 100)
                if step == 3 and i == 2:
                    grad = spoiled(grad, float("inf"))
                # Gradients of the parameter's dtype; one has other strides, one vanishes in a step.
                grad = grad.to(dtype)
                p.grad = None if (step, i) == (5, 1) else (grad.contiguous() if i == 1 else grad).to(place)
            scaler.step(opt)
            scaler.update()
        return [p.detach() for p in params] + opt.master_params() + [v for p in params for v in opt.state[p].values()] + [scaler.scale_tensor]

    for a, b in zip(run("cpu"), run(device)):
        assert a.dtype == b.dtype and same(a, b)


def test_a_weight_that_would_leave_fp16_is_kept_and_counted(device):
    p = torch.nn.Parameter(torch.full((1000,), 65000.0, dtype=torch.float16, device=device))
    opt = hs.optim.SGD([("w", p)], lr=1000.0)
    p.grad = torch.zeros_like(p)
    p.grad[::10] = -1.0
    before = p.detach().clone()
    opt.step()
    assert torch.equal(p.detach(), before)
    assert int(opt._rooms[0].overflowed[0]) == 100


def test_scale_policies(device):
    flags = (torch.rand(5000, generator=torch.Generator().manual_seed(1)) < 0.02).float()
    for name in hs.policies._PRESETS:
        vector = hs.policies.preset(name).vector()
        host = H.simulate_scale(flags, vector, H.init_scale_state(vector))
        ours = H.simulate_scale(flags.to(device), vector.to(device), H.init_scale_state(vector.to(device)))
        assert torch.equal(ours.cpu(), host)


@pytest.mark.parametrize("policy", [hs.policies.LogMax(max_scale=2.0**40), hs.policies.Occupancy(), hs.policies.Underflow()], ids=lambda p: type(p).__name__)
def test_statistics_policies(device, policy):
    """The same states as on the CPU; LogMax's logarithms may differ in the last place."""
    vector, generator = policy.vector(), torch.Generator().manual_seed(2)
    here = [torch.zeros(()), H.init_scale_state(vector)]
    there = [t.to(device) for t in here]
    for i in range(200):
        grads = [torch.randn(n, generator=generator) * 2.0 ** (8 * torch.randn((), generator=generator)) for n in (3, 5000, 70_000)]
        bad = torch.tensor(float(i % 17 == 0))
        tables = [H.grad_stats([g.to(device) for g in grads[:2]], []), H.grad_stats([grads[2].to(device)], [])]
        H.advance_scale_(*there, bad.to(device), vector.to(device), tables, None)
        H.advance_scale_(*here, bad, vector, [t.cpu() for t in tables], None)
        assert torch.allclose(there[1].cpu(), here[1], rtol=1e-6 if isinstance(policy, hs.policies.LogMax) else 0, atol=0)


def test_2_to_the_31_elements(device):
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    n = 2**31 + 17
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.float16, device=device))
    p.grad = torch.zeros(n, dtype=torch.float16, device=device)
    p.grad[-1] = 2.0
    opt = hs.optim.SGD([p], lr=0.5)
    stats = H.grad_stats([p.grad], [])[-1].cpu()
    assert stats[1] == 4 and stats[3] == n - 1 and stats[5] == n
    opt.step()
    assert float(p.detach()[-1]) == -1.0 and float(p.detach()[-2]) == 0.0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [2.0**20, 0.3])
def test_scale_gradient(device, dtype, scale):
    grads = []
    for place in (torch.device("cpu"), device):
        for upstream in layouts(mixed_grads(dtype, 3).nan_to_num(0, 0, 0)):
            x = torch.zeros_like(upstream).to(place).requires_grad_()
            hs.functional.scale_gradient(x, torch.tensor(scale, device=place)).backward(upstream.to(place))
            grads.append(x.grad.cpu())
    half = len(grads) // 2
    assert all(same(a, b) for a, b in zip(grads[:half], grads[half:])) and grads[0].isfinite().any()
