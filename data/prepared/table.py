"""Documents of a prepared corpus as columns, so that a window of them takes no work for each document."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

import numpy as np

from ..sources import Document, PreparedText


@dataclass(frozen=True)
class Table(Sequence[Document]):
    """Consecutive documents of a part of a corpus, or some of them."""

    names: list[str]
    tokens: list[np.ndarray]
    """Of each text, without bos and eos; any unsigned integer type, read only."""
    indices: np.ndarray
    """Indices in the part, int64 [n]"""
    num_skipped: np.ndarray
    """Broken parts that were left out, integers [n]"""
    num_filtered: np.ndarray
    """Parts that `data.filter` left out, integers [n]"""
    is_left_out: np.ndarray
    """Whether nothing is left of the document, bool [n]"""
    num_bytes: np.ndarray
    """Of the text in UTF-8, integers [n]"""
    digest: np.ndarray
    """`hold_out.text_digest` of the text, uint64 [n]"""

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, key: int) -> Document: ...
    @overload
    def __getitem__(self, key: slice) -> "Table": ...
    def __getitem__(self, key: int | slice) -> "Document | Table":
        if isinstance(key, slice):
            return Table(*(column[key] for column in self._columns()))
        text = PreparedText(self.tokens[key], int(self.num_bytes[key]), int(self.digest[key]))
        return Document(
            None,
            self.names[key],
            int(self.indices[key]),
            int(self.num_skipped[key]),
            int(self.num_filtered[key]),
            prepared=None if self.is_left_out[key] else text,
        )

    def take(self, rows: np.ndarray) -> "Table":
        """These rows, int64 [k], in this order."""
        numbers = rows.tolist()
        names, tokens, *arrays = self._columns()
        return Table(
            [names[i] for i in numbers], [tokens[i] for i in numbers], *(array[rows] for array in arrays)
        )

    def _columns(self) -> tuple:
        return tuple(self.__dict__.values())


def joined(tables: Iterable[Table]) -> Table:
    """The documents of all tables, at least one."""
    names, tokens, *arrays = zip(*(table._columns() for table in tables), strict=True)
    return Table(
        list(chain.from_iterable(names)), list(chain.from_iterable(tokens)), *map(np.concatenate, arrays)
    )
