"""The loss-scaling rules of other projects. Sources: docs/policies.md."""

from dataclasses import replace

from .policies import HIGHEST_SCALE, LOWEST_SCALE, Dynamic


def _in_range(**numbers):
    return Dynamic(**{"min_scale": LOWEST_SCALE, "max_scale": HIGHEST_SCALE, **numbers})


_DEEPSPEED = dict(growth_interval=1000, min_scale=1.0, growth_delay=1, arithmetic="double")
_FAIRSEQ = dict(init_scale=2.0**15, floor="keep", arithmetic="double")
# name: (the rule in range, what the project does beyond it). Sources: docs/policies.md.
_PRESETS = {
    "torch": (_in_range(), "torch"),
    "apex": (_in_range(max_scale=2.0**24, arithmetic="double"), "apex"),
    "megatron": (_in_range(init_scale=2.0**32, growth_interval=1000, min_scale=1.0, hysteresis=2, refill="growth", arithmetic="single"), "megatron"),
    "deepspeed": (_in_range(**_DEEPSPEED, init_scale=2.0**32), "apex"),
    "deepspeed_zero": (_in_range(**_DEEPSPEED, hysteresis=2, refill="growth", floor_is_limit=True, on_limit="raise"), "apex"),
    # fairseq refuses a scale of 1e-4 too: its floor is the next number
    "fairseq": (_in_range(**_FAIRSEQ, min_scale=1.0000000000000002e-4, floor_is_limit=True, on_limit="raise"), "apex"),
    "metaseq": (_in_range(**{**_FAIRSEQ, "init_scale": 4.0}, growth_interval=256, min_scale=2.0**-5, window_follows_scale=True), "apex"),
    "keras": (_in_range(init_scale=2.0**15, arithmetic="single"), "megatron"),
    "tf": (_in_range(init_scale=2.0**15, min_scale=1.0, arithmetic="single"), "torch"),
    "jmp": (_in_range(init_scale=2.0**15, min_scale=1.0, arithmetic="single"), "torch"),
    "flax": (_in_range(growth_delay=1, repeat_delay=1, arithmetic="single"), "megatron"),
    "paddle": (_in_range(refill="backoff", arithmetic="single"), "megatron"),
    "mindspore": (_in_range(init_scale=2.0**24, min_scale=1.0, skip_limit=1000, on_limit="raise", arithmetic="double"), "apex"),
    "colossalai": (_in_range(growth_interval=1000, min_scale=1.0, max_scale=2.0**32, hysteresis=2, refill="growth", arithmetic="single"), "megatron"),
    "modulus": (_in_range(max_scale=2.0**30, recover_below=2.0**6, recover_interval=100, arithmetic="single"), "megatron"),
    "openseq2seq": (_in_range(init_scale=2.0**14, min_scale=1.0, max_scale=2.0**14, arithmetic="single"), "megatron"),
}


def preset(name, faithful=False, **overrides):
    """The rule of another project, bit-equal to it while its scale stays in [2^-126, 2^127].

    There ours stays at the bound and recovers. faithful=True goes on as the original does: torch's scale falls to 0 and its
    growth stops short of infinity, Megatron's and Keras 3's reach infinity and keep it, those held as Python numbers (apex,
    DeepSpeed, fairseq, metaseq, MindSpore) leave FP32.
    """
    if name not in _PRESETS:
        raise ValueError(f"policy preset {name!r} is unknown; known: {', '.join(sorted(_PRESETS))}")
    policy, beyond = _PRESETS[name]
    policy = replace(policy, **overrides)
    if not faithful:
        return policy
    flax = name == "flax"  # its floor and ceiling are FP32's own
    low = 0.0 if policy.min_scale == LOWEST_SCALE and not flax else policy.min_scale
    high = (2 - 2.0**-23) * 2.0**127 if flax else float("inf")
    return replace(policy, faithful_to=beyond, min_scale=low, max_scale=high if policy.max_scale == HIGHEST_SCALE else policy.max_scale)
