"""Every preset in lock-step with its original, 10^5 updates inside one op: against a plain restatement of the project's own counters, and,
where it is installed, against the project itself."""

import math

import numpy
import pytest
import torch

import halfstep as hs

H = torch.ops.halfstep
pytestmark = pytest.mark.smoke
LOW, HIGH = 2.0**-126, 2.0**127
single = numpy.float32


def simulate(policy, string):
    vector = policy.vector()
    return H.simulate_scale(torch.tensor(numpy.asarray(string, numpy.float32)), vector, H.init_scale_state(vector)).tolist()


# -- the originals, restated with their own counters ------------------------------------------------
class Iterations:
    """Scalers that keep the number of this iteration and of the last bad one; Python floats."""

    first, before, offset, positive = 0, -1, 0, False
    floor, limit = None, None

    def __init__(self, scale, window, factor=2.0):
        self.scale, self.window, self.factor, self.i, self.last = scale, window, factor, self.first, self.before
        self.left = self.hysteresis = 1

    def update(self, bad):
        if bad:
            if self.left == 1:
                self.scale = max(self.scale / self.factor, self.floor)
            else:
                self.left -= 1
            self.last = self.i
        else:
            interval = self.i - self.last - self.offset
            if interval % self.window == 0 and (interval > 0 or not self.positive):
                self.grow()
        self.i += 1
        return self.scale

    def grow(self):
        self.scale, self.left = self.scale * self.factor, self.hysteresis


class DeepSpeed(Iterations):
    """FP16_Optimizer._update_scale: the interval is (iteration - last overflow) - 1."""

    floor, offset, positive = 1.0, 1, True


class DeepSpeedZero(DeepSpeed):
    """DynamicLossScaler with delayed_shift 2; raises at its floor."""

    def __init__(self, scale, window, factor=2.0):
        super().__init__(scale, window, factor)
        self.left = self.hysteresis = 2

    def update(self, bad):
        if bad and self.left == 1 and self.scale == self.floor:
            raise ArithmeticError
        return super().update(bad)


class MindSpore(Iterations):
    """DynamicLossScaleManager: iterations from 1, the last bad one 0."""

    first, before, floor = 1, 0, 1.0

    def __init__(self, scale, window, factor=2.0):
        super().__init__(scale, window, factor)
        self.skips = 0

    def update(self, bad):
        self.skips = self.skips + 1 if bad else 0
        scale = super().update(bad)
        if self.skips > 1000:
            raise ArithmeticError
        return scale


class OpenSeq2Seq(Iterations):
    """BackoffScaler: within [1, 2^14]."""

    floor = 1.0

    def grow(self):
        self.scale = min(self.scale * self.factor, 2.0**14)


class Fairseq:
    """DynamicLossScaler: tolerance as the share of overflows since the last change; an error at 1e-4."""

    def __init__(self, scale, window, factor=2.0, tolerance=0.0, threshold=None):
        self.scale, self.window, self.factor, self.tolerance, self.threshold = scale, window, factor, tolerance, threshold
        self.i, self.last_bad, self.last_change, self.overflows = 0, -1, -1, 0

    def shrink(self):
        self.scale /= self.factor
        if self.threshold is not None:
            self.scale = max(self.scale, self.threshold)

    def grow(self):
        self.scale *= self.factor

    def check_floor(self, before):
        if self.scale <= 1e-4:
            raise ArithmeticError

    def update(self, bad):
        if bad:
            before, since = self.scale, self.i - self.last_change
            self.last_bad, self.overflows = self.i, self.overflows + 1
            if self.overflows / float(since) >= self.tolerance:
                self.shrink()
                self.last_change, self.overflows = self.i, 0
            self.check_floor(before)
        elif (self.i - self.last_bad) % self.window == 0:
            self.grow()
            self.last_change = self.i
        self.i += 1
        return self.scale


class Metaseq(Fairseq):
    """The window follows the scale; below 2^-5 the scale is kept."""

    def shrink(self):
        super().shrink()
        self.window = max(int(self.window / self.factor), 1)

    def grow(self):
        super().grow()
        self.window *= self.factor

    def check_floor(self, before):
        if self.scale < 2.0**-5:
            self.scale = before


