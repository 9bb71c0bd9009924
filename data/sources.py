"""Where documents come from. A source has shards; a shard is an ordered sequence of documents that can be read from any place.

    source.read(shard, start) -> Iterator[Record]       start = the `Place` of the first record wanted

Order never depends on the file system: paths are sorted. A place is a document's index within its shard and, where that finds it faster, a hint
(byte offset, state of a streamed dataset); both are JSON.
"""

import codecs
import difflib
import io
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from .errors import UserError


@dataclass(frozen=True)
class Place:
    """Where in a shard a document begins."""

    index: int = 0
    hint: Any = None


@dataclass(frozen=True)
class Record:
    """One document as it was found; `text` is None where it was broken and may be skipped."""

    text: str | None
    name: str
    """Where it came from, for messages: a path, path:line, or dataset[shard][index]; of a joined document, what was joined."""
    index: int
    num_skipped: int = 0
    """What was left out because it was broken: 1 for a document, more for parts of a joined one."""
    group: Any = None
    """Of a row: its value in the column that says which rows belong together (joined.py), if there is such a column."""


class Source(Protocol):
    """Documents in a fixed order, in shards."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        ...

    def read(self, shard: int, start: Place) -> Iterator[Record]:
        """Documents of a shard from `start` on."""
        ...

    def hint(self) -> Any:
        """The hint for the document that the latest `read` would yield next."""
        ...


def decode(data: bytes, name: str) -> str:
    """UTF-8 text without a byte order mark; `name` is used in the error."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            ("data.corpus", f"{name} is not UTF-8 (byte {error.start}); convert it, or set data.skip_broken to leave such documents out")
        ) from None


def is_text(value: Any) -> bool:
    """Whether this is a string of whole characters (JSON can hold half of a surrogate pair, which no tokenizer takes)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _broken(skip: bool, error: UserError, name: str, index: int) -> Record:
    """A record that is left out, if the user asked for that; otherwise the error."""
    if not skip:
        raise error
    return Record(None, name, index, num_skipped=1)


def _no_join_column(column: str, columns: Collection[str], name: str) -> UserError:
    """The error for rows that lack the column they are to be joined by."""
    near = difflib.get_close_matches(column, columns, n=3)
    advice = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(map(repr, columns))}"
    return UserError(("data.join", f"{name} has no column {column!r} ({advice})"))


def _group(row: Mapping[str, Any], column: str | None, name: str) -> Any:
    """What a row belongs to."""
    if column is None:
        return None
    if column not in row:
        raise _no_join_column(column, row.keys(), name)
    return row[column]


@dataclass
class TextFiles:
    """Each file is a document; one shard."""

    paths: list[Path]
    root: Path
    skip_broken: bool = False
    num_shards: int = field(default=1, init=False)

    def relative(self, path: Path) -> Path:
        """A file as it is named: below the root."""
        return path.relative_to(self.root) if path.is_relative_to(self.root) else path

    def read(self, shard: int, start: Place) -> Iterator[Record]:
        for index in range(start.index, len(self.paths)):
            path = self.paths[index]
            name = str(self.relative(path))
            try:
                yield Record(decode(path.read_bytes(), str(path)), name, index)
            except UserError as error:
                yield _broken(self.skip_broken, error, name, index)

    def hint(self) -> None:
        return None


def _open(path: Path) -> BinaryIO:
    """A file's bytes, decompressed; compressed files may have several parts, and one that was cut off is an OSError."""
    if path.suffix == ".jsonl":
        return path.open("rb")
    import pyarrow

    stream = pyarrow.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else "zstd")
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream)))


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except OSError as error:
        raise UserError(("data.corpus", f"{path} cannot be read to its end ({error}); is it a whole file?")) from None


@dataclass
class JsonLines:
    """Each line of a .jsonl file (plain, .gz or .zst) is a document; each file a shard. The hint is a byte offset in a plain file."""

    paths: list[Path]
    text_field: str
    skip_broken: bool = False
    group_field: str | None = None
    _offset: int | None = field(default=None, init=False)

    @property
    def num_shards(self) -> int:
        return len(self.paths)

    def read(self, shard: int, start: Place) -> Iterator[Record]:
        path = self.paths[shard]
        is_plain = path.suffix == ".jsonl"
        with _open(path) as file:
            index, self._offset = 0, 0 if is_plain else None
            if is_plain and start.hint is not None:
                file.seek(start.hint)
                index, self._offset = start.index, start.hint
            for line in _lines(file, path):
                if self._offset is not None:
                    self._offset += len(line)
                if index >= start.index and line.strip():
                    yield self._parse(line, f"{path}:{index + 1}", index)
                index += 1

    def _parse(self, line: bytes, name: str, index: int) -> Record:
        try:
            row = json.loads(decode(line, name))
        except UserError as error:
            return _broken(self.skip_broken, error, name, index)
        except (ValueError, RecursionError) as error:  # also numbers of too many digits, and nesting too deep
            problem = f"{name} is not JSON ({error})"
        else:
            if isinstance(row, dict) and is_text(row.get(self.text_field)):
                return Record(row[self.text_field], name, index, group=_group(row, self.group_field, name))
            fields = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
            problem = f"{name} has no text in field {self.text_field!r} (it has {fields}); set data.text_field"
        return _broken(self.skip_broken, UserError(("data.corpus", f"{problem}; or set data.skip_broken to leave it out")), name, index)

    def hint(self) -> int | None:
        return self._offset


