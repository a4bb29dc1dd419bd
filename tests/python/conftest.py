from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def one_thread():
    """Tensors of a few kB gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cpp_program():
    """The path of a program of tests/cpp by its name; where the C++ tests are not built, a skip."""

    def find(name):
        build = ROOT / "python/halfstep/lib/.build"
        program = ROOT / build.read_text().split()[0] / "tests/cpp" / name if build.exists() else None
        if program is None or not program.exists():
            pytest.skip(f"tests/cpp/{name} is not built (-DHALFSTEP_TESTS=ON)")
        return program

    return find
