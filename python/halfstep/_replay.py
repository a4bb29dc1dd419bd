"""A recorded run under another policy."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import policies
from ._library import H
from ._recording import NORMAL, OVERFLOW, SMALLEST, STATS, Trace, label, number, read
from ._stats import APPLIED, CLEAN, CONSECUTIVE, LAST_BAD, SCALE, SKIPPED, ScalerStats
from ._table import table as text_table

@dataclass
class SimResult:
    """A policy replayed over a trace: a number a recorded step."""

    policy: str
    step: list
    scale: list                  #: in the gradients of that step
    skipped: list                #: whether the step would have been skipped
    flushed: list                #: share of the recorded non-zeros that FP16 would have set to 0 at that scale; None where not recorded
    subnormal: list              #: share that would have been subnormal
    unknown: dict = field(default_factory=dict)  #: steps whose answer is an assumption, by reason

    def to_pandas(self):
        """A DataFrame with a row a step; unknown is in its attrs."""
        import pandas

        frame = pandas.DataFrame({k: getattr(self, k) for k in ("step", "scale", "skipped", "flushed", "subnormal")})
        frame.attrs.update(policy=self.policy, unknown=self.unknown)
        return frame

    def to_json(self, path=None):
        """The result as JSON text; also written to `path` if one is given."""
        numbers = {k: [v if v is None or isinstance(v, bool) else number(v) for v in getattr(self, k)] for k in ("step", "scale", "skipped", "flushed", "subnormal")}
        text = json.dumps({"policy": self.policy, **numbers, "unknown": self.unknown})
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def plot(self, path):
        """Scale, skips and flushed share over the steps, as an image."""
        plot([self], path)

    def __str__(self):
        return table([self])


_LOOKS_NOT, _USERS = 1, 5  # kinds of policies (csrc/math/scale.h): up to here gradients are not looked at; the user's own

UNKNOWN = {
    "overflow": "was not finite at a higher scale: taken as finite",
    "zeros": "had zeros at a lower scale, some of which may not be: taken as zeros",
    "not recorded": "has no histogram of its own: the one before is taken",
    "weights": "follows a skip that the recording did not make, or the other way round: its gradients are those of other weights",
}


class _Replay:
    """The scale of one policy from update to update, on the CPU."""

    def __init__(self, policy, start):
        self.policy = policy
        self.begin(policy.vector().tolist() if policy is not None else start["vector"], None if policy is not None else start["state"])
        self.user = policies.make_state(policy, torch.device("cpu")) if policy is not None and hasattr(policies, "make_state") else {}

    def begin(self, vector, state):
        self.vector = policies.Static().vector().zero_()  # a trace of an earlier version may have fewer numbers
        self.vector[: len(vector)] = torch.tensor(vector, dtype=torch.float64)
        self.numbers = H.init_scale_state(self.vector)
        if state is not None:
            self.numbers[: len(state)] = torch.tensor(state, dtype=torch.float64)
        self.scale = self.numbers[SCALE].float().clone()

    def set(self, value):
        self.scale.fill_(value)
        self.numbers[SCALE] = self.scale

    def update(self, bad, tables):
        found = torch.tensor(float(bad))
        if self.vector[0] > _LOOKS_NOT and self.policy is None:
            H.advance_scale_(self.scale, self.numbers, found, self.vector, tables, None)
        elif self.policy is None or not hasattr(policies, "advance"):
            H.update_scale_(self.scale, self.numbers, found, self.vector)
        else:
            policies.advance(self.policy, self.vector, self.scale, self.numbers, self.user, found, tables)
            if getattr(self.policy, "host", False):
                asked = policies.advance_on_host(self.policy, self.user, self._stats(tables))
                if asked is not None:
                    self.set(asked)

    def _stats(self, tables):
        """What a policy of the user's that runs on the host is told of the step."""
        s, total = self.numbers.tolist(), tables[0][-1].tolist() if tables else [0.0] * STATS
        nonzero = total[5] - total[3]
        return ScalerStats(int(s[APPLIED] + s[SKIPPED]), s[SCALE], int(s[CLEAN]), int(s[APPLIED]), int(s[SKIPPED]), int(s[CONSECUTIVE]), bool(s[LAST_BAD]), None,
                           math.nan if s[LAST_BAD] else math.sqrt(total[1]) / s[SCALE], total[2], total[3] / total[5] if total[5] else 0.0, total[4] / nonzero if nonzero else 0.0, 0)


