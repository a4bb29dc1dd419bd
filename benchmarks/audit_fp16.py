"""Forward and backward of the layers and functions that networks use, in FP16 and under autocast beside FP32, on the CPU.

    python benchmarks/audit_fp16.py [--part 1/4] [--only softmax,pool] [--rounds 5] [--out benchmarks/results/audit_cpu.json]

Arms, run in turn round after round: FP32; FP16 (weights and inputs); FP32 weights and inputs under FP16 autocast; and the last two
with the overrides off, which is stock torch. Each arm is timed over as many calls as take a millisecond or more. A ratio is the median
over rounds of its arm's time over FP32's in the same round. `--part k/n` runs every n-th case and leaves the others' rows as they
are; `--only` those whose name contains one of the words. Nothing is timed but the call itself and torch.autograd.grad.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import halfstep as hs
from common import device, write

CASES = {}


def case(name, build, fixed=0):
    """`build()` gives a module or function and its FP32 inputs, of which the `fixed` last ones get no gradient; integers stay integers."""
    assert name not in CASES, name
    CASES[name] = (build, fixed)


def r(*shape):
    return torch.randn(shape)


def layer(name, make, *shape):
    case(name, lambda: (make(), [r(*shape)]))


def function(name, f, *shapes, fixed=0):
    case(name, lambda: (f, [r(*s) for s in shapes]), fixed)


def index(high, *shape):
    return torch.randint(high, shape)


class First(nn.Module):
    """The first output of a module, as of a recurrent layer."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *x):
        return self.module(*x)[0]


