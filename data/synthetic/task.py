"""The base class of synthetic tasks: options, a small vocabulary, and examples drawn from a random
generator.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..chunk import IGNORE_INDEX
from ..tokenizer import WORD_SPECIAL_TOKENS, word_tokenizer

Example = tuple[np.ndarray, np.ndarray]
"""input_ids and shift_labels, int64 [length] each; shift_labels is -100 where nothing is scored."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task. Its fields are the options of `data.task`.

    Lengths count all positions of a sequence, the answer included.
    """

    is_stream: ClassVar[bool] = False
    """Whether sequences may be longer than a chunk: then they are documents, which lanes read on through."""

    test_lengths: tuple[int, ...] = ()
    """Lengths that validation scores separately; they need not occur in training."""
    validation_examples: int = 512
    """Number of validation sequences with lengths as in training, and of each test length."""

    @property
    @abstractmethod
    def max_train_length(self) -> int:
        """Number of positions of the longest training sequence."""

    @property
    def min_valid_length(self) -> int:
        """Number of positions of the shortest possible sequence."""
        return 1

    @property
    @abstractmethod
    def symbols(self) -> list[str]:
        """The names of the tokens, indexed by id."""

    @property
    @abstractmethod
    def num_answers(self) -> int:
        """Number of tokens that can be an answer."""

    @abstractmethod
    def draw_length(self, generator: np.random.Generator) -> int:
        """Draw the length of a training sequence."""

    def fit_length(self, length: int) -> int:
        """The largest possible length up to this one."""
        return length

    @abstractmethod
    def example(self, generator: np.random.Generator, length: int) -> Example:
        """Draw a sequence of `fit_length(length)` positions."""

    def distances(self, ids: np.ndarray) -> np.ndarray | None:
        """How many positions back the answer at each position of a sequence lies, int64 [length]; None if the
        task does not say."""
        return None

    def errors(self) -> dict[str, str]:
        """Error messages by option. Subclasses add those of their own options."""
        errors = {}
        if self.validation_examples < 1:
            errors["validation_examples"] = f"must be at least 1, not {self.validation_examples}"
        if too_short := [length for length in self.test_lengths if length < self.min_valid_length]:
            errors["test_lengths"] = (
                f"the shortest sequence has {self.min_valid_length} positions, "
                f"so there is none of {too_short[0]}"
            )
        return errors

    @property
    def chance(self) -> float:
        """The accuracy of guessing among all answers."""
        return 1.0 / self.num_answers

    def scaled_accuracy(self, accuracy: float) -> float:
        """The accuracy rescaled so that guessing gives 0 and perfect answers give 1."""
        return (accuracy - self.chance) / (1.0 - self.chance)

    @functools.cached_property
    def pad(self) -> int:
        """The id of the padding token."""
        return len(self.symbols) + WORD_SPECIAL_TOKENS.index("<pad>")

    def tokenizer(self) -> Any:
        """The tokenizer of exports: its words are the symbols."""
        return word_tokenizer(self.symbols)


def unscored_labels(length: int) -> np.ndarray:
    """Labels of which none is scored, int64 [length]."""
    return np.full(length, IGNORE_INDEX, np.int64)
