"""Order `windows`: crops of one text are a function of seed, step and reader."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import ENCODER, EOS, FEW_EXAMPLES, as_array, assert_same_chunk, some_texts, write_corpus
from hypothesis import given
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import WindowReader, corpus_tokens


@FEW_EXAMPLES
@given(
    length=st.integers(2, 60),
    lanes=st.integers(1, 5),
    seed=st.integers(0, 5),
    reader=st.integers(0, 3),
    data=st.data(),
)
def test_crops_are_a_function_of_seed_step_and_reader(
    length: int, lanes: int, seed: int, reader: int, data: st.DataObject
):
    size = data.draw(st.integers(1, length - 1))
    tokens = np.arange(length, dtype=np.int32)  # a token is its position
    first = WindowReader(tokens, reader, lanes, size, seed)
    whole = [first.next_chunk() for _ in range(8)]
    for chunk in whole:
        assert chunk.input_ids.shape == (lanes, size)
        assert (np.diff(chunk.input_ids, axis=1) == 1).all()
        np.testing.assert_array_equal(chunk.shift_labels, chunk.input_ids + 1)
        assert chunk.input_ids.min() >= 0
        assert chunk.shift_labels.max() < length
        assert chunk.document_starts[:, 0].all()
        assert not chunk.document_starts[:, 1:].any()
    for at in range(7):
        resumed = WindowReader(tokens, reader, lanes, size, seed, json.loads(json.dumps(whole[at].state)))
        for expected in whole[at + 1 :]:
            assert_same_chunk(resumed.next_chunk(), expected)


def test_crops_reach_both_ends_and_differ():
    tokens = np.arange(12, dtype=np.int32)
    chunks = [WindowReader(tokens, 0, 64, 9, 0, {"step": step}).next_chunk() for step in range(4)]
    assert {int(start) for chunk in chunks for start in chunk.input_ids[:, 0]} == {0, 1, 2}
    assert not np.array_equal(as_array(chunks[0]), as_array(chunks[1]))
    assert not np.array_equal(as_array(chunks[0]), as_array(WindowReader(tokens, 1, 64, 9, 0).next_chunk()))
    assert not np.array_equal(as_array(chunks[0]), as_array(WindowReader(tokens, 0, 64, 9, 1).next_chunk()))
    with pytest.raises(UserError, match=r"has 12 tokens, too few for a crop of batch\.chunk 12 \+ 1"):
        WindowReader(tokens, 0, 1, 12, 0)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25])
def test_a_joined_text_is_split_by_position(fraction: float, tmp_path: Path):
    texts = some_texts(40)
    spec = replace(write_corpus("jsonl", tmp_path, texts, 3), held_out=fraction)
    everything, train, validation = (
        corpus_tokens(spec, part, ENCODER) for part in ("all", "train", "validation")
    )
    assert bytes(everything.astype(np.uint8)) == "".join(texts).encode()
    np.testing.assert_array_equal(np.concatenate([train, validation]), everything)
    assert len(validation) == pytest.approx(fraction * len(everything), abs=1)
    assert EOS not in everything
    assert train.dtype == validation.dtype == ENCODER.dtype
