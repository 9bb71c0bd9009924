"""Joined documents are the concatenation of their parts, and readers treat them like any documents."""

import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import ENCODER, FEW_EXAMPLES, as_array, assert_same_chunk, read_back, some_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import CorpusSpec, DocumentReader, DocumentStream, ReaderSpec, open_source
from minrnn.data.corpus import PYTHON_STDLIB, STDLIB_HELD_OUT, Split
from minrnn.data.hold_out import is_held_out
from minrnn.data.hub import HubDataset
from minrnn.data.joined import JoinedRows, join_documents, joined_text
from minrnn.data.sources import Document, Position, Source

PARTS = st.text("ab\né", max_size=4)
KINDS = ("jsonl", "parquet", "hub")


@dataclass(frozen=True)
class Row:
    book: str | int | None
    text: str | None
    """None: a broken row."""


ROWS = st.lists(
    st.builds(Row, st.sampled_from(["a", "b", 7, None]), st.one_of(PARTS, PARTS, PARTS, st.none())),
    min_size=1,
    max_size=14,
)
TYPED_ROWS = st.lists(
    st.builds(Row, st.sampled_from(["a", "b", None]), st.one_of(PARTS, PARTS, st.none())),
    min_size=1,
    max_size=14,
)


def write_rows(kind: str, folder: Path, shards: list[list[Row]]) -> None:
    """Write the rows as a corpus of this kind; row groups of parquet files are small."""
    for number, rows in enumerate(shards):
        if kind == "jsonl":
            path = folder / f"part-{number:05}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"book": row.book, "text": row.text}) + "\n" for row in rows))
        else:
            path = folder / (
                f"part-{number:05}.parquet"
                if kind == "parquet"
                else f"data/train-{number:05}-of-{len(shards):05}.parquet"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            columns = {
                name: pyarrow.array([getattr(row, name) for row in rows], pyarrow.string())
                for name in ("book", "text")
            }
            pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)


def open_rows(kind: str, folder: Path) -> Source:
    if kind == "hub":
        return join_documents(
            HubDataset(str(folder), None, "train", None, "text", skip_broken=True, group_field="book"), "book"
        )
    return open_source(CorpusSpec(str(folder), skip_broken=True, join="book"), "all")


def naive_join(rows: list[Row]) -> list[tuple[str | None, int]]:
    """Text and number of broken rows of each document of a shard.

    A broken row counts with the document before it, those at the start with the first document.
    """
    documents: list[tuple[list[str], int, Any]] = []
    leading = 0
    for row in rows:
        if row.text is None and not documents:
            leading += 1
        elif row.text is None:
            texts, num_broken, book = documents[-1]
            documents[-1] = (texts, num_broken + 1, book)
        elif documents and row.book is not None and documents[-1][2] == row.book:
            documents[-1][0].append(row.text)
        else:
            documents.append(([row.text], leading, row.book))
            leading = 0
    return [(naive_text(texts), num_broken) for texts, num_broken, _ in documents] or [(None, leading)]


def naive_text(texts: list[str]) -> str:
    whole = ""
    for text in texts:
        whole += "\n" if text and whole and whole[-1] != "\n" else ""
        whole += text
    return whole


@given(st.lists(PARTS, max_size=6))
def test_parts_are_concatenated_with_missing_newlines_added(parts: list[str]):
    assert joined_text(parts) == naive_text(parts)


