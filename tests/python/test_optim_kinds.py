"""Every rule against its paper in FP64; every master and state kind; running means, zeroed gradients, checkpoints from one kind into another."""

import inspect
import math
import warnings

import pytest
import torch

import halfstep as hs

pytestmark = pytest.mark.slow

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
MASTERS = ["none", "split16", "fp32", "fp64", "split8", "kahan", "stochastic"]
STATES = ["fp32", "bf16", "int8"]
RULES = {"AdamW": dict(lr=1e-2, amsgrad=True), "Adam": dict(lr=1e-2, weight_decay=0.1), "SGD": dict(lr=1e-2, momentum=0.9), "Lion": dict(lr=1e-3),
         "Adagrad": dict(lr=1e-2, initial_accumulator_value=0.1), "Lamb": dict(lr=1e-2), "NovoGrad": dict(lr=1e-2)}
every_kind = lambda test: pytest.mark.parametrize("name", RULES)(pytest.mark.parametrize("master", MASTERS)(pytest.mark.parametrize("states", STATES)(test)))


def mixed(seed=0):
    """FP16, BF16, FP32 and FP64 parameters of one group."""
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(70, 3).to(d)) for d in (F16, BF16, F32, F64)]


def give(params, seed):
    torch.manual_seed(100 + seed)
    for p in params:
        p.grad = torch.randn(p.shape).to(p.dtype)


def held(opt, params):
    return [t.detach().clone() for t in (*params, *(t for s in opt.state.values() for t in s.values()))]


def same(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))


