"""Uninitialised memory is NaN in these tests, so that a result that depends on it is NaN too."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and similar functions return NaN (the largest integer for integers)."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def restored_threads():
    """Restore the number of threads, which a test may change."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
