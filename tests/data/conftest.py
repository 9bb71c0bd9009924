"""Fixtures of several test files."""

from pathlib import Path

import pytest
from data_helpers import open_any, some_texts, write_corpus

from minrnn.data import CorpusSpec


@pytest.fixture
def local_hub_datasets(monkeypatch: pytest.MonkeyPatch):
    """Open folders named "hub" as datasets of the hub."""
    monkeypatch.setattr("minrnn.data.document_stream.open_source", open_any)


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusSpec:
    """80 documents in two files of JSON lines."""
    return write_corpus("jsonl", tmp_path, some_texts(80), 2)