# -- the rules, from their papers, in FP64 ---------------------------------------------------------
def lion(p, g, s, t, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    """Chen et al. 2023, algorithm 2."""
    m = s.get("m", torch.zeros_like(p))
    c = betas[0] * m + (1 - betas[0]) * g
    s["m"] = betas[1] * m + (1 - betas[1]) * g
    return p - lr * (torch.sign(c) + weight_decay * p)


def lamb(p, g, s, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, bias_correction=True, grad_averaging=True, always_adapt=False):
    """You et al. 2020, algorithm 2; the trust ratio only where there is decay, as apex."""
    s["m"] = betas[0] * s.get("m", torch.zeros_like(p)) + ((1 - betas[0]) if grad_averaging else 1.0) * g
    s["v"] = betas[1] * s.get("v", torch.zeros_like(p)) + (1 - betas[1]) * g * g
    c1, c2 = (1 - betas[0] ** t, 1 - betas[1] ** t) if bias_correction else (1.0, 1.0)
    r = s["m"] / c1 / ((s["v"] / c2).sqrt() + eps) + weight_decay * p
    ratio = float(p.norm() / r.norm()) if (weight_decay or always_adapt) and p.norm() > 0 and r.norm() > 0 else 1.0
    return p - lr * ratio * r


def novograd(p, g, s, t, lr=1e-3, betas=(0.95, 0.98), eps=1e-8, weight_decay=0.0, grad_averaging=False):
    """Ginsburg et al. 2019, algorithm 1."""
    norm = float((g * g).sum())
    s["v"] = norm if t == 1 else betas[1] * s["v"] + (1 - betas[1]) * norm
    d = g / (math.sqrt(s["v"]) + eps) + weight_decay * p
    s["m"] = betas[0] * s.get("m", torch.zeros_like(p)) + ((1 - betas[0]) if grad_averaging else 1.0) * d
    return p - lr * s["m"]


def adagrad(p, g, s, t, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10):
    """Duchi et al. 2011, diagonal; with torch's decays."""
    g = g + weight_decay * p
    s["sum"] = s.get("sum", torch.full_like(p, initial_accumulator_value)) + g * g
    return p - lr / (1 + (t - 1) * lr_decay) * g / (s["sum"].sqrt() + eps)


def adamw(p, g, s, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, decouple_lr=False, max_lr=None, decay_order="torch"):
    """Loshchilov & Hutter 2019; apex adds the decay to the update, after the moments."""
    decay = weight_decay * (lr / (max_lr or lr) if decouple_lr else lr)
    s["m"] = betas[0] * s.get("m", torch.zeros_like(p)) + (1 - betas[0]) * g
    s["v"] = betas[1] * s.get("v", torch.zeros_like(p)) + (1 - betas[1]) * g * g
    update = lr * s["m"] / (1 - betas[0] ** t) / ((s["v"] / (1 - betas[1] ** t)).sqrt() + eps)
    return p - update - decay * p if decay_order == "apex" else p * (1 - decay) - update


PAPERS = [("Lion", lion, {}), ("Lion", lion, dict(lr=1e-2, betas=(0.95, 0.98), weight_decay=0.3)), ("Lamb", lamb, {}), ("Lamb", lamb, dict(weight_decay=0.0)),
          ("Lamb", lamb, dict(weight_decay=0.0, always_adapt=True)), ("Lamb", lamb, dict(bias_correction=False, grad_averaging=False, weight_decay=0.1, lr=1e-2)),
          ("NovoGrad", novograd, {}), ("NovoGrad", novograd, dict(weight_decay=0.1, grad_averaging=True, lr=0.02, betas=(0.9, 0.5))), ("Adagrad", adagrad, {}),
          ("Adagrad", adagrad, dict(lr=0.1, lr_decay=0.05, weight_decay=0.1, initial_accumulator_value=0.3, eps=1e-3)), ("AdamW", adamw, dict(decay_order="apex", weight_decay=0.2)),
          ("AdamW", adamw, dict(decouple_lr=True, max_lr=0.5, lr=0.1)), ("AdamW", adamw, dict(decouple_lr=True, decay_order="apex", max_lr=0.02, lr=0.01))]


@pytest.mark.parametrize("name,paper,kw", PAPERS, ids=[f"{n}-{'-'.join(k) or 'defaults'}" for n, _, k in PAPERS])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_rule_is_the_papers(name, paper, kw, maximize):
    """FP64 parameters to 1e-12; FP32 ones to 1e-5 over 200 steps. Several tensors: norms are each one's own."""
    torch.manual_seed(0)
    starts = [torch.randn(n, dtype=F64) for n in (5000, 37, 1)]
    wide, narrow, reference = ([torch.nn.Parameter(s.to(d)) for s in starts] for d in (F64, F32, F64))
    opts = [getattr(hs.optim, name)(ps, maximize=maximize, **kw) for ps in (wide, narrow)]
    reference, memory = [s.clone() for s in starts], [{} for _ in starts]
    for t in range(1, 201):
        for i, s in enumerate(starts):
            g = torch.randn(s.shape, dtype=F64)
            g = g.float().double()  # what both hold exactly
            wide[i].grad, narrow[i].grad = g.clone(), g.float()
            reference[i] = paper(reference[i], -g if maximize else g, memory[i], t, **kw)
        for opt in opts:
            opt.step()
    for i, want in enumerate(reference):
        size = want.abs().max()
        assert (wide[i] - want).abs().max() <= 1e-12 * size
        off = (narrow[i].double() - want).abs() > 1e-5 * size
        assert off.double().mean() < (1e-3 if name == "Lion" else 1e-9)  # a sign is right or, where FP32 has the blend next to zero, wrong by a whole step


def test_the_defaults_are_torchs_or_the_papers():
    for name in ("AdamW", "Adam", "SGD", "Adagrad"):
        theirs, ours = (inspect.signature(getattr(m.optim, name)).parameters for m in (torch, hs))
        positional = [p for p in theirs.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in positional] == [p.name for p in ours.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert all(ours[p.name].default == p.default for p in positional if p.name != "params"), name
    find = lambda name, *keys: tuple(inspect.signature(getattr(hs.optim, name)).parameters[k].default for k in keys)
    assert find("Lion", "lr", "betas", "weight_decay") == (1e-4, (0.9, 0.99), 0.0)
    assert find("Lamb", "lr", "betas", "eps", "weight_decay") == (1e-3, (0.9, 0.999), 1e-6, 0.01)
    assert find("NovoGrad", "betas", "eps", "weight_decay") == ((0.95, 0.98), 1e-8, 0.0)


# -- every kind ------------------------------------------------------------------------------------
@every_kind
def test_steps_skips_and_resuming(name, master, states):
    """A mixed group in one call: skips leave every byte, gradients are zeroed all the same, and a packed checkpoint goes on with the same bits."""
    make = lambda params: getattr(hs.optim, name)(params, master=master, states=states, ema_decay=0.9, zero_grads=True, seed=5, **RULES[name])
    params = mixed()
    start, opt = [p.detach().clone() for p in params], make(params)
    for step in range(3):
        give(params, step)
        opt.step()
    for p, s in zip(params, start):
        assert not torch.equal(p, s) and p.isfinite().all() and not p.grad.any()
    before = held(opt, params)
    give(params, 3)
    params[1].grad[5] = torch.inf
    opt.step()
    assert opt.steps_skipped == 1 and same(before, held(opt, params)) and not any(p.grad.any() for p in params)

    other = mixed()
    with torch.no_grad():
        for p, q in zip(params, other):
            q.copy_(p)
    again = getattr(hs.optim, name)(other, master=master, states=states, ema_decay=0.3, zero_grads=True, **RULES[name])  # its numbers come from the file
    again.load_state_dict(opt.state_dict(packed=True))
    assert same(before, held(again, other))
    for step in range(4, 8):
        for o, ps in ((opt, params), (again, other)):
            give(ps, step)
            o.step()
    assert same(held(opt, params), held(again, other))


@pytest.mark.parametrize("source", MASTERS)
@pytest.mark.parametrize("target", MASTERS)
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_checkpoint_of_any_kind_loads_into_any_other(source, target, states, packed):
    params, other = mixed()[:2], mixed(1)[:2]
    opt = hs.optim.AdamW(params, lr=1e-2, master=source, states=states, ema_decay=0.9)
    give(params, 1)
    opt.step()
    with torch.no_grad():
        for p, q in zip(params, other):
            q.copy_(p)
    saved, exact = opt.state_dict(packed=packed), opt.master_params()
    to = hs.optim.AdamW(other, lr=1.0, master=target, ema_decay=0.5)
    if source in ("none", "stochastic") and target not in ("none", "stochastic"):
        before = held(to, other)
        with pytest.raises(ValueError, match="'group 0, parameter 0' has no 'master'.*masters=\"from_params\" to take it from the weights"):
            to.load_state_dict(saved)
        assert same(before, held(to, other))
        to.load_state_dict(saved, masters="from_params")
        exact = [p.detach().float() for p in params]
    else:
        to.load_state_dict(saved)
    assert to.param_groups[0]["lr"] == 1e-2 and to.param_groups[0]["ema_decay"] == 0.9 and to.param_groups[0]["master"] == target
    mine, theirs = opt.state_dict()["state"], to.state_dict()["state"]
    for i in range(2):
        for key in ("exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(theirs[i][key].float(), mine[i][key].float()), key
        if target in ("fp32", "fp64"):
            assert torch.equal(to.master_params()[i].float(), exact[i].float())
    for dtype, into in (("bf16", torch.bfloat16), ("int8", torch.int8)) if target != "fp64" else ():
        narrow = hs.optim.AdamW(other, master=target, states=dtype)
        narrow.load_state_dict(saved, masters="from_params")
        assert narrow.state[other[0]]["exp_avg"].dtype == into and (narrow.state_dict()["state"][0]["exp_avg"] - mine[0]["exp_avg"]).abs().max() <= 0.02 * mine[0]["exp_avg"].abs().max()


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_narrow_masters_hold_the_weight_to_their_bound(dtype):
    """split8: 1/256 of the weight's last place; kahan: half a unit of the remainder, which is at most half of the weight's last place."""
    torch.manual_seed(0)
    exact = torch.cat([torch.randn(4000) * 10.0**e for e in range(-6, 4)] + [torch.tensor([0.0, 1.0, 2.0 ** -14, 65000.0])])
    p = torch.nn.Parameter(exact.to(dtype))
    bits = {"split8": 8, "kahan": 12 if dtype == F16 else 9}
    for master in ("split8", "kahan"):
        opt = hs.optim.SGD([p], master=master)
        opt.set_master_params([exact])
        h = p.detach().abs()
        unit = (torch.nextafter(h, torch.full_like(h, torch.inf)).double() - h.double())
        bound = unit / 2.0 ** bits[master] + (2.0**-24 if master == "kahan" and dtype == F16 else 0)
        off = (opt.master_params()[0].double() - exact.double()).abs()
        assert (off <= bound).all(), (off / bound).max()
        assert off.max() > 0


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_stochastic_rounding_keeps_the_expected_value_and_can_be_replayed(dtype):
    n, steps = 40_000, 16
    unit = torch.finfo(dtype).eps

    def run(seed=3, groups=1):
        ps = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for _ in range(groups)]
        opt = hs.optim.SGD([{"params": [p]} for p in ps], lr=1.0, master="stochastic", seed=seed)
        for _ in range(steps):
            for p in ps:
                p.grad = torch.full((n,), -0.1 * unit, dtype=dtype)
            opt.step()
        return [p.detach() for p in ps]

    a, b = run(groups=2)
    moved = (a.double() - 1) / unit
    want = steps * float(torch.tensor(0.1 * unit, dtype=dtype)) / unit
    spread = math.sqrt(steps * 0.1 * 0.9 / n)
    assert abs(moved.mean() - want) <= 5 * spread and moved.std() > 0.5
    assert torch.equal(a, run()[0]) and not torch.equal(a, run(seed=4)[0]) and not torch.equal(a, b)
    plain = torch.nn.Parameter(torch.ones(n, dtype=dtype))
    opt = hs.optim.SGD([plain], lr=1.0, master="none")
    plain.grad = torch.full((n,), -0.1 * unit, dtype=dtype)
    opt.step()
    assert (plain == 1).all()  # what rounding to nearest loses


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_second_moments_decay(states):
    """5,000 steps without a gradient: 0.999 ** 5000 of v is left, within 10 %."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4096))
    opt = hs.optim.AdamW([p], lr=0.0, states=states)
    p.grad = torch.randn(4096) + 3.0
    opt.step()
    start = opt.state_dict()["state"][0]["exp_avg_sq"].double()
    p.grad = torch.zeros(4096)
    for _ in range(5000):
        opt.step()
    left = opt.state_dict()["state"][0]["exp_avg_sq"].double()
    assert abs(left.mean() / (start.mean() * 0.999**5000) - 1) < 0.1
    assert (left > 0).all()


def digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    data = sklearn.load_digits()
    return torch.tensor(data.data[:1400], dtype=F32) / 16, torch.tensor(data.target[:1400])


def train(make, dtype, seed, steps, x, y, model=None):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    if dtype != F32:
        hs.cast_model(net, dtype)
    opt = make(net)
    for _ in range(steps):
        opt.zero_grad()
        with hs.autocast("cpu", F16 if dtype == F32 else dtype, enabled=dtype != F32):
            out = net(x)
        torch.nn.functional.cross_entropy(out.float(), y).backward()
        opt.step()
    if not isinstance(opt, hs.optim.AdamW | hs.optim.SGD):
        return float(torch.nn.functional.cross_entropy(net(x), y))
    with hs.evaluate_in(net, opt) as exact:
        return float(torch.nn.functional.cross_entropy(exact(x), y))


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_masters_on_digits(dtype, one_thread):
    """64-64-10, SGD momentum 0.9: narrow masters end within 0.001 of FP32 training, stochastic rounding within 0.005; without either it lags."""
    x, y = digits()
    run = lambda dtype, master: train(lambda net: hs.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, master=master), dtype, 0, 150, x, y)
    reference = run(F32, "none")
    for master in ("fp32", "split16", "split8", "kahan"):
        assert abs(run(dtype, master) - reference) <= 1e-3, master
    assert abs(run(dtype, "stochastic") - reference) <= 5e-3
    assert run(dtype, "none") - reference > (1e-3 if dtype == F16 else 2e-2)


class PlainInt8(torch.optim.Optimizer):
    """AdamW with int8 states by the absolute maximum of 128 elements and nearest rounding, v not as its root: what ours must not be."""

    def __init__(self, params, lr):
        super().__init__(list(params), dict(lr=lr))

    @staticmethod
    def rounded(x):
        flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 128)).view(-1, 128)
        scale = flat.abs().amax(1, keepdim=True).clamp(min=1e-38) / 127
        return ((flat / scale).round() * scale).flatten()[: x.numel()].view_as(x)

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            s = self.state[p]
            t = s["t"] = s.get("t", 0) + 1
            s["m"] = self.rounded(s.get("m", torch.zeros_like(p)) * 0.9 + 0.1 * p.grad)
            s["v"] = self.rounded(s.get("v", torch.zeros_like(p)) * 0.999 + 0.001 * p.grad * p.grad)
            p -= self.param_groups[0]["lr"] * (s["m"] / (1 - 0.9**t)) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-8)


def test_int8_states_train_where_plain_int8_does_not(one_thread):
    x, y = digits()
    runs = {states: train(lambda net: hs.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0, states=states), F32, 0, 150, x, y) for states in STATES}
    plain = train(lambda net: PlainInt8(net.parameters(), 5e-3), F32, 0, 150, x, y)
    assert runs["fp32"] < 0.05 and abs(runs["bf16"] - runs["fp32"]) < 0.02 and abs(runs["int8"] - runs["fp32"]) < 0.02
    assert not plain < 1.0  # NaN, or far away


# -- running means ---------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype,master", [(F16, "split16"), (BF16, "split8"), (F16, "kahan"), (F16, "fp64"), (F32, "none"), (F64, "none")])
def test_running_means_against_fp64(dtype, master):
    torch.manual_seed(0)
    exact = torch.randn(300)
    p = torch.nn.Parameter(exact.to(dtype))
    p._halfstep_exact = exact  # what cast_model keeps
    opt = hs.optim.SGD([("w", p)], lr=0.1, master=master, ema_decay=0.95)
    assert torch.equal(opt.ema_params()[0], opt.master_params()[0]) and opt.ema_params()[0].dtype == opt.master_params()[0].dtype
    mean = opt.master_params()[0].double()
    for step in range(60):
        p.grad = torch.randn(300).to(dtype)
        if step % 7 == 3:
            p.grad[0] = torch.nan
            opt.step()
            continue
        opt.step()
        mean += 0.05 * (opt.master_params()[0].double() - mean)
    # The mean is taken of the weight before a narrow master rounds it.
    bound = {"split8": 2.0**-13, "kahan": 2.0**-18}.get(master, 2.0**-21 if dtype != F64 and master != "fp64" else 1e-14)
    assert (opt.ema_params()[0].double() - mean).abs().max() <= bound * 4
    assert opt.steps_skipped == 9


def test_means_of_frozen_edited_and_ungrouped_parameters():
    a, b, c = (torch.nn.Parameter(torch.full((4,), float(i)).half()) for i in (1, 2, 3))
    b.requires_grad_(False)
    opt = hs.optim.SGD([{"params": [a, b], "ema_decay": 0.5}, {"params": [c]}], lr=1.0)
    assert "ema" not in opt.state.get(b, {}) and "ema" not in opt.state[c]
    with torch.no_grad():
        a.fill_(8.0)  # before the first step: its initial value
    assert [float(m[0]) for m in opt.ema_params()] == [8, 2, 3]
    a.grad = torch.ones_like(a)
    opt.step()
    assert float(opt.ema_params()[0][0]) == 7.5
    b.requires_grad_(True)
    b.grad = torch.ones_like(b)
    opt.step()
    assert [float(m[0]) for m in opt.ema_params()] == [6.75, 1.5, 3] and float(opt.state[b]["ema"][0]) == 1.5
    with pytest.raises(RuntimeError, match="no parameter group has an ema_decay"):
        hs.optim.SGD([c], lr=1.0).ema_params()


def test_evaluation_and_export_in_the_running_means():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    hs.cast_model(model, cast_inputs=True)
    opt = hs.optim.AdamW(model.named_parameters(), lr=0.1, ema_decay=0.5)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
    weight, mean, exact = model[0].weight.detach().clone(), opt.ema_params()[0], opt.master_params()[0]
    assert not torch.equal(mean, exact)
    with hs.evaluate_in(model, opt, weights="ema") as inside:
        assert torch.equal(inside[0].weight, mean)
    assert torch.equal(model[0].weight, weight) and torch.equal(hs.export_state_dict(model, opt, weights="ema")["0.weight"], mean)
    assert torch.equal(hs.export_state_dict(model, opt)["0.weight"], exact)
    for call in (hs.export_state_dict, lambda *a, **k: hs.evaluate_in(*a, **k).__enter__()):
        with pytest.raises(ValueError, match="weights is 'mean'; expected 'master' or 'ema'"):
            call(model, opt, weights="mean")
        with pytest.raises(RuntimeError, match="no parameter group has an ema_decay"):
            call(model, hs.optim.SGD(model.parameters()), weights="ema")
        with pytest.raises(ValueError, match="needs the optimizers"):
            call(model, weights="ema")


def test_a_file_without_means_begins_them_at_its_weights_and_one_with_them_loads_where_there_are_none():
    p, q = (torch.nn.Parameter(torch.randn(9).half()) for _ in range(2))
    plain, mean = hs.optim.SGD([p], lr=0.1), hs.optim.SGD([q], lr=0.1, ema_decay=0.5)
    for param, opt in ((p, plain), (q, mean)):
        param.grad = torch.randn(9).half()
        opt.step()
    saved = mean.state_dict()
    with torch.no_grad():
        q.copy_(p)
    mean.load_state_dict(plain.state_dict())
    assert torch.equal(mean.ema_params()[0], plain.master_params()[0]) and mean.param_groups[0]["ema_decay"] == 0.5
    with torch.no_grad():
        p.copy_(saved["state"][0]["master"])
    plain.load_state_dict(saved)
    assert plain.param_groups[0]["ema_decay"] is None and "ema" not in plain.state[p]


# -- zeroed gradients ------------------------------------------------------------------------------
@pytest.mark.parametrize("unscale", [False, True])
def test_zeroed_gradients_are_the_same_training(unscale):
    def run(zero_grads):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        hs.cast_model(model, cast_inputs=True)
        opt, scaler = hs.optim.AdamW(model.parameters(), lr=0.01, zero_grads=zero_grads), hs.GradScaler("cpu", init_scale=2.0**10)
        for step in range(12):
            if not zero_grads:
                opt.zero_grad(set_to_none=False)
            for _ in range(2):  # micro-batches
                x = torch.randn(8, 6)
                scaler.scale(model(x).float().square().mean() * (1e30 if step == 5 else 1)).backward()
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            if zero_grads:
                for p in model.parameters():
                    assert p.grad.dtype == p.dtype == p.grad_dtype and not p.grad.any()
        assert scaler.stats().steps_skipped == 1
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, run(False), run(True)))


def test_zeroed_gradients_keep_their_tensor_with_a_new_version():
    p, q = torch.nn.Parameter(torch.ones(6, 4)), torch.nn.Parameter(torch.ones(5))
    opt = hs.optim.SGD([p, q], lr=1.0, zero_grads=True)
    p.grad = torch.full((4, 6), 2.0).t()  # another layout than the parameter's
    grad, version = p.grad, p.grad._version
    opt.step()
    assert p.grad is grad and grad._version > version and not grad.any() and q.grad is None and (p == -1).all()
    p.grad = torch.ones(1).expand(6, 4)
    opt.step()
    assert not p.grad.any() and (p == -2).all()


# -- groups, names, conversions --------------------------------------------------------------------
def test_kinds_may_differ_from_group_to_group():
    ps = [torch.nn.Parameter(torch.randn(200).half()) for _ in range(3)]
    opt = hs.optim.AdamW([{"params": ps[:1], "master": "split8", "states": "int8", "ema_decay": 0.9}, {"params": ps[1:2], "master": "kahan", "states": "bf16", "weight_decay": 0.5},
                          {"params": ps[2:]}], lr=0.01, max_grad_norm=1.0)
    for p in ps:
        p.grad = torch.randn(200).half()
    opt.step()
    kinds = [(opt.state[p]["master"].dtype, opt.state[p]["exp_avg"].dtype, "ema" in opt.state[p]) for p in ps]
    assert kinds == [(torch.int8, torch.int8, True), (F16, BF16, False), (torch.int16, F32, False)]
    assert opt.state[ps[0]]["exp_avg_sq"].dtype == torch.uint8 and opt.state[ps[0]]["exp_avg_sq_scale"].shape == (2,)
    double = hs.optim.AdamW([torch.nn.Parameter(torch.ones(3, dtype=F64))], states="int8")
    assert double._rooms[0].states["exp_avg"][0].dtype == F64


def test_another_order_of_the_parameters_is_followed_by_name_or_refused():
    named = lambda names: [(n, torch.nn.Parameter(torch.full((4,), float(ord(n))))) for n in names]
    first = named("abc")
    opt = hs.optim.Lion(first)
    for n, p in first:
        p.grad = torch.full((4,), float(ord(n)))
    opt.step()
    saved = opt.state_dict()
    other = named("cab")
    moved = hs.optim.Lion(other)
    moved.load_state_dict(saved)
    assert [float(moved.state[p]["exp_avg"][0]) for _, p in other] == [float(saved["state"]["abc".index(n)]["exp_avg"][0]) for n in "cab"]
    with pytest.raises(ValueError, match="has 'b' at another place in group 0, and no 'x'"):
        hs.optim.Lion(named("bax")).load_state_dict(saved)
    hs.optim.Lion(named("xyz")).load_state_dict(saved)  # all renamed: by place


@pytest.mark.parametrize("name,kw", [("AdamW", dict(amsgrad=True)), ("Adam", dict(weight_decay=0.1)), ("SGD", dict(momentum=0.9, nesterov=True)),
                                     ("Adagrad", dict(lr_decay=0.1, initial_accumulator_value=0.2))])
def test_to_torch_and_from_torch(name, kw):
    torch.manual_seed(0)
    params = [("a", torch.nn.Parameter(torch.randn(5))), ("b", torch.nn.Parameter(torch.randn(5)))]
    stock = getattr(torch.optim, name)([{"params": params[:1], "lr": 0.02}, {"params": params[1:], "lr": 0.01}], **kw)
    grads = [torch.randn(5) for _ in range(8)]
    weights = lambda: [p.detach().clone() for _, p in params]

    def run(opt, some):
        for g in some:
            for _, p in params:
                p.grad = g.clone()
            opt.step()
        return weights()

    run(stock, grads[:2])
    start, ours = weights(), hs.optim.from_torch(stock, ema_decay=0.9)
    assert [g["lr"] for g in ours.param_groups] == [0.02, 0.01] and ours.param_groups[1]["param_names"] == ["b"]
    mine = run(ours, grads[2:5])
    back = hs.optim.to_torch(ours)
    assert type(back) is getattr(torch.optim, name) and back.param_groups[0]["params"][0] is params[0][1]
    end = run(back, grads[5:])
    with torch.no_grad():
        for (_, p), w in zip(params, start):
            p.copy_(w)
    theirs = run(stock, grads[2:5])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(mine, theirs))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(end, run(stock, grads[5:])))


def test_what_torch_does_not_have_is_refused_by_name():
    p = torch.nn.Parameter(torch.randn(4))
    for opt, message in ((hs.optim.Lion([p]), "torch.optim has no Lion"), (hs.optim.NovoGrad([p]), "torch.optim has no NovoGrad")):
        with pytest.raises(TypeError, match=message):
            hs.optim.to_torch(opt)
    for kw, message in ((dict(decouple_lr=True), "has no decouple_lr, but group 0 has decouple_lr=True"), (dict(decay_order="apex"), "has no decay_order, but group 0 has decay_order='apex'")):
        with pytest.raises(ValueError, match=message):
            hs.optim.to_torch(hs.optim.AdamW([p], **kw))
    with pytest.raises(TypeError, match="RMSprop has no counterpart here; hs.optim.Masters"):
        hs.optim.from_torch(torch.optim.RMSprop([p]))
    h = torch.nn.Parameter(torch.randn(4).half())
    opt = hs.optim.AdamW([("w", h)])
    h.grad = torch.ones_like(h)
    opt.step()
    with pytest.warns(UserWarning, match="torch.optim keeps the moments of 'w' in float16"):
        hs.optim.to_torch(opt).step()


REFUSED = [("AdamW", dict(master="split4"), "master is 'split4'; expected one of auto, fp32, fp64, split16, split8, kahan, stochastic, none"), ("SGD", dict(states="int4"), "states is 'int4'"),
           ("SGD", dict(ema_decay=1.5), "ema_decay is 1.5"), ("SGD", dict(seed=-1), "seed is -1"), ("SGD", dict(seed=0.5), "seed is 0.5"), ("Lion", dict(betas=(0.9, 1.0)), r"betas\[1\] is 1"),
           ("Adagrad", dict(lr_decay=-1), "lr_decay is -1"), ("Lamb", dict(eps=-1), "eps is -1"), ("NovoGrad", dict(betas=(0.9,)), "expected two numbers"),
           ("AdamW", dict(decay_order="keras"), "decay_order is 'keras'"), ("AdamW", dict(lr=0.0, decouple_lr=True), "decouple_lr divides by max_lr, which is 0.0")]


@pytest.mark.parametrize("name,kw,message", REFUSED)
def test_options_are_refused_by_name_and_value(name, kw, message):
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        getattr(hs.optim, name)([p], **kw)
    with pytest.raises(ValueError, match=message):
        getattr(hs.optim, name)([{"params": [p], **kw}])
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        hs.optim.SGD([p], momentun=0.9)


@pytest.mark.parametrize("edit,message", [(lambda e: e.pop("exp_avg_scale"), "of 'w' has no 'exp_avg_scale'"),
                                          (lambda e: e.update(exp_avg=e["exp_avg"].view(torch.uint8)), "'exp_avg' of 'w' is torch.uint8; expected int8"),
                                          (lambda e: e.update(exp_avg_sq_scale=torch.zeros(1, dtype=torch.int8)), r"'exp_avg_sq_scale' of 'w' is \[1\] but \[3\] is expected"),
                                          (lambda e: e.update(ema=torch.zeros(2)), r"'ema' of 'w' is \[2\] but the parameter is \[300\]"),
                                          (lambda e: e.update(ema=torch.full((300,), 7e4)), "'w' does not fit torch.float16"),
                                          (lambda e: e.update(remainder=torch.zeros(300, dtype=torch.int32)), "'remainder' of 'w' is torch.int32; expected int16 or int8 or float16")])
def test_broken_codes_are_refused_and_change_nothing(edit, message):
    p = torch.nn.Parameter(torch.randn(300).half())
    opt = hs.optim.AdamW([("w", p)], states="int8", master="split8", ema_decay=0.9)
    p.grad = torch.randn(300).half()
    opt.step()
    state, before = opt.state_dict(packed=True), held(opt, [p])
    edit(state["state"][0])
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert same(before, held(opt, [p]))


@pytest.mark.parametrize("kw,numbers", [(dict(), "holds 14 and moves 28"), (dict(states="int8"), "holds 8.02 and moves 16.03"), (dict(master="split8"), "holds 13 and moves 26"),
                                        (dict(master="kahan"), "holds 14 and moves 28"), (dict(master="stochastic"), "holds 12 and moves 24"), (dict(states="bf16"), "holds 10 and moves 20"),
                                        (dict(ema_decay=0.9), "holds 18 and moves 36"), (dict(zero_grads=True), "holds 14 and moves 30"), (dict(master="split8", states="int8"), "holds 7.02 and moves 14.03")])
def test_repr_says_what_a_mode_holds_and_moves(kw, numbers):
    p = torch.nn.Parameter(torch.randn(256).half())
    opt = hs.optim.AdamW([p], **kw)
    assert numbers in repr(opt), repr(opt)
    p.grad = torch.ones_like(p)
    opt.step()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (p.detach(), p.grad, *(t for k, t in opt.state[p].items() if k != "step"))}
    assert float(numbers.split()[1]) == round(sum(storages.values()) / 256, 2)


def test_int8_states_follow_another_memory_format():
    """Blocks lie along memory, so the codes are made anew; the values stay within one code."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(8, 6, 3)
    opt = hs.optim.AdamW(model.parameters(), states="int8")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    before = opt.state_dict()["state"][0]
    model.to(memory_format=torch.channels_last)
    after = opt.state_dict()["state"][0]
    assert opt.state[model.weight]["exp_avg"].stride() == model.weight.stride()
    assert (after["exp_avg"] - before["exp_avg"]).abs().max() <= 1.01 * before["exp_avg"].abs().max() / 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
