"""Loss-scaling policies: each fills the numbers of csrc/math/scale.h; the rule itself runs on the device. docs/policies.md."""

from dataclasses import dataclass, replace

import torch

from ._library import H

LOWEST_SCALE, HIGHEST_SCALE = 2.0**-126, 2.0**127
ENTRIES = 32
_REFILL = {"clean": 0, "growth": 1, "backoff": 2}
_BOUNDS = {None: 0, "torch": 1, "megatron": 2, "apex": 3}
_ARITHMETIC = {"rounded": 0, "single": 1, "double": 2}
_FLOOR = {"clamp": 0, "keep": 1}
_REDUCE = {"worst": 0, "weighted": 1}
_STATIC, _DYNAMIC, _LOG_MAX, _OCCUPANCY, _UNDERFLOW, _CUSTOM = range(6)


def _vector(entries):
    """The policy's numbers from {index: value} (PolicyEntry of csrc/math/scale.h)."""
    vector = torch.zeros(ENTRIES, dtype=torch.float64)
    for index, value in entries.items():
        vector[index] = float(value)
    return vector


def _positive(name, value):
    if not (0 < float(value) < float("inf")):
        raise ValueError(f"{name} is {value}; expected a positive finite number")


def _usable(name, value):
    _positive(name, value)
    if not (LOWEST_SCALE <= float(value) <= HIGHEST_SCALE):
        raise ValueError(f"{name} is {value}; expected between 2^-126 and 2^127, where it and its reciprocal are finite in FP32")


def _at_least(least, /, **numbers):
    for name, value in numbers.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}; expected at least {least}")


def _fraction(**numbers):
    for name, value in numbers.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}; expected between 0 and 1")


def _one_of(choices, **names):
    for name, value in names.items():
        if value not in choices:
            listed = [repr(c) for c in choices]
            raise ValueError(f"{name} is {value!r}; expected {', '.join(listed[:-1])} or {listed[-1]}")


def _range(policy):
    if not policy.min_scale <= policy.max_scale:
        raise ValueError(f"min_scale is {policy.min_scale} but max_scale is {policy.max_scale}")
    if not policy.min_scale <= policy.init_scale <= policy.max_scale:
        raise ValueError(f"init_scale is {policy.init_scale} but min_scale is {policy.min_scale} and max_scale is {policy.max_scale}")


@dataclass(frozen=True)
class Static:
    """A fixed scale. A step with a non-finite gradient is still skipped."""

    scale: float = 2.0**16

    def __post_init__(self):
        _usable("scale", self.scale)

    @property
    def init_scale(self):
        return self.scale

    def vector(self):
        return _vector({0: _STATIC, 1: self.scale, 2: 1, 3: 1, 4: 1, 6: HIGHEST_SCALE, 7: 1})


