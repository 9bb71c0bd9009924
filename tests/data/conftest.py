"""Fixtures of several test files."""

import pytest
from data_helpers import open_any


@pytest.fixture
def local_hub_datasets(monkeypatch: pytest.MonkeyPatch):
    """Open folders named "hub" as datasets of the hub."""
    monkeypatch.setattr("minrnn.data.corpus.open_source", open_any)
