"""Training with FP32, BF16 and int8 optimizer states: does it end where FP32 states end?

    python benchmarks/states.py [--out benchmarks/results/cpu.json] [--seeds 5]

Three nets on real data, FP16 weights with split16 masters, dynamic loss scale, the same seeds and data order in every arm:
the convolutional net of examples/python/train_digits.py (AdamW, 15 epochs), its seven-layer sigmoid net (Adam, 800 steps of the
full batch), and a character model (five tanh layers on the last 16 characters) on the text of CPython's pydoc_data.topics (AdamW, 150
batches of 4,096). The row gives the last loss on held-out data per arm, and the mean paired difference to FP32 states with its
standard deviation over the seeds, beside the spread of FP32 states themselves.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

import halfstep as hs
from common import write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/python"))
from train_digits import Arm, conv_net, digits, sigmoid_net  # noqa: E402

STATES, CONTEXT = ("fp32", "bf16", "int8"), 16


def held_out(arm, x, y):
    with torch.no_grad(), hs.autocast("cpu"):
        return nn.functional.cross_entropy(arm.model(x).float(), y).item()


def conv(seed, states):
    x, y, test_x, test_y = digits("cpu")
    arm = Arm("mixed", conv_net(), "cpu", lr=2e-3, weight_decay=1e-2, states=states)
    order = torch.Generator().manual_seed(seed)
    for _ in range(15):
        for rows in torch.randperm(len(x), generator=order).split(100):
            arm.step(x[rows], y[rows])
    return held_out(arm, test_x, test_y)


def sigmoid(seed, states):
    x, y, test_x, test_y = digits("cpu")
    arm = Arm("mixed", sigmoid_net(), "cpu", optimizer="Adam", policy=hs.policies.Dynamic(growth_interval=100), lr=5e-3, states=states)
    for _ in range(800):
        arm.step(x, y)
    return held_out(arm, test_x, test_y)


def characters():
    """(contexts, next characters, size of the alphabet) of the text."""
    from pydoc_data import topics

    text = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[c] for c in text])
    return codes[:-1].unfold(0, CONTEXT, 1)[: len(codes) - CONTEXT], codes[CONTEXT:], len(alphabet)


def character_model(seed, states):
    contexts, following, size = characters()
    layers, width = [nn.Embedding(size, 16), nn.Flatten()], 16 * CONTEXT
    for _ in range(5):
        layers += [nn.Linear(width, 256), nn.Tanh()]
        width = 256
    arm = Arm("mixed", nn.Sequential(*layers, nn.Linear(width, size)), "cpu", lr=2e-3, states=states)
    cut, order = int(0.95 * len(contexts)), torch.Generator().manual_seed(seed)
    for _ in range(150):
        rows = torch.randint(cut, (4096,), generator=order)
        arm.step(contexts[rows], following[rows])
    return held_out(arm, contexts[cut:], following[cut:])


NETS = {"digits, convolutional": conv, "digits, seven sigmoid layers": sigmoid, "characters of pydoc topics": character_model}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for name, train in NETS.items():
        losses = {states: [] for states in STATES}
        for seed in range(options.seeds):
            for states in STATES:
                torch.manual_seed(seed)
                losses[states].append(train(seed, states))
        row = {"net": name, "seeds": options.seeds, "spread": statistics.stdev(losses["fp32"])}
        for states in STATES:
            paired = [a - b for a, b in zip(losses[states], losses["fp32"])]
            row[states] = {"loss": statistics.mean(losses[states]), "difference": statistics.mean(paired), "deviation": statistics.stdev(paired)}
        rows.append(row)
        print(f"{name:30} spread of FP32 states {row['spread']:.4f}; " + "; ".join(
            f"{s} {row[s]['loss']:.4f} ({row[s]['difference']:+.4f} ± {row[s]['deviation']:.4f})" for s in STATES), flush=True)
    if options.out:
        write("states", rows, options.out)


if __name__ == "__main__":
    main()