@dataclass(frozen=True)
class Dynamic:
    """Grow after `growth_interval` clean steps in a row, back off on a bad one.

    A bad step uses up one of `hysteresis`; only when none is left, and the share of bad steps since the last change of the
    scale has reached `tolerance`, the scale becomes max(scale * backoff_factor, min_scale). `refill`: hysteresis is full again
    after every clean step ("clean", apex's kernel), only when the scale grows ("growth", Megatron-LM), or after every clean
    step and every back-off ("backoff", Paddle). `window_follows_scale`: the interval is multiplied and divided with the
    scale. The scale stays within [min_scale, max_scale] and [2^-126, 2^127].

    More than `skip_limit` skips in a row reach the limit: "hold" goes on, "raise" raises RuntimeError from update(), a
    callable is called with the ScalerStats; both when the host learns of it, on the CPU at once. `floor_is_limit`: so does a
    bad step that finds the scale at its floor.

    What other projects' rules need besides: `growth_delay` and `repeat_delay` are clean steps beyond the interval before the
    first growth and before each that follows another; at or below `recover_below` the interval is `recover_interval`;
    `floor` "keep" refuses a back-off below min_scale instead of ending there; `arithmetic` forms products in double rounded
    to FP32 ("rounded", torch), in FP32 ("single") or in double for good ("double").
    `faithful_to` ("torch", "megatron", "apex") gives the bounds [2^-126, 2^127] up for what the named project does there:
    for replaying its runs, not for training. preset(…, faithful=True) sets it.
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 2.0**-14
    max_scale: float = 2.0**127
    hysteresis: int = 1
    refill: str = "clean"
    tolerance: float = 0.0
    window_follows_scale: bool = False
    skip_limit: int | None = None
    on_limit: object = "hold"
    faithful_to: str | None = None
    growth_delay: int = 0
    repeat_delay: int = 0
    recover_below: float = 0.0
    recover_interval: int = 0
    floor: str = "clamp"
    floor_is_limit: bool = False
    arithmetic: str = "rounded"

    def __post_init__(self):
        _one_of(_BOUNDS, faithful_to=self.faithful_to)
        (_usable if self.faithful_to is None else _positive)("init_scale", self.init_scale)
        if not self.growth_factor > 1:
            raise ValueError(f"growth_factor is {self.growth_factor}; expected more than 1")
        _fraction(backoff_factor=self.backoff_factor)
        _at_least(1, growth_interval=self.growth_interval, hysteresis=self.hysteresis)
        _range(self)
        _one_of(_REFILL, refill=self.refill)
        _one_of(_FLOOR, floor=self.floor)
        _one_of(_ARITHMETIC, arithmetic=self.arithmetic)
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance is {self.tolerance}; expected from 0 to 1")
        if self.skip_limit is not None:
            _at_least(1, skip_limit=self.skip_limit)
        if self.on_limit not in ("hold", "raise") and not callable(self.on_limit):
            raise ValueError(f"on_limit is {self.on_limit!r}; expected 'hold', 'raise' or a callable")
        _at_least(0, growth_delay=self.growth_delay, repeat_delay=self.repeat_delay, recover_below=self.recover_below, recover_interval=self.recover_interval)

    def vector(self):
        limit = 0 if self.skip_limit is None else self.skip_limit + 1
        on_limit = {"hold": 0, "raise": 1}.get(self.on_limit, 2) if isinstance(self.on_limit, str) else 2
        return _vector({0: _DYNAMIC, 1: self.init_scale, 2: self.growth_factor, 3: self.backoff_factor, 4: self.growth_interval, 5: self.min_scale,
                        6: self.max_scale, 7: self.hysteresis, 8: _REFILL[self.refill], 9: _BOUNDS[self.faithful_to], 10: _ARITHMETIC[self.arithmetic],
                        11: self.growth_delay, 12: self.repeat_delay, 13: self.tolerance, 14: self.window_follows_scale, 15: limit, 16: on_limit,
                        17: _FLOOR[self.floor], 18: self.floor_is_limit, 19: self.recover_below, 20: self.recover_interval})

    @classmethod
    def _of(cls, n):
        names = lambda table: {code: name for name, code in table.items()}
        return cls(init_scale=n[1], growth_factor=n[2], backoff_factor=n[3], growth_interval=int(n[4]), min_scale=n[5], max_scale=n[6], hysteresis=int(n[7]),
                   refill=names(_REFILL)[n[8]], faithful_to=names(_BOUNDS)[n[9]], arithmetic=names(_ARITHMETIC)[n[10]], growth_delay=int(n[11]),
                   repeat_delay=int(n[12]), tolerance=n[13], window_follows_scale=bool(n[14]), skip_limit=int(n[15]) - 1 if n[15] else None,
                   on_limit={0: "hold", 1: "raise", 2: _lost_callback}[n[16]], floor=names(_FLOOR)[n[17]], floor_is_limit=bool(n[18]),
                   recover_below=n[19], recover_interval=int(n[20]))


def _lost_callback(stats):
    """Stands for a callback that a checkpoint could not hold."""


@dataclass(frozen=True)
class LogMax:
    """log2 of the largest unscaled gradient, x, is taken as normal; the scale is 2^(log_max - (mean + sigmas * deviation)).

    Mean and deviation are running ones (mean_decay, variance_decay). A gradient that is zero throughout tells nothing and is
    ignored; a bad step at scale S is recorded as x = log2(65504 / S) + 1.
    """

    init_scale: float = 1.0
    min_scale: float = 1.0
    max_scale: float = 2.0**14
    log_max: float = 16.0
    sigmas: float = 3.09
    mean_decay: float = 0.99
    variance_decay: float = 0.999

    def __post_init__(self):
        _usable("init_scale", self.init_scale)
        _range(self)
        _fraction(mean_decay=self.mean_decay, variance_decay=self.variance_decay)
        _at_least(0, sigmas=self.sigmas)
        if not abs(self.log_max) < float("inf"):
            raise ValueError(f"log_max is {self.log_max}; expected a finite number")

    def vector(self):
        return _vector({0: _LOG_MAX, 1: self.init_scale, 2: 2, 3: 0.5, 4: 2000, 5: self.min_scale, 6: self.max_scale, 7: 1, 26: self.mean_decay,
                        27: self.variance_decay, 28: self.sigmas, 29: self.log_max})

    @classmethod
    def _of(cls, n):
        return cls(n[1], n[5], n[6], n[29], n[28], n[26], n[27])


def _share(target):
    if not 0 <= target < 1:
        raise ValueError(f"target is {target}; expected from 0 to below 1")


@dataclass(frozen=True)
class Occupancy:
    """Keeps the share of the gradients in the top bin, above edge * 65504, at or below `target`.

    The share is bounded from above by what grad_stats holds of each tensor: nothing where the largest gradient is below the
    edge, else sum of squares / edge^2. A share above the target, or a bad step, backs the scale off; `growth_interval` steps
    on which even the grown scale would have kept the target let it grow.
    """

    target: float = 1e-7
    edge: float = 0.125
    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 20
    min_scale: float = 2.0**-14
    max_scale: float = 2.0**127

    def __post_init__(self):
        _share(self.target)
        _usable("init_scale", self.init_scale)
        _range(self)
        _fraction(edge=self.edge, backoff_factor=self.backoff_factor)
        _at_least(1, growth_interval=self.growth_interval)
        if not self.growth_factor > 1:
            raise ValueError(f"growth_factor is {self.growth_factor}; expected more than 1")

    def vector(self):
        return _vector({0: _OCCUPANCY, 1: self.init_scale, 2: self.growth_factor, 3: self.backoff_factor, 4: self.growth_interval, 5: self.min_scale,
                        6: self.max_scale, 7: 1, 21: self.target, 24: self.edge})

    @classmethod
    def _of(cls, n):
        return cls(n[21], n[24], n[1], n[2], n[3], int(n[4]), n[5], n[6])


@dataclass(frozen=True)
class Underflow:
    """Keeps the FP16-subnormal share of the non-zero gradients at or below `target`, growing at once instead of after an interval.

    `reduce`: the share of the worst tensor, or that of all together ("weighted"); tensors with fewer than `least` non-zeros
    are not heard. Zeros never steer: an embedding or a ReLU makes them without any underflow. The scale grows only while the
    largest gradient of the last steps keeps a factor of `headroom` to overflow, and for `growth_interval` clean steps not
    back to a scale that overflowed. It backs off on a bad step, and when the largest gradient comes within 2 of overflow; a
    single bad step far below overflow is held against its batch, and changes nothing.
    """

    target: float = 1e-3
    reduce: str = "worst"
    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    headroom: float = 16.0
    least: int = 1000
    min_scale: float = 2.0**-14
    max_scale: float = 2.0**127

    def __post_init__(self):
        _share(self.target)
        _one_of(_REDUCE, reduce=self.reduce)
        _usable("init_scale", self.init_scale)
        _range(self)
        _fraction(backoff_factor=self.backoff_factor)
        _at_least(1, growth_interval=self.growth_interval, headroom=self.headroom, least=self.least)
        if not self.growth_factor > 1:
            raise ValueError(f"growth_factor is {self.growth_factor}; expected more than 1")

    def vector(self):
        return _vector({0: _UNDERFLOW, 1: self.init_scale, 2: self.growth_factor, 3: self.backoff_factor, 4: self.growth_interval, 5: self.min_scale,
                        6: self.max_scale, 7: 1, 21: self.target, 22: _REDUCE[self.reduce], 23: self.headroom, 25: self.least})

    @classmethod
    def _of(cls, n):
        return cls(n[21], "weighted" if n[22] else "worst", n[1], n[2], n[3], int(n[4]), n[23], int(n[25]), n[5], n[6])


# -- policies of the user --------------------------------------------------------------------------
class Stats:
    """What a Policy sees of one step: 0-d tensors on the device, computed when they are asked for.

    found_inf is not 0 after a bad step; scale is that of this step; tables are those of grad_stats.
    """

    def __init__(self, found_inf, scale, tables):
        self.found_inf, self.scale, self.tables = found_inf, scale, list(tables)

    def _totals(self):
        if not self.tables:
            raise RuntimeError("no gradient statistics belong to this update")
        return torch.stack([table[-1] for table in self.tables])

    @property
    def amax(self):
        """Largest |gradient|, unscaled."""
        return self._totals()[:, 2].amax() / self.scale.double()

    @property
    def grad_norm(self):
        """Norm of all gradients, unscaled."""
        return self._totals()[:, 1].sum().sqrt() / self.scale.double()

    @property
    def zero_share(self):
        """Zeros / elements."""
        sums = self._totals().sum(0)
        return sums[3] / sums[5].clamp(min=1)

    @property
    def subnormal_share(self):
        """FP16-subnormal / non-zero gradients."""
        sums = self._totals().sum(0)
        return sums[4] / (sums[5] - sums[3]).clamp(min=1)


class Policy:
    """To subclass: a policy of your own.

    init() returns {name: tensor}, which is moved to the device once and saved in checkpoints. update(state, stats) returns
    the scale that follows as a 0-d tensor on the device; it writes into the state's tensors or puts new ones in their place,
    and stays free of synchronisation, so that a step can be captured. With `host = True` it is called when the host has the
    numbers of a step (on a GPU, of the newest of those that arrive together), with ScalerStats, a state of numbers, and
    returns a number. The scaler applies what it returns after
    the step's gradients were unscaled, within [min_scale, max_scale], and keeps the scale where it is not finite.
    """

    init_scale, min_scale, max_scale, host = 2.0**16, 2.0**-14, 2.0**127, False

    def init(self):
        return {}

    def update(self, state, stats):
        raise NotImplementedError(f"{type(self).__name__} has no update(state, stats)")

    def vector(self):
        _usable("init_scale", self.init_scale)
        _range(self)
        return _vector({0: _CUSTOM, 1: self.init_scale, 2: 2, 3: 0.5, 4: 2000, 5: self.min_scale, 6: self.max_scale, 7: 1})


def looks_at_gradients(policy):
    """Whether the policy's update wants the tables of grad_stats."""
    return not isinstance(policy, (Static, Dynamic))


