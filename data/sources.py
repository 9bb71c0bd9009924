"""Sources of documents.

A source has shards; a shard is an ordered sequence of documents, readable from any position.

    source.read(shard, start) -> Iterator[Document]       start = the `Position` of the first document
    source.read_part(part, start) -> Iterator[Document]   a `Part` of a shard, without reading the rest of it

The order never depends on the file system: paths are sorted. A position is the index of a document within its
shard and an optional hint that makes finding it faster (a byte offset, the state of a streamed dataset). Both
are JSON. parts.py divides the shards of a source among readers.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..common.errors import UserError, one_line_message
from ..common.names import did_you_mean, nearest_names
from .files import (
    HEAD_BYTES,
    binary_file_error,
    binary_format,
    convert_read_errors,
    is_damage_error,
    open_decompressed,
)
from .row_filter import EVERY_ROW, RowRules

Split = Literal["train", "validation", "all"]  # a part of a corpus: to train on, held out, or both


@dataclass(frozen=True)
class Position:
    """The position of a document in a shard."""

    index: int = 0
    hint: Any = None


class PreparedText(NamedTuple):
    """What a prepared corpus holds of a text."""

    tokens: np.ndarray
    """Of the text, without bos and eos; any unsigned integer type, read only."""
    num_bytes: int
    """Of the text in UTF-8."""
    digest: int
    """`hold_out.text_digest` of the text."""


@dataclass(slots=True)  # frozen takes four times as long to make
class Document:
    """One document. It has a text, or what a prepared corpus holds of it; neither if it is broken and broken
    documents are skipped."""

    text: str | None
    name: str
    """Its origin, for messages: a path, path:line, or dataset[shard][index]; for a joined document, what was
    joined.
    """
    index: int
    num_skipped: int = 0
    """Number of broken parts left out: 1 for a document, perhaps more for a joined one."""
    num_filtered: int = 0
    """Number of parts that `data.filter` left out; `text` is None if nothing is left."""
    group: Any = None
    """The row's value in the column that rows are joined by (joined.py), if there is one."""
    prepared: PreparedText | None = None
    is_cut: bool = False
    """Whether the text goes on after it (a passage of long_text.py), so that no <eos> follows."""

    @property
    def is_left_out(self) -> bool:
        """Whether nothing is left to read."""
        return self.text is None and self.prepared is None

    @property
    def num_bytes(self) -> int:
        """Bytes of the text in UTF-8: the divisor of bits per byte."""
        return len((self.text or "").encode()) if self.prepared is None else self.prepared.num_bytes


@dataclass(frozen=True)
class Part:
    """A part of a shard; by default the whole shard."""

    shard: int
    within: tuple[int, int] | None = None
    """Where the part begins and ends: two of the shard's `cuts`. None: the whole shard."""
    first: int = 0
    step: int = 1
    """Of these documents, those whose index has the remainder `first` when divided by `step`."""

    def has(self, index: int) -> bool:
        """Whether the document with this index belongs to the part, as far as `first` and `step` say."""
        return index % self.step == self.first


class Source(Protocol):
    """Documents in shards, in a fixed order."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        ...

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        """Documents of a shard from `start` on."""
        ...

    def hint(self) -> Any:
        """The hint for the document that the latest `read` would yield next."""
        ...


@runtime_checkable
class DivisibleSource(Protocol):
    """A source that can read parts of its shards; any other source is divided by reading whole shards."""

    skips_unread: bool
    """Whether documents are left out (`Part.step`) without reading them."""

    def cuts(self, shard: int) -> Sequence[int]:
        """Where a shard can be cut, increasing, from its beginning to its end (at least those two)."""
        ...

    def read_part(self, part: Part, start: Position) -> Iterator[Document]:
        """Documents of a part from `start` on.

        An index counts the documents of the whole shard, or those of the part if the number of documents
        before it is unknown.
        """
        ...


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8 without a byte order mark.

    Raises:
        UnicodeDecodeError: its `start` counts from the first byte of `data`.
    """
    return data.decode("utf-8").removeprefix("\ufeff")


def decode_document(data: bytes, name: str) -> str:
    """Decode UTF-8 without a byte order mark; errors name the document.

    Raises:
        UserError: the data is not UTF-8.
    """
    try:
        return decode_utf8(data)
    except UnicodeDecodeError as error:
        raise UserError(
            "data.corpus",
            f"{name} is not UTF-8 (byte {error.start}); "
            "convert it, or set data.skip_broken to leave such documents out",
        ) from None


