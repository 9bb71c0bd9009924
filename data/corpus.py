"""Corpora: the source behind a corpus name.

corpus name -> files of one kind, or a dataset -> Source
"""

import functools
import itertools
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..common.errors import UserError
from .arrow import SavedDataset, has_saved_splits, is_saved_dataset
from .files import COMPRESSED, ROWS, Kind, binary_file_error, convert_read_errors, file_kind
from .hold_out import HoldOut
from .hub import HubDataset
from .hub_network import check_dataset_name
from .joined import join_documents
from .long_text import LongText, TextPassages, open_long_text, text_groups
from .outages import DEFAULT_POLICY, RetryPolicy
from .packages import PYTHON_PACKAGES, package_files
from .parquet import Parquet
from .prepared.manifest import is_prepared
from .prepared.source import PreparedCorpus
from .remote import is_url, remote_files
from .row_filter import EVERY_ROW, RowRules
from .rows import Csv, JsonLines
from .servers import shown_url
from .sources import Source, Split, TextFiles

PYTHON_STDLIB = "python-stdlib"
SPLIT_BY_FILE = (PYTHON_STDLIB, PYTHON_PACKAGES)  # whole files are held out
FILE_SUFFIXES = (".txt", ".md", ".py", ".json", *COMPRESSED, *ROWS)  # names with these are not hub ids
STDLIB_EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
# Whole modules, so that no file of a held-out package is trained on; a sample of every kind of module.
STDLIB_HELD_OUT = {
    *"argparse calendar csv fractions heapq json pathlib queue".split(),
    *"random shutil statistics textwrap zipfile".split(),
}


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
    """Fraction of the corpus for validation (python-stdlib holds out modules instead)."""
    join: str | None = None
    excluded: tuple[str, ...] = ()
    """Files and folders that a run writes (absolute, links resolved): left out where a folder or glob
    contains them.

    A corpus that is named by a path within such a folder is still read.
    """
    passages: bool = False
    """Whether documents are passages of text files, and the last `held_out` of the bytes are held out."""
    hold_out: HoldOut = "auto"
    """How the fraction is chosen (hold_out.py)."""
    rules: RowRules = EVERY_ROW
    """How a row becomes a text, and which rows are left out."""
    network: RetryPolicy = DEFAULT_POLICY
    """How long an outage of a remote corpus is waited for."""


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

    The list is empty if nothing matches. Characters of a pattern (`*?[`) are literal in folders of that name.

    Args:
        excluded: as in `CorpusSpec`.

    Raises:
        UserError: a folder or a match contains a broken link, or something that is neither file nor folder;
            or a folder cannot be listed.
    """

    def visible(paths: Iterable[Path], root: Path) -> list[Path]:
        files = sorted(
            p
            for p in paths
            if not p.is_dir() and not any(part.startswith(".") for part in p.relative_to(root).parts)
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
        for path in files:
            if not path.is_file():
                raise _not_a_file_error(path)
        return files

    pattern = os.path.expanduser(pattern)
    path = Path(pattern)
    if path.is_file():
        return [path], path.parent
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise _not_a_file_error(path)
    if path.is_dir():
        return visible(_paths_below(path, (os.path.realpath(path),)), path), path
    if not any(character in pattern for character in "*?["):
        return [], path
    anchor = Path(path.anchor) if path.is_absolute() else Path()
    # folders before the first wildcard may be hidden; a folder with a wildcard's character is itself
    while not re.search(r"[*?[]", part := path.parts[len(anchor.parts)]) or (anchor / part).is_dir():
        anchor = anchor / part
    return visible(anchor.glob(str(path.relative_to(anchor))), anchor), anchor


def _paths_below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """Everything below a folder that is neither hidden nor a folder.

    Links to folders are followed if they lead out of the corpus, whose own folders are read anyway. Unlike
    Path.rglob, a folder that cannot be listed is an error: its files would be left out silently.

    Args:
        above: the real paths of the corpus's folder, ..., of `folder`.

    Raises:
        UserError: a folder cannot be listed.
    """
    with convert_read_errors(folder), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                yield folder / entry.name
                continue
            is_link = entry.is_symlink()
            real = os.path.realpath(entry.path) if is_link else os.path.join(above[-1], entry.name)
            if real not in above and not (is_link and Path(real).is_relative_to(above[0])):
                yield from _paths_below(folder / entry.name, (*above, real))


def _not_a_file_error(path: Path) -> UserError:
    advice = "remove it, or name the files to read with a glob such as DIR/*.txt"
    if path.is_symlink() and not path.exists():
        return UserError(
            "data.corpus", f"{path} is a link to {os.readlink(path)}, which is not there; {advice}"
        )
    return UserError("data.corpus", f"{path} is a pipe, socket or device, not a file; {advice}")


def corpus_files(spec: CorpusSpec) -> tuple[list[Path], Path]:
    """The files of a corpus that is made of files, sorted, and the folder they are in.

    The list is empty if nothing matches. Remote files have the methods of Path that sources use.

    Raises:
        UserError: a remote corpus cannot be listed.
    """
    if spec.corpus == PYTHON_PACKAGES:
        return package_files("all")
    if is_url(spec.corpus):
        with convert_read_errors(shown_url(spec.corpus)):
            return cast(tuple[list[Path], Path], remote_files(spec.corpus, spec.network))
    return local_files(spec.corpus, spec.excluded)


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

    With `spec.join` its documents are joined. The folder of a prepared corpus has the documents of the corpus
    that it was made of.

    Raises:
        UserError: nothing has that name, there are no documents, the files are of several kinds,
            `spec.join` does not apply to them, or a prepared corpus is unfinished or was made with other
            settings.
    """
    if spec.passages:
        return TextPassages(open_text(spec, part))
    if is_prepared(spec.corpus):
        return PreparedCorpus(spec, part)
    return join_documents(_open_unjoined(spec, part), spec.join)


