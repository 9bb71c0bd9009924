"""Corpora: the source behind a corpus name, each reader's share of it, and the order of the documents.

    corpus name -> Source -> share of a reader
      -> windows of W documents, each permuted by (seed, epoch, window) -> documents

A window is the unit of position. Its address (epoch, number, shard, index, hint) is known before it is read,
and its k-th document is always the same. So a few numbers identify a document, and finding it again reads at
most W documents.
"""

import functools
import hashlib
import itertools
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..common.errors import UserError
from .files import COMPRESSED, ROWS, Kind, binary_file_error, convert_read_errors, file_kind
from .joined import join_documents
from .long_text import LongText, TextPassages, open_long_text, text_groups
from .rows import Csv, JsonLines, Parquet
from .sources import Document, HubDataset, Position, Source, TextFiles

PYTHON_STDLIB = "python-stdlib"
FILE_SUFFIXES = (".txt", ".md", ".py", ".json", *COMPRESSED, *ROWS)  # names with these are not hub ids
STDLIB_EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
# Whole modules, so that no file of a held-out package is trained on; a sample of every kind of module.
STDLIB_HELD_OUT = {
    *"argparse calendar csv fractions heapq json pathlib queue".split(),
    *"random shutil statistics textwrap zipfile".split(),
}
Split = Literal["train", "validation", "all"]


@dataclass(frozen=True)
class CorpusSpec:
    """Identifies a corpus. The fields are described in the `data` section of a recipe."""

    corpus: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    skip_broken: bool = False
    held_out: float = 0.0
    """Fraction of documents for validation, chosen by a hash of their text (python-stdlib holds out modules
    instead).
    """
    join: str | None = None
    excluded: tuple[str, ...] = ()
    """Files and folders that a run writes (absolute, links resolved): left out where a folder or glob
    contains them.

    A corpus that is named by a path within such a folder is still read.
    """
    passages: bool = False
    """Whether documents are passages of text files, and the last `held_out` of the bytes are held out."""


