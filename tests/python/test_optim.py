"""AdamW, Adam, SGD: against torch.optim, in every master mode, and the rules users rely on."""

import copy
import warnings

import pytest
import torch

import halfstep as hs

H = torch.ops.halfstep
pytestmark = pytest.mark.smoke
MODES = [(torch.float16, "split16"), (torch.float16, "fp32"), (torch.float16, "fp64"), (torch.float16, "none"),
         (torch.bfloat16, "split16"), (torch.bfloat16, "fp32"), (torch.float32, "none"), (torch.float32, "fp64"), (torch.float64, "none"),
         (torch.float16, "split8"), (torch.float16, "kahan"), (torch.bfloat16, "split8"), (torch.bfloat16, "kahan"), (torch.float16, "stochastic"), (torch.bfloat16, "stochastic")]
RULES = [("AdamW", dict(lr=1e-3, weight_decay=0.1)), ("AdamW", dict(lr=1e-3, amsgrad=True, maximize=True)), ("Adam", dict(lr=1e-3, weight_decay=0.1)),
         ("Adagrad", dict(lr=0.1)), ("Adagrad", dict(lr=0.1, lr_decay=0.01, weight_decay=0.1, initial_accumulator_value=0.5, eps=1e-6)),
         ("SGD", dict(lr=0.1)), ("SGD", dict(lr=0.1, weight_decay=0.1)), ("SGD", dict(lr=0.1, momentum=0.9)),
         ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)), ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.5, maximize=True))]


def ulps(a, b, magnitude):
    """|a - b| in units of the last place of `magnitude` in a's dtype."""
    unit = torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf)) - magnitude
    return ((a - b).abs() / unit).max().item()


@pytest.mark.parametrize("name,kw", RULES)
def test_one_step_against_torch_resynchronised(name, kw):
    """1,000 steps, each from torch's own state: |Δp| <= 4 ULP of max(|p|, |Δp|), moments <= 2 ULP of their largest term."""
    torch.manual_seed(0)
    p, q = torch.nn.Parameter(torch.randn(999)), torch.nn.Parameter(torch.zeros(999))
    theirs, ours = getattr(torch.optim, name)([p], **kw), getattr(hs.optim, name)([q], **kw)
    worst, worst_state = 0.0, 0.0
    for step in range(1000):
        q.data.copy_(p.data)
        for key, value in theirs.state.get(p, {}).items():
            if key in ours.state[q] and value is not None:
                ours.state[q][key].copy_(value)
        before, old = p.detach().clone(), {k: v.clone() for k, v in theirs.state.get(p, {}).items() if isinstance(v, torch.Tensor)}
        p.grad = torch.randn(999) * 10.0 ** (step % 5 - 3)
        q.grad = p.grad.clone()
        theirs.step(), ours.step()
        worst = max(worst, ulps(p.detach(), q.detach(), torch.maximum(before.abs(), (p.detach() - before).abs())))
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum"):
            value = theirs.state[p].get(key)
            if value is not None and key in ours.state[q]:
                g = p.grad + kw.get("weight_decay", 0) * before if name != "AdamW" else p.grad
                term = torch.maximum(value.abs(), torch.maximum(old.get(key, value).abs(), {"exp_avg_sq": 1e-3 * g * g, "sum": g * g}.get(key, g.abs())))
                worst_state = max(worst_state, ulps(value, ours.state[q][key], term))
    assert worst <= 4 and worst_state <= 2, (worst, worst_state)


def test_sgd_without_momentum_is_bit_equal():
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch itself does not fuse multiply-add at ATEN_CPU_CAPABILITY=default")
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4096))
    q = torch.nn.Parameter(p.detach().clone())
    theirs, ours = torch.optim.SGD([p], lr=0.01), hs.optim.SGD([q], lr=0.01)
    for _ in range(200):
        p.grad = torch.randn(4096)
        q.grad = p.grad.clone()
        theirs.step(), ours.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("name,kw", RULES)
def test_free_running_stays_together(name, kw):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(999))
    q = torch.nn.Parameter(p.detach().clone())
    theirs, ours = getattr(torch.optim, name)([p], **kw), getattr(hs.optim, name)([q], **kw)
    for _ in range(1000):
        p.grad = torch.randn(999)
        q.grad = p.grad.clone()
        theirs.step(), ours.step()
    assert ((p - q).norm() / p.norm()).item() <= 1e-6


