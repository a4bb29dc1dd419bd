"""Forward + backward of each layer op in FP16 beside what torch offers: FP16 and FP32, eager and torch.compile.

    python benchmarks/layers.py [--only norm,loss] [--rounds 5] [--environments "as it is"] [--no-compile] [--out benchmarks/results/cpu.json]

The cases of a family stand in `layers_<family>.py` as `CASES`, a list of Case. One child process for each environment: the CPU as it
is, and its FP16 unit hidden. In a child all arms run in turn, round after round; one that takes seconds is left out. `ratio` is the median over rounds of the quickest
torch arm's time over ours in the same round: above 1 we are quicker. Torch's arms run without halfstep's overrides. Each round begins with another
arm, and a child keeps the memory that it frees: no arm waits for the kernel to give pages that another one gave back.
"""

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import torch

ENVIRONMENTS = {"as it is": {}, "FP16 unit hidden": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}}
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
SLOW_MS = 400  # such an arm runs twice only
FIRST_MS = 1000  # what is added to a first call
HOPELESS_MS = 3000  # eager, such an arm is left out, compiled too: it is not the quickest


@dataclasses.dataclass
class Case:
    """`inputs(dtype)` makes the arguments; floating ones that require grad are differentiated. `stock` is what a user writes in torch."""

    name: str
    inputs: Callable
    ours: Callable
    stock: Callable


def arm(case, function, dtype, overrides):
    """One forward and backward, timed in milliseconds."""
    import halfstep as hs

    torch.manual_seed(0)
    inputs = case.inputs(dtype)
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    upstream = []

    def run():
        hs.set_overrides(overrides)
        start = time.perf_counter()
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not upstream:
            upstream.extend(torch.randn_like(o) if o.dim() else torch.full_like(o, 1024.0) for o in outputs)
            start = time.perf_counter() - FIRST_MS / 1e3  # a first call is not a measurement
        torch.autograd.grad(outputs, wanted, upstream)
        return 1e3 * (time.perf_counter() - start)

    return run


def measure(case, rounds, compile):
    arms = {"ours": arm(case, case.ours, torch.float16, True)}
    for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32")):
        arms[name] = arm(case, case.stock, dtype, False)
        if compile:
            torch._dynamo.reset()
            arms[name + "_compiled"] = arm(case, torch.compile(case.stock), dtype, False)
    usable, hopeless = {}, set()
    for name, run in arms.items():
        if name.removesuffix("_compiled") in hopeless:
            continue
        try:
            if run() > HOPELESS_MS + FIRST_MS and not name.endswith("_compiled"):
                hopeless.add(name)
                continue
            usable[name] = (run, run())
        except RuntimeError as error:  # torch refuses some dtypes
            print(f"{case.name}: {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    order = list(usable.items())
    times = []
    for r in range(rounds):
        times.append({name: run() for name, (run, first) in order if first < SLOW_MS or r < 2})
        order.append(order.pop(0))
    row = {"case": case.name, "ours_ms": statistics.median(t["ours"] for t in times if "ours" in t)}
    for name in usable:
        row[f"{name}_ms"] = statistics.median(t[name] for t in times if name in t)
    row["best"] = min((n for n in usable if n != "ours"), key=lambda n: row[f"{n}_ms"])
    both = [t for t in times if "ours" in t and row["best"] in t]
    row["ratio"] = statistics.median(min(v for n, v in t.items() if n != "ours") / t["ours"] for t in both)
    return row


def families():
    return sorted(p.stem.removeprefix("layers_") for p in Path(__file__).parent.glob("layers_*.py"))


def child(only, rounds, compile):
    for family in only:
        for case in importlib.import_module(f"layers_{family}").CASES:
            print(json.dumps({"family": family, **measure(case, rounds, compile)}), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="families, with commas between them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--environments", default=",".join(ENVIRONMENTS))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    only = options.only.split(",") if options.only else families()
    if options.child:
        return child(only, options.rounds, not options.no_compile)
    rows = []
    for environment in options.environments.split(","):
        command = [sys.executable, __file__, "--child", "--only", ",".join(only), "--rounds", str(options.rounds)] + ["--no-compile"] * options.no_compile
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | KEEP_MEMORY | ENVIRONMENTS[environment]) as process:
            for line in process.stdout:
                row = {"environment": environment, **json.loads(line)}
                rows.append(row)
                arms = "  ".join(f"{k[:-3]} {v:.2f}" for k, v in row.items() if k.endswith("_ms"))
                print(f"{environment:17} {row['case']:44} {arms} ms; {row['ratio']:.2f} x the quickest of torch ({row['best']})", flush=True)
        if process.returncode:
            sys.exit(process.returncode)
        if options.out:
            from common import write

            write("layers", rows, options.out)


if __name__ == "__main__":
    # Families import Case from here: one module, whether run or imported.
    sys.modules["layers"] = sys.modules["__main__"]
    main()
