"""The CUDA side without a GPU: what is compiled, registered, linked, and emulated."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import halfstep as hs

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(hs.__file__).parent / "lib/libhalfstep_cuda.so"
built = pytest.mark.skipif(not LIBRARY.exists(), reason="libhalfstep_cuda.so is not built")


def test_every_kernel_file_is_emulated_and_knows_no_torch():
    kernels = sorted((ROOT / "cuda").glob("*.cu"))
    assert kernels
    for kernel in kernels:
        test = ROOT / f"tests/emulation/{kernel.stem}_test.cpp"
        assert f'#include "../../cuda/{kernel.name}"' in test.read_text(), f"{kernel.name} is not emulated"
    for source in (ROOT / "cuda").iterdir():
        includes = re.findall(r'#include [<"](.*?)[">]', source.read_text())
        assert not [i for i in includes if re.match(r"(torch|ATen|c10|cub|thrust)/", i)], source.name


def test_kernels_start_through_launch_and_touch_memory_through_read_and_write():
    for source in (ROOT / "cuda").glob("*.cu"):
        text = source.read_text()
        assert "<<<" not in text and "asm" not in text and "__shared__" not in text, source.name


@built
def test_every_op_with_a_cpu_kernel_has_a_cuda_kernel():
    if not torch.version.cuda:
        pytest.skip("this torch is a CPU build")
    torch.ops.load_library(LIBRARY)
    ops = sorted({s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("halfstep::")})
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    # A composite kernel of ours (convolution) calls torch's op, on any device.
    assert [op for op in ops if has(op, "CPU") and not has(op, "CUDA") and not has(op, "CompositeExplicitAutograd")] == []
    assert hs._library.cuda_architectures()


@built
def test_nothing_in_the_cuda_library_can_wait_for_the_device():
    names = subprocess.run(["nm", "-D", "-C", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True).stdout
    imported = [line.split("U ", 1)[1] for line in names.splitlines() if "U " in line]
    assert any("cudaLaunchKernel" in name for name in imported)
    waits = re.compile(r"Synchronize|synchronize|cudaMemcpy|_local_scalar_dense|cudaMalloc|cudaFree")
    assert [name for name in imported if waits.search(name)] == []


@built
def test_the_cuda_library_exports_nothing_of_its_own():
    names = subprocess.run(["nm", "-D", "-C", "--defined-only", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert [line for line in names.splitlines() if "halfstep::" in line.split(maxsplit=2)[-1]] == []


def test_cuda_status_says_why():
    status = hs.cuda_status()
    if not torch.cuda.is_available():
        assert status == "no device" or status.startswith("not built (")
    else:
        assert status == "ready" or "not in this build" in status
