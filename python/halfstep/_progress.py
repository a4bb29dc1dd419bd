"""A progress bar over runs and their steps: rich's where it is installed, a plain one otherwise; a line a run where nobody watches."""

import sys
import time


class Plain:
    """One line that is written over on a terminal; elsewhere one line a finished run."""

    def __init__(self, total, stream=None):
        self._stream, self._total, self._done, self._label, self._start = stream or sys.stderr, total, 0, "", time.monotonic()
        self._terminal = self._stream.isatty()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._terminal:
            self._stream.write("\r\033[K")

    def begin(self, label):
        self._label = label
        self.at(0, 0)

    def at(self, step, steps):
        if not self._terminal:
            return
        part = (self._done + (step / steps if steps else 0)) / max(self._total, 1)
        filled = int(30 * part)
        self._stream.write(f"\r\033[K[{'#' * filled}{'.' * (30 - filled)}] {self._done}/{self._total} runs  {self._label}"
                           f"{f', step {step} of {steps}' if steps else f', step {step}' if step else ''}  {time.monotonic() - self._start:.0f} s")
        self._stream.flush()

    def end(self, note=""):
        self._done += 1
        if not self._terminal:
            self._stream.write(f"{self._done}/{self._total} {self._label}{note}  {time.monotonic() - self._start:.0f} s\n")
            self._stream.flush()


class Rich:
    """The same with rich."""

    def __init__(self, total):
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[note]}"),
                                      progress.TimeElapsedColumn(), progress.TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._total = total

    def __enter__(self):
        self._bar.__enter__()
        self._runs, self._steps = self._bar.add_task("runs", total=self._total, note=""), self._bar.add_task("", total=None, note="steps")
        return self

    def __exit__(self, *exception):
        return self._bar.__exit__(*exception)

    def begin(self, label):
        self._bar.update(self._steps, description=label, completed=0, total=None)

    def at(self, step, steps):
        self._bar.update(self._steps, completed=step, total=steps or None)

    def end(self, note=""):
        self._bar.advance(self._runs)


def progress(total):
    """A bar over `total` runs, on the standard error stream."""
    if sys.stderr.isatty():
        try:
            return Rich(total)
        except ImportError:
            pass
    return Plain(total)
