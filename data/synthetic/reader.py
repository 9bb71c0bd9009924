"""Makes chunks of examples: one sequence per lane, from the first column, with padding after it.

Every example is a function of a few numbers: (seed, step, reader) in training, (length, number) in
validation. Each chunk begins a document, so no state is carried. Tasks whose sequences are longer than a
chunk are trained on with `stream.py`; their validation sequences come in pieces here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..chunk import Chunk, empty_chunk
from .task import Task

TRAIN, VALIDATION = 0, 1  # first number of each seed, so that training and validation never share one
VALIDATION_SEED = 0  # the same set for every run, whatever its seed
IN_DISTRIBUTION = 0  # stands for a length: lengths are drawn as in training


def _write_example(
    chunk: Chunk, row: int, task: Task, generator: np.random.Generator, length: int, name: str
) -> None:
    ids, labels = task.example(generator, length)
    chunk.input_ids[row, : len(ids)], chunk.shift_labels[row, : len(labels)] = ids, labels
    chunk.documents[row].append(name)


class TaskReader:
    """The training reader: new examples in each step.

    Args:
        task: draws the examples.
        reader, lanes, chunk: shape of a chunk; `chunk` must hold the longest training sequence.
        seed: of the run.
        state: the state of a chunk after which to resume; None starts at the beginning.
    """

    def __init__(
        self, task: Task, reader: int, lanes: int, chunk: int, seed: int, state: dict[str, Any] | None = None
    ):
        assert chunk >= task.max_train_length
        self.task, self.reader, self.lanes, self.chunk, self.seed = task, reader, lanes, chunk, seed
        self.step = 0 if state is None else state["step"]

    def next_chunk(self) -> Chunk:
        """The examples of the next step, [lanes, chunk]."""
        generator = np.random.default_rng([TRAIN, self.step, self.reader, self.seed])
        chunk = empty_chunk(self.reader, self.lanes, self.chunk, self.task.pad)
        for row in range(self.lanes):
            length, name = self.task.draw_length(generator), f"example {row} of step {self.step}"
            _write_example(chunk, row, self.task, generator, length, name)
        chunk.document_starts[:, 0] = True
        self.step += 1
        chunk.state = {"step": self.step}
        return chunk

    def skip(self, count: int) -> None:
        """Leave out this many steps."""
        self.step += count


@dataclass(frozen=True)
class TaskValidation:
    """One reader's share of a fixed validation set.

    The set has `validation_examples` sequences with lengths as in training, and as many of each test length.
    The share is every num_readers-th of each. If the task is a stream, these are sorted by falling length
    first, so that few positions are padding.
    """

    task: Task
    reader: int
    num_readers: int
    lanes: int
    multiple: int = 1
    """The length of chunks is padded to a multiple of this."""
    piece: int | None = None
    """Sequences are read in pieces of so many positions, if the task is a stream; None: whole."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that are scored separately: 0 (as in training), then each test length."""
        return (IN_DISTRIBUTION, *self.task.test_lengths)

    @property
    def num_positions(self) -> int:
        """Number of positions to read."""
        if self.piece is not None:
            groups = (group for length in self.lengths for group in self._groups(length))
            return sum(time * len(numbers) for numbers, time in groups)
        return self._share * sum(length or self.task.max_train_length for length in self.lengths)

    @property
    def _share(self) -> int:
        """Number of examples of each length."""
        return -(-self.task.validation_examples // self.num_readers)

    def chunks(self) -> Iterator[tuple[int, Chunk]]:
        """Yield (one of `lengths`, chunk [rows, time >= that length]).

        All readers yield the same number of chunks; the last ones may be partly padding. Sequences longer
        than training's come in fewer rows, so no chunk has more positions than a training chunk. Of a stream,
        consecutive chunks are pieces of the same sequences, until one begins with document starts.
        """
        if self.piece is not None:
            yield from self._pieces(self.piece)
            return
        for length in self.lengths:
            rows = max(1, self.lanes * self.task.max_train_length // max(length, self.task.max_train_length))
            for first in range(0, self._share, rows):
                numbers = [
                    self.reader + self.num_readers * i for i in range(first, min(first + rows, self._share))
                ]
                yield length, self._chunk(length, numbers)

    def _pieces(self, piece: int) -> Iterator[tuple[int, Chunk]]:
        for length in self.lengths:
            for numbers, time in self._groups(length):
                whole = self._chunk(length, numbers, time)
                for first in range(0, time, piece):
                    part = slice(first, first + piece)
                    yield length, whole.columns(lambda array, part=part: array[:, part], 1)

    def _groups(self, length: int) -> Iterator[tuple[list[int], int]]:
        """The sequences of each chunk of a stream, and their length in whole pieces: both are as many for
        every reader."""
        assert self.piece is not None
        sizes = [self._draw_length(length, number)[1] for number in range(self.task.validation_examples)]
        order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
        order += [self.task.validation_examples] * (self._share * self.num_readers - len(order))  # padding
        for first in range(0, len(order), self.lanes * self.num_readers):
            numbers = order[first : first + self.lanes * self.num_readers]
            yield numbers[self.reader :: self.num_readers], -(-sizes[numbers[0]] // self.piece) * self.piece

    def _draw_length(self, length: int, number: int) -> tuple[np.random.Generator, int]:
        """The length of a sequence, and the generator that draws the sequence next."""
        generator = np.random.default_rng([VALIDATION, length, number, VALIDATION_SEED])
        return generator, length or self.task.draw_length(generator)

    def _chunk(self, length: int, numbers: list[int], time: int | None = None) -> Chunk:
        time = time or -(-(length or self.task.max_train_length) // self.multiple) * self.multiple
        chunk = empty_chunk(self.reader, len(numbers), time, self.task.pad)
        for row, number in enumerate(numbers):
            if number < self.task.validation_examples:
                generator, drawn = self._draw_length(length, number)
                _write_example(chunk, row, self.task, generator, drawn, f"example {number}")
        chunk.document_starts[:, 0] = True
        if self.piece is not None:
            rows = [self.task.distances(ids) for ids in chunk.input_ids]
            given = [row for row in rows if row is not None]
            chunk.distances = np.stack(given) if given else None
        return chunk