class Counter:
    """Scalers that count clean steps, in FP32."""

    floor, ceiling, guard, extra, hysteresis = 0.0, math.inf, False, 0, 1

    def __init__(self, scale, window, factor=2.0):
        self.scale, self.window, self.clean, self.bad = single(scale), window, 0, 0
        self.up, self.down = single(factor), single(1 / factor)

    def backs_off(self):
        return True

    def update(self, bad):
        with numpy.errstate(over="ignore"):
            if bad:
                self.clean = 0
                if self.backs_off():
                    self.scale = max(self.scale * self.down, single(self.floor))
            elif self.clean == self.interval() - 1 + self.extra:
                grown, self.clean = self.scale * self.up, 0
                self.scale = self.scale if self.guard and math.isinf(grown) else min(grown, single(self.ceiling))
                self.grown()
            else:
                self.clean += 1
                self.stayed()
        return float(self.scale)

    def interval(self):
        return self.window

    def grown(self):
        pass

    def stayed(self):
        pass


class Keras(Counter):
    """LossScaleOptimizer of Keras 3: no bounds."""


class TensorFlow(Counter):
    """LossScaleOptimizer of Keras 2: at least 1, no growth to infinity."""

    floor, guard = 1.0, True


class Jmp(Counter):
    floor, guard = 1.0, True


class Flax(Counter):
    """DynamicScale: whether to grow is asked before the step is counted."""

    floor, ceiling, extra = float(numpy.finfo(single).tiny), float(numpy.finfo(single).max), 1


class Paddle(Counter):
    """GradScaler: decr_every_n_nan_or_inf bad steps in a row, counted anew after each back-off."""

    every = 1

    def backs_off(self):
        self.bad = (self.bad + 1) % self.every
        return self.bad == 0

    def grown(self):
        self.bad = 0

    stayed = grown


class Paddle3(Paddle):
    every = 3


class ColossalAI(Counter):
    """DynamicGradScaler within [1, 2^32]: bad steps add up until the scale grows."""

    floor, ceiling = 1.0, 2.0**32

    def backs_off(self):
        self.bad += 1
        return self.bad >= 2

    def grown(self):
        self.bad = 0


class Modulus(Counter):
    """GradScaler of Modulus-sym: at most 2^30, an interval of its own at or below 2^6."""

    ceiling, recover_window = 2.0**30, 7

    def interval(self):
        return self.recover_window if self.scale <= 2.0**6 else self.window


CASES = {  # name: (preset, its overrides, restatement)
    "deepspeed": ("deepspeed", {}, DeepSpeed), "deepspeed_zero": ("deepspeed_zero", {}, DeepSpeedZero), "mindspore": ("mindspore", {}, MindSpore),
    "openseq2seq": ("openseq2seq", {}, OpenSeq2Seq), "fairseq": ("fairseq", {}, Fairseq),
    "fairseq, tolerance": ("fairseq", {"tolerance": 0.05}, lambda s, w: Fairseq(s, w, tolerance=0.05)),
    "fairseq, threshold": ("fairseq", {"min_scale": 1.0, "floor": "clamp"}, lambda s, w: Fairseq(s, w, threshold=1.0)),
    "metaseq": ("metaseq", {}, Metaseq), "metaseq, tolerance": ("metaseq", {"tolerance": 0.25}, lambda s, w: Metaseq(s, w, tolerance=0.25)),
    "keras": ("keras", {}, Keras), "tf": ("tf", {}, TensorFlow), "jmp": ("jmp", {}, Jmp), "flax": ("flax", {}, Flax),
    "paddle": ("paddle", {}, Paddle), "paddle, 3": ("paddle", {"hysteresis": 3}, Paddle3), "colossalai": ("colossalai", {}, ColossalAI),
    "modulus": ("modulus", {"recover_interval": 7}, Modulus),
}
every_case = pytest.mark.parametrize("case", CASES)


