"""Helpers of several test files: corpora of every kind, the naive reader, and documents read back from
chunks.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import settings

from minrnn.common.errors import UserError
from minrnn.data import IGNORE_INDEX, Chunk, CorpusSpec, DocumentStream, Encoder, open_source
from minrnn.data.corpus import Split
from minrnn.data.document_stream import WindowAddress
from minrnn.data.hub import HubDataset
from minrnn.data.parquet import Parquet
from minrnn.data.rows import Csv, JsonLines
from minrnn.data.sources import Document, Position, Source, TextFiles

BOS, EOS = 256, 257
ENCODER = Encoder(BOS, EOS, None)
KINDS = ("text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "hub")
OTHER_NAMES = (
    "ndjson",
    "JSONL",
    "json",
    "json.gz",
    "json.ZST",
    "csv",
    "csv.zst",
    "tsv.gz",
    "txt.gz",
    "txt.zst",
)
FEW_EXAMPLES = settings(max_examples=40)
PACK = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}


def some_texts(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Different texts of many lengths, some with non-ASCII characters; the first is empty."""
    rng = np.random.default_rng(seed)
    texts = [""]
    for i in range(1, count):
        filler = "".join(rng.choice(list("abc é\n漢🙂"), rng.integers(0, longest + 1)))
        texts.append(f"{i}:{filler}")
    return texts[:count]


def json_line(text: str) -> str:
    return json.dumps({"text": text, "other": 1}, ensure_ascii=False) + "\n"


