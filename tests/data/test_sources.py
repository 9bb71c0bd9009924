"""Reading a source from any position gives the tail of reading it from the start; broken documents are
reported.
"""

import bz2
import errno
import gzip
import itertools
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

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

from minrnn.common.errors import UserError
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


def test_paths_folders_and_globs(tmp_path: Path):
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden.txt", ".folder/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(open_source(CorpusSpec(str(tmp_path / "b.txt"))).read(0, Position())) == ["b.txt"]
    whole = list(open_source(CorpusSpec(str(tmp_path))).read(0, Position()))
    assert texts_of(whole) == ["a.txt", "b.txt", "deep/c.txt"]
    assert [document.name for document in whole] == ["a.txt", "b.txt", "deep/c.txt"]
    assert texts_of(open_source(CorpusSpec(f"{tmp_path}/**/*.txt")).read(0, Position())) == [
        "a.txt",
        "b.txt",
        "deep/c.txt",
    ]
    assert texts_of(open_source(CorpusSpec(f"{tmp_path}/?.txt")).read(0, Position())) == ["a.txt", "b.txt"]


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


def test_relative_paths_start_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_corpus("jsonl", tmp_path, ["one", "two"])
    monkeypatch.chdir(tmp_path)
    for name in ("part-00000.jsonl", "*.jsonl", "."):
        assert texts_of(open_source(CorpusSpec(name)).read(0, Position())) == ["one", "two"]


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


def test_missing_and_empty_corpora_are_refused(tmp_path: Path):
    missing = tmp_path / "none.jsonl"
    assert f"error: data.corpus: there is no file, folder or match for {missing}" in reading_error(
        CorpusSpec(str(missing))
    )
    assert "no file, folder or match" in reading_error(CorpusSpec(str(tmp_path / "*.txt")))
    assert f"the folder {tmp_path} holds no files" in reading_error(CorpusSpec(str(tmp_path)))
    (tmp_path / "a.txt").touch()
    assert f"{tmp_path / 'a.txt'} is empty" in reading_error(CorpusSpec(str(tmp_path / "a.txt")))
    (tmp_path / "b.jsonl").write_text(json_line("one"))
    message = reading_error(CorpusSpec(str(tmp_path)))
    assert "mixes jsonl (b.jsonl), text (a.txt) files" in message
    assert "glob" in message


def test_a_relative_glob_without_a_match_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert "no file, folder or match" in reading_error(CorpusSpec("texts/*"))


