"""Time of a step by phase, and peak memory, of this process."""

import contextlib
import statistics
import time
from pathlib import Path

import torch

PHASES = ("data", "forward", "backward", "check", "optimizer")
WARM_UP = 5  # steps whose time does not count: lazy allocation, caches, autotuning


# -- memory ----------------------------------------------------------------------------------------
def _status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


class Memory:
    """Peak resident bytes of this process from start() on, and those of the card."""

    def start(self, device):
        self._cuda = device == "cuda"
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew: importing torch is not part of training
            self._method = "VmHWM, reset before make()"
        except OSError:
            self._method = "VmHWM since the process began"
        try:
            self._before = _status("VmRSS")
        except OSError:
            self._before, self._method = None, "no /proc/self/status"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self):
        peak = None if self._before is None else max(_status("VmHWM"), self._before)  # the kernel counts both in batches
        return {"peak_bytes": peak, "before_bytes": self._before, "method": self._method,
                "cuda_peak_bytes": torch.cuda.max_memory_allocated() if self._cuda else None}


# -- time ------------------------------------------------------------------------------------------
class Clock:
    """Seconds of each phase of each step, less what was spent on looking."""

    def __init__(self, device):
        self._cuda, self._aside = device == "cuda", 0.0
        self.steps, self._now, self._check, self.looked = [], {}, 0.0, False

    def time(self):
        if self._cuda:
            torch.cuda.synchronize()  # a phase is over when the card has done it
        return time.perf_counter() - self._aside

    @contextlib.contextmanager
    def aside(self):
        """What happens inside is no part of the step."""
        start = self.time()
        try:
            yield
        finally:
            self._aside += self.time() - start

    def checking(self, method):
        """`method` with its time counted as the check of the gradients instead of the step that calls it."""
        def timed(*args, **kwargs):
            start = self.time()
            try:
                return method(*args, **kwargs)
            finally:
                self._check += self.time() - start
        return timed

    def step(self, marks):
        """marks: times at the beginning and after data, forward, backward, step, update."""
        spans = [b - a for a, b in zip(marks, marks[1:])]
        check, self._check = self._check, 0.0
        self.steps.append(None if self.looked else (*spans[:3], check + spans[4], spans[3] - check))
        self.looked = False

    def report(self):
        """Median and quartiles in seconds after the warm-up; steps that were looked at are left out."""
        warm = [s for s in self.steps[WARM_UP:] if s is not None] or [s for s in self.steps[1:] or self.steps if s is not None]
        first = next((s for s in self.steps if s is not None), None)
        found = {"timed_steps": len(warm), "warm_up_steps": len(self.steps) - len(self.steps[WARM_UP:]), "first_step": None if first is None else sum(first)}
        columns = [*zip(*warm)] if warm else [()] * len(PHASES)
        for name, values in zip((*PHASES, "step"), (*columns, [sum(s) for s in warm])):
            found[name] = _quartiles(values)
        return found


def _quartiles(values):
    if not values:
        return None
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "q1": q1, "q3": q3}
