"""Local files whose rows are documents: JSON lines and CSV (parquet.py reads parquet). A file is a shard.

A plain JSON lines file can be cut at any byte: a line belongs to the part in which it begins. A compressed
file, and CSV, whose cells may hold line breaks, can only be read from their beginning.
"""

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..common.errors import UserError
from .files import (
    HEAD_BYTES,
    check_json_lines,
    compression,
    convert_read_errors,
    inner_suffix,
    is_damage_error,
    open_decompressed,
)
from .remote import RemotePath
from .row_filter import EVERY_ROW, RowRules
from .sources import (
    Document,
    Part,
    Position,
    damaged_file_error,
    decode_document,
    is_text,
    missing_join_column_error,
    row_document,
    skip_or_raise,
)

MIN_PART_BYTES = 1 << 20  # of JSON lines; shorter parts might hold no document
STREAM_BYTES = 1 << 28  # of files that are read as a stream: what a disk reads in about a second


@dataclass
class RowFiles(ABC):
    """Fields and methods that the sources of rows share. A RemotePath has the methods of Path."""

    paths: Sequence[Path]
    text_field: str
    skip_broken: bool = False
    group_field: str | None = None
    rules: RowRules = EVERY_ROW
    skips_unread: ClassVar[bool] = False

    @property
    def num_shards(self) -> int:
        return len(self.paths)

    @property
    def is_stream(self) -> bool:
        """Whether reading all of it takes long: remote files, and large ones."""
        if any(isinstance(path, RemotePath) for path in self.paths):
            return True
        return sum(path.stat().st_size for path in self.paths) >= STREAM_BYTES

    def cuts(self, shard: int) -> Sequence[int]:
        return 0, 1

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        return self.read_part(Part(shard), start)

    @abstractmethod
    def read_part(self, part: Part, start: Position) -> Iterator[Document]: ...

    @property
    def columns(self) -> list[str]:
        """The columns to read, each once."""
        return self.rules.columns(self.text_field, self.group_field)

    def _document(self, row: Any, name: str, index: int) -> Document:
        return row_document(row, name, index, self.text_field, self.group_field, self.rules, self.skip_broken)

    def _damaged_document(self, path: Path | str, error: Exception, index: int, problem: str) -> Document:
        """The document for content that cannot be read.

        A disk error is raised unchanged, since a retry may succeed.
        """
        if not is_damage_error(error):
            raise error
        return skip_or_raise(
            self.skip_broken, damaged_file_error(path, error, problem), f"{path}[{index}]", index
        )


@dataclass
class JsonLines(RowFiles):
    """JSON lines: each line of a file (plain, gzip or zstd) is a document.

    The hint of a plain file is a byte offset.
    """

    _offset: int | None = field(default=None, init=False)

    def cuts(self, shard: int) -> Sequence[int]:
        path = self.paths[shard]
        with convert_read_errors(path):
            size = path.stat().st_size
            if size < 2 * MIN_PART_BYTES or compression(path) is not None:
                return 0, size
        return [*range(0, size - MIN_PART_BYTES + 1, MIN_PART_BYTES), size]

    def read_part(self, part: Part, start: Position) -> Iterator[Document]:
        path, index = self.paths[part.shard], 0
        begin, end = part.within or (0, None)
        with convert_read_errors(path):
            is_plain = compression(path) is None
            with open_decompressed(path) as file:
                self._offset = 0 if is_plain else None
                if is_plain and start.hint is not None:
                    file.seek(start.hint)
                    index, self._offset = start.index, start.hint
                elif is_plain and begin > 0:
                    file.seek(begin - 1)  # a line that begins before the part belongs to the one before
                    self._offset = begin - 1 + len(file.readline())
                try:
                    if begin == 0 and start.hint is None and not self.skip_broken:
                        check_json_lines(file.peek(HEAD_BYTES), path)
                    while self._offset is None or end is None or self._offset < end:
                        line, offset = file.readline(), self._offset
                        if not line:
                            break
                        if offset is not None:
                            self._offset = offset + len(line)
                        if index >= start.index and part.has(index) and line.strip():
                            # the number of lines before a part is unknown
                            name = f"{path}:{index + 1}" if begin == 0 else f"{path}@{offset}"
                            yield self._parse(line, name, index)
                        index += 1
                except OSError as error:
                    document = self._damaged_document(path, error, index, f"is damaged after line {index}")
                    if index >= start.index and part.has(index):
                        yield document

    def _parse(self, line: bytes, name: str, index: int) -> Document:
        try:
            row = json.loads(decode_document(line, name))
        except UserError as error:
            return skip_or_raise(self.skip_broken, error, name, index)
        # includes numbers with too many digits and too deep nesting
        except (ValueError, RecursionError) as error:
            problem = f"{name} is not JSON ({error}); set data.skip_broken to leave such documents out"
            return skip_or_raise(self.skip_broken, UserError("data.corpus", problem), name, index)
        return self._document(row, name, index)

    def hint(self) -> int | None:
        return self._offset


