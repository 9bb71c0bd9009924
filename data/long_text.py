"""Long texts, read by ranges of bytes: a lane can begin at any place, and no file is read as a whole.

    text files -> documents (a file, or joined files) -> the part for training, and the tail for validation
      -> pieces of about `piece_bytes`, cut at line starts, read and encoded one by one

A piece depends on the text and on `piece_bytes` alone, never on who reads it. Piece k of a document begins at
the first line start at or after byte k x piece_bytes and before byte (k + 1) x piece_bytes. Without a line
start in this range it begins before the range's first space, and without a space at its first whole
character. A tokenizer never sees text across an edge: tokens that would span a line start are two tokens.

Documents without a byte are left out. A file that is compressed cannot be read by ranges, so its decompressed
bytes are kept in memory.
"""

import bisect
import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from ..common.errors import UserError
from .files import (
    HEAD_BYTES,
    binary_file_error,
    binary_format,
    compression,
    convert_read_errors,
    is_damage_error,
    open_decompressed,
)
from .joined import JoinedFiles
from .sources import Document, Position, Source, Split, TextFiles, damaged_file_error, skip_or_raise

EDGE_BYTES = 4096
"""How far the edge between training and validation is moved to a line start."""
PASSAGE_BYTES = (2048, 32_768)
"""Smallest and largest size of a passage; in between it is a 256th of the text."""
HELD_OUT_PASSAGE_BYTES = (8192, 32_768)
"""The same of the tail; in between it is a 16th, since few resets matter more than many passages."""
CHECKED_BYTES = 2**28
"""How much of a text is checked for broken characters before the first step."""
DECOMPRESSED_BYTES = 2**30
"""Largest compressed file, decompressed, that is kept in memory."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file, or bytes in memory: of a compressed file, or a newline between joined files."""

    path: Path
    start: int
    size: int
    data: bytes | None = None

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from `start` to `stop`, counted from the span's beginning.

        Raises:
            UserError: the file cannot be read, or has become shorter.
        """
        if self.data is not None:
            return self.data[start:stop]
        with convert_read_errors(self.path), self.path.open("rb") as file:
            file.seek(self.start + start)
            data = file.read(stop - start)
        if len(data) < stop - start:
            raise UserError(
                "data.corpus",
                f"{self.path} has become shorter while it was read; a run needs its corpus until it ends",
            )
        return data


@dataclass(frozen=True)
class LongDocument:
    """One document, as the spans that it consists of."""

    name: str
    spans: tuple[Span, ...]

    @cached_property
    def ends(self) -> list[int]:
        """Where each span ends, in bytes."""
        return list(accumulate(span.size for span in self.spans))

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.ends[-1] if self.spans else 0

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`."""
        pieces = []
        index = bisect.bisect_right(self.ends, start)
        while start < stop:
            first = self.ends[index] - self.spans[index].size
            end = min(stop, self.ends[index])
            pieces.append(self.spans[index].read(start - first, end - first))
            start, index = end, index + 1
        return b"".join(pieces)


def _file_span(path: Path) -> Span:
    """A file without its byte order mark.

    Raises:
        UserError: it is binary or damaged.
    """
    with convert_read_errors(path):
        is_compressed = compression(path) is not None
        try:
            with open_decompressed(path) as file:
                data = file.read(DECOMPRESSED_BYTES + 1 if is_compressed else HEAD_BYTES)
        except OSError as error:
            raise damaged_file_error(path, error) if is_damage_error(error) else error from None
        size = len(data) if is_compressed else path.stat().st_size
    if binary_format(data[:HEAD_BYTES]) is not None:
        raise binary_file_error(path, data[:HEAD_BYTES])
    if len(data) > DECOMPRESSED_BYTES:
        problem = f"{path} has over {DECOMPRESSED_BYTES:,} bytes when it is decompressed, for which it would"
        raise UserError("data.corpus", f"{problem} have to be kept in memory; decompress the file")
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    return Span(path, start, size - start, data[start:] if is_compressed else None)


