"""Changes of a corpus between runs: refused, or accepted with a note if text was only added at the end."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import some_texts, write_corpus

from minrnn.common.errors import UserError
from minrnn.data import CorpusSpec, check_corpus, check_same_text, corpus_fingerprint
from minrnn.data.corpus import PYTHON_STDLIB

TEXTS = [f"document {i} {text}" for i, text in enumerate(some_texts(40))]


def fingerprint_of(spec: CorpusSpec) -> dict[str, Any]:
    fingerprint = json.loads(json.dumps(corpus_fingerprint(spec)))
    assert fingerprint is not None
    return fingerprint


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:5] + bytes([data[5] ^ 1]) + data[6:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def prepend(path: Path) -> None:
    path.write_bytes(b'{"text": "new"}\n' + path.read_bytes())


def rename(path: Path) -> None:
    path.rename(path.with_name(f"zz{path.suffix}"))


def add_before(path: Path) -> None:
    path.with_name(f"0{path.suffix}").write_bytes(path.read_bytes())


CHANGES: dict[Callable[[Path], Any], str] = {
    flip: " has other text",
    cut: " was cut from ",
    prepend: " has other text",
    rename: " is gone",
    add_before: " files were there, of ",
    Path.unlink: " is gone",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_other_text_is_refused(kind: str, change: Callable[[Path], Any], tmp_path: Path):
    spec = write_corpus(kind, tmp_path, TEXTS, 2)
    before = fingerprint_of(spec)
    assert check_corpus(before, spec, "documents", 1) is None
    first = min(path for path in tmp_path.iterdir())
    change(first)
    with pytest.raises(UserError) as caught:
        check_corpus(before, spec, "documents", 1)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"error: data.corpus: {tmp_path} is not what the run began with: ")
    assert CHANGES[change] in line
    assert "name another run.dir" in line


def append(folder: Path, kind: str) -> None:
    last = max(folder.iterdir())
    with last.open("ab") as file:
        file.write(b'{"text": "one more"}\n' if kind == "jsonl" else b"one more")


def add_after(folder: Path, kind: str) -> None:
    last = max(folder.iterdir())
    last.with_name(f"zz{last.suffix}").write_bytes(last.read_bytes())


@pytest.mark.parametrize(
    ("kind", "addition", "order", "readers", "join", "addition_note"),
    [
        ("jsonl", append, "documents", 1, None, "has grown from "),
        ("text", add_after, "documents", 2, None, "1 more files, after 00039.txt"),
        ("jsonl", append, "windows", 1, None, None),
        ("jsonl", append, "documents", 1, "other", None),
        ("jsonl", add_after, "documents", 1, None, None),
        ("jsonl", add_after, "documents", 2, None, None),
        ("text", append, "documents", 1, None, None),
    ],
)
def test_added_text_is_accepted_if_it_keeps_the_order(
    kind: str,
    addition: Callable[[Path, str], None],
    order: str,
    readers: int,
    join: str | None,
    addition_note: str | None,
    tmp_path: Path,
):
    write_corpus(kind, tmp_path, TEXTS, 2)
    spec = CorpusSpec(str(tmp_path), join=join)
    before = fingerprint_of(spec)
    addition(tmp_path, kind)
    if addition_note is None:
        with pytest.raises(UserError, match=r"^error: data\.corpus: .* is not what the run began with: "):
            check_corpus(before, spec, order, readers)
    else:
        note = check_corpus(before, spec, order, readers)
        assert note is not None
        assert addition_note in note


def test_only_256_files_are_hashed(tmp_path: Path):
    """Of the other files only names and sizes are compared, and the fingerprint stays small."""
    for number in range(600):
        (tmp_path / f"{number:03}.txt").write_text(f"text {number}")
    spec = CorpusSpec(str(tmp_path))
    before = fingerprint_of(spec)
    assert len(before["files"]) == 256
    assert len(json.dumps(before)) < 40_000
    other = next(path for path in sorted(tmp_path.iterdir()) if path.name not in before["files"])
    other.write_text("another size")
    with pytest.raises(UserError, match=rf"{other.name} has grown from 6 to 12 bytes"):
        check_corpus(before, spec, "documents", 1)


def test_changes_outside_the_text_are_ignored(tmp_path: Path):
    """Modification times, hidden files, the run's own files, and another path to the same folder."""
    spec = write_corpus("jsonl", tmp_path / "corpus", TEXTS)
    before = fingerprint_of(spec)
    for path in (tmp_path / "corpus").iterdir():
        os.utime(path, (0, 0))
    (tmp_path / "corpus" / ".cache").write_text("x")
    (tmp_path / "corpus" / "run").mkdir()
    (tmp_path / "corpus" / "run" / "samples.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    run = os.path.realpath(tmp_path / "corpus" / "run")
    for name in ("corpus", "link"):
        assert check_corpus(before, CorpusSpec(str(tmp_path / name), excluded=(run,)), "documents", 1) is None


def test_the_standard_library_of_another_python_version_is_refused():
    before = fingerprint_of(CorpusSpec(PYTHON_STDLIB))
    assert check_corpus(before, CorpusSpec(PYTHON_STDLIB), "documents", 1) is None
    with pytest.raises(UserError, match=r"was the library of Python 3\.0\.0, this is 3\."):
        check_corpus({"python": "3.0.0"}, CorpusSpec(PYTHON_STDLIB), "documents", 1)
    with pytest.raises(UserError, match=r"was the library of Python 3.*, this is something else"):
        check_corpus(before, CorpusSpec("org/name"), "documents", 1)


def test_a_commit_identifies_a_hub_dataset():
    one, other = "a" * 40, "b" * 40
    before = fingerprint_of(CorpusSpec("org/name", revision=one))
    assert before == {"commit": one}
    assert check_corpus(before, CorpusSpec("org/name", revision=one), "documents", 1) is None
    with pytest.raises(UserError, match=f"was commit {one} of a hub dataset, this is {other}"):
        check_corpus(before, CorpusSpec("org/name", revision=other), "documents", 1)
    assert corpus_fingerprint(CorpusSpec("org/name", revision="main")) is None


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_corpus_that_moved_is_the_same_and_another_is_not(kind: str, tmp_path: Path):
    before = fingerprint_of(write_corpus(kind, tmp_path / "one", TEXTS, 2))
    (tmp_path / "one").rename(tmp_path / "two")
    moved = CorpusSpec(str(tmp_path / "two"))
    assert check_corpus(before, moved, "documents", 2) is None
    check_same_text(before, moved)
    add_after(tmp_path / "two", kind)
    with pytest.raises(UserError, match="1 more files"):
        check_same_text(before, moved)
    other = write_corpus(kind, tmp_path / "three", some_texts(40, seed=1), 2)
    with pytest.raises(UserError, match="is not what the run began with"):
        check_corpus(before, other, "documents", 2)
