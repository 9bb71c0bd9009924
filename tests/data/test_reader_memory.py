"""A reader's memory does not grow with what it has read."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
from data_helpers import ENCODER

from minrnn.data import CorpusSpec, DocumentReader, ReaderSpec
from minrnn.data.sources import Document, Position


@dataclass
class Endless:
    """Documents of 1 to 60,000 characters, made when they are read."""

    num_shards: int = 1

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        text = "the cat sat on the mat and was 23. " * 2000
        for index in range(start.index, 10**9):
            generator = np.random.default_rng(index)
            yield Document(text[: generator.integers(1, 60_000)], f"document {index}", index)

    def hint(self) -> None:
        return None


@pytest.mark.slow
def test_memory_does_not_grow_with_what_was_read(monkeypatch: pytest.MonkeyPatch):
    """400 MB are read, 200 windows: what kept a tenth of it would be seen."""
    monkeypatch.setattr("minrnn.data.document_stream.open_source", lambda *_: Endless())
    spec = ReaderSpec(CorpusSpec("endless"), "documents", ENCODER, 1, 8, 2**14, window=64, seed=0)
    reader, process = DocumentReader(spec, 0), psutil.Process()

    def memory_after(num_tokens: int) -> int:
        for _ in range(num_tokens // (8 * 2**14)):
            reader.next_chunk()
        gc.collect()
        return process.memory_info().rss

    before = memory_after(40 * 2**20)
    assert memory_after(400 * 2**20) - before < 40 * 2**20
