"""Forward + backward of convolution, linear, matmul, bmm and attention in FP16 and BF16 beside FP32, overrides on and off (stock).

    python benchmarks/conv_linear.py [--repeats 15] [--only linear,plain] [--out benchmarks/results/cpu.json]

One child process for each environment: the CPU as it is, its FP16 unit hidden, its BF16 unit hidden, AVX2. In a child the arms FP32,
FP16 and BF16 are run in turn, round after round; a ratio is the median over rounds of its arm's time over FP32's in the same round.
Stock arms follow, a few rounds only, since one of them may take seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import halfstep as hs
from common import write

ENVIRONMENTS = {
    "as it is": {},
    "FP16 unit hidden": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "both units hidden": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
ATTENTION = [(8, 8, 256, 64)] * 3
CASES = {
    "conv plain 64x32x8x8, 3x3 to 64": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [(64, 32, 8, 8), (64, 32, 3, 3), (64,)]),
    "conv wide 16x256x8x8, 3x3 to 256": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [(16, 256, 8, 8), (256, 256, 3, 3), (256,)]),
    "conv strided 32x64x16x16, 3x3 to 128": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), [(32, 64, 16, 16), (128, 64, 3, 3), (128,)]),
    "conv grouped 32x64x16x16, 3x3 to 64 in 8": (lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=8), [(32, 64, 16, 16), (64, 8, 3, 3), (64,)]),
    "linear 256x1024x1024": (F.linear, [(256, 1024), (1024, 1024), (1024,)]),
    "matmul 256x1024x1024": (torch.matmul, [(256, 1024), (1024, 1024)]),
    "bmm 16x128x64x128": (torch.bmm, [(16, 128, 64), (16, 64, 128)]),
    "attention 8x8x256x64": (F.scaled_dot_product_attention, ATTENTION),
    "attention 8x8x256x64, causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), ATTENTION),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def arm(f, shapes, dtype):
    """One forward and backward, timed in milliseconds."""
    torch.manual_seed(0)
    inputs = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    grad = torch.randn(f(*[x.detach().float() for x in inputs]).shape).to(dtype)

    def run():
        start = time.perf_counter()
        torch.autograd.grad(f(*inputs), inputs, grad)
        return 1e3 * (time.perf_counter() - start)

    return run


def measure(name, repeats):
    f, shapes = CASES[name]
    arms = {key: arm(f, shapes, dtype) for key, dtype in DTYPES.items()}
    for run in arms.values():
        run(), run()
    rounds = [{key: run() for key, run in arms.items()} for _ in range(repeats)]
    row = {"case": name, **{f"{key}_ms": statistics.median(r[key] for r in rounds) for key in arms}}
    hs.set_overrides(False)
    for key in ("fp16", "bf16"):
        row[f"{key}_ratio"] = statistics.median(r[key] / r["fp32"] for r in rounds)
        first = arms[key]()
        stock = [arms[key]() for _ in range(5 if first < 50 else 1)]
        row[f"{key}_stock_ms"] = statistics.median(stock)
    hs.set_overrides(True)
    return row


def child(only, repeats):
    for name in CASES:
        if any(name.startswith(o) or o in name.split() for o in only):
            print(json.dumps(measure(name, repeats)), flush=True)


def report(row):
    print(f"{row['environment']:18s} {row['case']:42s} FP32 {row['fp32_ms']:7.2f} ms"
          + "".join(f" | {key.upper()} {row[key + '_ms']:7.2f} ms = {row[key + '_ratio']:5.2f} x FP32, stock {row[key + '_stock_ms']:8.2f} ms" for key in ("fp16", "bf16")), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="conv,linear,matmul,bmm,attention", help="words of the case names")
    parser.add_argument("--environments", default=",".join(ENVIRONMENTS))
    parser.add_argument("--out")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.only.split(","), options.repeats)
    rows = []
    for environment in options.environments.split(","):
        command = [sys.executable, __file__, "--child", "--only", options.only, "--repeats", str(options.repeats)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENTS[environment]}) as process:
            for line in process.stdout:
                rows.append({"environment": environment, **json.loads(line)})
                report(rows[-1])
        if process.returncode:
            sys.exit(f"{environment}: the child process ended with {process.returncode}")
    if options.out:
        write("conv_linear", rows, options.out)


if __name__ == "__main__":
    main()