def strings(window, steps=100_000):
    rng = numpy.random.default_rng(5)
    at = numpy.arange(steps // 5)
    for share in (0.6, 0.1, 0.004):
        yield rng.random(steps) < share
    yield numpy.repeat(rng.random(steps // 50) < 0.3, 50)
    yield at < 0  # all clean
    yield at >= 0  # all bad
    yield at % 2 == 0
    yield at % window == window - 1  # W-1 clean steps, then a bad one: at the step that would grow
    yield at % (window + 1) == window  # bad at the step after the growth
    yield at % (window + 3) >= window + 1


def compare(policy, original, string):
    """Steps in lock-step until the original stops or leaves the range."""
    ours = simulate(policy, string)
    for i, bad in enumerate(string.tolist()):
        try:
            scale = original.update(bad)
        except ArithmeticError:
            return i, ours
        if policy.faithful_to is None and not LOW <= scale <= HIGH:
            return i, ours
        assert ours[i] == scale or math.isnan(scale) and math.isnan(ours[i]), (i, ours[i], scale)
    return len(string), ours


@every_case
@pytest.mark.parametrize("window", [1, 9, 200])
def test_lock_step(case, window):
    name, overrides, original = CASES[case]
    policy = hs.policies.preset(name, growth_interval=window, **overrides)
    compared = 0
    for string in strings(window):
        agreed, ours = compare(policy, original(policy.init_scale, window), string)
        compared += agreed
        assert all(LOW <= s <= HIGH for s in ours)
    stops = name in ("fairseq", "mindspore", "deepspeed_zero") or window < 200
    assert compared > (1_000 if stops else 100_000)


@every_case
def test_lock_step_with_the_projects_own_numbers(case):
    name, overrides, original = CASES[case]
    policy = hs.policies.preset(name, **overrides)
    rng = numpy.random.default_rng(6)
    for share in (0.0003, 0.0008):
        agreed, _ = compare(policy, original(policy.init_scale, policy.growth_interval), rng.random(100_000) < share)
        assert agreed > 20_000


@every_case
def test_faithful_goes_on_beyond_the_range(case):
    name, overrides, original = CASES[case]
    policy = hs.policies.preset(name, faithful=True, growth_interval=1, **overrides)
    up, down = numpy.zeros(1_500, bool), numpy.ones(1_500, bool)
    with numpy.errstate(all="ignore"):
        for string in (numpy.concatenate([down, up]), numpy.concatenate([up, down])):
            compare(policy, original(policy.init_scale, 1), string)
    ends = {"keras": (0.0, math.inf), "tf": (1.0, HIGH), "jmp": (1.0, HIGH), "flax": (LOW, float(numpy.finfo(single).max)), "paddle": (0.0, math.inf),
            "modulus": (0.0, 2.0**30), "colossalai": (1.0, 2.0**32), "openseq2seq": (1.0, 2.0**14), "metaseq": (2.0**-5, None)}
    for string, end in zip((down, up), ends.get(name, (None, None))):
        assert end is None or simulate(policy, string)[-1] == end


def test_keras_3_reaches_zero_and_infinity_and_ours_does_not():
    """At scale 0 the loss and the gradients are 0, 0 * inf is NaN, and nothing is found; infinity is kept for ever."""
    for string, end, mine in ((numpy.ones(400), 0.0, LOW), (numpy.zeros(400 * 1), math.inf, HIGH)):
        assert simulate(hs.policies.preset("keras", faithful=True, growth_interval=1), string)[-1] == end
        scales = simulate(hs.policies.preset("keras", growth_interval=1), string)
        assert scales[-1] == mine


def test_flax_and_deepspeed_grow_one_step_later_than_torch():
    """With an interval of 3: flax on clean steps 4, 8, 12, DeepSpeed on 4, 7, 10, torch on 3, 6, 9."""
    def grows(name):
        scales = [s / hs.policies.preset(name).init_scale for s in simulate(hs.policies.preset(name, growth_interval=3), numpy.zeros(12))]
        return [i + 1 for i, s in enumerate(scales) if s > ([1.0] + scales)[i]]

    assert (grows("flax"), grows("deepspeed"), grows("torch")) == ([4, 8, 12], [4, 7, 10], [3, 6, 9, 12])


# -- the projects themselves ------------------------------------------------------------------------
def deepspeed_zero(policy):
    pytest.importorskip("deepspeed", reason="an optional peer")
    from deepspeed.runtime.fp16 import loss_scaler

    loss_scaler.dist.get_rank = lambda: 1  # rank 0 logs every step
    scaler = loss_scaler.DynamicLossScaler(policy.init_scale, policy.growth_interval, policy.min_scale, policy.hysteresis, False)

    def update(bad):
        try:
            scaler.update_scale(bad)
        except Exception as error:
            raise ArithmeticError from error
        return scaler.cur_scale

    return update


def fairseq(policy, package="fairseq"):
    module = pytest.importorskip(f"{package}.optim.dynamic_loss_scaler", reason="an optional peer")
    scaler = module.DynamicLossScaler(init_scale=policy.init_scale, scale_window=policy.growth_interval, tolerance=policy.tolerance)

    def update(bad):
        try:
            scaler.check_overflow(math.inf if bad else 1.0)
            scaler.update()
        except OverflowError:
            pass
        except FloatingPointError as error:
            raise ArithmeticError from error
        return scaler.loss_scale

    return update


class Peer:
    def __init__(self, update):
        self.update = update


@pytest.mark.parametrize("name,overrides,make", [
    ("deepspeed_zero", {}, deepspeed_zero), ("fairseq", {}, fairseq), ("fairseq", {"tolerance": 0.05}, fairseq),
    ("metaseq", {}, lambda p: fairseq(p, "metaseq")), ("metaseq", {"tolerance": 0.25}, lambda p: fairseq(p, "metaseq"))])
@pytest.mark.parametrize("window", [9, 200])
def test_lock_step_with_the_installed_python_scalers(name, overrides, make, window):
    policy = hs.policies.preset(name, growth_interval=window, **overrides)
    assert sum(compare(policy, Peer(make(policy)), string)[0] for string in strings(window, 50_000)) > 5_000


def scanned(policy, step, state, string):
    """The original's scales over a whole string, in one compiled loop."""
    jax = pytest.importorskip("jax", reason="an optional peer")
    _, scales = jax.lax.scan(step, state, jax.numpy.asarray(string))
    return numpy.asarray(scales).tolist()


@pytest.mark.parametrize("window", [9, 200])
@pytest.mark.parametrize("name", ["flax", "jmp"])
def test_lock_step_with_installed_flax_and_jmp(name, window):
    jax = pytest.importorskip("jax", reason="an optional peer")
    policy = hs.policies.preset(name, growth_interval=window)
    if name == "flax":
        module = pytest.importorskip("flax.training.dynamic_scale", reason="an optional peer")
        state = module.DynamicScale(growth_interval=window, scale=jax.numpy.float32(policy.init_scale), fin_steps=jax.numpy.int32(0))

        def step(scale, bad):
            scale, finite, _, _ = scale.value_and_grad(lambda x: x * jax.numpy.where(bad, jax.numpy.inf, 0.0))(1.0)
            return scale.replace(fin_steps=jax.numpy.asarray(scale.fin_steps, jax.numpy.int32)), scale.scale
    else:
        jmp = pytest.importorskip("jmp", reason="an optional peer")
        state = jmp.DynamicLossScale(jax.numpy.float32(policy.init_scale), jax.numpy.int32(0), window)

        def step(scale, bad):
            scale = scale.adjust(~bad)
            return scale, scale.loss_scale

    for string in strings(window):
        theirs, ours = scanned(policy, step, state, string), simulate(policy, string)
        end = next((i for i, s in enumerate(theirs) if not LOW <= s <= HIGH), len(theirs))
        assert ours[:end] == theirs[:end] and end > 100


def test_lock_step_with_installed_keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="an optional peer")
    if keras.config.backend() != "torch":
        pytest.skip("keras runs on another backend in this process")
    policy = hs.policies.preset("keras", growth_interval=4)
    variable = keras.Variable(numpy.zeros((), numpy.float32))
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), policy.init_scale, 4)
    flags = {bad: [torch.tensor(math.inf if bad else 0.0)] for bad in (False, True)}
    string = numpy.random.default_rng(7).random(3_000) < 0.17
    ours = simulate(policy, string)
    for i, bad in enumerate(string.tolist()):
        scaler.apply(flags[bad], [variable])
        assert ours[i] == float(scaler.dynamic_scale.value)
