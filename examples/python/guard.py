"""AccuracyGuard on handwritten digits: two faults are planted into a training in FP16, and the run survives both.

    python guard.py [--log guard.json] [--replay guard.json]

After 130 steps a gain inside the network rises 2^14-fold: in FP32 the network is what it was, in FP16 its hidden values are infinite, and
the guard finds which layers to compute in FP32. After 230 steps the learning rate is a hundred times too high: accuracy falls, and the
guard goes back to the last good state with half of the rate that was good. With --replay the decisions of a log are taken again: nothing
is evaluated, and the weights are the same bits.
"""

import argparse
import warnings

import torch
from torch import nn

import halfstep as hs
from train_digits import digits

STEPS, GAIN_AT, RATE_AT = 300, 130, 230


class Gain(nn.Module):
    """x times a number that is not trained, or divided by it."""

    def __init__(self, power):
        super().__init__()
        self.power = power
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x):
        return x * self.gain**self.power


def train(log=None, replay=None, faults=True, guarded=True):
    """(model, accuracy as trained, accuracy in FP32, guard)."""
    torch.manual_seed(0)
    x, y, test_x, test_y = digits("cpu")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), Gain(1), nn.Linear(128, 128), Gain(-1), nn.ReLU(), nn.Linear(128, 10))
    optimizer, scaler = hs.optim.AdamW(model.named_parameters(), lr=2e-3), hs.GradScaler()

    def evaluate(model):
        return {"accuracy": (model(test_x).argmax(1) == test_y).float().mean().item()}

    guard = hs.AccuracyGuard(model, optimizer, scaler, evaluate=evaluate, every=20, margin="3pp", actions=("island", "rewind+lower_lr", "stop"), log=log, replay=replay) if guarded else None
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(x), (100,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        with hs.autocast("cpu"):
            loss = nn.functional.cross_entropy(model(x[rows]).float(), y[rows])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if guarded:
            guard.step()
            if guard.stopped:
                break
        if faults and step == GAIN_AT:
            model[3].gain.fill_(2.0**14)
            model[5].gain.fill_(2.0**14)
        if faults and step == RATE_AT:
            optimizer.param_groups[0]["lr"] *= 100
    model.eval()
    with torch.no_grad(), hs.autocast("cpu"):
        trained = evaluate(model)["accuracy"]
    with hs.evaluate_in(model, optimizer, torch.float32):
        return model, trained, evaluate(model)["accuracy"], guard


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--log", help="every check and decision, as JSON")
    parser.add_argument("--replay", help="take the decisions of this log")
    options = parser.parse_args()
    runs = {"no fault, no guard": dict(faults=False, guarded=False), "faults, no guard": dict(guarded=False), "faults, guarded": dict(log=options.log, replay=options.replay)}
    for name, kw in runs.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the decisions are printed below
            _, trained, exact, guard = train(**kw)
        print(f"{name:20} accuracy as trained {100 * trained:.1f} %, in FP32 {100 * exact:.1f} %")
        for decision in guard.decisions if guard else ():
            print(f"  {decision}")


if __name__ == "__main__":
    main()
