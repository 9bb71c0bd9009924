"""Chunks for the training loop, prefetched in worker processes.

Each worker serves whole readers, so a reader's chunks come in order whatever the number of workers, and the loop always
gets one chunk of each of its readers, in their order. A worker is a fresh interpreter that imports only what reading needs.
torch's DataLoader would do, but for two things: it forks or re-imports the training program, and it raises from a signal
handler, in the middle of a save, when a group's SIGTERM ends a worker.
"""

import contextlib
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .corpus import CorpusSpec
from .reader import Chunk, DocumentReader, WindowReader, joined_tokens
from .synthetic import Task, TaskReader
from .tokenizer import Encoder


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
                DocumentReader(self.corpus, self.encoder, r, self.num_readers, self.lanes, self.chunk, self.window, self.seed, state)
                for r, state in zip(readers, states, strict=True)
            ]
        tokens = joined_tokens(self.corpus, "train", self.encoder)
        return [WindowReader(tokens, r, self.lanes, self.chunk, self.seed, state) for r, state in zip(readers, states, strict=True)]


class DirectChunks:
    """Readers in this process, in turn, for ever."""

    def __init__(self, spec: ReaderSpec, readers: Sequence[int], states: Sequence[dict[str, Any] | None]):
        self._readers = spec.open(readers, states)

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            for reader in self._readers:
                yield reader.next_chunk()

    def close(self) -> None:
        """Nothing to stop."""


class WorkerChunks:
    """Readers in another process, in turn, for ever: pickled chunks over a pipe, a few of them read ahead.

    The process leads a process group of its own, so that neither Ctrl-C nor a signal to ours reaches it; it ends with this end of the pipe,
    however that came about.
    """

    READ_AHEAD = 4

    def __init__(self, spec: ReaderSpec, readers: Sequence[int], states: Sequence[dict[str, Any] | None]):
        command = [sys.executable, "-P", "-m", f"{__package__}.worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin is not None
        pickle.dump((spec, readers, states), self._process.stdin)
        self._process.stdin.close()
        self._ready: queue.Queue[Chunk | Exception] = queue.Queue(self.READ_AHEAD)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        assert self._process.stdout is not None
        try:
            while True:
                item = pickle.load(self._process.stdout)
                self._ready.put(item)
                if isinstance(item, Exception):
                    return
        except Exception:  # whatever it was, the loop must hear of it
            self._ready.put(RuntimeError(f"a data worker ended without a word (exit status {self._process.wait()})"))

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            item = self._ready.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """Stop the process and the thread that listens to it."""
        self._process.kill()
        self._process.wait()
        while self._thread.is_alive():  # it may wait for room
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        assert self._process.stdout is not None
        self._process.stdout.close()


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

    def __init__(self, spec: ReaderSpec, readers: Sequence[int], states: Sequence[dict[str, Any] | None], workers: int):
        num_sources = _num_workers(workers, len(readers)) if workers else 1
        source = WorkerChunks if workers else DirectChunks
        self._num_turns = len(readers) // num_sources
        self._sources = [source(spec, readers[i::num_sources], states[i::num_sources]) for i in range(num_sources)]

    def __iter__(self) -> Iterator[list[Chunk]]:
        iterators = [iter(source) for source in self._sources]
        while True:
            yield [next(iterator) for _ in range(self._num_turns) for iterator in iterators]

    def close(self) -> None:
        """Stop the workers."""
        for source in self._sources:
            source.close()
