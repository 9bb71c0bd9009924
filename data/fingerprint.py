"""Detects whether a corpus has changed since the run began, without reading it all.

    all files         their number, and a hash of their names and sizes
    up to 256 files   for each: its size, and a hash of its first, middle and last block
    up to 10,000 more for each: its size
    hub dataset       the commit

The 256 files are those whose names have the smallest hashes, so added files replace only few of them. Names
are relative to the corpus, so a corpus that was moved has the same fingerprint.
"""

import hashlib
import platform
import re
from pathlib import Path, PurePath
from typing import Any

from ..common.errors import UserError
from ..common.files import user_path
from .corpus import PYTHON_STDLIB, CorpusSpec, corpus_files
from .document_stream import open_shares
from .files import convert_read_errors, file_kind
from .prepared import is_prepared, read_manifest
from .remote import RemotePath

MAX_HASHED_FILES = 256
MAX_NAMED_FILES = 10_000
BLOCK_BYTES = 4096


def corpus_fingerprint(spec: CorpusSpec) -> dict[str, Any] | None:
    """Describe a corpus as JSON; None for a dataset of the hub without a commit as its revision.

    Raises:
        UserError: a file cannot be read.
    """
    if spec.corpus == PYTHON_STDLIB:
        return {"python": platform.python_version()}
    if is_prepared(spec.corpus):  # the same text, so a run may go from one to the other
        return read_manifest(user_path(spec.corpus))["fingerprint"]
    sizes = _sizes(spec)
    if not sizes:
        is_commit = re.fullmatch("[0-9a-f]{40}", spec.revision or "")
        return {"commit": spec.revision} if is_commit else None
    chosen = sorted(sizes, key=_hash)[:MAX_HASHED_FILES]
    hashed = {name: [sizes[name][1], _blocks(sizes[name][0], sizes[name][1])] for name in sorted(chosen)}
    last = max(sizes, key=PurePath)
    fingerprint = {
        "num_files": len(sizes),
        "last": last,
        "all": _names_and_sizes(sizes, last),
        "files": hashed,
    }
    others = sorted(sizes.keys() - hashed.keys())[:MAX_NAMED_FILES]
    return {**fingerprint, "sizes": {name: sizes[name][1] for name in others}} if others else fingerprint


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
    changes, additions = _differences(before, spec)
    if not changes and not additions:
        return None
    if (
        not changes
        and order == "documents"
        and spec.join is None
        and _keeps_order(spec, num_readers, additions)
    ):
        added = _first_of(additions)
        return (
            f"{spec.corpus} has more text than when the run began ({added}); it is read when its turn comes"
        )
    raise _changed_error(spec, changes + additions)


def check_same_text(before: dict[str, Any], spec: CorpusSpec) -> None:
    """Compare a corpus with its fingerprint of before, and accept no additions.

    Raises:
        UserError: the text is not the same.
    """
    changes, additions = _differences(before, spec)
    if changes or additions:
        raise _changed_error(spec, changes + additions)


def _changed_error(spec: CorpusSpec, differences: list[str]) -> UserError:
    advice = "put it back, or name another run.dir (model.init_from takes the weights of an export along)"
    what = _first_of(differences)
    return UserError("data.corpus", f"{spec.corpus} is not what the run began with: {what}; {advice}")


def _differences(before: dict[str, Any], spec: CorpusSpec) -> tuple[list[str], list[str]]:
    """Changes of what the fingerprint describes, and additions, as texts."""
    if is_prepared(spec.corpus):
        own = {key: value for key, value in before.items() if key != "validation"}
        return ["it was prepared from other text"] * (own != corpus_fingerprint(spec)), []
    if "files" in before:
        if not (sizes := _sizes(spec)):
            return ["it had files of its own"], []
        return _compare(before, sizes)
    now = corpus_fingerprint(spec) or {}
    if "python" in before and before != now:
        version = before["python"]
        return [f"was the library of Python {version}, this is {now.get('python', 'something else')}"], []
    if "commit" in before and before["commit"] != now.get("commit"):
        current = now.get("commit", "something else")
        return [f"was commit {before['commit']} of a hub dataset, this is {current}"], []
    return [], []


def _compare(before: dict[str, Any], sizes: dict[str, tuple[Path, int]]) -> tuple[list[str], list[str]]:
    """Changes of the existing files, and additions, as texts."""
    changes, grown = [], []
    known = {**before["files"], **{name: [size, None] for name, size in before.get("sizes", {}).items()}}
    for name, (size, digest) in known.items():
        path, size_now = sizes.get(name, (None, 0))
        if path is None:
            changes.append(f"{name} is gone")
        elif size_now < size:
            changes.append(f"{name} was cut from {size:,} to {size_now:,} bytes")
        elif digest is not None and _blocks(path, size) != digest:
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


def _keeps_order(spec: CorpusSpec, num_readers: int, additions: list[str]) -> bool:
    """Whether the additions leave the existing documents in their order.

    A text file is one document. More files of rows change the order in which shards are read; a file of rows
    may grow if no shard is cut.
    """
    files, _ = corpus_files(spec)
    has_grown = any("has grown" in addition for addition in additions)
    if file_kind(files[-1]) in ("text", "binary", None):
        return not has_grown
    if len(additions) > 1 or not has_grown:
        return False
    shares, by_hash = open_shares(spec, "train", num_readers)
    is_cut = any(part.within for parts in shares.owned for part in parts)
    return not is_cut and (by_hash or spec.held_out == 0)


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
