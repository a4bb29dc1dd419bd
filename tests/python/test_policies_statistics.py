"""LogMax, Occupancy and Underflow: each rule against a restatement over random gradients, and on real small nets."""

import math

import numpy
import pytest
import torch
from torch import nn

import halfstep as hs

H = torch.ops.halfstep
pytestmark = pytest.mark.smoke
TOP = 65504.0


def table(amax, subnormals=0, zeros=0, count=2000, squares=None):
    """What grad_stats says of tensors with these numbers; one value or one a tensor."""
    columns = [numpy.atleast_1d(numpy.asarray(c, float)) for c in (amax, subnormals, zeros, count, numpy.square(amax) if squares is None else squares)]
    n = max(len(c) for c in columns)
    amax, subnormals, zeros, count, squares = (numpy.broadcast_to(c, n) for c in columns)
    rows = numpy.zeros((n + 1, 8))
    rows[:-1, 1], rows[:-1, 2], rows[:-1, 3], rows[:-1, 4], rows[:-1, 5] = squares, amax, zeros, subnormals, count
    rows[-1] = rows[:-1].sum(0)
    rows[-1, 2], rows[-1, 6] = amax.max(), -1
    return torch.tensor(rows)


class Machine:
    """A policy on its own: feeds tables to the op."""

    def __init__(self, policy):
        self.policy, self.vector = policy, policy.vector()
        self.state, self.tensor = H.init_scale_state(self.vector), torch.zeros(())

    @property
    def scale(self):
        return float(self.state[0])

    def update(self, bad, *tables):
        H.advance_scale_(self.tensor, self.state, torch.tensor(float(bad)), self.vector, list(tables), None)
        assert float(self.tensor) == numpy.float32(self.scale)
        return self.scale


# -- LogMax -----------------------------------------------------------------------------------------
class LogMax:
    """The rule of OpenSeq2Seq's LogMaxScaler with its two repairs, in FP64."""

    def __init__(self, scale=1.0):
        self.scale, self.x, self.slow, self.square, self.a, self.b = scale, 0.0, 0.0, 0.0, 1.0, 1.0

    def update(self, bad, amax):
        if bad:
            x = math.log2(TOP / self.scale) + 1
        elif amax == 0:
            return self.scale
        else:
            x = math.log2(amax)
        self.x, self.a = 0.99 * self.x + 0.01 * x, self.a * 0.99
        self.slow, self.square, self.b = 0.999 * self.slow + 0.001 * x, 0.999 * self.square + 0.001 * x * x, self.b * 0.999
        mean, slow = self.x / (1 - self.a), self.slow / (1 - self.b)
        deviation = math.sqrt(max(0.0, self.square / (1 - self.b) - slow * slow))
        self.scale = float(numpy.float32(min(max(2 ** (16 - (mean + 3.09 * deviation)), 1.0), 2.0**14)))
        return self.scale


def test_log_max_is_its_rule_over_random_gradients():
    rng = numpy.random.default_rng(0)
    ours, theirs = Machine(hs.policies.LogMax()), LogMax()
    for i in range(5_000):
        bad, amax = rng.random() < 0.02, 0.0 if rng.random() < 0.05 else 2.0 ** rng.normal(4 if i > 2_500 else 8, 1.5)
        amax = min(amax, TOP / ours.scale)
        scale = ours.update(bad, table([amax * ours.scale / 3, amax * ours.scale]))
        assert abs(scale / theirs.update(bad, amax) - 1) < 1e-4
    assert 1 < scale < 2.0**14


def test_log_max_survives_what_breaks_the_original():
    """There, a gradient of zeros gives log2(0) and the scale is NaN for ever; one overflow is recorded as 2^16 at any scale, and 2^14 falls to 1."""
    machine = Machine(hs.policies.LogMax())
    for _ in range(300):
        machine.update(False, table(1e-4 * machine.scale))
    settled = machine.scale
    assert settled == 2.0**14  # at its ceiling
    for _ in range(10):
        assert machine.update(False, table(0.0)) == settled
    once = machine.update(True)
    assert once > settled / 64 and machine.update(False, table(1e-4 * once)) > settled / 64


