"""A scale for each of several losses: in lock-step with scalers of one loss each, saved, loaded, and refused where it cannot be right."""

import copy
import pickle
import warnings

import pytest
import torch

import halfstep as hs

SMALL, LARGE = 2.0**-18, 2.0**9


class Two:
    """Two models, two losses whose gradients differ by 2^27, two optimizers: as a GAN has them."""

    def __init__(self, scalers, kinds=(hs.optim.AdamW, hs.optim.SGD), dtype=torch.float16):
        torch.manual_seed(0)
        self.nets = [torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)]
        for net in self.nets:
            net.to(dtype)
        self.optimizers = [kind(net.parameters(), lr=1e-2) for kind, net in zip(kinds, self.nets)]
        self.scalers = scalers  # [(scaler, the keywords that say which loss)]
        self.log = []

    def iterate(self, i):
        generator = torch.Generator().manual_seed(i)
        # Loss 0 is left out now and then, and in one iteration overflows whatever the scale.
        active = [k for k in (0, 1) if k == 1 or i % 5 != 4]
        for k in active:
            (scaler, which), net = self.scalers[k], self.nets[k]
            x = torch.randn(16, 8, generator=generator).to(net.weight.dtype)
            self.optimizers[k].zero_grad()
            loss = net(x).float().square().mean() * (SMALL, LARGE)[k]
            scaler.scale(loss * (float("inf") if i == 7 and k == 0 else 1), **which).backward()
        for k in active:
            scaler, which = self.scalers[k]
            if i % 3 == 2 and k == 1:
                scaler.clip_grad_norm_(self.optimizers[k], 1.0, **which)
            if i % 7 == 6 and k == 0:
                scaler.unscale_(self.optimizers[k], **which)
            scaler.step(self.optimizers[k], **which)
        for scaler in {id(self.scalers[k][0]): self.scalers[k][0] for k in active}.values():
            scaler.update()
        self.log.append([(s.get_scale(**w), str(s.stats(**w)), str(s.tensor_stats(**w))) for s, w in self.scalers])
        return self

    def tensors(self):
        return [p.detach() for net in self.nets for p in net.parameters()] + [v for o in self.optimizers for state in o.state.values() for v in state.values() if torch.is_tensor(v)]


def one(**kw):
    scaler = hs.GradScaler(**{"init_scale": 2.0**14, "growth_interval": 3, **kw}, losses=2)
    return [(scaler, {"which": 0}), (scaler, {"which": 1})]


def separate(**kw):
    return [(hs.GradScaler(**{"init_scale": 2.0**14, "growth_interval": 3, **kw}), {}) for _ in range(2)]


