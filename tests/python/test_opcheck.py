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


def floating(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def samples_silu():
    for dtype in FLOATS:
        for shape in ((5, 3), (), (0, 2)):
            yield (floating(*shape, dtype=dtype),), {}
    yield (torch.randn(6, 4).half()[::2, 1:].requires_grad_(),), {}
    yield (torch.randn(2, 3, 4, 5).half().to(memory_format=torch.channels_last).requires_grad_(),), {}


samples_squared_relu = samples_silu


def samples_gelu():
    for args, _ in samples_silu():
        yield args, {}
        yield args, {"approximate": "tanh"}


def samples_silu_backward():
    for (x,), _ in samples_silu():
        yield (torch.randn_like(x).requires_grad_(), x), {}


samples_squared_relu_backward = samples_silu_backward


def samples_gelu_backward():
    for args, _ in samples_silu_backward():
        yield args, {"approximate": "tanh"}
    yield args, {}


def samples_swiglu():
    for dtype in FLOATS:
        yield (floating(5, 6, dtype=dtype), floating(5, 6, dtype=dtype)), {}
        yield (floating(5, 6, dtype=dtype), None), {}
    yield (floating(0, 6), floating(0, 6)), {}
    yield tuple(t.requires_grad_() for t in torch.randn(3, 4, 12).half().chunk(2, -1)), {}
    yield (torch.randn(6, 4).half().t().requires_grad_(), floating(4, 6, dtype=torch.float16)), {}


def samples_geglu():
    for args, _ in samples_swiglu():
        yield args, {"approximate": "tanh"}
    yield args, {}


def samples_swiglu_backward():
    for args, _ in samples_swiglu():
        y = H.swiglu(*args)
        yield (torch.randn_like(y).requires_grad_(), *args), {}


def samples_geglu_backward():
    for args, _ in samples_swiglu_backward():
        yield args, {"approximate": "tanh"}
    yield args, {}


def samples_swiglu_counted():
    for args, _ in samples_swiglu():
        yield (*args, torch.zeros((), dtype=torch.int64)), {}


def samples_geglu_counted():
    for args, _ in samples_swiglu_counted():
        yield args, {"approximate": "tanh"}
    yield args, {}


def samples_bias_dropout_add():
    seed = torch.tensor([3, 4])
    for dtype in FLOATS:
        yield (floating(5, 6, dtype=dtype), floating(6, dtype=dtype), floating(5, 6, dtype=dtype), 0.5, seed), {}
    yield (floating(5, 6), None, floating(5, 6), 0.5, seed), {}
    yield (floating(5, 6), floating(6), floating(5, 6), 0.0), {}
    yield (floating(0, 6), floating(6), floating(0, 6), 0.5, seed), {}
    yield (torch.randn(6, 4).half().t().requires_grad_(), floating(6, dtype=torch.float16), floating(4, 6, dtype=torch.float16), 0.5, seed), {}


def samples_bias_dropout_add_backward():
    seed = torch.tensor([3, 4])
    for dtype in FLOATS:
        yield (floating(5, 6, dtype=dtype), 0.5, seed, True), {}
    yield (floating(5, 6), 0.5, seed, False), {}
    yield (floating(5, 6), 0.0), {}
    yield (floating(0, 6), 0.5, seed, True), {}
def samples_softmax():
    for dtype in FLOATS:
        yield (torch.randn(2, 3, 5, 7).to(dtype).requires_grad_(), -1, 0.5, torch.rand(3, 1, 7) > 0.3, True), {}
        yield (torch.randn(4, 7).to(dtype).requires_grad_(), 0, 1.0, torch.randn(7, requires_grad=True), False), {}
    for shape in ((), (0, 3), (3, 0)):
        yield (torch.randn(shape).half().requires_grad_(), -1, 1.0, None, False), {}
    yield (torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last).requires_grad_(), 1, 1.0, None, False), {}


def samples_softmax_backward():
    for dtype in FLOATS:
        y = torch.randn(2, 5, 7).softmax(-1).to(dtype)
        yield (torch.randn(2, 5, 7).to(dtype).requires_grad_(), y.requires_grad_(), -1, 0.5, True), {}
        yield (torch.randn(2, 5, 7).to(dtype), y.transpose(0, 2).contiguous().transpose(0, 2).detach(), 2, 2.0, False), {}