def make_state(policy, device, saved=None):
    """The tensors of a Policy of the user on the device; of any other policy, none."""
    if not isinstance(policy, Policy):
        return {}
    return {name: (tensor if saved is None else saved[name]).detach().to(device).clone() for name, tensor in policy.init().items()}


def keep(state, after):
    """Copies what the policy put in the place of its tensors back into them, so that a replayed graph finds them."""
    for name, tensor in state.items():
        if name not in after:
            raise RuntimeError(f"the policy's update removed {name!r} from its state")
        new = after[name]
        if new is not tensor:
            tensor.copy_(torch.as_tensor(new))


def advance(policy, vector, scale, numbers, state, found_inf, tables=()):
    """One update of any policy on the device, in place: scale (0-d float32), numbers (the 32 of its state), state (make_state)."""
    if not isinstance(policy, Policy):
        if looks_at_gradients(policy):
            return H.advance_scale_(scale, numbers, found_inf, vector, list(tables), None)
        return H.update_scale_(scale, numbers, found_inf, vector)
    proposal = None
    if not policy.host:
        after = dict(state)
        proposal = policy.update(after, Stats(found_inf, scale.clone(), tables))
        if not isinstance(proposal, torch.Tensor) or proposal.numel() != 1 or not proposal.is_floating_point():
            raise TypeError(f"{type(policy).__name__}.update returned {proposal!r}; expected the scale as a 0-d floating-point tensor")
        proposal = proposal.detach().double().to(scale.device)
        keep(state, after)
    H.advance_scale_(scale, numbers, found_inf, vector, [], proposal)