def stdlib_files(part: Split) -> tuple[list[Path], Path]:
    """Source files of the running interpreter's standard library, sorted by path, and their root folder."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        # site-packages may hold a hundred thousand files
        subfolders[:] = [name for name in subfolders if name not in STDLIB_EXCLUDED]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    files = []
    for path in sorted(paths):
        is_held_out = path.relative_to(root).parts[0].removesuffix(".py") in STDLIB_HELD_OUT
        if part == "all" or is_held_out == (part == "validation"):
            files.append(path)
    return files, root


def local_files(pattern: str, excluded: Sequence[str] = ()) -> tuple[list[Path], Path]:
    """Files that a path, folder or glob names, sorted and without hidden ones, and the folder they are in.

    The list is empty if nothing matches.

    Args:
        excluded: as in `CorpusSpec`.
    """

    def visible(paths: Iterable[Path], root: Path) -> list[Path]:
        files = sorted(
            p
            for p in paths
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
        )
        resolved = Path(os.path.realpath(root))
        inside = {path for path in map(Path, excluded) if path.is_relative_to(resolved) and path != resolved}
        if inside:
            resolve = functools.cache(os.path.realpath)  # once for each folder
            files = [
                p
                for p in files
                if inside.isdisjoint((full := Path(resolve(p.parent), p.name), *full.parents))
            ]
        return files

    pattern = os.path.expanduser(pattern)
    path = Path(pattern)
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        return visible(path.rglob("*"), path), path
    if not any(character in pattern for character in "*?["):
        return [], path
    anchor = Path(path.anchor) if path.is_absolute() else Path()
    # folders before the first wildcard may be hidden
    while not re.search(r"[*?[]", path.parts[len(anchor.parts)]):
        anchor = anchor / path.parts[len(anchor.parts)]
    return visible(anchor.glob(str(path.relative_to(anchor))), anchor), anchor


def _common_kind(files: list[Path], spec: CorpusSpec) -> tuple[Kind, list[Path]]:
    """The kind that all files share, and the files to read.

    Empty files without a telling name are not read as rows.

    Raises:
        UserError: the files are of several kinds, or are not text.
    """
    kinds: dict[Path, Kind | None] = {path: file_kind(path) for path in files}
    examples: dict[Kind, Path] = {}
    for path, kind in kinds.items():
        if kind == "binary" and not spec.skip_broken:
            raise binary_file_error(path)
        if kind is not None:
            examples.setdefault("text" if kind == "binary" else kind, path)
    if len(examples) > 1:
        mixed = ", ".join(f"{kind} ({path.name})" for kind, path in sorted(examples.items()))
        raise UserError(
            "data.corpus", f"{spec.corpus} mixes {mixed} files; name one kind with a glob such as DIR/*.jsonl"
        )
    common: Kind = next(iter(examples)) if examples else "text"
    return common, files if common == "text" else [path for path in files if kinds[path] is not None]


def open_source(spec: CorpusSpec, part: Split = "train") -> Source:
    """The source behind a corpus name: python-stdlib, a local file, folder or glob, or a dataset of the hub.

    With `spec.join` its documents are joined.

    Raises:
        UserError: nothing has that name, there are no documents, the files are of several kinds, or
            `spec.join` does not apply to them.
    """
    if spec.passages:
        return TextPassages(open_text(spec, part))
    return join_documents(_open_unjoined(spec, part), spec.join)


def open_text(spec: CorpusSpec, part: Split, piece_bytes: int | None = None) -> LongText:
    """The text files of a corpus as pieces; see `open_long_text`.

    Raises:
        UserError: as `open_source`, or the corpus is not made of text files.
    """
    source = join_documents(_open_unjoined(spec, part), spec.join)
    rest: Split = "all" if spec.corpus == PYTHON_STDLIB else part  # chosen by file already
    return open_long_text(source, spec.corpus, spec.held_out, rest, piece_bytes)


def has_fewer_texts(spec: CorpusSpec, count: int) -> bool:
    """Whether a corpus is made of text files and has fewer than `count` documents that are not empty.

    Raises:
        UserError: the files cannot be read, or are of several kinds.
    """
    if spec.corpus != PYTHON_STDLIB and not local_files(spec.corpus, spec.excluded)[0]:
        return False
    groups = text_groups(join_documents(_open_unjoined(spec, "train"), spec.join))
    if groups is None:
        return False
    with convert_read_errors(spec.corpus):
        has_text = (any(path.stat().st_size > 0 for path in paths) for _, paths in groups)
        return sum(itertools.islice(filter(None, has_text), count)) < count


def _open_unjoined(spec: CorpusSpec, part: Split) -> Source:
    if spec.corpus == PYTHON_STDLIB:
        files, root = stdlib_files(part)
        return TextFiles(files, root, spec.skip_broken)
    files, root = local_files(spec.corpus, spec.excluded)
    if not files:
        if os.path.isdir(os.path.expanduser(spec.corpus)):
            only = " but those of the run" if local_files(spec.corpus)[0] else ""
            raise UserError("data.corpus", f"the folder {spec.corpus} holds no files{only}")
        looks_like_hub_id = re.fullmatch(
            r"\w[\w-]*(/\w[\w.-]*)?", spec.corpus
        ) and not spec.corpus.lower().endswith(FILE_SUFFIXES)
        if not looks_like_hub_id:
            raise UserError(
                "data.corpus",
                f"there is no file, folder or match for {spec.corpus} (looked from {Path.cwd()})",
            )
        return HubDataset(
            spec.corpus, spec.subset, spec.split, spec.revision, spec.text_field, spec.skip_broken, spec.join
        )
    if all(path.stat().st_size == 0 for path in files):
        raise UserError("data.corpus", f"{spec.corpus} is empty")
    kind, files = _common_kind(files, spec)
    if kind == "text":
        return TextFiles(files, root, spec.skip_broken)
    rows = {"jsonl": JsonLines, "csv": Csv, "parquet": Parquet}[kind]
    return rows(files, spec.text_field, spec.skip_broken, spec.join)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation.

    Depends on its text alone, so copies of a document are treated alike.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@dataclass(frozen=True)
class WindowAddress:
    """Where a window begins."""

    epoch: int = 0
    number: int = 0
    shard: int = 0
    """Index among the reader's own shards, from 0."""
    index: int = 0
    hint: Any = None