def same(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


STOCK = (torch.optim.AdamW, torch.optim.SGD)


@pytest.mark.parametrize("kinds,dtype", [((hs.optim.AdamW, hs.optim.SGD), torch.float16), ((hs.optim.AdamW, hs.optim.SGD), torch.float32),
                                         ((hs.optim.Lion, STOCK[1]), torch.float32), (STOCK, torch.float32)])
def test_each_loss_is_in_lock_step_with_a_scaler_of_its_own(kinds, dtype):
    ours, twin = Two(one(), kinds, dtype), Two(separate(), kinds, dtype)
    for i in range(40):
        ours.iterate(i), twin.iterate(i)
        assert ours.log == twin.log, i
        same(ours.tensors(), twin.tensors())
    small, large = ours.log[-1][0][0], ours.log[-1][1][0]
    assert small >= 2.0**22  # only the small loss could grow so far
    if dtype == torch.float16:
        assert large <= 2.0**13  # the large one had to back off
    assert ours.scalers[0][0].scales.tolist() == [small, large]


@pytest.mark.parametrize("policy", [hs.policies.Underflow(least=1), hs.policies.LogMax(), hs.policies.preset("megatron", growth_interval=4)])
def test_every_policy_keeps_a_state_for_each(policy):
    ours = Two([(s := hs.GradScaler(policy=policy, losses=2), {"which": 0}), (s, {"which": 1})])
    twin = Two([(hs.GradScaler(policy=policy), {}) for _ in range(2)])
    for i in range(20):
        ours.iterate(i), twin.iterate(i)
    assert ours.log == twin.log
    same(ours.tensors(), twin.tensors())


class Halving(hs.policies.Policy):
    """Its tensor goes into the scale, so that a lost one shows."""

    init_scale = 2.0**12

    def init(self):
        return {"steps": torch.zeros((), dtype=torch.float64)}

    def update(self, state, stats):
        state["steps"] += 1
        return stats.scale * (0.5 if stats.found_inf != 0 else 1.0) + state["steps"]


@pytest.mark.parametrize("policy", [None, Halving()])
@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened(way, policy, tmp_path):
    kw = {"policy": policy, "init_scale": None, "growth_interval": None} if policy else {}
    ours, twin = Two(one(**kw)), Two(one(**kw))
    for i in range(9):
        ours.iterate(i), twin.iterate(i)
    scaler = ours.scalers[0][0]
    if way in ("state_dict", "file"):
        fresh = one(**kw)[0][0]
        state = scaler.state_dict()
        assert state["halfstep"]["format"] == 1 and len(state["halfstep"]["losses"]) == 1
        if way == "file":
            hs.save({"scaler": state}, tmp_path / "s.pt")
            state = torch.load(tmp_path / "s.pt", weights_only=True)["scaler"]
        fresh.load_state_dict(state)
        assert [fresh.get_scale(k) for k in (0, 1)] == [scaler.get_scale(k) for k in (0, 1)] and fresh.get_scale(0) != fresh.get_scale(1)
    else:
        fresh = pickle.loads(pickle.dumps(scaler)) if way == "pickle" else copy.deepcopy(scaler)
    ours.scalers = [(fresh, {"which": 0}), (fresh, {"which": 1})]
    for i in range(9, 20):
        ours.iterate(i), twin.iterate(i)
        assert [row[0] for row in ours.log[-1]] == [row[0] for row in twin.log[-1]]
    same(ours.tensors(), twin.tensors())
    assert str(fresh.state_dict()) == str(twin.scalers[0][0].state_dict())


def test_a_state_of_another_number_of_losses_is_refused_and_changes_nothing():
    two, single, three = hs.GradScaler(losses=2), hs.GradScaler(init_scale=8.0), hs.GradScaler(losses=3)
    with pytest.raises(ValueError, match=r"scaler state is of 2 losses but this GradScaler has losses=1"):
        single.load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match=r"scaler state is of 1 loss but this GradScaler has losses=2"):
        two.load_state_dict(single.state_dict())
    with pytest.raises(ValueError, match=r"scaler state is of 1 loss but this GradScaler has losses=2"):
        two.load_state_dict(torch.amp.GradScaler("cpu", init_scale=4.0).state_dict())
    with pytest.raises(ValueError, match=r"scaler state is of 2 losses but this GradScaler has losses=3"):
        three.load_state_dict(two.state_dict())
    bad = two.state_dict()
    bad["scale"] = 2.0
    bad["halfstep"]["losses"][0]["scale"] = float("inf")
    with pytest.raises(ValueError, match="scale inf"):
        two.load_state_dict(bad)
    assert [two.get_scale(k) for k in (0, 1)] == [2.0**16] * 2 and single.get_scale() == 8.0


def test_apex_states_hold_a_scaler_for_each_loss():
    scaler = hs.GradScaler(policy=hs.policies.preset("apex"), losses=2)
    scaler.load_state_dict({"loss_scaler0": {"loss_scale": 64.0, "unskipped": 3}, "loss_scaler1": {"loss_scale": 2.0**20, "unskipped": 7}})
    assert [scaler.get_scale(k) for k in (0, 1)] == [64.0, 2.0**20]
    assert scaler.state_dict(format="apex") == {"loss_scaler0": {"loss_scale": 64.0, "unskipped": 3}, "loss_scaler1": {"loss_scale": 2.0**20, "unskipped": 7}}
    with pytest.raises(ValueError, match="of 1 loss but this GradScaler has losses=2"):
        scaler.load_state_dict({"loss_scaler0": {"loss_scale": 64.0, "unskipped": 3}})
    with pytest.raises(ValueError, match="has no 'loss_scaler1'"):
        scaler.load_state_dict({"loss_scaler0": {"loss_scale": 64.0, "unskipped": 3}, "loss_scaler2": {"loss_scale": 64.0, "unskipped": 3}})
    with pytest.raises(ValueError, match="has losses=2, but the state of torch holds one scale"):
        scaler.state_dict(format="torch")


def test_one_optimizer_takes_the_gradients_of_one_scale():
    p = torch.nn.Parameter(torch.ones(4))
    opt = hs.optim.SGD([p], lr=1.0)
    scaler = hs.GradScaler(losses=2)
    scaler.scale(p.sum(), which=0).backward()
    scaler.unscale_(opt, which=0)
    for call in (lambda: scaler.unscale_(opt, which=1), lambda: scaler.step(opt, which=1), lambda: scaler.clip_grad_norm_(opt, 1.0, which=1)):
        with pytest.raises(RuntimeError, match="which is 1, but the gradients of this optimizer were unscaled with which=0"):
            call()
    assert torch.equal(p.grad, torch.ones(4)) and torch.equal(p.detach(), torch.ones(4))
    scaler.step(opt, which=0)
    scaler.update()
    assert torch.equal(p.detach(), torch.zeros(4))


