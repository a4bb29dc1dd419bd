import os
import random
import sys
import zlib
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
try:
    import halfstep  # noqa: F401  an installed package, or the source tree on PYTHONPATH
except ModuleNotFoundError:
    sys.path.insert(0, str(ROOT / "python"))

# Another number gives every test other random data: a bound that fails under some of them is too tight.
SEED = int(os.environ.get("HALFSTEP_TEST_SEED", 0))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Each test draws its own random numbers, the same ones whatever runs before it. A hook, so that fixtures of
    a module draw them too."""
    seed = zlib.crc32(f"{SEED} {item.nodeid}".encode())
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
