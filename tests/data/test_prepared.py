"""Prepared corpora: the same stream as the original, resumable preparation, exact errors."""

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from data_helpers import BOS, EOS, KINDS, assert_same_chunk, open_any, some_texts, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import (
    BYTES,
    CorpusSpec,
    DocumentReader,
    Encoder,
    ReaderSpec,
    RowRules,
    byte_tokenizer,
    check_corpus,
    corpus_fingerprint,
    corpus_tokens,
    held_out_documents,
    is_prepared,
    load_tokenizer,
    open_source,
    run_tokenizer,
    tokenizer_fingerprint,
)
from minrnn.data.prepared import make, read_manifest
from minrnn.data.prepared.make import prepare
from minrnn.data.prepared.write import summary_path
from minrnn.data.sources import Position

ENCODER = Encoder(BOS, EOS, None)
FEW = settings(max_examples=8)


def prepare_bytes(spec: CorpusSpec, out: Path, **options) -> CorpusSpec:
    """Prepare with the byte tokenizer; returns the prepared corpus, with the settings of training."""
    prepare(spec, byte_tokenizer(), BYTES, out, workers=0, **options)
    return CorpusSpec(str(out), held_out=spec.held_out)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch):
    """Several record batches in a shard, and several calls of the tokenizer in a batch."""
    monkeypatch.setattr("minrnn.data.prepared.write.BATCH_TOKENS", 200)
    monkeypatch.setattr("minrnn.data.prepared.write.CALL_CHARACTERS", 60)


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch, local_hub_datasets):
    monkeypatch.setattr("minrnn.data.prepared.make.open_source", open_any)
    monkeypatch.setattr("minrnn.data.prepared.write.open_source", open_any)


