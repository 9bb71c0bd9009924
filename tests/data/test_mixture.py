"""Mixtures: shares of tokens approach the weights, every source is read in its own order, resume is exact."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import ENCODER, assert_same_chunk, json_line, read_back, some_texts, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import (
    Chunk,
    ChunkLoader,
    CorpusSpec,
    DocumentReader,
    MixtureSpec,
    ReaderSpec,
    check_mixture,
    mixture_fingerprint,
)
from minrnn.data.mixture import MixtureReader

WEIGHTS = (0.15, 0.15, 0.7)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[CorpusSpec, ...]:
    """Rows, files, and a long text in passages: the documents of source i begin with the letter i."""
    folder = tmp_path_factory.mktemp("sources")
    rows = write_corpus("jsonl", folder / "a", ["a" + text for text in some_texts(60, seed=1)], 3)
    files = write_corpus("text", folder / "b", ["b" + text for text in some_texts(20, seed=2, longest=90)])
    (folder / "c.txt").write_text("".join(f"c {number}\n" for number in range(1500)))
    return rows, files, CorpusSpec(str(folder / "c.txt"), held_out=0.1, passages=True)


def reader_spec(
    corpora: tuple[CorpusSpec, ...],
    num_readers: int = 1,
    weights: tuple[float, ...] = WEIGHTS,
    lanes: int = 3,
) -> ReaderSpec:
    mixture = MixtureSpec(corpora, weights)
    return ReaderSpec(mixture, "documents", ENCODER, num_readers, lanes, chunk=24, window=8, seed=1)


def read(spec: ReaderSpec, reader: int, count: int, state: dict[str, Any] | None = None) -> list[Chunk]:
    opened = MixtureReader(spec, reader, state)
    return [opened.next_chunk() for _ in range(count)]


def steps(
    spec: ReaderSpec, readers: list[int], count: int, workers: int, states: Any = None
) -> list[list[Any]]:
    loader = ChunkLoader(spec, readers, states or [None] * len(readers), workers)
    try:
        return [loader.take() or [] for _ in range(count)]
    finally:
        loader.close()


def epochs(chunk: Chunk) -> list[int]:
    return [source["window"]["epoch"] for source in chunk.state["sources"]]


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=3, max_size=3),
    weights=st.lists(st.floats(0.1, 1.0), min_size=3, max_size=3),
)
def test_shares_of_tokens_approach_the_weights(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], weights: list[float]
):
    """Each differs by less than a document for each lane and each source."""
    folder = tmp_path_factory.getbasetemp() / "shares"
    folder.mkdir(exist_ok=True)
    corpora = []
    for number, length in enumerate(lengths):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json_line("x" * (length + i)) for i in range(9)))
        corpora.append(CorpusSpec(str(path)))
    shares = tuple(weight / sum(weights) for weight in weights)
    chunks = read(reader_spec(tuple(corpora), weights=shares), 0, 80)
    for chunk in chunks:
        tokens = chunk.state["tokens"]
        for count, share in zip(tokens, shares, strict=True):
            assert abs(count - share * sum(tokens)) <= (3 + 3) * 70
    assert sum(chunks[-1].state["tokens"]) == 80 * 3 * 24


def test_a_long_document_does_not_starve_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If it were counted whole, no other lane would take the next one while it is read."""
    monkeypatch.setattr("minrnn.data.mixture.CHARGED_AHEAD", 100)
    for name, length in (("long", 20_000), ("short", 50)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json_line(name[0] * length) for _ in range(8)))
    corpora = tuple(CorpusSpec(str(tmp_path / f"{name}.jsonl")) for name in ("long", "short"))
    tokens = read(reader_spec(corpora, weights=(0.5, 0.5), lanes=4), 0, 200)[-1].state["tokens"]
    assert tokens[0] / sum(tokens) == pytest.approx(0.5, abs=0.05)


def test_each_source_has_the_order_that_it_has_alone(sources: tuple[CorpusSpec, ...]):
    spec = reader_spec(sources)
    taken: list[list[tuple[str, int]]] = [[], [], []]
    reader = MixtureReader(spec, 0)
    for number, source in enumerate(reader.sources):
        original = source.next_document

        def record(lane, number=number, original=original):
            original(lane)
            taken[number].append((lane.name, len(lane.tokens)))

        source.next_document = record  # type: ignore[method-assign]
    for _ in range(300):
        reader.next_chunk()
    for source, documents in zip(sources, taken, strict=True):
        alone = DocumentReader(
            ReaderSpec(source, "documents", ENCODER, 1, 1, 24, window=8, seed=1), 0, is_whole=False
        )
        expected = []
        for _ in documents:
            alone.next_document(alone.lanes[0])
            expected.append((alone.lanes[0].name, len(alone.lanes[0].tokens)))
        assert documents == expected
        assert len(documents) > 8