@dataclass
class Csv(RowFiles):
    """CSV: each row of a .csv or .tsv file (plain, gzip or zstd) below its header is a document."""

    def read_part(self, part: Part, start: Position) -> Iterator[Document]:
        path, index = self.paths[part.shard], 0
        csv.field_size_limit(2**31 - 1)  # for the whole process; the default is too small for long documents
        delimiter = "\t" if inner_suffix(path) == ".tsv" else ","
        with convert_read_errors(path), open_decompressed(path) as file, _text_of(file) as text:
            rows = csv.reader(text, delimiter=delimiter)
            try:
                header = next(rows, [])
                if header:
                    check_columns(header, self.text_field, self.group_field, self.rules, path)
                for cells in rows:
                    if not cells:  # an empty line
                        continue
                    if index >= start.index and part.has(index):
                        yield self._row(header, cells, f"{path}[{index}]", index)
                    index += 1
            except (OSError, csv.Error) as error:
                reason = ValueError(str(error)) if isinstance(error, csv.Error) else error
                document = self._damaged_document(path, reason, index, f"is damaged after row {index}")
                if index >= start.index and part.has(index):
                    yield document

    def _row(self, header: list[str], cells: list[str], name: str, index: int) -> Document:
        if len(cells) != len(header):
            problem = (
                f"{name} has {len(cells)} cells, but the header has {len(header)}; "
                "quote cells that hold the delimiter or a line break"
            )
            advice = "set data.skip_broken to leave such rows out"
            return skip_or_raise(
                self.skip_broken, UserError("data.corpus", f"{problem}, or {advice}"), name, index
            )
        row: dict[str, Any] = dict(zip(header, cells, strict=True))
        for name_of_field in self.rules.fields(self.text_field):
            value = row[name_of_field]
            if not is_text(value):  # bytes that are not UTF-8 were read as surrogates
                row[name_of_field] = value.encode(errors="surrogateescape")
        return self._document(row, name, index)

    def hint(self) -> None:
        return None


def _text_of(file: io.BufferedReader) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def check_columns(
    columns: list[str], text_field: str, group_field: str | None, rules: RowRules, path: Path | str
) -> None:
    """Check that a file has the columns to read, each once.

    Raises:
        UserError: a column is missing or there are several of its name.
    """
    if rules.template is None and text_field not in columns:
        raise missing_column_error(text_field, columns, path)
    if group_field is not None and group_field not in columns:
        raise missing_join_column_error(group_field, columns, str(path))
    rules.check_columns(columns, str(path))
    check_unique(columns, rules.fields(text_field), group_field, path)


def python_value(cell: Any) -> Any:
    """The value of a pyarrow scalar. Text that is not UTF-8, which neither Arrow nor Parquet checks, is
    bytes."""
    import pyarrow

    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return cell.cast(pyarrow.binary()).as_py()


def missing_column_error(column: str, columns: list[str], path: Path | str) -> UserError:
    """The error for a file without the text column."""
    return UserError(
        "data.text_field", f"{path} has no column {column!r}; it has {', '.join(map(repr, columns))}"
    )


def check_unique(columns: list[str], fields: list[str], group_field: str | None, path: Path | str) -> None:
    """Check that no column to be read has a duplicate name.

    Raises:
        UserError: there are several columns of that name.
    """
    keys = [*(("data.text_field", field) for field in fields), ("data.join", group_field)]
    for key, column in keys:
        if columns.count(column or "") > 1:
            raise UserError(
                key,
                f"{path} has {columns.count(column or '')} columns of the name {column!r}; "
                "give them different names",
            )
