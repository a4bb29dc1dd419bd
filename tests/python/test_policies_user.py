"""Policies of the user, the skip limit, and what the host does when it learns of a step."""

import math
import pickle

import numpy
import pytest
import torch

import halfstep as hs

H = torch.ops.halfstep
pytestmark = pytest.mark.smoke


class Torch(hs.policies.Policy):
    """torch's rule in a dozen lines, on the device."""

    max_scale, min_scale = 2.0**127, 2.0**-126

    def __init__(self, interval=2000):
        self.interval = interval

    def init(self):
        return {"clean": torch.zeros(())}

    def update(self, state, stats):
        bad = stats.found_inf != 0
        clean = torch.where(bad, 0.0, state["clean"] + 1)
        grow = clean >= self.interval
        state["clean"] = torch.where(grow, 0.0, clean)
        return stats.scale * torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0))


class OnHost(Torch):
    """The same with numbers."""

    host = True

    def update(self, state, stats):
        state["clean"] = 0 if stats.last_found_inf else state["clean"] + 1
        if state["clean"] >= self.interval:
            state["clean"] = 0
            return stats.scale * 2
        return stats.scale * 0.5 if stats.last_found_inf else stats.scale


class Loop:
    """A scaler over one parameter whose gradients are told."""

    def __init__(self, policy):
        self.p = torch.nn.Parameter(torch.zeros(2))
        self.opt, self.scaler = hs.optim.SGD([("w", self.p)], lr=0.0), hs.GradScaler(policy=policy)
        self.scaler.scale(torch.ones(()))

    def step(self, bad, value=1.0):
        self.p.grad = torch.full((2,), math.nan if bad else value)
        self.scaler.step(self.opt), self.scaler.update()
        return self.scaler.get_scale()


@pytest.mark.parametrize("make", [Torch, OnHost])
def test_torchs_rule_as_a_policy_of_the_user_is_in_lock_step(make):
    rng = numpy.random.default_rng(0)
    loop, scale, tracker = Loop(make(4)), torch.tensor(65536.0), torch.zeros((), dtype=torch.int32)
    for bad in (rng.random(1_500) < 0.2).tolist() + [True] * 150 + [False] * 1_200:
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(bad)), 2.0, 0.5, 4)
        if scale < 2.0**-126:
            scale.fill_(2.0**-126)
        assert loop.step(bad) == float(scale)
    assert float(scale) == 2.0**127
    stats = loop.scaler.stats()
    assert stats.steps_applied + stats.steps_skipped == 2_850 and stats.consecutive_skips == 0


def test_a_long_string_on_its_own_equals_torch():
    policy, scale, state, steps = Torch(5), torch.tensor(65536.0), torch.zeros(()), numpy.random.default_rng(1).random(20_000) < 0.15
    vector = policy.vector()
    numbers, user, tracker = H.init_scale_state(vector), hs.policies.make_state(policy, "cpu"), torch.zeros((), dtype=torch.int32)
    mine, flags = torch.tensor(65536.0), (torch.tensor(0.0), torch.tensor(1.0))
    for bad in steps.tolist():
        hs.policies.advance(policy, vector, mine, numbers, user, flags[bad])
        torch._amp_update_scale_(scale, tracker, flags[bad], 2.0, 0.5, 5)
        assert mine == scale


@pytest.mark.parametrize("make", [Torch, OnHost])
def test_its_state_is_checkpointed_and_resumes(make):
    string = (numpy.random.default_rng(2).random(60) < 0.2).tolist()
    whole, first, second = Loop(make(3)), Loop(make(3)), Loop(make(3))
    expected = [whole.step(bad) for bad in string]
    for bad in string[:25]:
        first.step(bad)
    state = first.scaler.state_dict()
    assert state["halfstep"]["policy_state"]["clean"] == first.scaler._user["clean"]
    second.scaler.load_state_dict(state)
    third = hs.GradScaler(policy=make(3))  # before its device is known
    third.load_state_dict(state)
    assert third.state_dict()["halfstep"]["policy_state"] == state["halfstep"]["policy_state"]
    copy = Loop(make(3))
    copy.scaler = pickle.loads(pickle.dumps(first.scaler))
    copy.scaler.scale(torch.ones(()))
    for loop in (second, copy):
        assert [loop.step(bad) for bad in string[25:]] == expected[25:]


