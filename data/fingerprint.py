"""Whether a corpus is what a run began with, as far as that is seen without reading it.

    all files         their number, and a hash of their names and sizes
    up to 256 files   for each: its size, and a hash of its first, middle and last block

The 256 are those whose names have the smallest hashes, so that files which are added leave most of them as they were.
"""

import hashlib
import platform
from pathlib import Path, PurePath
from typing import Any

from .corpus import PYTHON_STDLIB, CorpusSpec, local_files
from .errors import UserError
from .files import errors_name, file_kind

MOST_HASHED = 256
BLOCK_BYTES = 4096


def corpus_fingerprint(spec: CorpusSpec) -> dict[str, Any] | None:
    """JSON that `check_corpus` compares a corpus with later; None for a dataset of the hub, of which `data.revision` says the version.

    Raises:
        UserError: a file cannot be read.
    """
    if spec.corpus == PYTHON_STDLIB:
        return {"python": platform.python_version()}
    sizes = _sizes(spec)
    if not sizes:
        return None
    chosen = sorted(sizes, key=_hash)[:MOST_HASHED]
    hashed = {name: [sizes[name][1], _blocks(sizes[name][0], sizes[name][1])] for name in sorted(chosen)}
    last = max(sizes, key=PurePath)
    return {"num_files": len(sizes), "last": last, "all": _names_and_sizes(sizes, last), "files": hashed}


def check_corpus(before: dict[str, Any], spec: CorpusSpec, order: str, num_readers: int) -> str | None:
    """What was added to a corpus since `corpus_fingerprint` described it, if that leaves the documents before it where they were.

    Args:
        before: of the corpus as the run began, or last went on.
        order: data.order.
        num_readers: batch.readers.

    Raises:
        UserError: text that was there has changed or is gone, or what was added changes the order of the documents.
    """
    now = corpus_fingerprint(spec)
    if now is None or ("python" in before) != ("python" in now):
        return None  # another corpus, which the recipe's own comparison refuses
    if "python" in now:
        changes = [f"was the library of Python {before['python']}, this is {now['python']}"] * (before != now)
        additions = []
    else:
        changes, additions = _compare(before, _sizes(spec))
    if not changes and not additions:
        return None
    if (
        not changes
        and order == "documents"
        and spec.join is None
        and _keeps_the_order(before, now, spec, num_readers, additions)
    ):
        return f"{spec.corpus} has more text than when the run began ({_listed(additions)}); it is read where its turn comes"
    advice = "put it back, or name another run.dir (model.init_from takes the weights of an export along)"
    raise UserError(
        (
            "data.corpus",
            f"{spec.corpus} is not what the run began with: {_listed(changes + additions)}; {advice}",
        )
    )


def _compare(before: dict[str, Any], sizes: dict[str, tuple[Path, int]]) -> tuple[list[str], list[str]]:
    """Changes of what was there, and what was added."""
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
    return changes, grown + [f"{new:,} more files, behind {before['last']}"] * bool(new)


def _keeps_the_order(
    before: dict[str, Any], now: dict[str, Any], spec: CorpusSpec, num_readers: int, additions: list[str]
) -> bool:
    """Whether what was there stays where it was. A file of text is one document; readers own files of rows where those divide among them."""
    some = _sizes(spec)
    is_text = file_kind(some[now["last"]][0]) in ("text", "binary", None)
    if is_text:
        return not any("has grown" in addition for addition in additions)
    return (before["num_files"] % num_readers == 0) == (now["num_files"] % num_readers == 0)


def _sizes(spec: CorpusSpec) -> dict[str, tuple[Path, int]]:
    """Path and size of each file, by its name below the corpus's folder."""
    files, root = local_files(spec.corpus, spec.left_out)
    with errors_name(spec.corpus):
        return {path.relative_to(root).as_posix(): (path, path.stat().st_size) for path in files}


def _names_and_sizes(sizes: dict[str, tuple[Path, int]], last: str) -> str:
    """A hash over the files up to one name."""
    return _hash(
        "\n".join(
            f"{name} {size}" for name, (_, size) in sorted(sizes.items()) if PurePath(name) <= PurePath(last)
        )
    )


def _blocks(path: Path, size: int) -> str:
    """A hash of the first, the middle and the last block of a file's first `size` bytes."""
    blocks = []
    with errors_name(path), path.open("rb") as file:
        for start in (0, size // 2, max(size - BLOCK_BYTES, 0)):
            file.seek(start)
            blocks.append(file.read(min(size - start, BLOCK_BYTES)))
    return _hash(b"".join(blocks))


def _hash(data: str | bytes) -> str:
    data = data.encode(errors="surrogateescape") if isinstance(data, str) else data
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _listed(changes: list[str]) -> str:
    """The first few."""
    more = len(changes) - 3
    return "; ".join(changes[:3]) + f"; and {more:,} more changes" * (more > 0)
