"""Every op of the halfstep namespace passes torch.library.opcheck, in every dtype it takes.

The walk fails for an op without samples, so an op without a check cannot exist.
"""

import pytest
import torch

import halfstep

H = torch.ops.halfstep
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
pytestmark = pytest.mark.smoke


def group(param_dtype, master_dtype, grad_dtype=None):
    """Three parameters: odd size, empty, transposed; the gradient of one more is missing."""
    shapes = [(33,), (0,), (5, 7), (3,)]
    params = [torch.randn(s).to(param_dtype) for s in shapes]
    params[2] = params[2].t().contiguous().t()
    grads = [torch.randn(s).to(grad_dtype or param_dtype) for s in shapes[:-1]] + [None]
    wide = torch.float64 in (param_dtype, master_dtype)
    masters = [torch.empty(0) if master_dtype is None else torch.empty_like(p, dtype=master_dtype) for p in params]
    states = lambda: [torch.zeros_like(p, dtype=torch.float64 if wide else torch.float32) for p in params]
    H.write_masters_([p.float() for p in params], params, masters, torch.zeros(4, dtype=torch.int64))
    return params, grads, masters, states


def counters():
    return torch.zeros(4, dtype=torch.int64)


MODES = [(torch.float16, None), (torch.float16, torch.int16), (torch.float16, torch.float32), (torch.float16, torch.float64),
         (torch.float16, torch.int8), (torch.float16, torch.float16), (torch.bfloat16, torch.int16), (torch.bfloat16, None), (torch.bfloat16, torch.int8),
         (torch.bfloat16, torch.bfloat16), (torch.float32, None), (torch.float32, torch.float64), (torch.float64, None)]


def samples_grad_stats():
    for dtype in FLOATS:
        yield ([torch.randn(5, 3).to(dtype), None, torch.zeros(0, dtype=dtype), torch.randn(6, 4).to(dtype)[::2, 1:]], []), {}


def samples_grad_stats_row_():
    for dtype in FLOATS:
        yield (torch.randn(6, 4).to(dtype)[::2, 1:], torch.zeros(3, 8, dtype=torch.float64), 1), {}


def samples_grad_stats_rest():
    for dtype in FLOATS:
        grads = [torch.randn(5, 3).to(dtype), None, torch.zeros(0, dtype=dtype), torch.randn(4).to(dtype)]
        yield (grads, H.grad_stats(grads, [])[:-1].clone(), [3], []), {}


def samples_grad_histogram():
    for dtype in FLOATS:
        yield ([torch.randn(5, 3).to(dtype), None, torch.zeros(0, dtype=dtype), torch.randn(6, 4).to(dtype)[::2, 1:]], torch.tensor(3.0)), {}
        yield ([torch.randn(5).to(dtype)], None), {}


def samples_grad_stats_of():
    for (grads, _), kwargs in samples_grad_stats():
        yield (grads,), kwargs


def samples_fence_():
    yield ([torch.randn(5), torch.zeros(0), torch.randn(2, 3).half()],), {}


def samples_unscale_():
    for dtype in FLOATS:
        yield ([torch.randn(5).to(dtype), torch.zeros(0, dtype=dtype)], torch.tensor(0.5), torch.zeros(()), []), {}


def samples_unscale_to_():
    for dtype in FLOATS:
        yield ([torch.zeros(5), torch.zeros(3, 2)], [torch.randn(5).to(dtype), torch.randn(2, 3).to(dtype).t()], torch.tensor(0.5), torch.zeros(()), []), {}


def samples_step_control():
    stats = H.grad_stats([torch.randn(5)], [])
    yield ([stats, stats], torch.tensor(2.0), torch.zeros(()), torch.tensor(0.5), 1.0), {}
    yield ([], torch.tensor(2.0), None, None, -1.0), {}


def policy():
    return torch.tensor([1, 65536, 2, 0.5, 2000, 1, 2.0**127, 1, 0] + [0] * 23, dtype=torch.float64)


