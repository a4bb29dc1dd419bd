"""Shared by the benchmarks: the machine's description, medians, and the results file."""

import datetime
import json
import platform
import re
import statistics
import time
from pathlib import Path

import torch

import halfstep as hs


def device():
    """Name of this CPU with the instruction set in use; results are compared within one run only."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.*)", text)
    unit = ", BF16 matrix unit" if "matrix unit" in hs._C.cpu_path() else ""
    return f"{model.group(1) if model else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}{unit}, {torch.get_num_threads()} threads"


def median_ms(f, repeats, warm=2):
    for _ in range(warm):
        f()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def write(name, rows, out, where=None):
    """Adds the rows of benchmark `name` to the results file `out`; `where`: the device, this CPU unless given."""
    out = Path(out)
    results = json.loads(out.read_text()) if out.exists() else {}
    results[name] = {"device": where or device(), "date": datetime.date.today().isoformat(),
                     "versions": {"halfstep": hs.__version__, "torch": torch.__version__}, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
