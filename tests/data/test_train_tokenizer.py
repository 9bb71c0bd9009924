"""Tokenizers trained on a corpus: exact, deterministic, with bos, eos and pad."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from data_helpers import some_texts, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import BYTES, Encoder, byte_tokenizer, load_tokenizer, model_vocab_size, num_token_ids
from minrnn.data.document_stream import DocumentStream
from minrnn.data.prepared.make import prepare
from minrnn.data.sample import count, sample_documents
from minrnn.data.tokenizer import tokenizer_fingerprint
from minrnn.data.train_tokenizer import sample_texts, train_tokenizer

TEXTS = [f"def name_{i % 7}(value): return value + {i}\n" for i in range(60)] + some_texts(60)
SIZE = 300
FEW = settings(max_examples=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(TEXTS), SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.from_tokenizer(load_tokenizer(str(folder)), str(folder))


@given(text=st.text())
def test_any_text_is_restored(encoder: Encoder, text: str):
    tokens = encoder.encode(text)
    assert encoder.num_bytes(tokens) == len(text.encode())
    assert encoder._tokenizer().decode(tokens.tolist()) == text
    assert (tokens >= 3).all(), "the names of special tokens in a text are text"
    together = encoder.documents([text, text])
    np.testing.assert_array_equal(together[1], encoder.with_bounds([tokens])[0])


def test_its_special_tokens_and_size(folder: Path):
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer) == num_token_ids(tokenizer) == SIZE
    assert tokenizer("value")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("value <eos>")["input_ids"].count(tokenizer.eos_token_id) == 0
    assert len(tokenizer("return value")["input_ids"]) < len("return value")


def test_the_same_texts_give_the_same_tokenizer(folder: Path):
    again = train_tokenizer(iter(TEXTS), SIZE)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(load_tokenizer(str(folder)))


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["ab ab", "ab cd"], 400, r"400 tokens cannot be learned .* has words for 260; use at most 260"),
        (TEXTS, 100, r"must be at least 259 \(256 bytes and 3 special tokens\), not 100"),
    ],
)
def test_a_vocabulary_that_does_not_fit(texts: list[str], size: int, message: str):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, size)


@FEW
@given(num_shards=st.integers(1, 20), max_bytes=st.integers(1, 1500))
def test_a_sample_is_bounded_and_spread_over_the_corpus(tmp_path_factory, num_shards: int, max_bytes: int):
    spec = write_corpus("jsonl", tmp_path_factory.mktemp("corpus"), some_texts(40), num_shards=num_shards)
    spec = dataclasses.replace(spec, held_out=0.2)
    whole = [text for text in sample_texts(spec, 10**9) if text]
    stream = DocumentStream(spec, "train", 0, 1, window=8, seed=None)
    assert sorted(whole) == sorted(d.text for d in stream.one_epoch() if d.text)
    sizes: list[int] = []
    part = list(sample_texts(spec, max_bytes, sizes.append))
    texts = [text for text in part if text]
    assert texts[:-1] == whole[: len(texts) - 1]
    assert sum(map(len, part)) <= max_bytes
    assert sum(sizes) == sum(len(text.encode()) for text in part)


def test_a_prepared_corpus_has_no_text(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path / "corpus", some_texts(10))
    prepare(spec, byte_tokenizer(), BYTES, tmp_path / "out", workers=0)
    with pytest.raises(UserError, match="is prepared and has no text"):
        list(sample_texts(dataclasses.replace(spec, corpus=str(tmp_path / "out")), 100))


@FEW
@given(limit=st.integers(1, 50))
def test_counts_are_those_of_the_documents(tmp_path_factory, limit: int):
    spec = write_corpus("jsonl", tmp_path_factory.mktemp("corpus"), some_texts(30), num_shards=2)
    spec = dataclasses.replace(spec, held_out=0.3)
    documents = list(sample_documents(spec, "train"))
    counts = count(iter(documents), Encoder(256, 257, None), limit, 1000.0)
    texts = [d.text or "" for d, is_train in documents[:limit] if is_train]
    assert counts.documents == len(texts)
    assert counts.bytes == sum(len(text.encode()) for text in texts)
    assert counts.tokens == counts.bytes + len(texts)
    assert counts.others == min(limit, len(documents)) - len(texts)
    assert counts.is_whole == (limit > len(documents))


@given(num_ids=st.integers(1, 2000))
def test_vocabularies_are_padded(num_ids: int):
    class Ids:
        def get_vocab(self):
            return {str(i): i for i in range(num_ids)}

    rows = model_vocab_size(Ids())
    assert num_ids <= rows < num_ids + 64
    assert rows % (64 if num_ids >= 512 else 8) == 0
