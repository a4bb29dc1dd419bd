"""Traces: what the loss scale and the gradients did, written down as they did it. The file format: docs/telemetry.md."""

import dataclasses
import json
import math
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from ._library import H, to_device
from ._room import capturing, dtype_name, names_of
from ._stats import LAST_BAD, LOSS, SCALE, send

FORMAT, VERSION = "halfstep-trace", 1
COUNT, ZEROS, NONFINITE, AMAX, UNDER, COLUMNS = 0, 1, 2, 3, 4, 62  # grad_histogram; column UNDER + 1 + k holds [2^(k-40), 2^(k-39))
LOWEST = -40
STATS = 8  # grad_stats: nonfinite, squares, amax, zeros, subnormals, count
OVERFLOW, SMALLEST, NORMAL = 65520.0, 2.0**-25, 2.0**-14  # from here FP16 is inf; up to here it is 0; below here subnormal


def number(x):
    """JSON knows no inf and no NaN."""
    return x if math.isfinite(x) else str(x)


def label(policy):
    """The policy in few words: of a dataclass, what differs from its defaults."""
    if not dataclasses.is_dataclass(policy):
        return repr(policy) if type(policy).__repr__ is not object.__repr__ else type(policy).__name__
    values = {f.name: (getattr(policy, f.name), f.default) for f in dataclasses.fields(policy)}
    return f"{type(policy).__name__}({', '.join(f'{k}={v:g}' if isinstance(v, float) else f'{k}={v!r}' for k, (v, default) in values.items() if v != default)})"


# -- recording -------------------------------------------------------------------------------------
class Recorder:
    """Writes a row each update until close(). Also a context manager."""

    def __init__(self, scaler, path, every):
        self._scaler, self._every = scaler, every
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  closed by close()
        self.path, self.rows = Path(path), 0
        self._tensors, self._pending, self._free, self._rule = {}, [], [], None
        self._optimizers, self._next = weakref.WeakKeyDictionary(), 1  # the number of each, from 1
        self._forget()
        self._write({"format": FORMAT, "version": VERSION, "every": every})

    def _forget(self):
        self._scale, self._entries, self._seen, self._parts = None, [], set(), []

    def _write(self, row):
        self._file.write(json.dumps(row, separators=(",", ":")) + "\n")
        self._file.flush()  # one write of one line: a process that is killed leaves whole lines, and at most one part of one

    # -- what the scaler calls ---------------------------------------------------------------------
    def restart(self):
        """Another state was loaded into the scaler."""
        self._rule = None

    def begin(self):
        """Before anything of an iteration is unscaled or stepped."""
        if capturing():
            raise RuntimeError(f"{self.path}: a captured step cannot be recorded, since its replays do not run Python; close the recorder before the capture")
        self._forget()
        scaler = self._scaler
        if self._rule is not scaler.policy:
            self._rule = scaler.policy
            self._drain(wait=True)
            self._write({"policy": label(self._rule), "vector": [number(x) for x in self._rule.vector().tolist()], "state": [number(x) for x in scaler._state.tolist()]})
        self._scale = scaler._state[SCALE].clone()

    @torch.no_grad()
    def look(self, optimizer, scale):
        """The gradients of `optimizer`, which carry `scale`, once an iteration."""
        if self._scale is None or id(optimizer) in self._seen:  # None: recording began in the middle of an iteration
            return
        self._seen.add(id(optimizer))
        number = self._optimizers.setdefault(optimizer, self._next)  # held weakly: their count falls when one ends
        self._next = max(self._next, number + 1)
        if self.rows % self._every:
            return
        devices = {}
        for index, group in enumerate(optimizer.param_groups):
            for param, name in zip(group["params"], names_of(group, index)):
                if param.grad is not None:
                    entries, grads = devices.setdefault(param.grad.device, ([], []))
                    entries.append(self._tensor(number, name, param))
                    grads.append(param.grad.coalesce()._values() if param.grad.is_sparse else param.grad)
        for device, (entries, grads) in devices.items():
            self._entries += entries
            factor = to_device(scale.reshape(()), device, torch.float32)
            self._parts.append(torch.cat([H.grad_histogram(grads, factor), H.grad_stats(grads, [])[:-1]], 1))

    def _tensor(self, optimizer, name, param):
        key = (optimizer, name, param.dtype, param.numel())
        if key not in self._tensors:
            self._tensors[key] = len(self._tensors)
            self._drain(wait=True)
            self._write({"tensor": self._tensors[key], "name": name, "optimizer": optimizer, "dtype": dtype_name(param.dtype), "numel": param.numel()})
        return self._tensors[key]

    @torch.no_grad()
    def updated(self, by_hand):
        """After the scaler's update; by_hand: the user set the scale instead of the policy."""
        if self._scale is None:
            return
        scaler, history = self._scaler, self._scaler._history
        device = scaler._state.device
        if by_hand:
            found, loss = scaler._combine(scaler._found.values(), device) if scaler._found and not scaler._fresh else torch.zeros((), device=device), history.judged
        else:
            found, loss = history.last[LAST_BAD], history.last[LOSS]
        there = lambda t: to_device(t.reshape(-1), device, torch.float64)
        numbers = torch.cat([there(t) for t in (self._scale, found, loss, scaler._state[SCALE], *self._parts)])
        self._pending.append((self.rows + 1, by_hand, self._entries, *send(numbers, self._free)))
        self.rows += 1
        self._forget()
        self._drain()

    # -- to the file -------------------------------------------------------------------------------
    def _drain(self, wait=False):
        while self._pending and (self._pending[0][4] is None or wait or self._pending[0][4].query()):
            step, by_hand, entries, host, event = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            numbers = host.tolist()
            scale, found, loss, after = numbers[:4]
            row = {"step": step, "scale": number(scale), "loss": number(loss), "found_inf": int(found != 0)}
            if by_hand:
                row["set"] = after
            if (step - 1) % self._every == 0:
                width = COLUMNS + STATS
                row["grads"] = [self._packed(tensor, numbers[4 + i * width:4 + (i + 1) * width]) for i, tensor in enumerate(entries)]
            if event is not None:
                self._free = [*self._free, host][-4:]
            self._write(row)

    @staticmethod
    def _packed(tensor, row):
        counts = [int(c) for c in row[UNDER:COLUMNS]]
        used = [i for i, c in enumerate(counts) if c]
        first, last = (used[0], used[-1] + 1) if used else (0, 0)
        _, squares, amax, _, subnormals = row[COLUMNS:COLUMNS + 5]
        return [tensor, int(row[COUNT]), int(row[ZEROS]), int(row[NONFINITE]), number(row[AMAX]), int(subnormals), number(amax), number(squares), first, counts[first:last]]

    def close(self):
        """Waits for what the device has not finished yet, writes it and ends the recording."""
        if self._file.closed:
            return
        try:
            self._drain(wait=True)
        finally:
            self._file.close()
            if self._scaler._history.recorder is self:
                self._scaler._history.recorder = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def record(scaler, path, every=1):
    """Writes a trace of every update of `scaler` to `path`, with a histogram of each gradient at each `every`-th update.

    Returns a handle to close() or to use in `with`. Every line is written whole as soon as the device has finished the
    update, so that the file of a process that was killed can be read up to there.
    """
    if not scaler.is_enabled():
        raise ValueError("record: the GradScaler is disabled, so there is no scale to record")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"record: every is {every!r}; expected a whole number from 1")
    if scaler.losses > 1:
        raise ValueError(f"record: the GradScaler has losses={scaler.losses}; a trace holds the scale of one")
    if scaler._history.recorder is not None:
        raise ValueError(f"record: the GradScaler is being recorded into {scaler._history.recorder.path} already; close that first")
    recorder = Recorder(scaler, path, every)
    scaler._history.recorder = recorder
    return recorder


