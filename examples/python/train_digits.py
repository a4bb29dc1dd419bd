"""Digits in FP32 and in mixed precision, side by side, and the lesson of the loss scale.

    python examples/python/train_digits.py [--device auto|cpu|cuda] [--seeds 5] [--epochs 30] [--out out]

Real data: scikit-learn's digits (1,797 images of 8x8). The same convolutional net, seeds and data order train twice: in
FP32 with torch.optim.AdamW, and with FP16 weights, exact split16 masters and dynamic loss scaling. Then a deep sigmoid
net shows what the loss scale is for. Writes digits.json and digits.png into --out.
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


def train(name, seed, data, device, epochs, progress, max_steps=None):
    torch.manual_seed(seed)
    arm = Arm(name, conv_net().to(device), device, lr=2e-3, weight_decay=1e-2)
    x, y, test_x, test_y = data
    order = torch.Generator().manual_seed(seed)
    losses, scales, times = [], [], []
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(100):
            rows = rows.to(device)
            start = time.perf_counter()
            losses.append(arm.step(x[rows], y[rows]))
            times.append(time.perf_counter() - start)
            scales.append(arm.scaler.stats().scale if arm.mixed else 1.0)
            if max_steps and len(losses) == max_steps:
                return arm, losses
        progress()
    stats = arm.scaler.stats() if arm.mixed else None
    return dict(accuracy=arm.accuracy(test_x, test_y), step_ms=1e3 * statistics.median(times), bytes_per_param=held_bytes(arm.model, arm.optimizer),
                final_scale=scales[-1], skipped=stats.steps_skipped if stats else 0, losses=torch.stack(losses).tolist(), scales=scales)


def sigmoid_lesson(seed, data, device, name, steps, progress):
    torch.manual_seed(seed)
    policy = hs.policies.Static(1.0) if name == "S=1" else hs.policies.Dynamic(init_scale=2.0**16, growth_interval=100)
    arm = Arm("fp32" if name == "fp32" else name, sigmoid_net().to(device), device, optimizer="Adam", policy=policy, lr=5e-3)
    x, y, test_x, test_y = data
    for _ in range(steps):
        arm.step(x, y)
    progress()
    return arm.accuracy(test_x, test_y)


def dump(path, seed, data, steps):
    """What examples/cpp/train_digits needs: data, initial weights, and the rows of each step; plain tensors by name."""
    torch.manual_seed(seed)
    weights = {f"weight.{k}": v.detach().clone() for k, v in conv_net().named_parameters()}
    order, rows = torch.Generator().manual_seed(seed), []
    while len(rows) < steps:
        rows += torch.randperm(len(data[0]), generator=order).split(100)
    torch.save({**dict(zip(("x", "y", "test_x", "test_y"), data)), "order": torch.stack(rows[:steps]), **weights}, path)


class Progress:
    def __init__(self, total):
        self.done, self.total, self.start = 0, total, time.perf_counter()

    def __call__(self):
        self.done += 1
        filled = 40 * self.done // self.total
        sys.stderr.write(f"\r[{'#' * filled}{'.' * (40 - filled)}] {self.done}/{self.total}  {time.perf_counter() - self.start:.0f} s")
        sys.stderr.write("\n" if self.done == self.total else "")
        sys.stderr.flush()


def plot(arms, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for (name, runs), color in zip(arms.items(), ("tab:blue", "tab:orange")):
        for i, run in enumerate(runs):
            left.semilogy(run["losses"], color=color, alpha=0.5, label=name if i == 0 else None)
    for run in arms["mixed"]:
        right.step(range(len(run["scales"])), run["scales"], color="tab:orange", alpha=0.6, where="post")
    left.set(title="training loss", xlabel="step")
    left.legend()
    right.set(title="loss scale", xlabel="step", yscale="log")
    right.set_yscale("log", base=2)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lesson-seeds", type=int, default=3)
    parser.add_argument("--lesson-steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--dump", type=Path, help="write data, weights and row order for examples/cpp/train_digits, and stop")
    parser.add_argument("--dump-steps", type=int, default=420)
    options = parser.parse_args()
    device = options.device
    if device == "auto":
        device = "cuda" if hs.cuda_status() == "ready" else "cpu"
    data = digits(device)
    if options.dump:
        options.dump.parent.mkdir(parents=True, exist_ok=True)
        return dump(options.dump, 0, digits("cpu"), options.dump_steps)

    progress = Progress(2 * options.seeds * options.epochs + 3 * options.lesson_seeds)
    arms = {"fp32": [], "mixed": []}
    for seed in range(options.seeds):
        for name in arms:
            arms[name].append(train(name, seed, data, device, options.epochs, progress))
    lesson = {name: [sigmoid_lesson(seed, data, device, name, options.lesson_steps, progress) for seed in range(options.lesson_seeds)]
              for name in ("S=1", "dynamic", "fp32")}

    spread = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0
    print(f"\ndigits, convolutional net, {options.seeds} paired seeds, {device}")
    print(f"{'':8}{'accuracy %':>16}{'ms a step':>12}{'bytes a param':>16}{'loss scale':>12}{'skipped':>9}")
    for name, runs in arms.items():
        acc = [r["accuracy"] for r in runs]
        print(f"{name:8}{statistics.mean(acc):9.2f} ± {spread(acc):4.2f}{statistics.median(r['step_ms'] for r in runs):12.2f}"
              f"{runs[0]['bytes_per_param']:16.2f}{runs[-1]['final_scale']:12g}{sum(r['skipped'] for r in runs):9d}")
    pairs = [m["accuracy"] - f["accuracy"] for f, m in zip(arms["fp32"], arms["mixed"])]
    print(f"mixed - fp32, paired: {statistics.mean(pairs):+.2f} ± {spread(pairs):.2f} points")
    print(f"\nseven sigmoid layers, FP16 weights, {options.lesson_seeds} seeds: what the loss scale is for")
    for name, values in lesson.items():
        print(f"{name:8}{statistics.mean(values):9.2f} ± {spread(values):4.2f}")

    options.out.mkdir(parents=True, exist_ok=True)
    keys = ("accuracy", "step_ms", "bytes_per_param", "final_scale", "skipped")
    report = {"arms": {name: {k: [r[k] for r in runs] for k in keys} for name, runs in arms.items()}, "sigmoid": lesson,
              "seeds": list(range(options.seeds)), "device": device, "versions": {"halfstep": hs.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}}
    (options.out / "digits.json").write_text(json.dumps(report, indent=1))
    plot(arms, options.out / "digits.png")
    print(f"\nwrote {options.out / 'digits.json'} and {options.out / 'digits.png'}")


if __name__ == "__main__":
    main()
