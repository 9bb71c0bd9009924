"""A prepared corpus as a source: the documents of the corpus that it was made of, as tokens.

Shards, indices, names and hashes of the texts are those of the original corpus. So windows, the order of the
documents, what is held out and every chunk are the same, and a position in one is a position in the other.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...common.errors import UserError
from ...common.files import user_path
from ..files import convert_read_errors
from ..sources import Document, Part, Position
from .manifest import check_source_fields, read_manifest, shard_name
from .table import Table

if TYPE_CHECKING:
    from ..corpus import CorpusSpec, Split


class _Shard:
    """The documents of a memory-mapped shard that belong to a part of the corpus.

    The system may drop mapped pages at any time, so they cost no memory that others need.

    Args:
        validation: whether to keep the documents that files hold out, or the others; None keeps all.
    """

    def __init__(self, path: Path, validation: bool | None):
        import pyarrow as pa

        try:
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        except pa.ArrowInvalid as error:
            advice = "run the same minrnn prepare command with --verify, which makes damaged shards anew"
            raise UserError("data.corpus", f"{path} is damaged ({error}); {advice}") from None
        self._starts = np.cumsum([0, *map(len, self._batches)])  # the first row of each batch
        if validation is None:
            self.rows = np.arange(self._starts[-1])
            self.index, self.place = self._column("index"), self._column("place")
        else:  # the source of such a part lists its own files only
            self.rows = np.flatnonzero(self._column("is_validation") == validation)
            self.index = self.place = np.arange(len(self.rows))

    def _column(self, name: str) -> np.ndarray:
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def tables(self, chosen: np.ndarray, index: np.ndarray) -> Iterator[Table]:
        """Documents, by their positions in `index`, int64 increasing; a table for each batch of the file.

        Args:
            index: of each in the part that is read, int64.
        """
        import pyarrow as pa

        columns = ("num_skipped", "num_filtered", "is_left_out", "num_bytes", "digest")
        rows = self.rows[chosen]
        edges = np.searchsorted(rows, self._starts)
        for number in np.flatnonzero(np.diff(edges)):
            batch, of_batch = self._batches[number], slice(edges[number], edges[number + 1])
            offsets = rows[of_batch] - self._starts[number]
            picked = pa.array(offsets)
            tokens = batch.column("tokens")
            values, ends = tokens.values.to_numpy(), tokens.offsets.to_numpy()
            begins, stops = ends[offsets].tolist(), ends[offsets + 1].tolist()
            yield Table(
                batch.column("name").take(picked).to_pylist(),
                [values[begin:stop] for begin, stop in zip(begins, stops, strict=True)],
                index[of_batch],
                *(batch.column(name).take(picked).to_numpy(zero_copy_only=False) for name in columns),
            )


@dataclass
class PreparedCorpus:
    """The documents of a part of a prepared corpus, as tokens.

    It is divided among readers as the original corpus is (places.py).

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

    @property
    def is_stream(self) -> bool:
        """Whether the original takes long to read, which decides how documents are held out."""
        return self.manifest["is_stream"]

    @property
    def skips_unread(self) -> bool:
        """As of the original, whose readers then share a shard document by document."""
        return self.manifest["skips_unread"]

    def cuts(self, shard: int) -> Sequence[int]:
        if self.has_fixed_parts and self.part != "all":
            return range(len(self._open(shard).rows) + 1)
        cuts = self.manifest["shards"][shard]["cuts"]
        return range(cuts + 1) if isinstance(cuts, int) else cuts

    def _open(self, shard: int) -> _Shard:
        if self._opened is None or self._opened[0] != shard:
            path = self.folder / shard_name(shard)
            is_split = self.has_fixed_parts and self.part != "all"
            with convert_read_errors(path):
                self._opened = shard, _Shard(path, self.part == "validation" if is_split else None)
        return self._opened[1]

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        return self.read_part(Part(shard), start)

    def read_part(self, part: Part, start: Position) -> Iterator[Document]:
        return itertools.chain.from_iterable(self.read_tables(part, start))

    def read_tables(self, part: Part, start: Position) -> Iterator[Table]:
        """As `read_part`, in tables."""
        opened = self._open(part.shard)
        first, last, lines_before = 0, len(opened.index), 0
        if part.within is not None:
            first, last = np.searchsorted(opened.place, part.within).tolist()
            lines_before = self._lines_before(part)
        index = opened.index[first:last] - lines_before
        chosen = np.flatnonzero((index >= start.index) & (index % part.step == part.first))
        places = iter(opened.place[chosen + first].tolist())
        with convert_read_errors(self.folder / shard_name(part.shard)):
            for table in opened.tables(chosen + first, index[chosen]):
                if lines_before:  # as in a part of JSON lines, where the number of the line is unknown
                    names = [f"{name.rpartition(':')[0]}@{next(places)}" for name in table.names]
                    table = dataclasses.replace(table, names=names)
                yield table

    def _lines_before(self, part: Part) -> int:
        """What is subtracted from indices in the shard for those in a part."""
        lines_before = self.manifest["shards"][part.shard]["lines_before"]
        if lines_before is None or part.within is None:
            return 0
        return lines_before[self.cuts(part.shard).index(part.within[0])]

    def hint(self) -> None:
        return None
