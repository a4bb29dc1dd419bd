"""One optimizer step over 50 M FP16 parameters, in 4 and in 1,000 tensors: finite check, global-norm clip, AdamW, FP16 weights.

    python benchmarks/step.py [--processes 5] [--out benchmarks/results/cpu.json]

Ours: FP16 gradients, split16 masters. The torch chain: GradScaler.unscale_ + clip_grad_norm_ + AdamW(fused=True) on FP32, then
the FP16 copy. Both arms run in each process, the order alternating; the row is the median over processes. `share` is model
bytes (28 a parameter) per second over those of torch.mul_ (8 bytes an element) on 1.6 GB in the same process.
"""

import argparse
import json
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


def chain(tensors):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(TOTAL // tensors).mul_(0.02)) for _ in range(tensors)]
    halves = [p.detach().half() for p in params]
    opt = torch.optim.AdamW(params, fused=True)
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


def one(tensors, order):
    x = torch.ones(200_000_000)
    mul = median_ms(lambda: x.mul_(1.0), 5)
    del x
    arms = {"ours": ours, "chain": chain}
    times = {name: arms[name](tensors) for name in order}
    print(json.dumps({**times, "share": (28 * TOTAL / times["ours"]) / (1.6e9 / mul)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--out")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one(int(options.one[0]), options.one[1].split(","))
    rows = []
    for tensors in (4, 1000):
        runs = []
        for i in range(options.processes):
            order = "ours,chain" if i % 2 else "chain,ours"
            done = subprocess.run([sys.executable, __file__, "--one", str(tensors), order], capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout))
        middle = lambda key: statistics.median(r[key] for r in runs)
        rows.append({"tensors": tensors, "ours_ms": middle("ours"), "torch_chain_ms": middle("chain"),
                     "ratio": statistics.median(r["chain"] / r["ours"] for r in runs), "share_of_mul": middle("share"), "processes": len(runs)})
        print("{tensors:5d} tensors: ours {ours_ms:6.1f} ms, torch chain {torch_chain_ms:6.1f} ms, ratio {ratio:.2f}, share {share_of_mul:.2f}".format(**rows[-1]))
    if options.out:
        write("step", rows, options.out)


if __name__ == "__main__":
    main()