# -- reading ---------------------------------------------------------------------------------------
@dataclass
class Step:
    """One recorded update."""

    step: int
    scale: float
    loss: float
    found_inf: bool
    set: float | None = None               #: the scale that the user set instead of the policy's
    grads: "Gradients | None" = None       #: where they were looked at
    start: "dict | None" = None            #: policy, vector and state from here on, where they begin or were loaded


class Gradients:
    """What is known of the gradients of one step: a row a tensor, unscaled but for `subnormals`, `amax` and `squares`."""

    def __init__(self, packed):
        rows = torch.zeros(len(packed), COLUMNS - UNDER, dtype=torch.float64)
        for row, (*_, first, counts) in zip(rows, packed):
            row[first:first + len(counts)] = torch.tensor(counts, dtype=torch.float64)
        numbers = torch.tensor([[float(x) for x in entry[:8]] for entry in packed], dtype=torch.float64).reshape(len(packed), 8)
        self.tensors, self.counts = numbers[:, 0].long(), rows
        self.count, self.zeros, self.nonfinite, self.largest, self.subnormals, self.amax, self.squares = numbers[:, 1:].unbind(1)

    def below(self, threshold, scale):
        """Elements, by tensor, that would lie below `threshold` at `scale`; within the bin that it cuts, in proportion on the log scale."""
        edges = torch.arange(LOWEST - 1, 17, dtype=torch.float64)  # of UNDER, whose lower edge is nowhere, of each power of two and of what is over
        part = (math.log2(threshold) - math.log2(scale) - edges).clamp(0, 1)
        part[0] = float(part[1] > 0)
        part[-1] = float(threshold / scale > 2.0**16)
        return self.counts @ part


@dataclass
class Trace:
    """A recorded run."""

    path: str
    tensors: list
    steps: list

    def limited(self):
        """Which tensors cannot leave FP16's range without becoming inf: FP16 ones, and FP32 ones, which autocast computes in FP16
        and widens, unless a step shows one beyond the range at its own scale."""
        limited = torch.tensor([t["dtype"] in ("float16", "float32") for t in self.tensors], dtype=torch.bool)
        for step in self.steps:
            if step.grads is not None and not step.found_inf:
                limited[step.grads.tensors[step.grads.largest * step.scale >= OVERFLOW]] = False
        return limited


def read(path):
    """The Trace in a file of record(). An incomplete last line, of a process that was killed, is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    lines.pop()  # "" after the last whole line, or what there is of the next
    try:
        head = json.loads(lines[0]) if lines else {}
    except json.JSONDecodeError:
        head = {}
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ValueError(f"{path} is not a halfstep trace: its first line is {(lines or ['empty'])[0][:60]!r}")
    if head.get("version") != VERSION:
        raise ValueError(f"{path} is a halfstep trace of version {head.get('version')}; this halfstep reads version {VERSION}")
    tensors, steps, start = [], [], None
    for at, line in enumerate(lines[1:], 2):
        try:
            row = json.loads(line)
            if "tensor" in row:
                tensors.append(row)
            elif "vector" in row:
                start = {"policy": row["policy"], "vector": [float(x) for x in row["vector"]], "state": [float(x) for x in row["state"]]}
            else:
                grads = Gradients(row["grads"]) if row.get("grads") else None
                steps.append(Step(row["step"], float(row["scale"]), float(row["loss"]), bool(row["found_inf"]), row.get("set"), grads, start))
                start = None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {at}: {type(error).__name__} {error}: {line[:60]!r}") from None
    if not steps:
        raise ValueError(f"{path} holds no step")
    return Trace(str(path), tensors, steps)
