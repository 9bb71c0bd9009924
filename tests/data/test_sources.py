"""Reading a source from any position gives the tail of reading it from the start; broken documents are
reported.
"""

import bz2
import gzip
import itertools
import json
import pickle
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data_helpers import (
    KINDS,
    OTHER_NAMES,
    csv_rows,
    json_line,
    make_source,
    read_all,
    reading_error,
    some_texts,
    texts_of,
    write_corpus,
)

from minrnn.data import CorpusSpec, open_source
from minrnn.data.rows import JsonLines
from minrnn.data.sources import Position, TextFiles


@pytest.mark.parametrize("kind", KINDS + OTHER_NAMES)
@pytest.mark.parametrize("num_shards", [1, 2])
def test_reading_from_any_position_gives_the_tail(kind: str, num_shards: int, tmp_path: Path):
    texts = some_texts(17)
    source = make_source(kind, write_corpus(kind, tmp_path, texts, num_shards))
    assert source.num_shards == (1 if kind.startswith(("text", "txt")) else num_shards)
    shards = read_all(source)
    assert texts_of(itertools.chain(*shards)) == texts
    assert read_all(source) == shards
    for shard, whole in enumerate(shards):
        assert [document.index for document in whole] == list(range(len(whole)))
        for count in range(len(whole) + 1):
            reading = source.read(shard, Position())
            assert list(itertools.islice(reading, count)) == whole[:count]
            hint = json.loads(json.dumps(source.hint())) if count else None
            assert list(source.read(shard, Position(count, hint))) == whole[count:]
            assert list(source.read(shard, Position(count))) == whole[count:], "without a hint"


@pytest.mark.parametrize("kind", KINDS + OTHER_NAMES)
def test_a_hint_taken_after_resuming_from_a_hint(kind: str, tmp_path: Path):
    source = make_source(kind, write_corpus(kind, tmp_path, some_texts(17)))
    whole = read_all(source)[0]
    hint = None
    for count in range(0, 16, 2):
        reading = source.read(0, Position(count, hint))
        assert list(itertools.islice(reading, 2)) == whole[count : count + 2]
        hint = json.loads(json.dumps(source.hint()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS + OTHER_NAMES if kind != "hub"])
def test_the_kind_is_detected_from_the_suffix(kind: str, tmp_path: Path):
    source = open_source(write_corpus(kind, tmp_path, some_texts(3)))
    assert type(source) is type(make_source(kind, CorpusSpec(str(tmp_path))))
    assert texts_of(itertools.chain(*read_all(source))) == some_texts(3)


UNNAMED = {
    "rows": (json_line("one").encode(), JsonLines),
    "a long row": (json.dumps({"text": "x" * 20_000}).encode(), JsonLines),
    "a mark before rows": (b"\xef\xbb\xbf" + json_line("one").encode(), JsonLines),
    "text": (b'one {"text": 1}\n', TextFiles),
    "a set": (b"{1, 2}\n", TextFiles),
    "nothing": (b"", TextFiles),
}


@pytest.mark.parametrize("name", ["part-0001", "part.0001", "part.gz", "part.zst"])
@pytest.mark.parametrize("content", UNNAMED)
def test_the_kind_is_detected_from_the_content_if_the_name_does_not_tell(
    content: str, name: str, tmp_path: Path
):
    data, expected = UNNAMED[content]
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(data) + b"")
    if not (tmp_path / name).stat().st_size:
        (tmp_path / "a.txt").write_text("a text beside it")
    assert type(open_source(CorpusSpec(str(tmp_path)))) is expected


def test_parquet_of_any_name(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "part-0001")
    assert texts_of(open_source(CorpusSpec(str(tmp_path))).read(0, Position())) == ["one"]


def test_a_file_unpacked_under_its_old_name_is_read(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_text(json_line("one") + json_line("two"))
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(json_line("three").encode()))
    assert texts_of(itertools.chain(*read_all(open_source(CorpusSpec(str(tmp_path)))))) == [
        "one",
        "two",
        "three",
    ]


