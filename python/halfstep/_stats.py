"""What the scaler knows of each update: queued on the device, read when the host has it."""

import math
import weakref
from dataclasses import dataclass
from typing import Optional

import torch

from ._library import grad_stats, to_device
from ._room import capturing, names_of, warn

STATE_ENTRIES, ROW = 16, 8
SCALE, TRACKER, CLEAN, APPLIED, SKIPPED, CONSECUTIVE, LAST_BAD = 0, 1, 3, 4, 5, 6, 7
_NORM, _OVERFLOWED, _FLUSHED, LOSS, _REST = range(STATE_ENTRIES, STATE_ENTRIES + 5)  # then the controls of the steps, then rows of grad_stats
_NONFINITE, _SQUARES, _AMAX, _ZEROS, _SUBNORMALS, _COUNT, _FIRST_BAD = range(7)
CONTROL = 4
STUCK, STUCK_AT_FLOOR = 20, 3  # skips in a row before a diagnosis; with the scale at its floor, where it can fall no further


@dataclass(frozen=True)
class ScalerStats:
    """The newest update that the device has finished."""

    step: int                       #: updates so far
    scale: float                    #: after that update
    clean_steps: int                #: clean updates in a row
    steps_applied: int
    steps_skipped: int
    consecutive_skips: int
    last_found_inf: bool
    first_bad_param: Optional[str]  #: name of the first parameter with a non-finite gradient in that update
    grad_norm: float                #: unscaled, before clipping, over all optimizers stepped; nan when found_inf
    amax: float                     #: largest |gradient| as stored
    zero_share: float               #: zeros / elements
    subnormal_share: float          #: FP16-subnormal gradients / non-zero gradients
    overflowed: int                 #: weights kept from leaving the 16-bit range, in all
    flushed: int = 0                #: FP16 gradients that unscaling in place set to zero for stock optimizers, in all
    diagnosis: Optional[str] = None  #: why no step is taken any more: "loss is not finite", "gradients overflow" or "scale is at its floor"


@dataclass(frozen=True)
class TensorStats:
    """One parameter's gradient in the newest update that the device has finished."""

    amax: float             #: largest |gradient| as stored
    norm: float             #: unscaled, before clipping
    zero_share: float       #: zeros / elements
    subnormal_share: float  #: FP16-subnormal elements / non-zero ones
    nonfinite: int          #: elements that are inf or NaN
    count: int              #: elements


class Names:
    """What grad_stats rows are called, for an optimizer without rooms."""

    def __init__(self, names):
        self.names = names


def members(optimizer):
    """[(parameters, names)], one entry a group."""
    if torch.compiler.is_compiling():
        # A graph must not ask for param_groups: torch 2.11 then makes constants of the parameters, for which a traced backward() does nothing.
        return [(room.params, room.names) for room in optimizer._rooms]
    return [(group["params"], names_of(group, index)) for index, group in enumerate(optimizer.param_groups)]


def gradients(optimizer):
    """{device: (names, dense gradients or values of sparse ones)} of the parameters that have one."""
    devices = {}
    for params, names in members(optimizer):
        for param, name in zip(params, names):
            grad = param.grad
            if grad is not None:
                found, grads = devices.setdefault(grad.device, ([], []))
                found.append(name)
                grads.append(grad._values() if grad.is_sparse else grad)
    return devices


def stats_of(optimizer):
    """grad_stats of any optimizer's gradients as (names, table, None), one entry a device."""
    return [(Names(names), grad_stats(grads), None) for names, grads in gradients(optimizer).values()]


def send(numbers, free=()):
    """A copy of `numbers` on its way to the host as (tensor, event); nothing waits. On the CPU it is there. `free`: pinned tensors to reuse."""
    if numbers.device.type != "cuda":
        return numbers, None
    host = next((free.pop(i) for i, t in enumerate(free) if t.shape == numbers.shape), None)
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True) if host is None else host
    host.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