def samples_update_scale_():
    yield (torch.tensor(65536.0), H.init_scale_state(policy()), torch.ones(()), policy()), {}


def samples_advance_scale_():
    stats = H.grad_stats([torch.randn(40, 50).half(), torch.randn(7)], [])
    for rule in (halfstep.policies.LogMax(), halfstep.policies.Occupancy(), halfstep.policies.Underflow()):
        yield (torch.tensor(1024.0), H.init_scale_state(rule.vector()), torch.zeros(()), rule.vector(), [stats, stats], None), {}
    mine = halfstep.policies.Policy().vector()
    yield (torch.tensor(1024.0), H.init_scale_state(mine), torch.zeros(()), mine, [], torch.tensor(512.0, dtype=torch.float64)), {}


def samples_simulate_scale():
    yield (torch.tensor([0.0, 1, 0, 1]), policy(), H.init_scale_state(policy())), {}


def samples_init_scale_state():
    yield (policy(),), {}


def samples_scale_gradient():
    for dtype in FLOATS:
        for shape in ((5, 3), (), (0, 2)):
            yield (torch.randn(shape).to(dtype).requires_grad_(), torch.tensor(8.0)), {}
    yield (torch.randn(6, 4)[::2, 1:].half().requires_grad_(), torch.tensor([2.0**20], dtype=torch.float64)), {}


samples_scale_gradient_backward = samples_scale_gradient


def linear_operands(dtype):
    for shape, n, bias in (((3, 4), 5, dtype), ((2, 3, 7), 1, None), ((0, 4), 3, dtype)):
        yield torch.randn(shape).to(dtype), torch.randn(n, shape[-1]).to(dtype), None if bias is None else torch.randn(n).to(bias)
    if dtype in (torch.float16, torch.bfloat16):
        yield torch.randn(6, 4).to(dtype)[::2], torch.randn(4, 5).to(dtype).t(), torch.randn(5)


def samples_linear():
    for dtype in FLOATS:
        for activation in (None, "relu", "gelu", "gelu_tanh"):
            for x, w, b in linear_operands(dtype):
                yield (x.requires_grad_(), w.requires_grad_(), b, activation), {}


def samples_linear_forward():
    for dtype in FLOATS:
        for activation in (None, "relu", "gelu", "gelu_tanh"):
            for x, w, b in linear_operands(dtype):
                yield (x, w, b, activation), {}


def samples_linear_backward():
    for (x, w, b, activation), _ in samples_linear_forward():
        y, saved = H.linear_forward(x, w, b, activation)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        yield (torch.randn_like(y), x, w, saved, activation, [True, True, b is not None], x.dtype, None if b is None else b.dtype), {}
        yield (torch.randn_like(y), x, w, saved, activation, [False, True, False], wide, None), {}


def samples_linear_wgrad_():
    for dtype in FLOATS:
        for x, w, _ in linear_operands(dtype):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            yield (torch.randn(w.shape, dtype=wide), torch.randn(*x.shape[:-1], w.shape[0]).to(dtype), x), {}


def step_samples(states, **numbers):
    """Every master mode; in one of them EMA and zeroed gradients; 16-bit and int8 states where the update is in FP32."""
    control = lambda grads: H.step_control([H.grad_stats(grads, [])], torch.tensor(2.0), None, None, 1.0)
    lr = torch.tensor(1e-3, dtype=torch.float64)
    for param, master in MODES:
        params, grads, masters, make = group(param, master)
        yield (params, grads, masters, [t for _ in range(states) for t in make()], [], [], counters(), counters(), lr, control(grads), []), dict(
            ema_decay=0.0, stochastic=master is None, seed=1, **numbers)
    params, grads, masters, make = group(torch.float16, torch.int16)
    zeroed = [torch.empty(0, dtype=torch.float16) if g is None else g for g in grads]
    yield (params, [], masters, [t.bfloat16() for _ in range(states) for t in make()], make(), zeroed, counters(), counters(), lr, control(grads), []), dict(
        ema_decay=0.9, stochastic=False, seed=1, **numbers)


