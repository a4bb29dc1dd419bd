import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
try:
    import halfstep  # noqa: F401  an installed package, or the source tree on PYTHONPATH
except ModuleNotFoundError:
    sys.path.insert(0, str(ROOT / "python"))


@pytest.fixture
def one_thread():
    """Tensors of a few kB gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
