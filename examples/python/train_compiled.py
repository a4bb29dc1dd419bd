"""Digits, the whole iteration under torch.compile: time a step, and how far the weights are from eager mode.

python examples/python/train_compiled.py [backend]     (inductor; aot_eager is equal to the last bit)
"""

import pathlib
import sys
import time

import torch

import halfstep as hs

torch._dynamo.config.trace_autograd_ops = True
rows = torch.tensor([[float(v) for v in line.split(",")] for line in (pathlib.Path(__file__).parents[1] / "data/digits.csv").read_text().split() if line[0].isdigit()])
images, labels = rows[:, :64] / 16, rows[:, 64].long()


def train(backend, steps=200):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    hs.cast_model(net)
    opt = hs.optim.AdamW(net.named_parameters(), lr=torch.tensor(3e-3, dtype=torch.float64), max_grad_norm=1.0)
    scaler = hs.GradScaler(growth_interval=50)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)

    def iteration(x, y):
        opt.zero_grad()
        with hs.autocast("cpu"):
            loss = torch.nn.functional.cross_entropy(net(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        return loss.detach()

    step, times = torch.compile(iteration, fullgraph=True, backend=backend) if backend else iteration, []
    for _ in range(steps):
        batch = torch.randint(len(images), (128,))
        x, y = images[batch], labels[batch]
        begin = time.perf_counter()
        step(x, y)
        times.append(time.perf_counter() - begin)
        schedule.step()
    with hs.evaluate_in(net, [opt]), torch.no_grad():
        right = (net(images).argmax(1) == labels).float().mean().item()
    print(f"{backend or 'eager':10} {sorted(times)[steps // 2] * 1e3:6.2f} ms a step, accuracy {right:.4f}, {scaler.stats().steps_applied} steps applied")
    return opt.master_params()


backend = sys.argv[1] if len(sys.argv) > 1 else "inductor"
eager, compiled = train(None), train(backend)
apart = max(float((a - b).abs().max()) for a, b in zip(eager, compiled))
print("the weights are bit-equal" if apart == 0 else f"the weights are at most {apart:.2g} apart")
