"""The rules an optimizer's user relies on: edits, skips, moves, capture, learning rates, layouts, overflow."""

import copy
import pickle
import warnings

import pytest
import torch

import halfstep as hs

pytestmark = pytest.mark.smoke
MODES = [(torch.float16, "split16"), (torch.float16, "fp32"), (torch.float16, "fp64"), (torch.float16, "none"), (torch.bfloat16, "split16"),
         (torch.bfloat16, "fp32"), (torch.bfloat16, "fp64"), (torch.bfloat16, "none"), (torch.float32, "none"), (torch.float32, "fp64"), (torch.float64, "none"),
         (torch.float16, "split8"), (torch.float16, "kahan"), (torch.bfloat16, "split8"), (torch.bfloat16, "kahan")]
every_mode = pytest.mark.parametrize("dtype,master", MODES, ids=[f"{str(d)[6:]}-{m}" for d, m in MODES])
RULES = [("AdamW", {}), ("AdamW", dict(amsgrad=True)), ("Adam", dict(weight_decay=0.1)), ("SGD", {}), ("SGD", dict(momentum=0.9, nesterov=True)),
         ("Lion", {}), ("Adagrad", {})]
every_rule = pytest.mark.parametrize("name,kw", RULES, ids=[f"{n}-{'-'.join(k) or 'plain'}" for n, k in RULES])


def held(opt, params):
    """Every byte that the optimizer and its parameters hold."""
    tensors = [p.detach() for p in params] + [t for s in opt.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return [t.clone().reshape(-1).view(torch.uint8) for t in tensors]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))




@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# -- the 16-bit weight is the truth ------------------------------------------------------------------
EDITS = {
    "copy_": lambda p: p[:10].copy_(torch.full((10,), 0.5)),
    "clamp_": lambda p: p.clamp_(-0.25, 0.25),
    "fill_": lambda p: p.fill_(0.75),
    "zero_": lambda p: p[::3].zero_(),
    "mul_": lambda p: p.mul_(2.0),
    "init": lambda p: torch.nn.init.normal_(p),
    "small": lambda p: p.fill_(1e-6),  # from remainders in bits to remainders in steps of 2^-39, and back below
    "load_state_dict": lambda p: p.copy_(torch.linspace(-2, 2, 64)),
    "data": lambda p: setattr(p, "data", torch.full((64,), 0.375, dtype=p.dtype)),
}


