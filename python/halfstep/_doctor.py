"""The probes of `halfstep doctor` that measure: what this machine does with 16 bits, and whether mixed precision helps on it."""

import statistics
import time
from pathlib import Path

import torch

from ._library import cuda_status

MILLION = 1 << 20


def _median(function, device, repeats=5):
    """Seconds, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cpu_units():
    """The instructions for 16-bit numbers that this CPU has, by the names of /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    flags = next((set(line.split(":", 1)[1].split()) for line in path.read_text().splitlines() if line.startswith(("flags", "Features"))), set()) if path.exists() else set()
    known = ("f16c", "avx2", "avx512f", "avx512_fp16", "avx512_bf16", "amx_tile", "amx_bf16", "amx_fp16", "fphp", "asimdhp", "bf16")
    return [name for name in known if name in flags]


def bandwidth(device="cpu", elements=32 * MILLION):
    """Bytes a second of a copy, read and write counted, over 256 MB."""
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    return 8 * elements / _median(lambda: target.copy_(source), device)


def product_rate(dtype, device="cpu", size=1024):
    """Operations a second of forward and backward through one linear layer of size x size on `size` rows, with what is loaded now."""
    if device == "cuda":
        size *= 4
    random = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, size, generator=random).to(device, dtype).requires_grad_() for _ in range(2))
    grad = torch.ones(size, size, dtype=dtype, device=device)
    return 6 * size**3 / _median(lambda: torch.autograd.grad(torch.nn.functional.linear(x, w), (x, w), grad), device, 3)


def _energy(device):
    from ._energy import Unavailable, source

    try:
        return source(device).method
    except (Unavailable, ImportError) as error:
        return f"not measured: {error}"


def verdict(rates, device):
    """The last line: yes or no, because of what was measured."""
    gain = rates["FP16"] / rates["FP32"]
    where = "on this GPU" if device == "cuda" else "on this CPU"
    bytes_saved = "16-bit weights, activations and gradients take half the memory and traffic"
    if gain >= 1.2:
        return f"mixed precision will help here: yes, because FP16 products run at {gain:.1f} times the rate of FP32 {where}, and {bytes_saved}"
    if gain >= 0.8:
        return f"mixed precision will help here: yes for memory, because {bytes_saved}; no for the time of products, which run at {gain:.1f} times the rate of FP32 {where}"
    return f"mixed precision will help here: no, because FP16 products run at {gain:.1f} times the rate of FP32 {where}; FP32 weights with 16-bit checkpoints are the better choice"


def probes():
    """Lines of (what, finding)."""
    device = "cuda" if cuda_status() == "ready" else "cpu"
    lines = [("16 bits", ", ".join(cpu_units()) or "no instructions for 16-bit numbers found")]
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        lines.append(("GPU", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, tensor cores for FP16: {'yes' if major >= 7 else 'no'}, for BF16: {'yes' if major >= 8 else 'no'}"))
    lines.append(("bandwidth", f"{bandwidth(device) / 1e9:.1f} GB/s (copy of 128 MB)"))
    rates = {name: product_rate(dtype, device) for name, dtype in (("FP32", torch.float32), ("FP16", torch.float16), ("BF16", torch.bfloat16))}
    lines.append(("products", ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items()) + " GFLOP/s (linear layer, forward and backward)"))
    lines.append(("energy", _energy(device)))
    return lines + [("verdict", verdict(rates, device))]
