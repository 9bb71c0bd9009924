"""Every document can be reconstructed from its chunks, and reading resumes exactly from any chunk's state."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import (
    ENCODER,
    FEW_EXAMPLES,
    KINDS,
    as_array,
    assert_same_chunk,
    endless_texts,
    json_line,
    naive_chunks,
    read_back,
    some_texts,
    without_hints,
    write_corpus,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import (
    Chunk,
    CorpusSpec,
    DocumentReader,
    DocumentStream,
    ReaderSpec,
    read_ahead,
)

pytestmark = pytest.mark.usefixtures("local_hub_datasets")


@dataclass(frozen=True)
class Setup:
    """The arguments of a reader, without its state."""

    spec: CorpusSpec
    reader: int = 0
    num_readers: int = 1
    lanes: int = 3
    chunk: int = 8
    window: int = 4
    seed: int = 5
    num_chunks: int = 1

    def open(self, state: Any = None) -> DocumentReader:
        spec = ReaderSpec(
            self.spec,
            "documents",
            ENCODER,
            self.num_readers,
            lanes=self.lanes,
            chunk=self.chunk,
            window=self.window,
            seed=self.seed,
            num_chunks=self.num_chunks,
        )
        return DocumentReader(spec, self.reader, state)

    def chunks(self, count: int, state: Any = None) -> list[Chunk]:
        reader = self.open(state)
        return [reader.next_chunk() for _ in range(count)]

    def documents(self) -> Iterator[str]:
        return endless_texts(
            DocumentStream(self.spec, "train", self.reader, self.num_readers, self.window, self.seed)
        )


@st.composite
def setups(draw: st.DrawFn, folder: Path) -> tuple[Setup, list[str]]:
    """A corpus of documents of any length, many of them empty or one character long, and a reader that it is
    long enough for.
    """
    num_lanes = draw(st.integers(1, 4))
    sizes = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 20), st.integers(60, 150))
    lengths = draw(st.lists(sizes, min_size=num_lanes + 4, max_size=24))
    texts = [f"{i}{'xé漢'[i % 3] * length}" if length else "" for i, length in enumerate(lengths)]
    num_shards, num_readers = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 1, 2]))
    path = folder / f"{draw(st.uuids(allow_nil=False))}"
    spec = write_corpus("jsonl", path, texts, num_shards)
    setup = Setup(
        spec,
        draw(st.integers(0, num_readers - 1)),
        num_readers,
        window=draw(st.integers(1, 30)),
        seed=draw(st.integers(0, 9)),
    )
    stream = DocumentStream(spec, "train", setup.reader, num_readers, 8, None)
    share = [document.text or "" for document in stream.one_epoch()]
    num_lanes = min(num_lanes, len(share))
    num_positions = sum(len(text.encode()) + 1 for text in share)
    chunk = draw(st.integers(1, num_positions // num_lanes))
    return replace(setup, lanes=num_lanes, chunk=min(chunk, 50)), share


@FEW_EXAMPLES
@given(data=st.data())
def test_documents_come_back_whole(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    setup, share = data.draw(setups(tmp_path_factory.mktemp("whole")))
    positions = sum(len(text.encode()) + 1 for text in share)
    chunks = setup.chunks(2 + 2 * positions // (setup.lanes * setup.chunk))
    for chunk in chunks:
        assert chunk.input_ids.shape == (setup.lanes, setup.chunk)
        assert chunk.num_scored == setup.lanes * setup.chunk
        assert chunk.reader == setup.reader
    lanes = read_back(chunks)
    num_documents = sum(len(lane.whole) + (lane.begun is not None) for lane in lanes)
    taken = list(itertools.islice(setup.documents(), num_documents))
    unfinished = Counter(taken) - Counter(text for lane in lanes for text in lane.whole)
    assert Counter(text for lane in lanes for text in lane.whole) <= Counter(taken)
    assert unfinished.total() == sum(lane.begun is not None for lane in lanes)
    for begun in [lane.begun for lane in lanes if lane.begun is not None]:
        assert any(text.encode().startswith(begun) for text in unfinished)
    for epoch in range(num_documents // len(share)):
        assert Counter(taken[epoch * len(share) : (epoch + 1) * len(share)]) == Counter(share), (
            "each document once an epoch"
        )


@FEW_EXAMPLES
@given(data=st.data(), group=st.sampled_from([1, 20, 100, 10**6]))
def test_chunks_equal_those_of_the_naive_reader(
    data: st.DataObject, group: int, tmp_path_factory: pytest.TempPathFactory
):
    """However many documents are tokenized together."""
    setup, _ = data.draw(setups(tmp_path_factory.mktemp("naive")))
    expected = naive_chunks(setup.documents(), setup.lanes, setup.chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ahead, "GROUP_CHARACTERS", group)
        chunks = setup.chunks(12)
        for chunk in chunks:
            np.testing.assert_array_equal(as_array(chunk), next(expected))
        for chunk, same in zip(chunks[6:], setup.chunks(6, chunks[5].state), strict=True):
            assert_same_chunk(chunk, same)


@settings(max_examples=15)
@given(data=st.data())
def test_resuming_from_any_chunk_and_from_there_again(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    setup, _ = data.draw(setups(tmp_path_factory.mktemp("resume")))
    whole = setup.chunks(16)
    at = 0
    while at < len(whole):  # a run that is interrupted again and again
        state = json.loads(json.dumps(whole[at].state))
        for chunk, expected in zip(setup.chunks(len(whole) - at - 1, state), whole[at + 1 :], strict=True):
            assert_same_chunk(chunk, expected)
        count = data.draw(st.integers(1, 6))
        resumed = setup.chunks(count, state)
        at += count
        if at < len(whole):
            assert_same_chunk(resumed[-1], whole[at])
            whole[at] = resumed[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("num_readers", [1, 2])
def test_resuming_for_every_source(kind: str, num_shards: int, num_readers: int, tmp_path: Path):
    spec = write_corpus(kind, tmp_path / kind, some_texts(24), num_shards)
    setup = Setup(spec, num_readers - 1, num_readers, window=5)
    whole = setup.chunks(14)
    for at in range(0, 14, 3 if kind == "hub" else 1):
        state = json.loads(json.dumps(whole[at].state))
        resumed = setup.chunks(2, state)
        again = setup.chunks(13 - at, json.loads(json.dumps(resumed[0].state)))
        for chunk, expected in zip([resumed[0], *again], whole[at + 1 :], strict=False):
            assert_same_chunk(chunk, expected)


def test_a_chunks_state_is_its_own(tmp_path: Path):
    """Prefetching does not change the state of an earlier chunk."""
    reader = Setup(write_corpus("jsonl", tmp_path, some_texts(20))).open()
    first = reader.next_chunk()
    before = json.dumps(first.state), as_array(first)
    for _ in range(10):
        reader.next_chunk()
    assert json.dumps(first.state) == before[0]
    np.testing.assert_array_equal(as_array(first), before[1])


def test_the_state_stays_small(tmp_path: Path):
    setup = Setup(write_corpus("jsonl", tmp_path, some_texts(200)), lanes=4)
    states = [chunk.state for chunk in setup.chunks(60)]
    assert max(len(json.dumps(state)) for state in states) < 1200
    expected = {"version", "window", "number", "num_skipped", "num_filtered", "lanes"}
    assert set(states[0]) == expected


@FEW_EXAMPLES
@given(data=st.data(), num_chunks=st.integers(2, 4))
def test_several_chunks_of_a_step_are_those_of_several_steps(
    data: st.DataObject, num_chunks: int, tmp_path_factory: pytest.TempPathFactory
):
    """In every array, every name and every position: how many a step reads does not change the order."""
    setup, share = data.draw(setups(tmp_path_factory.mktemp("several")))
    assume(sum(len(text.encode()) + 1 for text in share) >= setup.lanes * num_chunks)
    setup = replace(setup, chunk=max(setup.chunk // num_chunks, 1))
    singles = setup.chunks(3 * num_chunks)
    for step, joined in enumerate(replace(setup, num_chunks=num_chunks).chunks(3)):
        expected = singles[step * num_chunks : (step + 1) * num_chunks]
        assert without_hints(joined.state) == without_hints(expected[-1].state)
        assert joined.num_tokens == num_chunks * expected[0].num_tokens
        for single, other in zip(joined.single_chunks(), expected, strict=True):
            np.testing.assert_array_equal(as_array(single), as_array(other))
        for row, names in enumerate(joined.documents):
            assert set(names) == {name for chunk in expected for name in chunk.documents[row]}


def test_names_say_where_each_lane_reads(tmp_path: Path):
    setup = Setup(
        write_corpus("text", tmp_path, ["a" * 9, "b" * 3, "c" * 9, "d" * 9]), lanes=2, chunk=10, window=1
    )
    assert [chunk.documents for chunk in setup.chunks(2)] == [
        [["00000.txt"], ["00001.txt", "00002.txt"]],
        [["00003.txt"], ["00002.txt", "00000.txt"]],
    ]


def test_seeds_and_readers_give_different_orders(tmp_path: Path):
    setup = Setup(write_corpus("jsonl", tmp_path, some_texts(80)), window=80)
    first = as_array(setup.chunks(1)[0])
    np.testing.assert_array_equal(first, as_array(setup.chunks(1)[0]))
    assert not np.array_equal(first, as_array(replace(setup, seed=6).chunks(1)[0]))


def test_held_out_documents_are_never_trained_on(tmp_path: Path):
    texts = some_texts(60)[1:]
    spec = replace(write_corpus("jsonl", tmp_path, texts), held_out=0.3)
    held_out = {document.text for document in DocumentStream(spec, "validation", 0, 1, 8, None).one_epoch()}
    seen = {text for lane in read_back(Setup(spec).chunks(120)) for text in lane.whole}
    assert held_out
    assert seen == set(texts) - held_out


def test_too_little_text(tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path / "few", ["one", "two"])
    with pytest.raises(
        UserError,
        match=r"^error: data\.corpus: .* 8 tokens, fewer than .* 3 lanes x 8; lower "
        r"batch\.lanes or batch\.chunk",
    ):
        Setup(spec).open()
    Setup(spec, lanes=2, chunk=4).open()  # exactly enough
    with pytest.raises(
        UserError, match=r"reader 2's share \(1 of 3\) of .* holds no documents; .*batch\.readers"
    ):
        Setup(spec, reader=2, num_readers=3, lanes=1, chunk=1).open()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no documents"):
        Setup(CorpusSpec(str(tmp_path / "blank.jsonl"))).open()
    with pytest.raises(UserError, match="holds no documents"):
        Setup(replace(spec, held_out=1.0)).open()


@pytest.mark.parametrize("window", [1, 2, 8])
def test_fewer_documents_than_lanes(window: int, tmp_path: Path):
    spec = write_corpus("jsonl", tmp_path, ["a" * 100, "b" * 100])
    with pytest.raises(
        UserError, match=r"has 2 documents for 3 lanes; lower batch\.lanes, or set data\.order to continuous"
    ):
        Setup(spec, window=window).open()


def test_the_checks_read_ahead_and_lose_nothing(tmp_path: Path):
    """If the first window is shorter than a chunk, the size check reads further windows; the chunks still
    begin at the first.
    """
    setup = Setup(write_corpus("jsonl", tmp_path, [str(i) for i in range(100)]), lanes=2, chunk=40, window=2)
    expected = naive_chunks(setup.documents(), 2, 40)
    for chunk in setup.chunks(4):
        np.testing.assert_array_equal(as_array(chunk), next(expected))


def test_a_broken_line_is_reported_when_it_is_reached(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("".join(json_line("word" * 9) for _ in range(40)) + "broken\n")
    reader = Setup(CorpusSpec(str(tmp_path))).open()
    with pytest.raises(UserError, match=r"a\.jsonl:41 is not JSON"):
        [reader.next_chunk() for _ in range(100)]


def test_positions_compare_without_hints():
    assert without_hints({"hint": 1, "a": [{"hint": 2, "b": 3}]}) == {"a": [{"b": 3}]}


@pytest.mark.parametrize("text", ["", "\n\n\n"])
def test_an_epoch_without_documents_is_an_error(tmp_path: Path, text: str):
    """The reader must not search for the next document endlessly."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json_line(f"document {i}") for i in range(20)))
    spec = ReaderSpec(CorpusSpec(str(path)), "documents", ENCODER, 1, lanes=2, chunk=12, window=4, seed=1)
    reader = DocumentReader(spec, 0)
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.jsonl holds no documents any more"):
        list(itertools.islice(iter(reader.next_chunk, None), 1000))