def csv_rows(texts: Iterable[str], delimiter: str) -> bytes:
    """A header and one row per text."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([["other", "text"], *([1, text] for text in texts)])
    return text.getvalue().encode()


def write_corpus(kind: str, folder: Path, texts: Sequence[str], num_shards: int = 1) -> CorpusSpec:
    """Write the texts in this order as a corpus of this kind, with consecutive parts of them in each
    shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content, _, packing = kind.lower().partition(".")
    pack: Callable[[bytes], bytes] = PACK.get(packing, bytes)
    if content in ("text", "txt"):
        for i, text in enumerate(texts):
            (folder / f"{i:05}.{kind if content == 'txt' else 'txt'}").write_bytes(pack(text.encode()))
        return CorpusSpec(str(folder))
    for shard in range(num_shards):
        part = list(texts[shard * len(texts) // num_shards : (shard + 1) * len(texts) // num_shards])
        if kind in ("parquet", "hub"):
            name = (
                f"part-{shard:05}.parquet"
                if kind == "parquet"
                else f"data/train-{shard:05}-of-{num_shards:05}.parquet"
            )
            (folder / name).parent.mkdir(exist_ok=True)
            table = pyarrow.table(
                {"other": list(range(len(part))), "text": pyarrow.array(part, pyarrow.string())}
            )
            pyarrow.parquet.write_table(table, folder / name, row_group_size=3)
        else:
            is_csv = content in ("csv", "tsv")
            data = (
                csv_rows(part, "\t" if content == "tsv" else ",")
                if is_csv
                else "".join(map(json_line, part)).encode()
            )
            (folder / f"part-{shard:05}.{kind}").write_bytes(pack(data))
    return CorpusSpec(str(folder))


def make_source(kind: str, spec: CorpusSpec) -> Source:
    """The source of this kind for a corpus written by `write_corpus`."""
    files = sorted(path for path in Path(spec.corpus).rglob("*") if path.is_file())
    content = kind.lower().partition(".")[0]
    if content in ("text", "txt"):
        return TextFiles(files, Path(spec.corpus), spec.skip_broken)
    if kind == "hub":
        return HubDataset(
            spec.corpus, spec.subset, spec.split, spec.revision, spec.text_field, spec.skip_broken
        )
    return {"parquet": Parquet, "csv": Csv, "tsv": Csv}.get(content, JsonLines)(
        files, spec.text_field, spec.skip_broken
    )


def texts_of(documents: Iterable[Document]) -> list[str]:
    texts = [document.text for document in documents]
    assert None not in texts
    return [text for text in texts if text is not None]


def endless_texts(stream: DocumentStream) -> Iterator[str]:
    """The documents of a stream in order, epoch after epoch."""
    address = WindowAddress()
    while True:
        window = stream.window(address)
        yield from texts_of(window.documents)
        address = window.next_address


def naive_chunks(texts: Iterator[str], num_lanes: int, time: int) -> Iterator[np.ndarray]:
    """The expected chunks, made from lists of (input, target, starts): int [lanes, time, 3]."""
    lanes: list[list[tuple[int, int, int]]] = [[] for _ in range(num_lanes)]
    while True:
        rows = []
        for lane in lanes:
            while len(lane) < time:
                tokens = [BOS, *next(texts).encode(), EOS]
                lane += [(tokens[i], tokens[i + 1], int(i == 0)) for i in range(len(tokens) - 1)]
            rows.append(lane[:time])
            del lane[:time]
        yield np.array(rows)


def as_array(chunk: Chunk) -> np.ndarray:
    """A chunk in the format of `naive_chunks`: int [lanes, time, 3]."""
    return np.stack([chunk.input_ids, chunk.shift_labels, chunk.document_starts.astype(np.int64)], axis=-1)


def assert_same_chunk(one: Chunk, other: Chunk) -> None:
    """Compare arrays, names and positions."""
    assert one.reader == other.reader
    np.testing.assert_array_equal(as_array(one), as_array(other))
    assert one.documents == other.documents
    assert without_hints(one.state) == without_hints(other.state)


def without_hints(state: Any) -> Any:
    """A position without its hints: a streamed dataset may describe one position by different states."""
    if isinstance(state, dict):
        return {key: without_hints(value) for key, value in state.items() if key != "hint"}
    return [without_hints(value) for value in state] if isinstance(state, list) else state


def open_any(spec: CorpusSpec, part: Split = "train") -> Source:
    """`open_source`, but a folder named "hub" is opened as a dataset of the hub.

    This is the only way to test that source without a network.
    """
    return make_source("hub", spec) if Path(spec.corpus).name == "hub" else open_source(spec, part)


@dataclass
class LaneText:
    """The documents of one lane: complete ones and perhaps the beginning of another."""

    whole: list[str]
    begun: bytes | None


def read_back(chunks: Sequence[Chunk]) -> list[LaneText]:
    """Reconstruct each lane's documents from its chunks, and check the properties of a stream."""
    ids, labels, starts = (
        np.concatenate([getattr(c, f) for c in chunks], axis=1)
        for f in ("input_ids", "shift_labels", "document_starts")
    )
    assert ids.dtype == labels.dtype == np.int64
    assert starts.dtype == bool
    assert (labels != IGNORE_INDEX).all(), "every position of a stream is scored"
    lanes = []
    for row in range(len(ids)):
        assert starts[row, 0], "a stream begins with a document"
        edges = [*np.flatnonzero(starts[row]), ids.shape[1]]
        lane = LaneText([], None)
        for first, last in pairwise(edges):
            inputs, targets = ids[row, first:last], labels[row, first:last]
            assert inputs[0] == BOS
            np.testing.assert_array_equal(inputs[1:], targets[:-1])  # including at chunk edges
            assert (inputs[1:] < 256).all(), "<bos> and <eos> only at the ends"
            is_whole = targets[-1] == EOS
            data = bytes(targets[: len(targets) - is_whole].astype(np.uint8))
            if is_whole:
                lane.whole.append(data.decode())
            else:
                assert last == ids.shape[1], "a document was cut off"
                lane.begun = data
        lanes.append(lane)
    return lanes


def read_all(source: Source) -> list[list[Document]]:
    return [list(source.read(shard, Position())) for shard in range(source.num_shards)]


def reading_error(corpus: CorpusSpec) -> str:
    """The error message of reading the whole corpus."""
    with pytest.raises(UserError) as caught:
        read_all(open_source(corpus))
    assert caught.value.errors[0][0].startswith("data.")
    return str(caught.value)
