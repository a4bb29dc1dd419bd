"""What a monitor costs: training steps without one, with one between its samples, and with one at each sample, in turn in one process.

    OMP_NUM_THREADS=1 python benchmarks/monitor.py [--rounds 40] [--every 50] [--out benchmarks/results/cpu.json]

One net is trained, and of each kind of step the fastest counts: other work on the machine only ever adds time. `between`: the
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


class Job:
    """One net, whose steps are taken with the monitor asleep, between its samples, and at one."""

    def __init__(self, make, folder):
        torch.manual_seed(0)
        self.net, self.loss = make()
        hs.cast_model(self.net)
        self.opt, self.scaler = hs.optim.AdamW(self.net.named_parameters(), lr=1e-4), hs.GradScaler()
        watch = lambda every, name: hs.monitor(self.net, self.opt, self.scaler, every=every, live=folder / name, tensorboard=folder / "events")
        self.monitors = {"off": None, "between": watch(10**9, "a"), "sample": watch(1, "b")}
        self.asleep()

    def asleep(self):
        self.scaler._history.watchers.clear()
        for monitor in filter(None, self.monitors.values()):
            if monitor._shadow is not None:
                monitor._shadow.remove()
                monitor._shadow = None

    def step(self, kind):
        """Milliseconds of one step: the process's CPU time, which other work on the machine touches less than the wall's."""
        monitor = self.monitors[kind]
        if monitor is not None:
            self.scaler._history.watchers.append(monitor)
            monitor._next = monitor._next - (kind == "sample" and monitor._ticks > 0)  # asleep() dropped the one it had hooked
            monitor._arm()
        start = time.process_time()
        self.opt.zero_grad()
        with hs.autocast("cpu"):
            loss = self.loss(self.net)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.opt)
        self.scaler.update()
        took = 1e3 * (time.process_time() - start)
        self.asleep()
        return took


def measure(name, rounds, every):
    with tempfile.TemporaryDirectory() as folder:
        job = Job(CASES[name], Path(folder))
        layers = len(job.monitors["sample"]._layers)
        times = {"off": [], "between": []} | {i: [] for i in range(layers)}
        for i in range(rounds * layers + 3):
            order = ("off", "between", "sample")
            for kind in order if i % 2 else order[::-1]:
                took = job.step(kind)
                if i >= 3:
                    times[i % layers if kind == "sample" else kind].append(took)
        for monitor in filter(None, job.monitors.values()):
            monitor.close()
    step = min(times["off"])
    free, one = min(times["between"]) - step, statistics.mean(min(times[i]) for i in range(layers)) - step
    return {"case": name, "step_ms": step, "between_ms": free, "sample_ms": one, "every": every, "rounds": rounds, "overhead": ((every - 1) * free + one) / every / step}


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
