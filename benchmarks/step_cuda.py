"""The AMP step on a GPU: finite check + global-norm clip + AdamW + FP16 weights, ours beside the peers in one process.

    python benchmarks/step_cuda.py [--total 200000000] [--out benchmarks/results/<device>.json]

Times are CUDA events around the step (kernel time) and the wall clock around a burst of steps (end to end), medians, the arms
interleaved. `share` is model bytes (28 a parameter: 2 of the statistics, 26 of the step) per second over a device copy
measured in the same run. Peers: torch.amp.GradScaler.unscale_ + clip_grad_norm_ + AdamW(fused=True) on FP32 + an FP16 copy;
apex FusedAdam(capturable, master_weights) with FP16 parameters where apex is installed.
"""

import argparse
import statistics
import time

import torch

import halfstep as hs
from common import write


def events_ms(step, repeats):
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(b.elapsed_time(e) for b, e in pairs)


def host_ms(step, repeats):
    """Wall time of the Python call while the device is kept behind: what the host pays for a step."""
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
    return statistics.median(times)


def copy_bytes_per_ms():
    x = torch.empty(256 * 2**20, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.numel() * 4 / events_ms(lambda: y.copy_(x), 20)


def ours(shapes):
    params = [torch.nn.Parameter(torch.randn(n, device="cuda").mul_(0.02).half()) for n in shapes]
    opt = hs.optim.AdamW(params, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.randn_like(p)
    scaler = hs.GradScaler("cuda", init_scale=1.0)
    scaler.scale(torch.ones((), device="cuda"))

    def step():
        scaler.step(opt)
        scaler.update()

    return step


def torch_chain(shapes):
    params = [torch.nn.Parameter(torch.randn(n, device="cuda").mul_(0.02)) for n in shapes]
    halves = [p.detach().half() for p in params]
    opt = torch.optim.AdamW(params, fused=True)
    for p in params:
        p.grad = torch.randn_like(p)
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0)
    scaler.scale(torch.ones((), device="cuda"))

    def step():
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(opt)
        scaler.update()
        torch._foreach_copy_(halves, [p.detach() for p in params])

    return step


def apex_chain(shapes):
    from apex.optimizers import FusedAdam

    params = [torch.nn.Parameter(torch.randn(n, device="cuda").mul_(0.02).half()) for n in shapes]
    opt = FusedAdam(params, capturable=True, master_weights=True)
    for p in params:
        p.grad = torch.randn_like(p)
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0)
    scaler.scale(torch.ones((), device="cuda"))

    def step():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(opt)
        scaler.update()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", type=int, default=200_000_000)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU")
    copy = copy_bytes_per_ms()
    arms, rows = {"halfstep": ours, "torch": torch_chain}, []
    try:
        import apex.optimizers  # noqa: F401

        arms["apex"] = apex_chain
    except ImportError:
        print("apex is not installed: its arm is left out")
    shapes = {"4 tensors": [options.total // 4] * 4, "1,000 tensors": [options.total // 1000] * 1000, "1,000 x 1,000": [1000] * 1000}
    for name, sizes in shapes.items():
        steps = {arm: make(sizes) for arm, make in arms.items()}
        kernel, host = {a: [] for a in arms}, {a: [] for a in arms}
        for _ in range(3):
            for arm, step in steps.items():
                step()
                kernel[arm].append(events_ms(step, options.repeats))
                host[arm].append(host_ms(step, options.repeats))
        row = {"tensors": name, "elements": sum(sizes), "copy_gb_s": copy / 1e6}
        for arm in arms:
            row[f"{arm}_ms"], row[f"{arm}_host_ms"] = statistics.median(kernel[arm]), statistics.median(host[arm])
        row["share_of_copy"] = 28 * sum(sizes) / row["halfstep_ms"] / copy
        rows.append(row)
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        del steps
        torch.cuda.empty_cache()
    if options.out:
        write("step_cuda", rows, options.out, torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