@every_mode
@pytest.mark.parametrize("edit", EDITS)
@every_rule
def test_an_edit_survives_the_next_step_and_is_reported_once_by_name(dtype, master, edit, name, kw):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64).to(dtype))
    opt = getattr(hs.optim, name)([("fc.weight", p)], lr=1e-6, master=master, **{**kw, "weight_decay": 0.0})
    for _ in range(3):
        p.grad = torch.randn(64).to(dtype)
        opt.step()
    with torch.no_grad():
        EDITS[edit](p)
    want = p.detach().double()
    p.grad = torch.randn(64).to(dtype)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt.step(), opt.step()
    mastered = opt._rooms[0].masters[0].numel() > 0
    assert [str(w.message) for w in seen] == ["weights changed since the last step; their masters follow: 'fc.weight'"] * mastered
    ulp = want.abs() * torch.finfo(dtype).eps
    assert ((p.double() - want).abs() <= ulp + 3e-5).all()
    assert ((opt.master_params()[0].double() - want).abs() <= ulp / 2 + 3e-5).all()
    with torch.no_grad():
        EDITS["small"](p)
        EDITS["fill_"](p)  # and from there to a large one: remainders that no longer round to the weight are dropped
    p.grad = torch.zeros(64, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    assert ((p.double() - 0.75).abs() <= torch.finfo(dtype).eps + 3e-5).all()


@pytest.mark.parametrize("dtype,master", [m for m in MODES if m[1] in ("fp32", "fp64", "split16", "split8", "kahan")])
def test_elements_that_were_not_edited_keep_their_low_bits(dtype, master):
    torch.manual_seed(0)
    start = torch.rand(64) + 0.5
    p = torch.nn.Parameter(start.to(dtype))
    opt = hs.optim.SGD([("w", p)], lr=1.0, master=master)
    opt.set_master_params([start])
    before = opt.master_params()[0]
    for edit in (lambda: p[:8].fill_(2.0), lambda: setattr(p, "data", torch.cat([torch.full((16,), 2.0), p.detach()[16:].float()]).to(dtype))):
        with torch.no_grad():
            edit()
        with pytest.warns(UserWarning, match="masters follow: 'w'"):
            after = opt.master_params()[0]
        assert torch.equal(after[16:], before[16:])
    assert (after[8:16] == 2).all() and ((after[:8] - 2).abs() <= torch.finfo(dtype).eps).all()  # other memory: exact; in place: to half a unit


def test_one_report_names_all_edited_parameters():
    params = [(f"layer{i}", torch.nn.Parameter(torch.ones(2).half())) for i in range(8)]
    opt = hs.optim.SGD(params, lr=0.0, master="fp32")
    with torch.no_grad():
        for _, p in params[:7]:
            p.mul_(2)
    with pytest.warns(UserWarning) as seen:
        opt.master_params()
    assert [str(w.message) for w in seen] == ["weights changed since the last step; their masters follow: 'layer0', 'layer1', 'layer2', 'layer3', 'layer4' and 2 more"]
    with torch.no_grad():
        params[7][1].mul_(1)  # counted as a version, but no value changed: full masters can tell
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.master_params()


@every_mode
def test_edits_through_data_need_refresh_masters(dtype, master):
    p = torch.nn.Parameter(torch.rand(64).to(dtype) + 0.5)
    opt = hs.optim.SGD([("w", p)], lr=0.0, master=master)
    p.data.clamp_(max=0.75)
    found = opt.refresh_masters()
    assert set(found) <= {"w"} and (master in ("none", "split16", "split8", "kahan") or found["w"] > 0)
    assert (opt.master_params()[0] <= 0.75 * (1 + torch.finfo(dtype).eps)).all()
    assert opt.refresh_masters() == {}


# -- skips -------------------------------------------------------------------------------------------
@every_mode
@every_rule
@pytest.mark.parametrize("how", ["scaler", "no scaler", "found_inf"])
def test_a_skipped_step_leaves_every_byte(dtype, master, name, kw, how):
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(torch.randn(37).to(dtype)) for _ in range(2))
    opt = getattr(hs.optim, name)([{"params": [p]}, {"params": [q]}], lr=0.1, master=master, **kw)
    scaler = hs.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))

    def step(bad):
        p.grad, q.grad = torch.randn(37).to(dtype), torch.randn(37).to(dtype)
        if bad and how != "found_inf":
            q.grad[36] = torch.inf
        if how == "scaler":
            scaler.step(opt), scaler.update()
        elif how == "found_inf":
            opt.found_inf = torch.tensor(2.0 * bad)
            opt.step()
            del opt.found_inf
        else:
            opt.step()

    step(False)
    before = held(opt, [p, q])
    for _ in range(3):
        step(True)
        assert same(before, held(opt, [p, q]))
    assert opt.steps_skipped == (3 if how == "no scaler" else 0)
    step(False)
    assert not same(before, held(opt, [p, q])) and int(opt.state[q]["step"]) == 2


def test_without_skip_nonfinite_nothing_is_laundered():
    p = torch.nn.Parameter(torch.ones(3))
    opt = hs.optim.SGD([p], lr=1.0, skip_nonfinite=False)
    p.grad = torch.tensor([1.0, torch.nan, torch.inf])
    opt.step()
    assert p[0] == 0 and torch.isnan(p[1]) and torch.isinf(p[2]) and opt.steps_skipped == 0


