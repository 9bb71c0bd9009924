"""Each held-out byte is scored once, by one reader in one lane, whatever the number of readers and lanes."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import BOS, ENCODER, EOS, FEW_EXAMPLES, some_texts, write_corpus
from hypothesis import given
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import (
    IGNORE_INDEX,
    CorpusSpec,
    DocumentStream,
    Encoder,
    RetryPolicy,
    ValidationSet,
    byte_tokenizer,
    corpus_tokens,
    held_out_documents,
    held_out_text,
    load_held_out,
    made_from,
    save_held_out,
)
from minrnn.data.corpus import Split


def document_validation(spec: CorpusSpec, part: Split, encoder: Encoder, *layout: Any) -> ValidationSet:
    """The documents of a reader; `layout` is reader, num_readers, num_lanes, chunk, max_tokens."""
    *division, max_tokens = layout
    return held_out_documents(spec, part, encoder, max_tokens).documents(*division)


def window_validation(tokens: np.ndarray, encoder: Encoder, *layout: Any) -> ValidationSet:
    """The crops of a reader; `layout` as of `document_validation`."""
    *division, max_tokens = layout
    return held_out_text(tokens, encoder, max_tokens).crops(*division)


def lanes_of(validation: ValidationSet, num_lanes: int, size: int) -> list[list[list[int]]]:
    """The documents of each lane as lists of tokens, reconstructed from the chunks, whose layout is
    checked.
    """
    inputs: list[list[int]] = [[] for _ in range(num_lanes)]
    targets: list[list[int]] = [[] for _ in range(num_lanes)]
    starts: list[list[int]] = [[] for _ in range(num_lanes)]
    num_before = num_lanes
    for chunk in validation.chunks():
        num_running, time = chunk.input_ids.shape
        assert time == size
        assert 0 < num_running <= num_before, "a prefix of the lanes, and it shrinks"
        for row in range(num_running):
            scored = chunk.shift_labels[row] != IGNORE_INDEX
            count = int(scored.sum())
            assert count > 0, "a lane that has ended is not shown"
            assert scored[:count].all(), "padding is on the right"
            assert len(inputs[row]) % size == 0, "a lane that was padded had ended"
            assert not chunk.document_starts[row, count:].any()
            starts[row] += [
                len(inputs[row]) + int(column) for column in np.flatnonzero(chunk.document_starts[row])
            ]
            inputs[row] += chunk.input_ids[row, :count].tolist()
            targets[row] += chunk.shift_labels[row, :count].tolist()
        num_before = num_running
    lanes = []
    for lane_inputs, lane_targets, lane_starts in zip(inputs, targets, starts, strict=True):
        assert lane_starts[:1] == [0][: len(lane_inputs)]
        edges = [*lane_starts, len(lane_inputs)] if lane_starts else []
        documents = []
        for first, last in pairwise(edges):
            assert lane_inputs[first + 1 : last] == lane_targets[first : last - 1]
            documents.append([lane_inputs[first], *lane_targets[first:last]])
        lanes.append(documents)
    return lanes


def decode_bytes(tokens: list[int]) -> str:
    assert tokens[0] == BOS
    assert tokens[-1] == EOS
    return bytes(tokens[1:-1]).decode()


@FEW_EXAMPLES
@given(
    lengths=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 70)), min_size=1, max_size=20),
    num_readers=st.integers(1, 3),
    num_lanes=st.integers(1, 5),
    size=st.integers(1, 24),
)
def test_every_document_is_scored_once(
    lengths: list[int], num_readers: int, num_lanes: int, size: int, tmp_path_factory: pytest.TempPathFactory
):
    texts = [f"{i}{'xé漢'[i % 3] * length}" for i, length in enumerate(lengths)]
    spec = write_corpus("jsonl", tmp_path_factory.mktemp("once"), texts)
    scored_texts: Counter[str] = Counter()
    size_in_bytes = 0
    for reader in range(num_readers):
        validation = document_validation(spec, "all", ENCODER, reader, num_readers, num_lanes, size, None)
        assert validation.reader == reader
        lanes = lanes_of(validation, num_lanes, size)
        assert lanes_of(validation, num_lanes, size) == lanes, "it can be gone through again"
        assert lanes == [[tokens.tolist() for tokens in lane] for lane in validation.lanes], (
            "whole documents, in order"
        )
        texts_of_reader = [decode_bytes(tokens) for lane in lanes for tokens in lane]
        assert validation.num_bytes == sum(len(text.encode()) for text in texts_of_reader)
        scored_texts.update(texts_of_reader)
        size_in_bytes += validation.num_bytes
    assert scored_texts == Counter(texts)
    assert size_in_bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("num_readers", [1, 2, 3])
def test_only_held_out_documents(num_readers: int, tmp_path: Path):
    texts = some_texts(90)
    spec = replace(write_corpus("jsonl", tmp_path, texts, 3), held_out=0.3)
    train = [document.text or "" for document in DocumentStream(spec, "train", 0, 1, 8, None).one_epoch()]
    shares = [
        document_validation(spec, "validation", ENCODER, reader, num_readers, 4, 8, None)
        for reader in range(num_readers)
    ]
    scored = [decode_bytes(tokens) for share in shares for lane in lanes_of(share, 4, 8) for tokens in lane]
    assert Counter(scored) + Counter(train) == Counter(texts)
    assert len(scored) > 10


def test_lanes_are_about_equally_long(tmp_path: Path):
    texts = some_texts(200, longest=60)
    validation = document_validation(
        write_corpus("jsonl", tmp_path, texts), "all", ENCODER, 0, 1, 8, 16, None
    )
    sizes = [sum(len(tokens) - 1 for tokens in lane) for lane in validation.lanes]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 61


@pytest.mark.parametrize("num_readers", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [1, 100, 333])
def test_a_budget_takes_whole_documents(max_tokens: int, num_readers: int, tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path, some_texts(60))
    shares = [
        document_validation(spec, "all", ENCODER, reader, num_readers, 3, 8, max_tokens)
        for reader in range(num_readers)
    ]
    scored = [decode_bytes(tokens) for share in shares for lane in lanes_of(share, 3, 8) for tokens in lane]
    sizes = [len(text.encode()) + 1 for text in scored]
    assert sum(sizes) >= max_tokens
    taken = [document.text or "" for document in DocumentStream(spec, "all", 0, 1, 64, 0).one_epoch()][
        : len(scored)
    ]
    assert Counter(scored) == Counter(taken), "the same ones, whatever the number of readers"
    assert sum(sizes) - (len(taken[-1].encode()) + 1) < max_tokens, "and none too many"


def test_nothing_is_held_out(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path, some_texts(20))
    with pytest.raises(
        UserError, match=r"^error: data\.validation_fraction: no document of .* is held out; raise it"
    ):
        document_validation(spec, "validation", ENCODER, 0, 1, 2, 8, None)
    with pytest.raises(UserError, match=r"^error: data\.validation_fraction: leaves no text"):
        window_validation(corpus_tokens(spec, "validation", ENCODER), ENCODER, 0, 1, 2, 8, None)


@pytest.mark.parametrize(("texts", "max_tokens"), [(["", ""], None), (["some text", *[""] * 20], 1)])
def test_held_out_documents_that_are_all_empty_are_refused(
    tmp_path: Path, texts: list[str], max_tokens: int | None
):
    """Every reader refuses them, whatever its share, since bits per byte would be divided by 0."""
    spec = write_corpus("jsonl", tmp_path, texts)
    for reader in range(3):
        with pytest.raises(
            UserError, match=r"^error: data\.validation_fraction: the held-out documents of .* are empty"
        ):
            document_validation(spec, "all", ENCODER, reader, 3, 2, 8, max_tokens)
    mixed = write_corpus("jsonl", tmp_path, ["", "text"])
    assert (
        sum(
            document_validation(mixed, "all", ENCODER, reader, 2, 2, 8, None).num_bytes for reader in range(2)
        )
        == 4
    )


def test_more_readers_than_documents(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path, ["one", "two"])
    shares = [document_validation(spec, "all", ENCODER, reader, 3, 2, 8, None) for reader in range(3)]
    assert sorted(
        decode_bytes(tokens) for share in shares for lane in lanes_of(share, 2, 8) for tokens in lane
    ) == ["one", "two"]
    assert list(shares[2].chunks()) == []
    assert shares[2].num_bytes == 0


@FEW_EXAMPLES
@given(
    length=st.integers(2, 200),
    num_readers=st.integers(1, 3),
    num_lanes=st.integers(1, 5),
    size=st.integers(1, 24),
    max_tokens=st.none() | st.integers(1, 250),
)
def test_crops_score_every_token_but_the_first_once(
    length: int, num_readers: int, num_lanes: int, size: int, max_tokens: int | None
):
    tokens = np.arange(length, dtype=np.int32)  # a token is its position
    shares = [
        window_validation(tokens, ENCODER, reader, num_readers, num_lanes, size, max_tokens)
        for reader in range(num_readers)
    ]
    crops = sorted(crop for share in shares for lane in lanes_of(share, num_lanes, size) for crop in lane)
    last = length - 1 if max_tokens is None else min(length - 1, max_tokens)
    assert [token for crop in crops for token in crop[1:]] == list(range(1, last + 1))
    for crop in crops:
        assert crop == list(range(crop[0], crop[-1] + 1))
        assert crop[0] % size == 0, "nothing is carried from one to the next"
        assert len(crop) <= size + 1
    assert sum(share.num_bytes for share in shares) == last


@pytest.mark.parametrize("size", [1, 7, 64])
def test_bytes_of_crops_through_characters(size: int):
    """A crop may end within a character; the bytes of all crops still add up to those of the text."""
    encoder = Encoder(
        BOS, EOS, byte_tokenizer().backend_tokenizer.to_str()
    )  # bytes again, by way of the tokenizers library
    text = "plain été 漢字 🙂 " * 9
    tokens = encoder.encode(text)
    shares = [window_validation(tokens, encoder, reader, 2, 3, size, None) for reader in range(2)]
    assert sum(share.num_bytes for share in shares) == len(text.encode()) - 1


def test_python_stdlib_is_scored_on_its_held_out_modules():
    validation = document_validation(CorpusSpec("python-stdlib"), "validation", ENCODER, 0, 1, 4, 512, 20_000)
    scored = [decode_bytes(tokens) for lane in lanes_of(validation, 4, 512) for tokens in lane]
    everything = {
        document.text
        for document in DocumentStream(CorpusSpec("python-stdlib"), "validation", 0, 1, 64, None).one_epoch()
    }
    assert scored
    assert set(scored) <= everything


@FEW_EXAMPLES
@given(count=st.integers(1, 20), num_readers=st.integers(1, 3), max_tokens=st.none() | st.integers(1, 200))
def test_held_out_text_comes_back_from_its_files(
    count: int, num_readers: int, max_tokens: int | None, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("files")
    spec = write_corpus("jsonl", folder / "corpus", [*some_texts(count), "a text"])
    held_out = held_out_documents(spec, "all", ENCODER, None)
    source = made_from(spec, {"files": 1}, "all", "documents", ENCODER, max_tokens)
    assert load_held_out(folder / "kept", source) is None
    save_held_out(folder / "kept", held_out, source)
    again = load_held_out(folder / "kept", json.loads(json.dumps(source)))
    assert again is not None
    assert again.num_read == held_out.num_read == count + 1
    assert again.tokens.dtype == np.uint16
    for reader in range(num_readers):
        one, other = (text.documents(reader, num_readers, 3, 8) for text in (held_out, again))
        assert one.num_bytes == other.num_bytes
        for lane, other_lane in zip(one.lanes, other.lanes, strict=True):
            for tokens, other_tokens in zip(lane, other_lane, strict=True):
                np.testing.assert_array_equal(tokens, other_tokens)


def test_files_made_from_something_else_are_not_read(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path / "corpus", some_texts(20))
    arguments = (spec, {"files": 1}, "all", "documents", ENCODER, 100)
    source = made_from(*arguments)
    save_held_out(tmp_path / "kept", held_out_documents(spec, "all", ENCODER, 100), source)
    others: list[tuple] = [
        (replace(spec, text_field="body"), *arguments[1:]),
        (spec, {"files": 2}, *arguments[2:]),
        (*arguments[:2], "validation", *arguments[3:]),
        (*arguments[:3], "windows", *arguments[4:]),
        (*arguments[:4], Encoder(0, 1, None), 100),
        (*arguments[:5], None),
    ]
    for other in others:
        assert load_held_out(tmp_path / "kept", made_from(*other)) is None
    moved = replace(spec, corpus="elsewhere", excluded=("x",), network=RetryPolicy(retries=1))
    assert made_from(moved, *arguments[1:]) == source
    assert made_from(moved, None, *arguments[2:]) != made_from(spec, None, *arguments[2:])
    assert load_held_out(tmp_path / "kept", source) is not None
    (tokens,) = (tmp_path / "kept").glob("tokens-*")
    tokens.write_bytes(tokens.read_bytes()[:-3])
    assert load_held_out(tmp_path / "kept", source) is None, "a damaged file is made again"
    save_held_out(tmp_path / "kept", held_out_documents(spec, "all", ENCODER, None), {"format": 2})
    assert len(list((tmp_path / "kept").iterdir())) == 3, "files of another source are removed"
