"""report.json: how it is put together from runs, and its words on a terminal (docs/compare.md)."""

import math
import re
import statistics

from . import _statistics
from ._measure import PHASES
from ._schema import FORMAT, VERSION, validate
from ._shares import unpacked
from ._table import table

FLAG = 0.01  # a layer is named from this share of its non-zeros on
EXIT = {_statistics.EQUIVALENT: 0, _statistics.BETTER: 0, _statistics.WORSE: 2, _statistics.UNDECIDED: 3}
_SHARE = re.compile(r"acc|top_?\d|f1|precision|recall|auc|iou|share|rate", re.I)


# -- delta and units -------------------------------------------------------------------------------
def parse_delta(delta):
    """(number, whether in percentage points) of 0.5, "0.5", "0.5pp"."""
    text = str(delta).strip()
    points = text.endswith("pp")
    try:
        value = float(text.removesuffix("pp"))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"delta is {delta!r}; expected a number above 0, or percentage points such as 0.5pp")
    return value, points


def unit_of(metric, values, points):
    """(factor, unit): a share (0 to 1) is shown in percent and compared in points, as is what is in percent already; anything else is as it is."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if (points or _SHARE.search(metric)) and 0 <= low and high <= 100:
        return (100.0 if high <= 1 else 1.0), "%"
    if points:
        raise ValueError(f"delta is in percentage points, but {metric} runs from {low:g} to {high:g}, which is no share; give delta in its own unit")
    return 1.0, ""


# -- putting together ------------------------------------------------------------------------------
def _median(values):
    values = [v for v in values if v is not None]
    return statistics.median(values) if values else None


def _pick(runs, *keys):
    """The value at the path of keys in each run, None where it is not there."""
    found = []
    for value in runs:
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        found.append(value)
    return found


def _first(values):
    return next((v for v in values if v), None)


def layers(runs):
    """Shares by layer and kind over all samples of the runs: [{name, kind, nonzero, underflow, subnormal, overflow, lost, headroom}]."""
    total = {}
    for packed in filter(None, _pick(runs, "shares")):
        for sample in packed["samples"]:
            for entry in sample["rows"]:
                tensor = packed["tensors"][entry[0]]
                key = tensor["name"], tensor["kind"]
                total[key] = total[key] + unpacked(entry) if key in total else unpacked(entry)
    return layer_rows(total)


def layer_rows(total):
    """The rows of layers() from {(name, kind): Shares}."""
    share = lambda part, whole: part / whole if whole else 0.0
    return [{"name": name, "kind": kind, "nonzero": s.nonzero, "underflow": share(s.underflow, s.nonzero), "subnormal": share(s.subnormal, s.nonzero),
             "overflow": share(s.overflow, s.count), "saturated": share(s.saturated, s.count), "lost": share(s.lost, s.nonzero), "headroom": s.headroom} for (name, kind), s in total.items()]


def summary(runs, metric, factor):
    """One arm over its runs; what was not measured is None."""
    values = [factor * float(run["metrics"][metric]) for run in runs]
    mean, sd = _statistics.mean_and_sd(values)
    finite = all(map(math.isfinite, values))
    found = {"runs": len(runs), "mean": mean if finite else None, "sd": sd if finite else None, "interval95": _statistics.interval(values) if finite else None}
    found["time"] = {phase: {q: _median(_pick(runs, "time", phase, q)) for q in ("median", "q1", "q3")} for phase in (*PHASES, "step")} if any(_pick(runs, "time", "step")) else None
    found["first_step"] = _median(_pick(runs, "time", "first_step"))
    peaks, befores = _pick(runs, "memory", "peak_bytes"), _pick(runs, "memory", "before_bytes")
    found["peak_bytes"] = _median(peaks)
    found["peak_growth_bytes"] = _median([p - b for p, b in zip(peaks, befores) if p is not None and b is not None])
    found["cuda_peak_bytes"] = _median(_pick(runs, "memory", "cuda_peak_bytes"))
    found["ledger"] = _first(_pick(runs, "ledger"))
    found["energy"] = _energy(runs)
    steps = sum(filter(None, _pick(runs, "steps")))
    found["steps"], found["skipped"] = steps, sum(filter(None, _pick(runs, "skipped")))
    found["scale"], found["matrix"], found["layers"] = _first(_pick(runs, "scale")), _first(_pick(runs, "matrix")), layers(runs)
    return found


def _energy(runs):
    """Joules a step and an example, over the runs that have them; else the reason."""
    known = [run for run in runs if run.get("steps") and (run.get("energy") or {}).get("joules") is not None]
    if not known:
        reason = next((e.get("reason") for e in _pick(runs, "energy") if e), None)
        return {"joules_per_step": None, "net_joules_per_step": None, "joules_per_example": None, "method": None, "reason": reason or "not measured", "notes": []}
    # A run that was compared with FP32 on the way also paid for that.
    plain = [run for run in known if not run.get("shares")] or known
    each = lambda key, by: _median([run["energy"][key] / run[by] for run in plain if run["energy"].get(key) is not None and run.get(by)])
    return {"joules_per_step": each("joules", "steps"), "net_joules_per_step": each("net_joules", "steps"), "joules_per_example": each("joules", "examples"),
            "method": known[0]["energy"].get("method"), "reason": None, "notes": known[0]["energy"].get("notes") or []}


def peak(summary):
    """Bytes that a run held at most: on the card where it had one, else of the process; None if unknown."""
    return summary["cuda_peak_bytes"] or summary["peak_bytes"]


def comparison(first, arm, metric, factor, delta, better="higher", percent=True):
    """One arm against the first over the seeds that both have."""
    runs = {run["seed"]: run for run in first["runs"]}
    pairs = [(runs[run["seed"]], run) for run in arm["runs"] if run["seed"] in runs]
    found = {"arm": arm["name"], "first": first["name"], "seeds": [b["seed"] for _, b in pairs]}
    if not pairs:
        return {**found, "verdict": _statistics.UNDECIDED, "n": 0, "more": None, "note": "no seed that both arms have"}
    sign = 1.0 if better == "higher" else -1.0
    values = [(float(a["metrics"][metric]), float(b["metrics"][metric])) for a, b in pairs]
    broken = [b["seed"] for (x, y), (_, b) in zip(values, pairs) if math.isfinite(x) and not math.isfinite(y)]  # where the first arm is broken too, nothing is known
    if broken or not all(math.isfinite(x) for x, _ in values):
        which = arm["name"] if broken else first["name"]
        return {**found, "verdict": _statistics.WORSE if broken else _statistics.UNDECIDED, "n": len(pairs), "more": None, "note": f"{metric} of {which} is not finite" + (f" with seed {broken[0]}" if broken else "")}
    items = len(pairs[0][0].get("correct") or "")
    found["differences"] = [sign * factor * (y - x) for x, y in values]
    found.update(_statistics.paired(found["differences"], delta, 100.0 / items if items and percent else 0.0))
    found["time_ratio"] = _ratio(pairs, "time", "step", "median")
    card = all(run.get("memory", {}).get("cuda_peak_bytes") for pair in pairs for run in pair)
    found["memory_ratio"] = _ratio(pairs, "memory", "cuda_peak_bytes" if card else "peak_bytes")
    bits = [([int(c) for c in a["correct"]], [int(c) for c in b["correct"]]) for a, b in pairs if a.get("correct") and b.get("correct") and len(a["correct"]) == len(b["correct"])]
    if len(bits) == len(pairs) and len({len(a) for a, _ in bits}) > 1:
        found["note"] = "; ".join(filter(None, (found.get("note"), "the test sets differ in length from seed to seed, so items are not compared")))
    elif len(bits) == len(pairs):
        found["mcnemar"] = _statistics.items(*zip(*bits))
        labels = next((a["labels"] for a, _ in pairs if a.get("labels")), None)
        if labels and len(labels) == items:
            found["worst_class"] = _statistics.worst_class(*zip(*bits), labels)
    return found


def _ratio(pairs, *keys):
    both = [(x, y) for x, y in zip(_pick([a for a, _ in pairs], *keys), _pick([b for _, b in pairs], *keys)) if x and y]
    return _median([y / x for x, y in both])


def _pairing(arms):
    """What shows that runs of one seed were not paired."""
    notes = []
    for key, text in (("weights_fingerprint", "other weights"), ("data_fingerprint", "other data")):
        first = {run["seed"]: run.get(key) for run in arms[0]["runs"]}
        for arm in arms[1:]:
            seeds = [run["seed"] for run in arm["runs"] if first.get(run["seed"]) and run.get(key) and run[key] != first[run["seed"]]]
            if seeds:
                notes.append(f"{arm['name']} began with {text} than {arms[0]['name']} (seed {seeds[0]}): not paired, so more runs are needed; make() may use the seed only, before arm.apply()")
    return notes


def exit_status(arms, comparisons):
    """1 where an arm failed, else 2 where one is worse, 3 where one cannot be told, 0."""
    statuses = {EXIT[c["verdict"]] for c in comparisons} | ({1} if any(arm.get("failed") for arm in arms) else set())
    return next((status for status in (1, 2, 3) if status in statuses), 0)


def build(arms, delta, environment=None, config=None, command=None, notes=()):
    """The whole report from arms of {name, options, runs, failed}; the first is what the others are compared with."""
    with_runs = [arm for arm in arms if arm["runs"]]
    if not with_runs or with_runs[0] is not arms[0]:
        raise ValueError(f"arm {arms[0]['name']!r}, with which the others are compared, has no finished run")
    value, points = parse_delta(delta)
    run = arms[0]["runs"][0]
    metric, better = run.get("metric") or next(iter(run["metrics"])), run.get("better") or "higher"
    lacking = next((arm["name"] for arm in with_runs for r in arm["runs"] if metric not in r["metrics"]), None)
    if lacking is not None:
        raise ValueError(f"arm {lacking!r} has no metric {metric!r}, by which {arms[0]['name']!r} is judged")
    factor, unit = unit_of(metric, [float(r["metrics"][metric]) for arm in with_runs for r in arm["runs"]], points)
    arms = [{**arm, "summary": summary(arm["runs"], metric, factor) if arm["runs"] else None} for arm in arms]
    comparisons = [comparison(arms[0], arm, metric, factor, value, better, unit == "%") for arm in arms[1:] if arm["runs"]]
    report = {"format": FORMAT, "version": VERSION, "command": command, "metric": {"name": metric, "better": better, "factor": factor, "unit": unit}, "delta": value,
              "comparisons": comparisons, "exit_status": exit_status(arms, comparisons), "notes": [*notes, *_pairing(with_runs)], "environment": environment or {}, "config": config or {}, "arms": arms}
    return validate(report)


# -- words -----------------------------------------------------------------------------------------
def points(report):
    """The unit of differences."""
    return " pp" if report["metric"]["unit"] == "%" else ""


def flagged(layers_of_arm, kind="weight gradient", share="lost"):
    """[(name, share)] of the layers that lose much, in the order of the model."""
    return [(layer["name"], layer[share]) for layer in layers_of_arm if layer["kind"] == kind and layer[share] >= FLAG]


def percent(share):
    """A share in words, with as many digits as it needs."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.1f} %" if value >= 0.05 else "< 0.1 %"