def open_text(spec: CorpusSpec, part: Split) -> LongText:
    """The text files of a corpus as pieces; see `open_long_text`.

    Raises:
        UserError: as `open_source`, or the corpus is not made of text files on this machine, or a filter
            leaves some of them out.
    """
    positions = "are read from positions within text files"
    if is_url(spec.corpus) or is_prepared(spec.corpus):
        kind = "on a server" if is_url(spec.corpus) else "prepared"
        problem = f"continuous and passages {positions}, and {shown_url(spec.corpus)} is {kind}"
        raise UserError("data.order", f"{problem}; use documents, or name the text files themselves")
    if spec.rules != EVERY_ROW:
        message = f"is for whole documents, and {spec.corpus} is read from positions within its text"
        raise UserError("data.filter", f"{message}; leave it out, or set the order to documents")
    source = join_documents(_open_unjoined(spec, part), spec.join)
    rest: Split = "all" if spec.corpus in SPLIT_BY_FILE else part
    return open_long_text(source, spec.corpus, spec.held_out, rest)


def has_fewer_texts(spec: CorpusSpec, count: int) -> bool:
    """Whether a corpus is made of text files on this machine, which `open_text` reads, and has fewer than
    `count` documents that are not empty.

    Raises:
        UserError: the files cannot be read, or are of several kinds.
    """
    if is_url(spec.corpus) or is_prepared(spec.corpus):
        return False
    if spec.corpus not in SPLIT_BY_FILE and not local_files(spec.corpus, spec.excluded)[0]:
        return False
    groups = text_groups(join_documents(_open_unjoined(spec, "train"), spec.join))
    if groups is None:
        return False
    with convert_read_errors(spec.corpus):
        has_text = (any(path.stat().st_size > 0 for path in paths) for _, paths in groups)
        return sum(itertools.islice(filter(None, has_text), count)) < count


def is_hub_dataset(corpus: str) -> bool:
    """Whether a corpus name is that of a dataset of the hub: neither a task's nor a local one.

    Raises:
        UserError: a folder of that name holds something that cannot be read.
    """
    if corpus in SPLIT_BY_FILE or local_files(corpus)[0] or os.path.isdir(os.path.expanduser(corpus)):
        return False
    return _looks_like_hub_id(corpus)


