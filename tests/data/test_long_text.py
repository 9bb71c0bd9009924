"""Pieces of long texts are the whole text, whatever their size, and depend on the text alone."""

import contextlib
import gzip
from dataclasses import replace
from pathlib import Path

import pytest
from data_helpers import texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import CorpusSpec, RowRules, open_source
from minrnn.data.corpus import has_fewer_texts, open_text
from minrnn.data.long_text import LongText, Piece
from minrnn.data.sources import Document, Position, Split

TEXTS = st.lists(st.text("ab \né漢🙂", max_size=60), min_size=1, max_size=4)


def spec_of(folder: Path, texts: list[str], held_out: float = 0.0, **fields) -> CorpusSpec:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, newline="")
    return CorpusSpec(str(folder), held_out=held_out, passages=True, **fields)


def open_pieces(spec: CorpusSpec, part: Split, piece_bytes: int) -> LongText:
    return replace(open_text(spec, part), piece_bytes=piece_bytes)


def pieces(text: LongText) -> list[Piece]:
    return [text.piece(number) for number in range(text.num_pieces)]


@settings(max_examples=30)
@given(texts=TEXTS, size=st.integers(4, 40), joined=st.booleans(), mark=st.booleans())
def test_pieces_are_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, joined: bool, mark: bool
):
    folder = tmp_path_factory.getbasetemp() / "pieces" / "books"
    spec = spec_of(folder, [("\ufeff" if mark else "") + text for text in texts])
    texts = [text for text in texts if text]
    if joined:
        spec = CorpusSpec(str(folder.parent), passages=True, join="folder")
        texts = [
            "".join(text if text.endswith("\n") else f"{text}\n" for text in texts[:-1]) + "".join(texts[-1:])
        ]
        texts = [text for text in texts if text]
    if not texts:
        with pytest.raises(UserError, match=r"is empty|holds no text"):
            open_pieces(spec, "all", size)
        return
    text = open_pieces(spec, "all", size)
    read: list[str] = []
    was_end = True
    for piece in pieces(text):
        assert piece.is_begin == was_end
        was_end = piece.is_end
        if piece.is_begin:
            read.append("")
        assert piece.text is not None
        assert len(piece.text.encode()) < 2 * size
        read[-1] += piece.text
    assert was_end
    assert read == texts
    assert text.num_bytes == sum(len(text.encode()) for text in texts)


@settings(max_examples=30)
@given(texts=TEXTS, size=st.integers(4, 20), fraction=st.floats(0.05, 0.9))
def test_training_and_validation_are_the_beginning_and_the_end(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, fraction: float
):
    """Cut at the same place, whatever the size of the pieces."""
    spec = spec_of(tmp_path_factory.getbasetemp() / "parts", texts, fraction)
    whole = "".join(texts)

    def part_text(part, size: int) -> str:
        with contextlib.suppress(UserError):  # there is no text in this part
            return "".join(piece.text or "" for piece in pieces(open_pieces(spec, part, size)))
        return ""

    train, validation = part_text("train", size), part_text("validation", size + 3)
    assert train + validation == whole
    assert abs(len(validation.encode()) - fraction * len(whole.encode())) <= max(
        len(text.encode()) for text in texts
    )


@settings(max_examples=30)
@given(lines=st.lists(st.text("ab ", max_size=8), min_size=2, max_size=40), size=st.integers(9, 30))
def test_a_piece_begins_at_the_first_line_start_of_its_range(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int
):
    whole = "\n".join(lines) + "\nlast"
    spec = spec_of(tmp_path_factory.getbasetemp() / "lines", [whole])
    place = 0
    for number, piece in enumerate(pieces(open_pieces(spec, "all", size))):
        if number > 0 and "\n" in whole[number * size - 1 : (number + 1) * size - 1]:
            assert place == whole.index("\n", number * size - 1) + 1
        assert piece.text is not None
        place += len(piece.text)


