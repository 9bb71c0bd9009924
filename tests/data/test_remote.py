"""Remote files: read like local ones, whatever the network does, and with one line where they cannot be."""

import contextlib
import gzip
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import ENCODER, assert_same_chunk, reading_error, some_texts, write_corpus
from faulty_server import FAULTS, FaultyServer, http_date, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import (
    BYTES,
    ChunkLoader,
    CorpusSpec,
    DocumentReader,
    ReaderSpec,
    RetryPolicy,
    byte_tokenizer,
    corpus_fingerprint,
)
from minrnn.data.corpus import open_source
from minrnn.data.outages import classify
from minrnn.data.prepared.make import prepare
from minrnn.data.remote import FIRST_BLOCK, LAST_BLOCK, RemoteFile, remote_files
from minrnn.data.sources import Document, Position

FAST = RetryPolicy(retries=12, timeout=0.2, first_wait=0.001)
KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "text", "csv")
TEXTS = some_texts(12)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    with serve(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyServer]:
    """A corpus of each kind, in a folder of its name."""
    root = tmp_path_factory.mktemp("corpora")
    for kind in KINDS:
        write_corpus(kind, root / kind, TEXTS, num_shards=2)
    with serve(root) as server:
        yield server


def spec_of(server: FaultyServer, path: str, policy: RetryPolicy = FAST) -> CorpusSpec:
    return CorpusSpec(server.url(path), network=policy)


def documents(spec: CorpusSpec) -> list[Document]:
    """All documents, named by the end of their path."""
    source = open_source(spec)
    read = [document for shard in range(source.num_shards) for document in source.read(shard, Position())]
    return [replace(document, name=Path(document.name).name) for document in read]


def remote_file(server: FaultyServer, name: str, policy: RetryPolicy = FAST, **options) -> RemoteFile:
    (path,), _ = remote_files(server.url(name), policy)
    return RemoteFile(path, **options)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(faults=st.lists(st.sampled_from([*FAULTS, "none", "none"]), max_size=4))
def test_documents_are_those_of_the_local_files_whatever_fails(
    corpora: FaultyServer, kind: str, faults: list[str]
):
    corpora.faults.clear()
    corpora.faults.extend(faults)
    assert documents(spec_of(corpora, f"{kind}/")) == documents(CorpusSpec(str(corpora.root / kind)))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_training_stream_is_that_of_the_local_files(corpora: FaultyServer, kind: str):
    def chunks(corpus: CorpusSpec, state: dict | None = None) -> Iterator:
        spec = ReaderSpec(corpus, "documents", ENCODER, 1, lanes=3, chunk=16, window=8, seed=1)
        reader = DocumentReader(spec, 0, state)
        return (reader.next_chunk() for _ in range(20))

    corpora.faults.extend(["cut", "status 503", "reset", "none"] * 3)
    remote = list(chunks(spec_of(corpora, f"{kind}/*")))
    for one, other in zip(remote, chunks(CorpusSpec(str(corpora.root / kind))), strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.shift_labels, other.shift_labels)
    resumed = list(islice(chunks(spec_of(corpora, f"{kind}/*"), json.loads(json.dumps(remote[7].state))), 12))
    for one, other in zip(resumed, remote[8:], strict=True):
        assert_same_chunk(one, other)


