"""Reads a task whose documents are longer than a chunk: every lane is an endless stream of documents.

    lane     document 0 | document 1 | document 2 ...         each follows from (seed, reader, lane, number)
    chunks        |          |          |         |           cut every `chunk` positions, state carried

A lane's position is the number of its document and the number of positions that were read of it.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..chunk import Chunk, empty_chunk
from .task import Task, unscored_labels

STREAM = 2  # first number of each seed; those of reader.py are 0 and 1


@dataclass
class _Lane:
    number: int
    """Of the document."""
    offset: int
    """Positions of it that were read."""
    ids: np.ndarray | None = field(default=None, repr=False)
    """int32 [length of the document]; None until it is needed"""
    labels: np.ndarray = field(default_factory=lambda: unscored_labels(0), repr=False)


class StreamTaskReader:
    """The training reader of a task of long documents.

    Args:
        task: draws the documents.
        reader, lanes, chunk: shape of a chunk.
        seed: of the run.
        state: the state of a chunk after which to resume; None starts at the beginning.
        num_chunks: consecutive chunks of each lane in a step.
    """

    def __init__(
        self,
        task: Task,
        reader: int,
        lanes: int,
        chunk: int,
        seed: int,
        state: dict[str, Any] | None = None,
        num_chunks: int = 1,
    ):
        self.task, self.reader, self.seed = task, reader, seed
        self.time, self.num_chunks = chunk * num_chunks, num_chunks
        saved = [[0, 0]] * lanes if state is None else state["lanes"]
        self.lanes = [_Lane(number, offset) for number, offset in saved]

    def next_chunk(self) -> Chunk:
        """The next positions of every lane, [lanes, chunk x num_chunks]."""
        chunk = empty_chunk(self.reader, len(self.lanes), self.time, self.task.pad)
        for row, lane in enumerate(self.lanes):
            column = 0
            while column < self.time:
                column += self._emit(chunk, row, lane, column)
        chunk.num_chunks = self.num_chunks
        chunk.state = {"lanes": [[lane.number, lane.offset] for lane in self.lanes]}
        return chunk

    def skip(self, count: int) -> None:
        """Leave out this many steps. Only the lengths of their documents are drawn."""
        for row, lane in enumerate(self.lanes):
            lane.offset += count * self.time
            while lane.offset >= (length := self.task.draw_length(self._generator(row, lane))):
                lane.number, lane.offset, lane.ids = lane.number + 1, lane.offset - length, None

    def _generator(self, row: int, lane: _Lane) -> np.random.Generator:
        return np.random.default_rng([STREAM, lane.number, self.reader, row, self.seed])

    def _emit(self, chunk: Chunk, row: int, lane: _Lane, column: int) -> int:
        """Write positions of a lane's document from a column on; returns their number."""
        if lane.ids is None:
            generator = self._generator(row, lane)
            example = self.task.example(generator, self.task.draw_length(generator))
            lane.ids, lane.labels = (array.astype(np.int32) for array in example)
        count = min(len(lane.ids) - lane.offset, self.time - column)
        source, target = slice(lane.offset, lane.offset + count), slice(column, column + count)
        chunk.input_ids[row, target], chunk.shift_labels[row, target] = lane.ids[source], lane.labels[source]
        chunk.document_starts[row, column] = lane.offset == 0
        chunk.documents[row].append(f"document {lane.number} of lane {row}")
        lane.offset += count
        if lane.offset == len(lane.ids):
            lane.number, lane.offset, lane.ids = lane.number + 1, 0, None
        return count