def test_resuming_refuses_a_current_document_whose_text_has_changed(tmp_path: Path):
    """Also if its length is the same. States from before digests were added still load."""
    spec = write_corpus("jsonl", tmp_path, ["a long document", "another one"])
    state = Setup(spec, lanes=1, chunk=4, window=2, seed=0).chunks(1)[0].state
    path = next(tmp_path.iterdir())
    path.write_text(path.read_text().replace("one", "two").replace("long", "lang"))
    with pytest.raises(
        UserError, match=r"has changed: .*part-00000\.jsonl:\d, which was being read, has other text"
    ):
        Setup(spec, lanes=1, chunk=4, window=2, seed=0).open(state)
    del state["lanes"][0]["digest"]
    Setup(spec, lanes=1, chunk=4, window=2, seed=0).open(state)


def test_states_of_older_versions_are_read_only_if_the_order_is_the_same(tmp_path: Path):
    one = Setup(write_corpus("jsonl", tmp_path / "one", some_texts(40)), 1, 2)
    state = one.chunks(3)[-1].state
    expected = one.chunks(4)[-1]
    del state["version"]
    assert_same_chunk(one.chunks(1, state)[0], expected)
    several = Setup(write_corpus("jsonl", tmp_path / "several", some_texts(40), 4))
    state = several.chunks(3)[-1].state
    del state["version"]
    with pytest.raises(UserError, match=r"run\.dir: was saved by a version .* another order"):
        several.open(state)


def test_a_corpus_that_moved_is_read_on(tmp_path: Path):
    before = Setup(write_corpus("jsonl", tmp_path / "one", some_texts(40), 3))
    whole = before.chunks(6)
    (tmp_path / "one").rename(tmp_path / "two")
    resumed = replace(before, spec=CorpusSpec(str(tmp_path / "two"))).chunks(3, whole[2].state)
    for chunk, expected in zip(resumed, whole[3:], strict=True):
        np.testing.assert_array_equal(as_array(chunk), as_array(expected))
