"""Recall tasks: the answer is a token that was seen earlier in the sequence."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tokenizer import byte_tokenizer
from .task import Example, Task, unscored_labels


@dataclass(frozen=True, kw_only=True)
class FixedLength(Task):
    """A task whose training sequences all have the same length."""

    length: int = 256
    """Number of positions of a training sequence."""

    @property
    def max_train_length(self) -> int:
        return self.length

    def draw_length(self, generator: np.random.Generator) -> int:
        return self.max_train_length

    def errors(self) -> dict[str, str]:
        errors = super().errors()
        if self.max_train_length < self.min_valid_length:
            errors["length"] = (
                f"{self.length} is too short: a sequence has at least {self.min_valid_length} positions"
            )
        return errors


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(FixedLength):
    """Selective Copying (Gu and Dao, arXiv 2312.00752): tokens at random positions among blanks.

    The tokens are to be repeated in order at the markers that follow.
    """

    length: int = 4096
    """Number of positions that hold tokens and blanks; `num_tokens` markers follow."""
    num_tokens: int = 16
    """Number of tokens to remember."""
    vocab_size: int = 16
    """Number of symbols: the blank, the marker, and those to remember."""

    @property
    def max_train_length(self) -> int:
        return self.length + self.num_tokens

    @property
    def min_valid_length(self) -> int:
        return 2 * self.num_tokens

    @property
    def symbols(self) -> list[str]:
        return ["blank", *(str(number) for number in range(1, self.vocab_size - 1)), "marker"]

    @property
    def num_answers(self) -> int:
        return self.vocab_size - 2

    def errors(self) -> dict[str, str]:
        errors = super().errors()
        if self.num_tokens < 1:
            errors["num_tokens"] = f"must be at least 1, not {self.num_tokens}"
        elif self.length < self.num_tokens:
            errors["length"] = f"{self.length} positions cannot hold {self.num_tokens} tokens (num_tokens)"
        if self.vocab_size < 4:
            errors["vocab_size"] = (
                f"must be at least 4 (blank, marker, two to tell apart), not {self.vocab_size}"
            )
        return errors

    def example(self, generator: np.random.Generator, length: int) -> Example:
        body, count = length - self.num_tokens, self.num_tokens
        ids, labels = np.zeros(length, np.int64), unscored_labels(length)
        tokens = generator.integers(1, self.vocab_size - 1, count)
        ids[np.sort(generator.permutation(body)[:count])] = tokens
        ids[body:], labels[body:] = self.vocab_size - 1, tokens
        return ids, labels


@dataclass(frozen=True, kw_only=True)
class MultiQueryRecall(Task):
    """MQAR (zoology; Arora et al., arXiv 2312.04927): key-value pairs, then each key again among noise.

    The answer at a repeated key is its value. Keys are the first half of the vocabulary without 0, values the
    second half. Queries stand at even positions, at a distance d from the pairs with probability proportional
    to d ** (power - 1).
    """

    sizes: tuple[tuple[int, int], ...] = ((64, 4), (128, 8), (256, 16), (512, 64))
    """(positions, pairs) of the sequences; training draws one of these for each sequence."""
    vocab_size: int = 8192
    """Number of keys and values together."""
    power: float = 0.01
    """Smaller values put queries closer to the pairs; 1 spreads them evenly."""
    test_lengths: tuple[int, ...] = (64, 128, 256, 512)
    """The lengths among `sizes` that validation scores separately."""

    @property
    def max_train_length(self) -> int:
        return max(length for length, _ in self.sizes)

    @property
    def symbols(self) -> list[str]:
        half = self.vocab_size // 2
        return [
            "0",
            *(f"key-{number}" for number in range(1, half)),
            *(f"value-{number}" for number in range(half, self.vocab_size)),
        ]

    @property
    def num_answers(self) -> int:
        return self.vocab_size - self.vocab_size // 2

    def errors(self) -> dict[str, str]:
        errors = super().errors()
        if not self.sizes:
            errors["sizes"] = "must name at least one (positions, pairs)"
        for length, pairs in self.sizes:
            if pairs < 1 or length < 4 * pairs:
                errors["sizes"] = (
                    f"{pairs} pairs and as many queries need at least 1 pair and "
                    f"{4 * max(pairs, 1)} positions, not {length}"
                )
            elif pairs > self.vocab_size // 2 - 1:
                errors["vocab_size"] = (
                    f"{self.vocab_size} has {max(self.vocab_size // 2 - 1, 0)} keys, "
                    f"too few for {pairs} pairs"
                )
        if len(dict(self.sizes)) < len(self.sizes):
            errors["sizes"] = "must name each length once"
        if unknown := [length for length in self.test_lengths if length not in dict(self.sizes)]:
            known = ", ".join(str(length) for length, _ in self.sizes)
            errors["test_lengths"] = f"{unknown[0]} is none of the lengths in sizes ({known})"
        if not self.power > 0:
            errors["power"] = f"must be positive, not {self.power}"
        return errors

    def draw_length(self, generator: np.random.Generator) -> int:
        return self.sizes[generator.integers(len(self.sizes))][0]

    def example(self, generator: np.random.Generator, length: int) -> Example:
        num_pairs, half = dict(self.sizes)[length], self.vocab_size // 2
        keys = 1 + generator.choice(half - 1, num_pairs, replace=False)
        values = half + generator.choice(self.vocab_size - half, num_pairs, replace=False)
        ids, labels = generator.integers(0, self.vocab_size, length), unscored_labels(length)
        ids[0 : 2 * num_pairs : 2], ids[1 : 2 * num_pairs : 2] = keys, values
        weights = np.arange(1, (length - 2 * num_pairs) // 2 + 1) ** (self.power - 1.0)
        chosen = generator.choice(len(weights), num_pairs, replace=False, p=weights / weights.sum())
        queries = 2 * num_pairs + 2 * chosen
        ids[queries], labels[queries] = keys, values
        return ids, labels


@dataclass(frozen=True, kw_only=True)
class InductionHeads(FixedLength):
    """Induction Heads (Gu and Dao): a marker within noise, and again as the last symbol.

    The answer is the symbol that followed the first marker.
    """

    vocab_size: int = 16
    """Number of symbols, including the marker."""
    test_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    """Lengths that validation scores separately; published up to 2^20."""

    @property
    def min_valid_length(self) -> int:
        return 3

    @property
    def symbols(self) -> list[str]:
        return [*(str(number) for number in range(self.num_answers)), "marker"]

    @property
    def num_answers(self) -> int:
        return self.vocab_size - 1

    def errors(self) -> dict[str, str]:
        errors = super().errors()
        if self.vocab_size < 3:
            errors["vocab_size"] = (
                f"must be at least 3 (the marker, two to tell apart), not {self.vocab_size}"
            )
        return errors

    def example(self, generator: np.random.Generator, length: int) -> Example:
        ids, labels = generator.integers(0, self.num_answers, length), unscored_labels(length)
        position = generator.integers(length - 2)
        labels[-1] = ids[position + 1]
        ids[position] = ids[-1] = self.num_answers
        return ids, labels


HAYSTACK = (
    b"The river runs past the mill. Birds sit in the old trees. A cart goes up the hill, "
    b"and in the evening it comes back. "
)
NEEDLE = b"The pass key is %s. Remember it. "
QUESTION = b"What is the pass key? The pass key is "


@dataclass(frozen=True, kw_only=True)
class Needle(FixedLength):
    """Needle in a haystack (pass-key retrieval, after Mohtashami and Jaggi, arXiv 2305.16300): digits in
    filler text.

    Texts are bytes.
    """

    length: int = 1024
    """Number of bytes of a training text."""
    num_digits: int = 5
    """Number of digits of the key."""
    test_lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Lengths that validation scores separately."""

    @property
    def min_valid_length(self) -> int:
        return len(NEEDLE % b"" + QUESTION) + 2 * self.num_digits - 1

    @property
    def symbols(self) -> list[str]:
        return [f"<0x{byte:02X}>" for byte in range(256)]

    @property
    def num_answers(self) -> int:
        return 10

    def errors(self) -> dict[str, str]:
        return super().errors() | (
            {} if self.num_digits > 0 else {"num_digits": f"must be at least 1, not {self.num_digits}"}
        )

    def example(self, generator: np.random.Generator, length: int) -> Example:
        digits = bytes(generator.integers(ord("0"), ord("9") + 1, self.num_digits).tolist())
        num_filler, first = length - self.min_valid_length, int(generator.integers(len(HAYSTACK)))
        filler = (HAYSTACK * (num_filler // len(HAYSTACK) + 2))[first : first + num_filler]
        depth = int(generator.integers(num_filler + 1))
        text = np.frombuffer(
            filler[:depth] + NEEDLE % digits + filler[depth:] + QUESTION + digits, np.uint8
        ).astype(np.int64)
        labels = unscored_labels(length)
        labels[-self.num_digits :] = text[-self.num_digits :]
        return text[:-1], labels

    def tokenizer(self) -> Any:
        return byte_tokenizer()
