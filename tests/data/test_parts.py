"""Each byte of a corpus is read by one reader, and the parts of a shard hold what the shard holds."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import FEW_EXAMPLES, KINDS, make_source, read_all, some_texts, texts_of, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.data import CorpusSpec, DocumentStream
from minrnn.data import parquet as parquet_module
from minrnn.data import rows as rows_module
from minrnn.data.document_stream import open_shares
from minrnn.data.parts import divide, joined_units, read_part, units_of
from minrnn.data.sources import Document, Part, Position, Source

pytestmark = pytest.mark.usefixtures("local_hub_datasets")
SIZES = [(8, 14), (64, 140), (16, 3), (4, 1)]


def part_reads(source: Source, part: Part) -> list[Document]:
    return list(read_part(source, part, Position()))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch):
    """JSON lines are cut every 64 bytes."""
    monkeypatch.setattr(rows_module, "MIN_PART_BYTES", 64)


# ---- bytes and rows ----


class Counters:
    """What is read from the files of a folder: bytes, by file, and parsed rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.num_bytes, self.num_rows = Counter[str](), 0
        open_path, counters = Path.open, self

        def counting_open(path: Path, *arguments: Any, **options: Any) -> Any:
            file = open_path(path, *arguments, **options)
            return CountedFile(file, counters, path.name) if path.is_relative_to(folder) else file

        monkeypatch.setattr(Path, "open", counting_open)
        for module, name in ((rows_module.json, "loads"), (parquet_module, "python_value")):
            self._count_calls(monkeypatch, module, name)

    def _count_calls(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        function: Callable[[Any], Any] = getattr(module, name)

        def counted(value: Any) -> Any:
            self.num_rows += 1
            return function(value)

        monkeypatch.setattr(module, name, counted)


class CountedFile:
    """A file that counts its reads. What a buffered reader has read ahead is not counted twice."""

    def __init__(self, file: Any, counters: Counters, name: str):
        self._file, self._counters, self._name = file, counters, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "CountedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _count(self, data: bytes) -> bytes:
        self._counters.num_bytes[self._name] += len(data)
        return data

    def read(self, size: int = -1) -> bytes:
        return self._count(self._file.read(size))

    def readline(self) -> bytes:
        return self._count(self._file.readline())


def write_large_corpus(kind: str, folder: Path, num_shards: int) -> tuple[Counter[str], int]:
    """Shards of row groups of two rows, or of JSON lines; the texts, and the bytes of the files."""
    folder.mkdir()
    size = max(16, 1600 // num_shards)
    texts = [
        f"{shard}-{i} " + f"{i * i + shard:05}" * 200 for shard in range(num_shards) for i in range(size)
    ]
    for shard in range(num_shards):
        part = texts[size * shard : size * (shard + 1)]
        if kind == "jsonl":
            lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
            (folder / f"{shard:03}.jsonl").write_text(lines)
        else:
            table = pyarrow.table({"text": part})
            # the footer and the row groups have the proportions of real files
            options = {"row_group_size": 2, "compression": "none", "use_dictionary": False}
            pyarrow.parquet.write_table(
                table, folder / f"{shard:03}.parquet", write_statistics=False, store_schema=False, **options
            )
    return Counter(texts), sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("num_readers", "num_shards"), SIZES)
def test_all_readers_together_read_the_corpus_once(
    kind: str, num_readers: int, num_shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bytes are compared with those that one reader reads, rows with the rows that there are."""
    monkeypatch.setattr(rows_module, "MIN_PART_BYTES", 1024)
    texts, num_bytes = write_large_corpus(kind, tmp_path / "corpus", num_shards)
    spec = CorpusSpec(str(tmp_path / "corpus"))
    counters = Counters(monkeypatch, tmp_path / "corpus")

    def shares_of(num_readers: int) -> list[list[str]]:
        return [
            texts_of(DocumentStream(spec, "train", reader, num_readers, 16, 1).one_epoch())
            for reader in range(num_readers)
        ]

    shares_of(1)
    one_pass = counters.num_bytes.total()
    assert num_bytes <= one_pass
    counters.num_bytes.clear()
    counters.num_rows = 0
    parquet_module._metadata_of.cache_clear()
    shares = shares_of(num_readers)
    assert sum(map(Counter, shares), Counter()) == texts
    assert counters.num_rows == texts.total()
    assert counters.num_bytes.total() <= one_pass * 1.05
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) <= 1.5 * min(sizes), "readers own about the same"


# ---- parts ----


@pytest.mark.parametrize("kind", KINDS)
@settings(FEW_EXAMPLES, max_examples=10)
@given(num_shards=st.integers(1, 9), num_readers=st.integers(1, 9), count=st.integers(9, 40))
def test_parts_hold_what_the_shards_hold(
    kind: str,
    num_shards: int,
    num_readers: int,
    count: int,
    tmp_path_factory: pytest.TempPathFactory,
):
    """Every document once, with the text and, except in the midst of JSON lines, the name of a whole read."""
    spec = write_corpus(kind, tmp_path_factory.mktemp("parts") / kind, some_texts(count), num_shards)
    source = make_source(kind, spec)
    whole = [document for shard in read_all(source) for document in shard]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "MIN_PART_BYTES", 64)
        shares = divide(source, list(map(Part, range(source.num_shards))), num_readers)
        parts = [
            document for owned in shares.owned for part in owned for document in part_reads(source, part)
        ]
        assert Counter(document.text for document in parts) == Counter(document.text for document in whole)
        by_name = {document.name: document.text for document in whole}
        for document in parts:
            assert "@" in document.name or by_name[document.name] == document.text
        if kind not in ("jsonl.gz", "jsonl.zst") and len(units_of(source, Part(0))) >= num_readers:
            assert not shares.note


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "parquet", "hub"])
@FEW_EXAMPLES
@given(data=st.data())
def test_a_part_is_read_from_any_position(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.getbasetemp() / "positions" / kind
    texts = some_texts(40)
    spec = CorpusSpec(str(folder)) if folder.exists() else write_corpus(kind, folder, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "MIN_PART_BYTES", 50)
        source = make_source(kind, spec)
        units = units_of(source, Part(0))
        begin = data.draw(st.integers(0, len(units) - 1))
        (part,) = joined_units(units[begin : data.draw(st.integers(begin + 1, len(units)))])
        step = data.draw(st.integers(1, 3))
        part = Part(part.shard, part.within, data.draw(st.integers(0, step - 1)), step)
        whole = part_reads(source, part)
        if begin == 0 and kind != "jsonl.gz":
            names = [document.name for document in read_all(source)[0] if part.has(document.index)]
            assert [document.name for document in whole] == names[: len(whole)]
        for count in range(len(whole) + 1):
            reading = read_part(source, part, Position())
            assert list(itertools.islice(reading, count)) == whole[:count]
            hint = json.loads(json.dumps(source.hint())) if count else None
            index = whole[count - 1].index + 1 if count else 0
            assert list(read_part(source, part, Position(index, hint))) == whole[count:]
            assert list(read_part(source, part, Position(index))) == whole[count:], "without a hint"


def test_what_cannot_be_cut_is_shared_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_corpus("jsonl.gz", tmp_path, some_texts(40), 2)
    shares, _ = open_shares(CorpusSpec(str(tmp_path)), "train", 5)
    assert shares.note is None, "a small corpus may be read several times"
    monkeypatch.setattr(rows_module, "STREAM_BYTES", 1)
    shares, _ = open_shares(CorpusSpec(str(tmp_path)), "train", 5)
    assert shares.note is not None
    assert "2 parts that can be read separately for 5 readers: each is read by up to 3 readers" in shares.note
    assert sorted(part.shard for (part,) in shares.owned) == [0, 0, 0, 1, 1]
    shares, _ = open_shares(CorpusSpec(str(tmp_path)), "train", 2)
    assert shares.note is None
    write_corpus("jsonl.gz", tmp_path, some_texts(40), 5)
    shares, _ = open_shares(CorpusSpec(str(tmp_path)), "train", 2)
    assert shares.note is not None
    assert "some readers own 3 shards" in shares.note
    assert list(map(len, shares.owned)) == [3, 2]


def test_joined_rows_are_not_cut(tmp_path: Path):
    rows = [{"text": f"{i} ", "book": i // 2} for i in range(400)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    shares, _ = open_shares(CorpusSpec(str(tmp_path), join="book"), "train", 4)
    reads = [shares.read(part, Position()) for owned in shares.owned for part in owned]
    texts = [document.text for documents in reads for document in documents]
    assert Counter(texts) == Counter(f"{2 * i} \n{2 * i + 1} " for i in range(200))
    assert all(part.within is None for parts in shares.owned for part in parts)


def test_shards_are_visited_in_an_order_of_seed_epoch_and_reader(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path, [str(i) for i in range(24)], num_shards=24)
    orders = {}
    for seed in (0, 1, None):
        for reader in (0, 1):
            stream = DocumentStream(spec, "train", reader, 2, 1, seed)
            for epoch in (0, 1):
                order = [part.shard for part in stream._shards(epoch)]
                assert sorted(order) == list(range(reader, 24, 2))
                orders[seed, reader, epoch] = order
    assert orders[None, 0, 0] == orders[None, 0, 1] == list(range(0, 24, 2))
    shuffled = [order for (seed, _, _), order in orders.items() if seed is not None]
    assert len({tuple(shard // 2 for shard in order) for order in shuffled}) == 8


def test_one_large_row_group_is_read_in_batches(tmp_path: Path):
    """Of two million rows, one batch at a time is in memory, also for readers that share the group."""
    column = pyarrow.array(["a text"]).take(pyarrow.array([0] * 2_000_000))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=2_000_000)
    shares, _ = open_shares(CorpusSpec(str(path)), "train", 2)
    before = pyarrow.total_allocated_bytes()
    documents = shares.read(shares.owned[1][0], Position())
    assert [document.index for document in itertools.islice(documents, 3)] == [1, 3, 5]
    assert pyarrow.total_allocated_bytes() - before < 8 << 20
    assert next(shares.read(shares.owned[1][0], Position(150_000))).index == 150_001
