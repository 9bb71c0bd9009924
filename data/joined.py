"""Long documents from short ones: files of a folder, or rows that belong together, as one text.

    files, by path                    -> groups, known before a file is read    -> documents
    rows of a shard, in their order   -> runs of rows with the same value       -> documents

The parts of a document stand one after another as they are; a newline is added only behind a part that does not end in one (and that another
follows). Empty parts leave nothing. A broken part, where those are skipped, is left out of its document and counted.

To all that reads documents these are ordinary ones: their index counts joined documents, so readers share those, and what is held out is
chosen by the joined text. Rows have to be read up to the next group's first to know that a group has ended. The hint of that place is therefore
the place of a row a little before it (the second of the group that just ended) and the row where the group begins: going on reads that one
group again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError
from .sources import Place, Record, Source, TextFiles

FOLDER, PACKAGE = "folder", "package"  # how files are joined; any other name is a column of rows


def joined_text(parts: Iterable[str]) -> str:
    """One text: the parts as they are, a newline between two where the first does not end in one."""
    *before, last = [part for part in parts if part] or [""]
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in before) + last


def _joined(parts: list[Record], name: str, index: int) -> Record:
    """The parts of a document as one; broken if all of them are."""
    texts = [part.text for part in parts if part.text is not None]
    return Record(
        joined_text(texts) if texts else None,
        name,
        index,
        num_skipped=sum(part.num_skipped for part in parts),
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


@dataclass
class JoinedFiles:
    """Files of the same folder (`folder`), or below the same folder of the root (`package`), in the order of their paths.

    A file directly in the root stays a document of its own. Documents come in the order of their first files.
    """

    files: TextFiles
    join: str
    num_shards: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        groups: dict[Path, list[int]] = {}
        for index, path in enumerate(self.files.paths):
            relative = self.files.relative(path)
            *folders, _ = relative.parts
            group = relative if not folders else Path(folders[0]) if self.join == PACKAGE else relative.parent
            groups.setdefault(group, []).append(index)
        self._groups = list(groups.items())

    def read(self, shard: int, start: Place) -> Iterator[Record]:
        for index in range(start.index, len(self._groups)):
            group, members = self._groups[index]
            parts = [next(self.files.read(0, Place(member))) for member in members]
            is_file = group == self.files.relative(self.files.paths[members[0]])
            count = _counted(sum(part.text is not None for part in parts), "file")
            yield _joined(parts, str(group) if is_file else f"{group.as_posix()}/ ({count})", index)

    def hint(self) -> None:
        return None


@dataclass
class JoinedRows:
    """Consecutive rows of a shard with the same value in a column; a row with null there stays a document of its own.

    Args:
        rows: a source whose records name their `group`.
        join: the column.
    """

    rows: Source
    join: str
    _hint: Any = field(default=None, init=False)

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def read(self, shard: int, start: Place) -> Iterator[Record]:
        place, first_row, index = Place(), 0, 0
        if start.hint is not None:
            place, first_row, index = Place(*start.hint["place"]), start.hint["row"], start.index
        parts: list[Record] = []
        behind_first = place
        for row in self.rows.read(shard, place):
            if row.index < first_row:
                continue
            if parts and not self._go_on(parts, row):
                self._hint = {"row": row.index, "place": [behind_first.index, behind_first.hint]}
                if index >= start.index:
                    yield self._document(parts, index)
                index, parts = index + 1, []
            if not parts:
                behind_first = Place(row.index + 1, self.rows.hint())
            parts.append(row)
        if parts and index >= start.index:
            self._hint = {"row": parts[-1].index + 1, "place": [behind_first.index, behind_first.hint]}
            yield self._document(parts, index)

    def _go_on(self, parts: list[Record], row: Record) -> bool:
        """Whether this row goes on with the document. What belongs to a broken one is not known: it counts with what it follows."""
        whole = next((part for part in parts if part.text is not None), None)
        return row.text is None or whole is None or (whole.group is not None and whole.group == row.group)

    def _document(self, parts: list[Record], index: int) -> Record:
        whole = [part for part in parts if part.text is not None]
        if not whole or whole[0].group is None:
            return _joined(parts, (whole or parts)[0].name, index)
        return _joined(
            parts, f"{self.join} {whole[0].group} ({_counted(len(whole), 'row')} from {whole[0].name})", index
        )

    def hint(self) -> Any:
        return self._hint


def join_documents(source: Source, join: str | None) -> Source:
    """The source with its documents joined; the source itself for None.

    Raises:
        UserError: rows have no folders, and files have no columns.
    """
    if join is None:
        return source
    if isinstance(source, TextFiles):
        if join not in (FOLDER, PACKAGE):
            raise UserError(
                (
                    "data.join",
                    f"{join!r} would be a column of rows, but this corpus is made of files; join those by folder or package",
                )
            )
        return JoinedFiles(source, join)
    if join in (FOLDER, PACKAGE):
        raise UserError(
            (
                "data.join",
                f"{join} is for files of text, but this corpus has rows; join those by the name of a column, e.g. book_id",
            )
        )
    return JoinedRows(source, join)