IMAGE, ROWS = (32, 32, 28, 28), (2048, 256)
layer("Linear 256x512 to 512", lambda: nn.Linear(512, 512), 256, 512)
layer("Conv1d 16x64x256, 5 to 64", lambda: nn.Conv1d(64, 64, 5, padding=2), 16, 64, 256)
layer("Conv2d 32x32x28x28, 3x3 to 32", lambda: nn.Conv2d(32, 32, 3, padding=1), *IMAGE)
layer("Conv2d 32x32x28x28, 1x1 to 64", lambda: nn.Conv2d(32, 64, 1), *IMAGE)
layer("Conv2d depthwise 32x32x28x28, 3x3", lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32), *IMAGE)
layer("Conv3d 4x16x8x16x16, 3x3x3 to 16", lambda: nn.Conv3d(16, 16, 3, padding=1), 4, 16, 8, 16, 16)
layer("ConvTranspose1d 16x64x128, 4 to 32, stride 2", lambda: nn.ConvTranspose1d(64, 32, 4, 2, 1), 16, 64, 128)
layer("ConvTranspose2d 32x32x14x14, 4x4 to 16, stride 2", lambda: nn.ConvTranspose2d(32, 16, 4, 2, 1), 32, 32, 14, 14)
layer("ConvTranspose3d 4x16x4x8x8, 4 to 8, stride 2", lambda: nn.ConvTranspose3d(16, 8, 4, 2, 1), 4, 16, 4, 8, 8)
layer("RNN 32x50x128", lambda: First(nn.RNN(128, 128, batch_first=True)), 32, 50, 128)
layer("LSTM 32x50x128", lambda: First(nn.LSTM(128, 128, batch_first=True)), 32, 50, 128)
layer("LSTM two layers, both ways 32x50x64", lambda: First(nn.LSTM(64, 64, 2, batch_first=True, bidirectional=True)), 32, 50, 64)
layer("GRU 32x50x128", lambda: First(nn.GRU(128, 128, batch_first=True)), 32, 50, 128)
layer("LSTMCell 64x256", lambda: First(nn.LSTMCell(256, 256)), 64, 256)
layer("GRUCell 64x256", lambda: nn.GRUCell(256, 256), 64, 256)
layer("max_pool1d 32x64x512, 2", lambda: nn.MaxPool1d(2), 32, 64, 512)
layer("max_pool2d 32x32x28x28, 2", lambda: nn.MaxPool2d(2), *IMAGE)
layer("max_pool2d 32x32x28x28, 3, stride 2", lambda: nn.MaxPool2d(3, 2, 1), *IMAGE)
layer("max_pool3d 4x16x8x16x16, 2", lambda: nn.MaxPool3d(2), 4, 16, 8, 16, 16)
layer("avg_pool1d 32x64x512, 2", lambda: nn.AvgPool1d(2), 32, 64, 512)
layer("avg_pool2d 32x32x28x28, 2", lambda: nn.AvgPool2d(2), *IMAGE)
layer("avg_pool3d 4x16x8x16x16, 2", lambda: nn.AvgPool3d(2), 4, 16, 8, 16, 16)
layer("adaptive_avg_pool2d 32x32x28x28 to 1", lambda: nn.AdaptiveAvgPool2d(1), *IMAGE)
layer("adaptive_avg_pool2d 32x32x28x28 to 7", lambda: nn.AdaptiveAvgPool2d(7), *IMAGE)
layer("adaptive_max_pool2d 32x32x28x28 to 7", lambda: nn.AdaptiveMaxPool2d(7), *IMAGE)
case("Embedding 32x128 of 8192x256", lambda: (nn.Embedding(8192, 256), [index(8192, 32, 128)]))
case("EmbeddingBag sum 256x32 of 8192x128", lambda: (nn.EmbeddingBag(8192, 128, mode="sum"), [index(8192, 256, 32)]))
case("EmbeddingBag mean 256x32 of 8192x128", lambda: (nn.EmbeddingBag(8192, 128), [index(8192, 256, 32)]))
layer("BatchNorm1d 2048x256", lambda: nn.BatchNorm1d(256), *ROWS)
layer("BatchNorm2d 32x32x28x28", lambda: nn.BatchNorm2d(32), *IMAGE)
layer("BatchNorm2d 32x32x28x28, evaluation", lambda: nn.BatchNorm2d(32).eval(), *IMAGE)
case("BatchNorm2d 32x32x28x28, channels_last", lambda: (nn.BatchNorm2d(32), [r(*IMAGE).contiguous(memory_format=torch.channels_last)]))
layer("BatchNorm3d 4x16x8x16x16", lambda: nn.BatchNorm3d(16), 4, 16, 8, 16, 16)
layer("GroupNorm 32x32x28x28 in 8", lambda: nn.GroupNorm(8, 32), *IMAGE)
layer("InstanceNorm2d 32x32x28x28", lambda: nn.InstanceNorm2d(32, affine=True), *IMAGE)
layer("LayerNorm 2048x256", lambda: nn.LayerNorm(256), *ROWS)
layer("RMSNorm 2048x256", lambda: nn.RMSNorm(256), *ROWS)
HEADS = [(8, 8, 128, 32)] * 3
function("attention 8x8x128x32", F.scaled_dot_product_attention, *HEADS)
function("attention 8x8x128x32, causal", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *HEADS)
case("attention 8x8x128x32, bool mask", lambda: (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), [r(*HEADS[0]), r(*HEADS[0]), r(*HEADS[0]), torch.rand(128, 128) > 0.2]))
case("attention 8x8x128x32, additive mask", lambda: (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), [r(*HEADS[0]), r(*HEADS[0]), r(*HEADS[0]), r(128, 128)]), fixed=1)


class Attention(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.attention = nn.MultiheadAttention(256, 8, batch_first=True)
        self.register_buffer("mask", torch.ones(128, 128).tril() == 0 if causal else None)

    def forward(self, x):
        return self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]


