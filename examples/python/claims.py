"""The three claims of mixed-precision training (Micikevicius et al. 2018, arXiv 1710.03740), each put to real data.

    python examples/python/claims.py [--seeds 3] [--out out]

On scikit-learn's digits, FP16 weights, three seeds, each beside FP32:

  scale          gradients need a loss scale: seven sigmoid layers of 64, Adam 5e-3, full batch, S = 1, dynamic, or a scale for each layer's product (Ada-Loss)
  master         updates need an exact weight: 64-64-10, SGD with momentum 0.9 at lr 1e-4, no master or split16
  accumulation   sums need FP32: the gradient of 1,400 images in batches of one, summed in FP16 or in FP32

Prints one table and writes claims.json into --out.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import nn

import halfstep as hs
from train_digits import Arm, Progress, digits, sigmoid_net


def scale(seed, data, name, progress):
    torch.manual_seed(seed)
    policy = {"FP32": None, "dynamic S": hs.policies.Dynamic(growth_interval=100)}.get(name, hs.policies.Static(1.0))
    net = sigmoid_net()
    if name == "Ada-Loss, S = 1":
        hs.ada_loss_(net, every=50, total=2.0**16)
    arm = Arm("fp32" if policy is None else "mixed", net, "cpu", optimizer="Adam", policy=policy, lr=5e-3)
    x, y, test_x, test_y = data
    for _ in range(800):
        arm.step(x, y)
    progress()
    return arm.accuracy(test_x, test_y)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def master(seed, data, name, progress):
    torch.manual_seed(seed)
    kw = {} if name == "FP32" else {"master": name}
    arm = Arm("fp32" if name == "FP32" else "mixed", mlp(), "cpu", optimizer="SGD", lr=1e-4, momentum=0.9, **kw)
    x, y = data[:2]
    order = torch.Generator().manual_seed(seed)
    for _ in range(40):
        for rows in torch.randperm(len(x), generator=order).split(100):
            loss = arm.step(x[rows], y[rows])
    progress()
    with torch.no_grad(), hs.autocast("cpu", enabled=arm.mixed):
        loss = nn.functional.cross_entropy(arm.model(x).float(), y)
    return loss.item()


def accumulation(seed, data, name, progress):
    """Relative error of the summed gradient against the same micro-batches summed in FP64."""
    torch.manual_seed(seed)
    model, mixed = mlp(), name != "FP32"
    if mixed:
        hs.cast_model(model)
        hs.optim.SGD(model.parameters(), lr=0.1, grad_dtype="fp32" if name == "summed in FP32" else "param")
    params = list(model.parameters())

    def backward(image, label):
        with hs.autocast("cpu", enabled=mixed):
            output = model(image)
        (nn.functional.cross_entropy(output.float(), label) * (2.0**10 if mixed else 1.0) / 1400).backward()

    batches = list(zip(data[0].split(1), data[1].split(1)))
    exact = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    for image, label in batches:
        model.zero_grad()
        backward(image, label)
        for p, total in zip(params, exact):
            total += p.grad
    model.zero_grad()
    for image, label in batches:
        backward(image, label)
    progress()
    wrong = sum(((p.grad - e) ** 2).sum() for p, e in zip(params, exact))
    return (wrong / sum((e**2).sum() for e in exact)).sqrt().item()


CLAIMS = {
    "scale": (scale, ("FP32", "S = 1", "dynamic S", "Ada-Loss, S = 1"), "test accuracy, %"),
    "master": (master, ("FP32", "none", "split16"), "training loss"),
    "accumulation": (accumulation, ("FP32", "summed in FP16", "summed in FP32"), "relative error of the gradient"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="out")
    options = parser.parse_args()
    data = digits("cpu")
    progress = Progress(options.seeds * sum(len(arms) for _, arms, _ in CLAIMS.values()))
    results = {claim: {"measure": measure, "arms": {arm: [run(seed, data, arm, progress) for seed in range(options.seeds)] for arm in arms}}
               for claim, (run, arms, measure) in CLAIMS.items()}
    print(f"\n{'claim':13} {'arm':16} {'mean':>10} {'spread':>9}  measure")
    for claim, result in results.items():
        for arm, values in result["arms"].items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{claim:13} {arm:16} {statistics.mean(values):10.3g} {spread:9.2g}  {result['measure']}")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "claims.json").write_text(json.dumps({"claims": results, "seeds": options.seeds, "versions": {"halfstep": hs.__version__, "torch": torch.__version__}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