# -- freezing, groups, moves -------------------------------------------------------------------------
@every_rule
def test_freezing_and_unfreezing_between_steps(name, kw):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).half()
    opt = getattr(hs.optim, name)(model.named_parameters(), lr=0.1, **kw)

    def step():
        opt.zero_grad()
        model(torch.randn(3, 4).half()).float().square().sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        opt.step()
        return [bool((p != b).any()) for p, b in zip(model.parameters(), before)]

    assert step() == [True] * 4
    model[0].requires_grad_(False)
    state = held(opt, list(model[0].parameters()))[2:4]
    assert step() == [False, False, True, True] and int(opt.state[model[0].weight]["step"]) == 1
    assert same(state, held(opt, list(model[0].parameters()))[2:4])
    model[0].requires_grad_(True)
    assert step() == [True] * 4 and int(opt.state[model[0].weight]["step"]) == 2 and int(opt.state[model[1].weight]["step"]) == 3


@pytest.mark.parametrize("master", ["split16", "fp32", "fp64", "none"])
@every_rule
def test_what_is_frozen_from_the_start_has_no_master_until_it_is_unfrozen(master, name, kw):
    torch.manual_seed(0)
    start = torch.randn(5, 3)
    p, q = torch.nn.Parameter(start.half(), requires_grad=False), torch.nn.Parameter(start.half())
    other = torch.nn.Parameter(torch.ones(2).half())
    opt = getattr(hs.optim, name)([("p", p), ("other", other)], lr=0.1, master=master, **kw)
    twin = getattr(hs.optim, name)([q], lr=0.1, master=master, **kw)
    assert p not in opt.state and torch.equal(opt.master_params()[0], p.to(opt.master_params()[0].dtype)) and "frozen" in repr(opt)
    other.grad = torch.ones(2).half()
    opt.step()
    assert p not in opt.state and torch.equal(p, start.half())
    p.requires_grad_(True)
    for _ in range(3):
        p.grad = torch.randn(5, 3).half()
        q.grad = p.grad.clone()
        opt.step(), twin.step()
    assert torch.equal(p, q) and set(opt.state[p]) == set(twin.state[q]) and int(opt.state[p]["step"]) == 3
    assert all(torch.equal(opt.state[p][k], twin.state[q][k]) for k in twin.state[q]) and "frozen" not in repr(opt)