def test_split16_replay_equals_fp32_masters():
    """10,000 recorded FP16 gradients: bit-equal until a weight's first |w| < 2^-16, within steps x bound after it."""
    torch.manual_seed(0)
    n, steps = 512, 10_000
    start = torch.randn(n) * 0.02
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.nn.Parameter(start.to(dtype)) for _ in range(2))
        split, full = hs.optim.AdamW([a], lr=1e-3, master="split16"), hs.optim.AdamW([b], lr=1e-3, master="fp32")
        for o in (split, full):
            o.set_master_params([start])
        clean, since = torch.ones(n, dtype=torch.bool), torch.zeros(n)
        sign = torch.randn(n).sign()
        for step in range(steps):
            grad = (torch.randn(n) * 10.0 ** torch.empty(n).uniform_(-6, 0) * sign).to(dtype)
            a.grad, b.grad = grad, grad.clone()
            split.step(), full.step()
            if step % 100 == 99:
                sign = -sign
            w = full.state[b]["master"]
            clean &= w.abs() >= 2.0**-16
            since += ~clean
            if step % 50 == 0 or step == steps - 1:
                mine = split.master_params()[0]
                if dtype == torch.bfloat16:
                    assert torch.equal(mine, w)
                else:
                    assert torch.equal(mine[clean], w[clean]), step
                    ulp = torch.nextafter(w.abs(), torch.tensor(torch.inf)) - w.abs()
                    assert ((mine - w).abs() <= since.clamp(min=1) * torch.maximum(ulp, torch.tensor(2.0**-40)) * 2)[~clean].all()


def state_bytes(opt, params):
    tensors = [p.detach() for p in params] + [t for s in opt.state.values() for t in s.values()]
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("dtype,master", MODES)
@pytest.mark.parametrize("flag", [1.0, 2.0, float("nan")])
def test_a_skipped_step_changes_nothing(dtype, master, flag):
    """found_inf = 2 (two devices or ranks bad) skips too: stock kernels test == 1 and write NaN."""
    p = torch.nn.Parameter(torch.randn(100).to(dtype))
    opt = hs.optim.AdamW([p], lr=0.1, master=master)
    p.grad = torch.randn(100).to(dtype)
    opt.step()
    before = state_bytes(opt, [p])
    opt._step_with(found_inf=torch.tensor(flag))
    assert all(torch.equal(a, b) for a, b in zip(before, state_bytes(opt, [p])))
    p.grad[3] = torch.inf
    opt.step()  # without a scaler a non-finite gradient skips and is counted
    assert all(torch.equal(a, b) for a, b in zip(before, state_bytes(opt, [p]))) and opt.steps_skipped == 1
    p.grad = torch.randn(100).to(dtype)
    opt.step()
    assert int(opt.state[p]["step"]) == 2


@pytest.mark.parametrize("dtype,master", [m for m in MODES if m[1] not in ("none", "stochastic")])
@pytest.mark.parametrize("edit", ["copy_", "clamp_", "data_swap"])
def test_an_edit_survives_the_next_step(dtype, master, edit):
    p = torch.nn.Parameter(torch.randn(64).to(dtype))
    opt = hs.optim.SGD([p], lr=1e-4, master=master)
    p.grad = torch.ones(64, dtype=dtype)
    opt.step()
    with torch.no_grad():
        if edit == "copy_":
            p[:10] = 0.5
        elif edit == "clamp_":
            p.clamp_(-0.25, 0.25)
        else:
            p.data = torch.full((64,), 0.75, dtype=dtype)
    want = p.detach().double().clone()
    with pytest.warns(UserWarning, match="masters follow"):
        opt.step()
    allowed = (want.abs() + 1e-4) * torch.finfo(dtype).eps + 1e-7  # a weight near 0 becomes one of the size of the step
    assert ((p.double() - (want - 1e-4)).abs() <= allowed).all()
    assert ((opt.master_params()[0].double() - (want - 1e-4)).abs() <= allowed / 2 + 1e-7).all()