def _document(name: str, paths: Sequence[Path], skip_broken: bool) -> tuple[LongDocument, int]:
    """The document of these files, and the number of those left out. A newline is inserted after a file that
    does not end in one and is followed by another, as in `joined_text`.
    """
    spans: list[Span] = []
    num_skipped = 0
    for path in paths:
        try:
            span = _file_span(path)
        except UserError:
            if not skip_broken:
                raise
            num_skipped += 1
            continue
        if span.size > 0:
            if spans and spans[-1].read(spans[-1].size - 1, spans[-1].size) != b"\n":
                spans.append(Span(spans[-1].path, 0, 1, b"\n"))
            spans.append(span)
    return LongDocument(name, tuple(spans)), num_skipped


def text_groups(source: Source) -> list[tuple[str, list[Path]]] | None:
    """Name and files of each document of a source of text files; None for a source of rows."""
    if isinstance(source, TextFiles):
        return [(str(source.relative(path)), [path]) for path in source.paths]
    if isinstance(source, JoinedFiles):
        return [
            (str(group), [source.files.paths[member] for member in members])
            for group, members in source.groups
        ]
    return None


@dataclass(frozen=True)
class Piece:
    """A part of a document, as text."""

    text: str | None
    """None if it is broken and broken text is skipped."""
    name: str
    is_begin: bool
    """Whether the text before it is not part of the corpus: a document begins, or the tail."""
    is_end: bool
    """Whether its document ends with it."""


@dataclass(frozen=True)
class _Range:
    """A part of a document that is read."""

    document: LongDocument
    start: int
    stop: int


