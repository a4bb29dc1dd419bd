"""The scaler states of other projects: there and back, in lock-step after a resume, and what does not fit is refused by name."""

import numpy
import pytest
import torch

import halfstep as hs
from test_policies_user import Loop

pytestmark = pytest.mark.smoke


def resume(name, policy, split, original, load, string):
    """Runs `original` to the split, hands its state over, and returns our scales and its own after it."""
    for bad in string[:split]:
        original.update(bad)
    loop = Loop(policy)
    loop.scaler.load_state_dict(load(original))
    assert loop.scaler.get_scale() == float(original.scale)
    return [loop.step(bad) for bad in string[split:]], [float(original.update(bad)) for bad in string[split:]]


class Original:
    """The counters of one project, as its state dict has them."""

    def __init__(self, scale, interval, hysteresis=1):
        self.scale, self.interval, self.count, self.hysteresis = scale, interval, 0, hysteresis
        self.left, self.i, self.last = hysteresis, 0, -1


class Apex(Original):
    def update(self, bad):
        self.count = 0 if bad else self.count + 1
        self.scale = self.scale / 2 if bad else self.scale
        if self.count == self.interval:
            self.scale, self.count = min(self.scale * 2, 2.0**24), 0
        return self.scale

    def state(self):
        return {"loss_scaler0": {"loss_scale": self.scale, "unskipped": self.count}}


class Megatron(Original):
    def update(self, bad):
        if bad:
            self.count, self.left = 0, self.left - 1
            if self.left <= 0:
                self.scale = max(self.scale / 2, 1.0)
        else:
            self.count += 1
            if self.count == self.interval:
                self.scale, self.count, self.left = self.scale * 2, 0, self.hysteresis
        return self.scale

    def state(self):
        return {"scale": torch.tensor([self.scale]), "growth_tracker": self.count, "hysteresis_tracker": self.left}


class DeepSpeed(Original):
    def update(self, bad):
        if bad:
            self.scale, self.last = max(self.scale / 2, 1.0), self.i
        elif (q := self.i - self.last - 1) > 0 and q % self.interval == 0:
            self.scale *= 2
        self.i += 1
        return self.scale

    def state(self):
        return {"dynamic_loss_scale": True, "cur_scale": self.scale, "cur_iter": self.i, "last_overflow_iter": self.last, "scale_factor": 2.0, "scale_window": self.interval}


class Paddle(Original):
    def update(self, bad):
        if bad:
            self.count, self.left = 0, self.left - 1
            if self.left == 0:
                self.scale, self.left = self.scale / 2, self.hysteresis
        else:
            self.left, self.count = self.hysteresis, self.count + 1
            if self.count == self.interval:
                self.scale, self.count = self.scale * 2, 0
        return self.scale

    def state(self):
        return {"scale": numpy.array([self.scale], numpy.float32), "incr_ratio": 2.0, "decr_ratio": 0.5, "incr_every_n_steps": self.interval, "decr_every_n_nan_or_inf": self.hysteresis,
                "incr_count": self.count, "decr_count": self.hysteresis - self.left, "use_dynamic_loss_scaling": True}


class Modulus(Original):
    def update(self, bad):
        self.count = 0 if bad else self.count + 1
        self.scale = self.scale / 2 if bad else self.scale
        if self.count == (3 if self.scale <= 64 else self.interval):
            self.scale, self.count = min(self.scale * 2, 2.0**30), 0
        return self.scale

    def state(self):
        return {"scale": self.scale, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": self.interval, "_growth_tracker": self.count,
                "max_scale": 2.0**30, "recover_threshold": 64.0, "recover_growth_interval": 3}