def test_data_edits_need_refresh_masters():
    p = torch.nn.Parameter(torch.randn(64).half())
    opt = hs.optim.SGD([p], lr=1e-4, master="fp32")
    p.data.clamp_(-0.1, 0.1)
    assert opt.refresh_masters()["group 0, parameter 0"] > 0
    assert opt.master_params()[0].abs().max() <= 0.1


def test_clip_folds_into_the_step():
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.ones(50)) for _ in range(2))
    grad = torch.randn(50) * 10
    ours, theirs = hs.optim.SGD([a], lr=1.0, max_grad_norm=1.0), torch.optim.SGD([b], lr=1.0)
    a.grad, b.grad = grad.clone(), grad.clone()
    torch.nn.utils.clip_grad_norm_([b], 1.0)
    ours.step(), theirs.step()
    assert torch.allclose(a, b, rtol=1e-6) and torch.equal(a.grad, grad)


def test_overflowing_weight_is_kept_counted_and_named():
    p = torch.nn.Parameter(torch.tensor([65000.0, 1.0]).half())
    opt = hs.optim.SGD([("fc.weight", p)], lr=1000.0)
    p.grad = torch.tensor([-1.0, -1.0]).half()
    with pytest.warns(UserWarning, match=r"'fc.weight' would leave float16 range \(1 element, step 1\)"):
        opt.step()
    assert p[0] == 64992 and p[1] == 1001


def test_grad_dtype_fp32_accumulates():
    p = torch.nn.Parameter(torch.ones(1).half())
    hs.optim.SGD([p], lr=0.1, grad_dtype="fp32")
    for _ in range(4096):
        (p * 1.0).sum().backward()
    assert p.grad.dtype == torch.float32 and p.grad == 4096


def test_groups_frozen_added_and_missing_gradients():
    a, b = (torch.nn.Parameter(torch.ones(3).half()) for _ in range(2))
    opt = hs.optim.AdamW([{"params": [a], "lr": 0.1}, {"params": [b], "master": "fp32"}])
    a.grad = torch.ones(3).half()
    opt.step()
    assert (b == 1).all() and int(opt.state[b]["step"]) == 0 and int(opt.state[a]["step"]) == 1
    c = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [c]})
    c.grad = torch.ones(2)
    opt.step()
    assert (c < 1).all() and len(opt.param_groups) == 3
    assert "float16 weights, split16 masters" in repr(opt) and "fp32 masters" in repr(opt)


def test_lr_schedulers_and_tensor_lr():
    p = torch.nn.Parameter(torch.ones(3))
    opt = hs.optim.SGD([p], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    for want in (0.0, -0.5, -0.75):
        p.grad = torch.ones(3)
        opt.step(), schedule.step()
        assert (p == want).all()
    lr = torch.tensor(0.25)
    opt = hs.optim.SGD([p], lr=lr)
    assert opt.param_groups[0]["lr"] is not lr
    p.grad = torch.ones(3)
    opt.step()
    assert (p == -1).all()


def test_layouts():
    w = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).half()
    p, q = torch.nn.Parameter(w.clone(memory_format=torch.preserve_format)), torch.nn.Parameter(w.contiguous())
    grad = torch.randn(4, 3, 5, 5).half()
    for x, g in ((p, grad), (q, grad.to(memory_format=torch.channels_last))):
        opt = hs.optim.AdamW([x], lr=0.1)
        x.grad = g
        opt.step()
    assert torch.equal(p, q)
    with pytest.raises(ValueError, match="overlap or leave gaps"):
        hs.optim.AdamW([torch.nn.Parameter(torch.randn(8)[::2])])


def test_masters_wraps_any_optimizer():
    torch.manual_seed(0)
    w = torch.randn(64)
    p, q = torch.nn.Parameter(w.half()), torch.nn.Parameter(w.half().float())
    ours, theirs = hs.optim.Masters(torch.optim.RMSprop, [p], lr=1e-3), torch.optim.RMSprop([q], lr=1e-3)
    for _ in range(20):
        g = torch.randn(64).half()
        p.grad, q.grad = g, g.float()
        ours.step(), theirs.step()
    assert torch.equal(ours.master_params()[0], q) and torch.equal(p, q.half())
    p.grad[0] = torch.nan
    ours.step()
    assert torch.equal(p, q.half())


