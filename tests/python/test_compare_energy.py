"""Energy readers on a fake powercap tree and a fake NVML: what is measured is exact, what cannot be measured is None with the reason."""

import os
import sys
import types

import pytest

from halfstep import _energy
from halfstep._energy import Meter, Nvml, Powercap, Unavailable

WRAP = 262_143_328_850


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Tree:
    """A powercap root; set(zone, microjoules)."""

    def __init__(self, root, zones):
        self.root = root
        for zone, (name, value) in zones.items():
            folder = root / zone
            folder.mkdir(parents=True)
            (folder / "name").write_text(name + "\n")
            (folder / "max_energy_range_uj").write_text(f"{WRAP}\n")
            self.set(zone, value)

    def set(self, zone, value):
        (self.root / zone / "energy_uj").write_text(f"{value}\n")


TWO = {"intel-rapl:0": ("package-0", 5_000_000), "intel-rapl:0:0": ("dram", 1_000_000), "intel-rapl:0:1": ("core", 900), "intel-rapl:1": ("package-1", 7_000_000),
       "intel-rapl:1:0": ("dram", 2_000_000), "intel-rapl:2": ("psys", 1), "intel-rapl-mmio:0": ("package-0", 5_000_000), "intel-rapl": ("control", 0)}


def meter(tree, monkeypatch=None):
    clock = Clock()
    return clock, Meter("cpu", lambda device: Powercap(tree.root, clock), clock)


def test_two_packages_with_their_dram_and_nothing_else(tmp_path):
    tree = Tree(tmp_path, TWO)
    clock, m = meter(tree)
    m.start(watch=False)
    for zone, more in (("intel-rapl:0", 3_000_000), ("intel-rapl:0:0", 500_000), ("intel-rapl:1", 4_000_000), ("intel-rapl:1:0", 250_000), ("intel-rapl:0:1", 10**9), ("intel-rapl:2", 10**9), ("intel-rapl-mmio:0", 10**9)):
        tree.set(zone, TWO[zone][1] + more)
    clock.now += 2
    found = m.stop()
    assert found == {"joules": 7.75, "net_joules": None, "idle_watts": None, "seconds": 2.0, "method": "powercap", "reason": None, "notes": []}


def test_nested_zones_count_once(tmp_path):
    tree = Tree(tmp_path, {"intel-rapl:0": ("package-0", 0), "intel-rapl:0/intel-rapl:0:0": ("dram", 0)})
    os.symlink(tmp_path / "intel-rapl:0/intel-rapl:0:0", tmp_path / "intel-rapl:0:0")
    assert [z.name for z in Powercap(tree.root).zones] == ["package-0", "dram"]


def test_counter_that_wraps(tmp_path):
    tree = Tree(tmp_path, {"intel-rapl:0": ("package-0", WRAP - 2_000_000)})
    clock, m = meter(tree)
    m.start(watch=False)
    tree.set("intel-rapl:0", 1_000_000)
    clock.now += 1
    m.poll()
    tree.set("intel-rapl:0", 4_000_000)
    clock.now += 1
    found = m.stop()
    assert found["joules"] == 6.0 and found["reason"] is None
    assert found["notes"] == ["package-0 has no DRAM zone: its memory is not counted"]


def test_counter_that_was_reset_is_no_wrap(tmp_path):
    tree = Tree(tmp_path, {"intel-rapl:0": ("package-0", 100_000_000)})
    clock, m = meter(tree)
    m.start(watch=False)
    clock.now += 1
    tree.set("intel-rapl:0", 5)
    found = m.stop()
    assert found["joules"] is None and found["method"] is None and "the counter went back from 100000000 to 5 in 1.0 s" in found["reason"] and "it was reset" in found["reason"]


