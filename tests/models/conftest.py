"""Empty memory is NaN in these tests, so that a result which reads what nobody wrote cannot look right."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kin return NaN (the largest integer for integers)."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def same_threads():
    """A test may change the number of threads; the next one starts from the same."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