BAD = [
    (lambda: hs.optim.AdamW([torch.nn.Parameter(torch.ones(2))], master="fp8"), "master is 'fp8'"),
    (lambda: hs.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=-1), "lr is -1"),
    (lambda: hs.optim.AdamW([torch.nn.Parameter(torch.ones(2))], betas=(0.9, 1.0)), r"betas\[1\] is 1.0"),
    (lambda: hs.optim.SGD([torch.nn.Parameter(torch.ones(2))], nesterov=True), "nesterov needs momentum"),
    (lambda: hs.optim.AdamW([torch.nn.Parameter(torch.ones(2))], differentiable=True), "differentiable=True"),
    (lambda: hs.optim.AdamW([("w", torch.nn.Parameter(torch.tensor([torch.inf]).half()))]), "'w' holds a non-finite value"),
]


@pytest.mark.parametrize("make,message", BAD)
def test_bad_construction_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_lists_are_refused_before_anything_is_written():
    p, m = [torch.ones(4), torch.ones(4, 3)], [torch.empty(0), torch.empty(0)]
    s = lambda: [torch.zeros(4), torch.zeros(4, 3), torch.zeros(4), torch.zeros(4, 3)]
    c = lambda: torch.zeros(2, dtype=torch.int64)
    kw = dict(ema_decay=0.0, stochastic=False, seed=0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, max_lr=0.0, decay_in_update=False, amsgrad=False, maximize=False)
    lr = torch.tensor(0.1, dtype=torch.float64)
    scale, codes = lambda n: torch.zeros(n, dtype=torch.int8), lambda p, dtype: torch.zeros_like(p, dtype=dtype)
    good = [torch.ones(4), torch.ones(4, 3)]
    cases = [
        ((p, [good[0], torch.ones(4, 2).half()], m, s(), [], [], c(), c(), lr, None, []), r"adamw_step_: grads\[1\] is torch.float16\[4, 2\] but params\[1\] is torch.float32\[4, 3\]"),
        ((p, good[:1], m, s(), [], [], c(), c(), lr, None, []), "grads has 1 entries but params has 2"),
        ((p, good, [torch.empty(0), torch.zeros(4, 3, dtype=torch.int16)], s(), [], [], c(), c(), lr, None, []), r"masters\[1\] is torch.int16"),
        ((p, good, m, [torch.zeros(4), torch.zeros(4, 3).double(), *s()[2:]], [], [], c(), c(), lr, None, []), r"exp_avgs\[1\] is torch.float64\[4, 3\]"),
        ((p, good, m, s()[:3], [], [], c(), c(), lr, None, []), "states has 3 entries but params has 2; expected 2 states a parameter"),
        ((p, good, m, [*s()[:3], s()[3].bfloat16()], [], [], c(), c(), lr, None, []), r"exp_avg_sqs\[1\] is torch.bfloat16\[4, 3\] but exp_avgs\[1\] is torch.float32\[4, 3\]"),
        ((p, good, m, [codes(x, d) for d in (torch.int8, torch.uint8) for x in p], [], [], c(), c(), lr, None, []), "has no scales after it"),
        ((p, good, m, [codes(x, d) for d in (torch.int8, torch.uint8) for x in p] + [scale(1), scale(2), scale(1), scale(1)], [], [], c(), c(), lr, None, []), r"expected contiguous torch.int8\[1\]"),
        ((p, good, m, s(), [torch.zeros(4)], [], c(), c(), lr, None, []), "emas has 1 entries but params has 2"),
        ((p, good, m, s(), [torch.zeros(4), torch.zeros(4, 3).double()], [], c(), c(), lr, None, []), r"emas\[1\] is torch.float64"),
        ((p, good, m, s(), [], good, c(), c(), lr, None, []), "grads has 2 entries and zeroed has 2; expected one of the two"),
        ((p, [], m, s(), [], good[:1], c(), c(), lr, None, []), "zeroed has 1 entries but params has 2"),
        ((p, good, m, s(), [], [], c()[:1], c(), lr, None, []), r"steps is torch.int64\[1\]"),
        ((p, good, m, s(), [], [], c(), c(), torch.tensor(0.1), None, []), "lr is torch.float32"),
    ]
    for args, message in cases:
        with pytest.raises(RuntimeError, match=message):
            H.adamw_step_(*args, **kw)
    assert all((x == 1).all() for x in p)
    q = torch.nn.Parameter(torch.ones(3))
    opt = hs.optim.AdamW([("emb", q)])
    q.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="'emb' has a sparse gradient"):
        opt.step()


