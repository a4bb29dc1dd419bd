"""Presets in lock-step with their originals, inside one op: torch against torch itself, Megatron and apex against restatements."""

import inspect
import math

import numpy
import pytest
import torch

import halfstep as hs

H = torch.ops.halfstep
pytestmark = pytest.mark.smoke
LOW, HIGH = 2.0**-126, 2.0**127


def simulate(policy, string):
    return H.simulate_scale(torch.tensor(numpy.asarray(string, numpy.float32)), policy.vector(), H.init_scale_state(policy.vector())).tolist()


class Torch:
    """torch.amp's own op; rounds to FP32 as it does."""

    def __init__(self, policy):
        self.scale, self.tracker = torch.tensor(policy.init_scale, dtype=torch.float32), torch.zeros((), dtype=torch.int32)
        self.args, self.flags = (policy.growth_factor, policy.backoff_factor, policy.growth_interval), (torch.tensor(0.0), torch.tensor(1.0))

    def update(self, bad):
        torch._amp_update_scale_(self.scale, self.tracker, self.flags[bad], *self.args)
        return float(self.scale)


class Megatron:
    """DynamicGradScaler: a bad step uses hysteresis up, which only growth refills; floor 1, no ceiling."""

    def __init__(self, policy):
        self.scale, self.p, self.growth, self.left = numpy.float32(policy.init_scale), policy, 0, policy.hysteresis

    def update(self, bad):
        with numpy.errstate(over="ignore"):
            if bad:
                self.growth, self.left = 0, self.left - 1
                if self.left <= 0:
                    self.scale = max(self.scale * numpy.float32(self.p.backoff_factor), numpy.float32(self.p.min_scale))
            else:
                self.growth += 1
                if self.growth == self.p.growth_interval:
                    self.growth, self.left = 0, self.p.hysteresis
                    self.scale = self.scale * numpy.float32(self.p.growth_factor)
        return float(self.scale)


class Apex:
    """amp's LossScaler: Python floats, halved without a floor, doubled up to 2^24."""

    def __init__(self, policy):
        self.scale, self.p, self.unskipped = policy.init_scale, policy, 0

    def update(self, bad):
        if bad:
            self.scale, self.unskipped = self.scale * self.p.backoff_factor, 0
        else:
            self.unskipped += 1
        if self.unskipped == self.p.growth_interval:
            self.scale, self.unskipped = min(2.0**24, self.scale * self.p.growth_factor), 0
        return self.scale


ORIGINALS = {"torch": Torch, "megatron": Megatron, "apex": Apex}
every_preset = pytest.mark.parametrize("name", ORIGINALS)


def long_strings(interval):
    rng = numpy.random.default_rng(0)
    for share in (0.5, 0.1, 0.01, 0.001):
        yield f"{share:g} bad", rng.random(100_000) < share
    yield "bursts", numpy.repeat(rng.random(2_000) < 0.3, 50)
    yield "all bad", numpy.ones(300, bool)
    yield "all clean", numpy.zeros(300 * interval, bool)[:100_000]
    yield "alternating", numpy.arange(100_000) % 2 == 0
    yield "bad at the growing step", numpy.arange(100_000) % interval == interval - 1
    yield "bad after growing", numpy.arange(100_000) % (interval + 1) == interval
    yield "two bad after growing", numpy.arange(100_000) % (interval + 2) >= interval


def compare(policy, original, string):
    """Steps that agreed until the original's scale left the range; from there on ours is at a bound or on its way back."""
    ours, theirs = simulate(policy, string), original(policy)
    for i, bad in enumerate(string):
        scale = theirs.update(int(bad))
        if not LOW <= scale <= HIGH:
            return i, ours, True
        assert ours[i] == scale, (i, ours[i], scale)
    return len(string), ours, False


@every_preset
@pytest.mark.parametrize("interval", [1, 20, 2000])
@pytest.mark.parametrize("growth,backoff", [(2.0, 0.5), (1.75, 0.375), (4.0, 0.25)])
def test_long_strings_are_bit_equal_while_the_scale_is_in_range(name, interval, growth, backoff):
    """100,000 updates each, random and adversarial."""
    if name == "apex" and growth == 1.75:
        pytest.skip("apex has one factor and its inverse")
    compared = 0
    for what, string in long_strings(interval):
        policy = hs.policies.preset(name, growth_interval=interval, growth_factor=growth, backoff_factor=backoff)
        agreed, ours, left = compare(policy, ORIGINALS[name], string.tolist())
        compared += agreed
        assert all(LOW <= s <= HIGH for s in ours), what
        assert agreed == len(string) or left, what
    assert compared > 100_000 or interval < 2000