def test_two_losses_summed_in_one_optimizer_share_one_which():
    """Right with one `which`; with two there is a warning that names the one not used."""
    p = torch.nn.Parameter(torch.ones(4))
    opt = hs.optim.SGD([p], lr=1.0)
    scaler = hs.GradScaler(losses=2)
    scaler.scale(p.sum(), which=0).backward()
    scaler.scale((p * 2).sum(), which=0).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(opt, which=0)
        scaler.update()
    assert torch.equal(p.detach(), torch.full((4,), -2.0))
    opt.zero_grad()
    scaler.scale(p.sum(), which=0).backward()
    scaler.scale((p * 2).sum(), which=1).backward()
    scaler.step(opt, which=1)
    with pytest.warns(UserWarning, match="loss 0 was scaled with which=0, but nothing was unscaled or stepped with which=0"):
        scaler.update()


def test_a_number_that_is_no_loss_is_refused():
    p = torch.nn.Parameter(torch.ones(4))
    opt = hs.optim.SGD([p], lr=1.0)
    for losses in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="losses is"):
            hs.GradScaler(losses=losses)
    for scaler, count in ((hs.GradScaler(losses=2), 2), (hs.GradScaler(), 1), (hs.GradScaler(losses=2, enabled=False), 2)):
        for call in (lambda w: scaler.scale(p.sum(), which=w), lambda w: scaler.unscale_(opt, which=w), lambda w: scaler.step(opt, which=w), lambda w: scaler.get_scale(w),
                     lambda w: scaler.stats(w), lambda w: scaler.tensor_stats(w), lambda w: scaler.clip_grad_norm_(opt, 1.0, which=w)):
            for which in (count, -1):
                with pytest.raises(IndexError, match=rf"which is {which}, but this GradScaler has losses={count}"):
                    call(which)
        with pytest.raises(TypeError, match="which is 'a'"):
            scaler.scale(p.sum(), which="a")


def test_skips_new_scales_and_idle_losses():
    p, q = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    first, second = hs.optim.SGD([p], lr=1.0), hs.optim.SGD([q], lr=1.0)
    scaler = hs.GradScaler(init_scale=4.0, losses=2)
    (scaler.scale(p.sum(), 0) * float("inf")).backward()
    scaler.scale(q.sum(), 1).backward()
    scaler.step(first, None, 0), scaler.step(second, None, 1)
    scaler.update()
    assert scaler.step_was_skipped() and scaler.step_was_skipped(first) and not scaler.step_was_skipped(second)
    assert scaler.scales.tolist() == [2.0, 4.0] and [scaler.stats(k).steps_skipped for k in (0, 1)] == [1, 0]
    second.zero_grad()
    scaler.scale(q.sum(), 1).backward()
    scaler.step(second, which=1)
    scaler.update()
    assert not scaler.step_was_skipped() and scaler.get_scale(0) == 2.0 and [scaler.stats(k).step for k in (0, 1)] == [1, 2]
    scaler.update(32.0)
    assert scaler.scales.tolist() == [32.0, 32.0]
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.update()
    scaler.set_growth_interval(1)
    for k, o, v in ((0, first, p), (1, second, q)):
        o.zero_grad()
        scaler.scale(v.sum(), k).backward()
        scaler.step(o, which=k)
    scaler.update()
    assert scaler.scales.tolist() == [64.0, 64.0]


def test_schedules_follow_the_loss_of_their_optimizer_and_a_recorder_refuses(tmp_path):
    two = Two(one())
    scaler = two.scalers[0][0]
    schedules = [hs.lr_scheduler.SkipAware(torch.optim.lr_scheduler.StepLR(o, 1, 0.5), scaler, which=k) for k, o in enumerate(two.optimizers)]
    for i in range(8):
        two.iterate(i)
        for schedule in schedules:
            schedule.step()
    for k in (0, 1):
        assert two.optimizers[k].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5 ** scaler.stats(k).steps_applied)
    assert scaler.stats(0).steps_applied < 8
    with pytest.raises(ValueError, match="has losses=2"):
        hs.record(scaler, tmp_path / "t")


