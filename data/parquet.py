"""Parquet files, local or remote: each row is a document, and a file can be cut between its row groups.

A row group is decoded in batches of rows, so a group of two million rows needs the memory of one batch. The
index of a row counts from the beginning of its file, also in a part of it.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from .files import convert_read_errors, open_binary
from .remote import RemotePath
from .rows import RowFiles, check_columns, python_value
from .sources import Document, Part, Position

READ_BYTES, REMOTE_READ_BYTES = 1 << 20, 1 << 23  # of one read from a column of a row group
BATCH_BYTES = 8 << 20  # of the text column in a batch, about
BATCH_ROWS = 1024  # at most


@dataclass(frozen=True)
class _RowGroup:
    number: int
    rows: range
    num_bytes: int
    """Of the columns to read, decoded."""


@dataclass
class Parquet(RowFiles):
    """Parquet: each row is a document.

    Damage is reported, or skipped with the row group's rows from the damaged batch on.
    """

    def cuts(self, shard: int) -> range:
        """Numbers of the row groups; a file that cannot be opened is not cut."""
        path = self.paths[shard]
        with convert_read_errors(path):
            metadata = metadata_of(path)
        return range((1 if metadata is None else max(metadata.num_row_groups, 1)) + 1)

    def read_part(self, part: Part, start: Position) -> Iterator[Document]:
        import pyarrow.parquet

        path = self.paths[part.shard]
        with convert_read_errors(path), contextlib.closing(open_binary(path)) as stream:
            try:
                file = pyarrow.parquet.ParquetFile(
                    stream,
                    metadata=metadata_of(path),
                    page_checksum_verification=True,
                    buffer_size=REMOTE_READ_BYTES if isinstance(path, RemotePath) else READ_BYTES,
                    pre_buffer=False,
                )
            except (OSError, pyarrow.ArrowInvalid) as error:
                document = self._damaged_document(path, error, 0, "is not a parquet file, or not a whole one")
                if start.index == 0 and part.has(0):
                    yield document
                return
            with file:
                names = file.schema_arrow.names
                check_columns(names, self.text_field, self.group_field, self.rules, path)
                for group in self._row_groups(file, part):
                    if group.rows.stop > start.index:
                        yield from self._read_group(file, group, part, start.index)

    def _row_groups(self, file: Any, part: Part) -> Iterator[_RowGroup]:
        metadata = file.metadata
        starts = row_starts(metadata)
        for number in range(*(part.within or (0, metadata.num_row_groups))):
            group = metadata.row_group(number)
            columns = map(group.column, range(group.num_columns))
            num_bytes = sum(
                column.total_uncompressed_size
                for column in columns
                if column.path_in_schema.split(".")[0] in self.columns
            )
            yield _RowGroup(number, range(starts[number], starts[number + 1]), num_bytes)

    def _read_group(self, file: Any, group: _RowGroup, part: Part, start: int) -> Iterator[Document]:
        path, columns, index = self.paths[part.shard], self.columns, group.rows.start
        batch_rows = BATCH_BYTES * len(group.rows) // max(group.num_bytes, 1)
        batches = file.iter_batches(
            min(max(batch_rows, 1), BATCH_ROWS), [group.number], columns, use_threads=False
        )
        try:
            for batch in batches:
                values = [batch.column(name) for name in columns]
                for row in range(max(start - index, 0), len(batch)):
                    if part.has(index + row):
                        texts = [python_value(column[row]) for column in values]
                        cells = dict(zip(columns, texts, strict=True))
                        yield self._document(cells, f"{path}[{index + row}]", index + row)
                index += len(batch)
            if index != group.rows.stop:
                raise ValueError(f"{index - group.rows.start} rows instead of {len(group.rows)}")
        except UserError:  # of a row, not of the file; it is a ValueError
            raise
        except (OSError, ValueError) as error:  # truncated, changed since it was opened, or corrupted
            rows = f"rows {index} to {group.rows.stop - 1}"
            for number in range(index, group.rows.stop):
                document = self._damaged_document(
                    path, error, number, f"is damaged in row group {group.number}, {rows}"
                )
                if number >= start and part.has(number):
                    yield document

    def hint(self) -> None:
        return None


def row_starts(metadata: Any) -> list[int]:
    """The index of the first row of each row group, and the number of rows."""
    sizes = (metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
    return list(accumulate(sizes, initial=0))


def _version_of(path: Path) -> tuple[int, int]:
    """What changes when a local file is written again."""
    if isinstance(path, RemotePath):  # a change stops its reading
        return 0, 0
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def metadata_of(path: Path) -> Any:
    """The metadata of a file; None if it is not a parquet file."""
    return _metadata_of(path, *_version_of(path))


@functools.lru_cache(maxsize=64)  # all readers of a process ask for the files that are cut
def _metadata_of(path: Path, size: int, modified: int) -> Any:
    import pyarrow.parquet

    with contextlib.closing(open_binary(path)) as stream:
        try:
            return pyarrow.parquet.read_metadata(stream)
        except pyarrow.ArrowInvalid:  # reading it reports the damage
            return None