@pytest.mark.parametrize("dtype,master", MODES)
@pytest.mark.parametrize("packed", [False, True])
def test_checkpoint_resumes_to_the_bit(dtype, master, packed, tmp_path):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(33).to(dtype))
    opt = hs.optim.AdamW([p], lr=0.01, master=master, amsgrad=True)
    grads = [torch.randn(33).to(dtype) for _ in range(10)]

    def run(param, optimizer, some):
        for g in some:
            param.grad = g
            optimizer.step()

    run(p, opt, grads[:5])
    torch.save(opt.state_dict(packed=packed), tmp_path / "opt.pt")
    weights = p.detach().clone()
    run(p, opt, grads[5:])
    q = torch.nn.Parameter(weights)
    other = hs.optim.AdamW([q], lr=0.5, master=master, amsgrad=True)
    other.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    run(q, other, grads[5:])
    assert torch.equal(p, q) and torch.equal(opt.master_params()[0], other.master_params()[0])


def test_refused_loads_change_nothing():
    p = torch.nn.Parameter(torch.randn(8).half())
    opt = hs.optim.AdamW([("fc.weight", p)], lr=0.01)
    p.grad = torch.randn(8).half()
    opt.step()
    good = opt.state_dict()
    before = state_bytes(opt, [p])
    q = torch.nn.Parameter(torch.randn(8).half())
    other = hs.optim.AdamW([("fc.weight", q)])

    def broken(edit):
        bad = copy.deepcopy(good)
        edit(bad)
        return bad

    cases = [(broken(lambda s: s.pop("state")), "has no 'state'"), (broken(lambda s: s.update(format=7)), "format 7"),
             (broken(lambda s: s.update(optimizer="SGD")), "is of SGD but this optimizer is AdamW"),
             (broken(lambda s: s["state"][0].pop("exp_avg")), "'fc.weight' has no 'exp_avg'"),
             (broken(lambda s: s["state"][0].update(exp_avg=torch.zeros(3))), r"'exp_avg' of 'fc.weight' is \[3\]"),
             (broken(lambda s: s["param_groups"][0].update(params=[0, 1])), "2 parameters in group 0"),
             (broken(lambda s: s["state"][0].update(master=torch.full((8,), 70000.0))), "'fc.weight' does not fit")]
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, state_bytes(opt, [p])))
    with pytest.raises(ValueError, match=r"optimizer state is for other weights: 'fc.weight' differs in \d of 8 elements"):
        other.load_state_dict(good)
    other.load_state_dict(good, masters="from_params")
    assert torch.equal(other.state[q]["exp_avg"], opt.state[p]["exp_avg"]) and torch.equal(other.master_params()[0], q.float())


@pytest.mark.parametrize("name,kw", RULES)
def test_state_travels_to_torch_and_back(name, kw):
    p = torch.nn.Parameter(torch.randn(17))
    q = torch.nn.Parameter(p.detach().clone())
    ours, theirs = getattr(hs.optim, name)([p], **kw), getattr(torch.optim, name)([q], **kw)
    for _ in range(3):
        p.grad = torch.randn(17)
        ours.step()
    q.data.copy_(p.data)
    theirs.load_state_dict(ours.to_torch_state_dict())
    r = torch.nn.Parameter(p.detach().clone())
    back = getattr(hs.optim, name)([r], **kw)
    back.load_state_dict(theirs.state_dict())
    for _ in range(3):
        g = torch.randn(17)
        for x, o in ((p, ours), (q, theirs), (r, back)):
            x.grad = g.clone()
            o.step()
    assert torch.equal(p, r) and torch.allclose(p, q, rtol=1e-6, atol=1e-7)
