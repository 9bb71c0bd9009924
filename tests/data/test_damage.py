"""Damaged files: one error line with the file's name, or the damaged part skipped and counted from any
position.
"""

import contextlib
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data_helpers import ENCODER, json_line, make_source, some_texts, write_corpus

from minrnn.common.errors import UserError
from minrnn.data import ChunkLoader, CorpusSpec, DocumentReader, Encoder, ReaderSpec, open_source
from minrnn.data.files import convert_read_errors
from minrnn.data.sources import Document, Position, Source

TEXTS = some_texts(60)
MANY = some_texts(1200)


def damage(path: Path, start: int, size: int) -> None:
    data = bytearray(path.read_bytes())
    data[start : start + size] = bytes(byte ^ 0x5A for byte in data[start : start + size])
    path.write_bytes(data)


def parquet(path: Path, compression: str, **options: Any) -> None:
    """Write three row groups of 20 and damage the second: its first page, or that page's header."""
    offset = options.pop("offset")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": TEXTS}), path, row_group_size=20, compression=compression, **options
    )
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    damage(path, start + offset, 24 if offset else 8)


def cut(pack: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Compressed lines with a missing end."""

    def write(path: Path) -> None:
        data = b"".join(pack("".join(map(json_line, MANY[i : i + 400])).encode()) for i in (0, 400, 800))
        path.write_bytes(data[:-40])

    return write


def cut_text(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode())[:-40])


def without_footer(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    path.write_bytes(path.read_bytes()[:-100])


CORRUPT = "is damaged in row group 1, rows 20 to 39 ("
DAMAGED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a page that does not decompress": ("parquet", lambda path: parquet(path, "zstd", offset=60), CORRUPT),
    "a page's header": ("parquet", lambda path: parquet(path, "snappy", offset=0), CORRUPT),
    "a page whose checksum says so": (
        "parquet",
        lambda path: parquet(path, "none", offset=60, write_page_checksum=True),
        CORRUPT,
    ),
    "a parquet file without its end": (
        "parquet",
        without_footer,
        "is not a parquet file, or not a whole one (",
    ),
    "a cut .gz": ("jsonl.gz", cut(gzip.compress), "is damaged after line "),
    "a cut .zst": ("jsonl.zst", cut(zstandard.ZstdCompressor().compress), "is damaged after line "),
    "a cut .csv.gz": (
        "csv.gz",
        lambda path: cut_text(path, "\n".join(["text", *(f"row {i * i}" for i in range(500))])),
        "is damaged after row ",
    ),
    "a cut .txt.gz": (
        "txt.gz",
        lambda path: cut_text(path, " ".join(str(i**3) for i in range(500))),
        "is damaged (",
    ),
}


@pytest.fixture(params=DAMAGED)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    suffix, write, problem = DAMAGED[request.param]
    path = tmp_path / f"part.{suffix}"
    write(path)
    return path, problem


def read(source: Source, position: Position | None = None) -> list[Document]:
    return list(source.read(0, position or Position()))


@pytest.mark.parametrize(
    ("damaged", "workers"), [*((name, 0) for name in DAMAGED), ("a cut .gz", 1)], indirect=["damaged"]
)
def test_damage_is_reported_in_one_line(workers: int, damaged: tuple[Path, str]):
    path, problem = damaged
    spec = ReaderSpec(CorpusSpec(str(path)), "documents", ENCODER, 1, lanes=1, chunk=8, window=4, seed=1)
    with (
        pytest.raises(UserError) as caught,
        contextlib.closing(ChunkLoader(spec, [0], [None], workers)) as loader,
    ):
        list(islice(loader, 10_000))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"error: data.corpus: {path} {problem}")
    assert "data.skip_broken" in line


def test_damage_is_skipped_and_counted_the_same_each_time(damaged: tuple[Path, str]):
    """Documents before and after the damage are read, and reading from any position gives the tail."""
    path, problem = damaged
    whole = read(open_source(CorpusSpec(str(path), skip_broken=True)))
    broken = [document for document in whole if document.text is None]
    assert sum(document.num_skipped for document in whole) == (20 if problem == CORRUPT else 1) == len(broken)
    assert [document.index for document in whole] == list(range(len(whole)))
    if path.suffix == ".parquet" and problem == CORRUPT:
        assert [document.text for document in whole if document.text is not None] == TEXTS[:20] + TEXTS[40:]
    elif "jsonl" in path.name:
        assert [document.text for document in whole[:-1]] == MANY[: len(whole) - 1]
        assert len(whole) > 600
    source = open_source(CorpusSpec(str(path), skip_broken=True))
    for count in {
        0,
        1,
        len(whole) // 2,
        *(min(document.index + k, len(whole)) for document in broken for k in (0, 1)),
    }:
        assert read(source, Position(count)) == whole[count:]


ROWS = {
    "null": (
        None,
        "holds null in field 'text' instead of text; "
        "set data.text_field to a field of text, or set data.skip_broken",
    ),
    "a number": (3, "holds 3 (int) in field 'text' instead of text"),
    "half of a surrogate pair": (
        "a\ud800",
        "holds half of a surrogate pair, which is no character, in field 'text' instead of text",
    ),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_a_row_without_text_says_what_it_holds(kind: str, case: str, tmp_path: Path):
    value, problem = ROWS[case]
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}))
        spec = CorpusSpec(str(tmp_path))
    else:
        if isinstance(value, str):
            pytest.skip("Arrow holds no such text")
        spec = write_corpus(kind, tmp_path, ["one"])
        (path,) = (path for path in tmp_path.rglob("*.parquet"))
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([value], pyarrow.int64())}), path)
    with pytest.raises(UserError) as caught:
        read(make_source(kind, spec))
    assert problem in str(caught.value)
    assert "no field" not in str(caught.value)
    assert "damaged" not in str(caught.value), "the file is whole"
    assert [
        document.num_skipped for document in read(make_source(kind, replace(spec, skip_broken=True)))
    ] == [1]


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_deleted_file_is_reported(kind: str, tmp_path: Path):
    source = make_source(kind, write_corpus(kind, tmp_path, ["one"]))
    (path,) = tmp_path.iterdir()
    path.unlink()
    with pytest.raises(UserError, match=rf"{path} cannot be read any more \(No such file"):
        read(source)
    path.mkdir()
    with pytest.raises(UserError, match=rf"{path} cannot be read \(.*directory"):
        read(source)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_tokenizer_is_reported_with_the_document(workers: int, tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    spec = ReaderSpec(
        CorpusSpec(str(tmp_path)),
        "documents",
        Encoder(0, 1, "no JSON"),
        1,
        lanes=1,
        chunk=1,
        window=1,
        seed=1,
    )
    with pytest.raises(UserError, match=r"^error: data.corpus: a.txt cannot be read \(Exception: .*\)$"):
        list(islice(ChunkLoader(spec, [0], [None], workers), 1))


def test_a_document_that_does_not_fit_into_memory_is_reported(tmp_path: Path):
    class Small(Encoder):
        def documents(self, texts: Sequence[str]):
            raise MemoryError

    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(UserError, match=r"^error: data.corpus: a.txt does not fit into memory; "):
        DocumentReader(
            ReaderSpec(CorpusSpec(str(tmp_path)), "documents", Small(0, 1, None), 1, 1, 1, 1, 0), 0
        )


def test_a_disk_error_is_not_treated_as_damage(tmp_path: Path):
    """A retry may succeed, so nothing is skipped."""
    with (
        pytest.raises(UserError, match=r"^error: data.corpus: a.txt cannot be read \(Input/output error\)$"),
        convert_read_errors("a.txt"),
    ):
        raise OSError(5, "Input/output error")