def warnings(arm):
    """What of an arm a user should know, in sentences."""
    lines = []
    found = (arm.get("summary") or {}).get("layers") or []
    lost = {name: share for name, share in flagged(found)}
    under = {name: share for name, share in flagged(found, share="underflow")}
    both = {name: max(lost.get(name, 0), under.get(name, 0)) for name in [layer["name"] for layer in found if layer["kind"] == "weight gradient"] if name in lost or name in under}
    if both:
        names = list(both.items())
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        lines.append("underflow: weight gradients that FP32 has and FP16 loses: " + ", ".join(f"{name} {percent(share)}" for name, share in names[:6]) + more)
    over = [f"{layer['name']} ({layer['kind']})" for layer in found if layer["overflow"] > 0]
    if over:
        lines.append("overflow beyond 65504: " + ", ".join(over[:6]) + (f" and {len(over) - 6} more" if len(over) > 6 else ""))
    diagnoses = sorted(set(filter(None, _pick(arm["runs"], "diagnosis"))))
    lines += [f"ended with no step taken any more: {text}" for text in diagnoses]
    return lines


def verdict_line(found, report):
    """One comparison as one line."""
    unit = points(report)
    text = f"{found['arm']} vs {found['first']}: {found['verdict']}"
    if found.get("interval90"):
        low, high = found["interval90"]
        text += f" (difference {found['mean']:+.2f}{unit}, 90 % interval {low:+.2f} to {high:+.2f}, delta {report['delta']:g}{unit}, {found['n']} paired runs)"
    if found["verdict"] == _statistics.UNDECIDED and found.get("more"):
        text += f"; run {found['more']} more"
    return text + (f"; {found['note']}" if found.get("note") else "")