def test_remote_json_lines_are_prepared_with_their_cuts(
    corpora: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("minrnn.data.rows.MIN_PART_BYTES", 64)
    corpora.faults.clear()
    specs = [CorpusSpec(str(corpora.root / "jsonl")), spec_of(corpora, "jsonl/")]
    shards = [
        prepare(spec, byte_tokenizer(), BYTES, tmp_path / str(number), workers=0)["shards"]
        for number, spec in enumerate(specs)
    ]
    for local, remote in zip(*shards, strict=True):
        assert local["cuts"] == remote["cuts"] != 1
        assert local["lines_before"] == remote["lines_before"]


@settings(max_examples=15)
@given(
    reads=st.lists(st.tuples(st.integers(0, 9000), st.integers(-1, 9000)), max_size=6),
    reads_ahead=st.booleans(),
    faults=st.lists(st.sampled_from(["cut", "reset", "status 500", "none"]), max_size=4),
)
def test_a_file_is_read_like_a_local_one(
    corpora: FaultyServer, reads: list[tuple[int, int]], reads_ahead: bool, faults: list[str]
):
    data = np.random.default_rng(0).bytes(8000)
    (corpora.root / "bytes").write_bytes(data)
    os.utime(corpora.root / "bytes", (1, 1))  # the same version in each example
    file = remote_file(corpora, "bytes", reads_ahead=reads_ahead)
    corpora.faults.clear()
    corpora.faults.extend(faults)
    for offset, size in reads:
        file.seek(offset)
        assert file.read(size) == data[offset:][: None if size < 0 else size]
        assert file.tell() == max(offset, min(offset + (size if size >= 0 else 8000), 8000))


def test_a_broken_answer_is_continued_at_its_byte(server: FaultyServer):
    (server.root / "data").write_bytes(bytes(50_000))
    file = remote_file(server, "data")
    server.requests.clear()
    server.faults.extend(["cut", "stall", "cut late"])
    assert file.read() == bytes(50_000)
    first_bytes = [int(span.split("=")[1].split("-")[0]) for _, span in server.requests]
    # half of the rest came, then a third of the rest, then all but one byte
    assert first_bytes == [0, 25_000, 25_000 + 25_000 // 3, 49_999]


def test_parquet_fetches_the_footer_and_the_needed_columns_only(server: FaultyServer):
    noise = np.random.default_rng(0)
    columns = {"text": [f"text {i} {noise.bytes(20).hex()}" for i in range(2000)]}
    columns["other"] = [noise.bytes(1000).hex() for _ in range(2000)]
    path = server.root / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=500, use_dictionary=False)
    metadata = pyarrow.parquet.ParquetFile(path).metadata
    needed = sum(metadata.row_group(group).column(0).total_compressed_size for group in range(4))
    assert [document.text for document in documents(spec_of(server, "a.parquet"))] == columns["text"]
    assert server.bytes_sent < needed + 2 * FIRST_BLOCK  # pyarrow reads 64 KB for the footer
    assert needed + 2 * FIRST_BLOCK < path.stat().st_size / 10


def test_reads_ahead_in_growing_blocks(server: FaultyServer):
    size = 5_000_000
    (server.root / "data").write_bytes(bytes(size))
    file = remote_file(server, "data")
    server.requests.clear()
    while file.read(1000):
        pass
    assert len(server.requests) < 9
    assert server.bytes_sent <= size + 1  # the 1 is the question for the size


def test_folders_and_globs_are_listed_and_sorted(server: FaultyServer):
    for name in ("b/2.jsonl", "b/1.jsonl", "a.jsonl", "b/.hidden.jsonl", "b/c/3.jsonl", "b/note.md"):
        (server.root / name).parent.mkdir(parents=True, exist_ok=True)
        (server.root / name).write_text(json.dumps({"text": name}) + "\n")

    def found(path: str) -> list[str]:
        files, root = remote_files(server.url(path), FAST)
        return [str(file.relative_to(root)) for file in files]

    assert found("**/*.jsonl") == ["a.jsonl", "b/1.jsonl", "b/2.jsonl", "b/c/3.jsonl"]
    assert found("b/*.jsonl") == ["1.jsonl", "2.jsonl"]
    assert found("*/[2-3].jsonl") == ["b/2.jsonl"]
    assert found("b/") == ["1.jsonl", "2.jsonl", "c/3.jsonl", "note.md"]
    assert found("b/1.jsonl") == ["1.jsonl"]
    server.faults.clear()
    assert "no file that matches" in reading_error(spec_of(server, "*.parquet"))


@pytest.mark.parametrize("kind", KINDS)
def test_other_protocols_are_those_of_fsspec(corpora: FaultyServer, kind: str):
    memory = fsspec.filesystem("memory")
    memory.put(str(corpora.root / kind), f"/{kind}", recursive=True)
    expected = documents(CorpusSpec(str(corpora.root / kind)))
    for corpus in (f"memory://{kind}", f"memory://{kind}/**"):
        assert documents(CorpusSpec(corpus, network=FAST)) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_an_outage_is_announced_once_and_then_stops_with_one_line(
    corpora: FaultyServer, workers: int, capfd: pytest.CaptureFixture[str]
):
    policy = RetryPolicy(retries=3, timeout=0.2, first_wait=0.001)
    spec = ReaderSpec(spec_of(corpora, "jsonl/", policy), "documents", ENCODER, 1, 1, 16, 8, 1)
    corpora.faults.clear()
    with contextlib.closing(ChunkLoader(spec, [0], [None], workers)) as loader:
        next(iter(loader))
        corpora.always = "status 503"
        try:
            with pytest.raises(UserError) as caught:
                list(islice(loader, 5000))
        finally:
            corpora.always = None
    (line,) = str(caught.value).splitlines()
    assert "part-0000" in line
    assert "status 503 (3 retries over" in line
    assert "data.retries" in line
    (announced,) = [line for line in capfd.readouterr().err.splitlines() if "waiting for" in line]
    assert "3 retries over up to" in announced


def test_broken_data_is_skipped_but_an_outage_never_is(corpora: FaultyServer):
    policy = RetryPolicy(retries=1, timeout=0.2, first_wait=0.001)
    corpora.faults.clear()
    for kind in ("jsonl", "jsonl.gz", "parquet", "text"):
        source = open_source(replace(spec_of(corpora, f"{kind}/", policy), skip_broken=True))
        corpora.always = "status 500"
        try:
            with pytest.raises(UserError, match="status 500"):
                list(source.read(0, Position()))
        finally:
            corpora.always = None


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_respected(server: FaultyServer, form: str):
    (server.root / "data").write_bytes(b"abc")
    file = remote_file(server, "data")
    server.retry_after = "1" if form == "seconds" else http_date(time.time() + 2)
    server.faults.append("status 429")
    start = time.monotonic()
    assert file.read() == b"abc"
    assert time.monotonic() - start > 0.9


def test_an_hour_is_not_waited(server: FaultyServer):
    (server.root / "a.txt").write_bytes(b"abc")
    server.retry_after, server.always = "3600", "status 429"
    assert "asks to wait 3,600 seconds" in reading_error(spec_of(server, "a.txt"))
    assert len(server.requests) == 1


BAD = {
    "missing.jsonl": "there is no file http",
    "missing/*.jsonl": "there is no file http",
    "missing/": "there is no file http",
    "*.csv": "there is no file that matches http",
}


@pytest.mark.parametrize("path", BAD)
def test_what_is_not_there_is_not_tried_again(server: FaultyServer, path: str):
    (server.root / "a.jsonl").write_text('{"text": "a"}\n')
    start = time.monotonic()
    assert BAD[path] in reading_error(spec_of(server, path, RetryPolicy()))
    assert time.monotonic() - start < 20  # one retry alone waits a second, all of them five minutes


def test_a_page_instead_of_a_file_is_refused(server: FaultyServer):
    (server.root / "a.jsonl").write_text('{"text": "a"}\n')
    server.always = "html"
    error = reading_error(spec_of(server, "a.jsonl?key=secret"))
    assert 'an HTML page ("Sign in") instead of a file' in error
    assert "secret" not in error


def test_a_server_without_ranges_is_refused(server: FaultyServer):
    (server.root / "a.jsonl").write_text('{"text": "a"}\n')
    server.has_ranges = False
    assert "ignores range requests; download the file" in reading_error(spec_of(server, "a.jsonl"))


def test_credentials_are_taken_from_netrc(server: FaultyServer, monkeypatch: pytest.MonkeyPatch):
    (server.root / "a.jsonl").write_text('{"text": "a"}\n')
    server.password = "Basic bWU6c2VjcmV0"  # me:secret
    assert "needs credentials (the server answers with status 401); add a line to ~/.netrc" in reading_error(
        spec_of(server, "a.jsonl")
    )
    netrc = server.root / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert [document.text for document in documents(spec_of(server, "a.jsonl"))] == ["a"]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("s3://bucket/a.jsonl", "s3:// needs s3fs: pip install s3fs"),
        ("gs://bucket/a.jsonl", "gs:// needs gcsfs: pip install gcsfs"),
        ("htps://host/a.jsonl", "htps:// is not a protocol of fsspec (did you mean https://?)"),
        ("http://127.0.0.1:9/a.jsonl", "the connection fails (Connection refused) (2 retries over"),
    ],
)
def test_errors_of_urls(corpus: str, message: str):
    policy = RetryPolicy(retries=2, timeout=1, first_wait=0.001)
    assert message in reading_error(CorpusSpec(corpus, network=policy))


