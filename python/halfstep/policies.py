"""Loss-scaling policies: each fills the sixteen numbers of csrc/math/scale.h; the rule itself runs on the device."""

from dataclasses import dataclass, replace

import torch

LOWEST_SCALE, HIGHEST_SCALE = 2.0**-126, 2.0**127
_REFILL = {"clean": 0, "growth": 1}
_BOUNDS = {None: 0, "torch": 1, "megatron": 2, "apex": 3}


def _vector(*entries):
    return torch.tensor(list(map(float, entries)) + [0.0] * (16 - len(entries)), dtype=torch.float64)


def _positive(name, value):
    if not (0 < float(value) < float("inf")):
        raise ValueError(f"{name} is {value}; expected a positive finite number")


def _usable(name, value):
    _positive(name, value)
    if not (LOWEST_SCALE <= float(value) <= HIGHEST_SCALE):
        raise ValueError(f"{name} is {value}; expected between 2^-126 and 2^127, where it and its reciprocal are finite in FP32")


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
        return _vector(0, self.scale, 1, 1, 1, 0, HIGHEST_SCALE, 1, 0)


@dataclass(frozen=True)
class Dynamic:
    """Grow after `growth_interval` clean steps in a row, back off on a bad one.

    A bad step uses up one of `hysteresis`; only when none is left the scale becomes max(scale * backoff_factor,
    min_scale). `refill`: hysteresis is full again after every clean step ("clean", apex's kernel) or only when the
    scale grows ("growth", Megatron-LM). The scale stays within [min_scale, max_scale] and [2^-126, 2^127].
    `faithful_to` ("torch", "megatron", "apex") gives that second pair of bounds up for what the named project does there:
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
    faithful_to: str | None = None

    def __post_init__(self):
        if self.faithful_to not in _BOUNDS:
            raise ValueError(f"faithful_to is {self.faithful_to!r}; expected None, 'torch', 'megatron' or 'apex'")
        (_usable if self.faithful_to is None else _positive)("init_scale", self.init_scale)
        if not self.growth_factor > 1:
            raise ValueError(f"growth_factor is {self.growth_factor}; expected more than 1")
        if not 0 < self.backoff_factor < 1:
            raise ValueError(f"backoff_factor is {self.backoff_factor}; expected between 0 and 1")
        if self.growth_interval < 1:
            raise ValueError(f"growth_interval is {self.growth_interval}; expected at least 1")
        if self.hysteresis < 1:
            raise ValueError(f"hysteresis is {self.hysteresis}; expected at least 1")
        if not self.min_scale <= self.max_scale:
            raise ValueError(f"min_scale is {self.min_scale} but max_scale is {self.max_scale}")
        if not self.min_scale <= self.init_scale <= self.max_scale:
            raise ValueError(f"init_scale is {self.init_scale} but min_scale is {self.min_scale} and max_scale is {self.max_scale}")
        if self.refill not in _REFILL:
            raise ValueError(f"refill is {self.refill!r}; expected 'clean' or 'growth'")

    def vector(self):
        return _vector(1, self.init_scale, self.growth_factor, self.backoff_factor, self.growth_interval,
                       self.min_scale, self.max_scale, self.hysteresis, _REFILL[self.refill], _BOUNDS[self.faithful_to])


_PRESETS = {
    # torch/amp/grad_scaler.py and _amp_update_scale_
    "torch": Dynamic(min_scale=LOWEST_SCALE, max_scale=HIGHEST_SCALE),
    # NVIDIA/apex amp.scaler.LossScaler: no floor, ceiling 2^24
    "apex": Dynamic(min_scale=LOWEST_SCALE, max_scale=2.0**24),
    # NVIDIA/Megatron-LM DynamicGradScaler: hysteresis refilled on growth only, floor 1
    "megatron": Dynamic(init_scale=2.0**32, growth_interval=1000, min_scale=1.0, max_scale=HIGHEST_SCALE, hysteresis=2, refill="growth"),
}


def preset(name, faithful=False, **overrides):
    """The rule of another project, bit-equal to it while its scale stays in [2^-126, 2^127].

    There ours stays at the bound and recovers. faithful=True goes on as the original does: torch's scale falls to 0 and its
    growth stops short of infinity, Megatron's reaches infinity and keeps it, apex's is a double that falls to 2^-1074.
    """
    if name not in _PRESETS:
        raise ValueError(f"policy preset {name!r} is unknown; known: {', '.join(sorted(_PRESETS))}")
    policy = replace(_PRESETS[name], **overrides)
    if not faithful:
        return policy
    return replace(policy, faithful_to=name, min_scale=0.0 if policy.min_scale == LOWEST_SCALE else policy.min_scale,
                   max_scale=float("inf") if policy.max_scale == HIGHEST_SCALE else policy.max_scale)
