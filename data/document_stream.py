"""Each reader's share of a corpus, and the order of its documents.

    Source (corpus.py) -> parts for training or validation (hold_out.py) -> parts of a reader (parts.py)
      -> permuted by (seed, epoch, reader)
      -> windows of W documents, each permuted by (seed, epoch, reader, window) -> documents

A window is the unit of position. Its address (epoch, number, shard, index, hint) is known before it is read,
and its k-th document is always the same. So a few numbers identify a document, and finding it again reads at
most W documents.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .corpus import CorpusSpec, Split, has_fixed_parts, open_source
from .hold_out import are_held_out, held_out_parts, is_held_out
from .parts import Shares, divide
from .prepared.source import PreparedCorpus
from .prepared.table import Table, joined
from .sources import Document, Part, Position


@dataclass(frozen=True)
class WindowAddress:
    """Where a window begins."""

    epoch: int = 0
    number: int = 0
    shard: int = 0
    """Place of the shard in the reader's order of the epoch, from 0."""
    index: int = 0
    hint: Any = None


@dataclass
class Window:
    """W documents (fewer at the end of an epoch) in the order in which they are read."""

    address: WindowAddress
    documents: list[Document] | Table
    next_address: WindowAddress
    num_skipped: int
    num_filtered: int = 0


def open_shares(spec: CorpusSpec, part: Split, num_readers: int) -> tuple[Shares, bool]:
    """What each reader reads of a part of a corpus, and whether its documents are those that `is_held_out`
    chooses.

    Raises:
        UserError: as `open_source`; `spec.hold_out` does not apply.
    """
    source = open_source(spec, part)
    parts = None
    is_split = part == "all" or has_fixed_parts(spec, source)
    if not is_split and (split := held_out_parts(source, spec.held_out, spec.hold_out)) is not None:
        parts = split[part == "validation"]
    shares = divide(
        source, list(map(Part, range(source.num_shards))) if parts is None else parts, num_readers
    )
    return shares, not is_split and parts is None


class DocumentStream:
    """A reader's share of a corpus as an endless stream of windows.

    Args:
        spec, part: the corpus and the part of it to read.
        reader, num_readers: which share of it (parts.py).
        window: documents per window.
        seed: of the permutations of shards and documents; None keeps the order of the corpus.
    """

    def __init__(
        self, spec: CorpusSpec, part: Split, reader: int, num_readers: int, window: int, seed: int | None
    ):
        self.spec, self.part, self.reader, self.num_readers = spec, part, reader, num_readers
        self.size, self.seed = window, seed
        self.shares, self._by_hash = open_shares(spec, part, num_readers)
        self.num_read = 0
        """Documents read so far, those of other parts of the corpus included."""
        self._documents: Iterator[Any] | None = None
        """Documents of the shard that is being read; tables of them if the corpus is prepared."""
        self._next: WindowAddress | None = None

    def window(self, address: WindowAddress) -> Window:
        """Read a window. The window after the previous one is read without seeking."""
        if address != self._next or self._documents is None:
            self._order = self._shards(address.epoch)
            self._shard, self._index = address.shard, address.index
            self._documents = self._read(Position(address.index, address.hint))
        is_prepared = isinstance(self.shares.source, PreparedCorpus)
        documents, num_skipped, num_filtered = self._take_table() if is_prepared else self._take_documents()
        if self._shard >= len(self._order):
            next_address, self._next = WindowAddress(address.epoch + 1), None
        else:
            next_address = self._next = replace(
                address,
                number=address.number + 1,
                shard=self._shard,
                index=self._index,
                hint=self.shares.hint(),
            )
        if self.seed is not None:
            generator = np.random.default_rng([self.seed, self.reader, address.epoch, address.number])
            order = generator.permutation(len(documents))
            documents = (
                documents.take(order) if isinstance(documents, Table) else [documents[i] for i in order]
            )
        return Window(address, documents, next_address, num_skipped, num_filtered)

    def _take_documents(self) -> tuple[list[Document], int, int]:
        """The next documents, at most a window, and the numbers of parts that were left out among them as
        broken and by `data.filter`."""
        assert self._documents is not None
        documents: list[Document] = []
        num_skipped = num_filtered = 0
        while len(documents) < self.size and self._shard < len(self._order):
            document = next(self._documents, None)
            if document is None:
                self._begin_next_shard()
                continue
            self._index, self.num_read = document.index + 1, self.num_read + 1
            num_skipped += document.num_skipped
            num_filtered += document.num_filtered
            if not document.is_left_out and self.is_in_part(document):
                documents.append(document)
        return documents, num_skipped, num_filtered

    def _take_table(self) -> tuple[Table | list[Document], int, int]:
        """As `_take_documents`, of a prepared corpus."""
        assert self._documents is not None
        tables: list[Table] = []
        num_taken = num_skipped = num_filtered = 0
        while num_taken < self.size and self._shard < len(self._order):
            table: Table | None = next(self._documents, None)
            if table is None:
                self._begin_next_shard()
                continue
            rows = np.flatnonzero(self._are_in_part(table))[: self.size - num_taken]
            num_taken += len(rows)
            end = int(rows[-1]) + 1 if num_taken == self.size else len(table)
            if end < len(table):
                self._documents = itertools.chain([table[end:]], self._documents)
            self._index, self.num_read = int(table.indices[end - 1]) + 1, self.num_read + end
            num_skipped += int(table.num_skipped[:end].sum())
            num_filtered += int(table.num_filtered[:end].sum())
            tables.append(table.take(rows))
        return joined(tables) if tables else [], num_skipped, num_filtered

    def _begin_next_shard(self) -> None:
        self._shard, self._index = self._shard + 1, 0
        self._documents = self._read(Position())

    @property
    def is_as_before(self) -> bool:
        """Whether the documents come in the order of the versions up to 0.2, which cut and shuffled no
        shards."""
        parts, num_shards = self.shares.owned[self.reader], self.shares.source.num_shards
        return len(parts) == 1 and parts[0].within is None and self.shares.num_parts == num_shards

    def _shards(self, epoch: int) -> list[Part]:
        """The reader's parts in the order in which they are read in an epoch."""
        parts = self.shares.owned[self.reader]
        if self.seed is None:
            return parts
        # five words: the generators of windows have four
        generator = np.random.default_rng([self.seed, self.reader, epoch, 0, 1])
        return [parts[i] for i in generator.permutation(len(parts))]

    def _read(self, position: Position) -> Iterator[Any]:
        """The documents of the current shard, or tables of them."""
        if self._shard >= len(self._order):  # a reader may own nothing
            return iter(())
        source, part = self.shares.source, self._order[self._shard]
        if isinstance(source, PreparedCorpus):
            return source.read_tables(part, position)
        return self.shares.read(part, position)

    def is_in_part(self, document: Document) -> bool:
        """Whether a document that is not left out belongs to the part that is read."""
        if not self._by_hash:
            return True
        text = document.prepared.digest if document.prepared else document.text or ""
        return is_held_out(text, self.spec.held_out) == (self.part == "validation")

    def _are_in_part(self, table: Table) -> np.ndarray:
        """Which documents of a table are not left out and belong to the part that is read, bool [n]."""
        if not self._by_hash:
            return ~table.is_left_out
        is_held_out = are_held_out(table.digest, self.spec.held_out)
        return ~table.is_left_out & (is_held_out == (self.part == "validation"))

    def one_epoch(self) -> Iterator[Document]:
        """Every document once."""
        address = WindowAddress()
        while address.epoch == 0:
            window = self.window(address)
            yield from window.documents
            address = window.next_address