# -- Occupancy --------------------------------------------------------------------------------------
def test_occupancy_keeps_the_top_bin_and_does_not_swing():
    """Graphcore's rule halves above the target and doubles below it, so that it never rests."""
    machine = Machine(hs.policies.Occupancy(init_scale=2.0**20, growth_interval=3))
    amax = 0.5
    scales = [machine.update(False, table(amax * machine.scale)) for _ in range(60)]
    edge = TOP / 8
    assert len(set(scales[20:])) == 1 and edge / 2 < amax * scales[-1] <= edge
    machine = Machine(hs.policies.Occupancy(init_scale=1.0, growth_interval=3))
    scales = [machine.update(False, table(amax * machine.scale)) for _ in range(100)]
    assert edge / 2 < amax * scales[-1] <= edge and len(set(scales[-30:])) == 1
    assert [s for s in scales[:7]] == [1, 1, 2, 2, 2, 4, 4]


@pytest.mark.parametrize("share,stays", [(0.5e-3, True), (4e-3, False)])
def test_occupancy_bounds_the_share_from_real_gradients(share, stays):
    """Of 100,000 gradients, `share` lie in the top bin: the bound from the sum of squares is at most a small factor above."""
    torch.manual_seed(0)
    grads = torch.rand(100_000) * 100
    grads[: int(share * 100_000)] = 9_000.0
    machine = Machine(hs.policies.Occupancy(target=1e-3, init_scale=1024.0))
    assert (machine.update(False, H.grad_stats([grads.half()], [])) == 1024) is stays
    assert share <= float(machine.state[22]) < 2 * share + 1e-3


def test_occupancy_backs_off_on_a_bad_step_and_comes_back():
    machine = Machine(hs.policies.Occupancy(init_scale=1024.0, growth_interval=4))
    assert machine.update(True) == 512
    assert [machine.update(False, table(1.0)) for _ in range(5)] == [512, 512, 512, 1024, 1024]


# -- Underflow --------------------------------------------------------------------------------------
class Underflow:
    """The rule of docs/policies.md, restated."""

    def __init__(self, p):
        self.p, self.scale, self.peak, self.bucket, self.ceiling, self.since = p, p.init_scale, 0.0, 0.0, None, 0

    def set(self, factor):
        self.scale = min(max(self.scale * factor, self.p.min_scale), self.p.max_scale)
        return self.scale

    def update(self, bad, amax, subnormals, zeros, count):
        if bad:
            self.bucket += 1
            if 0 < self.peak * self.scale * 8 <= TOP and self.bucket <= 1.5:
                return self.scale
            self.bucket, self.ceiling, self.since = 0.0, self.scale, 0
            return self.set(0.5)
        self.bucket, self.since = max(0.0, self.bucket - 1 / 40), self.since + 1
        self.peak = max(max(amax) / self.scale, 0.95 * self.peak)
        if self.since >= self.p.growth_interval:
            self.ceiling = None
        heard = [(s, n - z) for s, z, n in zip(subnormals, zeros, count) if n - z >= 1000]
        share = 0.0
        if heard:
            share = max(s / n for s, n in heard) if self.p.reduce == "worst" else sum(s for s, _ in heard) / sum(n for _, n in heard)
        if 2 * max(amax) > TOP:
            return self.set(0.5)
        if share > self.p.target and self.peak * self.scale * 2 * self.p.headroom <= TOP and (self.ceiling is None or 2 * self.scale < self.ceiling):
            return self.set(2.0)
        return self.scale


@pytest.mark.parametrize("reduce", ["worst", "weighted"])
def test_underflow_is_its_rule_over_random_gradients(reduce):
    rng = numpy.random.default_rng(1)
    policy = hs.policies.Underflow(target=1e-2, reduce=reduce, growth_interval=50)
    ours, theirs = Machine(policy), Underflow(policy)
    seen = set()
    for i in range(6_000):
        bad = rng.random() < (0.2 if i % 500 < 20 else 0.01)
        amax = numpy.minimum(2.0 ** rng.normal(-2 if i % 1000 < 500 else 3, 1, 3) * ours.scale, TOP)
        count = numpy.array([900, 5_000, 50_000])
        zeros = (count * rng.random(3) * 0.7).astype(int)
        subnormals = ((count - zeros) * rng.random(3) ** 2 * min(1.0, 0.03 * 4096 / ours.scale)).astype(int)
        scale = ours.update(bad, table(amax[:1], subnormals[:1], zeros[:1], count[:1]), table(amax[1:], subnormals[1:], zeros[1:], count[1:]))
        assert scale == theirs.update(bad, amax, subnormals, zeros, count), i
        seen.add(scale)
    assert len(seen) > 5