def _table(grads, limited, recorded, scale, bad):
    """grad_stats of the gradients as they would be at `scale`: at the recorded one as they were."""
    rows = torch.zeros(len(grads.tensors) + 1, STATS, dtype=torch.float64)
    flushed = grads.below(SMALLEST, scale) if scale < recorded else torch.zeros_like(grads.zeros)
    as_it_was = scale >= recorded or bad  # what was not finite still is
    rows[:-1, 0] = grads.nonfinite if as_it_was else 0.0
    rows[:-1, 1] = torch.where(grads.squares.isfinite() | torch.tensor(as_it_was), grads.squares, 0.0) * (scale / recorded) ** 2
    rows[:-1, 2] = torch.where((grads.nonfinite > 0) & torch.tensor(as_it_was), grads.amax, grads.amax if scale == recorded else grads.largest * scale)
    rows[:-1, 3] = grads.zeros + flushed.round()
    rows[:-1, 4] = grads.subnormals if scale == recorded else (grads.below(NORMAL, scale) - flushed).clamp(min=0).round()
    rows[:-1, 5] = grads.count
    over = limited[grads.tensors] & (grads.largest * scale >= OVERFLOW) if scale > recorded else torch.zeros(len(grads.tensors), dtype=torch.bool)
    rows[:-1, 0] += over.double()
    rows[:-1, 6] = rows[:-1, 7] = (rows[:-1, 0] > 0).double()
    rows[-1] = rows[:-1].sum(0)
    rows[-1, 2] = rows[:-1, 2].amax() if len(rows) > 1 else 0.0
    first = rows[:-1, 7].nonzero()
    rows[-1, 6], rows[-1, 7] = float(first[0]) if len(first) else -1.0, float(len(first) > 0)
    return rows


def _skips(step, grads, limited, scale):
    """Whether the step would be skipped at `scale`, and what about that is not known."""
    if scale == step.scale:
        return step.found_inf, None
    if not math.isfinite(step.loss):
        return True, None
    beyond = grads is not None and bool((limited[grads.tensors] & (grads.largest * scale >= OVERFLOW)).any())
    if step.found_inf and scale < step.scale:
        return beyond, None if beyond else "overflow"
    if step.found_inf:
        return True, None
    return scale > step.scale and beyond, None if step.grads is not None or scale < step.scale else "not recorded"


def _shares(grads, limited, recorded, scale):
    """Shares of the non-zeros that FP16 would flush to 0, and hold as subnormals."""
    there = limited[grads.tensors]
    nonzero = float((grads.count - grads.zeros - grads.nonfinite)[there].sum())
    if not nonzero:
        return 0.0, 0.0
    flushed = float(grads.below(SMALLEST, scale)[there].sum()) if scale < recorded else 0.0
    small = float((grads.subnormals if scale == recorded else grads.below(NORMAL, scale))[there].sum())
    return flushed / nonzero, max(small - flushed, 0.0) / nonzero