def int8_states(params, signed):
    """Codes of each state, then the scales of each."""
    codes = [torch.zeros_like(p, dtype=torch.int8 if s else torch.uint8) for s in signed for p in params]
    return codes + [torch.full(((p.numel() + 127) // 128,), -126, dtype=torch.int8) for _ in signed for p in params]


def adam_samples(**numbers):
    for amsgrad in (False, True):
        yield from step_samples(2 + amsgrad, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, amsgrad=amsgrad, maximize=False, **numbers)
    params, grads, masters, _ = group(torch.float16, torch.int8)
    yield (params, grads, masters, int8_states(params, (True, False)), [], [], counters(), counters(), torch.tensor(1e-3, dtype=torch.float64), None, []), dict(
        ema_decay=0.0, stochastic=False, seed=1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, amsgrad=False, maximize=False, **numbers)


samples_adam_step_ = adam_samples


def samples_adamw_step_():
    yield from adam_samples(max_lr=0.0, decay_in_update=False)


def samples_sgd_step_():
    for momentum in (0.0, 0.9):
        yield from step_samples(momentum != 0, momentum=momentum, dampening=0.0, weight_decay=0.01, nesterov=False, maximize=True)


def samples_lion_step_():
    yield from step_samples(1, beta1=0.9, beta2=0.99, weight_decay=0.01, maximize=False)


def samples_adagrad_step_():
    yield from step_samples(1, lr_decay=0.1, eps=1e-10, weight_decay=0.01, maximize=False)


def samples_lamb_step_():
    yield from step_samples(2, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.01, bias_correction=True, grad_averaging=True, always_adapt=False, maximize=False)


def samples_novograd_step_():
    for args, numbers in step_samples(1, beta1=0.95, beta2=0.98, eps=1e-8, weight_decay=0.01, grad_averaging=False, maximize=False):
        wide = [torch.zeros(1, dtype=torch.float64 if s.dtype == torch.float64 else torch.float32) for s in args[3]]
        yield (*args[:3], args[3] + wide, *args[4:]), numbers


def samples_read_state():
    for dtype, signed in ((torch.bfloat16, True), (torch.int8, True), (torch.uint8, False)):
        yield (torch.zeros(5, 60, dtype=dtype), torch.full((3,), -3, dtype=torch.int8), signed), {}


def samples_write_state_():
    for dtype, signed in ((torch.bfloat16, True), (torch.int8, True), (torch.uint8, False)):
        yield (torch.rand(5, 60), torch.zeros(5, 60, dtype=dtype), torch.zeros(3, dtype=torch.int8), signed, 7), {}


def samples_write_masters_():
    for param, master in MODES:
        params, _, masters, _ = group(param, master)
        yield ([torch.randn(p.shape) for p in params], params, masters, counters()), {}


def samples_read_masters():
    for param, master in MODES:
        params, _, masters, _ = group(param, master)
        yield (params, masters), {}


def samples_refresh_masters_():
    for param, master in MODES:
        params, _, masters, _ = group(param, master)
        yield ([p + 1 for p in params], masters, counters(), False), {}


def all_ops():
    return sorted(n.split("::")[1] for n in {s.name for s in torch._C._jit_get_all_schemas()} if n.startswith("halfstep::"))


@pytest.mark.parametrize("name", all_ops())
def test_opcheck(name):
    samples = globals().get(f"samples_{name}")
    assert samples is not None, f"torch.ops.halfstep.{name} has no samples here"
    torch.manual_seed(0)
    for args, kwargs in samples():
        torch.library.opcheck(getattr(H, name).default, args, kwargs)


def test_the_walk_sees_the_ops():
    assert {"grad_stats", "adamw_step_", "update_scale_"} <= set(all_ops())
