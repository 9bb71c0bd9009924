"""Joins short documents to long ones: the files of a folder, or rows that belong together.

    files, by path                    -> groups, known before a file is read    -> documents
    rows of a shard, in their order   -> runs of rows with the same value       -> documents

The parts of a document are concatenated. A newline is inserted only after a part that does not end in one and
is followed by another. Empty parts add nothing. With `data.skip_broken`, a broken part is left out of its
document and counted.

Everything downstream treats joined documents as ordinary ones: an index counts joined documents, readers
share those, and the hash of the joined text decides what is held out. A group of rows ends only where the
next group begins, so that row has to be read. The hint of a joined document is therefore the position of an
earlier row (the second of the previous group) and the index of the row where the group begins. Resuming reads
the previous group again. A shard of joined rows cannot be cut, since a cut might go through a document.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..common.errors import UserError
from .sources import Document, Part, Position, Source, TextFiles

# how files are joined; any other value of data.join is a column of rows
FOLDER, PACKAGE = "folder", "package"


def joined_text(parts: Iterable[str]) -> str:
    """Concatenate the parts, with a newline after each part but the last that does not end in one."""
    *before, last = [part for part in parts if part] or [""]
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in before) + last


def _joined(parts: list[Document], name: str, index: int) -> Document:
    """Join the parts of a document; the result is broken if all of them are."""
    texts = [part.text for part in parts if part.text is not None]
    return Document(
        joined_text(texts) if texts else None,
        name,
        index,
        num_skipped=sum(part.num_skipped for part in parts),
        num_filtered=sum(part.num_filtered for part in parts),
    )


def _count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


@dataclass
class JoinedFiles:
    """Joins the files of one folder (`folder`), or below one subfolder of the root (`package`), in path
    order.

    A file directly in the root stays a document of its own. Documents are ordered by their first files.
    """

    files: TextFiles
    join: str
    num_shards: int = field(default=1, init=False)
    skips_unread: ClassVar[bool] = True

    def __post_init__(self) -> None:
        groups: dict[Path, list[int]] = {}
        for index, path in enumerate(self.files.paths):
            relative = self.files.relative(path)
            *folders, _ = relative.parts
            group = relative if not folders else Path(folders[0]) if self.join == PACKAGE else relative.parent
            groups.setdefault(group, []).append(index)
        self.groups = list(groups.items())
        """For each document, what is joined and the indices of its files."""

    @property
    def group_paths(self) -> list[Path]:
        """For each document, the folder whose files it joins, or its only file; relative to the root."""
        return [group for group, _ in self.groups]

    def cuts(self, shard: int) -> range:
        return range(len(self.groups) + 1)

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        return self.read_part(Part(shard), start)

    def read_part(self, part: Part, start: Position) -> Iterator[Document]:
        begin, end = part.within or (0, len(self.groups))
        for index in filter(part.has, range(max(begin, start.index), end)):
            group, members = self.groups[index]
            parts = [next(self.files.read(0, Position(member))) for member in members]
            is_file = group == self.files.relative(self.files.paths[members[0]])
            count = _count_of(sum(part.text is not None for part in parts), "file")
            yield _joined(parts, str(group) if is_file else f"{group.as_posix()}/ ({count})", index)

    def hint(self) -> None:
        return None


@dataclass
class JoinedRows:
    """Joins consecutive rows of a shard that have the same value in a column.

    A row with null stays a document.

    Args:
        rows: a source whose documents have a `group`.
        join: the column.
    """

    rows: Source
    join: str
    _hint: Any = field(default=None, init=False)

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    @property
    def is_stream(self) -> bool:
        """As of the rows."""
        return getattr(self.rows, "is_stream", False)

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        position, first_row, index = Position(), 0, 0
        if start.hint is not None:
            # "place" is the key's name in existing checkpoints
            position, first_row, index = Position(*start.hint["place"]), start.hint["row"], start.index
        parts: list[Document] = []
        after_first = position
        for row in self.rows.read(shard, position):
            if row.index < first_row:
                continue
            if parts and not self._continues(parts, row):
                self._hint = {"row": row.index, "place": [after_first.index, after_first.hint]}
                if index >= start.index:
                    yield self._document(parts, index)
                index, parts = index + 1, []
            if not parts:
                after_first = Position(row.index + 1, self.rows.hint())
            parts.append(row)
        if parts and index >= start.index:
            self._hint = {"row": parts[-1].index + 1, "place": [after_first.index, after_first.hint]}
            yield self._document(parts, index)

    def _continues(self, parts: list[Document], row: Document) -> bool:
        """Whether the row belongs to the document of `parts`. A broken row counts with the rows before it."""
        intact = next((part for part in parts if part.text is not None), None)
        return row.text is None or intact is None or (intact.group is not None and intact.group == row.group)

    def _document(self, parts: list[Document], index: int) -> Document:
        intact = [part for part in parts if part.text is not None]
        if not intact or intact[0].group is None:
            return _joined(parts, (intact or parts)[0].name, index)
        count = _count_of(len(intact), "row")
        return _joined(parts, f"{self.join} {intact[0].group} ({count} from {intact[0].name})", index)

    def hint(self) -> Any:
        return self._hint


def join_documents(source: Source, join: str | None) -> Source:
    """Join the documents of a source; with None, return the source itself.

    Raises:
        UserError: the way of joining is for files and the source has rows, or the other way round.
    """
    if join is None:
        return source
    if isinstance(source, TextFiles):
        if join not in (FOLDER, PACKAGE):
            raise UserError(
                "data.join",
                f"{join!r} would be a column of rows, but this corpus is made of files; "
                "join those by folder or package",
            )
        return JoinedFiles(source, join)
    if join in (FOLDER, PACKAGE):
        raise UserError(
            "data.join",
            f"{join} is for files of text, but this corpus has rows; "
            "join those by the name of a column, e.g. book_id",
        )
    return JoinedRows(source, join)
