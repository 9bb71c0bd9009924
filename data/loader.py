"""Chunks for the training loop, prefetched in worker processes.

Each worker serves whole readers, so a reader's chunks come in order whatever the number of workers, and the loop always
gets one chunk of each of its readers, in their order. A worker is a fresh interpreter that imports only what reading needs.
torch's DataLoader would do, but for two things: it forks or re-imports the training program, and it raises from a signal
handler, in the middle of a save, when a group's SIGTERM ends a worker.
"""

import contextlib
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .corpus import CorpusSpec
from .errors import UserError
from .reader import Chunk, DocumentReader, WindowReader, joined_tokens
from .synthetic import Task, TaskReader
from .tokenizer import Encoder

CLOSE_SECONDS = 10.0  # for a killed worker to be gone


class Reader(Protocol):
    """What gives one chunk after another."""

    def next_chunk(self) -> Chunk: ...


@dataclass(frozen=True)
class ReaderSpec:
    """Everything a reader is made of; sent to the workers."""

    corpus: CorpusSpec
    order: Literal["documents", "windows"]
    encoder: Encoder
    num_readers: int
    """In the whole run."""
    lanes: int
    chunk: int
    window: int
    seed: int
    task: Task | None = None
    """A synthetic task, drawn instead of reading the corpus."""

    def open(self, readers: Sequence[int], states: Sequence[dict[str, Any] | None]) -> Sequence[Reader]:
        """These readers, each where its state says."""
        if self.task is not None:
            task, shape = self.task, (self.lanes, self.chunk, self.seed)
            return [TaskReader(task, r, *shape, state) for r, state in zip(readers, states, strict=True)]
        if self.order == "documents":
            return [
                DocumentReader(
                    self.corpus,
                    self.encoder,
                    r,
                    self.num_readers,
                    self.lanes,
                    self.chunk,
                    self.window,
                    self.seed,
                    state,
                )
                for r, state in zip(readers, states, strict=True)
            ]
        tokens = joined_tokens(self.corpus, "train", self.encoder)
        return [
            WindowReader(tokens, r, self.lanes, self.chunk, self.seed, state)
            for r, state in zip(readers, states, strict=True)
        ]


def _next_ready(
    ready: "queue.Queue[Chunk | Exception] | queue.SimpleQueue[Chunk | Exception]", timeout: float | None
) -> Chunk | None:
    """The next chunk of a queue, or None if there is none in time; an exception in its place is raised."""
    try:
        item = ready.get(timeout=timeout)
    except queue.Empty:
        return None
    if isinstance(item, Exception):
        raise item
    return item


class DirectChunks:
    """Readers in this process, in turn, for ever. `take` reads in a thread, so that whoever waits for a chunk can do something else."""

    def __init__(self, spec: ReaderSpec, readers: Sequence[int], states: Sequence[dict[str, Any] | None]):
        self._readers = spec.open(readers, states)
        self._chunks = iter(self)
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Chunk | Exception] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_asked = False

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            for reader in self._readers:
                yield reader.next_chunk()

    def take(self, timeout: float | None) -> Chunk | None:
        """The next chunk, or None if it is not there in time; the next call waits for the same one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="reader", daemon=True)
            self._thread.start()
        if not self._is_asked:
            self._wanted.put(True)
            self._is_asked = True
        chunk = _next_ready(self._ready, timeout)
        self._is_asked = chunk is None
        return chunk

    def _serve(self) -> None:
        try:
            while self._wanted.get():
                self._ready.put(next(self._chunks))
        except Exception as error:  # whatever it is, the loop must hear of it
            self._ready.put(error)

    def close(self) -> None:
        """End the thread, once it has read what it is reading."""
        self._wanted.put(False)


class WorkerChunks:
    """Readers in another process, in turn, for ever: pickled chunks over a pipe, a few of them read ahead.

    The process leads a process group of its own, so that neither Ctrl-C nor a signal to ours reaches it; it ends with this end of the pipe,
    however that came about.
    """

    READ_AHEAD = 4

    def __init__(self, spec: ReaderSpec, readers: Sequence[int], states: Sequence[dict[str, Any] | None]):
        command = [sys.executable, "-P", "-m", f"{__package__}.worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died already; whoever takes a chunk hears why
            pickle.dump((spec, readers, states), self._process.stdin)
            self._process.stdin.close()
        self._corpus = spec.corpus.corpus
        self._ready: queue.Queue[Chunk | Exception] = queue.Queue(self.READ_AHEAD)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        assert self._process.stdout is not None
        document = None
        try:
            while True:
                item = pickle.load(self._process.stdout)
                self._ready.put(item)
                if isinstance(item, Exception):
                    return
                document = item.documents[-1][-1]
        except Exception:  # whatever it was, the loop must hear of it
            place = (
                f"before its first chunk of {self._corpus}"
                if document is None
                else f"behind {document} of {self._corpus}"
            )
            self._ready.put(_death(self._process.wait(), place))

    def take(self, timeout: float | None) -> Chunk | None:
        """The next chunk, or None if it is not there in time."""
        return _next_ready(self._ready, timeout)

    def close(self) -> None:
        """Stop the process and the thread that listens to it; not for ever where the process waits for a dead disk."""
        end = time.monotonic() + CLOSE_SECONDS
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        while self._thread.is_alive() and time.monotonic() < end:  # it may wait for room
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        assert self._process.stdout is not None
        if not self._thread.is_alive():
            self._process.stdout.close()


def _death(status: int, place: str) -> UserError:
    """The error for a worker that has ended without one of its own."""
    if status >= 0:
        return UserError(("data.workers", f"a data worker ended with exit status {status}, {place}"))
    number = -status
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    problem = f"a data worker was killed by signal {number} ({name}), {place}"
    if number == signal.SIGKILL:
        problem += "; a system that runs out of memory does that: use fewer data.workers, a smaller data.shuffle_window or smaller row groups"
    return UserError(("data.workers", problem))


def _num_workers(wanted: int, num_readers: int) -> int:
    """The most workers, up to `wanted`, that share the readers evenly."""
    return max(n for n in range(1, min(wanted, num_readers) + 1) if num_readers % n == 0)


class ChunkLoader:
    """Iterates over steps: each item is one chunk of each of this process's readers, in their order.

    Args:
        spec: what readers are made of.
        readers: this process's readers.
        states: for each of them, where to go on, or None.
        workers: worker processes (rounded down to a divisor of the number of readers); 0 reads in this process.
    """

    def __init__(
        self, spec: ReaderSpec, readers: Sequence[int], states: Sequence[dict[str, Any] | None], workers: int
    ):
        num_sources = _num_workers(workers, len(readers)) if workers else 1
        source = WorkerChunks if workers else DirectChunks
        self._num_readers = len(readers)
        self._taken: list[Chunk] = []
        self._sources = [
            source(spec, readers[i::num_sources], states[i::num_sources]) for i in range(num_sources)
        ]

    def __iter__(self) -> Iterator[list[Chunk]]:
        while (chunks := self.take()) is not None:
            yield chunks

    def take(self, timeout: float | None = None) -> list[Chunk] | None:
        """The next step's chunks, or None if they are not all there in `timeout` seconds; the next call waits for the same ones.

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
