"""What the scaler knows of each update: queued on the device, read when the host has it."""

import weakref
from dataclasses import dataclass
from typing import Optional

import torch

from ._library import H, grad_stats
from ._room import names_of, warn

STATE_ENTRIES, ROW = 16, 8
SCALE, TRACKER, CLEAN, APPLIED, SKIPPED, CONSECUTIVE, LAST_BAD = 0, 1, 3, 4, 5, 6, 7
_NORM, _OVERFLOWED, _FLUSHED, _ROWS = 16, 17, 18, 19
_AMAX, _ZEROS, _SUBNORMALS, _COUNT, _FIRST_BAD = 2, 3, 4, 5, 6


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


class History:
    """The numbers of the last updates on their way to the host, and what is to be said when they arrive."""

    def __init__(self):
        self.offset, self.steps = 0, []  # updates in all, less those that the state counts
        self._pending, self._newest, self._flushed = [], None, None
        self._compiled, self._late = [], False  # optimizers that a compiled graph stepped; whether one updated the scale
        self._optimizers = weakref.WeakSet()
        self._zero_steps, self._told_flush = 0, False

    def __getstate__(self):
        return {"offset": self.offset}

    def __setstate__(self, state):
        self.__init__()
        self.offset = state["offset"]

    def forget(self):
        """Another state was loaded: what is under way describes updates before it."""
        self._pending, self._newest, self._zero_steps = [], None, 0
        self._compiled, self._late = [], False

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
        self.steps.append(([(holder.names, table) for holder, table, _ in stats], control[2]))

    def flushed(self, count):
        self._flushed = count if self._flushed is None else self._flushed + count.to(self._flushed.device, non_blocking=True)

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
        device = state.device
        there = lambda t: t.to(device, torch.float64, non_blocking=True).reshape(-1)
        zero = torch.zeros(1, dtype=torch.float64, device=device)
        norms = [there(norm) for _, norm in self.steps]
        overflowed = [there(n) for optimizer in self._optimizers for n in optimizer_overflow(optimizer)]
        tables = [entry for entries, _ in self.steps for entry in entries]
        numbers = torch.cat([state, norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.cat(norms)).reshape(1) if norms else zero,
                             torch.cat(overflowed).sum().reshape(1) if overflowed else zero, zero if self._flushed is None else there(self._flushed),
                             *[there(table[-1]) for _, table in tables]])
        names = [names for names, _ in tables]
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((host, names, event))
        else:
            self._pending.append((numbers, names, None))
        self.arrive()

    def catch_up(self, state):
        """Queues the numbers of the newest update where a compiled graph made it."""
        if self._late:
            self.updated(state)

    def arrive(self):
        """Takes in what has arrived, in order."""
        while self._pending and (self._pending[0][2] is None or self._pending[0][2].query()):
            self._newest = self._pending.pop(0)
            self._watch(self._newest[0].tolist())

    def _watch(self, numbers):
        elements, zeros = sum(numbers[_ROWS + _COUNT::ROW]), sum(numbers[_ROWS + _ZEROS::ROW])
        self._zero_steps = self._zero_steps + 1 if 0 < elements == zeros else 0
        if self._zero_steps == 2:
            warn("all gradients were exactly zero in two steps running: were scaled FP16 gradients clipped? use scaler.clip_grad_norm_ or max_grad_norm")
        if numbers[_FLUSHED] > 0 and not self._told_flush:
            self._told_flush = True
            warn(f"unscaling FP16 gradients in place set {int(numbers[_FLUSHED])} small values to zero; use a halfstep optimizer, which unscales in FP32")

    def read(self, loaded, scale):
        """ScalerStats of the newest update that has arrived; before one, of the `loaded` state, else of a fresh scaler."""
        self.arrive()
        if self._newest is None:
            s = [0.0] * STATE_ENTRIES if loaded is None else loaded.tolist()
            return ScalerStats(self.offset + int(s[APPLIED] + s[SKIPPED]), scale, int(s[CLEAN]), int(s[APPLIED]), int(s[SKIPPED]), int(s[CONSECUTIVE]), bool(s[LAST_BAD]), None, float("nan"), 0.0, 0.0, 0.0, 0)
        numbers, names, _ = self._newest
        s = numbers.tolist()
        rows = [s[i:i + ROW] for i in range(_ROWS, len(s), ROW)]
        bad = next((names[i][int(row[_FIRST_BAD])] for i, row in enumerate(rows) if row[_FIRST_BAD] >= 0), None)
        elements, zeros = sum(r[_COUNT] for r in rows), sum(r[_ZEROS] for r in rows)
        return ScalerStats(
            step=self.offset + int(s[APPLIED] + s[SKIPPED]), scale=s[SCALE], clean_steps=int(s[CLEAN]), steps_applied=int(s[APPLIED]), steps_skipped=int(s[SKIPPED]),
            consecutive_skips=int(s[CONSECUTIVE]), last_found_inf=bool(s[LAST_BAD]), first_bad_param=bad, grad_norm=s[_NORM],
            amax=_largest(r[_AMAX] for r in rows), zero_share=zeros / elements if elements else 0.0,
            subnormal_share=sum(r[_SUBNORMALS] for r in rows) / (elements - zeros) if elements > zeros else 0.0,
            overflowed=int(s[_OVERFLOWED]), flushed=int(s[_FLUSHED]))


def _largest(values):
    """The largest, NaN if any is NaN."""
    values = list(values)
    return float("nan") if any(v != v for v in values) else max(values, default=0.0)


def optimizer_overflow(optimizer):
    """Tensors that add up to the weights this optimizer kept from leaving the 16-bit range."""
    total = getattr(optimizer, "_overflow_total", None)
    return [] if total is None else total()
