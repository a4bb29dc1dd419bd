"""Digits in FP32 and in mixed precision, side by side, and the lesson of the loss scale.

    python examples/python/train_digits.py [--device auto|cpu|cuda] [--seeds 5] [--epochs 30] [--out out]

Real data: scikit-learn's digits (1,797 images of 8x8). The same convolutional net, seeds and data order train twice: in
FP32 with torch.optim.AdamW, and with FP16 weights, exact split16 masters and dynamic loss scaling. Then a deep sigmoid
net shows what the loss scale is for. Writes digits.json and digits.png into --out. examples/cpp/train_digits.cpp is the
same job in C++.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import halfstep as hs


def digits(device):
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(data.images, dtype=torch.float32)[order] / 16).unsqueeze(1)
    y = torch.tensor(data.target)[order]
    return [t.to(device) for t in (x[:1400], y[:1400], x[1400:], y[1400:])]


def conv_net():
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))


def sigmoid_net():
    layers, width = [nn.Flatten()], 64
    for _ in range(7):
        layers += [nn.Linear(width, 64), nn.Sigmoid()]
        width = 64
    layers += [nn.Linear(64, 10)]
    net = nn.Sequential(*layers)
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain=0.7)
            nn.init.zeros_(module.bias)
    return net


def held_bytes(model, optimizer):
    """Bytes of distinct storages of weights, gradients and optimizer state, per parameter."""
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    tensors += [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / sum(p.numel() for p in model.parameters())


class Arm:
    """One way to train: "fp32", or "mixed" with FP16 weights and a loss-scaling policy."""

    def __init__(self, name, model, device, optimizer="AdamW", policy=None, **kw):
        self.mixed, self.model, self.device = name != "fp32", model, device
        if self.mixed:
            hs.cast_model(model)
            self.optimizer = getattr(hs.optim, optimizer)(model.named_parameters(), **kw)
            self.scaler = hs.GradScaler(policy=policy or hs.policies.Dynamic())
        else:
            self.optimizer = getattr(torch.optim, optimizer)(model.parameters(), **kw)
            self.scaler = hs.GradScaler(enabled=False)

    def step(self, x, y):
        self.optimizer.zero_grad()
        with hs.autocast(self.device, enabled=self.mixed):
            output = self.model(x)
        loss = nn.functional.cross_entropy(output.float(), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def accuracy(self, x, y):
        self.model.eval()
        with torch.no_grad(), hs.autocast(self.device, enabled=self.mixed):
            right = (self.model(x).argmax(1) == y).float().mean().item()
        self.model.train()
        return 100 * right


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()  # a step is over when the GPU has done it
    return time.perf_counter()


def train(name, seed, data, device, epochs, progress, max_steps=None):
    torch.manual_seed(seed)
    arm = Arm(name, conv_net().to(device), device, lr=2e-3, weight_decay=1e-2)
    x, y, test_x, test_y = data
    order = torch.Generator().manual_seed(seed)
    losses, scales, times = [], [], []
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(100):
            rows = rows.to(device)
            start = clock(device)
            losses.append(arm.step(x[rows], y[rows]))
            times.append(clock(device) - start)
            scales.append(arm.scaler.stats().scale if arm.mixed else 1.0)
            if max_steps and len(losses) == max_steps:
                return arm, losses
        progress()
    stats = arm.scaler.stats() if arm.mixed else None
    return dict(accuracy=arm.accuracy(test_x, test_y), step_ms=1e3 * statistics.median(times), bytes_per_param=held_bytes(arm.model, arm.optimizer),
                final_scale=scales[-1], skipped=stats.steps_skipped if stats else 0, losses=torch.stack(losses).tolist(), scales=scales)


LESSON_TICK = 50  # steps of the lesson between two ticks of the progress bar


def sigmoid_lesson(seed, data, device, name, steps, progress):
    torch.manual_seed(seed)
    policy = hs.policies.Static(1.0) if name == "S=1" else hs.policies.Dynamic(init_scale=2.0**16, growth_interval=100)
    arm = Arm(name, sigmoid_net().to(device), device, optimizer="Adam", policy=policy, lr=5e-3)
    x, y, test_x, test_y = data
    for step in range(1, steps + 1):
        arm.step(x, y)
        if step % LESSON_TICK == 0 or step == steps:
            progress()
    return arm.accuracy(test_x, test_y)


class Progress:
    def __init__(self, total):
        self.done, self.total, self.start = 0, total, time.perf_counter()

    def __call__(self):
        self.done += 1
        filled = 40 * self.done // self.total
        sys.stderr.write(f"\r[{'#' * filled}{'.' * (40 - filled)}] {self.done}/{self.total}  {time.perf_counter() - self.start:.0f} s")
        sys.stderr.write("\n" if self.done == self.total else "")
        sys.stderr.flush()


def plot(arms, epochs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for (name, runs), (color, style) in zip(arms.items(), (("tab:blue", "-"), ("tab:orange", "--"))):
        losses = torch.tensor([run["losses"] for run in runs]).view(len(runs), epochs, -1).mean(2)  # seed, epoch
        x = torch.arange(1, epochs + 1)
        for line in losses:
            left.plot(x, line, color=color, alpha=0.35, linewidth=0.8)
        left.plot(x, losses.mean(0), color=color, linestyle=style, linewidth=2.2, label=f"{name}, mean of {len(runs)} seeds")
    left.set(title="training loss, mean over each epoch (thin: one seed)", xlabel="epoch", yscale="log")
    left.legend()
    seeds = len(arms["mixed"])
    for seed, run in enumerate(arms["mixed"]):  # wide lines first, so that equal ones show behind each other
        skips = f", {run['skipped']} skipped" if run["skipped"] else ""
        right.step(range(1, len(run["scales"]) + 1), run["scales"], where="post", linewidth=1.5 + 6 * (seeds - 1 - seed) / seeds, label=f"seed {seed}{skips}")
    scales = [s for run in arms["mixed"] for s in run["scales"]]
    right.set(title="loss scale of the mixed arm after each step", xlabel="step")
    right.set_yscale("log", base=2)
    right.set_ylim(min(scales) / 2, max(scales) * 2)
    if seeds <= 8:
        right.legend(loc="upper right", ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(arms, lesson, device):
    seeds = len(arms["fp32"])
    print(f"\ndigits, convolutional net, {seeds} paired seeds, {device}")
    print(f"{'':8}{'accuracy %':>16}{'ms a step':>12}{'bytes a param':>16}{'loss scale':>18}{'skipped':>9}")
    for name, runs in arms.items():
        acc, scales = [r["accuracy"] for r in runs], [r["final_scale"] for r in runs]
        scale = f"{min(scales):g}" if min(scales) == max(scales) else f"{min(scales):g} to {max(scales):g}"
        print(f"{name:8}{statistics.mean(acc):9.2f} ± {spread(acc):4.2f}{statistics.median(r['step_ms'] for r in runs):12.2f}"
              f"{runs[0]['bytes_per_param']:16.2f}{scale:>18}{sum(r['skipped'] for r in runs):9d}")
    pairs = [m["accuracy"] - f["accuracy"] for f, m in zip(arms["fp32"], arms["mixed"])]
    print(f"mixed - fp32, paired: {statistics.mean(pairs):+.2f} ± {spread(pairs):.2f} points")
    print(f"\nseven sigmoid layers, FP16 weights, {len(lesson['fp32'])} seeds: what the loss scale is for")
    for name, values in lesson.items():
        print(f"{name:8}{statistics.mean(values):9.2f} ± {spread(values):4.2f}")


def count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--seeds", type=count, default=5, help="paired seeds of the two arms")
    parser.add_argument("--epochs", type=count, default=30)
    parser.add_argument("--lesson-seeds", type=count, default=3)
    parser.add_argument("--lesson-steps", type=count, default=800)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of digits.json and digits.png")
    options = parser.parse_args()
    status = hs.cuda_status()
    if options.device == "cuda" and status != "ready":
        parser.error(f"--device cuda: halfstep's CUDA side is {status}")
    if options.device == "auto":
        options.device = "cuda" if status == "ready" else "cpu"
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # before a minute of training
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    return options


def main():
    options = parse()
    device = options.device
    data = digits(device)
    ticks = -(-options.lesson_steps // LESSON_TICK)
    progress = Progress(2 * options.seeds * options.epochs + 3 * options.lesson_seeds * ticks)
    arms = {"fp32": [], "mixed": []}
    for seed in range(options.seeds):
        for name in arms:
            arms[name].append(train(name, seed, data, device, options.epochs, progress))
    lesson = {name: [sigmoid_lesson(seed, data, device, name, options.lesson_steps, progress) for seed in range(options.lesson_seeds)]
              for name in ("S=1", "dynamic", "fp32")}
    table(arms, lesson, device)

    keys = ("accuracy", "step_ms", "bytes_per_param", "final_scale", "skipped")
    report = {"arms": {name: {k: [r[k] for r in runs] for k in keys} for name, runs in arms.items()}, "sigmoid": lesson,
              "seeds": list(range(options.seeds)), "device": device, "versions": {"halfstep": hs.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}}
    (options.out / "digits.json").write_text(json.dumps(report, indent=1))
    plot(arms, options.epochs, options.out / "digits.png")
    print(f"\nwrote {options.out / 'digits.json'} and {options.out / 'digits.png'}")


if __name__ == "__main__":
    main()
