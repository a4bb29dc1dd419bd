"""Backward and step with the statistics in the step's own pass and in the backward's hooks, interleaved in one process.

Of each arm the fastest round counts: other work on the machine only ever adds time.

    python benchmarks/backward_stats.py [--rounds 40] [--out benchmarks/results/cpu.json]
"""

import argparse
import time

import torch

import common
import halfstep as hs

CASES = {"4 layers of 2,048 x 2,048, FP16, batch 16": (4, 2048, torch.float16), "8 layers of 1,024 x 1,024, FP32, batch 16": (8, 1024, torch.float32),
         "100 layers of 64 x 64, FP32, batch 16": (100, 64, torch.float32)}


class Arm:
    def __init__(self, layers, width, dtype, on):
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)]).to(dtype)
        self.opt = hs.optim.SGD(self.net.named_parameters(), lr=1e-4, momentum=0.9)
        self.scaler = hs.GradScaler("cpu", init_scale=1024.0)
        if on:
            self.opt.stats_in_backward()
        self.x = torch.randn(16, width, dtype=dtype)

    def __call__(self):
        """Times of the backward and of the step."""
        self.opt.zero_grad()
        loss = self.scaler.scale(self.net(self.x).float().square().mean())
        start = time.perf_counter()
        loss.backward()
        middle = time.perf_counter()
        self.scaler.step(self.opt)
        self.scaler.update()
        return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def measure(name, rounds):
    arms = [Arm(*CASES[name], on) for on in (False, True)]
    times = [[], []]
    for i in range(rounds + 3):
        for k in (0, 1) if i % 2 else (1, 0):
            took = arms[k]()
            if i >= 3:
                times[k].append(took)
    (pass_backward, pass_step), (hook_backward, hook_step) = [min(arm, key=sum) for arm in times]
    both = [min(map(sum, arm)) for arm in times]
    return {"case": name, "pass_backward_ms": pass_backward, "pass_step_ms": pass_step, "hook_backward_ms": hook_backward, "hook_step_ms": hook_step, "rounds": rounds, "ratio": both[1] / both[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = []
    for name in CASES:
        rows.append(measure(name, options.rounds))
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()), flush=True)
    if options.out:
        common.write("backward_stats", rows, options.out)


if __name__ == "__main__":
    main()