def test_idle_is_taken_off_and_both_are_told(tmp_path):
    tree = Tree(tmp_path, {"intel-rapl:0": ("package-0", 0)})
    clock, m = meter(tree)

    def sleep(seconds):
        clock.now += seconds
        tree.set("intel-rapl:0", 12_000_000)

    assert m.idle(2.0, sleep) == 6.0
    m.start(watch=False)
    clock.now += 10
    tree.set("intel-rapl:0", 112_000_000)
    found = m.stop()
    assert (found["joules"], found["net_joules"], found["idle_watts"]) == (100.0, 40.0, 6.0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to try as another user")
def test_permission_denied(tmp_path):
    tree = Tree(tmp_path, {"intel-rapl:0": ("package-0", 0)})
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    (tmp_path / "intel-rapl:0/energy_uj").chmod(0o400)
    os.seteuid(65534)
    try:
        found = Meter("cpu", lambda device: Powercap(tree.root))
        found.start(watch=False)
        result = found.stop()
    finally:
        os.seteuid(0)
    assert result["joules"] is None and result["reason"].endswith("energy_uj: permission denied (only root reads it on current kernels)")


def test_permission_denied_as_any_user(tmp_path, monkeypatch):
    tree = Tree(tmp_path, {"intel-rapl:0": ("package-0", 0)})
    real = _energy.Path.read_text

    def refuse(path, *args, **kw):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kw)

    monkeypatch.setattr(_energy.Path, "read_text", refuse)
    with pytest.raises(Unavailable, match="energy_uj: permission denied"):
        Powercap(tree.root)


def test_no_counters_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("HALFSTEP_POWERCAP", str(tmp_path / "nowhere"))
    m = Meter("cpu")
    assert m.idle(1.0) is None  # at once: there is nothing to measure
    m.start()
    assert m.stop()["reason"] == f"{tmp_path}/nowhere: no such folder (no RAPL counters in this kernel or machine)"
    monkeypatch.setenv("HALFSTEP_POWERCAP", str(tmp_path))
    with pytest.raises(Unavailable, match="no package zone"):
        _energy.source("cpu")


def test_the_thread_sees_wraps_in_time(tmp_path, monkeypatch):
    tree = Tree(tmp_path, {"intel-rapl:0": ("package-0", WRAP - 1000)})
    reader = Powercap(tree.root)
    reader.interval = 0.001
    m = Meter("cpu", lambda device: reader)
    m.start()
    tree.set("intel-rapl:0", 500)
    m._thread.join(0.05)
    assert m.stop()["joules"] == pytest.approx(0.0015)


class FakeError(Exception):
    pass


def nvml(monkeypatch, energy=None, power=None, init=None):
    """A pynvml whose numbers come from lists."""
    def take(values, what):
        def read(device):
            if values is None:
                raise FakeError(f"{what}: not supported")
            return values.pop(0)
        return read

    def start():
        if init:
            raise FakeError(init)

    fake = types.SimpleNamespace(NVMLError=FakeError, nvmlInit=start, nvmlDeviceGetHandleByIndex=lambda i: "card", nvmlDeviceGetTotalEnergyConsumption=take(energy, "energy"),
                                 nvmlDeviceGetPowerUsage=take(power, "power"))
    monkeypatch.setitem(sys.modules, "pynvml", fake)


def test_nvml_counter(monkeypatch):
    nvml(monkeypatch, energy=[5000, 5000, 9500])
    clock = Clock()
    m = Meter("cuda", lambda device: Nvml(clock=clock), clock)
    m.start(watch=False)
    clock.now += 3
    found = m.stop()
    assert (found["joules"], found["method"], found["seconds"]) == (4.5, "nvml counter", 3.0)


def test_nvml_power_is_summed_and_says_so(monkeypatch):
    nvml(monkeypatch, power=[100_000, 100_000, 200_000, 300_000])
    clock = Clock()
    m = Meter("cuda", lambda device: Nvml(clock=clock), clock)
    m.start(watch=False)
    clock.now += 1
    m.poll()
    clock.now += 2
    found = m.stop()
    assert found["joules"] == pytest.approx(150.0 + 500.0) and found["method"] == "nvml power, sampled" and "no energy counter" in found["notes"][0]


@pytest.mark.parametrize("numbers, reason", [
    (dict(init="driver not loaded"), "NVML: driver not loaded"),
    (dict(), "NVML: power: not supported"),
    (dict(energy=[10, 10, 3]), "NVML: the counter went back from 10 to 3 mJ: it was reset"),
])
def test_nvml_that_cannot(monkeypatch, numbers, reason):
    nvml(monkeypatch, **numbers)
    m = Meter("cuda", lambda device: Nvml())
    m.start(watch=False)
    found = m.stop()
    assert found["joules"] is None and found["reason"] == reason


def test_nvml_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    m = Meter("cuda", lambda device: Nvml())
    m.start()
    assert m.stop()["reason"] == "NVML: nvidia-ml-py is not installed (pip install 'halfstep[energy]')"
