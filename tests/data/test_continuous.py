"""Order `continuous`: the lanes together read every token once an epoch, and resume exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import BOS, ENCODER, EOS, assert_same_chunk
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import Chunk, ChunkLoader, CorpusSpec, Encoder, ReaderSpec
from minrnn.data.continuous import ContinuousReader, first_piece, train_text
from minrnn.data.long_text import Span

MakeSpec = Callable[..., ReaderSpec]


def lines(count: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return "".join("x" * rng.integers(0, 30) + f" é{number}\n" for number in range(count))


def write_texts(folder: Path, texts: list[str]) -> CorpusSpec:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, newline="")
    return CorpusSpec(str(folder), held_out=0.1, passages=True)


def reader_spec(
    corpus: CorpusSpec,
    num_readers: int = 1,
    lanes: int = 2,
    chunk: int = 16,
    encoder: Encoder = ENCODER,
    seed: int = 0,
) -> ReaderSpec:
    return ReaderSpec(corpus, "continuous", encoder, num_readers, lanes, chunk, window=4, seed=seed)


def read(spec: ReaderSpec, reader: int, count: int, state: dict[str, Any] | None = None) -> list[Chunk]:
    opened = ContinuousReader(spec, reader, state)
    return [opened.next_chunk() for _ in range(count)]


def as_lanes(chunks: list[Chunk]) -> np.ndarray:
    """(input, target, starts) of each lane: int [lanes, time, 3]."""
    return np.concatenate(
        [np.stack([chunk.input_ids, chunk.shift_labels, chunk.document_starts], axis=-1) for chunk in chunks],
        axis=1,
    )


def expected_lane(spec: ReaderSpec, lane: int, count: int) -> list[tuple[int, int, int]]:
    """The naive reader: the positions of the whole text as a list, from the lane's place on."""
    assert isinstance(spec.corpus, CorpusSpec)
    num_lanes = spec.num_readers * spec.lanes
    text = train_text(spec.corpus, num_lanes)
    pieces = [text.piece(number) for number in range(text.num_pieces)]
    number, positions = first_piece(len(pieces), lane, num_lanes, spec.seed), []
    previous, starts = spec.encoder.bos, True
    while len(positions) < count:
        piece = pieces[number % len(pieces)]
        assert piece.text is not None
        if piece.is_begin:
            previous, starts = spec.encoder.bos, True
        for token in [*spec.encoder.encode(piece.text), *[spec.encoder.eos] * piece.is_end]:
            positions.append((previous, int(token), int(starts)))
            previous, starts = int(token), False
        number += 1
    return positions[:count]


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=3).filter(lambda sizes: sum(sizes) > 20),
    num_readers=st.sampled_from([1, 2, 3]),
    lanes=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_lanes_are_those_of_the_naive_reader(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], num_readers: int, lanes: int, seed: int
):
    corpus = write_texts(tmp_path_factory.getbasetemp() / "naive", [lines(size) for size in sizes])
    spec = reader_spec(corpus, num_readers, lanes, seed=seed)
    for reader in range(num_readers):
        chunks = read(spec, reader, 40)
        for row, lane in enumerate(as_lanes(chunks)):
            assert list(map(tuple, lane.tolist())) == expected_lane(spec, reader * lanes + row, 640)
        for chunk in chunks:
            for names, starts in zip(chunk.documents, chunk.document_starts, strict=True):
                assert len(names) == starts.sum() + (not starts[0]), "a name for each document"


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=3).filter(lambda sizes: sum(sizes) > 20),
    num_readers=st.sampled_from([1, 2]),
    lanes=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_every_token_is_read_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], num_readers: int, lanes: int, seed: int
):
    """The part of the text between two places is read by one lane in each epoch. Together the parts are the
    text without its tail."""
    texts = [lines(size) for size in sizes]
    spec = reader_spec(
        write_texts(tmp_path_factory.getbasetemp() / "once", texts), num_readers, lanes, seed=seed
    )
    assert isinstance(spec.corpus, CorpusSpec)
    num_lanes = num_readers * lanes
    text = train_text(spec.corpus, num_lanes)
    lengths = [
        len((piece.text or "").encode()) + piece.is_end for piece in map(text.piece, range(text.num_pieces))
    ]
    places = [first_piece(len(lengths), lane, num_lanes, seed) for lane in range(num_lanes)] * 2
    places[num_lanes:] = [place + len(lengths) for place in places[num_lanes:]]
    streams = np.concatenate([as_lanes(read(spec, reader, 200)) for reader in range(num_readers)])[
        :, :, 1
    ].tolist()
    whole = "".join(text for text in texts if text).encode()
    for epoch in (0, 1):
        parts: dict[int, list[int]] = {}
        for lane, stream in enumerate(streams):
            begin = sum((lengths * 3)[places[lane] : places[lane] + epoch * len(lengths)])
            end = sum((lengths * 3)[places[lane] : places[lane + 1] + epoch * len(lengths)])
            parts[places[lane]] = stream[begin:end]
        tokens = [token for place in sorted(parts) for token in parts[place]]
        shift = sum(lengths[: places[0]])
        tokens = tokens[len(tokens) - shift :] + tokens[: len(tokens) - shift]
        read_bytes = bytes(token for token in tokens if token != EOS)
        assert read_bytes == whole[: len(read_bytes)]
        assert len(read_bytes) == text.num_bytes
        assert tokens.count(EOS) == sum(piece.is_end for piece in map(text.piece, range(text.num_pieces)))


