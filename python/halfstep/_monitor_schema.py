"""The files of a monitor, its report and its live status, checked when they are read (docs/monitor.md). Without torch: `halfstep watch` starts at once."""

import math

from ._schema import _check, _check_nested, _check_numbers, _NUMBER, _rows, load

FORMAT, VERSION = "halfstep-monitor", 1
STATES = ("running", "ended", "failed")
_TOP = {"format": (str, True), "version": (int, True), "status": (dict, True), "every": (int, False), "scale": (dict, False), "losses": (list, False), "gradients": (dict, False), "layers": (list, False),
        "shares": (dict, False), "unsampled": (dict, False), "environment": (dict, False)}
_STATUS = {"state": (str, True), "step": (int, True), "pid": (int, False), "host": (str, False), "started": ((int, float), False), "time": ((int, float), False), "scale": (_NUMBER, False),
           "skipped": (int, False), "consecutive_skips": (int, False), "grad_norm": (_NUMBER, False), "loss": (_NUMBER, False), "steps_per_second": (_NUMBER, False), "headroom": (dict, False),
           "underflow": (dict, False), "diagnosis": (str, False), "first_bad_param": (str, False), "error": (str, False)}
_LAYER = {"name": (str, True), "kind": (str, True), "nonzero": (int, True), "underflow": (_NUMBER, True), "subnormal": (_NUMBER, True), "overflow": (_NUMBER, True), "saturated": (_NUMBER, True),
          "lost": (_NUMBER, True), "headroom": (_NUMBER, False)}


def validate(data, where="monitor file"):
    """`data` if it is a report or status of a version that this halfstep reads; else a ValueError that names the field."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{where} is not a halfstep monitor's file" + (f": 'format' is {data.get('format')!r}" if isinstance(data, dict) else ""))
    if data.get("version") != VERSION:
        raise ValueError(f"{where} is a monitor's file of version {data.get('version')!r}; this halfstep reads version {VERSION}")
    _check(data, _TOP, where)
    status = data["status"]
    _check(status, _STATUS, f"{where}: status")
    if status["state"] not in STATES:
        raise ValueError(f"{where}: status.state is {status['state']!r}; expected one of {', '.join(STATES)}")
    for key in ("started", "time", "scale", "grad_norm", "loss", "steps_per_second"):
        _rows([[status[key]]] if status.get(key) is not None else [], (1,), f"{where}: status.{key}")
    for key, number in (("headroom", "bits"), ("underflow", "share")):
        if status.get(key):
            _check(status[key], {"name": (str, True), number: ((int, float), True)}, f"{where}: status.{key}")
            _check_numbers({number: status[key][number]}, f"{where}: status.{key}")
    _check_nested(data, where)
    for i, layer in enumerate(data.get("layers") or ()):
        _check(layer, _LAYER, f"{where}: layers[{i}]")
    gradients = data.get("gradients") or {}
    _check(gradients, {"step": (int, bool(gradients)), "tensors": (list, bool(gradients))}, f"{where}: gradients")
    for i, tensor in enumerate(gradients.get("tensors") or ()):
        _check(tensor, {"name": (str, True), "amax": (_NUMBER, False), "headroom": (_NUMBER, False), "least_headroom": (_NUMBER, False)}, f"{where}: gradients.tensors[{i}]")
    return data


def read(path):
    """The report or status in a file; OSError or ValueError, each with the path, where there is none."""
    return validate(load(path), str(path))


def scale_text(scale):
    """2^16, or 2^15.97 for a scale that is no power of two."""
    scale = float(scale)
    return f"2^{round(math.log2(scale), 2):g}" if 0 < scale < math.inf else f"{scale:g}"


def percent(share):
    return f"{100 * share:.3g} %"


def line(status):
    """A status as one line."""
    step, skipped = status["step"], status.get("skipped") or 0
    parts = [f"step {step:,}"]
    if status.get("scale") is not None:
        parts.append(f"scale {scale_text(status['scale'])}")
        row = f", {status['consecutive_skips']} in a row" if (status.get("consecutive_skips") or 0) > 1 else ""
        parts.append(f"skipped {skipped:,} ({percent(skipped / max(step, 1))}{row})")
    for key, text in (("loss", "loss"), ("grad_norm", "norm")):
        if status.get(key) is not None:
            parts.append(f"{text} {float(status[key]):.4g}")
    if status.get("headroom"):
        parts.append(f"headroom {status['headroom']['bits']:.1f} bits {status['headroom']['name']}")
    if status.get("underflow"):
        parts.append(f"underflow {percent(status['underflow']['share'])}" + (f" {status['underflow']['name']}" if status["underflow"]["share"] > 0 else ""))
    if status.get("steps_per_second") is not None:
        parts.append(f"{float(status['steps_per_second']):.3g} steps/s")
    if status.get("diagnosis"):
        parts.append(f"no step is taken: {status['diagnosis']}" + (f", '{status['first_bad_param']}' first" if status.get("first_bad_param") else ""))
    if status["state"] != "running":
        parts.append(status["state"] + (f": {status['error']}" if status.get("error") else ""))
    return "  ".join(" ".join(part.split()) for part in parts)
