"""tune(): the fewest layers in FP32 with which a job in 16 bits is as good as in FP32, each candidate judged with paired seeds (docs/precision.md)."""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

from . import _decisions, _report, _statistics, _worker
from ._compare import _device, _folder, _place, _Runs, _seeds, environment
from ._extras import need
from ._islands import layers as layers_of
from ._job import Arm, Job, _on
from ._progress import progress
from ._room import SIXTEEN
from ._shares import Shares, unpacked
from ._table import table

ENOUGH = (_statistics.EQUIVALENT, _statistics.BETTER)
FAILED = "failed"


@dataclass
class Tuning:
    """What tune() returns; printed, it is the table of the command line."""

    data: dict          #: policy.json; its "islands" is None where no set of layers was enough
    out: "Path | None"  #: the folder that holds it

    @property
    def islands(self):
        """Names of the fewest layers found, or None."""
        return self.data["islands"]

    @property
    def verdict(self):
        """That of the found set; where none was enough, of all layers in FP32."""
        return self.data["verdict"]

    @property
    def exit_status(self):
        """0 a set was found (it may be empty), 2 all layers in FP32 are worse too, 3 it cannot be told, 1 they failed."""
        return 0 if self.islands is not None else {_statistics.UNDECIDED: 3, FAILED: 1}.get(self.verdict, 2)

    @property
    def arm(self):
        """The Arm with these islands."""
        if self.islands is None:
            raise ValueError(f"tune found no set of layers that is enough: all of them are {self.verdict}")
        return Arm("tuned", **self.data["arm"]["options"])

    def __str__(self):
        unit = self.data["unit"]
        number = lambda x: "" if x is None else f"{x:+.3g}"
        rows = [("layers in FP32", "verdict", f"difference{unit}", "90 % interval", "")]
        for trial in self.data["trials"]:
            low, high = trial["interval90"] or (None, None)
            names = trial["islands"]
            rows.append((f"{len(names)}: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}" if names else "none", trial["verdict"], number(trial["mean"]),
                         "" if low is None else f"{low:+.3g} to {high:+.3g}", trial["note"] or ""))
        return f"{table(rows, left=(0, 1, 4))}\n{self._conclusion()}"

    def _conclusion(self):
        d = self.data
        against, count = f"as good as {d['against']} within {d['margin']:g}{d['unit']}", len(d["layers"])
        if self.islands is None:
            more = next((f"; run {t['more']} more seeds" for t in reversed(d["trials"]) if t["islands"] and t["more"] and self.verdict == _statistics.UNDECIDED), "")
            return f"no set of the {count} layers makes {d['base']} {against}: with all of them in FP32 the verdict is {self.verdict}{more or '; --layers may name containers whose own ops overflow'}"
        return f"{d['base']} is {against} with " + ("no layer in FP32" if not self.islands else f"{len(self.islands)} of {count} layers in FP32: {', '.join(self.islands)}")


class _Trials:
    """Sets of islands, each trained with every seed once and judged against the first arm."""

    def __init__(self, runs, base, first, seeds, margin):
        self._runs, self._base, self._seeds, self._margin, self._known, self.tried = runs, base, seeds, margin, {}, []
        self.first = self._train(first)
        if self.first["failed"]:
            raise RuntimeError(f"arm {first.name!r}, with which the others are compared, failed: {self.first['failed']['line']} (log: {self.first['failed']['log']})")

    def _train(self, arm):
        found = {"name": arm.name, "options": arm.options(), "runs": [], "failed": None}
        with progress(len(self._seeds)) as bar:
            for seed in self._seeds:
                result = self._runs.run(arm, seed, seed == self._seeds[0] and arm.islands == self._base.islands, bar)
                error = result.get("error")
                if error and error["load"]:
                    raise ValueError(error["line"])
                if error:
                    found["failed"] = {k: error[k] for k in ("seed", "line", "log")}
                    break
                found["runs"].append({k: v for k, v in result.items() if k not in ("key", "sources")})
        return found

    def arm(self, names):
        arm = copy.copy(self._base)
        if names:
            arm.name, arm.islands = f"{self._base.name} + {len(names)} in FP32", "|".join(names)
        return arm

    def judge(self, names):
        """The trial of these islands: from the runs, once."""
        key = frozenset(names)
        if key not in self._known:
            trained = self._train(self.arm(names))
            trial = {"islands": list(names), "verdict": FAILED, "mean": None, "interval90": None, "more": None, "note": None}
            if trained["failed"]:
                trial["note"] = f"seed {trained['failed']['seed']}: {trained['failed']['line']}"
            else:
                report = _report.build([self.first, trained], self._margin)
                found = report["comparisons"][0]
                trial.update({k: found.get(k) for k in ("verdict", "mean", "interval90", "more", "note")}, unit=_report.points(report))
            self._known[key] = trial, trained
            self.tried.append(trial)
            print(f"{len(names)} in FP32: {trial['verdict']}", file=sys.stderr)
        return self._known[key][0]

    def enough(self, names):
        return self.judge(names)["verdict"] in ENOUGH

    def runs_of(self, names):
        return self._known[frozenset(names)][1]["runs"]


