"""Tasks whose answer lies many tokens back: a key, and a register. Their documents are longer than a chunk.

    key        set v ~ ~ ~ ~ ~ ~ ~ ~ read                     the answer at `read` is v
    register   set v ~ ~ read ~ ~ ~ ~ read set w ~ ~ read     the value that was set last

`~` is noise. The distance of an answer is the number of positions from the value to the `read`.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .task import Example, Task, unscored_labels

NUM_DISTANCES = 48  # powers of two
FRAME = 2  # positions of a segment before its first distance: `set` and the value


@dataclass(frozen=True, kw_only=True)
class Distant(Task):
    """Segments, each of which sets a value and reads it. A document's length is FRAME + a distance that is
    drawn log-uniformly, so that it is the distance of its last read if there is one segment."""

    is_stream: ClassVar[bool] = True

    min_distance: int = 1000
    """Smallest distance of an answer from its value, in positions."""
    max_distance: int = 100_000
    """Largest distance in training."""
    num_values: int = 16
    """Number of values."""
    num_noise: int = 4
    """Number of symbols between them, which are drawn at random."""
    validation_examples: int = 64
    """Number of validation documents with lengths as in training, and of each test length."""

    @property
    @abstractmethod
    def most_segments(self) -> int:
        """Segments of a document are drawn uniformly from 1 to this number."""

    @property
    @abstractmethod
    def reads_of_segment(self) -> int:
        """Reads of a segment. The last ends it; the distances of the others are drawn log-uniformly."""

    @property
    def max_train_length(self) -> int:
        return FRAME + self.max_distance

    @property
    def min_valid_length(self) -> int:
        return FRAME + self.min_distance

    @property
    def symbols(self) -> list[str]:
        values = [f"value-{number}" for number in range(self.num_values)]
        return [*values, *(f"noise-{number}" for number in range(self.num_noise)), "set", "read"]

    @property
    def num_answers(self) -> int:
        return self.num_values

    def errors(self) -> dict[str, str]:
        errors = super().errors()
        minimums = {"min_distance": 1, "num_values": 2, "num_noise": 1}
        for name, least in minimums.items():
            if (value := getattr(self, name)) < least:
                errors[name] = f"must be at least {least}, not {value}"
        if self.max_distance < self.min_distance:
            errors["max_distance"] = f"must be at least min_distance ({self.min_distance})"
        return errors

    def draw_length(self, generator: np.random.Generator) -> int:
        return FRAME + int(_log_uniform(generator, self.min_distance, self.max_distance))

    def example(self, generator: np.random.Generator, length: int) -> Example:
        noise, marker = self.num_values, self.num_values + self.num_noise
        ids, labels = noise + generator.integers(0, self.num_noise, length), unscored_labels(length)
        first = 0
        for size in self._segment_sizes(generator, length):
            value, longest = generator.integers(self.num_values), size - FRAME
            ids[first : first + FRAME] = marker, value
            drawn = _log_uniform(generator, self.min_distance, longest, self.reads_of_segment - 1)
            reads = first + FRAME - 1 + np.append(drawn, longest)
            ids[reads], labels[reads] = marker + 1, value
            first += size
        return ids, labels

    def _segment_sizes(self, generator: np.random.Generator, length: int) -> np.ndarray:
        """Sizes of the segments of a document, in positions."""
        most = min(self.most_segments, length // self.min_valid_length)
        count = int(generator.integers(1, most + 1))
        spare = length - count * self.min_valid_length
        edges = np.sort(generator.integers(0, spare + 1, count - 1))
        return self.min_valid_length + np.diff(edges, prepend=0, append=spare)

    def distances(self, ids: np.ndarray) -> np.ndarray:
        """The distance of each position of a document from the last value before it, int64 [length]."""
        positions = np.arange(len(ids))
        return positions - np.maximum.accumulate(np.where(ids < self.num_values, positions, 0))


@dataclass(frozen=True, kw_only=True)
class DistantKey(Distant):
    """A key, told once at the start of a document and asked for at its end."""

    @property
    def most_segments(self) -> int:
        return 1

    @property
    def reads_of_segment(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class DistantRegister(Distant):
    """A register, read several times at rising distances. It may be set again."""

    num_sets: int = 2
    """Largest number of times that a document sets the register."""
    num_reads: int = 8
    """Number of reads of each value, fewer where two fall on one position."""

    @property
    def most_segments(self) -> int:
        return self.num_sets

    @property
    def reads_of_segment(self) -> int:
        return self.num_reads

    def errors(self) -> dict[str, str]:
        own = {name: getattr(self, name) for name in ("num_sets", "num_reads")}
        few = {name: f"must be at least 1, not {value}" for name, value in own.items() if value < 1}
        return super().errors() | few


def distance_powers(distances: np.ndarray) -> np.ndarray:
    """i for distances from 2^i to 2^(i+1) - 1, int64 [n]."""
    return np.frexp(np.maximum(distances, 1))[1].astype(np.int64) - 1  # exact below 2^53


def sums_by_distance(distances: np.ndarray, *weights: np.ndarray | None) -> np.ndarray:
    """The sum of each weight over answers at distances from 2^i to 2^(i+1) - 1; None counts the answers.

    Args:
        distances: of the answers, int64 [n].
        weights: numbers [n] each.

    Returns:
        fp64 [NUM_DISTANCES, number of weights].
    """
    powers = distance_powers(distances)
    return np.stack([np.bincount(powers, own, NUM_DISTANCES) for own in weights], axis=1)


def _log_uniform(generator: np.random.Generator, low: int, high: int, size: int | None = None) -> np.ndarray:
    """Whole numbers from low to high, whose logarithms are uniform: int64, of shape [] or [size]."""
    drawn = np.exp(generator.uniform(math.log(low), math.log(high + 1), size))
    return np.clip(np.floor(drawn), low, high).astype(np.int64)
