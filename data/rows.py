"""Local files whose rows are documents: JSON lines, CSV and Parquet. Each file is a shard."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from .row_filter import EVERY_ROW, RowRules
from .sources import (
    Document,
    Position,
    damaged_file_error,
    decode_document,
    is_text,
    missing_join_column_error,
    row_document,
    skip_or_raise,
)


@dataclass
class _RowFiles:
    """Fields and methods that the sources of this module share."""

    paths: list[Path]
    text_field: str
    skip_broken: bool = False
    group_field: str | None = None
    rules: RowRules = EVERY_ROW

    @property
    def num_shards(self) -> int:
        return len(self.paths)

    def _document(self, row: Any, name: str, index: int) -> Document:
        return row_document(row, name, index, self.text_field, self.group_field, self.rules, self.skip_broken)

    def _damaged_document(self, path: Path, error: Exception, index: int, problem: str) -> Document:
        """The document for content that cannot be read.

        A disk error is raised unchanged, since a retry may succeed.
        """
        if not is_damage_error(error):
            raise error
        return skip_or_raise(
            self.skip_broken, damaged_file_error(path, error, problem), f"{path}[{index}]", index
        )


@dataclass
class JsonLines(_RowFiles):
    """JSON lines: each line of a file (plain, gzip or zstd) is a document.

    The hint of a plain file is a byte offset.
    """

    _offset: int | None = field(default=None, init=False)

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        path, index = self.paths[shard], 0
        with convert_read_errors(path):
            is_plain = compression(path) is None
            with open_decompressed(path) as file:
                self._offset = 0 if is_plain else None
                if is_plain and start.hint is not None:
                    file.seek(start.hint)
                    index, self._offset = start.index, start.hint
                try:
                    if index == 0 and not self.skip_broken:
                        check_json_lines(file.peek(HEAD_BYTES), path)
                    for line in file:
                        if self._offset is not None:
                            self._offset += len(line)
                        if index >= start.index and line.strip():
                            yield self._parse(line, f"{path}:{index + 1}", index)
                        index += 1
                except OSError as error:
                    document = self._damaged_document(path, error, index, f"is damaged after line {index}")
                    if index >= start.index:
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
class Csv(_RowFiles):
    """CSV: each row of a .csv or .tsv file (plain, gzip or zstd) below its header is a document."""

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        path, index = self.paths[shard], 0
        csv.field_size_limit(2**31 - 1)  # for the whole process; the default is too small for long documents
        delimiter = "\t" if inner_suffix(path) == ".tsv" else ","
        with convert_read_errors(path), open_decompressed(path) as file, _text_of(file) as text:
            rows = csv.reader(text, delimiter=delimiter)
            try:
                header = next(rows, [])
                self._check_header(header, path)
                for cells in rows:
                    if not cells:  # an empty line
                        continue
                    if index >= start.index:
                        yield self._row(header, cells, f"{path}[{index}]", index)
                    index += 1
            except (OSError, csv.Error) as error:
                reason = ValueError(str(error)) if isinstance(error, csv.Error) else error
                document = self._damaged_document(path, reason, index, f"is damaged after row {index}")
                if index >= start.index:
                    yield document

    def _check_header(self, header: list[str], path: Path) -> None:
        if header:
            check_columns(header, self.text_field, self.group_field, self.rules, path)

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
    columns: list[str], text_field: str, group_field: str | None, rules: RowRules, path: Path
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


def missing_column_error(column: str, columns: list[str], path: Path) -> UserError:
    """The error for a file without the text column."""
    return UserError(
        "data.text_field", f"{path} has no column {column!r}; it has {', '.join(map(repr, columns))}"
    )


def check_unique(columns: list[str], fields: list[str], group_field: str | None, path: Path) -> None:
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


@dataclass
class Parquet(_RowFiles):
    """Parquet: each row is a document. A damaged row group is reported, or skipped with all its rows."""

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        import pyarrow.parquet

        path = self.paths[shard]
        with convert_read_errors(path):
            source: Any = path
            if isinstance(path, Path):
                path.open("rb").close()  # raises the system's own error, if any
            else:
                source = path.open_exact()
            try:
                # pre_buffer joins neighbouring column chunks into one read
                file = pyarrow.parquet.ParquetFile(
                    source, page_checksum_verification=True, pre_buffer=source is not path
                )
            except (OSError, pyarrow.ArrowInvalid) as error:
                document = self._damaged_document(path, error, 0, "is not a parquet file, or not a whole one")
                if start.index == 0:
                    yield document
                return
            with file:
                columns = file.schema_arrow.names
                check_columns(columns, self.text_field, self.group_field, self.rules, path)
                first = 0
                for group in range(file.num_row_groups):
                    end = first + file.metadata.row_group(group).num_rows
                    if end > start.index:
                        yield from self._row_group(file, group, range(first, end), start.index, path)
                    first = end

    def _row_group(self, file: Any, group: int, rows: range, start: int, path: Path) -> Iterator[Document]:
        import pyarrow

        fields = self.rules.fields(self.text_field)
        names = fields if self.group_field in (None, *fields) else [*fields, self.group_field]
        try:
            table = file.read_row_group(group, columns=names)
            if len(table) != len(rows):
                raise ValueError(f"{len(table)} rows instead of {len(rows)}")
        except (OSError, ValueError) as error:  # truncated, changed since it was opened, or corrupted
            problem = f"is damaged in row group {group}, rows {rows.start} to {rows.stop - 1}"
            for index in range(max(rows.start, start), rows.stop):
                yield self._damaged_document(path, error, index, problem)
            return
        columns = [table.column(name) for name in names]
        for index in range(max(rows.start, start), rows.stop):
            values = []
            for column in columns:
                try:
                    values.append(column[index - rows.start].as_py())
                except UnicodeDecodeError:  # Parquet does not guarantee UTF-8
                    values.append(column[index - rows.start].cast(pyarrow.binary()).as_py())
            yield self._document(dict(zip(names, values, strict=True)), f"{path}[{index}]", index)

    def hint(self) -> None:
        return None
