"""Prefetches chunks for the training loop, in worker processes or in a thread.

    readers r0, r1, r2 on 2 workers           worker 0: r0, r2, r0, ...; worker 1: r1, r1, ...
    one reader r0 of documents on 3 workers   worker 0: r0; workers 1 and 2 tokenize for it (read_ahead.py)
    one reader r0 of examples on 3 workers    worker i: steps i, i + 3, ... of r0

Each worker keeps READ_AHEAD_STEPS steps' chunks of its readers ready, and so does the thread of `workers: 0`.
The loop always gets one chunk of each of its readers, in their order, and waits for all of them before the
first micro-batch. Once a step, before any computes, all processes agree that none has failed. Readers go on
reading while a step computes, so beginning with the first chunk would not raise the rate: where data is
slower than the model, a step takes the time of its data in both cases. It would only hide the wait of the
first step.

torch's DataLoader is not used for two reasons: it forks or re-imports the training program, and if a SIGTERM
to the process group ends one of its workers, it raises from a signal handler, perhaps in the middle of a
save.
"""

import collections
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from ..common.errors import UserError
from .chunk import Chunk
from .continuous import ContinuousReader
from .corpus import CorpusSpec
from .lra import LabelledBatch, LabelledData
from .mixture import MixtureReader, MixtureSpec
from .reader import DocumentReader, ReaderSpec, WindowReader, corpus_tokens
from .synthetic import StreamTaskReader, TaskReader
from .worker_process import ADVICE, Job, WorkerProcess, next_ready

Batch = Chunk | LabelledBatch
READ_AHEAD_STEPS = 4
MAX_OPENED = 8  # readers of one process that are opened at the same time


class Reader(Protocol):
    """Yields one chunk after another."""

    def next_chunk(self) -> Batch: ...


@dataclass(frozen=True)
class Share:
    """What one source of chunks reads."""

    readers: Sequence[int]
    first: int = 0
    """The first step, from the position of each reader."""
    stride: int = 1
    """Every `stride`-th step from there on; more than 1 for readers that can skip steps."""
    helpers: int = 0
    """Further processes that tokenize for the reader."""


def can_skip_steps(spec: ReaderSpec) -> bool:
    """Whether a chunk follows from the number of its step, without reading what is before it."""
    return spec.task is not None or spec.order == "windows"


def shares(spec: ReaderSpec, readers: Sequence[int], workers: int) -> list[Share]:
    """Divide readers among exactly `workers` processes. The chunks of the reader with index i come from the
    shares with that reader in turn.

    Raises:
        UserError: there are more processes than readers of order continuous.
    """
    if workers <= len(readers):
        return [Share(readers[i::workers]) for i in range(workers)]
    counts = [len(range(i, workers, len(readers))) for i in range(len(readers))]
    if spec.order == "continuous":
        message = f"{workers} workers cannot share {len(readers)} readers with data.order continuous"
        raise UserError("data.workers", f"{message}; use at most {len(readers)}")
    if not can_skip_steps(spec):
        return [Share([reader], helpers=count - 1) for reader, count in zip(readers, counts, strict=True)]
    return [
        Share([reader], first=first, stride=count)
        for reader, count in zip(readers, counts, strict=True)
        for first in range(count)
    ]


def open_readers(spec: ReaderSpec, share: Share, states: Sequence[dict[str, Any] | None]) -> Sequence[Reader]:
    """Open the readers of a share, each at the position in its state (None: at the beginning)."""
    pairs = list(zip(share.readers, states, strict=True))
    if not can_skip_steps(spec):
        with ThreadPoolExecutor(max_workers=MAX_OPENED) as pool:  # each waits for its part of the corpus
            return list(pool.map(lambda pair: _open_reader(spec, pair[0], pair[1], share.helpers), pairs))
    if isinstance(spec.task, LabelledData):
        shape = (spec.num_readers, spec.lanes, spec.seed)
        opened = [spec.task.open_reader(reader, *shape, state) for reader, state in pairs]
    elif spec.task is not None:
        shape = (spec.lanes, spec.chunk, spec.seed)
        if spec.task.is_stream:
            opened = [
                StreamTaskReader(spec.task, reader, *shape, state, spec.num_chunks) for reader, state in pairs
            ]
        else:
            opened = [TaskReader(spec.task, reader, *shape, state) for reader, state in pairs]
    else:
        assert isinstance(spec.corpus, CorpusSpec)
        tokens = corpus_tokens(spec.corpus, "train", spec.encoder)
        shape = (spec.lanes, spec.chunk, spec.seed)
        opened = [WindowReader(tokens, reader, *shape, state) for reader, state in pairs]
    for reader in opened:
        reader.skip(share.first)
    return opened