class Update:
    """One update's numbers, on their way or arrived."""

    def __init__(self, floor, steps, host, event, tables):
        self.floor, self.host, self.event = floor, host, event
        self.names = [names for entries, _ in steps for names, _ in entries]
        self.step_of = [i for i, (entries, _) in enumerate(steps) for _ in entries]
        self.sizes = [table.shape[0] for entries, _ in steps for _, table in entries]
        self.steps, self.tables = len(steps), tables

    def arrived(self):
        return self.event is None or self.event.query()

    def numbers(self):
        """The list of all of them, and the totals of each table."""
        numbers, at, totals = self.host.tolist(), _REST + CONTROL * self.steps, []
        for size in self.sizes:
            at += 0 if self.tables is not None else (size - 1) * ROW
            totals.append(numbers[at:at + ROW])
            at += ROW
        return numbers, totals

    def rows(self):
        """Of each table: names, rows without the totals, and the scale that is in the gradients."""
        numbers, at = self.host.tolist(), _REST + CONTROL * self.steps
        for i, (names, size) in enumerate(zip(self.names, self.sizes)):
            flat = numbers[at:at + size * ROW] if self.tables is None else self.tables[i].flatten().tolist()
            at += size * ROW
            control = numbers[_REST + CONTROL * self.step_of[i]:][:CONTROL]
            scale = control[3] / control[1] if control[1] else math.nan
            yield names, [flat[r * ROW:(r + 1) * ROW] for r in range(size - 1)], scale


