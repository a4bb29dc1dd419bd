"""Finds and loads the compiled libraries, and says plainly what is wrong when that fails."""

import ctypes
from array import array
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent


def _minor(version):
    return version.split(".")[:2]


def _load():
    path, version_file = PACKAGE / "lib" / "libhalfstep.so", PACKAGE / "lib" / "torch_version"
    rebuild = "pip install --no-build-isolation ."
    if not path.exists():
        raise ImportError(f"halfstep: {path} is missing; build it: {rebuild}")
    # Asked before anything is loaded: under another torch a library may fail to load in many ways, or load and crash later.
    built = version_file.read_text().strip() if version_file.exists() else "unknown"
    if _minor(built) != _minor(torch.__version__):
        raise ImportError(f"halfstep was built against torch {built}, but torch {torch.__version__} is installed; rebuild it: {rebuild}")
    try:
        torch.ops.load_library(path)
        from . import _C
    except (OSError, ImportError) as error:
        raise ImportError(f"halfstep: cannot load {path} with torch {torch.__version__}: {error}; rebuild it: {rebuild}") from error
    return _C


_C = _load()
H = torch.ops.halfstep


def fence(tensors):
    """Before an op writes `tensors`: in a graph that torch.compile makes, whatever was computed of them is read first."""
    if torch.compiler.is_compiling():
        H.fence_(tensors)


def to_device(tensor, device, dtype=None):
    """The tensor there. Nothing waits, but for what comes to the CPU: its ops would read a copy that is still on its way."""
    return tensor.to(device=device, dtype=dtype or tensor.dtype, non_blocking=torch.device(device).type != "cpu")


TensorList = _C.TensorList


def step_op(name):
    """torch.ops.halfstep.<name>; eager calls convert a list of a thousand tensors in a tenth of the time."""
    eager, traced = _C.Operator(name), getattr(H, name)
    return lambda *args, **numbers: (traced if torch.compiler.is_compiling() else eager)(*args, **numbers)


_grad_stats = _C.Operator("grad_stats")


def grad_stats(grads, table=()):
    """H.grad_stats; in a graph that torch.compile makes, the same without the table."""
    return H.grad_stats_of(grads) if torch.compiler.is_compiling() else _grad_stats(grads, table)


def versions(tensors):
    """Version counters of a list of tensors."""
    return array("q", _C.versions(tensors))


def pointers(tensors):
    """Addresses of a list of tensors."""
    return array("q", _C.pointers(tensors))


def cuda_status():
    """"ready", or why the CUDA kernels cannot be used here. libhalfstep.so loads them where torch has CUDA."""
    info = _C.build_info()
    if not info["cuda"]:
        return f"not built ({info['cuda_reason']})"
    status = _C.cuda_status()
    if status != "ready":
        return status
    major, minor = torch.cuda.get_device_capability()
    built = cuda_architectures()
    # A card runs code of its own major version and no later minor one; PTX of the newest serves later cards.
    if not any(a // 10 == major and a % 10 <= minor for a in built) and max(built) > major * 10 + minor:
        return f"sm_{major}{minor} not in this build ({', '.join(map(str, built))})"
    return "ready"


def cuda_architectures():
    """Compute capabilities the CUDA library was compiled for, as [75, 80, 90]; [] without it."""
    path = PACKAGE / "lib" / "libhalfstep_cuda.so"
    if not path.exists():
        return []
    text = ctypes.CDLL(str(path)).halfstep_cuda_architectures
    text.restype = ctypes.c_char_p
    return [int(a) // 10 for a in text().decode().split(",")]
