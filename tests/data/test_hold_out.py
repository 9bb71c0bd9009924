"""What is held out as shards or parts of them: disjoint from training, found without reading the rest."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import FEW_EXAMPLES, some_texts, texts_of, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import CorpusSpec, DocumentStream
from minrnn.data import rows as rows_module
from minrnn.data.corpus import Split
from minrnn.data.hold_out import are_held_out, is_held_out


def texts_in(spec: CorpusSpec, part: Split, num_readers: int = 1) -> Counter[str]:
    streams = [DocumentStream(spec, part, reader, num_readers, 8, 0) for reader in range(num_readers)]
    return sum((Counter(texts_of(stream.one_epoch())) for stream in streams), Counter())


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
@settings(FEW_EXAMPLES, max_examples=15)
@given(num_shards=st.integers(1, 30), num_readers=st.integers(1, 4), fraction=st.floats(0.01, 0.3))
def test_training_and_validation_are_disjoint_and_complete(
    kind: str, num_shards: int, num_readers: int, fraction: float, tmp_path_factory: pytest.TempPathFactory
):
    texts = some_texts(120, seed=3)
    spec = write_corpus(kind, tmp_path_factory.mktemp("parts"), texts, num_shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "MIN_PART_BYTES", 64)
        spec = replace(spec, held_out=fraction, hold_out="shards")
        train, validation = texts_in(spec, "train", num_readers), texts_in(spec, "validation")
        assert train + validation == Counter(texts)
        assert 0 < validation.total() <= (max(2 * fraction, 0.1) + 0.05) * len(texts) + 4
        assert texts_in(spec, "all") == Counter(texts)


def test_nothing_else_is_read_for_validation(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path, [str(i) for i in range(200)], num_shards=20)
    spec = replace(spec, held_out=0.1, hold_out="shards")
    held_out = texts_in(spec, "validation")
    assert held_out.total() == 20
    for path in tmp_path.iterdir():
        if path.read_text().split('"')[3] not in held_out:
            path.write_text("broken")
    stream = DocumentStream(spec, "validation", 0, 1, 8, 0)
    assert Counter(texts_of(stream.one_epoch())) == held_out
    assert stream.num_read == 20


def test_auto_holds_out_shards_of_what_takes_long_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [str(i) for i in range(400)]
    spec = replace(write_corpus("parquet", tmp_path / "corpus", texts, 4), held_out=0.1)
    by_hash = texts_in(spec, "validation")
    assert by_hash == texts_in(replace(spec, hold_out="documents"), "validation")
    monkeypatch.setattr(rows_module, "STREAM_BYTES", 1)
    assert texts_in(spec, "validation") == texts_in(replace(spec, hold_out="shards"), "validation") != by_hash
    assert texts_in(replace(spec, hold_out="documents"), "validation") == by_hash


def test_too_few_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A compressed file cannot be cut, and one of three is too much."""
    monkeypatch.setattr(rows_module, "STREAM_BYTES", 1)
    spec = replace(write_corpus("jsonl.gz", tmp_path, some_texts(60), 3), held_out=0.01)
    assert texts_in(spec, "validation") == texts_in(replace(spec, hold_out="documents"), "validation")
    with pytest.raises(UserError, match=r"data\.hold_out: shards would hold out 33% of the corpus"):
        DocumentStream(replace(spec, hold_out="shards"), "train", 0, 1, 8, 0)


@given(fraction=st.floats(0, 1), draw=st.data())
def test_an_array_of_digests_is_held_out_as_each_alone(fraction: float, draw: st.DataObject):
    limit = min(int(fraction * 2**64), 2**64 - 2)
    near = st.integers(max(limit - 2, 0), limit + 1)
    digests = draw.draw(st.lists(st.integers(0, 2**64 - 1) | near, max_size=20))
    is_chosen = are_held_out(np.array(digests, np.uint64), fraction)
    assert is_chosen.tolist() == [is_held_out(digest, fraction) for digest in digests]