@dataclass
class Parquet:
    """Each row is a document; each file a shard."""

    paths: list[Path]
    text_field: str
    skip_broken: bool = False
    group_field: str | None = None

    @property
    def num_shards(self) -> int:
        return len(self.paths)

    def read(self, shard: int, start: Place) -> Iterator[Record]:
        import pyarrow.parquet

        path = self.paths[shard]
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(("data.corpus", f"{path} is not a parquet file ({error})")) from None
        with file:
            names = file.schema_arrow.names
            if self.text_field not in names:
                columns = ", ".join(map(repr, names))
                raise UserError(("data.text_field", f"{path} has no column {self.text_field!r}; it has {columns}"))
            if self.group_field is not None and self.group_field not in names:
                raise _no_join_column(self.group_field, names, str(path))
            for key, column in (("data.text_field", self.text_field), ("data.join", self.group_field)):
                if names.count(column) > 1:
                    raise UserError((key, f"{path} has {names.count(column)} columns of the name {column!r}; give them different names"))
            wanted = [self.text_field] if self.group_field is None else [self.text_field, self.group_field]
            first = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if first + num_rows > start.index:
                    try:
                        table = file.read_row_group(group, columns=wanted)
                    except pyarrow.ArrowInvalid as error:  # cut short or changed since it was opened
                        raise UserError(("data.corpus", f"{path} cannot be read to its end ({error}); is it a whole file?")) from None
                    column = table.column(self.text_field)
                    groups = None if self.group_field is None else table.column(self.group_field)
                    for index in range(max(first, start.index), first + num_rows):
                        try:
                            text = column[index - first].as_py()
                        except UnicodeDecodeError:  # parquet does not promise UTF-8
                            text = column[index - first].cast(pyarrow.binary()).as_py()
                        value = None if groups is None else groups[index - first].as_py()
                        yield self._record(text, f"{path}[{index}]", index, value)
                first += num_rows

    def _record(self, text: Any, name: str, index: int, group: Any) -> Record:
        if is_text(text):
            return Record(text, name, index, group=group)
        problem = f"{name} holds no text in column {self.text_field!r} but {text!r:.40}; or set data.skip_broken to leave it out"
        return _broken(self.skip_broken, UserError(("data.corpus", problem)), name, index)

    def hint(self) -> None:
        return None


@dataclass
class HubDataset:
    """A dataset of the Hugging Face hub (or a local folder in its layout), streamed with `datasets`; its shards, its rows.

    The hint is the streamed dataset's own state, so that going on does not read a shard from its beginning.
    """

    path: str
    subset: str | None
    split: str
    revision: str | None
    text_field: str
    skip_broken: bool = False
    group_field: str | None = None
    _reading: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        from datasets import load_dataset

        try:
            self._dataset = load_dataset(self.path, self.subset, split=self.split, revision=self.revision, streaming=True)
        except Exception as error:  # datasets, the hub client and the file system each raise their own
            raise UserError(("data.corpus", f"cannot open the dataset {self.path!r} ({type(error).__name__}: {error})")) from error

    @property
    def num_shards(self) -> int:
        return self._dataset.num_shards

    def read(self, shard: int, start: Place) -> Iterator[Record]:
        self._reading = self._dataset.shard(self.num_shards, shard)
        index = 0
        if start.hint is not None:
            self._reading.load_state_dict(start.hint)
            index = start.index
        for row in self._reading:
            if index >= start.index:
                name = f"{self.path}[{shard}][{index}]"
                if is_text(row.get(self.text_field)):
                    yield Record(row[self.text_field], name, index, group=_group(row, self.group_field, name))
                else:
                    fields = ", ".join(map(repr, row))
                    problem = f"{name} has no text in field {self.text_field!r} (it has {fields}); set data.text_field"
                    yield _broken(self.skip_broken, UserError(("data.text_field", problem)), name, index)
            index += 1

    def hint(self) -> Any:
        return json.loads(json.dumps(self._reading.state_dict()))
