"""`halfstep watch`: one line of a running job, from the status file of its monitor."""

import contextlib
import os
import socket
import sys
import time

from . import _monitor_schema as schema


def add(commands):
    """Adds it to the parser's commands."""
    watch = commands.add_parser("watch", help="one live line of a running job (hs.monitor(…, live=PATH))")
    watch.add_argument("path", metavar="PATH", help="the file that the job's monitor writes, or a finished monitor's report")
    watch.add_argument("--once", action="store_true", help="print one line and end")
    watch.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="how often the file is read (default 1)")
    watch.set_defaults(run=run)


def gone(status):
    """Whether the process that wrote a running status is no more; only what runs on this machine is known."""
    if status["state"] != "running" or status.get("host") != socket.gethostname() or not status.get("pid"):
        return False
    try:
        os.kill(status["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        return False
    return False


def said(status, now):
    """The line, with how old it is where nothing was heard for a while."""
    age = now - status["time"] if status["state"] == "running" and status.get("time") else 0
    return schema.line(status) + (f"  (no news for {age:,.0f} s)" if age > 10 else "")


class _Plain:
    """Writes the line over on a terminal; elsewhere a line whenever it changes."""

    def __init__(self):
        self._terminal, self._last = sys.stdout.isatty(), None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._terminal and self._last is not None:
            sys.stdout.write("\n")

    def show(self, text):
        if self._terminal:
            width = os.get_terminal_size().columns
            sys.stdout.write(f"\r\033[K{text[:width - 1]}")
        elif text != self._last:
            sys.stdout.write(text + "\n")
        sys.stdout.flush()
        self._last = text


class _Rich:
    """The same with rich; what is in danger is coloured."""

    def __init__(self):
        from rich.live import Live

        self._live = Live(auto_refresh=False)

    def __enter__(self):
        self._live.__enter__()
        return self

    def __exit__(self, *exception):
        return self._live.__exit__(*exception)

    def show(self, text):
        from rich.text import Text

        shown = Text(text, no_wrap=True, overflow="ellipsis")
        shown.highlight_regex(r"no step is taken.*|failed.*|\d+ in a row|no news.*", "bold red")
        shown.highlight_regex(r"scale 2\^\S+|^step \S+", "bold")
        self._live.update(shown, refresh=True)


def _screen():
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            return _Rich()
    return _Plain()


def run(options):
    """Status 0 where the job ended or runs, 1 where it failed or is gone."""
    if not options.every > 0:
        raise ValueError(f"--every is {options.every:g}; expected seconds above 0")
    status = schema.read(options.path)["status"]
    if options.once:
        print(said(status, time.time()))
    else:
        with contextlib.suppress(KeyboardInterrupt), _screen() as screen:
            screen.show(said(status, time.time()))
            while status["state"] == "running" and not gone(status):
                time.sleep(options.every)
                status = schema.read(options.path)["status"]
                screen.show(said(status, time.time()))
    if gone(status):
        print(f"halfstep watch: process {status['pid']} is gone and did not close its monitor; the last it said was step {status['step']:,}", file=sys.stderr)
    return 1 if status["state"] == "failed" or gone(status) else 0