def test_tensors_keep_their_place_so_that_a_graph_can_be_replayed():
    loop = Loop(Torch(3))
    place = loop.scaler._user["clean"]
    loop.step(False)
    assert loop.scaler._user["clean"] is place and float(place) == 1


class Says(hs.policies.Policy):
    min_scale, max_scale = 2.0**-4, 2.0**20

    def __init__(self, answer, host=False):
        self.answer, self.host = answer, host

    def update(self, state, stats):
        return self.answer if self.host else torch.as_tensor(self.answer)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("answer,scale", [(3.0, 3.0), (0.0, 65536.0), (-1.0, 65536.0), (math.nan, 65536.0), (math.inf, 65536.0), (1e-9, 2.0**-4), (1e9, 2.0**20)])
def test_floor_ceiling_and_finiteness_are_the_scalers(host, answer, scale):
    loop = Loop(Says(answer, host))
    assert loop.step(False) == scale and loop.scaler.state_dict()["halfstep"]["state"][0] == scale


def test_the_scale_that_unscales_is_latched_before_the_policy_runs():
    p = torch.nn.Parameter(torch.zeros(1))
    opt, scaler = hs.optim.SGD([p], lr=1.0), hs.GradScaler(policy=Says(1024.0))
    for _ in range(2):
        scaler.scale(p.sum()).backward()
        scaler.step(opt), scaler.update(), opt.zero_grad()
    assert p.item() == -2.0


def test_what_a_policy_sees():
    seen = {}

    class Looks(hs.policies.Policy):
        def update(self, state, stats):
            seen.update(amax=float(stats.amax), norm=float(stats.grad_norm), zeros=float(stats.zero_share), subnormal=float(stats.subnormal_share), scale=float(stats.scale), bad=float(stats.found_inf))
            return stats.scale

    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    opt, scaler = hs.optim.SGD([p], lr=0.0), hs.GradScaler(init_scale=None, policy=Looks())
    scaler.scale(torch.ones(()))
    p.grad = torch.tensor([0.0, 3.0, 4.0, 2.0**-20]).half()
    scaler.step(opt), scaler.update()
    assert seen == {"amax": 4 / 65536, "norm": math.hypot(3.0, 4.0, 2.0**-20) / 65536, "zeros": 0.25, "subnormal": 1 / 3, "scale": 65536.0, "bad": 0.0}


def test_mistakes_are_named_and_leave_the_scaler_usable():
    for answer, message in ((None, "Wrong.update returned None; expected the scale as a 0-d"), (torch.zeros(3), "Wrong.update returned tensor")):
        class Wrong(hs.policies.Policy):
            def update(self, state, stats):
                return answer
        loop = Loop(Wrong())
        with pytest.raises(TypeError, match=message):
            loop.step(False)

    class Nothing(hs.policies.Policy):
        pass
    with pytest.raises(NotImplementedError, match="Nothing has no update"):
        Loop(Nothing()).step(False)
    saved = Loop(Torch(3)).scaler.state_dict()
    with pytest.raises(ValueError, match="scaler state is of a Policy of yours but this GradScaler has a policy of halfstep"):
        hs.GradScaler().load_state_dict(saved)
    with pytest.raises(ValueError, match="of a policy of halfstep but this GradScaler has a Policy of yours"):
        hs.GradScaler(policy=Torch(3)).load_state_dict(hs.GradScaler().state_dict())

    class Other(Torch):
        def init(self):
            return {"steps": torch.zeros(())}
    with pytest.raises(ValueError, match=r"scaler state has no 'steps' of the policy \(keys: clean\)"):
        hs.GradScaler(policy=Other(3)).load_state_dict(saved)


# -- the skip limit ---------------------------------------------------------------------------------
def test_hold_stays_at_the_floor_and_goes_on():
    loop = Loop(hs.policies.Dynamic(init_scale=8.0, min_scale=2.0, skip_limit=3))
    assert [loop.step(True) for _ in range(8)] == [4.0] + [2.0] * 7
    assert loop.scaler.stats().consecutive_skips == 8 and loop.step(False) == 2.0


