"""Helpers of the tests of the loader."""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from data_helpers import ENCODER, assert_same_chunk

from minrnn.data import Chunk, ChunkLoader, CorpusSpec, ReaderSpec

LIMIT = 300  # seconds: only what hangs takes so long, on a busy machine too


def reader_spec(corpus: CorpusSpec, num_readers: int = 1, order: Any = "documents") -> ReaderSpec:
    return ReaderSpec(corpus, order, ENCODER, num_readers, lanes=2, chunk=12, window=4, seed=1)


def steps(
    spec: ReaderSpec, readers: Sequence[int], count: int, workers: int, states: Sequence[Any] | None = None
) -> list[list[Chunk]]:
    loader = ChunkLoader(spec, readers, states or [None] * len(readers), workers)
    try:
        return [[chunk for chunk in step if isinstance(chunk, Chunk)] for step in islice(loader, count)]
    finally:
        loader.close()


def assert_same_steps(some: list[list[Chunk]], others: list[list[Chunk]]) -> None:
    for one, other in zip(some, others, strict=True):
        for chunk, expected in zip(one, other, strict=True):
            assert_same_chunk(chunk, expected)


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def in_time(call: Callable[[], Any]) -> Any:
    """The result of a call that must not hang."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert outcome, "it hangs"
    return outcome[0]