@dataclass
class Window:
    """W documents (fewer at the end of an epoch) in the order in which they are read."""

    address: WindowAddress
    documents: list[Document]
    next_address: WindowAddress
    num_skipped: int


class DocumentStream:
    """A reader's share of a corpus as an endless stream of windows.

    Args:
        spec, part: the corpus and the part of it to read.
        reader, num_readers: if the number of shards is a multiple of num_readers, this reader owns the shards
            `reader`, `reader + num_readers`, ...; otherwise it reads all shards and keeps every
            num_readers-th document.
        window: documents per window.
        seed: of the permutations; None keeps the order of the corpus.
    """

    def __init__(
        self, spec: CorpusSpec, part: Split, reader: int, num_readers: int, window: int, seed: int | None
    ):
        self.spec, self.part, self.reader, self.num_readers = spec, part, reader, num_readers
        self.size, self.seed = window, seed
        self.source = open_source(spec, part)
        self.owns_shards = self.source.num_shards % num_readers == 0
        self.shards = (
            range(reader, self.source.num_shards, num_readers)
            if self.owns_shards
            else range(self.source.num_shards)
        )
        self._documents: Iterator[Document] | None = None
        self._next: WindowAddress | None = None

    def window(self, address: WindowAddress) -> Window:
        """Read a window. The window after the previous one is read without seeking."""
        if address != self._next or self._documents is None:
            self._documents = self._read(address.shard, Position(address.index, address.hint))
            self._shard, self._index = address.shard, address.index
        documents: list[Document] = []
        num_skipped = 0
        while len(documents) < self.size:
            document = next(self._documents, None)
            if document is None:
                self._shard += 1
                if self._shard == len(self.shards):
                    break
                self._documents, self._index = self._read(self._shard, Position()), 0
                continue
            self._index = document.index + 1
            global_index = self.shards[self._shard] + document.index
            if not self.owns_shards and global_index % self.num_readers != self.reader:
                continue
            num_skipped += document.num_skipped
            if document.text is not None and self._is_in_part(document.text):
                documents.append(document)
        if self._shard == len(self.shards):
            next_address = WindowAddress(address.epoch + 1)
        else:
            next_address = replace(
                address,
                number=address.number + 1,
                shard=self._shard,
                index=self._index,
                hint=self.source.hint(),
            )
        # an epoch begins with a fresh iterator
        self._next = next_address if self._shard < len(self.shards) else None
        if self.seed is not None:
            generator = np.random.default_rng([self.seed, self.reader, address.epoch, address.number])
            documents = [documents[i] for i in generator.permutation(len(documents))]
        return Window(address, documents, next_address, num_skipped)

    def _read(self, shard: int, position: Position) -> Iterator[Document]:
        yield from self.source.read(self.shards[shard], position)

    def _is_in_part(self, text: str) -> bool:
        if self.part == "all" or self.spec.corpus == PYTHON_STDLIB or self.spec.passages:
            return True  # chosen by file or by place already
        return is_held_out(text, self.spec.held_out) == (self.part == "validation")

    def one_epoch(self) -> Iterator[Document]:
        """Every document once."""
        address = WindowAddress()
        while address.epoch == 0:
            window = self.window(address)
            yield from window.documents
            address = window.next_address