def simulate(trace, policy=None, name=None):
    """The policy over a recorded run: scales, skips, and what FP16 would have lost.

    trace: a path, or what halfstep.trace.read returned. policy: any of halfstep.policies or your own; None: the recorded one,
    from the state it was in, which gives the recorded scales and skips. name: what the result calls it. What the recording cannot tell is counted in
    `unknown` (docs/telemetry.md).
    """
    trace = trace if isinstance(trace, Trace) else read(trace)
    first = trace.steps[0].start
    if policy is not None and not hasattr(policy, "vector"):
        raise TypeError(f"simulate: policy is {type(policy).__name__}; expected one of halfstep.policies, or None for the recorded one")
    if policy is None and first["vector"][0] == _USERS:
        raise ValueError(f"simulate: {trace.path} recorded a policy of yours, {first['policy']}; pass it as policy")
    replay, limited = _Replay(policy, first), trace.limited()
    name = name or (f"recorded: {first['policy']}" if policy is None else label(policy))
    result = SimResult(name, [], [], [], [], [], dict.fromkeys(UNKNOWN, 0))
    last, last_scale, apart = None, 1.0, False
    for step in trace.steps:
        if step.start is not None and step.start is not first and policy is None:
            replay.begin(step.start["vector"], step.start["state"])
        if step.grads is not None:
            last, last_scale = step.grads, step.scale
        scale = float(replay.numbers[SCALE])
        result.unknown["weights"] += apart
        bad, unknown = _skips(step, last, limited, scale)
        if unknown:
            result.unknown[unknown] += 1
        flushed = subnormal = None
        if step.grads is not None:
            flushed, subnormal = _shares(step.grads, limited, step.scale, scale)
            if scale > step.scale and bool((step.grads.zeros[limited[step.grads.tensors]] > 0).any()):
                result.unknown["zeros"] += 1
        apart = apart or bad != step.found_inf
        for name, value in (("step", step.step), ("scale", scale), ("skipped", bool(bad)), ("flushed", flushed), ("subnormal", subnormal)):
            getattr(result, name).append(value)
        if step.set is not None:
            replay.set(step.set)
        else:
            replay.update(bad, [] if last is None else [_table(last, limited, last_scale, scale, bad)])
    return result


# -- showing ---------------------------------------------------------------------------------------
def _mean(values):
    values = [v for v in values if v is not None]
    return 100 * sum(values) / len(values) if values else math.nan


def table(results):
    """The results as one text table; below it, what the unknown steps are."""
    columns = ["policy", "steps", "skipped", "scale at the end", "lowest", "highest", "flushed %", "subnormal %", "unknown"]
    rows = [[r.policy, f"{len(r.step):,}", f"{sum(r.skipped):,}", f"{r.scale[-1]:g}", f"{min(r.scale):g}", f"{max(r.scale):g}", f"{_mean(r.flushed):.4f}", f"{_mean(r.subnormal):.4f}",
             ", ".join(f"{k} {v:,}" for k, v in r.unknown.items() if v) or "0"] for r in results]
    lines = [text_table([columns, *rows], left=(0, len(columns) - 1))]
    notes = [f"unknown, {k}: a step that {text}" for k, text in UNKNOWN.items() if any(r.unknown[k] for r in results)]
    return "\n".join(lines + notes)


def plot(results, path):
    """Scale, skips and flushed share of all results over the steps, as an image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (scales, skips, shares) = plt.subplots(3, 1, figsize=(10, 8), sharex=True, height_ratios=(3, 1, 2))
    for row, r in enumerate(results):
        (line,) = scales.step(r.step, r.scale, where="post", label=r.policy if len(r.policy) < 60 else r.policy[:57] + "…")
        skips.plot([s for s, bad in zip(r.step, r.skipped) if bad], [row] * sum(r.skipped), "|", color=line.get_color())
        known = [(s, 100 * f) for s, f in zip(r.step, r.flushed) if f is not None]
        shares.plot([s for s, _ in known], [f for _, f in known], color=line.get_color())
    scales.set_yscale("log", base=2)
    scales.set_ylabel("loss scale")
    skips.set(title="skipped steps", yticks=range(len(results)), yticklabels=[], ylim=(-0.5, len(results) - 0.5))
    shares.set(title="share of the recorded non-zero gradients that FP16 would set to 0, %", xlabel="step")
    scales.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2)
    for axes in (scales, skips, shares):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# -- policies by name ------------------------------------------------------------------------------
def _value(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def policy_of(text):
    """A policy from `name` or `name:key=value,key=value`: a preset, a class of halfstep.policies in small letters, or "recorded"."""
    name, _, options = text.partition(":")
    pairs = [pair.partition("=") for pair in options.split(",") if pair]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError(f"policy {text!r}: expected name:key=value,key=value")
    numbers = {key.strip(): _value(value.strip()) for key, _, value in pairs}
    if name == "recorded":
        if numbers:
            raise ValueError(f"policy {text!r}: the recorded policy takes no options")
        return None
    classes = {n.lower(): c for n, c in vars(policies).items() if isinstance(c, type) and not n.startswith("_") and callable(getattr(c, "vector", None)) and n != "Policy"}
    try:
        return classes[name](**numbers) if name in classes else policies.preset(name, **numbers)
    except TypeError as error:
        raise ValueError(f"policy {text!r}: {error}") from None
