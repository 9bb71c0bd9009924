"""Examples as chunks: one sequence to a lane, from its first column, padding behind it.

Every example is a function of a few numbers: in training of (seed, step, reader), in validation of (length, number). Nothing is carried from
chunk to chunk, since each begins a document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..reader import Chunk, empty_chunk
from .task import Task

TRAIN, VALIDATION = 0, 1  # first words of the seeds: no example is drawn with the same one in both
VALIDATION_SEED = 0  # one set for every run, whatever its seed
IN_DISTRIBUTION = 0  # in place of a length: lengths as in training


def _put(chunk: Chunk, row: int, task: Task, generator: np.random.Generator, length: int, name: str) -> None:
    ids, labels = task.example(generator, length)
    chunk.input_ids[row, : len(ids)], chunk.shift_labels[row, : len(labels)] = ids, labels
    chunk.documents[row].append(name)


class TaskReader:
    """Training: fresh examples for each step.

    Args:
        task: what to draw.
        reader, lanes, chunk: shape of a chunk; `chunk` must hold the longest sequence.
        seed: of the run.
        state: where to go on, as a chunk carried it; None starts anew.
    """

    def __init__(
        self, task: Task, reader: int, lanes: int, chunk: int, seed: int, state: dict[str, Any] | None = None
    ):
        assert chunk >= task.longest
        self.task, self.reader, self.lanes, self.chunk, self.seed = task, reader, lanes, chunk, seed
        self.step = 0 if state is None else state["step"]

    def next_chunk(self) -> Chunk:
        """Examples for the next step, [lanes, chunk]."""
        generator = np.random.default_rng([TRAIN, self.step, self.reader, self.seed])
        chunk = empty_chunk(self.reader, self.lanes, self.chunk, self.task.pad)
        for row in range(self.lanes):
            _put(
                chunk,
                row,
                self.task,
                generator,
                self.task.draw_length(generator),
                f"example {row} of step {self.step}",
            )
        chunk.document_starts[:, 0] = True
        self.step += 1
        chunk.state = {"step": self.step}
        return chunk


@dataclass(frozen=True)
class TaskValidation:
    """One reader's share of a fixed set: every num_readers-th of `validation_examples` with lengths as in training, and of each test length."""

    task: Task
    reader: int
    num_readers: int
    lanes: int
    multiple: int = 1
    """Chunks are padded to a multiple of so many positions."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """What is scored apart: training's lengths (0), then each test length."""
        return (IN_DISTRIBUTION, *self.task.test_lengths)

    @property
    def num_positions(self) -> int:
        """How many positions are read."""
        return self._share * sum(length or self.task.longest for length in self.lengths)

    @property
    def _share(self) -> int:
        """Examples of each length."""
        return -(-self.task.validation_examples // self.num_readers)

    def chunks(self) -> Iterator[tuple[int, Chunk]]:
        """(one of `lengths`, chunk [rows, time >= that length]). All readers give the same number, the last ones partly padding.

        Longer sequences than training's come in fewer rows, so that a chunk never has more positions than one of training.
        """
        for length in self.lengths:
            rows = max(1, self.lanes * self.task.longest // max(length, self.task.longest))
            for first in range(0, self._share, rows):
                numbers = [
                    self.reader + self.num_readers * i for i in range(first, min(first + rows, self._share))
                ]
                yield length, self._chunk(length, numbers)

    def _chunk(self, length: int, numbers: list[int]) -> Chunk:
        time = -(-(length or self.task.longest) // self.multiple) * self.multiple
        chunk = empty_chunk(self.reader, len(numbers), time, self.task.pad)
        for row, number in enumerate(numbers):
            if number < self.task.validation_examples:
                generator = np.random.default_rng([VALIDATION, length, number, VALIDATION_SEED])
                _put(
                    chunk,
                    row,
                    self.task,
                    generator,
                    length or self.task.draw_length(generator),
                    f"example {number}",
                )
        chunk.document_starts[:, 0] = True
        return chunk