def test_a_file_that_changes_during_a_run_stops_it(server: FaultyServer):
    path = server.root / "data"
    path.write_bytes(bytes(3 * FIRST_BLOCK))
    file = remote_file(server, "data")
    assert file.read(10) == bytes(10)
    path.write_bytes(b"x" * 3 * FIRST_BLOCK)
    os.utime(path, (1, 1))
    with pytest.raises(OSError, match="has changed on its server"):
        file.read()


def test_the_fingerprint_of_remote_files_is_their_version(server: FaultyServer):
    path = server.root / "a.jsonl"
    path.write_text('{"text": "a"}\n')

    def fingerprint() -> object:
        remote_files.cache_clear()  # as in another process
        return corpus_fingerprint(spec_of(server, "*.jsonl"))

    before = fingerprint()
    assert fingerprint() == before
    path.write_text('{"text": "b"}\n')
    os.utime(path, (1, 1))
    assert fingerprint() != before


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_document_longer_than_a_block_is_read_whole(server: FaultyServer, kind: str):
    texts = ["a", "é" * LAST_BLOCK, "", "b"]
    spec = write_corpus(kind, server.root / "long", texts)
    server.faults.extend(["none", "none", "cut", "reset"])
    assert documents(spec_of(server, "long/")) == documents(spec)


