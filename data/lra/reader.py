"""Batches of labelled examples: one example for each lane, padded on the right to the longest of the batch.

In training, the examples of an epoch are permuted by (seed, epoch), and reader r reads every R-th of them. So
the n-th example of a reader is a function of (seed, epoch, reader), for any number of processes and workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..chunk import IGNORE_INDEX
from .examples import Examples

TIME_MULTIPLE = 16  # batches are padded to a multiple of this, so that there are fewer shapes


@dataclass
class LabelledBatch:
    """What one step reads from one reader: an example in each lane."""

    reader: int
    input_ids: np.ndarray
    """int64 [lanes, time], or [lanes, 2, time] for pairs"""
    attention_mask: np.ndarray
    """int64, as input_ids; 0 for padding"""
    labels: np.ndarray
    """int64 [lanes]; -100 for a lane that is not scored"""
    documents: list[list[str]]
    """For each lane, the name of its example."""
    state: dict[str, Any]
    """The reader's position after this batch; JSON."""

    @property
    def num_scored(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int(self.attention_mask.sum())

    def model_inputs(self) -> dict[str, np.ndarray]:
        """The arguments of a classifier's forward."""
        inputs = {"input_ids": self.input_ids, "labels": self.labels}
        return inputs if self.attention_mask.all() else {**inputs, "attention_mask": self.attention_mask}


def collate(
    examples: Examples,
    numbers: Sequence[int],
    scored: Sequence[bool],
    pad: int,
    reader: int,
    names: list[str],
) -> LabelledBatch:
    """The batch of these examples.

    Args:
        scored: whether each counts; the label of the others is -100.
        pad: id of the padding.
        names: of the examples, for messages.
    """
    rows = [examples.texts(number) for number in numbers]
    longest = max(len(text) for texts in rows for text in texts)
    time = -(-longest // TIME_MULTIPLE) * TIME_MULTIPLE
    ids = np.full((len(rows), examples.towers, time), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, texts in enumerate(rows):
        for tower, text in enumerate(texts):
            ids[row, tower, : len(text)], mask[row, tower, : len(text)] = text, 1
    labels = np.array([examples.label(number) for number in numbers], np.int64)
    labels[~np.array(scored, bool)] = IGNORE_INDEX
    if examples.towers == 1:
        ids, mask = ids[:, 0], mask[:, 0]
    return LabelledBatch(reader, ids, mask, labels, [[name] for name in names], {})


class LabelledReader:
    """The training reader.

    Args:
        examples: of the training split.
        reader, num_readers: which of the run's readers this is.
        lanes: examples of a batch.
        pad: id of the padding.
        seed: of the run.
        state: the state of a batch after which to resume; None starts at the beginning.
    """

    def __init__(
        self,
        examples: Examples,
        reader: int,
        num_readers: int,
        lanes: int,
        pad: int,
        seed: int,
        state: dict[str, Any] | None = None,
    ):
        self.examples, self.reader, self.num_readers, self.lanes = examples, reader, num_readers, lanes
        self.pad, self.seed = pad, seed
        self.num_read = 0 if state is None else state["examples"]
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def next_chunk(self) -> LabelledBatch:
        """The next `lanes` examples."""
        numbers, names = [], []
        for _ in range(self.lanes):
            share = -(-(len(self.examples) - self.reader) // self.num_readers)
            epoch, place = divmod(self.num_read, share)
            if epoch != self._epoch:
                generator = np.random.default_rng([self.seed, epoch])
                order = generator.permutation(len(self.examples))
                self._epoch, self._order = epoch, order[self.reader :: self.num_readers]
            numbers.append(int(self._order[place]))
            names.append(f"example {numbers[-1]} of epoch {epoch}")
            self.num_read += 1
        batch = collate(
            self.examples, numbers, [True] * self.lanes, pad=self.pad, reader=self.reader, names=names
        )
        batch.state = {"examples": self.num_read}
        return batch

    def skip(self, count: int) -> None:
        """Leave out this many batches."""
        self.num_read += count * self.lanes


@dataclass(frozen=True)
class LabelledSet:
    """One reader's share of a split that is scored: every num_readers-th example, sorted by length."""

    examples: Examples
    num_labels: int
    reader: int
    num_readers: int
    lanes: int
    pad: int

    @property
    def _share(self) -> int:
        return -(-len(self.examples) // self.num_readers)

    @property
    def num_positions(self) -> int:
        """Number of positions to read, without padding."""
        ends = self.examples.offsets[self.examples.towers :: self.examples.towers]
        starts = self.examples.offsets[: -1 : self.examples.towers]
        return int((ends - starts)[self.examples.index[self.reader :: self.num_readers]].sum())

    def chunks(self) -> Iterator[LabelledBatch]:
        """All examples of the share. All readers yield the same number of batches: where the examples end,
        the last one is repeated without being scored."""
        last = len(self.examples) - 1
        numbers = [self.reader + self.num_readers * i for i in range(self._share)]
        lengths = {number: max(map(len, self.examples.texts(min(number, last)))) for number in numbers}
        numbers.sort(key=lambda number: (lengths[number], number))
        for first in range(0, self._share, self.lanes):
            rows = numbers[first : first + self.lanes]
            scored, names = [number <= last for number in rows], [f"example {number}" for number in rows]
            known = [min(number, last) for number in rows]
            yield collate(self.examples, known, scored, pad=self.pad, reader=self.reader, names=names)
