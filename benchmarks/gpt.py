"""One training step of a small GPT: halfstep's layers, FP16 weights and split16 beside what torch offers.

    python benchmarks/gpt.py [--rounds 7] [--out benchmarks/results/cpu.json]

4 layers of width 256, 8 x 256 tokens, a vocabulary of 8,192: forward, backward, clip, AdamW. Arms, run in turn, round after round in one process:
  halfstep           FP16 weights, split16 masters, halfstep's layers (examples/python/train_gpt.py), loss scale and clip in the step
  torch FP16         FP32 weights under autocast, GradScaler, unscale_, clip_grad_norm_, AdamW(fused=True); torch's layers
  torch FP32         the same without autocast and scaler
Torch's arms run without halfstep's overrides. `ratio` is the median over rounds of an arm's time over ours in the same round.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import halfstep as hs
from common import write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/python"))
from train_gpt import GPT  # noqa: E402

LAYERS, WIDTH, HEADS, CONTEXT, BATCH, VOCABULARY = 4, 256, 4, 256, 8, 8192


class StockBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))
        angles = torch.outer(torch.arange(CONTEXT), 10000.0 ** -(torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS)))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rope(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1).to(x.dtype)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rope(q), self.rope(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class StockGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(StockBlock() for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH, eps=1e-5), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens, targets):
        return F.cross_entropy(self.head(self.norm(self.blocks(self.embedding(tokens)))).flatten(0, 1), targets.flatten())


def ours(tokens, targets):
    model = GPT(VOCABULARY, LAYERS, WIDTH, HEADS, CONTEXT)
    hs.cast_model(model)
    opt, scaler = hs.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0), hs.GradScaler()

    def step():
        opt.zero_grad()
        with hs.autocast("cpu"):
            loss = model(tokens, targets)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        return loss

    return step


def stock(tokens, targets, half):
    model = StockGPT()
    opt, scaler = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), torch.amp.GradScaler("cpu", enabled=half)

    def step():
        opt.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = model(tokens, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        return loss

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))
    tokens, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    arms = {"halfstep": ours(tokens, targets), "torch FP16": stock(tokens, targets, True), "torch FP32": stock(tokens, targets, False)}
    rounds = []
    for r in range(options.rounds + 2):
        times = {}
        for name, step in arms.items():
            hs.set_overrides(name == "halfstep")
            start = time.perf_counter()
            step()
            times[name] = 1e3 * (time.perf_counter() - start)
        if r >= 2:
            rounds.append(times)
    hs.set_overrides(True)
    rows = [{"arm": name, "ms": statistics.median(t[name] for t in rounds), "ratio": statistics.median(t[name] / t["halfstep"] for t in rounds)} for name in arms]
    for row in rows:
        print(f"{row['arm']:12} {row['ms']:8.1f} ms  {row['ratio']:.2f} x halfstep's time")
    if options.out:
        write("gpt", rows, options.out)


if __name__ == "__main__":
    main()