@dataclass
class LongText:
    """The text of a corpus, or a part of it, as numbered pieces.

    Args:
        corpus: its name, for messages.
        ranges: what is read, in order; none is empty.
        piece_bytes: size of a piece, before its edges are moved to line starts; at least that of a character,
            4.
        skip_broken: whether broken pieces have no text instead of raising an error.
        num_skipped: number of files left out.
    """

    corpus: str
    ranges: list[_Range]
    piece_bytes: int
    skip_broken: bool = False
    num_skipped: int = 0
    _ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        counts = (-(-(part.stop - part.start) // self.piece_bytes) for part in self.ranges)
        self._ends = list(accumulate(counts))

    @property
    def num_bytes(self) -> int:
        """Number of bytes."""
        return sum(part.stop - part.start for part in self.ranges)

    @property
    def num_pieces(self) -> int:
        """Number of pieces."""
        return self._ends[-1] if self._ends else 0

    def piece(self, number: int) -> Piece:
        """Read a piece.

        Raises:
            UserError: it is broken, or its file cannot be read.
        """
        index = bisect.bisect_right(self._ends, number)
        part = self.ranges[index]
        first = self._ends[index - 1] if index else 0
        start = part.start + (number - first) * self.piece_bytes
        next_start = start + self.piece_bytes
        base = max(start - 1, part.start)
        data = part.document.read(base, min(next_start + self.piece_bytes, part.stop))
        is_first, is_last = start == part.start, next_start >= part.stop
        begin = start if is_first else base + _cut(data[: next_start - base])
        end = part.stop
        if not is_last:
            end = next_start - 1 + _cut(data[next_start - 1 - base :])
        data = data[begin - base : end - base]
        return Piece(
            self._decode(data, part.document, begin),
            f"{part.document.name}@{begin}",
            is_first,
            is_last and part.stop == part.document.size,
        )

    def _decode(self, data: bytes, document: LongDocument, start: int) -> str | None:
        problem = _problem(data, start)
        if problem is None:
            return data.decode()
        if not self.skip_broken:
            raise _broken_error(document, problem, self.piece_bytes)
        return None

    def check(self, max_bytes: int = CHECKED_BYTES) -> None:
        """Check the first `max_bytes` for bytes that are no text.

        Raises:
            UserError: there are some, or a file cannot be read.
        """
        if self.skip_broken:
            return
        for part in self.ranges:
            decoder = codecs.getincrementaldecoder("utf-8")()
            for start in range(part.start, part.stop, 2**20):
                data = part.document.read(start, min(start + 2**20, part.stop))
                num_pending = len(decoder.getstate()[0])
                try:
                    decoder.decode(data, final=start + len(data) == part.stop)
                    problem = _problem(data, start) if b"\0" in data else None
                except UnicodeDecodeError as error:
                    problem = f"is not UTF-8 (byte {start - num_pending + error.start:,})"
                if problem is not None:
                    raise _broken_error(part.document, problem, self.piece_bytes)
                max_bytes -= len(data)
                if max_bytes <= 0:
                    return


def _cut(data: bytes) -> int:
    """Where a piece begins, as an index from 1 to len(data).

    Args:
        data: the range in which it may begin, and one byte before it.
    """
    if (newline := data.find(b"\n", 0, len(data) - 1)) >= 0:
        return newline + 1
    if (space := data.find(b" ", 1)) >= 0:
        return space
    index = 1
    while index < min(len(data), 4) and data[index] & 0xC0 == 0x80:  # within a character
        index += 1
    return index


def _problem(data: bytes, start: int) -> str | None:
    """What is wrong with bytes that should be text and begin at byte `start` of a document."""
    if (nul := data.find(b"\0")) >= 0:
        return f"is binary or damaged: it holds a NUL byte (byte {start + nul:,})"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {start + error.start:,})"
    return None


def _broken_error(document: LongDocument, problem: str, piece_bytes: int) -> UserError:
    skip = f"set data.skip_broken to leave out about {piece_bytes:,} bytes around such places"
    return UserError("data.corpus", f"{document.name} {problem}; convert it, or {skip}")


def _split(documents: list[LongDocument], held_out: float, part: Split) -> list[_Range]:
    """The ranges of a part: validation is the last `held_out` of all bytes, from a line start on."""
    edge = sum(document.size for document in documents)
    if part != "all":
        edge -= round(edge * held_out)
    ranges, first = [], 0
    for document in documents:
        cut = min(max(edge - first, 0), document.size)
        if 0 < cut < document.size:
            cut += _cut(document.read(cut - 1, min(cut + EDGE_BYTES, document.size))) - 1
        begin, end = (cut, document.size) if part == "validation" else (0, cut)
        if begin < end:
            ranges.append(_Range(document, begin, end))
        first += document.size
    return ranges


def open_long_text(source: Source, corpus: str, held_out: float, part: Split) -> LongText:
    """The text of a source of text files, in pieces of the size of passages.

    Args:
        corpus: its name, for messages.
        held_out: fraction of the bytes that the tail for validation has.

    Raises:
        UserError: the source is not made of text files, or there is no text in this part of it.
    """
    groups = text_groups(source)
    if groups is None:
        raise UserError(
            "data.order", f"{corpus} has rows, not text files; use data.order documents or windows"
        )
    files = source.files if isinstance(source, JoinedFiles) else source
    skip_broken = isinstance(files, TextFiles) and files.skip_broken
    pairs = [_document(name, paths, skip_broken) for name, paths in groups]
    num_skipped = sum(skipped for _, skipped in pairs)
    if num_skipped and not any(document.size for document, _ in pairs):
        raise UserError(
            "data.corpus", f"{corpus} holds no text: {num_skipped:,} files are left out as broken"
        )
    ranges = _split([document for document, _ in pairs], held_out, part)
    if not ranges and part == "validation":
        raise UserError("data.validation_fraction", f"leaves no text of {corpus} for validation; raise it")
    if not ranges:
        advice = "; lower data.validation_fraction" if part == "train" and held_out > 0.5 else ""
        raise UserError("data.corpus", f"{corpus} holds no text to train on{advice}")
    smallest, largest = PASSAGE_BYTES if part == "train" else HELD_OUT_PASSAGE_BYTES
    num_bytes = sum(part.stop - part.start for part in ranges)
    size = min(max(num_bytes // (256 if part == "train" else 16), smallest), largest)
    return LongText(corpus, ranges, size, skip_broken, num_skipped)


@dataclass
class TextPassages:
    """The pieces of a long text as documents, one in each shard. The state is reset at each of them; <eos>
    follows only where a document ends.
    """

    text: LongText

    @property
    def num_shards(self) -> int:
        return self.text.num_pieces

    def read(self, shard: int, start: Position) -> Iterator[Document]:
        if start.index > 0:
            return
        piece = self.text.piece(shard)
        if piece.text is None:
            error = UserError("data.corpus", f"{piece.name} is broken")
            yield skip_or_raise(True, error, piece.name, 0)
        else:
            yield Document(piece.text, piece.name, 0, is_cut=not piece.is_end)

    def hint(self) -> None:
        return None
