"""Reports of several machines as one table, each machine's numbers relative to its own first arm."""

import json
from pathlib import Path

from . import _bench, _report, _schema
from ._table import table

MUST_AGREE = ("make", "source", "every")


def _configuration(report):
    """{name: value} of what must be alike for numbers of two machines to belong in one table."""
    config = report.get("config") or {}
    found = {name: config.get(name) for name in MUST_AGREE}
    found["arms"] = [{"name": arm["name"], **(arm.get("options") or {})} for arm in report["arms"]]
    found["seeds"] = sorted({run["seed"] for arm in report["arms"] for run in arm["runs"]})
    found["steps"] = sorted({run["steps"] for arm in report["arms"] for run in arm["runs"] if run.get("steps")})
    found["metric"] = (report.get("metric") or {}).get("name") or (next(iter(report["arms"][0]["runs"][0]["metrics"])) if report["arms"][0]["runs"] else None)
    return found


def merge(paths):
    """The rows of the files, reports of compare or tables of bench (_bench.merge).

    Of reports: [{machine, device, arm, metric, difference, step_ms, time_ratio, peak_mib, memory_ratio, joules_per_step, energy_ratio}].

    ValueError where two of them did not run the same script, arms, seeds, steps and metric; it names what differs and both values.
    """
    files = [(str(path), _schema.load(path)) for path in paths]
    benches = [path for path, data in files if isinstance(data, dict) and data.get("format") == _bench.FORMAT]
    if benches and len(benches) < len(files):
        other = next(path for path, _ in files if path not in benches)
        raise ValueError(f"{benches[0]} is a table of bench and {other} is none; expected files of one kind")
    if benches:
        return _bench.merge([(path, _bench.validate(data, path)) for path, data in files])
    reports = [(path, _schema.validate(data, path)) for path, data in files]
    first = _configuration(reports[0][1])
    for path, report in reports[1:]:
        for name, value in _configuration(report).items():
            if value != first[name]:
                raise ValueError(f"{name} differs: {_brief(first[name], value)} in {reports[0][0]}, {_brief(value, first[name])} in {path}")
    return [row for path, report in reports for row in _rows(path, report)]


def _brief(value, other):
    """A value in few words: of lists, what the other does not have."""
    if isinstance(value, list) and isinstance(other, list):
        own = [v for v in value if v not in other]
        return json.dumps(own if own else value)
    return json.dumps(value)


def _rows(path, report):
    where = report.get("environment") or {}
    built = report if report.get("comparisons") is not None and all("summary" in arm for arm in report["arms"]) else _report.build([{**a, "failed": None} for a in report["arms"]], 1.0)
    first, ratios = built["arms"][0]["summary"], {c["arm"]: c.get("time_ratio") for c in built["comparisons"]}
    for arm in built["arms"]:
        s = arm["summary"]
        if s is None:
            continue
        time = lambda s: ((s["time"] or {}).get("step") or {}).get("median")
        peak = _report.peak
        energy = lambda s: s["energy"]["joules_per_step"]
        ratio = lambda of: of(s) / of(first) if of(s) and of(first) else None
        yield {"machine": where.get("gpu") or where.get("cpu") or Path(path).stem, "device": where.get("device", "?"), "arm": arm["name"], "metric": s["mean"],
               "difference": None if s["mean"] is None or first["mean"] is None else s["mean"] - first["mean"], "step_ms": None if time(s) is None else 1e3 * time(s), "time_ratio": ratios.get(arm["name"]) or ratio(time),
               "peak_mib": None if peak(s) is None else peak(s) / 2**20, "memory_ratio": ratio(peak), "joules_per_step": energy(s), "energy_ratio": ratio(energy)}


def as_text(rows):
    """The rows as a text table."""
    if rows and "section" in rows[0]:
        return _bench.as_text(rows)
    columns = {"machine": "{}", "device": "{}", "arm": "{}", "metric": "{:.2f}", "difference": "{:+.2f}", "step_ms": "{:.2f}", "time_ratio": "{:.2f}", "peak_mib": "{:.0f}",
               "memory_ratio": "{:.2f}", "joules_per_step": "{:.3g}", "energy_ratio": "{:.2f}"}
    cells = [[name.replace("_", " ") for name in columns]] + [["–" if row[name] is None else form.format(row[name]) for name, form in columns.items()] for row in rows]
    return table(cells, left=(0, 1, 2))
