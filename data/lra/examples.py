"""Labelled examples on the disk: three arrays for each split, which are mapped into memory.

tokens-train.npy    uint8 [tokens]                  all texts, one after the other
offsets-train.npy   int64 [examples * towers + 1]   where each text begins
labels-train.npy    int64 [examples]
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "validation", "test")
ARRAYS = ("tokens", "offsets", "labels")
SUBSET_SEED = 0  # of the choice of a subset: the same for every run

Example = tuple[tuple[bytes, ...], int]
"""The tokens of each text of an example, and its label."""


@dataclass(frozen=True)
class Examples:
    """The examples of a split."""

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    towers: int
    """Texts of an example."""
    index: np.ndarray
    """int64 [n]: which of the stored examples these are."""

    def __len__(self) -> int:
        return len(self.index)

    def label(self, number: int) -> int:
        return int(self.labels[self.index[number]])

    def texts(self, number: int) -> list[np.ndarray]:
        """The tokens of each text of an example, uint8."""
        first = int(self.index[number]) * self.towers
        edges = self.offsets[first : first + self.towers + 1].tolist()
        return [self.tokens[low:high] for low, high in itertools.pairwise(edges)]

    def subset(self, count: int | None) -> "Examples":
        """`count` of the examples, chosen by a fixed seed, in their order; all with None."""
        if count is None or count >= len(self):
            return self
        chosen = np.random.default_rng(SUBSET_SEED).permutation(len(self))[:count]
        return Examples(self.tokens, self.offsets, self.labels, self.towers, self.index[np.sort(chosen)])


def read_examples(folder: Path, split: str, towers: int) -> Examples:
    """The examples of a split, mapped into memory."""
    arrays = (np.load(folder / f"{name}-{split}.npy", mmap_mode="r") for name in ARRAYS)
    tokens, offsets, labels = arrays
    return Examples(tokens, offsets, labels, towers, np.arange(len(labels)))


def write_examples(folder: Path, split: str, examples: Iterable[Example]) -> int:
    """Write the files of a split; returns the number of examples."""
    lengths, labels = [], []
    path = folder / f"tokens-{split}.raw"
    with path.open("wb") as file:
        for texts, label in examples:
            labels.append(label)
            for text in texts:
                file.write(text)
                lengths.append(len(text))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.lib.format.open_memmap(folder / f"tokens-{split}.npy", "w+", np.uint8, (int(offsets[-1]),))
    if len(tokens):
        tokens[:] = np.memmap(path, np.uint8, "r")
    tokens.flush()
    path.unlink()
    np.save(folder / f"offsets-{split}.npy", offsets)
    np.save(folder / f"labels-{split}.npy", np.array(labels, np.int64))
    return len(labels)