@pytest.mark.parametrize("skip_broken", [False, True])
def test_bad_content_of_a_remote_file_is_named_and_skipped_as_that_of_a_local_one(
    server: FaultyServer, skip_broken: bool
):
    lines = [b'{"text": "a"}', b'{"text": null}', b'{"text": "\xff"}', b"not json", b'{"text": ""}']
    bad = {"bad.jsonl": b"\n".join(lines), "bad.parquet": b"PAR1" + bytes(500), "empty.jsonl": b"\n"}
    bad["bad.jsonl.gz"] = gzip.compress(b'{"text": "a"}\n' * 5000) + b"garbage after the end"
    for name, data in bad.items():
        (server.root / name).write_bytes(data)

        def read(corpus: CorpusSpec, name: str = name) -> object:
            try:
                return documents(replace(corpus, skip_broken=skip_broken))
            except UserError as error:
                return str(error).replace(server.url(name), str(server.root / name))

        assert read(spec_of(server, name)) == read(CorpusSpec(str(server.root / name)))


class ServerError(Exception):
    """As botocore raises it."""

    def __init__(self, status: int):
        super().__init__("an error of S3")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {"Retry-After": "7"}}}


def test_errors_are_classified_by_what_is_behind_them():
    for status, may_pass in ((503, True), (429, True), (500, True), (403, False), (404, False), (400, False)):
        try:
            try:
                raise ServerError(status)
            except ServerError as error:
                raise OSError("wrapped") from error
        except OSError as error:
            failure = classify(error)
        assert (failure.status, failure.may_pass, failure.retry_after) == (status, may_pass, 7.0)
    assert classify(TimeoutError()).may_pass
    assert classify(ConnectionResetError(104, "reset")).may_pass
    assert not classify(FileNotFoundError(2, "gone")).may_pass
    assert not classify(KeyError("a bug")).may_pass