def test_raise_at_more_skips_in_a_row_than_the_limit_and_again_at_each_further_one():
    loop = Loop(hs.policies.Dynamic(skip_limit=3, on_limit="raise"))
    for _ in range(2):
        for _ in range(3):
            loop.step(True)
        loop.step(False)
    for skips in (1, 2, 3):
        loop.step(True)
    for skips in (4, 5):
        with pytest.raises(RuntimeError, match=rf"update: the loss scale is \S+ after {skips} skipped steps in a row \(skip_limit is 3\)"):
            loop.step(True)
    before = loop.scaler.get_scale()
    assert loop.step(False) == before  # the scaler stands between two iterations


def test_a_callback_is_told_and_training_goes_on():
    told = []
    loop = Loop(hs.policies.Dynamic(skip_limit=2, on_limit=told.append))
    for bad in (True, True, False, True, True, True, True, False, False):
        loop.step(bad)
    assert [(s.consecutive_skips, s.step) for s in told] == [(3, 6), (4, 7)] and told[0].scale == 2.0**11


@pytest.mark.parametrize("name,skips", [("deepspeed_zero", 18), ("fairseq", 29), ("mindspore", 1001)])
def test_presets_raise_where_their_originals_do(name, skips):
    """DeepSpeed's ZeRO scaler at its floor, fairseq at 1e-4, MindSpore after more than 1,000 skips."""
    loop = Loop(hs.policies.preset(name))
    for _ in range(skips - 1):
        loop.step(True)
    with pytest.raises(RuntimeError, match="its floor, and the gradients still overflow" if name != "mindspore" else "after 1001 skipped steps"):
        loop.step(True)


def test_the_limit_is_known_to_a_scaler_that_was_resumed():
    told = []
    first = Loop(hs.policies.Dynamic(skip_limit=2, on_limit="raise"))
    first.step(True), first.step(True)
    second = Loop(hs.policies.Dynamic())
    second.scaler.load_state_dict(first.scaler.state_dict())
    with pytest.raises(RuntimeError, match="after 3 skipped steps"):
        second.step(True)
    called = Loop(hs.policies.Dynamic(skip_limit=2, on_limit=told.append))
    called.step(True), called.step(True)
    state = called.scaler.state_dict()
    third = Loop(hs.policies.Dynamic(on_limit=told.append))
    third.scaler.load_state_dict(state)  # the callback is this scaler's, the limit the file's
    third.step(True)
    assert len(told) == 1
    without = Loop(hs.policies.Dynamic())
    without.scaler.load_state_dict(state)
    without.step(True)


def test_megatrons_hysteresis_paddles_and_apexs_are_three_rules():
    """Megatron's doc-string says consecutive infs; its code refills on growth only. Paddle's are consecutive, and start anew at a back-off."""
    string = [True, False, True, True, True, True, False, True]
    scales = {refill: H.simulate_scale(torch.tensor(string).float(), p.vector(), H.init_scale_state(p.vector())).tolist()
              for refill in ("clean", "growth", "backoff") for p in [hs.policies.Dynamic(init_scale=1024.0, hysteresis=2, refill=refill)]}
    assert scales == {"clean": [1024, 1024, 1024, 512, 256, 128, 128, 128], "growth": [1024, 1024, 512, 256, 128, 64, 64, 32],
                      "backoff": [1024, 1024, 1024, 512, 512, 256, 256, 256]}


def test_a_vector_of_sixteen_numbers_is_read_as_it_was():
    loop = Loop(hs.policies.Dynamic(growth_interval=3, hysteresis=2, refill="growth"))
    for bad in (False, True, False, False):
        loop.step(bad)
    state = loop.scaler.state_dict()
    short = {**state, "halfstep": {**state["halfstep"], "state": state["halfstep"]["state"][:16], "policy": state["halfstep"]["policy"][:16]}}
    other = Loop(hs.policies.Dynamic())
    other.scaler.load_state_dict(short)
    assert other.scaler.policy == loop.scaler.policy
    for bad in (False, True, False, True, True):
        assert other.step(bad) == loop.step(bad)
    for wrong in (15, 33):
        with pytest.raises(ValueError, match="expected a list of 16 to 32 numbers"):
            other.scaler.load_state_dict({**state, "halfstep": {**state["halfstep"], "state": [0.0] * wrong}})