def _job_layers(file, name, arm, rules):
    """{layer: names of its parameters} of the job's model, those that are not in FP32 anyway."""
    try:
        make = _worker.load_make(file, name)
    except _worker.CannotLoad as error:
        raise ValueError(str(error)) from None
    _worker.seed_all(0)
    try:
        job = make(copy.copy(arm), 0)
    except Exception as error:
        raise ValueError(f"{file}: {name}(): {_worker.last_line(error)}") from error
    if not isinstance(job, Job):
        raise ValueError(f"{file}: {name}() returned {type(job).__name__}; expected a halfstep.Job")
    cast = any(p.dtype in SIXTEEN for p in job.model.parameters())
    found = {}
    for layer, module in layers_of(job.model, rules, "layers").items():
        params = dict(module.named_parameters(prefix=layer))
        if not params or not cast or any(p.dtype in SIXTEEN for p in params.values()):
            found[layer] = list(params)
    return found


def _order(candidates, runs):
    """[{layer, overflow, underflow}], the most suspect first, by what the look at the base arm's first seed counted; without one, in the model's order."""
    counts = {}
    shares = next((run["shares"] for run in runs if run.get("shares")), None)
    for sample in shares["samples"] if shares else ():
        for row in sample["rows"]:
            tensor = shares["tensors"][row[0]]
            key = (tensor["name"], tensor["kind"])
            counts[key] = counts.get(key, Shares()) + unpacked(row)
    found = []
    for layer in candidates:
        mine = lambda *kinds: sum((s for (name, kind), s in counts.items() if kind in kinds and (name == layer or name.startswith(layer + "."))), Shares())
        forward, backward = mine("weight", "activation"), mine("weight gradient", "activation gradient")
        gradient = mine("weight gradient")
        found.append({"layer": layer, "overflow": forward.overflow + backward.overflow, "underflow": max(gradient.underflow, gradient.lost) / gradient.nonzero if gradient.nonzero else 0.0,
                      "subnormal": backward.subnormal / backward.nonzero if backward.nonzero else 0.0})
    found = [f for f in found if candidates[f["layer"]] or f["overflow"]]  # without weights it computes in what it is given
    return sorted(found, key=lambda f: (f["overflow"] > 0, f["underflow"], f["subnormal"]), reverse=True)


def _fewest(trials, order):
    """The fewest layers found that are enough, or None where all of them are not: the shortest enough beginning of `order`, then each left out again that can be."""
    if trials.enough([]):
        return []
    if not order or not trials.enough(order):
        return None
    low, high = 0, len(order)  # so many are not enough, and so many are
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if trials.enough(order[:middle]) else (middle, high)
    kept = order[:high]
    for name in reversed(order[:high - 1]):  # without the last one it was not enough
        without = [n for n in kept if n != name]
        if without and trials.enough(without):
            kept = without
    return kept


def tune(make, margin="0.5pp", seeds=8, *, arm="mixed", against="fp32", layers=None, out=None, every=50, device="auto"):
    """Finds the fewest layers in FP32 with which `arm` is as good as `against` within `margin`. Returns a Tuning and writes out/policy.json.

    make, seeds, every, device, margin (as delta): as in compare(). arm: an Arm or its text, 16 bits. layers: names, globs or classes to choose
    from; None: all innermost modules. out: a folder for policy.json and runs/; None: "tune".

    The layers are put in the order of what FP16 loses in them (overflow, then vanished gradients), as the first seed of `arm` was seen to. The shortest beginning of
    that order which is enough is found by halving; then each of its layers is left out again if that is enough too. "Enough" is a verdict
    of equivalent or better over all seeds, each trained in a process of its own; runs that are in `out` already are not repeated.
    ValueError: an argument, or a script that cannot be used.
    """
    if _worker.running:
        raise RuntimeError('tune() is called when its own script is imported; put the call under `if __name__ == "__main__":`')
    file, name = _place(make)
    device, seeds = _device(device), _seeds(seeds)
    base, first = (_on(a, device) if isinstance(a, Arm) else Arm.parse(a, device) for a in (arm, against))
    if base.compute == "fp32":
        raise ValueError(f"arm: {base.name!r} computes in FP32; expected a 16-bit arm, of which layers can be put in FP32")
    if base.islands is not None:
        raise ValueError(f"arm: {base.name!r} has islands already ({base.islands}); tune finds them")
    if base.name == first.name:
        raise ValueError(f"arm and against are both {base.name!r}")
    try:
        _report.parse_delta(margin)
    except ValueError:
        raise ValueError(f"margin is {margin!r}; expected a number above 0, or percentage points such as 0.5pp") from None
    _decisions.whole("every", every, "tune")
    for module in ("scipy.stats", "numpy"):
        need(module)
    out = Path("tune" if out is None else out)
    _folder(out)
    candidates = _job_layers(file, name, base, layers)
    trials = _Trials(_Runs(file, name, device, every, out), base, first, seeds, margin)
    trials.judge([])
    ranked = _order(candidates, trials.runs_of([]))
    found = _fewest(trials, [entry["layer"] for entry in ranked])
    verdict = trials.judge([entry["layer"] for entry in ranked] if found is None else found)["verdict"]
    tuned = trials.arm(found or [])
    data = {"make": f"{Path(file).name}:{name}", "source": _worker.file_hash(file), "base": base.name, "against": first.name, "margin": _report.parse_delta(margin)[0],
            "unit": next((t["unit"] for t in trials.tried if t.get("unit")), ""), "seeds": seeds, "verdict": verdict, "islands": found, "layers": ranked,
            "arm": {"options": tuned.options()}, "trials": trials.tried, "environment": environment(device)}
    if found is not None:
        _decisions.write(out / "policy.json", _decisions.POLICY, data)
    return Tuning(data, out)