@pytest.mark.parametrize(
    ("kind", "num_shards", "is_stream"),
    [
        *((kind, 3, False) for kind in KINDS),
        *((kind, n, True) for kind in ("jsonl", "parquet") for n in (1, 6)),
    ],
)
@pytest.mark.usefixtures("local_hub")
def test_prepared_and_original_give_equal_chunks_and_resume_each_other(
    kind: str, num_shards: int, is_stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Chunks, names and positions, over two epochs, while the reader moves between both at random.

    Shards are whole or cut, and documents or parts of shards are held out.
    """
    monkeypatch.setattr("minrnn.data.rows.MIN_PART_BYTES", 64)
    if is_stream:
        monkeypatch.setattr("minrnn.data.rows.STREAM_BYTES", 1)
    folder = tmp_path / kind
    spec = dataclasses.replace(write_corpus(kind, folder, some_texts(40), num_shards), held_out=0.2)
    prepared = prepare_bytes(spec, tmp_path / "prepared")
    for num_readers, reader in ((1, 0), (3, 2), (2, 1)):
        specs = [
            ReaderSpec(corpus, "documents", ENCODER, num_readers, 2, 32, window=5, seed=3)
            for corpus in (spec, prepared)
        ]
        original = DocumentReader(specs[0], reader)
        moving, draw = DocumentReader(specs[1], reader), random.Random(reader)
        for _ in range(24):
            chunk, other = original.next_chunk(), moving.next_chunk()
            assert_same_chunk(chunk, other)
            if draw.random() < 0.3:
                moving = DocumentReader(specs[draw.randrange(2)], reader, other.state)
        assert original.group.window.epoch >= 1
    for part in ("train", "validation", "all"):
        np.testing.assert_array_equal(
            corpus_tokens(spec, part, ENCODER), corpus_tokens(prepared, part, ENCODER)
        )
    sets = [
        held_out_documents(s, "validation", ENCODER, 100).documents(1, 2, 2, 16) for s in (spec, prepared)
    ]
    assert sets[0].num_bytes == sets[1].num_bytes > 0
    assert [[t.tolist() for t in lane] for lane in sets[0].lanes] == [
        [t.tolist() for t in lane] for lane in sets[1].lanes
    ]


@FEW
@given(seed=st.integers(0, 10**6), data=st.data())
def test_documents_are_found_from_any_position(tmp_path_factory, seed: int, data):
    """With broken and empty documents, blank lines between them, and batches of any size."""
    tmp_path = tmp_path_factory.mktemp("prepared")
    texts, draw = some_texts(25, seed), random.Random(seed)
    lines = [json.dumps({"text": text}) for text in texts]
    for extra in ("", "not json", '{"text": null}', ""):
        lines.insert(draw.randrange(len(lines)), extra)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    spec = CorpusSpec(str(tmp_path / "a.jsonl"), skip_broken=True)
    prepared = prepare_bytes(spec, tmp_path / "out")
    original, source = open_source(spec, "all"), open_source(prepared, "all")
    start = Position(data.draw(st.integers(0, len(lines) + 1)))
    expected, found = list(original.read(0, start)), list(source.read(0, start))
    assert [(d.index, d.name, d.num_skipped, d.is_left_out, d.num_bytes) for d in found] == [
        (d.index, d.name, d.num_skipped, d.is_left_out, d.num_bytes) for d in expected
    ]
    for document, other in zip(found, expected, strict=True):
        if document.prepared is not None:
            assert bytes(document.prepared.tokens) == (other.text or "").encode()
    assert read_manifest(tmp_path / "out")["shards"][0]["skipped"] == 2


@pytest.mark.parametrize("join", [None, "package", "folder"])
def test_the_standard_library_keeps_its_held_out_modules(tmp_path: Path, monkeypatch, join: str | None):
    root = tmp_path / "lib"
    for name in ("a.py", "json/x.py", "json/y.py", "os/b.py", "os/sub/c.py", "queue.py", "z.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda *_: {"stdlib": str(root)})
    spec = CorpusSpec("python-stdlib", held_out=0.5, join=join)
    prepared = prepare_bytes(spec, tmp_path / "out")
    for part in ("train", "validation", "all"):
        documents = [list(open_source(s, part).read(0, Position())) for s in (spec, prepared)]
        names = [[(d.name, d.index, d.num_bytes) for d in some] for some in documents]
        assert names[0] == names[1]
        tail = list(open_source(prepared, part).read(0, Position(1)))
        assert [d.name for d in tail] == [d.name for d in documents[0][1:]]
    reader = [DocumentReader(ReaderSpec(s, "documents", ENCODER, 1, 2, 8, 3, 0), 0) for s in (spec, prepared)]
    for _ in range(8):
        assert_same_chunk(reader[0].next_chunk(), reader[1].next_chunk())


def bpe_folder(folder: Path) -> str:
    from minrnn.data.train_tokenizer import train_tokenizer

    train_tokenizer((text for text in some_texts(200, 1)), 320).save_pretrained(folder)
    return str(folder)


def test_bpe_tokens_are_narrow_and_equal(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path / "corpus", some_texts(30), num_shards=2)
    name = bpe_folder(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(name)
    manifest = prepare(spec, tokenizer, name, tmp_path / "out", workers=0)
    assert manifest["dtype"] == "uint16"
    encoder = Encoder.from_tokenizer(tokenizer, name)
    prepared = CorpusSpec(str(tmp_path / "out"))
    for shard in range(2):
        pairs = zip(
            *(list(open_source(s, "all").read(shard, Position())) for s in (spec, prepared)), strict=True
        )
        for original, document in pairs:
            assert document.prepared is not None
            assert document.prepared.tokens.dtype == np.uint16
            assert document.prepared.tokens.tolist() == encoder.encode(original.text or "").tolist()
    copy = run_tokenizer(str(tmp_path / "out"), str(tmp_path / "out" / "tokenizer"))
    assert tokenizer_fingerprint(copy) == tokenizer_fingerprint(tokenizer)
    with pytest.raises(UserError, match=r"bytes is not the tokenizer that .* was prepared with"):
        run_tokenizer(str(tmp_path / "out"), BYTES)


class Stop(Exception):
    pass


@FEW
@given(after=st.integers(0, 8))
def test_an_interrupted_preparation_goes_on(tmp_path_factory, after: int):
    """Finished shards are kept, and the files are those of a preparation that was not interrupted."""
    tmp_path = tmp_path_factory.mktemp("prepared")
    spec = write_corpus("jsonl", tmp_path / "corpus", some_texts(60), num_shards=4)
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare_bytes(spec, whole)
    calls = 0

    def stop(progress):
        nonlocal calls
        calls += 1
        if calls > after:
            raise Stop

    with pytest.raises(Stop):
        prepare_bytes(spec, out, on_progress=stop)
    with pytest.raises(UserError, match="unfinished; the same minrnn prepare command"):
        open_source(CorpusSpec(str(out)))
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.arrow")}
    described = [number for number in range(4) if summary_path(out, number).exists()]
    prepare_bytes(spec, out)
    for number in described:
        path = summary_path(out, number).with_suffix(".arrow")
        assert path.stat().st_mtime_ns == finished[path]
    assert read_manifest(out) == read_manifest(whole)
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_workers_write_the_same_files(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path / "corpus", some_texts(60), num_shards=3)
    one = prepare(spec, byte_tokenizer(), BYTES, tmp_path / "one", workers=0)
    two = prepare(spec, byte_tokenizer(), BYTES, tmp_path / "two", workers=2)
    sizes = [[(s["documents"], s["tokens"], s["bytes"]) for s in made["shards"]] for made in (one, two)]
    assert sizes[0] == sizes[1]
    assert is_prepared(str(tmp_path / "two"))


def test_names_of_files_that_are_not_unicode(tmp_path: Path):
    """As in the original, a run can stop within such a file and go on from the other corpus."""
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        (tmp_path / "corpus" / os.fsdecode(b"caf\xe9%d.txt" % number)).write_text(f"text {number} " * 9)
    original = CorpusSpec(str(tmp_path / "corpus"))
    prepared = prepare_bytes(original, tmp_path / "out")
    assert next(open_source(prepared).read(0, Position())).name == "caf?0.txt"
    specs = [ReaderSpec(corpus, "documents", ENCODER, 1, 2, 16, 4, seed=0) for corpus in (original, prepared)]
    readers = [DocumentReader(spec, 0) for spec in specs]
    states = [json.loads(json.dumps(reader.next_chunk().state)) for reader in readers]
    resumed = [DocumentReader(spec, 0, state) for spec, state in zip(specs, reversed(states), strict=True)]
    for one, other in zip(readers, resumed, strict=True):
        np.testing.assert_array_equal(one.next_chunk().input_ids, other.next_chunk().input_ids)


def test_another_corpus_tokenizer_or_setting_is_refused(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path / "corpus", some_texts(10))
    out = tmp_path / "out"
    prepared = prepare_bytes(spec, out)
    other = write_corpus("jsonl", tmp_path / "other", some_texts(11))
    name = bpe_folder(tmp_path / "tokenizer")
    refused = "was begun with .*name another folder"
    with pytest.raises(UserError, match=refused):
        prepare_bytes(other, out)
    with pytest.raises(UserError, match=r"data.text_field 'text', not 'other'"):
        prepare_bytes(dataclasses.replace(spec, text_field="other"), out)
    with pytest.raises(UserError, match="the tokenizer bytes, not"):
        prepare(spec, load_tokenizer(name), name, out)
    with pytest.raises(UserError, match="is prepared already"):
        prepare_bytes(prepared, tmp_path / "again")
    with pytest.raises(UserError, match=r"data.text_field: is 'other', but .* was prepared with 'text'"):
        open_source(dataclasses.replace(prepared, text_field="other"))
    rules = RowRules.from_settings("{text}!", {"min_bytes": 9})
    with pytest.raises(UserError) as raised:
        open_source(dataclasses.replace(prepared, rules=rules))
    assert [key for key, _ in raised.value.errors] == ["data.template", "data.filter"]
    assert raised.value.errors[0][1].startswith("is '{text}!', but")
    with pytest.raises(UserError, match="holds other files"):
        prepare_bytes(spec, tmp_path / "corpus")
    (tmp_path / "corpus" / "part-00000.jsonl").open("a").write('{"text": "more"}\n')
    with pytest.raises(UserError, match="as it was before it changed"):
        prepare_bytes(spec, out)


def test_damaged_files_are_named_and_made_anew(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path / "corpus", some_texts(40), num_shards=3)
    out = tmp_path / "out"
    prepared = prepare_bytes(spec, out)
    before = read_manifest(out)
    (out / "shard-00001.arrow").write_bytes(b"ARROW1")
    with pytest.raises(UserError, match=r"shard-00001.arrow has 6 bytes, not .*minrnn prepare"):
        open_source(prepared)
    prepare_bytes(spec, out)
    assert read_manifest(out) == before
    data = bytearray((out / "shard-00002.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "shard-00002.arrow").write_bytes(data)
    (out / "shard-00000.arrow").unlink()
    prepare_bytes(spec, out, verify=True)
    assert read_manifest(out) == before
    for name, file in before["files"].items():
        assert make.sha256_of(out / name) == file["sha256"]


def test_the_fingerprint_is_that_of_the_original(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path / "corpus", some_texts(10))
    prepared = prepare_bytes(spec, tmp_path / "out")
    before = corpus_fingerprint(spec)
    assert before is not None
    assert corpus_fingerprint(prepared) == before
    assert check_corpus(before, prepared, "documents", 1) is None
    with pytest.raises(UserError, match="prepared from other text"):
        check_corpus({**before, "all": "other"}, prepared, "documents", 1)
