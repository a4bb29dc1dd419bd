"""GradScaler: torch's protocol, the defects where we differ, and what it reports."""

import math
import warnings

import pytest
import torch

import halfstep as hs

pytestmark = pytest.mark.smoke


def one(dtype=torch.float32, value=1.0, **kw):
    p = torch.nn.Parameter(torch.full((4,), value, dtype=dtype))
    return p, hs.optim.SGD([("w", p)], lr=1.0, **kw)


def test_protocol_errors_are_torchs():
    p, opt = one()
    scaler = hs.GradScaler("cpu")
    for call in (lambda: scaler.step(opt), lambda: scaler.unscale_(opt), lambda: scaler.update()):
        with pytest.raises(AssertionError, match="_scale"):
            call()
    scaler.scale(p.sum()).backward()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="unscale_\\(\\) has already been called"):
        scaler.unscale_(opt)
    scaler.step(opt)
    with pytest.raises(RuntimeError, match="step\\(\\) has already been called"):
        scaler.step(opt)
    with pytest.raises(RuntimeError, match="unscale_\\(\\) is being called after step"):
        scaler.unscale_(opt)
    scaler.update()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.update()


def test_all_gradients_missing_raises_on_every_path():
    p, ours = one()
    scaler = hs.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    for opt in (ours, torch.optim.SGD([p], lr=1.0), torch.optim.Adam([p], fused=True)):
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.step(opt)


