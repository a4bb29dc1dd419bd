"""The loss-scale state machine: torch's preset in lock-step with torch.amp over long strings, inside one op."""

import numpy
import pytest
import torch

import halfstep as hs

H = torch.ops.halfstep
pytestmark = pytest.mark.smoke


def strings(interval):
    rng = numpy.random.default_rng(0)
    for share in (0.5, 0.1, 0.01, 0.001):
        yield rng.random(100_000) < share
    yield numpy.ones(300, bool)
    yield numpy.zeros(3000, bool)
    yield numpy.arange(5000) % 2 == 0
    yield numpy.arange(5000) % interval == interval - 1
    yield numpy.arange(5000) % (interval + 1) == interval


@pytest.mark.parametrize("interval", [1, 20, 2000])
@pytest.mark.parametrize("growth,backoff", [(2.0, 0.5), (1.7, 0.3)])
def test_torch_preset_is_bit_equal_to_torch(interval, growth, backoff):
    policy = hs.policies.preset("torch", growth_interval=interval, growth_factor=growth, backoff_factor=backoff)
    compared = 0
    for string in strings(interval):
        ours = H.simulate_scale(torch.from_numpy(string.astype(numpy.float32)), policy.vector(), H.init_scale_state(policy.vector()))
        scale, tracker = torch.tensor(65536.0), torch.zeros((), dtype=torch.int32)
        for i, bad in enumerate(string.tolist()):
            torch._amp_update_scale_(scale, tracker, torch.tensor(float(bad)), growth, backoff, interval)
            if not 2.0**-126 <= float(scale) <= 2.0**127:
                break
            assert ours[i] == scale.double(), (i, ours[i], scale)
            compared += 1
            if i == 20_000:  # the op runs the whole string; torch's own steps are the slow side here
                break
    assert compared > 1_000


def test_at_its_bounds_the_scale_stays_and_recovers():
    policy = hs.policies.preset("torch", growth_interval=1)
    down_up = torch.cat([torch.ones(400), torch.zeros(600)])
    ours = H.simulate_scale(down_up, policy.vector(), H.init_scale_state(policy.vector()))
    assert ours[399] == 2.0**-126 and ours[-1] == 2.0**127 and ours[400] == 2.0**-125


def test_update_equals_simulation_and_leaves_what_it_should():
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


def test_policies_refuse_nonsense():
    for kw, message in [(dict(growth_factor=1.0), "growth_factor is 1.0"), (dict(backoff_factor=1.5), "backoff_factor is 1.5"),
                        (dict(init_scale=0), "init_scale is 0"), (dict(refill="x"), "refill is 'x'"), (dict(min_scale=4, max_scale=2), "min_scale is 4 but max_scale is 2")]:
        with pytest.raises(ValueError, match=message):
            hs.policies.Dynamic(**kw)
    with pytest.raises(ValueError, match="preset 'nope' is unknown"):
        hs.policies.preset("nope")