class History:
    """The numbers of the last updates on their way to the host, and what is to be said when they arrive."""

    def __init__(self):
        self.offset, self.steps = 0, []  # updates in all, less those that the state counts
        self.loss = self.judged = None  # sums of losses: scaled since the last update, and before it
        self.floor = 0.0  # the lowest scale that the policy allows
        self.recorder = self.last = None  # halfstep.trace's, and for it the newest numbers where they are
        self.watchers = []  # monitors: arrived() as an update's numbers arrive, in order; updated() after each; restart() as another state was loaded
        self._pending, self._newest, self._flushed, self._free, self._captured = [], None, None, [], None
        self._compiled, self._late = [], False  # optimizers that a compiled graph stepped; whether one updated the scale
        self._optimizers = weakref.WeakSet()
        self._zero_steps, self._told_flush, self._diagnosis = 0, False, None

    def __getstate__(self):
        return {"offset": self.offset}

    def __setstate__(self, state):
        self.__init__()
        self.offset = state["offset"]

    def forget(self):
        """Another state was loaded: what is under way describes updates before it."""
        self._pending, self._newest, self._zero_steps, self._diagnosis, self._captured = [], None, 0, None, None
        self._compiled, self._late = [], False
        for looking in [*self.watchers, *([] if self.recorder is None else [self.recorder])]:
            looking.restart()

    def start(self, device):
        # Not 0-d: torch 2.11 compiles writes into a 0-d FP64 tensor of the CPU away.
        self.loss, self.judged = torch.zeros(1, dtype=torch.float64, device=device), torch.zeros(1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def scaled(self, loss):
        """A loss that was scaled. One addition on its device: whether all were finite is read with the update's numbers."""
        if self.loss is None or not loss.is_floating_point():
            return
        loss = loss.detach()
        self.loss.add_(to_device(loss if loss.dim() == 0 else loss.sum(), self.loss.device))

    def begin(self, state):
        """The first step after an update; what is known of the one before is no longer asked for."""
        if not torch.compiler.is_compiling():
            self.catch_up(state)
        self.steps, self._compiled = [], []

    def stepped(self, optimizer, stats, control):
        if torch.compiler.is_compiling():
            self._compiled = [*self._compiled, optimizer]
        else:
            self._optimizers.add(optimizer)
        self.steps.append(([(holder.names, table) for holder, table, _ in stats], control))

    def flushed(self, count):
        self._flushed = count if self._flushed is None else self._flushed + to_device(count, self._flushed.device)

    def updated(self, state):
        """Queues one copy of this update's numbers to the host; nothing waits for it.

        A graph that torch.compile made keeps the tables only: catch_up() queues the copy, once the host asks.
        """
        if torch.compiler.is_compiling():
            self._late = True
            return
        for optimizer in self._compiled:
            self._optimizers.add(optimizer)
            optimizer.report_overflow()
        self._compiled, self._late = [], False
        state, device = state[:STATE_ENTRIES], state.device
        there = lambda t: to_device(t, device, torch.float64).reshape(-1)
        zero = torch.zeros(1, dtype=torch.float64, device=device)
        controls = [there(control) for _, control in self.steps]
        norms = [control[2:3] for control in controls]
        overflowed = [there(n) for optimizer in self._optimizers for n in optimizer_overflow(optimizer)]
        tables = [table for entries, _ in self.steps for _, table in entries]
        captures = capturing()
        host_tables = tables if not captures and device.type == "cpu" and all(t.device.type == "cpu" for t in tables) else None  # read later, where they lie
        numbers = torch.cat([state, norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.cat(norms)).reshape(1) if norms else zero,
                             torch.cat(overflowed).sum().reshape(1) if overflowed else zero, zero if self._flushed is None else there(self._flushed),
                             zero if self.judged is None else there(self.judged), *controls,
                             *[there(table if host_tables is None else table[-1]) for table in tables]])
        self.last = numbers if self.recorder is not None else None
        if captures:
            self._captured = (numbers, self.steps, self.floor)  # each replay fills the same tensor; stats() fetches it
            return
        self._captured = None
        self._pending.append(Update(self.floor, self.steps, *send(numbers, self._free), host_tables))
        self.arrive()

    def close(self):
        """The losses scaled so far are those of the update that begins."""
        self.judged.copy_(self.loss)
        self.loss.zero_()

    def catch_up(self, state):
        """Queues the numbers of the newest update where a compiled graph made it."""
        if self._late:
            self.updated(state)

    def arrive(self):
        """Takes in what has arrived, in order."""
        while self._pending and self._pending[0].arrived():
            before, self._newest = self._newest, self._pending.pop(0)
            if before is not None and before.event is not None:
                self._free.append(before.host)
                del self._free[:-16]
            numbers, totals = self._newest.numbers()
            self._watch(numbers, totals)
            for watcher in self.watchers:
                watcher.arrived(self.offset + int(numbers[APPLIED] + numbers[SKIPPED]), numbers, totals, self._newest)

    def _fetch(self):
        """Numbers that a captured graph leaves on the device are sent for when somebody asks; the next question finds them."""
        if self._captured is not None and not self._pending and not capturing():
            numbers, steps, floor = self._captured
            self._pending.append(Update(floor, steps, *send(numbers, self._free), None))
        self.arrive()

    def _watch(self, numbers, totals):
        elements, zeros = sum(row[_COUNT] for row in totals), sum(row[_ZEROS] for row in totals)
        self._zero_steps = self._zero_steps + 1 if 0 < elements == zeros else 0
        if self._zero_steps == 2:
            warn("all gradients were exactly zero in two steps running: were scaled FP16 gradients clipped? use scaler.clip_grad_norm_ or max_grad_norm")
        if numbers[_FLUSHED] > 0 and not self._told_flush:
            self._told_flush = True
            warn(f"unscaling FP16 gradients in place set {int(numbers[_FLUSHED])} small values to zero; use a halfstep optimizer, which unscales in FP32")
        before, self._diagnosis = self._diagnosis, diagnose(numbers, self._newest.floor)
        if self._diagnosis is not None and before is None:
            warn(_ADVICE[self._diagnosis].format(skips=int(numbers[CONSECUTIVE]), scale=numbers[SCALE], name=self._first_bad(totals)))

    def _first_bad(self, totals):
        return next((names[int(row[_FIRST_BAD])] for names, row in zip(self._newest.names, totals) if row[_FIRST_BAD] >= 0), None)

    def wait(self):
        """Takes in all that is under way, once the device has it."""
        for update in self._pending:
            if update.event is not None:
                update.event.synchronize()
        self.arrive()

    def read(self, loaded, scale):
        """ScalerStats of the newest update that has arrived; before one, of the `loaded` state, else of a fresh scaler."""
        self._fetch()
        if self._newest is None:
            s = [0.0] * STATE_ENTRIES if loaded is None else loaded.tolist()
            return ScalerStats(self.offset + int(s[APPLIED] + s[SKIPPED]), scale, int(s[CLEAN]), int(s[APPLIED]), int(s[SKIPPED]), int(s[CONSECUTIVE]), bool(s[LAST_BAD]), None, float("nan"), 0.0, 0.0, 0.0, 0)
        s, rows = self._newest.numbers()
        elements, zeros = sum(r[_COUNT] for r in rows), sum(r[_ZEROS] for r in rows)
        return ScalerStats(
            step=self.offset + int(s[APPLIED] + s[SKIPPED]), scale=s[SCALE], clean_steps=int(s[CLEAN]), steps_applied=int(s[APPLIED]), steps_skipped=int(s[SKIPPED]),
            consecutive_skips=int(s[CONSECUTIVE]), last_found_inf=bool(s[LAST_BAD]), first_bad_param=self._first_bad(rows), grad_norm=s[_NORM],
            amax=_largest(r[_AMAX] for r in rows), zero_share=zeros / elements if elements else 0.0,
            subnormal_share=sum(r[_SUBNORMALS] for r in rows) / (elements - zeros) if elements > zeros else 0.0,
            overflowed=int(s[_OVERFLOWED]), flushed=int(s[_FLUSHED]), diagnosis=self._diagnosis)

    def read_tensors(self):
        """{name: TensorStats} of the newest update that has arrived, of the parameters that had a gradient with elements."""
        self._fetch()
        found = {}
        for names, rows, scale in self._newest.rows() if self._newest is not None else ():
            for name, row in zip(names, rows):
                if not row[_COUNT]:
                    continue
                key, others = name, 2
                while key in found:  # optimizers without names call their parameters alike
                    key, others = f"{name} ({others})", others + 1
                nonzero = row[_COUNT] - row[_ZEROS]
                found[key] = TensorStats(amax=row[_AMAX], norm=math.sqrt(row[_SQUARES]) / scale, zero_share=row[_ZEROS] / row[_COUNT],
                                         subnormal_share=row[_SUBNORMALS] / nonzero if nonzero else 0.0, nonfinite=int(row[_NONFINITE]), count=int(row[_COUNT]))
        return found


