"""Records a run on the digits data and asks what other loss-scaling policies would have done with it.

    python examples/python/record_and_simulate.py [--out out]

Seven sigmoid layers with FP16 weights: gradients so small that the scale decides how many of them FP16 keeps. Writes
digits.trace and digits_policies.png into --out.
"""

import argparse
import csv
from pathlib import Path

import torch
from torch import nn

import halfstep as hs

DATA = Path(__file__).resolve().parents[1] / "data" / "digits.csv"


def digits():
    with open(DATA) as file:
        rows = torch.tensor([[float(x) for x in row] for row in csv.reader(file) if row and row[0].lstrip("-").replace(".", "").isdigit()])
    return rows[:, :-1] / 16, rows[:, -1].long()


def sigmoid_net():
    torch.manual_seed(0)
    layers = [m for _ in range(7) for m in (nn.Linear(64, 64), nn.Sigmoid())]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)  # so small a net is not faster with more
    x, y = digits()
    model = sigmoid_net()
    hs.cast_model(model)
    optimizer = hs.optim.Adam(model.named_parameters(), lr=5e-3)
    scaler = hs.GradScaler(policy=hs.policies.Dynamic(init_scale=2.0**24, growth_interval=50))
    order = torch.Generator().manual_seed(0)
    with hs.record(scaler, options.out / "digits.trace"):
        for _ in range(options.steps):
            rows = torch.randperm(len(x), generator=order)[:256]
            optimizer.zero_grad()
            with hs.autocast("cpu"):
                loss = nn.functional.cross_entropy(model(x[rows]).float(), y[rows])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    print("the smallest gradients, as stored at the scale", scaler.stats().scale)
    for name, t in sorted(scaler.tensor_stats().items(), key=lambda item: item[1].norm)[:3]:
        print(f"  {name:10} norm {t.norm:.2e}   subnormal {100 * t.subnormal_share:5.1f} %   zero {100 * t.zero_share:5.1f} %")

    recorded = hs.trace.read(options.out / "digits.trace")
    policies = {None: None, "torch": hs.policies.preset("torch"), "no scale": hs.policies.Static(1.0), "static 1024": hs.policies.Static(1024.0)}
    results = [hs.simulate(recorded, policy, name) for name, policy in policies.items()]
    print()
    print(hs.trace.table(results))
    hs.trace.plot(results, options.out / "digits_policies.png")
    print(f"\nwrote {options.out / 'digits.trace'} and {options.out / 'digits_policies.png'}")


if __name__ == "__main__":
    main()