def test_passages_are_documents_without_an_end_but_the_last(tmp_path: Path):
    spec = spec_of(tmp_path, ["line\n" * 2000, "", "short"])
    source = open_source(spec)
    documents: list[Document] = []
    for shard in range(source.num_shards):
        (document,) = source.read(shard, Position())
        assert list(source.read(shard, Position(1))) == []
        documents.append(document)
    assert "".join(texts_of(documents)) == "line\n" * 2000 + "short"
    assert len(documents) == 6
    assert [document.is_cut for document in documents] == [True] * 4 + [False, False]
    assert [document.name for document in documents[:2]] == ["0.txt@0", "0.txt@2050"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(b"\xff", "is not UTF-8"), (b"\0", "holds a NUL byte"), ("é".encode()[:1], "is not UTF-8")],
)
def test_broken_text_in_the_middle_is_named_or_left_out(tmp_path: Path, damage: bytes, problem: str):
    lines = [b"%05d a line\n" % number for number in range(3000)]
    lines[2000] = lines[2000][:6] + damage + lines[2000][7:]
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(lines))
    spec = CorpusSpec(str(path), passages=True)
    for read in (lambda: open_text(spec, "train").check(), lambda: pieces(open_text(spec, "train"))):
        with pytest.raises(UserError, match=rf"a\.txt .*{problem}.* \(byte 26,006\); .*data.skip_broken"):
            read()
    texts = [
        piece.text
        for piece in pieces(open_text(CorpusSpec(str(path), passages=True, skip_broken=True), "all"))
    ]
    assert texts.count(None) == 1
    read = "".join(text for text in texts if text is not None)
    assert 0 < 39_000 - len(read) < 2 * 8192
    assert set(read.splitlines()) <= {line.decode().strip() for line in lines if damage not in line}


def test_a_compressed_text_is_read_as_the_plain_one(tmp_path: Path):
    text = "".join(f"line {number}\n" for number in range(500))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    spec = CorpusSpec(str(tmp_path), passages=True, held_out=0.1)
    read = [
        piece.text or "" for part in ("train", "validation") for piece in pieces(open_pieces(spec, part, 100))
    ]
    assert "".join(read) == text
    assert len(read) > 40


def test_binary_and_damaged_files_are_named_or_left_out(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"more text")[:-9])
    with pytest.raises(UserError, match=r"b\.txt\.gz is damaged"):
        open_text(CorpusSpec(str(tmp_path), passages=True), "train")
    text = open_text(CorpusSpec(str(tmp_path), passages=True, skip_broken=True), "train")
    assert (text.num_bytes, text.num_skipped) == (10, 1)
    (tmp_path / "a.txt").unlink()
    for part in ("train", "validation"):
        with pytest.raises(UserError, match="holds no text: 1 files are left out as broken"):
            open_text(CorpusSpec(str(tmp_path), passages=True, skip_broken=True), part)


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path):
    spec = spec_of(tmp_path, ["line\n" * 100])
    text = open_pieces(spec, "train", 50)
    (tmp_path / "0.txt").write_text("line\n")
    with pytest.raises(UserError, match=r"0\.txt has become shorter"):
        text.piece(5)


def test_only_few_files_of_text_are_long_texts(tmp_path: Path):
    spec = spec_of(tmp_path / "text", ["a", "", "b", "c"])
    assert [has_fewer_texts(spec, count) for count in (1, 3, 4, 5)] == [False, False, True, True]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    assert not has_fewer_texts(CorpusSpec(str(rows)), 9)
    assert not has_fewer_texts(CorpusSpec("name/of-a-dataset"), 9)
    assert not has_fewer_texts(CorpusSpec("python-stdlib"), 9)
    assert has_fewer_texts(CorpusSpec("python-stdlib"), 10**6)
    with pytest.raises(UserError, match="has rows"):
        open_text(CorpusSpec(str(rows)), "train")


def test_a_filter_does_not_make_documents_of_a_long_text(tmp_path: Path):
    """It would leave one document, and an error that does not name the filter."""
    spec = spec_of(tmp_path, ["line\n" * 100], rules=RowRules(min_bytes=9))
    assert has_fewer_texts(spec, 2)
    with pytest.raises(
        UserError, match=r"data\.filter: is for whole documents, and .* is read from positions"
    ):
        open_text(spec, "train")


def test_empty_parts_are_errors(tmp_path: Path):
    spec = spec_of(tmp_path, ["a line\n"], held_out=0.01)
    with pytest.raises(UserError, match="validation_fraction: leaves no text"):
        open_source(spec, "validation")
    (tmp_path / "1.txt").write_bytes(b"")
    assert open_source(spec, "train").num_shards == 1