def has_splits(corpus: str) -> bool:
    """Whether `data.split` names a part of a corpus: of a dataset of the hub, or of a DatasetDict.

    Raises:
        UserError: as `is_hub_dataset`.
    """
    return has_saved_splits(Path(os.path.expanduser(corpus))) or is_hub_dataset(corpus)


def _refuse_settings(spec: CorpusSpec, kind: str, names: Sequence[str]) -> None:
    """Raise if settings have values that would do nothing for a corpus of this kind.

    Raises:
        UserError: each such setting.
    """
    errors = []
    for name in names:
        value, default = getattr(spec, name), getattr(CorpusSpec, name)
        if value != default:
            problem = f"is {value!r}, but {shown_url(spec.corpus)} is {kind} and has no {name}"
            errors.append((f"data.{name}", f"{problem}; leave it out (default: {default or 'null'})"))
    if errors:
        raise UserError.from_list(errors)


def _looks_like_hub_id(corpus: str) -> bool:
    is_id = re.fullmatch(r"\w[\w-]*(/\w[\w.-]*)?", corpus) is not None
    return is_id and not corpus.lower().endswith(FILE_SUFFIXES)


def _open_unjoined(spec: CorpusSpec, part: Split) -> Source:
    if spec.corpus in SPLIT_BY_FILE:
        _refuse_settings(spec, "source code", ("subset", "split", "revision"))
        files, root = (stdlib_files if spec.corpus == PYTHON_STDLIB else package_files)(part)
        return _text_files(files, root, spec)
    folder = Path(os.path.expanduser(spec.corpus))
    if is_saved_dataset(folder):
        _refuse_settings(spec, "a folder of save_to_disk", ("subset", "revision"))
        return SavedDataset(folder, spec.split, spec.text_field, spec.skip_broken, spec.join, spec.rules)
    files, root = corpus_files(spec)
    if not files and is_url(spec.corpus):
        raise UserError("data.corpus", f"there is no file that matches {shown_url(spec.corpus)}")
    if not files:
        if os.path.isdir(os.path.expanduser(spec.corpus)):
            only = " but those of the run" if local_files(spec.corpus)[0] else ""
            raise UserError("data.corpus", f"the folder {spec.corpus} holds no files{only}")
        if not _looks_like_hub_id(spec.corpus):
            raise UserError(
                "data.corpus",
                f"there is no file, folder or match for {spec.corpus} (looked from {Path.cwd()})",
            )
        check_dataset_name(spec.corpus, spec.network)
        return HubDataset(
            spec.corpus,
            spec.subset,
            spec.split,
            spec.revision,
            spec.text_field,
            spec.skip_broken,
            spec.join,
            spec.rules,
            spec.network,
        )
    _refuse_settings(spec, "made of files", ("subset", "split", "revision"))
    with convert_read_errors(spec.corpus):
        if all(path.stat().st_size == 0 for path in files):
            raise UserError("data.corpus", f"{spec.corpus} is empty")
    kind, files = _common_kind(files, spec)
    if kind == "text":
        return _text_files(files, root, spec)
    rows = {"jsonl": JsonLines, "csv": Csv, "parquet": Parquet}[kind]
    return rows(files, spec.text_field, spec.skip_broken, spec.join, spec.rules)


def _text_files(files: list[Path], root: Path, spec: CorpusSpec) -> TextFiles:
    """The source of text files.

    Raises:
        UserError: the recipe asks for fields, which they do not have.
    """
    if spec.rules.needs_fields:
        keys = ["data.template"] * (spec.rules.template is not None)
        keys += ["data.filter"] * bool(spec.rules.conditions)
        message = f"{shown_url(spec.corpus)} is made of files of text, which have no fields; leave it out"
        lengths = ", or filter by min_bytes and max_bytes only"
        raise UserError.from_list((key, message + lengths * (key == "data.filter")) for key in keys)
    return TextFiles(files, root, spec.skip_broken, spec.rules)


def has_fixed_parts(spec: CorpusSpec, source: Source) -> bool:
    """Whether files or places, not hashes of texts, decide what a corpus holds out."""
    is_split = spec.corpus in SPLIT_BY_FILE or spec.passages
    return is_split or (isinstance(source, PreparedCorpus) and source.has_fixed_parts)