def test_lanes_hold_whole_documents(sources: tuple[CorpusSpec, ...]):
    chunks = read(reader_spec(sources[:2], weights=(0.5, 0.5)), 0, 200)
    documents = {text for lane in read_back(chunks) for text in lane.whole}
    expected = {"a" + text for text in some_texts(60, seed=1)} | {
        "b" + text for text in some_texts(20, seed=2, longest=90)
    }
    assert documents == expected


@settings(max_examples=10)
@given(stops=st.lists(st.integers(1, 60), min_size=1, max_size=3), num_readers=st.sampled_from([1, 2, 4]))
def test_a_resumed_mixture_is_the_uninterrupted_one(
    sources: tuple[CorpusSpec, ...], stops: list[int], num_readers: int
):
    spec = reader_spec(sources, num_readers)
    expected = read(spec, num_readers - 1, sum(stops) + 1)
    state, chunks = None, []
    for stop in [*stops, 1]:
        chunks += read(spec, num_readers - 1, stop, state)
        state = json.loads(json.dumps(chunks[-1].state))
    for one, other in zip(chunks, expected, strict=True):
        assert_same_chunk(one, other)


def two_epochs(
    sources: tuple[CorpusSpec, ...], num_readers: int, num_stops: int, max_workers: int, seed: int
) -> None:
    """Read two epochs of each source and stop at random places. Go on with another number of workers and
    another distribution of the readers over processes, and compare with an uninterrupted read."""
    draw = np.random.default_rng(seed)
    spec = reader_spec(sources, num_readers)
    readers = list(range(num_readers))
    expected: list[list[Chunk]] = []
    opened = [MixtureReader(spec, reader) for reader in readers]
    while not expected or min(min(epochs(chunk)) for chunk in expected[-1]) < 2:
        expected.append([reader.next_chunk() for reader in opened])
    stops = sorted({*draw.integers(1, len(expected), num_stops).tolist(), len(expected)})
    for start, stop in itertools.pairwise([0, *stops]):
        states = [
            None if start == 0 else json.loads(json.dumps(chunk.state)) for chunk in expected[start - 1]
        ]
        num_processes = int(draw.choice([n for n in (1, 2, 4) if n <= num_readers]))
        for rank in range(num_processes):
            own = readers[rank * num_readers // num_processes : (rank + 1) * num_readers // num_processes]
            workers = int(draw.integers(0, max_workers + 1))
            chunks = steps(spec, own, stop - start, workers, [states[reader] for reader in own])
            for step, wanted in zip(chunks, expected[start:stop], strict=True):
                for chunk, reader in zip(step, own, strict=True):
                    assert_same_chunk(chunk, wanted[reader])


@pytest.mark.parametrize("num_readers", [1, 2])
def test_two_epochs_with_stops_and_workers(sources: tuple[CorpusSpec, ...], num_readers: int):
    two_epochs(sources, num_readers, num_stops=1, max_workers=1, seed=num_readers)


@pytest.mark.slow
@pytest.mark.parametrize("num_readers", [1, 2, 4])
def test_two_epochs_with_many_stops_and_workers(sources: tuple[CorpusSpec, ...], num_readers: int):
    two_epochs(sources, num_readers, num_stops=20, max_workers=5, seed=num_readers)


def test_a_source_without_a_document_for_a_reader_is_named(tmp_path: Path):
    for name, count in (("many", 9), ("one", 1)):
        (tmp_path / f"{name}.jsonl").write_text(json_line("text") * count)
    corpora = tuple(CorpusSpec(str(tmp_path / f"{name}.jsonl")) for name in ("many", "one"))
    with pytest.raises(UserError, match=r"reader 1's share \(1 of 2\) of .*one\.jsonl holds no documents"):
        MixtureReader(reader_spec(corpora, 2, weights=(0.5, 0.5)), 1)


def test_a_changed_source_is_named(tmp_path: Path):
    names = ("a.txt", "b.txt", "c.jsonl")
    for name in names:
        (tmp_path / name).write_text(json_line("some text") * 3)
    corpora = tuple(CorpusSpec(str(tmp_path / name), passages=name == "b.txt") for name in names)
    mixture = MixtureSpec(corpora, WEIGHTS)
    before = json.loads(json.dumps(mixture_fingerprint(mixture)))
    assert check_mixture(before, mixture, "documents", 1) is None
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write(json_line("more"))
    assert "c.jsonl has grown" in (check_mixture(before, mixture, "documents", 1) or "")
    with (tmp_path / "b.txt").open("a") as file:
        file.write("more")
    with pytest.raises(UserError, match=r"b\.txt has grown") as caught:
        check_mixture(before, mixture, "documents", 1)
    assert len(caught.value.errors) == 1
