"""One optimizer step over 50 M FP16 parameters, in 4 and in 1,000 tensors: finite check, global-norm clip, AdamW, FP16 weights.

    python benchmarks/step.py [--processes 5] [--out benchmarks/results/cpu.json]

Ours: FP16 gradients, split16 masters. The torch chain: GradScaler.unscale_ + clip_grad_norm_ + AdamW(fused=True) on FP32, then
the FP16 copy; the same chain with DeepSpeedCPUAdam where deepspeed can be imported (it compiles its kernel at first use). All
arms run in each process, the order rotating; the row is the median over processes. `share` is model bytes (28 a parameter)
per second over those of torch.mul_ (8 bytes an element) on 1.6 GB in the same process. Then once more with AVX2.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

import torch

import halfstep as hs
from common import median_ms, write

TOTAL = 50_000_000


def ours(tensors):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(TOTAL // tensors).mul_(0.02).half()) for _ in range(tensors)]
    opt = hs.optim.AdamW(params, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.randn_like(p)
    scaler = hs.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(1))

    def step():
        scaler.step(opt)
        scaler.update()

    return median_ms(step, 7)


def chain(tensors, make=lambda params: torch.optim.AdamW(params, fused=True)):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(TOTAL // tensors).mul_(0.02)) for _ in range(tensors)]
    halves = [p.detach().half() for p in params]
    opt = make(params)
    for p in params:
        p.grad = torch.randn_like(p)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)  # it unscales in place: a larger scale would drive the kept gradients into subnormals
    scaler.scale(torch.ones(1))

    def step():
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(opt)
        scaler.update()
        torch._foreach_copy_(halves, [p.detach() for p in params])

    return median_ms(step, 7)


def deepspeed(tensors):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return chain(tensors, lambda params: DeepSpeedCPUAdam(params, lr=1e-3, weight_decay=1e-2, adamw_mode=True))


ARMS = {"ours": ours, "chain": chain, "deepspeed": deepspeed}


def one(tensors, order):
    x = torch.ones(200_000_000)
    mul = median_ms(lambda: x.mul_(1.0), 5)
    del x
    times = {name: ARMS[name](tensors) for name in order}
    print(json.dumps({**times, "share": (28 * TOTAL / times["ours"]) / (1.6e9 / mul), "capability": torch.backends.cpu.get_cpu_capability()}))


def has_deepspeed():
    test = "from deepspeed.ops.adam import DeepSpeedCPUAdam as A; import torch; A([torch.nn.Parameter(torch.zeros(1))])"
    return subprocess.run([sys.executable, "-c", test], capture_output=True).returncode == 0


def measure(tensors, arms, processes, environment):
    runs = []
    for i in range(processes):
        order = arms[i % len(arms):] + arms[:i % len(arms)]
        done = subprocess.run([sys.executable, __file__, "--one", str(tensors), ",".join(order)], capture_output=True, text=True, check=True,
                              env={**os.environ, **environment})
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    row = {"tensors": tensors, "capability": runs[0]["capability"], "processes": processes,
           "share_of_mul": statistics.median(r["share"] for r in runs)}
    for arm in arms:
        row[f"{arm}_ms"] = statistics.median(r[arm] for r in runs)
        if arm != "ours":
            row[f"ratio_{arm}"] = statistics.median(r[arm] / r["ours"] for r in runs)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--out")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one(int(options.one[0]), options.one[1].split(","))
    arms = ["ours", "chain"]
    if has_deepspeed():
        arms.append("deepspeed")
    else:
        print("deepspeed cannot be imported or built here: its arm is left out")
    rows = []
    for environment in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        for tensors in (4, 1000):
            row = measure(tensors, arms, options.processes, environment)
            if environment and row["capability"] == rows[0]["capability"]:
                continue  # this CPU has nothing wider than AVX2
            rows.append(row)
            print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if options.out:
        write("step", rows, options.out)


if __name__ == "__main__":
    main()