_ADVICE = {
    "loss is not finite": "{skips} steps in a row were skipped and the loss itself is inf or NaN, which no scale can mend: look at the inputs, the forward pass and the "
                          "weights (a layer that leaves FP16 range; a loss that needs FP32), or go back to a checkpoint",
    "gradients overflow": "{skips} steps in a row were skipped though the loss is finite: gradients overflow at scale {scale:g}, '{name}' first. A fixed scale must be lower; "
                          "under another policy keep that layer in FP32, or look for an inf that its backward makes (a division by 0, sqrt at 0)",
    "scale is at its floor": "{skips} steps in a row were skipped and the scale is at its floor {scale:g}: gradients overflow whatever the scale, '{name}' first. Keep that layer in "
                             "FP32, look for an inf that its backward makes (a division by 0, sqrt at 0), or lower the policy's min_scale",
}


def diagnose(numbers, floor):
    """Why steps are skipped one after another, or None."""
    skips, at_floor = numbers[CONSECUTIVE], numbers[SCALE] <= floor
    if not numbers[LAST_BAD] or skips < (STUCK_AT_FLOOR if at_floor else STUCK):
        return None
    if not math.isfinite(numbers[LOSS]):
        return "loss is not finite"
    return "scale is at its floor" if at_floor else "gradients overflow"


def _largest(values):
    """The largest, NaN if any is NaN."""
    values = list(values)
    return float("nan") if any(v != v for v in values) else max(values, default=0.0)


def optimizer_overflow(optimizer):
    """Tensors that add up to the weights this optimizer kept from leaving the 16-bit range."""
    total = getattr(optimizer, "_overflow_total", None)
    return [] if total is None else total()