EXACT = {  # format: (original, the policy it resumes under)
    "apex": (lambda: Apex(1024.0, 6), lambda: hs.policies.preset("apex", growth_interval=6)),
    "megatron": (lambda: Megatron(1024.0, 6, 2), lambda: hs.policies.preset("megatron", growth_interval=6)),
    "deepspeed": (lambda: DeepSpeed(1024.0, 6), lambda: hs.policies.preset("deepspeed")),
    "paddle": (lambda: Paddle(1024.0, 6, 2), lambda: hs.policies.preset("paddle")),
    "modulus": (lambda: Modulus(1024.0, 6), lambda: hs.policies.preset("modulus")),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("split", [0, 5, 6, 7, 13, 40])
@pytest.mark.parametrize("share", [0.08, 0.3])
def test_lock_step_after_a_resume_and_back(name, split, share):
    make, policy = EXACT[name]
    string = (numpy.random.default_rng(split).random(160) < share).tolist()
    ours, theirs = resume(name, policy(), split, make(), lambda o: o.state(), string)
    assert ours == theirs
    # Back: our state in its format goes on as it would have.
    original, loop = make(), Loop(policy())
    loop.scaler.load_state_dict(original.state())
    for bad in string[:split]:
        original.update(bad), loop.step(bad)
    exported = loop.scaler.state_dict(format=name)
    assert hs.policies.detect_format(exported) == name and set(exported) == set(original.state())
    other = Loop(policy())
    other.scaler.load_state_dict(exported, format=name)
    assert [other.step(bad) for bad in string[split:]] == [loop.step(bad) for bad in string[split:]] == [float(original.update(bad)) for bad in string[split:]]


@pytest.mark.parametrize("name,state", [("colossalai", {"scale": torch.tensor([512.0]), "growth_factor": 2.0, "backoff_factor": 0.5, "hysteresis": 2}), ("fairseq", {"loss_scale": 512.0})])
def test_formats_without_counters_begin_a_new_interval_as_their_originals_do(name, state):
    loop = Loop(hs.policies.preset(name, growth_interval=4))
    loop.step(False), loop.step(False)
    loop.scaler.load_state_dict(state)
    assert [loop.step(False) for _ in range(5)] == [512.0] * 3 + [1024.0] * 2
    assert hs.policies.import_state(loop.scaler.state_dict(name), loop.scaler.policy)["scale"] == 1024.0


def test_torchs_own_keys_are_what_torch_takes():
    loop = Loop(hs.policies.preset("torch", growth_interval=5))
    for bad in (False, True, False, False):
        loop.step(bad)
    state = loop.scaler.state_dict(format="torch")
    stock = torch.amp.GradScaler("cpu")
    stock.load_state_dict(state)
    stock.scale(torch.ones(()))
    assert set(state) == set(torch.amp.GradScaler("cpu").state_dict()) and stock.get_scale() == loop.scaler.get_scale() and stock._get_growth_tracker() == 2


def test_a_deepspeed_optimizers_real_state_is_read():
    pytest.importorskip("deepspeed", reason="an optional peer")
    from deepspeed.runtime.fp16.loss_scaler import LossScaleConfig

    config = LossScaleConfig(torch.float16, True, 1.0, None)
    state = {"dynamic_loss_scale": config.dynamic_loss_scale, "cur_scale": config.cur_scale, "cur_iter": config.cur_iter, "last_overflow_iter": config.last_overflow_iter,
             "scale_factor": config.scale_factor, "scale_window": config.scale_window}
    scaler = hs.GradScaler(policy=hs.policies.preset("deepspeed"))
    scaler.load_state_dict(state)
    assert scaler.get_scale() == 2.0**32 and scaler.policy.growth_interval == 1000


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing():
    megatron = {"scale": torch.tensor([512.0]), "growth_tracker": 3, "hysteresis_tracker": 1}
    dynamic = lambda **kw: hs.GradScaler(policy=hs.policies.Dynamic(**kw))
    for scaler, state, message in [
        (dynamic(hysteresis=2), megatron, r"load_state_dict\(megatron\): the policy has refill 'clean' but megatron's is 'growth': policies.preset\('megatron'\)"),
        (dynamic(tolerance=0.1), {"loss_scaler0": {"loss_scale": 1.0, "unskipped": 0}}, "the policy has tolerance 0.1 but apex's is 0.0"),
        (dynamic(), DeepSpeed(8.0, 5).state(), "the policy has growth_delay 0 but deepspeed's is 1"),
        (hs.GradScaler(policy=hs.policies.Underflow()), megatron, "the policy is Underflow, but the state of megatron is of a Dynamic one"),
        (dynamic(), {"loss_scaler0": {"loss_scale": 1.0, "unskipped": 0}, "loss_scaler1": {}}, "the apex state has 'loss_scaler1' beside 'loss_scaler0'"),
        (hs.GradScaler(policy=hs.policies.preset("paddle")), {**Paddle(8.0, 5).state(), "use_dynamic_loss_scaling": False}, "'use_dynamic_loss_scaling' is False"),
        (hs.GradScaler(policy=hs.policies.preset("megatron")), {**megatron, "growth_tracker": float("nan")}, "the megatron state's 'growth_tracker' is nan"),
        (hs.GradScaler(policy=hs.policies.preset("megatron")), {**megatron, "scale": torch.tensor([0.0])}, "scaler state has scale 0.0"),
        (dynamic(), {"scale": 1.0}, "scaler state has no 'growth_factor'"),
    ]:
        before = scaler.state_dict()
        with pytest.raises(ValueError, match=message):
            scaler.load_state_dict(state)
        assert scaler.state_dict() == before
    with pytest.raises(ValueError, match="the megatron state has no 'growth_tracker'"):
        dynamic().load_state_dict({"loss_scale": 1.0, "scale": 2.0}, format="megatron")
    for scaler, name, message in [(dynamic(hysteresis=2), "torch", "the policy has hysteresis 2, which torch's state cannot hold"), (dynamic(), "onnx", "format is 'onnx'; expected one of apex, colossalai"),
                                  (dynamic(growth_factor=4.0), "deepspeed", "growth_delay|one factor"), (hs.GradScaler(policy=hs.policies.Static(2.0)), "megatron", "the policy is Static")]:
        with pytest.raises(ValueError, match=message):
            scaler.state_dict(format=name)
