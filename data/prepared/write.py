"""Writes the shards of a prepared corpus, in one process."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common.files import atomic_write, sha256_of, write_json
from ..corpus import CorpusSpec, open_source
from ..hold_out import text_digest
from ..read_ahead import encode_documents
from ..sources import Document, Position
from ..tokenizer import Encoder, num_bytes
from .manifest import schema, shard_name
from .places import Places, places

BATCH_TOKENS = 2**20  # of a record batch, at least, except the last
CALL_CHARACTERS, CALL_DOCUMENTS = 2**20, 1024  # encoded in one call, at most, unless a document is longer


@dataclass
class Shard:
    """A finished shard."""

    documents: int = 0
    """Number of documents that are not broken."""
    skipped: int = 0
    """Number of broken parts that were left out."""
    filtered: int = 0
    """Number of parts that `data.filter` left out; 0 in the manifests of earlier versions."""
    tokens: int = 0
    """Number of tokens of the texts, without bos and eos."""
    bytes: int = 0
    """Bytes of the texts in UTF-8."""
    size: int = 0
    """Bytes of the file."""
    sha256: str = ""
    cuts: list[int] | int = 1
    """Where the source's shard can be cut; n for 0, 1, ..., n."""
    lines_before: list[int] | None = None
    """See `places.Places`."""


@dataclass(frozen=True)
class Written:
    """Progress of a worker."""

    shard: int | None
    """None at the end of the worker's shards."""
    name: str
    """Of the last document that was written."""
    tokens: int
    """Written since the last report."""
    finished: Shard | None = None


@dataclass(frozen=True)
class ShardJob:
    """What a worker prepares."""

    spec: CorpusSpec
    encoder: Encoder
    dtype: str
    folder: Path
    validation: frozenset[int] | None
    """Indices of the documents that are held out, if files decide that."""


def summary_path(folder: Path, shard: int) -> Path:
    """The description of a finished shard; exists until the manifest holds it."""
    return (folder / shard_name(shard)).with_suffix(".json")


def write_shards(job: ShardJob, shards: Sequence[int], one_of_many: bool = False) -> Iterator[Written]:
    """Write these shards, and report each batch that is written.

    Args:
        one_of_many: other processes write other shards, so the tokenizer uses one thread only.

    Raises:
        UserError: a document cannot be read or encoded.
        OSError: a file cannot be written.
    """
    if one_of_many:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library has no other setting for it
    source = open_source(job.spec, "all")
    for shard in shards:
        path, summary = job.folder / shard_name(shard), Shard()
        where = places(source, shard)
        is_range = isinstance(where.cuts, range) and (where.cuts.start, where.cuts.step) == (0, 1)
        summary.cuts = where.cuts[-1] if is_range else list(where.cuts)
        summary.lines_before = where.lines_before
        with atomic_write(path) as unfinished:
            yield from _write(job, shard, source.read(shard, Position()), where, unfinished, summary)
        summary.size, summary.sha256 = path.stat().st_size, sha256_of(path)
        write_json(summary_path(job.folder, shard), asdict(summary))
        yield Written(shard, path.name, 0, summary)
    yield Written(None, "", 0)


def _write(
    job: ShardJob, shard: int, documents: Iterable[Document], where: Places, path: Path, summary: Shard
) -> Iterator[Written]:
    import pyarrow as pa

    columns = schema(job.dtype)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, columns) as writer:
        rows: list[tuple[Document, np.ndarray]] = []
        num_tokens = 0
        for call in _calls(documents):
            rows += zip(call, _encode(job, call), strict=True)
            num_tokens += sum(len(tokens) for _, tokens in rows[-len(call) :])
            if num_tokens >= BATCH_TOKENS:
                writer.write_batch(_batch(job, rows, where, summary))
                yield Written(shard, rows[-1][0].name, num_tokens)
                rows, num_tokens = [], 0
        if rows:
            writer.write_batch(_batch(job, rows, where, summary))
            yield Written(shard, rows[-1][0].name, num_tokens)


def _calls(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents that are encoded together."""
    call: list[Document] = []
    size = 0
    for document in documents:
        length = len(document.text or "")
        if call and (size + length > CALL_CHARACTERS or len(call) == CALL_DOCUMENTS):
            yield call
            call, size = [], 0
        call.append(document)
        size += length
    if call:
        yield call


def _encode(job: ShardJob, documents: list[Document]) -> list[np.ndarray]:
    """The tokens of each document, without bos and eos; none for a broken one."""
    return [tokens[1:-1] for tokens in encode_documents(job.encoder, documents)]


def _utf8(name: str) -> str:
    """A name with ? for what is not Unicode: bytes of a file's name, half a surrogate pair of a JSON file."""
    return name.encode(errors="replace").decode()


def _batch(job: ShardJob, rows: list[tuple[Document, np.ndarray]], where: Places, summary: Shard) -> Any:
    """The rows as a record batch, counted in the summary."""
    import pyarrow as pa

    dtype = np.dtype(job.dtype)
    offsets = np.cumsum([0, *(len(tokens) for _, tokens in rows)], dtype=np.int64)
    values = np.concatenate([tokens.astype(dtype, copy=False) for _, tokens in rows])
    documents = [document for document, _ in rows]
    texts = [document.text for document in documents]
    sizes = [0 if text is None else num_bytes(text) for text in texts]
    skipped = [document.num_skipped for document in documents]
    filtered = [document.num_filtered for document in documents]
    summary.documents += sum(text is not None for text in texts)
    summary.skipped += sum(skipped)
    summary.filtered += sum(filtered)
    summary.tokens += len(values)
    summary.bytes += sum(sizes)
    held_out = job.validation or frozenset()
    index = np.array([document.index for document in documents], np.int64)
    return pa.record_batch(
        [
            pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)),
            pa.array(index),
            pa.array(where.of(index)),
            [_utf8(document.name) for document in documents],
            sizes,
            pa.array([0 if text is None else text_digest(text) for text in texts], pa.uint64()),
            pa.array(skipped, pa.int32()),
            pa.array(filtered, pa.int32()),
            [text is None for text in texts],
            [document.index in held_out for document in documents],
        ],
        schema=schema(job.dtype),
    )