REFUSED = {
    "a.json": (
        json.dumps([{"text": "one"}]),
        "is one JSON array, not an object a line; write one object a line, e.g. with jq -c '.[]'",
    ),
    "b.json": (
        json.dumps({"text": "one"}, indent=2),
        "is JSON whose objects go over several lines; write one object a line, e.g. with jq",
    ),
    "c.jsonl": (json.dumps([{"text": "one"}], indent=2), "is one JSON array"),
    "d.ndjson": (json.dumps({"text": "one"}, indent=2) * 2, "is JSON whose objects go over several lines"),
    "e.json": (json.dumps({"body": "one"}), "has no field 'text', it has 'body'; set data.text_field"),
    "f.csv": ("title,body\na,b\n", "has no column 'text'; it has 'title', 'body'"),
    "g.csv": ("text,text\na,b\n", "has 2 columns of the name 'text'"),
    "h.tsv": ("text\tb\nwith a \t tab\tb\n", "h.tsv[0] has 3 cells, but the header has 2; quote cells"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("pack", ["", ".gz"])
def test_other_layouts_of_json_and_tables_are_refused_with_advice(name: str, pack: str, tmp_path: Path):
    text, message_part = REFUSED[name]
    path = tmp_path / f"{name}{pack}"
    path.write_bytes(gzip.compress(text.encode()) if pack else text.encode())
    message = reading_error(CorpusSpec(str(path)))
    assert str(path) in message
    assert message_part.replace(name, path.name) in message
    assert len(message.splitlines()) == 1


BINARY = {
    "picture.png": (b"\x89PNG\r\n\x1a\n\0\0", "a PNG image"),
    "texts.zip": (b"PK\x03\x04\0\0", "a zip archive"),
    "texts.tar": (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
    "texts.tar.gz": (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\x0000"), "a tar archive"),
    "list.pkl": (pickle.dumps(["one"]), "a pickle"),
    "words.txt": ("one".encode("utf-16"), "UTF-16; convert it to UTF-8"),
    "words.text": ("one".encode("utf-16-le"), "binary: it holds NUL bytes"),
    "a.txt.bz2": (bz2.compress(b"one"), "compressed with bzip2; decompress it"),
}


@pytest.mark.parametrize("name", BINARY)
def test_a_binary_file_among_texts_is_reported_or_skipped(name: str, tmp_path: Path):
    data, message_part = BINARY[name]
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / name).write_bytes(data)
    message = reading_error(CorpusSpec(str(tmp_path)))
    assert f"{tmp_path / name} is not text but {message_part}" in message
    documents = list(open_source(CorpusSpec(str(tmp_path), skip_broken=True)).read(0, Position()))
    assert sorted(document.text or "" for document in documents) == ["", "one"]


def test_csv_variants(tmp_path: Path):
    """Byte order mark, CR LF, quotes, line breaks in cells, empty lines, and cells longer than the csv
    module's limit.

    Bytes that are not UTF-8 make one row broken.
    """
    long = "x" * 200_000
    rows = csv_rows(["one, two", 'a "quote"', "two\r\nlines\n", "", long], ",").replace(
        b"\r\n1,", b"\r\n\r\n1,"
    )
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + rows + b"1,\xff\r\n1,last")
    assert "holds bytes in field 'text'" in reading_error(CorpusSpec(str(tmp_path)))
    documents = list(open_source(CorpusSpec(str(tmp_path), skip_broken=True)).read(0, Position()))
    assert [document.text for document in documents] == [
        "one, two",
        'a "quote"',
        "two\r\nlines\n",
        "",
        long,
        None,
        "last",
    ]


def test_mixed_folders_are_refused_with_an_example_of_each_kind(tmp_path: Path):
    """Empty files without a telling name (`_SUCCESS`) do not count as a kind."""
    (tmp_path / "a.jsonl").write_text(json_line("one"))
    (tmp_path / "_SUCCESS").touch()
    assert texts_of(itertools.chain(*read_all(open_source(CorpusSpec(str(tmp_path)))))) == ["one"]
    (tmp_path / "README.md").write_text("read me")
    (tmp_path / "b.csv").write_text("text\none\n")
    assert "mixes csv (b.csv), jsonl (a.jsonl), text (README.md) files; name one kind" in reading_error(
        CorpusSpec(str(tmp_path))
    )


def test_text_keeps_its_line_ends_and_loses_its_byte_order_mark(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    assert texts_of(open_source(CorpusSpec(str(tmp_path))).read(0, Position())) == ["one\r\ntwo\r"]


def test_jsonl_of_any_layout(tmp_path: Path):
    lines = [
        "\ufeff" + json_line("mark"),
        "\n",
        json_line("two\u2028lines"),
        '  {"text": "spaces"}\r\n',
        "  \n",
        '{"text": "no newline"}',
    ]
    (tmp_path / "a.jsonl").write_bytes("".join(lines).encode())
    source = open_source(CorpusSpec(str(tmp_path)))
    whole = list(source.read(0, Position()))
    assert texts_of(whole) == ["mark", "two\u2028lines", "spaces", "no newline"]
    assert [document.index for document in whole] == [0, 2, 3, 5]
    reading = source.read(0, Position())
    for count in range(1, 4):
        index, hint = next(reading).index + 1, source.hint()
        assert list(JsonLines([tmp_path / "a.jsonl"], "text").read(0, Position(index, hint))) == whole[count:]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_compressed_files_of_several_parts(kind: str, tmp_path: Path):
    """`cat a.gz b.gz > c.gz` is a complete file, likewise with zstd.

    Parallel compressors always write such files.
    """
    pack = gzip.compress if kind == "jsonl.gz" else zstandard.ZstdCompressor().compress
    (tmp_path / f"a.{kind}").write_bytes(
        b"".join(pack(json_line(text).encode()) for text in ("one", "two", "three"))
    )
    assert texts_of(open_source(CorpusSpec(str(tmp_path))).read(0, Position())) == ["one", "two", "three"]


def test_another_text_field(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"content": "yes", "text": "no"}\n')
    assert texts_of(open_source(CorpusSpec(str(tmp_path), text_field="content")).read(0, Position())) == [
        "yes"
    ]


def test_a_dataset_is_resolved_once_for_all_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    calls = []
    build = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **b: calls.append(a) or build(*a, **b))
    spec = write_corpus("hub", tmp_path, ["one", "two"])
    for _ in range(3):
        assert texts_of(make_source("hub", spec).read(0, Position())) == ["one", "two"]
    assert len(calls) == 1