def is_text(value: Any) -> bool:
    """Whether a value is a string that can be encoded.

    JSON can hold a lone surrogate, which no tokenizer accepts.
    """
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def missing_text_error(row: Any, text_field: str, name: str) -> UserError:
    """The error for a row without text."""
    skip = "set data.skip_broken to leave such documents out"
    if not isinstance(row, Mapping):
        return UserError(
            "data.corpus",
            f"{name} is a {type(row).__name__}, not an object with a field {text_field!r}; {skip}",
        )
    if text_field not in row:
        fields = ", ".join(map(repr, row))
        return UserError(
            "data.text_field",
            f"{name} has no field {text_field!r}, it has {fields}; set data.text_field, or {skip}",
        )
    value = row[text_field]
    if isinstance(value, str):
        problem = "half of a surrogate pair, which is no character,"
    elif isinstance(value, bytes):
        problem = "bytes"
    else:
        problem = "null" if value is None else f"{value!r:.40} ({type(value).__name__})"
        skip = f"set data.text_field to a field of text, or {skip}"
    return UserError("data.corpus", f"{name} holds {problem} in field {text_field!r} instead of text; {skip}")


def damaged_file_error(path: Path | str, error: Exception, problem: str = "is damaged") -> UserError:
    """The error for a file whose content is damaged; `problem` says where ("is damaged in row group 3")."""
    advice = "fetch it again, or set data.skip_broken to leave the damaged part out"
    return UserError("data.corpus", f"{path} {problem} ({one_line_message(error)}); {advice}")


def skip_or_raise(skip: bool, error: UserError, name: str, index: int) -> Document:
    """A document marked as skipped if `skip` is set; otherwise the error is raised."""
    if not skip:
        raise error
    return Document(None, name, index, num_skipped=1)


def missing_join_column_error(column: str, columns: Collection[str], name: str) -> UserError:
    """The error for rows without the column that they are to be joined by."""
    suggested = map(repr, nearest_names(column, columns, count=3))
    advice = did_you_mean(suggested, otherwise=f"it has {', '.join(map(repr, columns))}")
    return UserError("data.join", f"{name} has no column {column!r} ({advice})")


def group_value(row: Mapping[str, Any], column: str | None, name: str) -> Any:
    """The row's value in the column to join by."""
    if column is None:
        return None
    if column not in row:
        raise missing_join_column_error(column, row.keys(), name)
    return row[column]


def row_document(
    row: Any,
    name: str,
    index: int,
    text_field: str,
    group_field: str | None,
    rules: RowRules,
    skip_broken: bool,
) -> Document:
    """The document of a row, or what is left of a broken one or one that `data.filter` leaves out.

    Raises:
        UserError: the row is broken, or lacks a field that the recipe names.
    """
    try:
        if rules.template is not None and isinstance(row, Mapping):
            text = rules.template.text(row, name)
        elif isinstance(row, Mapping) and is_text(row.get(text_field)):
            text = row[text_field]
        else:
            raise missing_text_error(row, text_field, name)
        passes = rules.passes_fields(row, name) and rules.passes_length(text)
    except UserError as error:
        return skip_or_raise(skip_broken, error, name, index)
    group = group_value(row, group_field, name)
    return Document(text if passes else None, name, index, num_filtered=int(not passes), group=group)


@dataclass
class TextFiles:
    """Text files: each file is a document; one shard, which can be cut between files."""

    paths: list[Path]
    root: Path
    skip_broken: bool = False
    rules: RowRules = EVERY_ROW
    num_shards: int = field(default=1, init=False)
    skips_unread: ClassVar[bool] = True

    def relative(self, path: Path) -> Path:
        """A file's path relative to the root, as messages show it."""
        return path.relative_to(self.root) if path.is_relative_to(self.root) else path

    def cuts(self, shard: int) -> range:
        return range(len(self.paths) + 1)

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        return self.read_part(Part(shard), start)

    def read_part(self, part: Part, start: Position) -> Iterator[Document]:
        begin, end = part.within or (0, len(self.paths))
        for index in filter(part.has, range(max(begin, start.index), end)):
            path = self.paths[index]
            name = str(self.relative(path))
            with convert_read_errors(path):
                try:
                    text = self._text(path)
                    passes = self.rules.passes_length(text)
                    yield Document(text if passes else None, name, index, num_filtered=int(not passes))
                except UserError as error:
                    yield skip_or_raise(self.skip_broken, error, name, index)

    def _text(self, path: Path) -> str:
        try:
            with open_decompressed(path) as file:
                data = file.read()
        except OSError as error:
            raise damaged_file_error(path, error) if is_damage_error(error) else error from None
        if binary_format(data[:HEAD_BYTES]) is not None:
            raise binary_file_error(path, data[:HEAD_BYTES])
        return decode_document(data, str(path))

    def hint(self) -> None:
        return None
