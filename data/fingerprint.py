"""Detects whether a corpus has changed since the run began, without reading it all.

    all files         their number, and a hash of their names and sizes
    up to 256 files   for each: its size, and a hash of its first, middle and last block

The 256 files are those whose names have the smallest hashes, so added files replace only few of them.
"""

import hashlib
import platform
from pathlib import Path, PurePath
from typing import Any

from ..common.errors import UserError
from .corpus import PYTHON_STDLIB, CorpusSpec, corpus_files
from .files import convert_read_errors, file_kind
from .remote import RemotePath

MAX_HASHED_FILES = 256
BLOCK_BYTES = 4096


def corpus_fingerprint(spec: CorpusSpec) -> dict[str, Any] | None:
    """Describe a corpus as JSON for `check_corpus`; None for a dataset of the hub, whose version is
    `data.revision`.

    Raises:
        UserError: a file cannot be read.
    """
    if spec.corpus == PYTHON_STDLIB:
        return {"python": platform.python_version()}
    sizes = _sizes(spec)
    if not sizes:
        return None
    chosen = sorted(sizes, key=_hash)[:MAX_HASHED_FILES]
    hashed = {name: [sizes[name][1], _blocks(sizes[name][0], sizes[name][1])] for name in sorted(chosen)}
    last = max(sizes, key=PurePath)
    return {"num_files": len(sizes), "last": last, "all": _names_and_sizes(sizes, last), "files": hashed}


def check_corpus(before: dict[str, Any], spec: CorpusSpec, order: str, num_readers: int) -> str | None:
    """Compare a corpus with its fingerprint of before; returns a note on what was added, or None if nothing
    was.

    Additions are accepted only if they do not move the existing documents.

    Args:
        before: the fingerprint from the beginning of the run, or from its last resume.
        order: data.order.
        num_readers: batch.readers.

    Raises:
        UserError: existing text has changed or is missing, or an addition changes the order of the documents.
    """
    now = corpus_fingerprint(spec)
    if now is None or ("python" in before) != ("python" in now):
        return None  # another corpus: the comparison of recipes refuses it
    if "python" in now:
        changes = [f"was the library of Python {before['python']}, this is {now['python']}"] * (before != now)
        additions = []
    else:
        changes, additions = _compare(before, _sizes(spec))
    if not changes and not additions:
        return None
    keeps_order = order == "documents" and spec.join is None and not changes
    if keeps_order and _keeps_document_order(before, now, spec, num_readers, additions):
        added = _first_of(additions)
        return (
            f"{spec.corpus} has more text than when the run began ({added}); it is read when its turn comes"
        )
    advice = "put it back, or name another run.dir (model.init_from takes the weights of an export along)"
    difference = _first_of(changes + additions)
    raise UserError("data.corpus", f"{spec.corpus} is not what the run began with: {difference}; {advice}")


def _compare(before: dict[str, Any], sizes: dict[str, tuple[Path, int]]) -> tuple[list[str], list[str]]:
    """Changes of the existing files, and additions, as texts."""
    changes, grown = [], []
    for name, (size, digest) in before["files"].items():
        path, size_now = sizes.get(name, (None, 0))
        if path is None:
            changes.append(f"{name} is gone")
        elif size_now < size:
            changes.append(f"{name} was cut from {size:,} to {size_now:,} bytes")
        elif _blocks(path, size) != digest:
            changes.append(f"{name} has other text")
        elif size_now > size:
            grown.append(f"{name} has grown from {size:,} to {size_now:,} bytes")
    old = {name for name in sizes if PurePath(name) <= PurePath(before["last"])}
    new = len(sizes) - len(old)
    if len(old) != before["num_files"]:
        changes.append(f"{before['num_files']:,} files were there, of {len(sizes):,} now")
    elif not changes and not grown and _names_and_sizes(sizes, before["last"]) != before["all"]:
        changes.append("names or sizes of its files have changed")
    return changes, grown + [f"{new:,} more files, after {before['last']}"] * bool(new)


def _keeps_document_order(
    before: dict[str, Any], now: dict[str, Any], spec: CorpusSpec, num_readers: int, additions: list[str]
) -> bool:
    """Whether the additions leave the existing documents in their order.

    A text file is one document. Files of rows are owned by readers if their number divides by the number of
    readers.
    """
    sizes = _sizes(spec)
    is_text = file_kind(sizes[now["last"]][0]) in ("text", "binary", None)
    if is_text:
        return not any("has grown" in addition for addition in additions)
    return (before["num_files"] % num_readers == 0) == (now["num_files"] % num_readers == 0)


def _sizes(spec: CorpusSpec) -> dict[str, tuple[Path, int]]:
    """Path and size of each file, keyed by its path relative to the corpus's folder."""
    files, root = corpus_files(spec)
    with convert_read_errors(spec.corpus):
        return {path.relative_to(root).as_posix(): (path, path.stat().st_size) for path in files}


def _names_and_sizes(sizes: dict[str, tuple[Path, int]], last: str) -> str:
    """A hash of the names and sizes of the files up to the name `last`."""
    return _hash(
        "\n".join(
            f"{name} {size}" for name, (_, size) in sorted(sizes.items()) if PurePath(name) <= PurePath(last)
        )
    )


def _blocks(path: Path, size: int) -> str:
    """A hash of the first, middle and last block of a file's first `size` bytes; of a remote file, its
    version if the server gives one."""
    if isinstance(path, RemotePath) and (version := path.info.version) is not None:
        return _hash(version)
    blocks = []
    with convert_read_errors(path), path.open("rb") as file:
        for start in (0, size // 2, max(size - BLOCK_BYTES, 0)):
            file.seek(start)
            blocks.append(file.read(min(size - start, BLOCK_BYTES)))
    return _hash(b"".join(blocks))


def _hash(data: str | bytes) -> str:
    data = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _first_of(changes: list[str]) -> str:
    """The first three changes and the number of the others."""
    more = len(changes) - 3
    return "; ".join(changes[:3]) + f"; and {more:,} more changes" * (more > 0)