@pytest.mark.parametrize(
    "name",
    ["roneneldan/TinyStories", "mlfoundations/dclm-baseline-1.0", "mlfoundations/dclm-baseline-1.0-parquet"],
)
def test_names_of_hub_datasets(name: str, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    monkeypatch.setattr("minrnn.data.corpus.check_dataset_name", lambda *_: None)
    monkeypatch.setattr("minrnn.data.corpus.HubDataset", lambda path, *_: opened.append(path))
    open_source(CorpusSpec(name))
    assert opened == [name]


def test_files_that_a_run_writes_are_excluded_from_its_folder(tmp_path: Path):
    """Files are compared by real path, below folders and in globs.

    A corpus that is named inside the run's folder is still read.
    """
    for name in ("a.txt", "runs/x/samples.txt", "runs/x/own.txt", "runs/y/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    excluded = tuple(os.path.realpath(tmp_path / name) for name in ("runs/x", "runs/x/samples.txt"))

    def texts_in(corpus: str) -> list[str]:
        return texts_of(
            open_source(CorpusSpec(str(tmp_path / corpus), excluded=excluded)).read(0, Position())
        )

    assert texts_in("") == texts_in("**/*.txt") == ["a.txt", "runs/y/b.txt"]
    assert texts_in("runs") == texts_in("runs/*/*.txt") == texts_in("link/*/*.txt") == ["runs/y/b.txt"]
    assert texts_in("runs/x") == texts_in("runs/x/*") == ["runs/x/own.txt"]
    assert texts_in("runs/x/samples.txt") == ["runs/x/samples.txt"]
    shutil.rmtree(tmp_path / "runs" / "y")
    assert "holds no files but those of the run" in reading_error(
        CorpusSpec(str(tmp_path / "runs"), excluded=excluded)
    )


def test_what_is_no_file_in_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    message = reading_error(CorpusSpec(str(tmp_path)))
    assert f"gone.txt is a link to {tmp_path / 'nowhere'}, which is not there; remove it" in message
    assert "is a link to" in reading_error(CorpusSpec(str(tmp_path / "gone.txt")))
    (tmp_path / "gone.txt").unlink()
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path, tmp_path / "pipe", tmp_path / "p*"):
        message = reading_error(CorpusSpec(str(name)))
        assert f"{tmp_path / 'pipe'} is a pipe, socket or device, not a file" in message
    assert texts_of(open_source(CorpusSpec(f"{tmp_path}/*.txt")).read(0, Position())) == ["one"]


def test_links_to_folders_are_followed_once(tmp_path: Path):
    disk, corpus = tmp_path / "disk", tmp_path / "corpus"
    for folder in (disk / "deep", disk / ".hidden", corpus):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(str(folder))
    (corpus / "more").symlink_to(disk)
    for loop in (corpus / "loop", disk / "deep" / "loop"):
        loop.symlink_to(corpus)
    texts = texts_of(open_source(CorpusSpec(str(corpus))).read(0, Position()))
    assert texts == [str(corpus), str(disk / "deep")]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("one")
    scandir = os.scandir

    def refuse(path: str | Path) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = reading_error(CorpusSpec(str(tmp_path)))
    assert f"{tmp_path / 'closed'} cannot be read (Permission denied)" in message


@pytest.mark.parametrize("corpus", ["a.txt", "a.jsonl", "python-stdlib"])
def test_settings_of_hub_datasets_are_refused_for_other_corpora(corpus: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    spec = CorpusSpec(corpus if corpus == "python-stdlib" else str(tmp_path / corpus))
    with pytest.raises(UserError) as caught:
        open_source(replace(spec, subset="en", split="test", revision="v2"))
    assert [key for key, _ in caught.value.errors] == ["data.subset", "data.split", "data.revision"]
    assert "has no split; leave it out (default: train)" in str(caught.value)


@pytest.mark.parametrize("name", ["a[1]", "b*", "c?", "[!x]"])
def test_names_with_the_characters_of_patterns(name: str, tmp_path: Path):
    folder = tmp_path / name / "deep"
    folder.mkdir(parents=True)
    for file in (f"{name}.txt", "other.txt"):
        (folder / file).write_text(file)
    for corpus, expected in (
        (folder / f"{name}.txt", [f"{name}.txt"]),
        (folder, [f"{name}.txt", "other.txt"]),
        (folder / "o*.txt", ["other.txt"]),
        (tmp_path / name / "**" / "other.t?t", ["other.txt"]),
    ):
        texts = texts_of(open_source(CorpusSpec(str(corpus))).read(0, Position()))
        assert sorted(texts) == sorted(expected)


HUB_ERRORS = {
    "Dataset 'org/name' is a gated dataset on the Hub. Visit the page": (
        "data.corpus",
        "is gated; accept its conditions at https://huggingface.co/datasets/org/name, then log in",
    ),
    "BuilderConfig 'small' not found. Available: ['large']": (
        "data.subset",
        "'org/name' has no subset 'small' (ValueError: BuilderConfig 'small' not found. Available: [",
    ),
    "Dataset 'org/name' doesn't exist on the Hub or cannot be accessed.": (
        "data.corpus",
        "there is no dataset 'org/name' on the hub, or it is private",
    ),
}


@pytest.mark.parametrize("text", HUB_ERRORS)
def test_datasets_that_cannot_be_opened(text: str, monkeypatch: pytest.MonkeyPatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def fail(*_: object, **__: object) -> None:
        raise (ValueError if "BuilderConfig" in text else DatasetNotFoundError)(text)

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    monkeypatch.setattr("minrnn.data.corpus.check_dataset_name", lambda *_: None)
    with pytest.raises(UserError) as caught:
        open_source(CorpusSpec("org/name", subset="small"))
    ((key, message),) = caught.value.errors
    assert (key, HUB_ERRORS[text][1] in message) == (HUB_ERRORS[text][0], True), message


def test_a_dataset_is_resolved_once_for_all_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    calls = []
    build = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **b: calls.append(a) or build(*a, **b))
    spec = write_corpus("hub", tmp_path, ["one", "two"])
    for _ in range(3):
        assert texts_of(make_source("hub", spec).read(0, Position())) == ["one", "two"]
    assert len(calls) == 1
