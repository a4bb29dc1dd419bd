"""What an optimizer's mode is, holds, moves and cannot do: the lines that repr() shows. docs/choose.md and docs/optimizers.md are the long form."""

import torch

from ._room import BLOCK, SIXTEEN, dtype_name, master_dtype

_KIND = {torch.int16: "split16", torch.int8: "split8", torch.float32: "fp32", torch.float64: "fp64"}
_LOST = "an update below half a unit in the weight's last place is lost"


def _breaks(dtype, master):
    if dtype in SIXTEEN and master in ("no", "stochastic"):
        return _LOST if master == "no" else "each weight is a random neighbour of the exact one"
    if master == "split8":
        return "the master has about 8 bits more than the weight"
    if dtype == torch.float16:
        return "a weight that would leave float16 range keeps its value and is reported"
    if dtype == torch.bfloat16:
        return "weights have 8 bits in the forward"
    if dtype == torch.float32:
        return "autocast casts the weights in every forward (6 bytes an element more)"
    return "for checking: no device is fast at it"


def _bytes(param, grad, kept, reads_weight, reads_twice, zeroes):
    """(held, moved) bytes an element; `kept`: what is read and written beside weight and gradient."""
    held = param.itemsize + grad + kept
    moved = grad * ((2 if reads_twice else 1) + zeroes) + param.itemsize * (2 if reads_weight else 1) + 2 * kept
    return round(held, 2), round(moved, 2)


def mode(room, i, reads_twice, norm_pass=False):
    """(name, bytes held, bytes moved, what breaks) of parameter `i` of a group; `norm_pass`: the rule reads all of it once for its norms."""
    group, dtype = room.group, room.params[i].dtype
    held = master_dtype(group["master"], room.params[i])
    states = [(tensors[i].dtype, key) for key, tensors in room.states.items() if key not in room.tensor_states]
    kept = sum(d.itemsize + (1 / BLOCK if d in (torch.int8, torch.uint8) else 0) for d, _ in states)
    kept += 0 if held is None else held.itemsize
    mean = room.compute_dtype(i).itemsize if room.emas else 0
    master = "no" if held is None else "kahan" if held == dtype else _KIND[held]
    if group["master"] == "stochastic" and dtype in SIXTEEN:
        master = "stochastic"
    grad = 4 if group["grad_dtype"] == "fp32" and dtype in SIXTEEN else dtype.itemsize
    reads_weight = held in (None, torch.int16, torch.int8, dtype)
    name = f"{dtype_name(dtype)} weights, " + {"no": "no master", "stochastic": "rounded at random"}.get(master, f"{master} masters")
    narrow = {d for d, _ in states} & {torch.bfloat16, torch.int8, torch.uint8}
    name += f", {'bf16' if torch.bfloat16 in narrow else 'int8'} states" if narrow else ""
    name += ", running mean" if room.emas else ""
    holds, moved = _bytes(dtype, grad, kept + mean, reads_weight, reads_twice, room.zero_grads)
    if norm_pass:
        moved = round(moved + grad + kept + (dtype.itemsize if reads_weight else 0), 2)
    return name, holds, moved, _breaks(dtype, master)


def plain_mode(param, master, states):
    """The same of a parameter under hs.optim.Masters; `master`: its dtype or None, `states`: theirs."""
    kept = (0 if master is None else master.itemsize) + sum(d.itemsize for d in states)
    name = f"{dtype_name(param.dtype)} weights, " + ("no master" if master is None else f"{_KIND[master]} masters")
    return (name, *_bytes(param.dtype, param.dtype.itemsize, kept, master is None, True, False), _breaks(param.dtype, "no" if master is None else _KIND[master]))


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
            lines.append(f"# halfstep: {name} ({of}): holds {held:g} and moves {moved:g} bytes an element a step; {breaks}")
    return "\n".join(lines) or "# halfstep: no parameters"
