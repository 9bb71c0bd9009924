"""Prefetches chunks for the training loop, in worker processes or in a thread.

Each worker serves whole readers, so the chunks of a reader come in order whatever the number of workers. The
loop always gets one chunk of each of its readers, in their order. torch's DataLoader is not used for two
reasons: it forks or re-imports the training program, and if a SIGTERM to the process group ends one of its
workers, it raises from a signal handler, perhaps in the middle of a save.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from .continuous import ContinuousReader
from .lra import LabelledBatch, LabelledData
from .mixture import MixtureReader, MixtureSpec
from .reader import Chunk, DocumentReader, ReaderSpec, WindowReader, corpus_tokens
from .synthetic import TaskReader
from .worker_process import Job, WorkerProcess, next_ready

Batch = Chunk | LabelledBatch


class Reader(Protocol):
    """Yields one chunk after another."""

    def next_chunk(self) -> Batch: ...


def open_readers(
    spec: ReaderSpec, readers: Sequence[int], states: Sequence[dict[str, Any] | None]
) -> Sequence[Reader]:
    """Open these readers, each at the position in its state (None: at the beginning)."""
    pairs = list(zip(readers, states, strict=True))
    if isinstance(spec.task, LabelledData):
        shape = (spec.num_readers, spec.lanes, spec.seed)
        return [spec.task.open_reader(reader, *shape, state) for reader, state in pairs]
    if spec.task is not None:
        shape = (spec.lanes, spec.chunk, spec.seed)
        return [TaskReader(spec.task, reader, *shape, state) for reader, state in pairs]
    if isinstance(spec.corpus, MixtureSpec):
        return [MixtureReader(spec, reader, state) for reader, state in pairs]
    if spec.order == "documents":
        return [DocumentReader(spec, reader, state) for reader, state in pairs]
    if spec.order == "continuous":
        return [ContinuousReader(spec, reader, state) for reader, state in pairs]
    tokens = corpus_tokens(spec.corpus, "train", spec.encoder)
    return [WindowReader(tokens, reader, spec.lanes, spec.chunk, spec.seed, state) for reader, state in pairs]


class DirectChunks:
    """Reads in this process, endlessly, one reader after another.

    `take` reads in a thread, so the caller can do something else while it waits for a chunk.
    """

    def __init__(self, spec: ReaderSpec, readers: Sequence[int], states: Sequence[dict[str, Any] | None]):
        self._readers = open_readers(spec, readers, states)
        self._chunks = iter(self)
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Batch | Exception] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._has_request = False

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for reader in self._readers:
                yield reader.next_chunk()

    def take(self, timeout: float | None) -> Batch | None:
        """The next chunk, or None if it is not ready in time; then the next call waits for the same chunk."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="reader", daemon=True)
            self._thread.start()
        if not self._has_request:
            self._requests.put(True)
            self._has_request = True
        chunk = next_ready(self._ready, timeout)
        self._has_request = chunk is None
        return chunk

    def _serve(self) -> None:
        try:
            while self._requests.get():
                self._ready.put(next(self._chunks))
        except Exception as error:  # any error is passed on to the loop
            self._ready.put(error)

    def close(self) -> None:
        """End the thread after its current read."""
        self._requests.put(False)


ADVICE = "use fewer data.workers, a smaller data.shuffle_window, or smaller documents or row groups"


class WorkerChunks(WorkerProcess):
    """Reads in another process, endlessly, one reader after another."""

    def __init__(self, spec: ReaderSpec, readers: Sequence[int], states: Sequence[dict[str, Any] | None]):
        job = Job(DirectChunks, (spec, readers, states), spec.corpus.corpus, "data.workers", ADVICE)
        super().__init__(job, lambda chunk: chunk.documents[-1][-1])


def _num_workers(max_workers: int, num_readers: int) -> int:
    """The largest number of workers, up to `max_workers`, that divides the number of readers."""
    return max(n for n in range(1, min(max_workers, num_readers) + 1) if num_readers % n == 0)


class ChunkLoader:
    """Iterates over steps: each item is one chunk of each of this process's readers, in their order.

    Args:
        spec: what all readers share.
        readers: this process's readers.
        states: for each reader, the state to resume from, or None.
        workers: number of worker processes (rounded down to a divisor of the number of readers); 0 reads in
            this process.
    """

    def __init__(
        self, spec: ReaderSpec, readers: Sequence[int], states: Sequence[dict[str, Any] | None], workers: int
    ):
        num_sources = _num_workers(workers, len(readers)) if workers else 1
        source = WorkerChunks if workers else DirectChunks
        self._num_readers = len(readers)
        self._taken: list[Batch] = []
        self._sources = [
            source(spec, readers[i::num_sources], states[i::num_sources]) for i in range(num_sources)
        ]

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
        while len(self._taken) < self._num_readers:
            source = self._sources[len(self._taken) % len(self._sources)]
            chunk = source.take(None if end is None else max(end - time.monotonic(), 0.0))
            if chunk is None:
                return None
            self._taken.append(chunk)
        chunks, self._taken = self._taken, []
        return chunks

    def close(self) -> None:
        """Stop the workers."""
        for source in self._sources:
            source.close()
