"""Masters: any other optimizer on exact copies, under either scaler, with closures, edits and overflow."""

import math
import warnings

import pytest
import torch

import halfstep as hs

pytestmark = pytest.mark.smoke
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INNER = [("RMSprop", dict(lr=1e-2)), ("Adam", dict(lr=1e-2)), ("Adagrad", dict(lr=1e-2)), ("NAdam", dict(lr=1e-2)), ("Adadelta", dict(lr=1.0)), ("ASGD", dict(lr=1e-2))]


def state_of(opt):
    tensors = [t for p, m in opt._pairs for t in (p, m)] + [t for s in opt.inner.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return [t.detach().clone() for t in tensors]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def scaler_at(scale):
    scaler = hs.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))
    return scaler


@pytest.mark.parametrize("name,kw", INNER)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("master", ["fp32", "fp64"])
@pytest.mark.parametrize("scaled", [False, True])
def test_it_is_the_inner_optimizer_on_exact_weights(name, kw, dtype, master, scaled):
    torch.manual_seed(0)
    wide = torch.float64 if torch.float64 in (dtype, {"fp32": None, "fp64": torch.float64}[master]) else torch.float32
    start = torch.randn(6, 5).to(dtype)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.to(wide))
    ours, theirs, scaler = hs.optim.Masters(getattr(torch.optim, name), [("w", p)], master=master, **kw), getattr(torch.optim, name)([q], **kw), scaler_at(2.0**8)
    for _ in range(10):
        grad = torch.randn(6, 5).to(dtype)
        p.grad, q.grad = (grad * 256 if scaled else grad).to(dtype), grad.to(wide)
        (scaler.step(ours), scaler.update()) if scaled else ours.step()
        theirs.step()
        assert torch.equal(ours.master_params()[0], q) and torch.equal(p, q.to(dtype))
    assert torch.equal(p.grad, grad * (256 if scaled else 1)) and all(m.grad is None for _, m in ours._pairs)


def test_masters_begin_where_cast_model_left_the_weights():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    exact = [p.detach().clone() for p in model.parameters()]
    hs.cast_model(model)
    opt = hs.optim.Masters(torch.optim.SGD, model.named_parameters(), lr=0.1)
    assert same(opt.master_params(), exact) and not hasattr(model.weight, "_halfstep_exact")
    with pytest.raises(RuntimeError, match="'weight' already belongs to an optimizer"):
        hs.cast_model(model, torch.bfloat16)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("how", ["scaler", "stock scaler", "no scaler"])
def test_a_skipped_step_leaves_everything(bad, how):
    p, q = (torch.nn.Parameter(torch.ones(4).half()) for _ in range(2))
    opt = hs.optim.Masters(torch.optim.Adam, [p, q], lr=0.1)
    scaler = scaler_at(4.0) if how == "scaler" else torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))

    def step(value):
        p.grad, q.grad = torch.ones(4).half(), torch.full((4,), value).half()
        if how == "no scaler":
            return opt.step()
        scaler.step(opt), scaler.update()

    step(1.0)
    before = state_of(opt)
    for _ in range(2):
        step(bad)
        assert same(before, state_of(opt))
    assert opt.steps_skipped == (2 if how == "no scaler" else 0)
    step(1.0)
    assert not same(before, state_of(opt))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("edit", ["copy_", "data", "refresh"])
def test_an_edit_is_followed_where_it_was_made_and_reported_by_name(dtype, edit):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, bias=False)
    exact = model.weight.detach().clone()
    hs.cast_model(model, dtype)
    opt = hs.optim.Masters(torch.optim.SGD, model.named_parameters(), lr=1e-5)
    with torch.no_grad():
        if edit == "copy_":
            model.weight[:2] = 0.5
        elif edit == "data":
            model.weight.data = torch.cat([torch.full((2, 8), 0.5), model.weight[2:].float()]).to(dtype)
        else:
            model.weight.data[:2] = 0.5
    if edit == "refresh":
        assert opt.refresh_masters() == {"weight": 16}
    model.weight.grad = torch.ones(8, 8).to(dtype)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt.step(), opt.step()
    assert [str(w.message) for w in seen] == ["weights changed since the last step; their masters follow: 'weight'"] * (edit != "refresh")
    after = opt.master_params()[0]
    assert torch.allclose(after[:2], torch.tensor(0.5 - 2e-5), atol=1e-7) and torch.allclose(after[2:], exact[2:] - 2e-5, atol=1e-7)


def test_moves_are_followed_and_conversions_refused():
    model = torch.nn.Linear(4, 4).half()
    opt = hs.optim.Masters(torch.optim.Adam, model.named_parameters(), lr=0.1)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        model.share_memory()
    assert (opt.master_params()[0] != 0).any()
    model.weight.data = torch.ones(3).half()
    model.weight.grad = None
    with pytest.raises(RuntimeError, match=r"'weight' is float16\[3\] but its master is \[4, 4\]"):
        opt.step()


