"""What an optimizer's mode is, holds, moves and cannot do: the lines that repr() shows. docs/choose.md is the long form."""

import torch

from ._room import SIXTEEN, dtype_name

_KIND = {torch.int16: "split16", torch.float32: "fp32", torch.float64: "fp64"}


def _breaks(dtype, master):
    if dtype in SIXTEEN and master is None:
        return "an update below half a unit in the weight's last place is lost"
    if dtype == torch.float16:
        return "a weight that would leave float16 range keeps its value and is reported"
    if dtype == torch.bfloat16:
        return "weights have 8 bits in the forward"
    if dtype == torch.float32:
        return "autocast casts the weights in every forward (6 bytes an element more)"
    return "for checking: no device is fast at it"


def mode(param, master, states, grad_dtype, reads_twice):
    """(name, bytes held, bytes moved, what breaks) of one parameter; `states`: their dtypes, `master`: its dtype or None."""
    size = lambda dtype: dtype.itemsize
    grad = 4 if grad_dtype == "fp32" and param.dtype in SIXTEEN else size(param.dtype)
    kept = (0 if master is None else size(master)) + sum(map(size, states))
    reads_weight = master in (None, torch.int16)
    held = size(param.dtype) + grad + kept
    moved = grad * (2 if reads_twice else 1) + size(param.dtype) * (2 if reads_weight else 1) + 2 * kept
    name = f"{dtype_name(param.dtype)} weights, " + ("no master" if master is None else f"{_KIND[master]} masters")
    return name, held, moved, _breaks(param.dtype, master)


def describe(modes):
    """`modes`: (mode of a parameter, its elements), or (None, elements) for a frozen one."""
    found = {}
    for key, elements in modes:
        count, total = found.get(key, (0, 0))
        found[key] = (count + 1, total + elements)
    lines = []
    for key, (count, total) in found.items():
        of = f"{count} parameter{'s' if count > 1 else ''}, {total:,} elements"
        if key is None:
            lines.append(f"# halfstep: frozen: no master, no state ({of})")
        else:
            name, held, moved, breaks = key
            lines.append(f"# halfstep: {name} ({of}): holds {held} and moves {moved} bytes an element a step; {breaks}")
    return "\n".join(lines) or "# halfstep: no parameters"
