"""Finds and loads the compiled libraries, and says plainly what is wrong when that fails."""

import ctypes
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
cuda_error = None


def _load():
    global cuda_error
    path = PACKAGE / "lib" / "libhalfstep.so"
    if not path.exists():
        raise ImportError(f"halfstep: {path} is missing; build it with `pip install --no-build-isolation .` or `make test`")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"halfstep: cannot load {path} with torch {torch.__version__}; it must be built against this torch: {error}") from error
    from . import _C

    built = _C.build_info()["torch"]
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(f"halfstep was built against torch {built}, but torch {torch.__version__} is installed; rebuild halfstep")
    cuda = PACKAGE / "lib" / "libhalfstep_cuda.so"
    if cuda.exists() and torch.version.cuda and torch.cuda.is_available():
        try:
            torch.ops.load_library(cuda)
        except OSError as error:
            cuda_error = str(error)
    return _C


_C = _load()
H = torch.ops.halfstep


def cuda_status():
    """"ready", or why the CUDA kernels cannot be used here."""
    info = _C.build_info()
    if not info["cuda"]:
        return f"not built ({info['cuda_reason']})"
    if not torch.cuda.is_available():
        return "no device"
    if cuda_error:
        return f"not loaded ({cuda_error})"
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
