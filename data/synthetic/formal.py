"""Formal languages, trained on short sequences and tested on longer ones.

Sources: Deletang et al., arXiv 2207.02098; Beck et al., arXiv 2405.04517. Definitions differ between papers;
each class names its own. Strings and lengths are drawn uniformly. The answer is scored at the last symbol,
for Bucket Sort over the second half.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from .task import Example, Task, unscored_labels


@dataclass(frozen=True, kw_only=True)
class FormalLanguage(Task):
    """A formal language with sequences of min_length to max_length positions."""

    min_length: int = 1
    """Length of the shortest training sequence."""
    max_length: int = 40
    """Length of the longest training sequence."""
    test_lengths: tuple[int, ...] = (40, 64, 96, 128, 160, 192, 224, 256)
    """Lengths that validation scores separately: as published, from the training maximum to 256."""

    @property
    def max_train_length(self) -> int:
        return self.max_length

    def draw_length(self, generator: np.random.Generator) -> int:
        return self.fit_length(
            int(generator.integers(max(self.min_length, self.min_valid_length), self.max_length + 1))
        )

    @property
    def num_symbols(self) -> int:
        """Number of symbols that strings are drawn from: ids 0, 1, ..."""
        return 2

    @property
    def symbols(self) -> list[str]:
        return [str(number) for number in range(self.num_symbols)]

    @property
    def num_answers(self) -> int:
        return self.num_symbols

    def errors(self) -> dict[str, str]:
        errors = super().errors()
        if self.min_length < 1:
            errors["min_length"] = f"must be at least 1, not {self.min_length}"
        if self.max_length < max(self.min_length, self.min_valid_length):
            needed = max(self.min_length, self.min_valid_length)
            errors["max_length"] = (
                f"must be at least {needed} "
                f"(min_length {self.min_length}, shortest sequence {self.min_valid_length})"
            )
        return errors


@dataclass(frozen=True, kw_only=True)
class OneAnswer(FormalLanguage):
    """A language with uniform strings and one answer, scored at the last symbol."""

    def example(self, generator: np.random.Generator, length: int) -> Example:
        string = generator.integers(0, self.num_symbols, length)
        labels = unscored_labels(length)
        labels[-1] = self.answer(string)
        return string, labels

    @abstractmethod
    def answer(self, string: np.ndarray) -> int:
        """The id of the answer for a string, int64 [length]."""


@dataclass(frozen=True, kw_only=True)
class TwoHalves(FormalLanguage):
    """A language whose sequences are a string and as many positions again, so lengths are even."""

    @property
    def min_valid_length(self) -> int:
        return 2

    def fit_length(self, length: int) -> int:
        return length - length % 2


@dataclass(frozen=True, kw_only=True)
class EvenPairs(OneAnswer):
    """Even Pairs: whether the number of unequal neighbours in a binary string is even.

    This is so if the first symbol equals the last; the answer is 1 then, else 0.
    """

    def answer(self, string: np.ndarray) -> int:
        return int(string[0] == string[-1])


@dataclass(frozen=True, kw_only=True)
class Parity(OneAnswer):
    """Parity: the number of ones mod 2.

    Decays in (0, 1) do not generalize to longer strings (Grazzi et al., arXiv 2411.12537).
    """

    def answer(self, string: np.ndarray) -> int:
        return int(string.sum() % 2)


@dataclass(frozen=True, kw_only=True)
class CycleNavigation(OneAnswer):
    """Cycle Navigation: the final position after moves of 0, +1 and -1 on a ring, starting from position
    0.
    """

    ring_size: int = 5
    """Number of positions of the ring."""

    MOVES = np.array([0, 1, -1])

    @property
    def num_symbols(self) -> int:
        return len(self.MOVES)

    @property
    def symbols(self) -> list[str]:
        return ["0", "+1", "-1", *(f"position-{number}" for number in range(self.ring_size))]

    @property
    def num_answers(self) -> int:
        return self.ring_size

    def errors(self) -> dict[str, str]:
        errors = super().errors()
        if self.ring_size < 2:
            errors["ring_size"] = f"must be at least 2, not {self.ring_size}"
        return errors

    def answer(self, string: np.ndarray) -> int:
        return self.num_symbols + int(self.MOVES[string].sum() % self.ring_size)


@dataclass(frozen=True, kw_only=True)
class BinaryMissingDuplicate(TwoHalves):
    """Missing Duplicate, Deletang et al.: a binary string twice, with one symbol blanked out.

    The answer is that symbol. Lengths are even.
    """

    BLANK = 2

    @property
    def symbols(self) -> list[str]:
        return ["0", "1", "blank"]

    def example(self, generator: np.random.Generator, length: int) -> Example:
        half = self.fit_length(length) // 2
        sequence = np.tile(generator.integers(0, 2, half), 2)
        labels, hole = unscored_labels(2 * half), generator.integers(2 * half)
        labels[-1], sequence[hole] = sequence[hole], self.BLANK
        return sequence, labels


@dataclass(frozen=True, kw_only=True)
class MissingDuplicate9(FormalLanguage):
    """Missing Duplicate, minRNN experiments: a string over 9 symbols, repeated without its last symbol.

    The answer is that symbol. Lengths are odd.
    """

    @property
    def num_symbols(self) -> int:
        return 9

    def fit_length(self, length: int) -> int:
        return length - (length + 1) % 2

    def example(self, generator: np.random.Generator, length: int) -> Example:
        length = self.fit_length(length)
        string = generator.integers(0, self.num_symbols, (length + 1) // 2)
        labels = unscored_labels(length)
        labels[-1] = string[-1]
        return np.tile(string, 2)[:length], labels


@dataclass(frozen=True, kw_only=True)
class BucketSort(TwoHalves):
    """Bucket Sort: a string, then as many markers, at which its symbols are to be output in sorted order.

    Even lengths.
    """

    @property
    def symbols(self) -> list[str]:
        return [*super().symbols, "sorted"]

    def example(self, generator: np.random.Generator, length: int) -> Example:
        half = self.fit_length(length) // 2
        string = generator.integers(0, self.num_symbols, half)
        ids, labels = np.full(2 * half, self.num_symbols, np.int64), unscored_labels(2 * half)
        ids[:half], labels[half:] = string, np.sort(string)
        return ids, labels


@dataclass(frozen=True, kw_only=True)
class BucketSort5(BucketSort):
    """Bucket Sort, Deletang et al.: 5 symbols."""

    @property
    def num_symbols(self) -> int:
        return 5


@dataclass(frozen=True, kw_only=True)
class BucketSort10(BucketSort):
    """Bucket Sort, minRNN experiments: 10 symbols."""

    @property
    def num_symbols(self) -> int:
        return 10


@dataclass(frozen=True, kw_only=True)
class Majority(OneAnswer):
    """Majority: the most frequent of 63 symbols; of equally frequent ones the largest."""

    @property
    def num_symbols(self) -> int:
        return 63

    def answer(self, string: np.ndarray) -> int:
        counts = np.bincount(string, minlength=self.num_symbols)
        return self.num_symbols - 1 - int(counts[::-1].argmax())


@dataclass(frozen=True, kw_only=True)
class MajorityCount(OneAnswer):
    """Majority Count: how often the most frequent of 63 symbols occurs. Token n stands for the number n."""

    @property
    def num_symbols(self) -> int:
        return 63

    @property
    def num_answers(self) -> int:
        return max((self.max_length, *self.test_lengths))

    @property
    def symbols(self) -> list[str]:
        return [str(number) for number in range(max(self.num_symbols, self.num_answers + 1))]

    def errors(self) -> dict[str, str]:
        errors = super().errors()
        if self.num_answers < 2:
            errors["max_length"] = (
                "or one of test_lengths must be at least 2: a string of 1 symbol has but one count"
            )
        return errors

    def answer(self, string: np.ndarray) -> int:
        return int(np.bincount(string).max())
