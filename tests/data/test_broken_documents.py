"""Documents that cannot be read are reported with their place, or skipped and counted."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import (
    ENCODER,
    json_line,
    make_source,
    reading_error,
    some_texts,
    write_corpus,
)

from minrnn.common.errors import UserError
from minrnn.data import CorpusSpec, DocumentReader, DocumentStream, ReaderSpec, open_source
from minrnn.data.document_stream import Window, WindowAddress
from minrnn.data.sources import Position


def epoch_of(stream: DocumentStream) -> Iterator[Window]:
    address = WindowAddress()
    while address.epoch == 0:
        window = stream.window(address)
        yield window
        address = window.next_address


BROKEN_LINES = {
    "syntax": b'{"text": \n',
    "no field": b'{"other": "x"}\n',
    "a number": b'{"text": 3}\n',
    "null": b'{"text": null}\n',
    "a list": b'["text"]\n',
    "not UTF-8": b'{"text": "\xff"}\n',
    "half a surrogate pair": b'{"text": "\\ud800"}\n',
    "a number beyond Python's limit": b'{"text": "x", "n": ' + b"1" * 5000 + b"}\n",
}


@pytest.mark.parametrize("what", BROKEN_LINES)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_a_broken_line_is_reported_or_skipped(what: str, kind: str, tmp_path: Path):
    path = tmp_path / f"a.{kind}"
    data = json_line("one").encode() + BROKEN_LINES[what] + json_line("two").encode()
    path.write_bytes(gzip.compress(data) if kind == "jsonl.gz" else data)
    message = reading_error(CorpusSpec(str(path)))
    assert f"{path}:2" in message
    assert "data.skip_broken" in message
    if what in ("no field", "a number", "null"):
        assert "'text'" in message
        assert "data.text_field" in message
    documents = list(open_source(CorpusSpec(str(path), skip_broken=True)).read(0, Position()))
    assert [document.text for document in documents] == ["one", None, "two"]


def test_a_file_that_is_not_text(tmp_path: Path):
    write_corpus("text", tmp_path, ["one", "two"])
    broken = tmp_path / "00000b.txt"
    broken.write_bytes(b"ab\xff")
    message = reading_error(CorpusSpec(str(tmp_path)))
    assert f"{broken} is not UTF-8 (byte 2)" in message
    assert "data.skip_broken" in message
    assert [
        document.text
        for document in open_source(CorpusSpec(str(tmp_path), skip_broken=True)).read(0, Position())
    ] == ["one", None, "two"]


def test_broken_parquet_rows(tmp_path: Path):
    not_utf8 = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")
    )
    for name, column in {
        "null": pyarrow.array(["one", None]),
        "number": pyarrow.array([1, 2]),
        "not-utf8": not_utf8,
    }.items():
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        message = reading_error(CorpusSpec(str(path)))
        assert str(path) in message
        assert "data.skip_broken" in message
        documents = list(open_source(CorpusSpec(str(path), skip_broken=True)).read(0, Position()))
        assert documents[-1].text is None
    pyarrow.parquet.write_table(pyarrow.table({"content": ["one"]}), tmp_path / "other.parquet")
    message = reading_error(CorpusSpec(str(tmp_path / "other.parquet")))
    assert message.startswith("error: data.text_field:")
    assert "'content'" in message
    for name, key, join in (("text", "data.text_field", None), ("book", "data.join", "book")):
        path = tmp_path / f"two-{name}.parquet"
        pyarrow.parquet.write_table(
            pyarrow.table([["one"], ["a"], ["b"]], names=["text", "book", name]), path
        )
        assert f"error: {key}: {path} has 2 columns of the name {name!r}" in reading_error(
            CorpusSpec(str(path), join=join)
        )
    (tmp_path / "fake.parquet").write_text("hello, this is no parquet")
    assert f"{tmp_path / 'fake.parquet'} is not a parquet file" in reading_error(
        CorpusSpec(str(tmp_path / "fake.parquet"))
    )


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_truncated_download_is_reported(kind: str, tmp_path: Path):
    path = Path(write_corpus(kind, tmp_path, some_texts(200)).corpus) / f"part-00000.{kind}"
    path.write_bytes(path.read_bytes()[:-20])
    assert str(path) in reading_error(CorpusSpec(str(path)))


def test_hub_rows_without_text(tmp_path: Path):
    spec = write_corpus("hub", tmp_path, ["one"])
    with pytest.raises(UserError, match=r"data\.text_field.*'content'.*'other', 'text'"):
        list(make_source("hub", replace(spec, text_field="content")).read(0, Position()))
    with pytest.raises(UserError, match=r"data\.split: '.*' has no split 'none'; it has train"):
        make_source("hub", replace(spec, split="none"))
    streamed = write_corpus("jsonl", tmp_path / "streamed", ["one"])
    with pytest.raises(UserError, match=r"data\.text_field.*'content'.*'text', 'other'"):
        list(make_source("hub", replace(streamed, text_field="content")).read(0, Position()))
    documents = list(
        make_source("hub", replace(streamed, text_field="content", skip_broken=True)).read(0, Position())
    )
    assert [document.text for document in documents] == [None]


def test_skipped_documents_are_counted_once(tmp_path: Path):
    lines = [json_line(f"document {i}") if i % 3 else "broken\n" for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    spec = CorpusSpec(str(tmp_path), skip_broken=True)
    assert sum(window.num_skipped for window in epoch_of(DocumentStream(spec, "train", 0, 1, 4, None))) == 10
    readers = ReaderSpec(spec, "documents", ENCODER, 1, lanes=1, chunk=16, window=4, seed=0)
    reader = DocumentReader(readers, 0)
    counts = []
    while (state := json.loads(json.dumps(reader.next_chunk().state)))["window"]["epoch"] == 0:
        counts.append(state["num_skipped"])
        reader = DocumentReader(readers, 0, state)  # a resumed reader keeps the count
    assert counts == sorted(counts)
    assert counts[-1] == 10