@pytest.mark.parametrize("master", ["fp32", "fp64"])
def test_a_weight_that_would_leave_fp16_is_kept_counted_and_named(master):
    p = torch.nn.Parameter(torch.tensor([65000.0, 1.0]).half())
    opt, scaler = hs.optim.Masters(torch.optim.SGD, [("fc.weight", p)], master=master, lr=1000.0), scaler_at(1.0)
    p.grad = torch.tensor([-1.0, -1.0]).half()
    with pytest.warns(UserWarning, match=r"'fc.weight' would leave float16 range \(1 element, step 1\): keep it in FP32 or lower lr"):
        scaler.step(opt)
    scaler.update()
    assert p.tolist() == [64992.0, 1001.0] and opt.master_params()[0].tolist() == [64992.0, 1001.0]
    assert scaler.stats().overflowed == 1


def test_a_master_is_rounded_once():
    """1 + 2^-11 + 2^-30 is nearest to 1 + 2^-10; by way of FP32 it would become a tie and go to 1."""
    p = torch.nn.Parameter(torch.ones(1).half())
    opt = hs.optim.Masters(torch.optim.SGD, [p], master="fp64", lr=1.0)
    opt.set_master_params([torch.tensor([1 + 2.0**-11 + 2.0**-30], dtype=torch.float64)])
    p.grad = torch.zeros(1).half()
    opt.step()
    assert p == 1 + 2.0**-10


@pytest.mark.parametrize("who", ["ours", "inner"])
def test_schedulers_act_on_the_inner_optimizer_from_either_side(who):
    p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    ours, theirs = hs.optim.Masters(torch.optim.SGD, [p], lr=1.0, momentum=0.5), torch.optim.SGD([q], lr=1.0, momentum=0.5)
    schedules = [torch.optim.lr_scheduler.StepLR(ours if who == "ours" else ours.inner, 1, 0.5), torch.optim.lr_scheduler.StepLR(theirs, 1, 0.5)]
    for _ in range(4):
        p.grad, q.grad = torch.ones(2), torch.ones(2)
        ours.step(), theirs.step()
        for s in schedules:
            s.step()
        assert torch.equal(p, q)
    ours.param_groups[0]["momentum"] = theirs.param_groups[0]["momentum"] = 0.0
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    ours.step(), theirs.step()
    assert torch.equal(p, q) and ours.inner.param_groups[0]["lr"] == ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_groups_and_frozen_parameters():
    a, b, c = (torch.nn.Parameter(torch.ones(2).half()) for _ in range(3))
    opt = hs.optim.Masters(torch.optim.SGD, [{"params": [("a", a)], "lr": 1.0}, {"params": [("b", b)]}], lr=0.25)
    a.grad = b.grad = torch.ones(2).half()
    opt.step()
    opt.add_param_group({"params": [("c", c)], "lr": 0.5})
    b.grad, c.grad = None, torch.ones(2).half()
    opt.step()
    assert [float(p.detach()[0]) for p in (a, b, c)] == [-1.0, 0.75, 0.5] and len(opt.inner.param_groups) == 3 == len(opt.param_groups)
    with pytest.raises(ValueError, match="'c' is in an earlier parameter group too"):
        opt.add_param_group({"params": [("c", c)]})
    assert len(opt.inner.param_groups) == len(opt.param_groups) == 3
    line = hs.optim.Masters(torch.optim.LBFGS, [torch.nn.Parameter(torch.ones(1))])
    assert "Masters of LBFGS" in repr(line) and "float16 weights, fp32 masters (3 parameters, 6 elements)" in repr(opt)


def test_sparse_gradients_reach_an_inner_optimizer_that_takes_them():
    table, twin = torch.nn.Embedding(10, 4, sparse=True), torch.nn.Embedding(10, 4, sparse=True)
    twin.weight.data.copy_(table.weight.data)
    hs.cast_model(table)
    opt, theirs, scaler = hs.optim.Masters(torch.optim.SparseAdam, table.named_parameters(), lr=0.1), torch.optim.SparseAdam(list(twin.parameters()), lr=0.1), scaler_at(16.0)
    for _ in range(2):
        for m, o in ((table, opt), (twin, theirs)):
            o.zero_grad()
            loss = m(torch.tensor([1, 1, 3])).sum()
            (scaler.scale(loss) if m is table else loss).backward()
        scaler.step(opt), scaler.update(), theirs.step()
        assert torch.allclose(opt.master_params()[0], twin.weight, atol=1e-6)


