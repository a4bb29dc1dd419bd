"""Energy of a stretch of work, with the method by which it was measured, or None with the reason. Nothing is estimated.

Methods, the first that works here: for a GPU NVML's energy counter, else NVML's power sampled; for a CPU the counters of Linux
powercap (RAPL) of every package with its DRAM. HALFSTEP_POWERCAP is the root of another powercap tree.
"""

import os
import threading
import time
from pathlib import Path

ROOT = "/sys/class/powercap"
MOST_WATTS = 2000.0  # of one zone. A counter that went back implies a wrap; one that would need more power than this was reset


class Unavailable(Exception):
    """Why a method cannot be used; its text is the reason in the report."""


def _read(path):
    try:
        return path.read_text().strip()
    except PermissionError:
        raise Unavailable(f"{path}: permission denied (only root reads it on current kernels)") from None
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror}") from None


class _Zone:
    """One counter of powercap and what it has counted."""

    def __init__(self, folder):
        self.folder, self.name = folder, _read(folder / "name")
        self.wraps_at = int(_read(folder / "max_energy_range_uj"))
        self.last = int(_read(folder / "energy_uj"))

    def delta(self, seconds):
        """Microjoules since the last call; one wrap in between is allowed for."""
        now, before = int(_read(self.folder / "energy_uj")), self.last
        self.last = now
        if now >= before:
            return now - before
        gone = self.wraps_at - before + now
        if not 0 <= gone <= MOST_WATTS * 1e6 * max(seconds, 1e-3):
            raise Unavailable(f"{self.folder}: the counter went back from {before} to {now} in {seconds:.1f} s, too far for a wrap at {self.wraps_at}: it was reset")
        return gone


class Powercap:
    """RAPL counters through Linux powercap: all packages, with the DRAM of each that has it."""

    method, interval = "powercap", 1.0

    def __init__(self, root=None, clock=time.monotonic):
        root = Path(root or os.environ.get("HALFSTEP_POWERCAP") or ROOT)
        if not root.is_dir():
            raise Unavailable(f"{root}: no such folder (no RAPL counters in this kernel or machine)")
        self._clock, self.zones, self.notes = clock, [], []
        for folder in sorted(root.glob("*:*"), key=lambda path: path.name.split(":")):
            name = _read(folder / "name") if folder.name.count(":") == 1 and (folder / "name").exists() else ""
            if name.startswith("package") and name not in [zone.name for zone in self.zones]:  # some have a second way to the same counter
                self._add(root, folder)
        if not self.zones:
            raise Unavailable(f"{root}: no package zone")
        self._at = clock()

    def _add(self, root, folder):
        package = _Zone(folder)
        self.zones.append(package)
        inner = {p.name: p for where in (root, folder) for p in where.glob(f"{folder.name}:*")}  # the class links them flat, the device tree nests them
        dram = [p for _, p in sorted(inner.items()) if (p / "name").exists() and _read(p / "name") == "dram"]
        self.zones += map(_Zone, dram)
        if not dram:
            self.notes.append(f"{package.name} has no DRAM zone: its memory is not counted")

    def advance(self):
        """Joules since the last call."""
        now = self._clock()
        seconds, self._at = now - self._at, now
        return sum(zone.delta(seconds) for zone in self.zones) / 1e6


class Nvml:
    """One GPU through NVML: its energy counter, or where it has none its power, sampled."""

    def __init__(self, uuid=None, clock=time.monotonic):
        try:
            import pynvml
        except ImportError:
            raise Unavailable("NVML: nvidia-ml-py is not installed (pip install 'halfstep[energy]')") from None
        self._nvml, self._clock, self.notes = pynvml, clock, []
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
            try:
                self._last = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
                self.method, self.interval = "nvml counter", 10.0
            except pynvml.NVMLError:
                self._last = pynvml.nvmlDeviceGetPowerUsage(self._device)
                self.method, self.interval = "nvml power, sampled", 0.05
                self.notes.append("the card has no energy counter; its power reading is a running mean that misses part of the time on some cards")
        except pynvml.NVMLError as error:
            raise Unavailable(f"NVML: {error}") from None
        self._at = clock()

    def advance(self):
        """Joules since the last call."""
        now = self._clock()
        seconds, self._at, before = now - self._at, now, self._last
        try:
            if self.method == "nvml counter":
                self._last = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
                if self._last < before:
                    raise Unavailable(f"NVML: the counter went back from {before} to {self._last} mJ: it was reset")
                return (self._last - before) / 1e3
            self._last = self._nvml.nvmlDeviceGetPowerUsage(self._device)
            return (before + self._last) / 2e3 * seconds
        except self._nvml.NVMLError as error:
            raise Unavailable(f"NVML: {error}") from None


def source(device="cpu"):
    """The reader for a device type; raises Unavailable with the reason."""
    if device != "cuda":
        return Powercap()
    import torch

    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)  # NVML counts cards that CUDA_VISIBLE_DEVICES hides
    return Nvml(None if uuid is None else f"GPU-{uuid}")


class Meter:
    """Energy between start() and stop(), less what the idle machine draws, if idle() measured that before."""

    def __init__(self, device="cpu", make=source, clock=time.monotonic):
        self._clock, self._idle, self._reason, self._reader = clock, None, None, None
        self._joules, self._began, self._thread, self._stop = 0.0, None, None, threading.Event()
        try:
            self._reader = make(device)
        except Unavailable as error:
            self._reason = str(error)

    def poll(self):
        """Adds what was used since the last look. Called from a thread, often enough that no counter wraps twice."""
        if self._reader is None or self._reason is not None:
            return
        try:
            self._joules += self._reader.advance()
        except Unavailable as error:
            self._reason = str(error)

    def _watch(self):
        while not self._stop.wait(self._reader.interval):
            self.poll()

    def start(self, watch=True):
        self.poll()
        self._joules, self._began = 0.0, self._clock()
        if watch and self._reader is not None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def stop(self):
        """{"joules", "net_joules", "idle_watts", "seconds", "method", "reason", "notes"}; numbers are None where there is a reason."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self.poll()
        seconds, known = self._clock() - self._began, self._reason is None
        net = self._joules - self._idle * seconds if known and self._idle is not None else None
        return {"joules": self._joules if known else None, "net_joules": net, "idle_watts": self._idle if known else None, "seconds": seconds,
                "method": self._reader.method if known else None, "reason": self._reason, "notes": list(self._reader.notes) if known else []}

    def idle(self, seconds=1.0, sleep=time.sleep):
        """Measures what the machine draws while this process sleeps; at once where there is no counter."""
        if self._reader is None:
            return None
        self.start()
        sleep(seconds)
        found = self.stop()
        if found["joules"] is not None and found["seconds"] > 0:
            self._idle = found["joules"] / found["seconds"]
        return self._idle
