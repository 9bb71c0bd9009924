"""A prepared corpus as a source: the documents of the corpus that it was made of, as tokens.

Shards, indices, names and hashes of the texts are those of the original corpus. So windows, the order of the
documents, what is held out and every chunk are the same, and a position in one is a position in the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...common.errors import UserError
from ...common.files import user_path
from ..files import convert_read_errors
from ..sources import Document, Position, PreparedText
from .manifest import check_source_fields, read_manifest, shard_name

if TYPE_CHECKING:
    from ..corpus import CorpusSpec, Split


class _Shard:
    """A memory-mapped shard."""

    def __init__(self, path: Path):
        import pyarrow as pa

        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
        except pa.ArrowInvalid as error:
            advice = "run the same minrnn prepare command with --verify, which makes damaged shards anew"
            raise UserError("data.corpus", f"{path} is damaged ({error}); {advice}") from None
        self.index = self._column("index")
        self.is_validation = self._column("is_validation")
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])  # first row of each batch

    def _column(self, name: str) -> np.ndarray:
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def rows(self, start: int) -> Iterator[tuple[int, str, int, bool, PreparedText]]:
        """(row, name, number of skipped parts, whether it is broken, text) of each document from a row on."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for number in range(first, len(self._batches)):
            batch, row = self._batches[number], max(start, int(self._starts[number]))
            offset = row - int(self._starts[number])
            lists = batch.column("tokens")
            values, ends = lists.values.to_numpy(), lists.offsets.to_numpy()
            columns = ("name", "num_skipped", "is_broken", "num_bytes", "digest")
            lists_of = [batch.column(column).slice(offset).to_pylist() for column in columns]
            for i, (name, num_skipped, is_broken, num_bytes, digest) in enumerate(
                zip(*lists_of, strict=True), offset
            ):
                text = PreparedText(values[ends[i] : ends[i + 1]], num_bytes, digest)
                yield row, name, num_skipped, is_broken, text
                row += 1


@dataclass
class PreparedCorpus:
    """The documents of a part of a prepared corpus, as tokens.

    Args:
        spec: `corpus` is the folder; settings of the original corpus are left out, or equal to those it was
            prepared with.
        part: which documents to read, if files decide what is held out; else all are read.

    Raises:
        UserError: the corpus is unfinished, damaged, or was prepared with other settings.
    """

    spec: "CorpusSpec"
    part: "Split" = "train"
    _opened: tuple[int, _Shard] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.folder = user_path(self.spec.corpus)
        self.manifest: dict[str, Any] = read_manifest(self.folder)
        check_source_fields(self.spec, self.manifest)

    @property
    def num_shards(self) -> int:
        return len(self.manifest["shards"])

    @property
    def has_fixed_parts(self) -> bool:
        """Whether files, not hashes of texts, decide what is held out."""
        return self.manifest["fixed_parts"]

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        path = self.folder / shard_name(shard)
        with convert_read_errors(path):
            if self._opened is None or self._opened[0] != shard:
                self._opened = shard, _Shard(path)
            opened = self._opened[1]
            if not self.has_fixed_parts or self.part == "all":
                row = int(np.searchsorted(opened.index, start.index))
                for number, name, num_skipped, is_broken, text in opened.rows(row):
                    index = int(opened.index[number])
                    yield Document(None, name, index, num_skipped, None, None if is_broken else text)
                return
            chosen = np.flatnonzero(opened.is_validation == (self.part == "validation"))
            if start.index >= len(chosen):
                return
            index = start.index
            for number, name, num_skipped, is_broken, text in opened.rows(int(chosen[index])):
                if number == chosen[index]:
                    yield Document(None, name, index, num_skipped, None, None if is_broken else text)
                    index += 1
                    if index == len(chosen):
                        return

    def hint(self) -> None:
        return None