def samples_rope():
    for dtype in FLOATS:
        for interleaved in (False, True):
            yield (torch.randn(2, 3, 5, 12).to(dtype).requires_grad_(), torch.randn(5, 4), torch.randn(5, 4), interleaved, False), {}
    yield (torch.randn(2, 5, 3, 8).half().transpose(1, 2).requires_grad_(), torch.randn(5, 4).double(), torch.randn(5, 4).double(), False, True), {}
    yield (torch.randn(0, 8), torch.randn(0, 4), torch.randn(0, 4), False, False), {}


def samples_rope_():
    for args, kwargs in samples_rope():
        yield (args[0].detach().clone(), *args[1:]), kwargs
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
    return codes + [torch.full(((p.numel() + 127) // 128,), -110, dtype=torch.int8) for _ in signed for p in params]


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


def norm_samples():
    """x, weight, bias, residual: every dtype, the parameters' own dtype, absent ones, a residual of another dtype, no rows, no contiguity."""
    make = lambda *shape, dtype: torch.randn(shape).to(dtype).requires_grad_()
    for dtype in FLOATS:
        yield make(5, 3, 7, dtype=dtype), make(7, dtype=dtype), make(7, dtype=dtype), make(5, 3, 7, dtype=dtype)
    yield make(4, 6, dtype=torch.float16), make(6, dtype=torch.float32), make(6, dtype=torch.float32), make(4, 6, dtype=torch.float32)
    yield make(4, 6, dtype=torch.float16), None, None, None
    yield make(0, 6, dtype=torch.float32), make(6, dtype=torch.float32), None, None
    yield torch.randn(8, 5).half()[:, ::2].requires_grad_(), make(3, dtype=torch.float16), None, torch.randn(3, 8).t().requires_grad_()


def samples_layer_norm():
    for x, weight, bias, residual in norm_samples():
        yield (x, [x.shape[-1]], weight, bias, 1e-5, residual), {}


def samples_rms_norm():
    for x, weight, _, residual in norm_samples():
        yield (x, [x.shape[-1]], weight, 1e-5, 1.0, residual), {}


def samples_layer_norm_backward():
    for x, weight, bias, residual in norm_samples():
        y, h, mean, rstd = (t.detach() for t in H.layer_norm(x, [x.shape[-1]], weight, bias, 1e-5, residual))
        for mask in ([True] * 4, [True, False, False, True], [False, False, True, False]):
            yield (y, None if residual is None else h.clone(), x.detach() if residual is None else h, [x.shape[-1]], weight, bias, mean, rstd, mask), {}


def samples_rms_norm_backward():
    for x, weight, _, residual in norm_samples():
        y, h, rstd = (t.detach() for t in H.rms_norm(x, [x.shape[-1]], weight, 1e-5, 1.0, residual))
        for mask in ([True] * 3, [True, False, False]):
            yield (y, None if residual is None else h.clone(), x.detach() if residual is None else h, [x.shape[-1]], weight, 1.0, rstd, mask), {}
def logit_samples():
    """Logits, labels and options: every dtype, plain, with all options, rows that are not contiguous, no rows."""
    options = ((None, -100, "mean", 0.0, 0.0), (torch.rand(5), 1, "none", 0.1, 1e-3))
    for dtype in FLOATS:
        for rest in options:
            yield torch.randn(4, 5).to(dtype), torch.tensor([4, 1, 0, 1]), rest
    yield torch.randn(5, 4).half().t(), torch.tensor([4, 1, 0, 1]), (None, -100, "sum", 0.0, 0.0)
    yield torch.randn(0, 5), torch.zeros(0, dtype=torch.int64), (None, -100, "sum", 0.0, 0.0)


def samples_cross_entropy():
    for logits, target, (*rest, smoothing, z) in logit_samples():
        for scale in (None, torch.tensor(1024.0)):
            yield (logits.clone().requires_grad_(), target, *rest, smoothing, z, scale), {}
    yield (torch.randn(2, 5, 3).half().requires_grad_(), torch.tensor([[4, 1, 0]] * 2)), {}
    yield (torch.randn(5).requires_grad_(), torch.tensor(4)), {}


def samples_cross_entropy_forward():
    for logits, target, rest in logit_samples():
        for scale in (None, torch.tensor(1024.0)):
            yield (logits, target, *rest, scale), {}


def samples_cross_entropy_backward():
    for logits, target, rest in logit_samples():
        loss, stats, total, _ = H.cross_entropy_forward(logits, target, *rest, None)
        yield (torch.ones_like(loss), logits.requires_grad_(), target, rest[0], stats, total, *rest[1:]), {}


def samples_rescale_gradient():
    for dtype in FLOATS:
        for to in FLOATS:
            yield (torch.randn(4, 5).to(dtype).requires_grad_(), torch.rand(4), torch.tensor(8.0), to), {}
    yield (torch.randn(0, 5), torch.tensor(2.0), None, torch.float16), {}


def samples_rescale_gradient_():
    for dtype in FLOATS:
        yield (torch.randn(4, 5).to(dtype), torch.rand(4), torch.tensor(8.0)), {}
        yield (torch.randn(5).to(dtype), torch.tensor(2.0, dtype=torch.float64), None), {}


def head_samples():
    for dtype in FLOATS:
        x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((4, 3), (5, 3), (5,)))
        yield (x, weight, torch.tensor([4, 1, 0, 1]), bias, torch.rand(5), 1, "mean", 0.1, 1e-3)
        yield (x, weight, torch.tensor([4, 1, 0, 1]), None, None, -100, "none", 0.0, 0.0)


def samples_linear_cross_entropy():
    for x, weight, target, bias, *rest in head_samples():
        for scale in (None, torch.tensor(1024.0)):
            grads = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
            yield (*grads[:2], target, grads[2], *rest, scale), {}
    yield (torch.randn(2, 4, 3).requires_grad_(), torch.randn(5, 3), torch.tensor([[4, 1, 0, 1]] * 2)), {}


def samples_linear_cross_entropy_forward():
    for args in head_samples():
        for scale in (None, torch.tensor(1024.0)):
            yield (*args, scale, [True, True, args[3] is not None]), {}


def samples_linear_cross_entropy_backward():
    for x, weight, target, bias, *rest in head_samples():
        yield (torch.rand(4), x.requires_grad_(), weight, target, bias, *rest[:2], *rest[3:], [True, False, bias is not None]), {}
CONVOLUTIONS = [((2, 4, 9), (6, 2, 3), [2], [1], [1], False, [0], 2), ((2, 3, 5, 6), (4, 3, 3, 2), [1, 1], [1, 0], [1, 2], False, [0, 0], 1),
                ((1, 2, 3, 4, 5), (2, 2, 2, 2, 2), [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1), ((2, 4, 5, 5), (4, 2, 3, 3), [2, 2], [1, 1], [1, 1], True, [1, 0], 2),
                ((0, 3, 5), (4, 3, 3), [1], [0], [1], False, [0], 1)]


def samples_convolution():
    for dtype, bias_dtype, (x, w, *shape) in zip(FLOATS + FLOATS[:1], [torch.float32, torch.bfloat16, None, torch.float64, torch.float16], CONVOLUTIONS):
        bias = None if bias_dtype is None else torch.randn(w[1] * shape[-1] if shape[3] else w[0]).to(bias_dtype).requires_grad_()
        yield (torch.randn(x).to(dtype).requires_grad_(), torch.randn(w).to(dtype).requires_grad_(), bias, *shape), {}
    x = torch.randn(2, 4, 5, 5).half().contiguous(memory_format=torch.channels_last)
    yield (x, torch.randn(3, 4, 3, 3).half(), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), {}


def samples_convolution_backward():
    for (x, w, bias, *shape), _ in samples_convolution():
        grad = torch.randn_like(H.convolution(x, w, bias, *shape)).requires_grad_(x.requires_grad)
        yield (grad, x, w, None if bias is None else bias.dtype, *shape, [True, bias is not None]), {}
    yield (grad, x, w, torch.float32, *shape, [False, False]), {}


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