@every_preset
def test_twenty_thousand_short_strings(name):
    """Every length, share of bad steps and starting scale, down to and up to the bounds."""
    rng = numpy.random.default_rng(1)
    steps, left = 0, 0
    for i in range(20_000):
        power = int(rng.integers(-120, 120)) if name == "torch" else int(rng.integers(1, 24))
        policy = hs.policies.preset(name, init_scale=2.0**power, growth_interval=int(rng.integers(1, 6)))
        string = (rng.random(int(rng.integers(1, 24))) < rng.random()).tolist()
        agreed, _, out = compare(policy, ORIGINALS[name], string)
        steps, left = steps + agreed, left + out
    assert steps > 150_000 and (left > 0) == (name == "torch")


def test_torch_itself_on_a_hundred_thousand_strings_by_their_last_scale():
    rng = numpy.random.default_rng(2)
    policy = hs.policies.preset("torch", growth_interval=3)
    theirs, vector, state = Torch(policy), policy.vector(), H.init_scale_state(policy.vector())
    for i in range(100_000):
        string = rng.random(8) < 0.4
        theirs.scale.fill_(65536.0), theirs.tracker.zero_()
        for bad in string.tolist():
            torch._amp_update_scale_(theirs.scale, theirs.tracker, theirs.flags[bad], *theirs.args)
        assert H.simulate_scale(torch.from_numpy(string.astype(numpy.float32)), vector, state)[-1] == theirs.scale.double()


def test_the_scaler_is_in_lock_step_with_torchs_class():
    rng = numpy.random.default_rng(3)
    ours, theirs = hs.GradScaler(policy=hs.policies.preset("torch", growth_interval=4)), torch.amp.GradScaler("cpu", growth_interval=4)
    p, q = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    opts = hs.optim.SGD([p], lr=0.0), torch.optim.SGD([q], lr=0.0)
    ours.scale(torch.ones(())), theirs.scale(torch.ones(()))
    for bad in rng.random(2_000) < 0.15:
        for w, opt, scaler in ((p, opts[0], ours), (q, opts[1], theirs)):
            w.grad = torch.full((1,), math.inf if bad else 1.0)
            scaler.step(opt), scaler.update()
        assert ours.get_scale() == theirs.get_scale() and ours._get_growth_tracker() == theirs._get_growth_tracker()


@every_preset
def test_at_a_bound_the_scale_stays_and_recovers(name):
    policy = hs.policies.preset(name, growth_interval=1)
    down, up = simulate(policy, [True] * 400 + [False] * 400), simulate(policy, [False] * 400 + [True] * 400)
    low, high = max(policy.min_scale, LOW), min(policy.max_scale, HIGH)
    assert down[399] == low and down[400] == 2 * low and down[-1] == high
    assert up[399] == high and up[400 if policy.hysteresis == 1 else 401] == high / 2 and up[-1] == low


@every_preset
def test_faithful_goes_on_as_the_original_does(name):
    policy = hs.policies.preset(name, faithful=True, growth_interval=1)
    for string in ([True] * 1200 + [False] * 400, [False] * 400 + [True] * 1200 + [False] * 10, (numpy.random.default_rng(4).random(20_000) < 0.6).tolist()):
        ours, theirs = simulate(policy, string), ORIGINALS[name](policy)
        for i, bad in enumerate(string):
            scale = theirs.update(int(bad))
            assert ours[i] == scale or (math.isnan(ours[i]) and math.isnan(scale)), (i, ours[i], scale)
    ends = {"torch": (0.0, 2.0**127), "megatron": (1.0, math.inf), "apex": (0.0, 2.0**24)}[name]
    assert (simulate(policy, [True] * 1200)[-1], simulate(policy, [False] * 400)[-1]) == ends


def test_hysteresis_is_refilled_as_each_project_does():
    """Megatron's doc-string says consecutive infs; its code refills on growth only. apex's kernel refills on each clean step."""
    string = [True, False, False, True, True, False, True]
    growth = hs.policies.Dynamic(init_scale=1024.0, growth_interval=1000, hysteresis=2, refill="growth")
    clean = hs.policies.Dynamic(init_scale=1024.0, growth_interval=1000, hysteresis=2, refill="clean")
    assert simulate(growth, string) == [1024, 1024, 1024, 512, 256, 256, 128]
    assert simulate(clean, string) == [1024, 1024, 1024, 1024, 512, 512, 512]