def _cells(arm, report):
    s = arm["summary"]
    if s is None:
        return [arm["name"], "failed", *[""] * 7]
    found = next((c for c in report["comparisons"] if c["arm"] == arm["name"]), {})
    show = lambda value, text: "–" if value is None else text.format(value)
    time = (s["time"] or {}).get("step", {})
    ledger = sum(s["ledger"].values()) if s["ledger"] else None
    return [arm["name"], show(s["mean"], "{:.2f}") + ("" if s["sd"] is None else f" ± {s['sd']:.2f}"), "" if found.get("mean") is None else f"{found['mean']:+.2f}", found.get("verdict", ""),
            show(None if time.get("median") is None else 1e3 * time["median"], "{:.2f}"), show(found.get("time_ratio", 1.0 if arm is report["arms"][0] else None), "{:.2f}"),
            show(None if peak(s) is None else peak(s) / 2**20, "{:.0f}"), show(None if ledger is None else ledger / 2**20, "{:.2f}"),
            f"{s['skipped']} of {s['steps']}" if s["steps"] else "–"]


def text(report):
    """The report as a terminal shows it."""
    metric = report["metric"]
    columns = ["arm", f"{metric['name']}{' %' if metric['unit'] == '%' else ''}", "difference", "verdict", "step ms", "ratio", "peak MiB", "state MiB", "skipped"]
    rows = [columns, *(_cells(arm, report) for arm in report["arms"])]
    lines = [table(rows, left=(0, 3)), ""]
    lines += [ *(verdict_line(c, report) for c in report["comparisons"])]
    for arm in report["arms"]:
        if arm.get("failed"):
            lines.append(f"{arm['name']} failed with seed {arm['failed']['seed']}: {arm['failed']['line']} (log: {arm['failed']['log']})")
        lines += [f"{arm['name']}: {line}" for line in warnings(arm)]
    energies = {(arm["summary"]["energy"]["reason"]) for arm in report["arms"] if arm["summary"]} - {None}
    lines += [f"energy: null: {reason}" for reason in sorted(energies)]
    return "\n".join(lines + [f"note: {note}" for note in report["notes"]])