layer("MultiheadAttention 8x128x256", lambda: Attention(False), 8, 128, 256)
layer("MultiheadAttention 8x128x256, causal", lambda: Attention(True), 8, 128, 256)
layer("TransformerEncoderLayer 8x128x256", lambda: nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True), 8, 128, 256)
layer("interpolate nearest 16x32x14x14, 2", lambda: nn.Upsample(scale_factor=2), 16, 32, 14, 14)
layer("interpolate bilinear 16x32x14x14, 2", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), 16, 32, 14, 14)
layer("interpolate bicubic 16x32x14x14, 2", lambda: nn.Upsample(scale_factor=2, mode="bicubic"), 16, 32, 14, 14)
layer("interpolate linear 16x32x256, 2", lambda: nn.Upsample(scale_factor=2, mode="linear"), 16, 32, 256)
layer("interpolate trilinear 4x16x4x8x8, 2", lambda: nn.Upsample(scale_factor=2, mode="trilinear"), 4, 16, 4, 8, 8)
function("softmax 2048x256", lambda x: x.softmax(-1), ROWS)
function("softmax 32x32x28x28 over channels", lambda x: x.softmax(1), IMAGE)
function("log_softmax 2048x256", lambda x: x.log_softmax(-1), ROWS)
function("log_softmax 256x8192", lambda x: x.log_softmax(-1), (256, 8192))
function("logsumexp 2048x256", lambda x: x.logsumexp(-1), ROWS)
case("cross_entropy 2048x256", lambda: (F.cross_entropy, [r(*ROWS), index(256, 2048)]))
case("cross_entropy 256x8192", lambda: (F.cross_entropy, [r(256, 8192), index(8192, 256)]))
case("cross_entropy 8x16x64x64, pixels", lambda: (F.cross_entropy, [r(8, 16, 64, 64), index(16, 8, 64, 64)]))
function("mse_loss 2048x256", F.mse_loss, ROWS, ROWS, fixed=1)
function("l1_loss 2048x256", F.l1_loss, ROWS, ROWS, fixed=1)
function("smooth_l1_loss 2048x256", F.smooth_l1_loss, ROWS, ROWS, fixed=1)
function("huber_loss 2048x256", F.huber_loss, ROWS, ROWS, fixed=1)
case("bce_with_logits 2048x256", lambda: (F.binary_cross_entropy_with_logits, [r(*ROWS), index(2, *ROWS).float()]), fixed=1)
case("kl_div 2048x256", lambda: (lambda x, t: F.kl_div(x, t, reduction="batchmean"), [r(*ROWS), r(*ROWS).softmax(-1)]), fixed=1)
for f in ("relu", "gelu", "silu", "sigmoid", "tanh", "leaky_relu", "elu", "softplus", "hardswish", "mish"):
    function(f"{f} 2048x256", getattr(F, f, None) or getattr(torch, f), ROWS)
function("gelu tanh 2048x256", lambda x: F.gelu(x, approximate="tanh"), ROWS)
function("glu 2048x256", F.glu, ROWS)
layer("PReLU 32x32x28x28", lambda: nn.PReLU(32), *IMAGE)
function("dropout 2048x256", F.dropout, ROWS)
for f in ("add", "mul", "div", "sub", "maximum"):
    function(f"{f} 2048x256", getattr(torch, f), ROWS, ROWS)
function("add 2048x256 and 256", torch.add, ROWS, (256,))
for f in ("exp", "abs", "square", "neg"):
    function(f"{f} 2048x256", getattr(torch, f), ROWS)
function("log, sqrt, rsqrt 2048x256", lambda x: x.log() + x.sqrt() + x.rsqrt(), ROWS)
function("pow 2048x256", lambda x: x.pow(3), ROWS)
function("cat 2 of 2048x256", lambda a, b: torch.cat([a, b], 1), ROWS, ROWS)
function("stack 2 of 2048x256", lambda a, b: torch.stack([a, b], 1), ROWS, ROWS)
case("index_select 2048x256", lambda: (lambda x, i: x.index_select(0, i), [r(*ROWS), index(2048, 2048)]))
case("indexing 2048x256", lambda: (lambda x, i: x[i], [r(*ROWS), index(2048, 2048)]))
case("gather 2048x256", lambda: (lambda x, i: x.gather(1, i), [r(*ROWS), index(256, *ROWS)]))
case("scatter_add 2048x256", lambda: (lambda x, i, s: x.scatter_add(1, i, s), [r(*ROWS), index(256, *ROWS), r(*ROWS)]))
case("scatter_add of rows 2048x256", lambda: (lambda x, i, s: x.scatter_add(0, i[:, None].expand(s.shape), s), [r(512, 256), index(512, 2048), r(*ROWS)]))
case("index_add 2048x256", lambda: (lambda x, i, s: x.index_add(0, i, s), [r(512, 256), index(512, 2048), r(*ROWS)]))
function("cumsum 2048x256", lambda x: x.cumsum(-1), ROWS)
function("sort 2048x256", lambda x: x.sort(-1).values, ROWS)
function("topk 2048x256, 5", lambda x: x.topk(5, -1).values, ROWS)
function("max over rows 2048x256", lambda x: x.max(-1).values, ROWS)
function("amax 2048x256", lambda x: x.amax(-1), ROWS)
for f in ("sum", "mean"):
    function(f"{f} 2048x256", getattr(torch, f), ROWS)
    function(f"{f} over rows 2048x256", lambda x, f=f: getattr(x, f)(-1), ROWS)
    function(f"{f} over columns 2048x256", lambda x, f=f: getattr(x, f)(0), ROWS)
    function(f"{f} over pixels 32x32x28x28", lambda x, f=f: getattr(x, f)((2, 3)), IMAGE)