def test_underflow_grows_at_once_and_only_as_far_as_it_helps():
    machine, amax = Machine(hs.policies.Underflow(init_scale=1.0)), 0.01
    scales = [machine.update(False, table(amax * machine.scale, 100 if machine.scale < 256 else 1)) for _ in range(40)]
    assert scales[:9] == [2, 4, 8, 16, 32, 64, 128, 256, 256] and scales[-1] == 256
    for _ in range(5_000):  # no interval: growth that would buy nothing is not made
        machine.update(False, table(amax * 256, 1))
    assert machine.scale == 256


def test_underflow_stops_where_headroom_ends():
    machine = Machine(hs.policies.Underflow(init_scale=1.0))
    for _ in range(60):
        machine.update(False, table(2.0 * machine.scale, 500))
    assert 2.0 * machine.scale * 16 <= TOP < 4.0 * machine.scale * 16


def test_zeros_and_small_tensors_never_steer():
    machine = Machine(hs.policies.Underflow(init_scale=1024.0))
    for _ in range(100):
        machine.update(False, table([1.0, 1.0], [0, 900], [1_950_000, 0], [2_000_000, 999]))
    assert machine.scale == 1024


def test_a_corrupted_batch_is_held_against_the_batch_and_a_scale_that_overflows_against_the_scale():
    machine = Machine(hs.policies.Underflow())
    for i in range(1, 1_001):
        machine.update(i % 50 == 0, table(1e-3 * machine.scale))
    assert machine.scale == 2.0**16 and float(machine.state[5]) == 20
    machine, skips = Machine(hs.policies.Underflow()), 0
    for _ in range(2_000):  # overflows above 2^12, wanting more all the time
        bad = machine.scale > 4096
        skips += bad
        machine.update(bad, table(0.01 * machine.scale, 500))
    assert skips <= 5 and machine.scale == 4096


def test_a_scale_that_overflowed_is_tried_again_after_the_interval():
    machine = Machine(hs.policies.Underflow(growth_interval=30))
    machine.update(True)
    scales = [machine.update(False, table(1e-3 * machine.scale, 500)) for _ in range(40)]
    assert scales[:29] == [2.0**15] * 29 and scales[29] == 2.0**16


# -- in a scaler ------------------------------------------------------------------------------------
@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for layers this small, more only wait for each other
    yield
    torch.set_num_threads(threads)


