"""One optimizer step (finite check, clip, AdamW, weights written) over 20 M parameters in each mode of docs/choose.md.

    python benchmarks/modes.py [--out benchmarks/results/cpu.json]

All modes are held at once and stepped in turn, so that every round sees the same machine. Bytes held and moved are the
optimizer's own words (repr); `relative` is the median over the rounds of the mode's time over that of FP16 with split16.
"""

import argparse
import re
import statistics

import torch

import halfstep as hs
from common import median_ms, write

TOTAL, TENSORS, ROUNDS = 20_000_000, 4, 7
MODES = [("FP16 weights, split16", torch.float16, "split16"), ("FP16 weights, FP32 masters", torch.float16, "fp32"), ("FP16 weights, FP64 masters", torch.float16, "fp64"),
         ("FP16 weights, no master", torch.float16, "none"), ("BF16 weights, split16", torch.bfloat16, "split16"), ("FP32 weights, autocast", torch.float32, "none"),
         ("FP64", torch.float64, "none")]


def parameters(dtype):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(TOTAL // TENSORS).mul_(0.02).to(dtype)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def ours(dtype, master):
    opt, scaler = hs.optim.AdamW(parameters(dtype), master=master, max_grad_norm=1.0), hs.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(1))

    def step():
        scaler.step(opt)
        scaler.update()

    held, moved = map(int, re.search(r"holds (\d+) and moves (\d+) bytes", repr(opt)).groups())
    return step, held, moved


def chain():
    """torch's own, on FP32 weights; the FP16 casts of each forward are not in it."""
    params = parameters(torch.float32)
    opt, scaler = torch.optim.AdamW(params, fused=True), torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(1))

    def step():
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(opt)
        scaler.update()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    options = parser.parse_args()
    arms = {name: ours(dtype, master) for name, dtype, master in MODES}
    arms["torch: FP32 weights, autocast"] = (chain(), None, None)
    rounds = [{name: median_ms(step, 3, warm=1) for name, (step, _, _) in arms.items()} for _ in range(ROUNDS)]
    first = MODES[0][0]
    rows = [{"mode": name, "held": held, "moved": moved, "ms": statistics.median(r[name] for r in rounds), "relative": statistics.median(r[name] / r[first] for r in rounds)}
            for name, (_, held, moved) in arms.items()]
    for row in rows:
        print("{mode:32} {ms:7.1f} ms  {relative:5.2f} x".format(**row), "" if row["held"] is None else f" holds {row['held']}, moves {row['moved']}")
    if options.out:
        write("modes", rows, options.out)


if __name__ == "__main__":
    main()