def advance_on_host(policy, state, stats):
    """What a host Policy asks for after a step, within its bounds; None where it is not a positive finite number."""
    after = {name: tensor.item() if tensor.numel() == 1 else tensor.cpu() for name, tensor in state.items()}
    asked = float(policy.update(after, stats))
    keep(state, after)
    return min(max(asked, policy.min_scale, LOWEST_SCALE), policy.max_scale, HIGHEST_SCALE) if 0 < asked < float("inf") else None


def acts_on_host(policy):
    """Whether something is to be done once the host has the numbers of an update."""
    return policy.host if isinstance(policy, Policy) else getattr(policy, "on_limit", "hold") != "hold"


class Arrivals:
    """States of a scaler on their way to the host; nothing waits for them."""

    LIMITS = 8

    def __init__(self):
        self._pending, self._limits = [], 0.0

    def __getstate__(self):
        return {"_pending": [], "_limits": self._limits}

    def start(self, limits):
        """Another state was loaded, in which the limit had been reached so often."""
        self._pending, self._limits = [], limits

    def after(self, state):
        """Sends `state`; yields for each that has arrived its numbers where it is one at which the limit was reached, else None."""
        if state.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return
            host = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
            host.copy_(state, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((host, event))
        else:
            self._pending.append((state.clone(), None))
        while self._pending and (self._pending[0][1] is None or self._pending[0][1].query()):
            numbers = self._pending.pop(0)[0].tolist()
            reached, self._limits = numbers[self.LIMITS] > self._limits, numbers[self.LIMITS]
            yield numbers if reached else None


def limit_message(policy, numbers):
    """What is said when the limit was reached; numbers: the policy's state after that update."""
    skips = int(numbers[6])
    if policy.skip_limit is not None and skips > policy.skip_limit:
        return f"the loss scale is {numbers[0]:g} after {skips} skipped steps in a row (skip_limit is {policy.skip_limit})"
    return f"the loss scale is {numbers[0]:g}, its floor, and the gradients still overflow"


def rule_of(numbers, here=None):
    """The policy that these numbers of a checkpoint stand for; `here`: the scaler's, which has what a file cannot hold (a Policy, a callback)."""
    kinds = {_DYNAMIC: Dynamic, _LOG_MAX: LogMax, _OCCUPANCY: Occupancy, _UNDERFLOW: Underflow}
    if (numbers[0] == _CUSTOM) != isinstance(here, Policy):
        kind = lambda custom: "a Policy of yours" if custom else "a policy of halfstep"
        raise ValueError(f"scaler state is of {kind(numbers[0] == _CUSTOM)} but this GradScaler has {kind(isinstance(here, Policy))}")
    if numbers[0] == _CUSTOM:
        return here
    if numbers[0] == _STATIC:
        return Static(numbers[1])
    codes = {8: _REFILL, 9: _BOUNDS, 10: _ARITHMETIC, 16: (0, 1, 2), 17: _FLOOR}
    odd = [i for i, table in codes.items() if numbers[i] not in (table.values() if isinstance(table, dict) else table)]
    if numbers[0] not in kinds or odd:
        raise ValueError(f"scaler state is of policy kind {numbers[0]:g} with refill {numbers[8]:g}, bounds {numbers[9]:g}, arithmetic {numbers[10]:g}, on_limit {numbers[16]:g} and floor "
                         f"{numbers[17]:g}; this halfstep knows kinds 0 (Static), 1 (Dynamic), 2 (LogMax), 3 (Occupancy), 4 (Underflow) and 5 (a Policy of yours)")
    rule = kinds[numbers[0]]._of(numbers)
    callback = getattr(here, "on_limit", None)
    return replace(rule, on_limit=callback) if numbers[0] == _DYNAMIC and numbers[16] == 2 and callable(callback) else rule


from ._presets import _PRESETS, preset  # noqa: E402, F401  they need the policies above
from ._formats import FORMATS, detect_format, export_losses, export_state, import_state, states_of_losses  # noqa: E402, F401