@settings(max_examples=15)
@given(stops=st.lists(st.integers(1, 20), min_size=1, max_size=4), lanes=st.integers(1, 3))
def test_a_resumed_reader_is_the_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], lanes: int
):
    corpus = write_texts(tmp_path_factory.getbasetemp() / "resume", [lines(20), lines(9, 1)])
    spec = reader_spec(corpus, 2, lanes)
    expected = read(spec, 1, sum(stops) + 1)
    state, chunks = None, []
    for stop in [*stops, 1]:
        chunks += read(spec, 1, stop, state)
        state = json.loads(json.dumps(chunks[-1].state))
    for one, other in zip(chunks, expected, strict=True):
        assert_same_chunk(one, other)


def test_positions_are_small_and_count_epochs(tmp_path: Path):
    spec = reader_spec(write_texts(tmp_path, [lines(200)]), 2, 4)
    assert isinstance(spec.corpus, CorpusSpec)
    text = train_text(spec.corpus, 8)
    states = [read(spec, reader, 100)[-1].state for reader in (0, 1)]
    assert len(json.dumps(states[0])) < 150 * 4
    assert sum(state["epochs"] for state in states) == pytest.approx(
        2 * 100 * 4 * 16 / text.num_bytes, rel=0.05
    )


def test_any_number_of_workers_gives_the_same_chunks(tmp_path: Path):
    spec = reader_spec(write_texts(tmp_path, [lines(100)]), 2)

    def steps(readers: list[int], workers: int) -> list[list[Any]]:
        loader = ChunkLoader(spec, readers, [None] * len(readers), workers)
        try:
            return [loader.take() or [] for _ in range(6)]
        finally:
            loader.close()

    expected = steps([0, 1], 0)
    for chunks in (
        steps([0, 1], 2),
        [one + other for one, other in zip(steps([0], 1), steps([1], 0), strict=True)],
    ):
        for step, wanted in zip(chunks, expected, strict=True):
            for chunk, other in zip(step, wanted, strict=True):
                assert_same_chunk(chunk, other)


def test_a_seed_moves_the_places(tmp_path: Path):
    corpus = write_texts(tmp_path, [lines(300)])
    first = {bytes(read(reader_spec(corpus, seed=seed), 0, 1)[0].input_ids.data) for seed in range(8)}
    assert len(first) > 2


