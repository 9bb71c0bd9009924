"""Sources of documents.

A source has shards; a shard is an ordered sequence of documents, readable from any position.

    source.read(shard, start) -> Iterator[Document]       start = the `Position` of the first document

The order never depends on the file system: paths are sorted. A position is the index of a document within its
shard and an optional hint that makes finding it faster (a byte offset, the state of a streamed dataset). Both
are JSON.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Position:
    """The position of a document in a shard."""

    index: int = 0
    hint: Any = None


@dataclass(frozen=True)
class Document:
    """One document; `text` is None if it is broken and broken documents are skipped."""

    text: str | None
    name: str
    """Its origin, for messages: a path, path:line, or dataset[shard][index]; for a joined document, what was
    joined.
    """
    index: int
    num_skipped: int = 0
    """Number of broken parts left out: 1 for a document, perhaps more for a joined one."""
    group: Any = None
    """The row's value in the column that rows are joined by (joined.py), if there is one."""
    is_cut: bool = False
    """Whether the text goes on after it (a passage of long_text.py), so that no <eos> follows."""


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


def damaged_file_error(path: Path, error: Exception, problem: str = "is damaged") -> UserError:
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


@dataclass
class TextFiles:
    """Text files: each file is a document; one shard."""

    paths: list[Path]
    root: Path
    skip_broken: bool = False
    num_shards: int = field(default=1, init=False)

    def relative(self, path: Path) -> Path:
        """A file's path relative to the root, as messages show it."""
        return path.relative_to(self.root) if path.is_relative_to(self.root) else path

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        for index in range(start.index, len(self.paths)):
            path = self.paths[index]
            name = str(self.relative(path))
            with convert_read_errors(path):
                try:
                    yield Document(self._text(path), name, index)
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


@dataclass
class HubDataset:
    """A dataset of the Hugging Face hub, or a local folder in its layout, streamed with `datasets`.

    Its shards are the dataset's, its documents the rows. The hint is the state of the streamed dataset, so
    resuming does not read a shard from its beginning.
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
            self._dataset = load_dataset(
                self.path, self.subset, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:  # datasets, the hub client and the file system each raise their own
            raise UserError(
                "data.corpus", f"cannot open the dataset {self.path!r} ({type(error).__name__}: {error})"
            ) from error

    @property
    def num_shards(self) -> int:
        return self._dataset.num_shards

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        self._reading = self._dataset.shard(self.num_shards, shard)
        index = 0
        if start.hint is not None:
            self._reading.load_state_dict(start.hint)
            index = start.index
        with convert_read_errors(f"{self.path}[{shard}]"):
            for row in self._reading:
                if index >= start.index:
                    name = f"{self.path}[{shard}][{index}]"
                    if is_text(row.get(self.text_field)):
                        yield Document(
                            row[self.text_field], name, index, group=group_value(row, self.group_field, name)
                        )
                    else:
                        yield skip_or_raise(
                            self.skip_broken, missing_text_error(row, self.text_field, name), name, index
                        )
                index += 1

    def hint(self) -> Any:
        return json.loads(json.dumps(self._reading.state_dict()))
