import pytest
import torch


@pytest.fixture
def one_thread():
    """Tensors of a few kB gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
