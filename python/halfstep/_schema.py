"""The fields of report.json, checked one by one when a report is read (docs/compare.md)."""

import json
import math
from pathlib import Path

FORMAT, VERSION = "halfstep-report", 1
_NUMBER = (int, float, str)  # "inf", "-inf", "nan" are strings
_RUN = {"seed": (int, True), "metrics": (dict, True), "correct": (str, False), "labels": (list, False), "steps": (int, False), "examples": (int, False), "seconds": (_NUMBER, False), "time": (dict, False),
        "memory": (dict, False), "ledger": (dict, False), "energy": (dict, False), "skipped": (int, False), "scale": (dict, False), "matrix": (dict, False),
        "shares": (dict, False), "losses": (list, False)}
_ARM = {"name": (str, True), "runs": (list, True), "options": (dict, False), "failed": (dict, False)}
_TOP = {"format": (str, True), "version": (int, True), "arms": (list, True), "metric": (dict, False), "environment": (dict, False), "config": (dict, False)}


def _check(value, fields, where):
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {type(value).__name__}; expected an object")
    for key, (kind, needed) in fields.items():
        if value.get(key) is None:
            if needed:
                raise ValueError(f"{where} has no {key!r}")
        elif not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise ValueError(f"{where}: {key!r} is {type(value[key]).__name__}; expected {kind.__name__ if isinstance(kind, type) else 'a number'}")


def _check_numbers(value, where, finite=True):
    for key, entry in value.items():
        if isinstance(entry, dict):
            _check_numbers(entry, f"{where}.{key}", finite)
        elif entry is not None:
            _number(entry, f"{where}.{key}", finite)


def _number(value, where, finite=False):
    """Refuses what is no number; where it need not be finite, "inf", "-inf" and "nan" are numbers too."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and math.isfinite(value) or not finite and value in ("inf", "-inf", "nan")):
        raise ValueError(f"{where} is {value!r}; expected a number")


def _rows(value, lengths, where):
    """A list of lists of numbers, each of one of the `lengths`."""
    if not isinstance(value, list):
        raise ValueError(f"{where} is {type(value).__name__}; expected list")
    for i, row in enumerate(value):
        if not isinstance(row, list) or len(row) not in lengths:
            raise ValueError(f"{where}[{i}] is {json.dumps(row)[:40]}; expected a list of {' or '.join(map(str, lengths))} numbers")
        for entry in row:
            _number(entry, f"{where}[{i}]")


def _check_nested(run, at):
    """What pages and tables reach into."""
    _rows(run.get("losses") or [], (2,), f"{at}: losses")
    if run.get("scale"):
        scale = run["scale"]
        _check(scale, {"steps": (int, True), "points": (list, True), "skipped": (list, True), "longest": (int, False), "stable_from": (int, False)}, f"{at}: scale")
        _rows(scale["points"], (2,), f"{at}: scale.points")
        _rows([scale["skipped"]], (len(scale["skipped"]),), f"{at}: scale.skipped")
        if not scale["points"] or any(not float(value) > 0 or not math.isfinite(float(value)) for _, value in scale["points"]):
            raise ValueError(f"{at}: scale.points is empty or holds a scale that is no positive number")
    for name, entry in (run.get("matrix") or {}).items():
        _check(entry, {"metrics": (dict, "reason" not in entry) if isinstance(entry, dict) else (dict, True), "reason": (str, False), "max_error": (_NUMBER, False), "mean_error": (_NUMBER, False)}, f"{at}: matrix.{name}")
    energy = run.get("energy") or {}
    _check(energy, {"joules": ((int, float), False), "net_joules": ((int, float), False), "method": (str, False), "reason": (str, False), "notes": (list, False)}, f"{at}: energy")
    for key in ("peak_bytes", "before_bytes", "cuda_peak_bytes"):
        if (run.get("memory") or {}).get(key) is not None:
            _number(run["memory"][key], f"{at}: memory.{key}", finite=True)
    if run.get("shares"):
        _check_shares(run["shares"], f"{at}: shares")


def _check_shares(shares, at):
    _check(shares, {"tensors": (list, True), "samples": (list, True)}, at)
    for i, tensor in enumerate(shares["tensors"]):
        _check(tensor, {"name": (str, True), "kind": (str, True)}, f"{at}.tensors[{i}]")
    for i, sample in enumerate(shares["samples"]):
        _check(sample, {"step": (int, True), "scale": (_NUMBER, True), "rows": (list, True)}, f"{at}.samples[{i}]")
        _rows(sample["rows"], (9,), f"{at}.samples[{i}].rows")
        if any(not isinstance(count, int) for row in sample["rows"] for count in row[:8]):
            raise ValueError(f"{at}.samples[{i}].rows holds a count that is no whole number")
        if any(not 0 <= row[0] < len(shares["tensors"]) for row in sample["rows"]):
            raise ValueError(f"{at}.samples[{i}].rows names a tensor that is not in 'tensors'")


def validate(data, where="report"):
    """`data` if it is a report of a version that this halfstep reads; else a ValueError that names the field."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{where} is not a halfstep report: 'format' is {data.get('format')!r}" if isinstance(data, dict) else f"{where} is not a halfstep report")
    if data.get("version") != VERSION:
        raise ValueError(f"{where} is a halfstep report of version {data.get('version')!r}; this halfstep reads version {VERSION}")
    _check(data, _TOP, where)
    if not data["arms"]:
        raise ValueError(f"{where}: 'arms' is empty")
    for i, arm in enumerate(data["arms"]):
        _check(arm, _ARM, f"{where}, arms[{i}]")
        if arm.get("failed"):
            _check(arm["failed"], {"seed": (int, True), "line": (str, True), "log": (str, True)}, f"{where}, arms[{i}]: failed")
        for j, run in enumerate(arm["runs"]):
            at = f"{where}, arms[{i}] {arm['name']!r}, runs[{j}]"
            _check(run, _RUN, at)
            if not run["metrics"]:
                raise ValueError(f"{at}: 'metrics' is empty")
            _check_numbers(run["metrics"], f"{at}: metrics", finite=False)
            for key in ("ledger", "time"):
                _check_numbers(run.get(key) or {}, f"{at}: {key}")
            if set(run.get("correct") or "") - {"0", "1"}:
                raise ValueError(f"{at}: 'correct' holds other letters than 0 and 1")
            _check_nested(run, at)
    return data


def load(path):
    """What the JSON in a file says; OSError or ValueError, each with the path, where there is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read(path):
    """The report in a file; OSError or ValueError, each with the path, where there is none."""
    return validate(load(path), str(path))
