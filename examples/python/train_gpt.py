"""A small GPT of halfstep layers, trained on text in FP16 beside FP32.

    python examples/python/train_gpt.py [--seeds 3] [--steps 300] [--text FILE] [--out out]

The text is that of CPython's pydoc_data.topics, a few hundred kB, written once to OUT/pydoc_topics.txt (or any FILE); its last tenth
is held out. Characters are tokens. Both arms have the same initial weights and see the same batches: "fp32" is FP32 throughout,
"mixed" has FP16 weights and activations, exact masters (split16) and a dynamic loss scale; its loss is taken of the FP32 logits that
never leave `LinearCrossEntropyLoss`. Prints bits per character on the held-out text, the paired difference with its standard
deviation, milliseconds per step, and writes gpt.json. examples/cpp/train_gpt.cpp is the same job in C++, with the same bits.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import halfstep as hs


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, width, heads, context):
        super().__init__()
        self.heads = heads
        self.qkv = hs.nn.Linear(width, 3 * width, bias=False)
        self.out = hs.nn.Linear(width, width, bias=False)
        self.rope = hs.nn.RotaryEmbedding(width // heads, max_seq_len=context)

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(self.rope(q), self.rope(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """Both halves add to the residual stream inside the norm that follows."""

    def __init__(self, width, heads, context):
        super().__init__()
        self.norm1, self.attention = hs.nn.RMSNorm(width, eps=1e-5), Attention(width, heads, context)
        self.norm2, self.mlp = hs.nn.RMSNorm(width, eps=1e-5), hs.nn.MLP(width, 4 * width, width, activation="gelu_tanh")

    def forward(self, x, residual):
        y, residual = self.norm1(x, residual)
        y, residual = self.norm2(self.attention(y), residual)
        return self.mlp(y), residual


class GPT(nn.Module):
    """forward(tokens, targets): the mean cross entropy; the head shares the embedding's weight."""

    def __init__(self, vocabulary, layers=4, width=128, heads=4, context=128):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, context) for _ in range(layers))
        self.norm = hs.nn.RMSNorm(width, eps=1e-5)
        self.loss = hs.nn.LinearCrossEntropyLoss(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if name.endswith(("out.weight", "fc2.weight")) else 0.02)
        self.loss.weight = self.embedding.weight

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        residual = torch.zeros_like(x)
        for block in self.blocks:
            x, residual = block(x, residual)
        x, _ = self.norm(x, residual)
        return self.loss(x.flatten(0, 1), targets.flatten())


def load_text(path):
    if not path.exists():
        from pydoc_data import topics

        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(topics.topics[key] for key in sorted(topics.topics)))
    return path.read_text()


class Text:
    """The characters as codes; batches of windows in an order that the seed decides."""

    def __init__(self, text, context):
        alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
        codes = torch.tensor([alphabet[c] for c in text])
        self.vocabulary, self.context = len(alphabet), context
        split = len(codes) - len(codes) // 10
        self.train, self.held_out = codes[:split], codes[split:]

    def batches(self, seed, batch, steps):
        order = torch.Generator().manual_seed(seed)
        windows = self.train.unfold(0, self.context + 1, 1)
        for _ in range(steps):
            rows = windows[torch.randint(len(windows), (batch,), generator=order)]
            yield rows[:, :-1], rows[:, 1:]

    def bits(self, model, batch=32, most=40_000):
        """Bits per character on the held-out text, in windows side by side."""
        windows = self.held_out[:most].unfold(0, self.context + 1, self.context)
        with torch.no_grad():
            losses = [model(rows[:, :-1], rows[:, 1:]).float() * len(rows) for rows in windows.split(batch)]
        return (torch.stack(losses).sum() / len(windows) / math.log(2)).item()


def fit(arm, seed, text, steps, batch, progress):
    """(model, optimizer, scaler, milliseconds of each step) after the last step."""
    torch.manual_seed(seed)
    model = GPT(text.vocabulary, context=text.context)
    mixed = arm == "mixed"
    if mixed:
        hs.cast_model(model)
    opt = hs.optim.AdamW(model.named_parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0)
    scaler = hs.GradScaler(enabled=mixed)
    warm_up = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, (step + 1) / 50) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))))
    times = []
    for tokens, targets in text.batches(seed, batch, steps):
        start = time.perf_counter()
        opt.zero_grad()
        with hs.autocast("cpu", enabled=mixed):
            loss = model(tokens, targets)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        times.append(1e3 * (time.perf_counter() - start))
        warm_up.step()
        progress()
    return model, opt, scaler, times


def train(arm, seed, text, steps, batch, progress):
    mixed = arm == "mixed"
    model, _, scaler, times = fit(arm, seed, text, steps, batch, progress)
    with hs.autocast("cpu", enabled=mixed):
        bits = text.bits(model)
    return {"bits": bits, "step_ms": statistics.median(times), "skipped": scaler.stats().steps_skipped if mixed else 0}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--text")
    parser.add_argument("--out", default="out")
    options = parser.parse_args()
    out = Path(options.out)
    text = Text(load_text(Path(options.text) if options.text else out / "pydoc_topics.txt"), options.context)
    from train_digits import Progress

    progress = Progress(2 * options.seeds * options.steps)
    runs = {arm: [] for arm in ("fp32", "mixed")}
    for seed in range(options.seeds):
        for arm, results in runs.items():
            results.append(train(arm, seed, text, options.steps, options.batch, progress))
    print(f"\n{'arm':6} {'bits per character':>20} {'ms per step':>12} {'skipped':>8}")
    for arm, results in runs.items():
        bits = [r["bits"] for r in results]
        print(f"{arm:6} {statistics.mean(bits):20.4f} {statistics.median(r['step_ms'] for r in results):12.1f} {sum(r['skipped'] for r in results):8}")
    differences = [m["bits"] - f["bits"] for m, f in zip(runs["mixed"], runs["fp32"])]
    deviation = statistics.stdev(differences) if len(differences) > 1 else 0.0
    print(f"mixed - fp32, paired: {statistics.mean(differences):+.4f} bits (standard deviation {deviation:.4f}, {options.seeds} seeds)")
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpt.json").write_text(json.dumps({"arms": runs, "difference": differences, "steps": options.steps, "versions": {"halfstep": hs.__version__, "torch": torch.__version__}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