@pytest.mark.parametrize("kind", KINDS)
@settings(FEW_EXAMPLES, max_examples=15)  # a streamed dataset takes a while to open
@given(data=st.data())
def test_rows_are_joined_and_read_from_any_position(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    shards = data.draw(st.lists(ROWS if kind == "jsonl" else TYPED_ROWS, min_size=1, max_size=2))
    folder = tmp_path_factory.mktemp("rows") / "corpus"
    write_rows(kind, folder, shards)
    source = open_rows(kind, folder)
    assert source.num_shards == len(shards)
    for shard, rows in enumerate(shards):
        whole: list[Document] = []
        hints: list[Any] = [None]
        for document in source.read(shard, Position()):
            whole.append(document)
            hints.append(json.loads(json.dumps(source.hint())))
        assert [(document.text, document.num_skipped) for document in whole] == naive_join(rows)
        assert [document.index for document in whole] == list(range(len(whole)))
        for count, hint in enumerate(hints):
            reading = open_rows(kind, folder)
            assert list(reading.read(shard, Position(count, hint))) == whole[count:]
            assert list(reading.read(shard, Position(count))) == whole[count:], "without a hint"
        for count in data.draw(
            st.lists(st.integers(1, 3), min_size=1, max_size=3)
        ):  # a hint taken after going on from a hint
            at, hint, again = 0, None, open_rows(kind, folder)
            while at < len(whole):
                actual = list(itertools.islice(again.read(shard, Position(at, hint)), count))
                assert actual == whole[at : at + count]
                at, hint = at + count, json.loads(json.dumps(again.hint()))


NAMES = st.sampled_from(["a.py", "b.py", "m.py", "z.py"])
FOLDERS = st.sampled_from(["", "", "a", "b", "m/n", "m", "m/n/o", "z"])


@pytest.mark.parametrize("join", ["folder", "package"])
@FEW_EXAMPLES
@given(tree=st.dictionaries(st.tuples(FOLDERS, NAMES), PARTS.filter(bool), min_size=1, max_size=14))
def test_files_are_joined_and_read_from_any_position(
    join: str, tree: dict[tuple[str, str], str], tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("files") / "corpus"
    for (parent, name), text in tree.items():
        (folder / parent).mkdir(parents=True, exist_ok=True)
        (folder / parent / name).write_bytes(text.encode())
    expected: dict[str, list[str]] = {}
    for parent, name in sorted(tree, key=lambda key: [*key[0].split("/"), key[1]] if key[0] else [key[1]]):
        group = name if not parent else parent.split("/")[0] if join == "package" else parent
        expected.setdefault(group if not parent else f"{group}/", []).append(tree[parent, name])
    for corpus in (str(folder), f"{folder}/**/*.py"):
        source = open_source(CorpusSpec(corpus, join=join), "all")
        whole = list(source.read(0, Position()))
        assert [document.text for document in whole] == [naive_text(texts) for texts in expected.values()]
        counts = [
            f" ({len(texts)} file{'s' * (len(texts) > 1)})" if name.endswith("/") else ""
            for name, texts in expected.items()
        ]
        assert [document.name for document in whole] == [
            name + count for name, count in zip(expected, counts, strict=True)
        ]
        for count in range(len(whole) + 1):
            assert list(source.read(0, Position(count))) == whole[count:]


def make_books(num_books: int, seed: int = 0) -> list[Row]:
    """Books of one to five rows each, with texts of many lengths."""
    texts = iter(some_texts(5 * num_books + 1, seed)[1:])
    return [
        Row(f"book {book}", text)
        for book in range(num_books)
        for text in itertools.islice(texts, 1 + book % 5)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("num_shards", "num_readers"), [(1, 1), (2, 2), (3, 2)])
def test_a_reader_of_joined_rows_resumes_exactly(
    kind: str, num_shards: int, num_readers: int, tmp_path: Path
):
    write_rows(kind, tmp_path, [make_books(9, seed) for seed in range(num_shards)])
    spec = CorpusSpec(str(tmp_path), join="book")

    def read(state: Any = None) -> DocumentReader:
        readers = ReaderSpec(spec, "documents", ENCODER, num_readers, lanes=2, chunk=16, window=3, seed=5)
        return DocumentReader(readers, num_readers - 1, state)

    reader = read()
    whole = [reader.next_chunk() for _ in range(24)]
    for at in range(23):
        resumed = read(json.loads(json.dumps(whole[at].state)))
        for expected in whole[at + 1 :]:
            assert_same_chunk(resumed.next_chunk(), expected)
    documents = {
        naive_text([row.text or "" for row in make_books(9, seed) if row.book == f"book {i}"])
        for seed in range(num_shards)
        for i in range(9)
    }
    assert {text for lane in read_back(whole) for text in lane.whole} <= documents
    assert len({as_array(chunk).tobytes() for chunk in whole}) > 1


@pytest.mark.parametrize("num_readers", [1, 2, 3])
def test_readers_share_joined_documents(num_readers: int, tmp_path: Path):
    """Books have two rows each.

    Sharing rows would split them; sharing by the index of the last row would leave a reader without any.
    """
    write_rows("jsonl", tmp_path, [[Row(book // 2, f"{book}") for book in range(24)]])
    spec = CorpusSpec(str(tmp_path), join="book")
    shares = [
        [r.text for r in DocumentStream(spec, "train", reader, num_readers, 3, 7).one_epoch()]
        for reader in range(num_readers)
    ]
    assert Counter(text for share in shares for text in share) == Counter(
        f"{2 * book}\n{2 * book + 1}" for book in range(12)
    )
    assert {len(share) for share in shares} == {12 // num_readers}


def test_what_is_held_out_is_chosen_by_the_joined_text(tmp_path: Path):
    write_rows("jsonl", tmp_path, [make_books(60)])
    spec = CorpusSpec(str(tmp_path), join="book", held_out=0.3)
    parts: dict[Split, list[str]] = {"train": [], "validation": [], "all": []}
    for part, texts in parts.items():
        texts += [document.text or "" for document in DocumentStream(spec, part, 0, 1, 8, None).one_epoch()]
    assert parts["all"] == [text for text, _ in naive_join(make_books(60))]
    assert parts["validation"] == [text for text in parts["all"] if is_held_out(text, 0.3)]
    assert parts["train"] == [text for text in parts["all"] if not is_held_out(text, 0.3)]
    assert parts["validation"]


def test_python_stdlib_is_held_out_by_whole_packages():
    parts: tuple[Split, ...] = ("train", "validation")
    for part in parts:
        files = list(open_source(CorpusSpec(PYTHON_STDLIB), part).read(0, Position()))
        documents = list(open_source(CorpusSpec(PYTHON_STDLIB, join="package"), part).read(0, Position()))
        names = [document.name.split("/ (")[0].removesuffix(".py") for document in documents]
        assert (set(names) <= STDLIB_HELD_OUT) == (part == "validation")
        assert len(set(names)) == len(names), "each package once"
        assert sum(len(document.text or "") for document in documents) >= sum(
            len(document.text or "") for document in files
        )
        package = "json" if part == "validation" else "email"
        count = sum(document.name.startswith(f"{package}/") for document in files)
        assert f"{package}/ ({count} files)" in [document.name for document in documents]


def test_a_broken_file_is_left_out_of_its_document(tmp_path: Path):
    (tmp_path / "package").mkdir()
    for name, data in (("a.py", b"one"), ("b.py", b"\xff"), ("c.py", b"two\n")):
        (tmp_path / "package" / name).write_bytes(data)
    with pytest.raises(UserError, match=r"b\.py is not UTF-8"):
        list(open_source(CorpusSpec(str(tmp_path), join="folder")).read(0, Position()))
    stream = DocumentStream(CorpusSpec(str(tmp_path), join="folder", skip_broken=True), "all", 0, 1, 4, None)
    (document,) = stream.one_epoch()
    assert (document.text, document.name, document.num_skipped) == ("one\ntwo\n", "package/ (2 files)", 1)


def test_names_say_what_was_joined(tmp_path: Path):
    write_rows("jsonl", tmp_path, [[Row("moby", "a"), Row("moby", "b"), Row(None, "c"), Row(7, "d")]])
    names = [
        document.name for document in open_source(CorpusSpec(str(tmp_path), join="book")).read(0, Position())
    ]
    path = tmp_path / "part-00000.jsonl"
    assert names == [f"book moby (2 rows from {path}:1)", f"{path}:3", f"book 7 (1 row from {path}:4)"]


def test_ways_of_joining_that_do_not_apply_are_refused(tmp_path: Path):
    def problem(spec: CorpusSpec) -> str:
        with pytest.raises(UserError) as caught:
            list(open_source(spec).read(0, Position()))
        ((key, message),) = caught.value.errors
        assert key == "data.join"
        return message

    (tmp_path / "a.txt").write_text("text")
    assert "join those by folder or package" in problem(CorpusSpec(str(tmp_path), join="book"))
    for kind in ("jsonl", "parquet"):
        write_rows(kind, tmp_path / kind, [[Row("a", "b")]])
        spec = CorpusSpec(str(tmp_path / kind), join="folder")
        assert "join those by the name of a column" in problem(spec)
        assert "has no column 'books' (did you mean 'book'?)" in problem(replace(spec, join="books"))
        assert "has no column 'xyz' (it has 'book', 'text')" in problem(
            replace(spec, join="xyz", skip_broken=True)
        )
    write_rows("hub", tmp_path / "hub", [[Row("a", "b")]])
    with pytest.raises(UserError, match=r"data\.join.*has no column 'boook' \(did you mean 'book'\?\)"):
        list(
            JoinedRows(
                HubDataset(str(tmp_path / "hub"), None, "train", None, "text", group_field="boook"), "boook"
            ).read(0, Position())
        )
