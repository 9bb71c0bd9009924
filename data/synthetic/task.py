"""What a synthetic task is: options, a small vocabulary, and one example after another from a random generator."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..reader import IGNORED

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<unk>")

Example = tuple[np.ndarray, np.ndarray]
"""input_ids and shift_labels, int64 [length] each; shift_labels are -100 where nothing is scored."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task; its fields are the options that `data.task` may set. Lengths count all positions of a sequence, those of the answer included."""

    test_lengths: tuple[int, ...] = ()
    """Lengths that validation scores one by one, seen in training or not."""
    validation_examples: int = 512
    """Sequences of a validation: so many drawn as in training, and so many of each test length."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Positions of the longest sequence in training."""

    @property
    def shortest(self) -> int:
        """Positions of the shortest sequence that there is."""
        return 1

    @property
    @abstractmethod
    def symbols(self) -> list[str]:
        """Names of the tokens, by id."""

    @property
    @abstractmethod
    def num_answers(self) -> int:
        """Among how many tokens an answer is."""

    @abstractmethod
    def draw_length(self, generator: np.random.Generator) -> int:
        """A length as training has them."""

    def fit(self, length: int) -> int:
        """The greatest length up to this one that a sequence can have."""
        return length

    @abstractmethod
    def example(self, generator: np.random.Generator, length: int) -> Example:
        """A sequence of `fit(length)` positions."""

    def errors(self) -> dict[str, str]:
        """What is wrong with the options, by name; those of a subclass's own come on top."""
        errors = {}
        if self.validation_examples < 1:
            errors["validation_examples"] = f"must be at least 1, not {self.validation_examples}"
        if too_short := [length for length in self.test_lengths if length < self.shortest]:
            errors["test_lengths"] = (
                f"the shortest sequence has {self.shortest} positions, so there is none of {too_short[0]}"
            )
        return errors

    @property
    def chance(self) -> float:
        """Accuracy of a guess among all answers."""
        return 1.0 / self.num_answers

    def scaled(self, accuracy: float) -> float:
        """The accuracy on a scale where a guess has 0 and the truth 1."""
        return (accuracy - self.chance) / (1.0 - self.chance)

    @property
    def pad(self) -> int:
        """Id of the token behind a sequence's end."""
        return len(self.symbols) + SPECIAL_TOKENS.index("<pad>")

    def tokenizer(self) -> Any:
        """A `PreTrainedTokenizerFast` whose words are the symbols, split at blanks; exports carry it."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {symbol: number for number, symbol in enumerate([*self.symbols, *SPECIAL_TOKENS])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<pad>",
            unk_token="<unk>",
            padding_side="left",
            clean_up_tokenization_spaces=False,
            model_max_length=2**30,
        )


def unscored(length: int) -> np.ndarray:
    """Labels that score nothing, int64 [length]."""
    return np.full(length, IGNORED, np.int64)