# -- closures ----------------------------------------------------------------------------------------
def rosenbrock(w):
    x, y = w[0], w[1]
    return (1 - x) ** 2 + 10 * (y - x * x) ** 2


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("kind", ["masters", "stock"])
def test_lbfgs_under_the_scaler_is_lbfgs(kind, search):
    p, q = (torch.nn.Parameter(torch.tensor([-0.5, 0.5])) for _ in range(2))
    kw = dict(lr=0.1 if search is None else 1.0, max_iter=6, line_search_fn=search)
    ours = hs.optim.Masters(torch.optim.LBFGS, [p], **kw) if kind == "masters" else torch.optim.LBFGS([p], **kw)
    theirs, scaler = torch.optim.LBFGS([q], **kw), scaler_at(2.0**6)

    def closure():
        ours.zero_grad()
        loss = rosenbrock(p)
        scaler.scale(loss).backward()
        return loss

    def plain():
        theirs.zero_grad()
        loss = rosenbrock(q)
        loss.backward()
        return loss

    for _ in range(8):
        a, b = scaler.step(ours, closure), theirs.step(plain)
        scaler.update()
        assert torch.equal(a, b) and torch.equal(p, q)
    assert rosenbrock(p) < 0.1 * rosenbrock(torch.tensor([-0.5, 0.5])) and scaler.stats().steps_applied == 8


def test_lbfgs_trains_fp16_weights_on_exact_masters():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.tensor([-0.5, 0.5]).half())
    opt, scaler = hs.optim.Masters(torch.optim.LBFGS, [p], lr=0.5, max_iter=10, line_search_fn="strong_wolfe"), scaler_at(2.0**6)

    def closure():
        opt.zero_grad()
        loss = rosenbrock(p.float())
        scaler.scale(loss).backward()
        return loss

    losses = []
    for _ in range(6):
        losses.append(float(scaler.step(opt, closure).detach()))
        scaler.update()
    assert losses[-1] < 0.05 * losses[0] and torch.equal(p, opt.master_params()[0].half())


@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("kind", ["masters", "stock"])
def test_an_overflow_in_any_evaluation_takes_the_whole_step_back(kind, when):
    p = torch.nn.Parameter(torch.tensor([-0.5, 0.5]))
    opt = hs.optim.Masters(torch.optim.LBFGS, [p], max_iter=6, lr=0.1) if kind == "masters" else torch.optim.LBFGS([p], max_iter=6, lr=0.1)
    scaler, calls, bad = scaler_at(8.0), [0], [False]

    def closure():
        calls[0] += 1
        opt.zero_grad()
        loss = rosenbrock(p)
        scaler.scale(loss * (math.inf if bad[0] and calls[0] == when else 1.0)).backward()
        return loss

    scaler.step(opt, closure), scaler.update()
    inner = opt.inner if kind == "masters" else opt
    freeze = lambda: [p.detach().clone(), *(t.clone() for s in inner.state.values() for v in s.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, torch.Tensor))]
    before, counts = freeze(), {k: v for s in inner.state.values() for k, v in s.items() if isinstance(v, int)}
    calls[0], bad[0] = 0, True
    scaler.step(opt, closure)
    assert calls[0] == when and scaler.step_was_skipped(opt)
    scaler.update()
    assert same(before, freeze()) and counts == {k: v for s in inner.state.values() for k, v in s.items() if isinstance(v, int)} and scaler.get_scale() == 4
    bad[0] = False
    scaler.step(opt, closure), scaler.update()
    assert not same(before, freeze()) and scaler.stats().steps_applied == 2


def test_an_optimizer_of_another_kind_that_asks_again_is_taken_back_too():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            closure()
            return super().step()

    p = torch.nn.Parameter(torch.ones(2))
    opt, scaler, calls = Twice([p], lr=1.0), scaler_at(4.0), [0]

    def closure():
        calls[0] += 1
        opt.zero_grad()
        scaler.scale(p.sum()).backward()
        if calls[0] == 2:
            p.grad[0] = torch.inf
        return p.sum()

    scaler.step(opt, closure)
    assert calls[0] == 2 and scaler.step_was_skipped(opt) and (p == 1).all()


BAD = [
    (lambda p: hs.optim.Masters(torch.optim.SGD, p, master="split16", lr=0.1), ValueError, "master is 'split16'; expected 'fp32' or 'fp64'"),
    (lambda p: hs.optim.Masters(torch.optim.SGD, [("w", torch.nn.Parameter(torch.tensor([torch.inf]).half()))], lr=0.1), ValueError, "'w' holds a non-finite value"),
    (lambda p: hs.optim.Masters(torch.optim.SGD, p, lr=-1.0), ValueError, "Invalid learning rate: -1.0"),
    (lambda p: hs.optim.Masters(torch.optim.SGD, p, lr=0.1, betas=(1, 2)), TypeError, "betas"),
]


@pytest.mark.parametrize("make,kind,message", BAD)
def test_bad_construction_is_refused_and_takes_nothing(make, kind, message):
    model = torch.nn.Linear(2, 2)
    hs.cast_model(model)
    with pytest.raises(kind, match=message):
        make(list(model.parameters()))
    assert hasattr(model.weight, "_halfstep_exact")
    opt = hs.optim.Masters(torch.optim.SGD, model.parameters(), lr=0.1)
    before = state_of(opt)
    for values, message in [([torch.ones(2, 2)], "values has 1 entries but the optimizer has 2 parameters"), ([torch.ones(2, 2), torch.full((2,), 1e6)], "does not fit torch.float16")]:
        with pytest.raises(ValueError, match=message):
            opt.set_master_params(values)
    assert same(before, state_of(opt))