@pytest.mark.parametrize("master", ["split16", "fp32", "none"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_frozen_is_an_empty_entry_of_the_checkpoint(master, packed):
    torch.manual_seed(0)
    p, q = torch.nn.Parameter(torch.randn(5).half(), requires_grad=False), torch.nn.Parameter(torch.randn(5).half())
    opt = hs.optim.AdamW([("p", p), ("q", q)], lr=0.1, master=master)
    q.grad = torch.randn(5).half()
    opt.step()
    saved = opt.state_dict(packed=packed)
    assert saved["state"][0] == {} and list(opt.to_torch_state_dict()["state"]) == [1]

    def twin(requires_grad):
        a, b = torch.nn.Parameter(p.detach().clone(), requires_grad=requires_grad), torch.nn.Parameter(q.detach().clone())
        return a, b, hs.optim.AdamW([("p", a), ("q", b)], lr=0.1, master=master)

    a, b, frozen = twin(False)
    frozen.load_state_dict(saved)
    assert a not in frozen.state and torch.equal(frozen.state[b]["exp_avg"], opt.state[q]["exp_avg"])
    a, b, thawed = twin(True)
    thawed.load_state_dict(saved)
    assert int(thawed.state[a]["step"]) == 0 and int(thawed.state[b]["step"]) == 1
    for x in (a, b):
        x.grad = torch.randn(5).half()
    thawed.step()
    full = thawed.state_dict(packed=packed)
    c, d, late = twin(False)
    for x, y in ((c, a), (d, b)):
        x.data.copy_(y.data)
    late.load_state_dict(full)  # an entry for what is frozen here: it has been trained, so it comes back whole
    assert int(late.state[c]["step"]) == 1 and torch.equal(late.state[c]["exp_avg"], thawed.state[a]["exp_avg"])
    assert torch.equal(late.master_params()[0], thawed.master_params()[0])


def test_groups_added_between_steps_take_their_own_options():
    a, b = (torch.nn.Parameter(torch.ones(3).half()) for _ in range(2))
    opt = hs.optim.AdamW([("a", a)], lr=0.1)
    a.grad = torch.ones(3).half()
    opt.step()
    opt.add_param_group({"params": [("b", b)], "master": "fp64", "weight_decay": 0.5, "lr": 0.01})
    b.grad = torch.ones(3).half()
    opt.step()
    assert opt.state[b]["master"].dtype == torch.float64 and opt.state[b]["exp_avg"].dtype == torch.float64
    assert (int(opt.state[a]["step"]), int(opt.state[b]["step"])) == (2, 1) and b[0].item() == pytest.approx(1 - 0.005 - 0.01, abs=1e-3)
    assert opt.param_groups[1]["betas"] == (0.9, 0.999)
    with pytest.raises(ValueError, match="'b' is in an earlier parameter group too, as 'b'"):
        opt.add_param_group({"params": [("b", b)]})
    with pytest.raises(ValueError, match="master is 'half'"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "master": "half"})
    assert len(opt.param_groups) == len(opt._rooms) == 2


def test_a_tied_parameter_is_stepped_once():
    p = torch.nn.Parameter(torch.ones(2))
    opt = hs.optim.SGD([("encoder", p), ("decoder", p)], lr=1.0)
    p.grad = torch.ones(2)
    opt.step()
    assert (p == 0).all() and len(opt.param_groups[0]["params"]) == 1
    with pytest.raises(ValueError, match="'decoder' is in an earlier parameter group too, as 'encoder'"):
        hs.optim.SGD([{"params": [("encoder", p)]}, {"params": [("decoder", p)]}], lr=1.0)


@every_mode
@every_rule
def test_module_to_between_steps_is_followed(dtype, master, name, kw, no_warnings):
    """Another layout, other memory, shared memory: masters and states go along, nothing is reported."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 5, 5)
    moved, still = (torch.nn.Conv2d(3, 4, 5, bias=False) for _ in range(2))
    for m in (moved, still):
        m.weight.data.copy_(weight)
        m.to(dtype)
    opts = [getattr(hs.optim, name)(m.named_parameters(), lr=0.01, master=master, **kw) for m in (moved, still)]
    moves = [lambda: moved.to(memory_format=torch.channels_last), lambda: moved.share_memory(), lambda: setattr(moved.weight, "data", moved.weight.data.clone()),
             lambda: moved.to("cpu"), lambda: moved.to(memory_format=torch.contiguous_format), lambda: None]
    for move in moves:
        grad = torch.randn(4, 3, 5, 5).to(dtype)
        for m, opt in zip((moved, still), opts):
            m.weight.grad = grad.clone()
            opt.step()
        move()
        assert torch.equal(moved.weight, still.weight)
        assert torch.equal(opts[0].master_params()[0], opts[1].master_params()[0])
    for key, value in opts[1].state[still.weight].items():
        assert torch.equal(opts[0].state[moved.weight][key], value) and opts[0].state[moved.weight][key] is (
            opts[0]._rooms[0].masters[0] if key == "master" else opts[0].state[moved.weight][key])


def test_states_shown_after_a_move_are_the_ones_that_are_stepped():
    m = torch.nn.Conv2d(3, 4, 5, bias=False).half()
    opt = hs.optim.AdamW(m.parameters(), lr=0.01)
    m.to(memory_format=torch.channels_last)
    m.weight.grad = torch.ones_like(m.weight)
    opt.step()
    assert opt.state[m.weight]["exp_avg"].abs().sum() > 0 and opt.state[m.weight]["exp_avg"].stride() == m.weight.stride()


def test_a_changed_dtype_or_shape_is_refused_by_name_and_nothing_is_written():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).half()
    opt = hs.optim.AdamW(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    before = held(opt, [])
    model.float()
    with pytest.raises(RuntimeError, match=r"'0.weight' is float32\[2, 2\] but was float16\[2, 2\] when the optimizer was made"):
        opt.step()
    assert same(before, held(opt, []))
    model.half()
    model[1].weight.grad = None
    model[1].weight.data = torch.ones(3).half()
    with pytest.raises(RuntimeError, match=r"'1.weight' is float16\[3\] but was float16\[2, 2\]"):
        opt.step()
    assert same(before, held(opt, []))


# -- capture -----------------------------------------------------------------------------------------
@pytest.fixture
def captured(monkeypatch):
    """Pretends that a graph is being captured, from captured() on."""
    return lambda on=True: monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: on)


def warm(lr):
    p, q = (torch.nn.Parameter(torch.ones(2).half()) for _ in range(2))
    opt = hs.optim.AdamW([("p", p), ("q", q)], lr=lr)
    p.grad = q.grad = torch.ones(2).half()
    opt.step()
    return p, q, opt


def test_a_float_lr_raises_under_capture_and_a_tensor_does_not(captured):
    p, q, opt = warm(0.1)
    before = held(opt, [p, q])
    captured()
    with pytest.raises(RuntimeError, match=r"lr of group 0 is the float 0.1 inside a captured graph.*pass lr=torch.tensor\(0.1\)"):
        opt.step()
    assert same(before, held(opt, [p, q]))
    captured(False)
    p, q, opt = warm(torch.tensor(0.1))
    captured()
    opt.step()
    assert int(opt.state[p]["step"]) == 2


def test_changes_of_the_parameters_raise_under_capture(captured):
    def frozen(p, q, opt):
        q.requires_grad_(False)
        q.grad = None

    def edited(p, q, opt):
        with torch.no_grad():
            q.mul_(2)

    cases = [(frozen, "'q' was frozen inside a captured graph"), (edited, "'q' was edited inside a captured graph"),
             (lambda p, q, opt: setattr(q, "data", q.data.clone()), "'q' was moved inside a captured graph")]
    for change, message in cases:
        captured(False)
        p, q, opt = warm(torch.tensor(0.1))
        change(p, q, opt)
        before = held(opt, [p, q])
        captured()
        with pytest.raises(RuntimeError, match=message):
            opt.step()
        assert same(before, held(opt, [p, q]))
        captured(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step()
    captured(False)
    p, q, opt = warm(torch.tensor(0.1))
    q.grad = None
    opt.step()
    q.grad = torch.ones(2).half()
    captured()
    with pytest.raises(RuntimeError, match="'q' was unfrozen inside a captured graph"):
        opt.step()
    for make in (lambda: opt, lambda: hs.optim.Masters(torch.optim.SGD, [torch.nn.Parameter(torch.ones(1))], lr=0.1)):
        captured(False)
        target = make()
        captured()
        with pytest.raises(RuntimeError, match="add_param_group inside a captured graph"):
            target.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
        assert len(target.param_groups) == 1


def test_what_was_frozen_from_the_start_cannot_be_unfrozen_under_capture(captured):
    p, q = torch.nn.Parameter(torch.ones(2).half()), torch.nn.Parameter(torch.ones(2).half(), requires_grad=False)
    opt = hs.optim.SGD([("p", p), ("q", q)], lr=torch.tensor(0.1))
    q.requires_grad_(True)
    p.grad = q.grad = torch.ones(2).half()
    captured()
    with pytest.raises(RuntimeError, match="'q' was unfrozen inside a captured graph; take one step with it before the capture"):
        opt.step()
    captured(False)
    opt.step()
    captured()
    opt.step()


# -- learning rate -----------------------------------------------------------------------------------
def test_lr_is_read_each_step_stays_what_it_was_and_is_copied_only_when_it_changed():
    p = torch.nn.Parameter(torch.zeros(1))
    opt = hs.optim.SGD([p], lr=1)
    group, device = opt.param_groups[0], opt._rooms[0].lr
    versions = []
    for lr in (1, 1, 0.5, 0.5, 0.25):
        group["lr"] = lr
        p.grad = torch.ones(1)
        opt.step()
        versions.append(device._version)
        assert type(group["lr"]) is type(lr) and group["lr"] == lr
    assert p.item() == -3.25 and [b - a for a, b in zip(versions, versions[1:])] == [0, 1, 0, 1]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_lr_is_cloned_per_group_and_never_replaced(shape):
    lr = torch.full(shape, 0.5)
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    opt = hs.optim.SGD([{"params": [params[0]]}, {"params": [params[1]]}], lr=lr)
    own = torch.full(shape, 0.125)
    opt.add_param_group({"params": [params[2]], "lr": own})
    rates = [g["lr"] for g in opt.param_groups]
    assert len({r.data_ptr() for r in (*rates, lr, own)}) == 5
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(1)
        opt.step(), schedule.step()
    assert all(a is b for a, b in zip(rates, (g["lr"] for g in opt.param_groups)))
    assert [p.item() for p in params] == [-0.75, -0.75, -0.1875] and (lr == 0.5).all() and (own == 0.125).all()


SCHEDULES = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "chain": lambda o: torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)]),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(o, [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 5)], [3]),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("make", [lambda p: hs.optim.SGD([p], lr=0.1, momentum=0.9), lambda p: hs.optim.Masters(torch.optim.SGD, [p], lr=0.1, momentum=0.9)], ids=["ours", "masters"])
def test_schedules_do_what_they_do_to_torchs_optimizer(schedule, make):
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    ours, theirs = make(p), torch.optim.SGD([q], lr=0.1, momentum=0.9)
    schedules = [SCHEDULES[schedule](o) for o in (ours, theirs)]
    for i in range(8):
        p.grad, q.grad = torch.full((3,), i + 1.0), torch.full((3,), i + 1.0)
        ours.step(), theirs.step()
        for s in schedules:
            s.step()
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] and ours.param_groups[0]["momentum"] == theirs.param_groups[0]["momentum"]
        assert torch.allclose(p, q, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("make", [lambda p: hs.optim.SGD([p], lr=0.1, momentum=0.9), lambda p: hs.optim.Masters(torch.optim.SGD, [p], lr=0.1, momentum=0.9),
                                  lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9), lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=True)], ids=["ours", "masters", "stock", "fused"])
def test_skip_aware_schedules_follow_applied_steps(schedule, make):
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    ours, plain = make(p), torch.optim.SGD([q], lr=0.1, momentum=0.9)
    scaler = hs.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    aware, reference = hs.lr_scheduler.SkipAware(SCHEDULES[schedule](ours), scaler), SCHEDULES[schedule](plain)
    for bad in (True, True, False, False, True, False, False, True, False):
        p.grad = torch.full((3,), torch.inf if bad else 1.0)
        scaler.step(ours), scaler.update(), aware.step()
        if not bad:
            plain.step(), reference.step()
        assert aware.get_last_lr() == reference.get_last_lr() and ours.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert aware.last_epoch == reference.last_epoch if hasattr(reference, "last_epoch") else True
    saved = copy.deepcopy(aware.state_dict())
    aware.load_state_dict(saved)
    assert aware.state_dict()["seen"] == 5


def test_skip_aware_passes_metrics_on_and_needs_our_scaler():
    p = torch.nn.Parameter(torch.zeros(3))
    opt, scaler = hs.optim.SGD([p], lr=1.0), hs.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    schedule = hs.lr_scheduler.SkipAware(torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0), scaler)
    for bad in (False, True, False):
        p.grad = torch.full((3,), torch.inf if bad else 1.0)
        scaler.step(opt), scaler.update(), schedule.step(5.0)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1)
    with pytest.raises(TypeError, match="SkipAware: scaler is torch.amp.grad_scaler.GradScaler; expected a halfstep.GradScaler"):
        hs.lr_scheduler.SkipAware(torch.optim.lr_scheduler.StepLR(opt, 1), torch.amp.GradScaler("cpu"))
    off = hs.lr_scheduler.SkipAware(torch.optim.lr_scheduler.StepLR(opt, 1), hs.GradScaler("cpu", enabled=False))
    off.step()
    assert off.get_last_lr()[0] == pytest.approx(0.01)


# -- layout ------------------------------------------------------------------------------------------
@every_mode
@every_rule
def test_a_gradient_with_other_strides_is_read_in_the_parameters_layout(dtype, master, name, kw):
    torch.manual_seed(0)
    weight, grads = torch.randn(6, 4, 3, 3), [torch.randn(6, 4, 3, 3).to(dtype) for _ in range(3)]
    layouts = [lambda t: t.contiguous(), lambda t: t.to(memory_format=torch.channels_last), lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
               lambda t: torch.stack([t, t], -1)[..., 0]]
    want = None
    for mine in layouts[:3]:
        for theirs in layouts:
            p = torch.nn.Parameter(mine(weight.to(dtype, copy=True)))
            opt = getattr(hs.optim, name)([p], lr=0.01, master=master, **kw)
            for g in grads:
                p.grad = theirs(g)
                opt.step()
            assert all(t.stride() == p.stride() for t in opt.state[p].values() if t.dim())
            want = p.detach().contiguous() if want is None else want
            assert torch.equal(p, want)


@pytest.mark.parametrize("make,strides", [(lambda: torch.zeros(1).expand(4), r"\(0,\) for shape \(4,\)"), (lambda: torch.zeros(8)[::2], r"\(2,\) for shape \(4,\)"),
                                          (lambda: torch.zeros(4, 4)[:, :2], r"\(4, 1\) for shape \(4, 2\)"), (lambda: torch.zeros(6).as_strided((3, 3), (1, 1)), r"\(1, 1\) for shape \(3, 3\)")])
def test_overlapping_parameters_and_gaps_are_refused_by_name(make, strides):
    for cls in (lambda p: hs.optim.AdamW(p), lambda p: hs.optim.Masters(torch.optim.SGD, p)):
        with pytest.raises(ValueError, match=f"'w' has strides {strides}: its elements overlap or leave gaps"):
            cls([("ok", torch.nn.Parameter(torch.zeros(2))), ("w", torch.nn.Parameter(make()))])


# -- overflow ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("master", ["split16", "fp32", "fp64", "none"])
@every_rule
def test_a_weight_that_would_leave_fp16_keeps_weight_master_and_states(master, name, kw):
    p, twin = (torch.nn.Parameter(torch.tensor([65000.0, -65504.0, 1.0]).half()) for _ in range(2))
    kw = {**kw, "weight_decay": 0.0}
    opt, other = (getattr(hs.optim, name)([("fc.weight", w)], lr=1000.0, master=master, **kw) for w in (p, twin))
    scaler = hs.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    p.grad = torch.tensor([-1.0, 1.0, 1.0]).half()
    twin.grad = torch.tensor([0.0, 0.0, 1.0]).half()
    before = {k: v.clone() for k, v in opt.state[p].items()}
    with pytest.warns(UserWarning) as seen:
        scaler.step(opt)
    other.step(), scaler.update()
    assert [str(w.message) for w in seen] == ["'fc.weight' would leave float16 range (2 elements, step 1): keep it in FP32 or lower lr"]
    assert p[0] == 64992 and p[1] == -65504 and p[2] == twin[2] and scaler.stats().overflowed == 2
    assert all(torch.equal(v[:2], before[k][:2]) for k, v in opt.state[p].items() if v.dim())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # reported once
        p.grad = torch.zeros(3).half()
        opt.param_groups[0]["lr"] = 0.0
        opt.step()


@pytest.mark.parametrize("master", ["split16", "fp32", "none"])
def test_a_bf16_weight_too(master):
    p = torch.nn.Parameter(torch.tensor([3.38e38, 1.0]).bfloat16())
    opt = hs.optim.SGD([("w", p)], lr=1.0, master=master)
    p.grad = torch.tensor([-1e38, 1.0]).bfloat16()
    with pytest.warns(UserWarning, match=r"'w' would leave bfloat16 range \(1 element, step 1\)"):
        opt.step()
    assert p[0] == torch.tensor(3.38e38).bfloat16() and p[1] == 0


# -- the rest ----------------------------------------------------------------------------------------
@every_mode
def test_autograd_knows_that_the_weights_were_written(dtype, master):
    """A second backward through saved weights raises, as with torch's own optimizers, instead of using the new ones."""
    p, x = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype)), torch.ones(2, 2, dtype=dtype, requires_grad=True)
    opt = hs.optim.SGD([p], lr=0.5, master=master)
    loss = (x * p).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copied_optimizer_goes_on_alone_and_alike(clone):
    p = torch.nn.Parameter(torch.randn(9).half())
    opt = hs.optim.AdamW([("w", p)], lr=0.1, max_grad_norm=1.0)
    p.grad = torch.randn(9).half()
    opt.step()
    other = clone(opt)
    q = other.param_groups[0]["params"][0]
    q.grad = p.grad.clone()
    weights = p.detach().clone()
    other.step()
    assert torch.equal(p, weights) and not torch.equal(q, weights)
    opt.step()
    assert torch.equal(p, q) and torch.equal(opt.master_params()[0], other.master_params()[0]) and repr(opt) == repr(other)