def test_tokens_of_a_place_do_not_depend_on_the_lane(tmp_path: Path):
    """A lane that comes to a place reads the tokens of the lane that began there."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = lines(400)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["<bos>", "<eos>"])
    backend.train_from_iterator([text], trainer)
    encoder = Encoder(0, 1, backend.to_str())
    spec = reader_spec(write_texts(tmp_path / "text", [text]), lanes=3, encoder=encoder)
    targets = as_lanes(read(spec, 0, 150))[:, :, 1].tolist()
    for lane in (0, 1):
        start = next(
            i
            for i in range(len(targets[lane]) - 100)
            if targets[lane][i : i + 100] == targets[lane + 1][:100]
        )
        rest = targets[lane][start:]
        assert len(rest) > 300
        assert rest == targets[lane + 1][: len(rest)]


def test_broken_text_is_left_out_with_a_reset(tmp_path: Path):
    data = b"".join(b"%05d a line\n" % number for number in range(600))
    (tmp_path / "a.txt").write_bytes(data[:3000] + b"\xff" + data[3001:])
    corpus = CorpusSpec(str(tmp_path), held_out=0.1, passages=True, skip_broken=True)
    chunks = read(reader_spec(corpus, lanes=1, chunk=64), 0, 105)
    assert chunks[-1].state["num_skipped"] == 1
    (lane,) = as_lanes(chunks)
    starts = np.flatnonzero(lane[:, 2])
    assert (lane[starts, 0] == BOS).all()
    assert len(starts) == 2 + bool(chunks[-1].state["epochs"] > 1)
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 \(byte 3,000\)"):
        read(reader_spec(CorpusSpec(str(tmp_path), passages=True)), 0, 1)


@pytest.mark.parametrize(
    ("text", "lanes", "problem"),
    [
        ("short\n", 2, "has 7 tokens to train on, fewer than one chunk of 2 readers x 2 lanes x 16; lower"),
        ("x" * 9000, 600, "has 9,001 tokens to train on, fewer than one chunk of 2 readers x 600 lanes x 16"),
    ],
)
def test_a_text_that_is_too_short(tmp_path: Path, text: str, lanes: int, problem: str):
    corpus = CorpusSpec(write_texts(tmp_path, [text]).corpus, passages=True)
    with pytest.raises(UserError, match=problem):
        ContinuousReader(reader_spec(corpus, 2, lanes), 0)


def test_text_without_lines_or_spaces_is_read(tmp_path: Path):
    corpus = write_texts(tmp_path, ["漢" * 3000])
    (lane,) = as_lanes(read(reader_spec(corpus, lanes=1), 0, 600))
    assert bytes(lane[:-1, 1][:8001].astype(np.uint8)).decode().strip("漢") == ""


def test_a_changed_text_is_an_error_on_resume(tmp_path: Path):
    spec = reader_spec(write_texts(tmp_path, [lines(100)]))
    state = read(spec, 0, 3)[-1].state
    path = tmp_path / "0.txt"
    path.write_text(path.read_text().replace("x", "y"))
    with pytest.raises(UserError, match=r"has changed: 0\.txt@.* has other text"):
        ContinuousReader(spec, 0, state)


def test_a_long_text_is_not_read_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A new run reads it once, to check it, and in blocks."""
    (tmp_path / "a.txt").write_bytes(b"a line of text\n" * 1_500_000)
    spec = reader_spec(CorpusSpec(str(tmp_path), held_out=0.01, passages=True))
    sizes: list[int] = []
    original = Span.read

    def counting(span: Span, start: int, stop: int) -> bytes:
        sizes.append(stop - start)
        return original(span, start, stop)

    monkeypatch.setattr(Span, "read", counting)
    state = read(spec, 0, 2)[-1].state
    assert max(sizes) <= 2**20
    assert sum(sizes) < 1.01 * 22_500_000
    sizes.clear()
    read(spec, 0, 2, state)
    assert sum(sizes) < 100_000