def small_nets():
    torch.manual_seed(0)
    tokens = torch.randint(0, 500, (64, 16))
    embedding = nn.Sequential(nn.Embedding(500, 32), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    relu = nn.Sequential(nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return {"embedding": (embedding, tokens), "relu": (relu, torch.randn(64, 256))}


@pytest.mark.parametrize("name", ["embedding", "relu"])
@pytest.mark.parametrize("init", [2.0**16, 1.0, 2.0**24])
@pytest.mark.parametrize("reduce", ["worst", "weighted"])
def test_underflow_skips_less_than_one_step_in_200_on_nets_full_of_zeros(name, init, reduce, one_thread):
    net, x = small_nets()[name]
    hs.cast_model(net)
    opt = hs.optim.AdamW(net.named_parameters(), lr=1e-3)
    scaler = hs.GradScaler(policy=hs.policies.Underflow(reduce=reduce, init_scale=init))
    order, steps, shares, skips = torch.Generator().manual_seed(1), 400, [], 0
    targets = torch.randint(0, 10, (64,), generator=order)
    for step in range(steps + 12):
        rows = torch.randperm(64, generator=order)[:32 if name == "embedding" else 4]
        opt.zero_grad()
        with hs.autocast("cpu"):
            loss = nn.functional.cross_entropy(net(x[rows]).float(), targets[rows])
        scaler.scale(loss).backward()
        scaler.step(opt), scaler.update()
        stats = scaler.stats()
        if step == 11:
            start = stats.steps_skipped  # 2^24 is above this net's range: what it takes to come down
        shares.append((stats.zero_share, stats.subnormal_share, stats.scale))
    skips = stats.steps_skipped - start
    assert skips / steps < 1 / 200 and (init > 2.0**16 or stats.steps_skipped <= 1)
    assert max(z for z, _, _ in shares) > 0.1, "the net makes structural zeros"
    assert loss < 2.3 and (shares[-1][1] < 0.01)
    if init == 1.0:
        assert shares[-1][2] > 1.0, "subnormal gradients made it grow"


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("make", [hs.optim.SGD, torch.optim.SGD])
def test_the_scaler_shows_the_policy_gradients_that_still_carry_the_scale(make, unscale):
    policy = hs.policies.LogMax(init_scale=4.0)
    p = nn.Parameter(torch.zeros(8))
    opt, scaler, rule = make([p], lr=0.0), hs.GradScaler(policy=policy), LogMax(4.0)
    for amax in (3.0, 700.0, 0.01, 0.0, 5.0):
        p.grad = None
        (scaler.scale((p * amax).sum())).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt), scaler.update()
        assert abs(scaler.get_scale() / rule.update(False, float(numpy.float32(amax))) - 1) < 1e-6


def test_all_optimizers_of_an_update_are_seen_and_none_of_the_last():
    a, b = nn.Parameter(torch.zeros(3000)), nn.Parameter(torch.zeros(3000))
    opts = hs.optim.SGD([a], lr=0.0), hs.optim.SGD([b], lr=0.0)
    scaler = hs.GradScaler(policy=hs.policies.Underflow(init_scale=1.0))
    scaler.scale(torch.ones(()))
    for worst, expected in ((1e-6, 2.0), (0.5, 2.0), (1e-6, 4.0)):
        a.grad, b.grad = torch.full((3000,), 0.5), torch.full((3000,), worst)
        for opt in opts:
            scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == expected


@pytest.mark.parametrize("policy", [hs.policies.LogMax(init_scale=16.0, max_scale=2.0**30), hs.policies.Occupancy(), hs.policies.Underflow()])
def test_statistics_policies_resume_in_lock_step(policy):
    def run(scaler, p, opt, steps, start):
        for i in range(start, start + steps):
            rng = numpy.random.default_rng(i)
            p.grad = torch.tensor(rng.normal(size=3000) * 2.0 ** rng.normal(-8, 1) * (math.inf if rng.random() < 0.02 else 1.0), dtype=torch.float32) * scaler.scale_tensor
            scaler.step(opt), scaler.update()
            yield scaler.get_scale()

    p = nn.Parameter(torch.zeros(3000))
    opt, scaler = hs.optim.SGD([p], lr=0.0), hs.GradScaler(policy=policy)
    scaler.scale(torch.ones(()))
    list(run(scaler, p, opt, 100, 0))
    saved = scaler.state_dict()
    expected = list(run(scaler, p, opt, 100, 100))
    fresh = hs.GradScaler()
    fresh.load_state_dict(saved)
    assert fresh.policy == policy
    fresh.scale(torch.ones(()))
    assert list(run(fresh, p, opt, 100, 100)) == expected and len(set(expected)) > 1


def test_the_op_names_what_does_not_fit():
    policy = hs.policies.Underflow()
    vector = policy.vector()
    call = lambda **kw: H.advance_scale_(*{"scale": torch.zeros(()), "state": H.init_scale_state(vector), "found": torch.zeros(()), "policy": vector, "stats": [], "proposal": None, **kw}.values())
    for bad, message in [({"stats": [torch.zeros(2, 8)]}, r"advance_scale_: stats\[0\] is torch.float32\[2, 8\]"),
                         ({"stats": [table(1.0), torch.zeros(2, 7, dtype=torch.float64)]}, r"stats\[1\] is torch.float64\[2, 7\]"),
                         ({"proposal": torch.zeros(2)}, r"proposal is torch.float32\[2\]"), ({"proposal": torch.zeros((), dtype=torch.int64)}, "proposal is torch.int64"),
                         ({"policy": torch.zeros(16, dtype=torch.float64)}, r"policy is torch.float64\[16\]; expected contiguous torch.float64\[32\]")]:
        with pytest.raises(RuntimeError, match=message):
            call(**bad)
    for make, message in [(lambda: hs.policies.Underflow(target=1.0), "target is 1.0"), (lambda: hs.policies.Underflow(reduce="mean"), "reduce is 'mean'; expected 'worst' or 'weighted'"),
                          (lambda: hs.policies.Occupancy(edge=2.0), "edge is 2.0"), (lambda: hs.policies.LogMax(mean_decay=1.0), "mean_decay is 1.0"),
                          (lambda: hs.policies.LogMax(init_scale=2.0**20), "init_scale is .* max_scale is 16384"), (lambda: hs.policies.Underflow(headroom=0.5), "headroom is 0.5; expected at least 1")]:
        with pytest.raises(ValueError, match=message):
            make()