function("var over rows 2048x256", lambda x: x.var(-1), ROWS)
function("var over columns 2048x256", lambda x: x.var(0), ROWS)
function("norm 2048x256", lambda x: torch.linalg.vector_norm(x), ROWS)
function("norm over rows 2048x256", lambda x: x.norm(dim=-1), ROWS)
function("normalize 2048x256", F.normalize, ROWS)
function("cosine_similarity 2048x256", F.cosine_similarity, ROWS, ROWS)
function("einsum bij,bjk 16x128x64x128", lambda a, b: torch.einsum("bij,bjk->bik", a, b), (16, 128, 64), (16, 64, 128))
function("bmm 16x128x64x128", torch.bmm, (16, 128, 64), (16, 64, 128))
function("matmul 256x512x512", torch.matmul, (256, 512), (512, 512))
function("addmm 256x512x512", torch.addmm, (512,), (256, 512), (512, 512))
function("outer 512x512", torch.outer, (512,), (512,))
function("mv 512x512", torch.mv, (512, 512), (512,))
function("clamp 2048x256", lambda x: x.clamp(-1, 1), ROWS)
case("where 2048x256", lambda: (lambda c, a, b: torch.where(c, a, b), [torch.rand(ROWS) > 0.5, r(*ROWS), r(*ROWS)]))
case("masked_fill 2048x256", lambda: (lambda x, m: x.masked_fill(m, -1.0), [r(*ROWS), torch.rand(ROWS) > 0.5]))
function("tril 16x256x256", lambda x: x.tril(), (16, 256, 256))
function("pad zeros 32x32x28x28, 1", lambda x: F.pad(x, (1, 1, 1, 1)), IMAGE)
function("pad reflect 32x32x28x28, 1", lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), IMAGE)
function("pad replicate 32x32x28x28, 1", lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), IMAGE)
function("roll 2048x256", lambda x: x.roll(3, -1), ROWS)
function("flip 2048x256", lambda x: x.flip(-1), ROWS)
function("transposed copy 2048x256", lambda x: x.t().contiguous(), ROWS)
function("pixel_shuffle 32x32x28x28, 2", lambda x: F.pixel_shuffle(x, 2), IMAGE)
function("unfold 8x16x28x28, 3x3", lambda x: F.unfold(x, 3), (8, 16, 28, 28))
function("fold to 8x16x28x28, 3x3", lambda x: F.fold(x, 28, 3), (8, 144, 676))
case("grid_sample 16x16x28x28", lambda: (lambda x, g: F.grid_sample(x, g, align_corners=False), [r(16, 16, 28, 28), torch.rand(16, 28, 28, 2) * 2 - 1]))
function("cdist 4x256x64", lambda a, b: torch.cdist(a, b), (4, 256, 64), (4, 256, 64))

ARMS = {"fp32": (torch.float32, False, True), "fp16": (torch.float16, False, True), "autocast": (torch.float32, True, True),
        "stock_fp16": (torch.float16, False, False), "stock_autocast": (torch.float32, True, False)}


