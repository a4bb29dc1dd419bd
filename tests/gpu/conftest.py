import os
from pathlib import Path

import pytest
import torch

# HALFSTEP_TEST_DEVICE=cpu runs the very same tests on the CPU, which shows that the tests themselves are right.
DEVICE = os.environ.get("HALFSTEP_TEST_DEVICE", "cuda")


def pytest_collection_modifyitems(items):
    missing = DEVICE == "cuda" and not torch.cuda.is_available()
    for item in items:
        if Path(item.fspath).parent != Path(__file__).parent:
            continue
        item.add_marker(pytest.mark.cuda)
        if missing:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        elif DEVICE != "cuda" and item.get_closest_marker("needs_gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device():
    return torch.device(DEVICE)