def _open_reader(spec: ReaderSpec, reader: int, state: dict[str, Any] | None, helpers: int) -> Reader:
    if spec.order == "continuous":
        return ContinuousReader(spec, reader, state)
    kind = MixtureReader if isinstance(spec.corpus, MixtureSpec) else DocumentReader
    return kind(spec, reader, state, helpers=helpers)


class DirectChunks:
    """Reads in this process, endlessly, one reader after another.

    `take` reads ahead in a thread, so the caller can do something else while it waits for a chunk.
    """

    def __init__(self, spec: ReaderSpec, share: Share, states: Sequence[dict[str, Any] | None]):
        self._readers, self._stride = open_readers(spec, share, states), share.stride
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for reader in self._readers:
                yield reader.next_chunk()
                if self._stride > 1:
                    reader.skip(self._stride - 1)  # pyright: ignore[reportAttributeAccessIssue]

    def take(self, timeout: float | None) -> Batch | None:
        """The next chunk, or None if it is not ready in time; then the next call waits for the same chunk."""
        if self._thread is None:
            for _ in range(READ_AHEAD_STEPS * len(self._readers)):
                self._requests.put(True)
            self._thread = threading.Thread(target=self._serve, name="reader", daemon=True)
            self._thread.start()
        chunk = next_ready(self._ready, timeout)
        if chunk is not None:
            self._requests.put(True)
        return chunk

    def _serve(self) -> None:
        chunks = iter(self)
        try:
            while self._requests.get() and not self._is_closed:
                self._ready.put(next(chunks))
        except Exception as error:  # any error is passed on to the loop
            self._ready.put(error)

    def close(self) -> None:
        """End the thread after its current read."""
        self._is_closed = True
        self._requests.put(False)


class WorkerChunks(WorkerProcess):
    """Reads in another process, endlessly, one reader after another."""

    def __init__(self, spec: ReaderSpec, share: Share, states: Sequence[dict[str, Any] | None]):
        job = Job(DirectChunks, (spec, share, states), spec.corpus.corpus, "data.workers", ADVICE)
        super().__init__(
            job, lambda chunk: chunk.documents[-1][-1], read_ahead=READ_AHEAD_STEPS * len(share.readers)
        )


class ChunkLoader:
    """Iterates over steps: each item is one chunk of each of this process's readers, in their order.

    Args:
        spec: what all readers share.
        readers: this process's readers.
        states: for each reader, the state to resume from, or None.
        workers: number of worker processes; 0 reads in this process.
    """

    def __init__(
        self, spec: ReaderSpec, readers: Sequence[int], states: Sequence[dict[str, Any] | None], workers: int
    ):
        of_reader = dict(zip(readers, states, strict=True))
        parts = shares(spec, readers, workers) if workers else [Share(readers)]
        source = WorkerChunks if workers else DirectChunks
        self._sources = [source(spec, part, [of_reader[reader] for reader in part.readers]) for part in parts]
        # The sources of each reader, the next one first.
        self._turns = [
            collections.deque(
                source for source, part in zip(self._sources, parts, strict=True) if reader in part.readers
            )
            for reader in readers
        ]
        self._taken: list[Batch] = []

    def __iter__(self) -> Iterator[list[Batch]]:
        while (chunks := self.take()) is not None:
            yield chunks

    def take(self, timeout: float | None = None) -> list[Batch] | None:
        """The next step's chunks, or None if some are not ready in `timeout` seconds; the next call then
        waits for the same chunks.

        Raises:
            UserError: the corpus cannot be read, or a worker has died.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while len(self._taken) < len(self._turns):
            turns = self._turns[len(self._taken)]
            chunk = turns[0].take(None if end is None else max(end - time.monotonic(), 0.0))
            if chunk is None:
                return None
            turns.rotate(-1)
            self._taken.append(chunk)
        chunks, self._taken = self._taken, []
        return chunks

    def close(self) -> None:
        """Stop the workers."""
        for source in self._sources:
            source.close()