def test_the_clip_is_one_over_all_groups_and_dtypes():
    a, b, c = torch.nn.Parameter(torch.zeros(2).half()), torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2).double())
    opt = hs.optim.SGD([{"params": [a]}, {"params": [b], "lr": 2.0}, {"params": [c]}], lr=1.0, max_grad_norm=1.0)
    a.grad, b.grad, c.grad = torch.tensor([2.0, 0.0]).half(), torch.tensor([0.0, 3.0]), torch.tensor([6.0, 0.0]).double()
    opt.step()
    assert a[0].item() == pytest.approx(-2 / 7, rel=1e-3) and b[1].item() == pytest.approx(-6 / 7, rel=1e-5) and c[0].item() == pytest.approx(-6 / 7, rel=1e-5)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_torchs_switches_are_accepted_and_ignored(name):
    p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    a, b = getattr(hs.optim, name)([p], foreach=True, fused=True, capturable=True), getattr(hs.optim, name)([q])
    p.grad = q.grad = torch.ones(4)
    a.step(), b.step()
    assert torch.equal(p, q) and isinstance(a, torch.optim.Optimizer)
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        getattr(hs.optim, name)([p], differentiable=True)


REPRS = [  # held and moved: docs/choose.md
    (torch.float16, "auto", "float16 weights, split16 masters (1 parameter, 3 elements): holds 14 and moves 28 bytes"),
    (torch.float16, "fp32", "float16 weights, fp32 masters (1 parameter, 3 elements): holds 16 and moves 30 bytes"),
    (torch.float16, "fp64", "float16 weights, fp64 masters (1 parameter, 3 elements): holds 28 and moves 54 bytes"),
    (torch.float16, "none", "float16 weights, no master (1 parameter, 3 elements): holds 12 and moves 24 bytes"),
    (torch.bfloat16, "auto", "bfloat16 weights, split16 masters (1 parameter, 3 elements): holds 14 and moves 28 bytes"),
    (torch.float32, "auto", "float32 weights, no master (1 parameter, 3 elements): holds 16 and moves 32 bytes"),
    (torch.float64, "auto", "float64 weights, no master (1 parameter, 3 elements): holds 32 and moves 64 bytes"),
]


@pytest.mark.parametrize("dtype,master,text", REPRS)
def test_repr_says_the_mode_what_it_holds_and_what_breaks(dtype, master, text):
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    opt = hs.optim.AdamW([p], master=master)
    assert f"# halfstep: {text} an element a step; " in repr(opt)
    p.grad = torch.ones(3, dtype=dtype)
    tensors = [p, p.grad, *(t for t in opt.state[p].values() if t.dim())]
    assert sum(t.numel() * t.element_size() for t in tensors) / 3 == int(text.split("holds ")[1].split()[0])


def test_repr_counts_each_mode_apart():
    params = [torch.nn.Parameter(torch.ones(1000).half()), torch.nn.Parameter(torch.ones(500).half()), torch.nn.Parameter(torch.ones(7))]
    text = repr(hs.optim.SGD(params, lr=0.1, grad_dtype="fp32"))
    assert "float16 weights, split16 masters (2 parameters, 1,500 elements): holds 8 and moves 16 bytes" in text
    assert "float32 weights, no master (1 parameter, 7 elements): holds 8 and moves 16 bytes" in text
    assert "# halfstep: no parameters" in repr(hs.optim.SGD([{"params": []}], lr=0.1))
