"""What a monitor costs: training steps without one, with one between its samples, and with one at each sample, in turn in one process.

    OMP_NUM_THREADS=1 python benchmarks/monitor.py [--rounds 40] [--every 50] [--out benchmarks/results/cpu.json]

The same net is trained three times side by side, and of each kind of step the fastest counts: other work on the machine only ever adds time. `between`: the
extra time of a step that is not sampled (the counters, the status file); `sample`: that of a step in which one layer runs in FP32, the mean over the layers.
overhead = ((every - 1) * between + sample) / every over the step without a monitor.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import common
import halfstep as hs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/python"))
from train_gpt import GPT  # noqa: E402


def gpt():
    model = GPT(8192, 4, 256, 4, 256)
    tokens = torch.randint(8192, (8, 257))
    return model, lambda net: net(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def mlp(layers, width, batch):
    model, x = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)]), torch.randn(batch, width)
    return model, lambda net: net(x).float().square().mean()


CASES = {"GPT, 4 layers of width 256, 8 x 256 tokens, FP16": gpt, "4 layers of 2,048 x 2,048, FP16, batch 64": lambda: mlp(4, 2048, 64), "20 layers of 256 x 256, FP16, batch 64": lambda: mlp(20, 256, 64)}


class Arm:
    def __init__(self, make, folder, every):
        torch.manual_seed(0)
        self.net, self.loss = make()
        hs.cast_model(self.net)
        self.opt, self.scaler = hs.optim.AdamW(self.net.named_parameters(), lr=1e-4), hs.GradScaler()
        self.monitor = hs.monitor(self.net, self.opt, self.scaler, every=every, live=folder / f"live{every}", tensorboard=folder / "events") if every else None

    def __call__(self):
        """Milliseconds of one step: the process's CPU time, which other work on the machine hardly touches."""
        start = time.process_time()
        self.opt.zero_grad()
        with hs.autocast("cpu"):
            loss = self.loss(self.net)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.opt)
        self.scaler.update()
        return 1e3 * (time.process_time() - start)


def measure(name, rounds, every):
    with tempfile.TemporaryDirectory() as folder:
        arms = [Arm(CASES[name], Path(folder), n) for n in (0, 10**9, 1)]
        layers = len(arms[2].monitor._layers)
        off, between, sample = [], [], [[] for _ in range(layers)]
        for i in range(rounds * layers + 3):
            times = [0.0] * 3
            for k in (0, 1, 2) if i % 2 else (2, 1, 0):
                times[k] = arms[k]()
            if i >= 3:
                off.append(times[0])
                between.append(times[1])
                sample[i % layers].append(times[2])
        for arm in arms[1:]:
            arm.monitor.close()
    step = min(off)
    free, one = min(between) - step, statistics.mean(map(min, sample)) - step
    return {"case": name, "step_ms": step, "between_ms": free, "sample_ms": one, "every": every, "rounds": len(off), "overhead": ((every - 1) * free + one) / every / step}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="samples of each layer")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = []
    for name in CASES:
        rows.append(measure(name, options.rounds, options.every))
        r = rows[-1]
        print(f"{name}: step {r['step_ms']:.2f} ms, between samples {r['between_ms']:+.3f} ms, a sample {r['sample_ms']:+.2f} ms; every {r['every']} steps: {100 * r['overhead']:.2f} %", flush=True)
    if options.out:
        common.write("monitor", rows, options.out)


if __name__ == "__main__":
    main()