class Fades(torch.nn.Module):
    """x, with a smaller gradient: what a deep network does to it."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return hs.functional.scale_gradient(x, self.factor)


def parts():
    torch.manual_seed(0)
    body, head = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), Fades(2.0**-20)).half(), torch.nn.Sequential(Fades(2.0**-10), torch.nn.Linear(16, 4)).half()
    return body, head, torch.randn(32, 8).half(), torch.randn(32, 4)


def test_each_part_of_a_model_has_a_scale_of_its_own():
    body, head, x, y = parts()
    scaler = hs.GradScaler("cpu", init_scale=2.0**10, growth_interval=1, losses=2)
    optimizers = [hs.optim.SGD(head.parameters(), lr=0.0), hs.optim.SGD(body.parameters(), lr=0.0)]

    def backward(of, ratio):
        [o.zero_grad() for o in optimizers]
        out = head(hs.functional.scale_gradient(body(x), ratio))
        of((out.float() - y).square().mean()).backward()

    for _ in range(60):
        backward(lambda loss: scaler.scale(loss, which=0), scaler.scales[1] / scaler.scales[0])
        scaler.step(optimizers[0], which=0), scaler.step(optimizers[1], which=1)
        scaler.update()
    # Each found its own place below 65504 / max|g|, and lost steps by its own overflows.
    s = scaler.scales / 4  # the next step but one may overflow
    assert s[1] / s[0] >= 2.0**12
    backward(lambda loss: loss * s[0], s[1] / s[0])
    got = [p.grad.double() / s[1] for p in body.parameters()] + [p.grad.double() / s[0] for p in head.parameters()]
    backward(lambda loss: loss * s[0], 1.0)
    lost = [p.grad.double() / s[0] for p in body.parameters()]
    with torch.no_grad():
        body.double(), head.double()
    x = x.double()
    backward(lambda loss: loss, 1.0)
    want = [p.grad for p in body.parameters()] + [p.grad for p in head.parameters()]
    for g, w in zip(got, want):
        assert (g - w).norm() <= 2e-3 * w.norm()
    assert all((g - w).norm() > 2e-2 * w.norm() for g, w in zip(lost, want))  # with one scale they fade


def test_a_part_that_overflows_is_skipped_alone():
    body, head, x, y = parts()
    scaler = hs.GradScaler("cpu", init_scale=2.0**8, losses=2)
    optimizers = [hs.optim.SGD(head.parameters(), lr=0.1), hs.optim.SGD(body.parameters(), lr=0.1)]
    before = [p.detach().clone() for p in body.parameters()], [p.detach().clone() for p in head.parameters()]
    out = head(hs.functional.scale_gradient(body(x), scaler.scales[1] / scaler.scales[0] * 2.0**60))
    scaler.scale((out.float() - y).square().mean(), which=0).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(optimizers[0], which=0), scaler.step(optimizers[1], which=1)
        scaler.update()
    assert scaler.step_was_skipped(optimizers[1]) and not scaler.step_was_skipped(optimizers[0])
    assert scaler.scales.tolist() == [2.0**8, 2.0**7]
    assert all(torch.equal(p, q) for p, q in zip(body.parameters(), before[0])) and not torch.equal(head[1].weight, before[1][0])


def test_scales_are_there_before_the_first_loss_where_the_device_is_known():
    first = hs.GradScaler("cpu", init_scale=8.0, losses=3)
    with torch.inference_mode():
        assert first.scales.tolist() == [8.0] * 3 and first.scale_tensor.dtype == torch.float32
    # Reading them makes nothing: what is asked of a first loss still is.
    p = torch.nn.Parameter(torch.ones(1))
    p.grad, opt = torch.ones(1), hs.optim.SGD([p], lr=1.0)
    with pytest.raises(AssertionError, match="_scale is None"):
        first.step(opt)
    with pytest.raises(ValueError, match="GradScaler was made for cpu but the loss is on meta"):
        first.scale(torch.ones((), device="meta"))
    first.scale((p * 2).sum()).backward()
    first.step(opt)
    first.update(4.0)
    later = hs.GradScaler("cpu", losses=3)
    later.load_state_dict(first.state_dict())
    assert first.scales.tolist() == later.scales.tolist() == [4.0] * 3
    for device in (None, "cpu", "cuda"):
        if device != "cuda" or not torch.cuda.is_available():
            off = hs.GradScaler(device, enabled=False, losses=2)
            assert off.scales.tolist() == [1.0, 1.0] and off.scales.dtype == torch.float32
    with pytest.raises(RuntimeError, match="scale_tensor: nothing was scaled yet"):
        hs.GradScaler(losses=2).scales
