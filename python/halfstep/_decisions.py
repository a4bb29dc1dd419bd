"""Logs of decisions: JSON that is whole at any time, read back for a replay (docs/precision.md)."""

import json
import math
import os
from pathlib import Path

from ._file import replacing
from ._schema import load

VERSION = 1


def plain(value):
    """`value` for JSON, which knows no inf and no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def write(path, format, content):
    with replacing(path, text=True) as file:
        json.dump({"format": format, "version": VERSION, **plain(content)}, file, indent=1, allow_nan=False)
        file.write("\n")


def read(path, format, fields, argument):
    """The log in a file; a ValueError that names the file where it is none. `fields`: {key: type} that it must have."""
    path = os.fspath(path)
    try:
        data = load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: {error}") from None
    if not isinstance(data, dict) or data.get("format") != format:
        raise ValueError(f"{argument}: {path} is not a {format} file")
    if data.get("version") != VERSION:
        raise ValueError(f"{argument}: {path} is of version {data.get('version')!r}; this halfstep reads version {VERSION}")
    for key, kind in fields.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(f"{argument}: {path}: {key!r} is {type(data.get(key)).__name__}; expected {kind.__name__}")
    return data


POLICY = "halfstep-policy"


def read_policy(path, known=None):
    """{option: value} of the arm that `halfstep tune` wrote into a file."""
    options = read(path, POLICY, {"arm": dict}, "policy")["arm"].get("options")
    if not isinstance(options, dict) or "islands" not in options:
        raise ValueError(f"policy: {os.fspath(path)}: 'arm' has no options with islands")
    for key, value in options.items():
        if known is not None and key not in known or value is not None and not isinstance(value, str):
            raise ValueError(f"policy: {os.fspath(path)}: {key}={value!r} is no option of an arm")
    return options


def check_path(log, replay, caller):
    """The path of a log; refuses one that could not be written, before hours of training, and one that is being replayed."""
    if log is None:
        return None
    path = Path(log)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{caller}: log: {path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}")
    if replay is not None and path.exists() and Path(replay).exists() and path.samefile(replay):
        raise ValueError(f"{caller}: log and replay are both {path}; a replay that ended early would leave less of it")
    return path


def check_state(state_dict, keys, caller):
    """A state_dict of format 1 with these keys."""
    missing = [key for key in ("format", *keys) if key not in state_dict]
    if missing:
        raise ValueError(f"{caller} state has no {missing[0]!r} (keys: {', '.join(map(str, state_dict))})")
    if state_dict["format"] != 1:
        raise ValueError(f"{caller} state has format {state_dict['format']!r}; this halfstep reads format 1")


def check_decisions(decisions, fields, where):
    """Each a dict with these fields and types, in the order of their steps."""
    last = 0
    for i, decision in enumerate(decisions):
        for key, kind in fields.items():
            if not isinstance(decision, dict) or not isinstance(decision.get(key), kind) or isinstance(decision[key], bool):
                raise ValueError(f"{where}: decisions[{i}] has no good {key!r}; expected {kind.__name__}")
        if decision["step"] < last:
            raise ValueError(f"{where}: decisions[{i}] is of step {decision['step']}, after one of step {last}")
        last = decision["step"]
    return decisions


def whole(name, value, caller, at_least=1):
    """`value` if it is a whole number from `at_least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{caller}: {name} is {value!r}; expected a whole number from {at_least}")
    return value


def fraction(name, value, caller):
    """`value` if it is a number between 0 and 1, neither of them."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{caller}: {name} is {value!r}; expected a number between 0 and 1")
    return float(value)