class Arm:
    """One case in one dtype: run() gives the seconds of a forward and of a backward."""

    def __init__(self, name, dtype, autocast, overrides):
        torch.manual_seed(0)
        self.autocast, self.overrides, self.calls = autocast, overrides, 1
        build, fixed = CASES[name]
        self.f, inputs = build()
        params = []
        if isinstance(self.f, nn.Module):
            self.f.to(dtype)
            params = [p for p in self.f.parameters() if p.requires_grad]
        self.inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
        for t in self.inputs[:len(inputs) - fixed]:
            t.requires_grad_(t.is_floating_point())
        self.wanted = [t for t in self.inputs if t.requires_grad] + params
        with hs_overrides(overrides), torch.autocast("cpu", torch.float16, enabled=autocast):
            self.grad = torch.randn_like(self.f(*self.inputs))

    def run(self):
        forward = backward = 0
        with hs_overrides(self.overrides):
            for _ in range(self.calls):
                start = time.perf_counter()
                with torch.autocast("cpu", torch.float16, enabled=self.autocast):
                    y = self.f(*self.inputs)
                middle = time.perf_counter()
                torch.autograd.grad(y, self.wanted, self.grad)
                forward, backward = forward + middle - start, backward + time.perf_counter() - middle
        return forward / self.calls, backward / self.calls


class hs_overrides:
    def __init__(self, on):
        self.on = on

    def __enter__(self):
        hs.set_overrides(self.on)

    def __exit__(self, *_):
        hs.set_overrides(True)


def measure(name, rounds):
    """A row, or None where FP16 is refused by torch and by us."""
    arms, row = {}, {"case": name}
    for key, settings in ARMS.items():
        try:
            arms[key] = Arm(name, *settings)
            first = sum(arms[key].run())
            arms[key].calls = max(1, min(20, round(1e-3 / first)))
        except RuntimeError as error:
            arms.pop(key, None)
            row[key + "_error"] = str(error).splitlines()[0]
    times = {key: [] for key in arms}
    slow = {key for key, arm in arms.items() if sum(arm.run()) > 0.2}  # once warm
    for i in range(rounds):
        for key, arm in arms.items():
            if key not in slow or i == 0:
                times[key].append(arm.run())
    for key in arms:
        pairs = list(zip(times[key], times["fp32"]))
        row[key + "_forward_ms"], row[key + "_backward_ms"] = (1e3 * statistics.median(t[i] for t in times[key]) for i in range(2))
        row[key + "_ratio"] = statistics.median(sum(a) / sum(b) for a, b in pairs)
        row[key + "_forward_ratio"], row[key + "_backward_ratio"] = (statistics.median(a[i] / b[i] for a, b in pairs) for i in range(2))
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    k, n = map(int, args.part.split("/"))
    names = [name for i, name in enumerate(CASES) if i % n == k - 1 and any(word in name for word in args.only.split(","))]
    print(device())
    rows = {}
    out = Path(args.out)
    if args.out and out.exists():
        rows = {row["case"]: row for row in json.loads(out.read_text()).get("audit", {}).get("rows", []) if row["case"] in CASES}
    for name in names:
        row = rows[name] = measure(name, args.rounds)
        show = lambda key: f"{row[key]:7.2f}" if key in row else "      –"
        print(f"{name:52s} fp32 {row['fp32_forward_ms']:7.3f} + {row['fp32_backward_ms']:7.3f} ms  fp16 x {show('fp16_ratio')} ({show('fp16_forward_ratio')} {show('fp16_backward_ratio')})"
              f"  stock {show('stock_fp16_ratio')} ({show('stock_fp16_forward_ratio')} {show('stock_fp16_backward_ratio')})  autocast {show('autocast_ratio')}  stock {show('stock_autocast_ratio')}"
              + "".join(f"  {key}: {value}" for key, value in row.items() if key.endswith("error")), flush=True)
    if args.out:
        write("audit", sorted(rows.values(), key=lambda row: -row.get("fp16_ratio", 0)), args.out)


if __name__ == "__main__":
    main()