def test_every_preset_has_its_projects_numbers():
    numbers = lambda p: (p.init_scale, p.growth_factor, p.backoff_factor, p.growth_interval, p.min_scale, p.max_scale, p.hysteresis, p.refill)
    assert numbers(hs.policies.preset("torch")) == (65536, 2, 0.5, 2000, LOW, HIGH, 1, "clean")
    assert numbers(hs.policies.preset("apex")) == (65536, 2, 0.5, 2000, LOW, 2.0**24, 1, "clean")
    assert numbers(hs.policies.preset("megatron")) == (2.0**32, 2, 0.5, 1000, 1, HIGH, 2, "growth")
    assert numbers(hs.policies.Dynamic()) == numbers(hs.GradScaler().policy) == (65536, 2, 0.5, 2000, 2.0**-14, HIGH, 1, "clean")


def test_the_signature_and_its_refusals():
    parameters = inspect.signature(hs.policies.preset).parameters
    assert list(parameters) == ["name", "faithful", "overrides"] and parameters["faithful"].default is False
    assert hs.policies.preset("megatron", hysteresis=5).hysteresis == 5 and hs.policies.preset("apex", False, max_scale=8.0, init_scale=8.0).max_scale == 8
    for call, kind, message in [
        (lambda: hs.policies.preset("tensorflow"), ValueError, "policy preset 'tensorflow' is unknown; known: apex, colossalai, deepspeed, deepspeed_zero, fairseq, flax, jmp, keras, megatron"),
        (lambda: hs.policies.preset("torch", window=3), TypeError, "window"),
        (lambda: hs.policies.preset("torch", growth_interval=0), ValueError, "growth_interval is 0; expected at least 1"),
        (lambda: hs.policies.Static(0.0), ValueError, "scale is 0.0; expected a positive finite number"),
        (lambda: hs.policies.Static(2.0**-127), ValueError, r"scale is .*; expected between 2\^-126 and 2\^127"),
        (lambda: hs.policies.Dynamic(init_scale=math.nan), ValueError, "init_scale is nan"),
        (lambda: hs.policies.Dynamic(init_scale=2.0**-20), ValueError, "init_scale is .* but min_scale is 6.103515625e-05 and max_scale is"),
        (lambda: hs.policies.Dynamic(min_scale=math.nan), ValueError, "min_scale is nan but max_scale is"),
        (lambda: hs.policies.Dynamic(growth_factor=1.0), ValueError, "growth_factor is 1.0; expected more than 1"),
        (lambda: hs.policies.Dynamic(backoff_factor=1.0), ValueError, "backoff_factor is 1.0; expected between 0 and 1"),
        (lambda: hs.policies.Dynamic(hysteresis=0), ValueError, "hysteresis is 0; expected at least 1"),
        (lambda: hs.policies.Dynamic(refill="never"), ValueError, "refill is 'never'; expected 'clean', 'growth' or 'backoff'"),
        (lambda: hs.policies.Dynamic(faithful_to="jax"), ValueError, "faithful_to is 'jax'; expected None, 'torch', 'megatron' or 'apex'"),
        (lambda: hs.policies.Dynamic(tolerance=1.5), ValueError, "tolerance is 1.5; expected from 0 to 1"),
        (lambda: hs.policies.Dynamic(skip_limit=0), ValueError, "skip_limit is 0; expected at least 1"),
        (lambda: hs.policies.Dynamic(on_limit="stop"), ValueError, "on_limit is 'stop'; expected 'hold', 'raise' or a callable"),
        (lambda: hs.policies.Dynamic(growth_delay=-1), ValueError, "growth_delay is -1; expected at least 0"),
        (lambda: hs.policies.Dynamic(floor="stay"), ValueError, "floor is 'stay'; expected 'clamp' or 'keep'"),
        (lambda: hs.policies.Dynamic(arithmetic="half"), ValueError, "arithmetic is 'half'; expected 'rounded', 'single' or 'double'"),
        (lambda: hs.GradScaler(init_scale=0.0), ValueError, "init_scale is 0.0"),
        (lambda: hs.GradScaler(init_scale=math.inf), ValueError, "init_scale is inf"),
        (lambda: hs.GradScaler(growth_factor=0.5), ValueError, "growth_factor is 0.5"),
    ]:
        with pytest.raises(kind, match=message):
            call()


def test_update_equals_simulation_and_any_flag_but_zero_is_bad():
    policy = hs.policies.preset("megatron", growth_interval=3).vector()
    flags = torch.tensor([0.0, 1, 1, 0, 0, 0, 2, float("nan"), 0])
    state, scale = H.init_scale_state(policy), torch.zeros(())
    start = state.clone()
    simulated = H.simulate_scale(flags, policy, state)
    assert torch.equal(state, start)
    for i, flag in enumerate(flags):
        H.update_scale_(scale, state, flag, policy)
        assert scale.double() == simulated[i]
    assert state[5] == 4 and state[4] == 5  # skipped, applied
