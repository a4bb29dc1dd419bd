"""One optimizer step (finite check, clip, AdamW, weights written) over 40 M parameters in each mode, beside peers.

    python benchmarks/modes.py [--out benchmarks/results/cpu.json]

All arms are stepped in turn, so that every round sees the same machine; `relative` is the median over the rounds of the
arm's time over that of FP16 with split16. `held`: bytes a parameter of the distinct storages of parameters, gradients and
state; `resident`: growth of the resident set in a process of its own. `moved`: model bytes of check, clip and update, counted by
the emulation tests for the modes they run; `share` is moved bytes a second over those of a copy of 400 MB in the same run.
Peers take part where they can be imported: DeepSpeedCPUAdam, bitsandbytes and torchao 8-bit, each after GradScaler.unscale_
and clip_grad_norm_ as torch's own.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys

import torch

import halfstep as hs
from common import median_ms, write

TOTAL, TENSORS, ROUNDS = 40_960_000, 4, 5
OURS = {
    "FP16, split16": (torch.float16, {}),
    "FP16, split16, BF16 states": (torch.float16, {"states": "bf16"}),
    "FP16, split16, int8 states": (torch.float16, {"states": "int8"}),
    "FP16, split8, int8 states": (torch.float16, {"master": "split8", "states": "int8"}),
    "FP16, FP32 masters": (torch.float16, {"master": "fp32"}),
    "FP16, FP64 masters": (torch.float16, {"master": "fp64"}),
    "FP16, no master": (torch.float16, {"master": "none"}),
    "BF16, split16": (torch.bfloat16, {}),
    "FP32 (autocast)": (torch.float32, {}),
    "FP64": (torch.float64, {}),
}


def peers():
    """{name: (make(params), bytes moved)} of the optimizers that can be imported; unscaling in place reads and writes 4 bytes, clipping reads 4 and 4 + 4."""
    found = {"torch: FP32, fused": (lambda params: torch.optim.AdamW(params, fused=True), 48)}
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        found["DeepSpeedCPUAdam: FP32"] = (lambda params: DeepSpeedCPUAdam(params, lr=1e-3, weight_decay=1e-2, adamw_mode=True), 48)
        found["DeepSpeedCPUAdam: FP32"][0]([torch.nn.Parameter(torch.zeros(1))])
    except Exception as error:
        found.pop("DeepSpeedCPUAdam: FP32", None)
        print(f"deepspeed takes no part: {type(error).__name__}")
    try:
        import bitsandbytes

        found["bitsandbytes: FP32, 8-bit states"] = (bitsandbytes.optim.AdamW8bit, None)
    except Exception as error:
        print(f"bitsandbytes takes no part: {type(error).__name__}")
    try:
        from torchao.optim import AdamW8bit

        found["torchao: FP32, 8-bit states"] = (AdamW8bit, None)
    except Exception as error:
        print(f"torchao takes no part: {type(error).__name__}")
    return found


def parameters(dtype):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(TOTAL // TENSORS).mul_(0.02).to(dtype)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def storages(tensor):
    inner = getattr(tensor, "__tensor_flatten__", None)
    for t in [getattr(tensor, name) for name in inner()[0]] if inner else [tensor]:
        yield t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()


def held(params, opt):
    state = [t for s in opt.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return sum(dict(s for t in (*params, *(p.grad for p in params), *state) for s in storages(t)).values()) / TOTAL


def arm(name):
    """(step, bytes held, bytes moved) of an arm."""
    if name in OURS:
        dtype, kw = OURS[name]
        params = parameters(dtype)
        opt, scaler = hs.optim.AdamW(params, max_grad_norm=1.0, **kw), hs.GradScaler("cpu", init_scale=1.0)
        moved = float(re.search(r"moves ([\d.]+) bytes", repr(opt)).group(1))

        def step():
            scaler.step(opt)
            scaler.update()
    else:
        make, moved = peers()[name]
        params = parameters(torch.float32)
        opt, scaler = make(params), torch.amp.GradScaler("cpu", init_scale=1.0)

        def step():
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(opt)
            scaler.update()

    scaler.scale(torch.ones(1))
    step()
    return step, held(params, opt), moved


def resident(name):
    """Bytes a parameter by which an arm makes this process grow."""
    size = lambda: int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read()).group(1)) * 1024
    if name not in OURS:
        peers()
    torch.ones(1000).half().sum()
    hs.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    before = size()
    kept = arm(name)
    kept[0]()
    return (size() - before) / TOTAL


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resident:
        print(json.dumps(resident(options.resident)))
        return
    names = [*OURS, *peers()]
    grown = {name: json.loads(subprocess.run([sys.executable, __file__, "--resident", name], capture_output=True, text=True, check=True).stdout.splitlines()[-1]) for name in names}
    arms = {name: arm(name) for name in names}
    source, target = torch.ones(100_000_000), torch.empty(100_000_000)
    rounds = []
    for _ in range(ROUNDS):
        copy = 8e8 / median_ms(lambda: target.copy_(source), 3, warm=1)
        rounds.append({"copy": copy, **{name: median_ms(step, 2, warm=1) for name, (step, _, _) in arms.items()}})
    first, rows = names[0], []
    for name, (_, bytes_held, moved) in arms.items():
        row = {"mode": name, "held": bytes_held, "resident": grown[name], "moved": moved, "ms": statistics.median(r[name] for r in rounds),
               "relative": statistics.median(r[name] / r[first] for r in rounds),
               "share": None if moved is None else statistics.median(moved * TOTAL / r[name] / r["copy"] for r in rounds)}
        rows.append(row)
        print("{mode:34} held {held:6.2f}  resident {resident:6.2f}  {ms:7.1f} ms  {relative:5.2f} x".format(**row),
              "" if moved is None else f" moved {moved:g}, share {row['share']:.2f}", flush=True)
    if options.out:
        write("modes", rows, options.out)


if __name__ == "__main__":
    main()