def test_torch_checkpoints_both_ways():
    stock, ours = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5), hs.GradScaler("cpu")
    stock.scale(torch.ones(1))
    ours.load_state_dict(stock.state_dict())
    assert ours.get_scale() == 256 and ours.get_growth_interval() == 5
    p, opt = one()
    for _ in range(3):
        opt.zero_grad()
        ours.scale(p.sum()).backward()
        ours.step(opt), ours.update()
    state = ours.state_dict()
    assert set(state) == {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker", "halfstep"}
    assert state["_growth_tracker"] == 3
    stock.load_state_dict({k: v for k, v in state.items() if k != "halfstep"})
    again = hs.GradScaler("cpu")
    again.load_state_dict(state)
    again.scale(torch.ones(1))
    assert again.state_dict() == state
    for broken, message in [({**state, "scale": math.inf}, "scale inf"), ({k: v for k, v in state.items() if k != "scale"}, "no 'scale'"),
                            ({**state, "halfstep": {"format": 2, "state": []}}, "format 2")]:
        with pytest.raises(ValueError, match=message):
            again.load_state_dict(broken)
    assert again.state_dict() == state


def test_one_element_fp16_loss_is_scaled_in_fp32():
    loss = torch.ones(1, dtype=torch.float16, requires_grad=True)
    assert hs.GradScaler("cpu").scale(loss) == 65536  # stock: inf


def test_400_overflows_then_a_right_step():
    p, opt = one()
    scaler = hs.GradScaler(policy=hs.policies.preset("torch"))
    for i in range(400):
        opt.zero_grad()
        (scaler.scale(p.sum()) * math.inf).backward()
        scaler.step(opt), scaler.update()
        assert 0 < scaler.get_scale() < math.inf
    assert scaler.stats().consecutive_skips == 400 and (p == 1).all()
    opt.zero_grad()
    scaler.scale(p.sum()).backward()
    scaler.step(opt), scaler.update()
    assert (p == 0).all() and scaler.stats().steps_applied == 1


@pytest.mark.parametrize("stock", [False, True])
def test_two_bad_optimizers_and_one_good(stock):
    """found_inf is an OR: the good one steps, the bad ones do not, the scale backs off once."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    make = (lambda p: torch.optim.SGD([p], lr=1.0)) if stock else (lambda p: hs.optim.SGD([p], lr=1.0))
    opts = [make(p) for p in params]
    scaler = hs.GradScaler("cpu", init_scale=8.0)
    scaler.scale(sum(p.sum() for p in params)).backward()
    params[0].grad[0], params[2].grad[1] = math.inf, math.nan
    for o in opts:
        scaler.step(o)
    assert [scaler.step_was_skipped(o) for o in opts] == [True, False, True] and scaler.step_was_skipped()
    scaler.update()
    assert [float(p[0]) for p in params] == [1.0, 0.0, 1.0] and scaler.get_scale() == 4
    assert scaler.step_was_skipped()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_are_not_written_and_unscale_gives_fp32(dtype):
    p, opt = one(dtype)
    scaler = hs.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * p).sum()).backward()
    before = p.grad.clone()
    scaler.step(opt), scaler.update()
    assert torch.equal(p.grad, before) and (p == -1).all()
    opt.zero_grad()
    scaler.scale((p * p).sum()).backward()
    scaler.unscale_(opt)
    assert p.grad.dtype == (dtype if dtype in (torch.float32, torch.float64) else torch.float32) and (p.grad == -2).all()
    scaler.step(opt), scaler.update()
    assert (p == 1).all()
    opt.zero_grad()
    scaler.scale((p * p).sum()).backward()  # and the next backward is in the parameter's dtype again
    assert p.grad.dtype == dtype


def test_tiny_gradients_lose_nothing_through_unscale_and_clip():
    p = torch.nn.Parameter(torch.zeros(100_000).half())
    opt = hs.optim.SGD([p], lr=1.0, master="fp32")
    g = torch.randn(100_000) * 1e-7
    scaler = hs.GradScaler("cpu")
    scaler.scale((p * g).sum().float() * 0 + torch.zeros(1, requires_grad=True).sum())
    p.grad = (g * 65536).half()
    exact = p.grad.float() / 65536
    scaler.unscale_(opt)
    assert torch.equal(p.grad, exact) and (p.grad == 0).float().mean() < 1e-3
    norm = torch.nn.utils.clip_grad_norm_([p], 1e-6)
    assert norm.item() == pytest.approx(exact.double().norm().item(), rel=1e-5)
    scaler.step(opt)
    moved = opt.master_params()[0]
    assert (moved == 0).float().mean() < 1e-3


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_clip_over_several_optimizers(norm_type):
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.zeros(50)) for _ in range(2))
    x, y = (torch.nn.Parameter(torch.zeros(50)) for _ in range(2))
    ga, gb = torch.randn(50) * 3, torch.randn(50)
    opts = [hs.optim.SGD([a], lr=1.0), hs.optim.SGD([b], lr=1.0)]
    scaler = hs.GradScaler("cpu", init_scale=64.0)
    scaler.scale((a * ga).sum() + (b * gb).sum()).backward()
    grads = a.grad.clone(), b.grad.clone()
    norm = scaler.clip_grad_norm_(opts, 1.0, norm_type)
    assert torch.equal(a.grad, grads[0]) and torch.equal(b.grad, grads[1])
    for o in opts:
        scaler.step(o)
    scaler.update()
    x.grad, y.grad = ga.clone(), gb.clone()
    want = torch.nn.utils.clip_grad_norm_([x, y], 1.0, norm_type)
    assert norm.item() == pytest.approx(want.item(), rel=1e-6)
    assert torch.allclose(a, -x.grad, rtol=1e-5) and torch.allclose(b, -y.grad, rtol=1e-5)


def test_stock_optimizer_under_our_scaler_equals_torch():
    torch.manual_seed(0)
    nets = [torch.nn.Linear(8, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    scalers = hs.GradScaler("cpu", init_scale=2.0**10), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    opts = [torch.optim.AdamW(n.parameters(), lr=0.01) for n in nets]
    for step in range(20):
        x = torch.randn(4, 8)
        for net, scaler, opt in zip(nets, scalers, opts):
            opt.zero_grad()
            scaler.scale(net(x).square().sum()).backward()
            if step == 7:
                net.weight.grad[0, 0] = math.inf
            scaler.step(opt), scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0**9


def test_our_optimizer_under_the_stock_scaler():
    p, opt = one(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(p.sum()).backward()
    scaler.step(opt), scaler.update()
    assert (p == 0).all()
    p.grad[1] = math.nan
    scaler.step(opt), scaler.update()
    assert (p == 0).all() and scaler.get_scale() == 128


def test_flushing_stock_optimizer_is_warned_of_once():
    p = torch.nn.Parameter(torch.zeros(64).half())
    opt, scaler = torch.optim.SGD([p], lr=1.0), hs.GradScaler("cpu")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            opt.zero_grad()
            scaler.scale((p.float() * 1e-9).sum()).backward()
            scaler.step(opt), scaler.update()
    assert sum("small values to zero" in str(w.message) for w in seen) == 1


def test_scaled_gradients_clipped_by_hand_are_noticed():
    p, opt = one(torch.float16)
    scaler = hs.GradScaler("cpu")
    with pytest.warns(UserWarning, match="were scaled FP16 gradients clipped"):
        for _ in range(2):
            opt.zero_grad()
            scaler.scale(p.sum()).backward()
            p.grad.zero_()
            scaler.step(opt), scaler.update()


def test_sparse_gradients_under_a_stock_optimizer():
    table = torch.nn.Embedding(10, 4, sparse=True)
    opt, scaler = torch.optim.SGD(table.parameters(), lr=1.0), hs.GradScaler("cpu", init_scale=16.0)
    before = table.weight.detach().clone()
    scaler.scale(table(torch.tensor([1, 1, 3])).sum()).backward()
    scaler.step(opt), scaler.update()
    want = before.clone()
    want[1] -= 2
    want[3] -= 1
    assert torch.equal(table.weight, want)


def test_stats_name_the_first_bad_parameter():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    opt, scaler = hs.optim.AdamW(net.named_parameters(), lr=0.1), hs.GradScaler("cpu")
    assert scaler.stats().step == 0
    scaler.scale(net(torch.randn(3, 4)).sum()).backward()
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item() / 65536
    scaler.step(opt), scaler.update()
    stats = scaler.stats()
    assert (stats.step, stats.steps_applied, stats.scale, stats.first_bad_param) == (1, 1, 65536.0, None)
    assert stats.grad_norm == pytest.approx(norm, rel=1e-5) and stats.overflowed == 0
    net[1].weight.grad[0, 0] = math.inf
    scaler.step(opt), scaler.update()
    stats = scaler.stats()
    assert stats.first_bad_param == "1.weight" and stats.last_found_inf and math.isnan(stats.grad_norm) and stats.steps_skipped == 1


def test_closures_accumulation_and_new_scale():
    p, opt = one()
    scaler = hs.GradScaler("cpu", init_scale=4.0)

    def closure():
        opt.zero_grad()
        loss = scaler.scale(p.sum())
        loss.backward()
        return loss

    assert scaler.step(opt, closure) == 16
    scaler.update(new_scale=2)
    assert scaler.get_scale() == 2 and (p == 0).all()
    opt.zero_grad()
    for _ in range(3):
        scaler.scale(p.sum() / 3).backward()
    scaler.step(opt), scaler.update()
    assert torch.allclose(p, torch.full((4,), -1.0))
    with pytest.raises(ValueError, match="new_scale is 0"):
        scaler.update(0)
    with pytest.raises(TypeError, match="policy is"):
        hs.GradScaler("cpu", init_scale=2.0, policy=hs.policies.Static(2.0))


def test_disabled_is_transparent():
    p, opt = one()
    scaler = hs.GradScaler(enabled=False)
    loss = p.sum()
    assert scaler.scale(loss) is loss and scaler.get_scale() == 1.0 and scaler.state_dict() == {}
    loss.backward()
    scaler.step(opt), scaler.update()
    assert (p == 0).all()


def test_lr_schedule_follows_applied_steps():
    p, opt = one()
    scaler = hs.GradScaler("cpu")
    schedule = hs.lr_scheduler.SkipAware(torch.optim.lr_scheduler.StepLR(opt, 1, 0.5), scaler)
    for bad in (True, True, True, False, True, False):
        opt.zero_grad()
        scaler.scale(p.sum()).backward()
        if bad:
            p.grad[0] = math.inf
        scaler.step(opt), scaler.update(), schedule.step()
    assert schedule.get_last_lr() == [0.25]
