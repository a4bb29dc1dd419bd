"""What each loss-scaling policy makes of corrupted batches, on a net that needs its loss scale.

    python benchmarks/policies.py [--out benchmarks/results/cpu.json] [--seeds 5] [--steps 1000]

The seven-layer sigmoid net of examples/python/train_digits.py on scikit-learn's digits, FP16 weights, exact split16 masters, Adam, batches of 256. Every
50th batch holds a NaN image, whatever the scale. For each policy, over the seeds: steps skipped per 1,000, of which the share
that the corrupted batches did not cause; the share of the gradients that the FP16 pass made zero though an FP32 pass over the same
weights does not (sampled every 40 steps); the final training loss, taken in FP32 from the masters; and the scale at the end.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

import halfstep as hs
from common import write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/python"))
from train_digits import Arm, digits, sigmoid_net  # noqa: E402

EVERY, SAMPLE, BATCH = 50, 40, 256
POLICIES = {
    "Dynamic()": hs.policies.Dynamic(),
    "Dynamic(hysteresis=2)": hs.policies.Dynamic(hysteresis=2),
    "Dynamic(growth_interval=20)": hs.policies.Dynamic(growth_interval=20),
    "LogMax()": hs.policies.LogMax(),
    "Occupancy()": hs.policies.Occupancy(),
    "Underflow()": hs.policies.Underflow(),
}


def reference(model):
    """An FP32 copy of an FP16 model."""
    return copy.deepcopy(model).float()


def flushed_share(arm, x, y):
    """Of the gradients that are not zero in FP32, the share that the last FP16 pass left zero."""
    net = arm.reference
    with torch.no_grad():
        for wide, narrow in zip(net.parameters(), arm.before):
            wide.copy_(narrow)
    net.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    lost = alive = 0
    for wide, narrow in zip(net.parameters(), arm.model.parameters()):
        lost += int(((wide.grad != 0) & (narrow.grad == 0)).sum())
        alive += int((wide.grad != 0).sum())
    return lost / alive


def final_loss(arm, x, y):
    with torch.no_grad(), hs.evaluate_in(arm.model, arm.optimizer, dtype=torch.float32):
        return nn.functional.cross_entropy(arm.model(x), y).item()


def run(policy, seed, steps, data):
    torch.manual_seed(seed)
    net = sigmoid_net()
    wide = reference(net)
    arm = Arm("mixed", net, "cpu", optimizer="Adam", policy=policy, lr=5e-3)
    arm.reference = wide
    x, y, _, _ = data
    order, shares, needless = torch.Generator().manual_seed(seed), [], 0
    for step in range(1, steps + 1):
        bad, sample = step % EVERY == 0, step % SAMPLE == 1
        rows = torch.randperm(len(x), generator=order)[:BATCH]
        images, labels = x[rows], y[rows]
        if bad:
            images[0] = float("nan")
        if sample:
            arm.before = [p.detach().clone() for p in arm.model.parameters()]
        arm.step(images, labels)
        skipped = arm.scaler.stats().last_found_inf
        needless += skipped and not bad
        if sample and not skipped:
            shares.append(flushed_share(arm, images, labels))
    stats = arm.scaler.stats()
    return {"skips": 1000 * stats.steps_skipped / steps, "needless": 1000 * needless / steps, "flushed": statistics.mean(shares), "loss": final_loss(arm, x, y), "scale": stats.scale}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)  # layers of 64 gain nothing from more
    data = digits("cpu")
    rows = []
    for name, policy in POLICIES.items():
        runs = [run(policy, seed, options.steps, data) for seed in range(options.seeds)]
        row = {"policy": name, "seeds": options.seeds, "steps": options.steps, "every": EVERY}
        for key in runs[0]:
            values = [r[key] for r in runs]
            row[key], row[key + "_spread"] = statistics.median(values) if key == "scale" else statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
        print("{policy:28} skips {skips:6.1f}/1000 ({needless:.1f} needless)  flushed {flushed:.4f} ± {flushed_spread:.4f}  loss {loss:.4f} ± {loss_spread:.4f}  scale {scale:g}".format(**row), flush=True)
    if options.out:
        write("policies", rows, options.out)


if __name__ == "__main__":
    main()
