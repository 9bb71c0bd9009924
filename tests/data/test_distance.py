"""Tasks whose answers lie many tokens back: their answers, and their documents read across chunks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.common.errors import UserError
from minrnn.data import IGNORE_INDEX, Chunk, Task, TaskValidation, build_task
from minrnn.data.synthetic import StreamTaskReader
from minrnn.data.synthetic.distance import distance_powers

NAMES = ("distant-key", "distant-register")
seeds = st.integers(0, 2**32)


def task_of(name: str, **options) -> Task:
    task = build_task(f"synthetic/{name}", {"min_distance": 5, "max_distance": 60, **options})
    assert isinstance(task, Task)
    return task


@given(seeds, st.sampled_from(NAMES), st.integers(7, 200), st.integers(1, 9))
def test_a_read_asks_for_the_value_that_was_set_last(seed: int, name: str, length: int, least: int):
    task = task_of(name, min_distance=least)
    ids, labels = task.example(np.random.default_rng(seed), max(length, least + 2))
    distances, value, place = task.distances(ids), None, 0
    assert distances is not None
    names = [task.symbols[token] for token in ids]
    for i, symbol in enumerate(names):
        if symbol == "set":
            value, place = int(ids[i + 1]), i + 1
        assert (labels[i] != IGNORE_INDEX) == (symbol == "read")
        if symbol == "read":
            assert labels[i] == value
            assert distances[i] == i - place >= least
    assert names[0] == "set"
    assert names[-1] == "read"
    if name == "distant-key":
        assert names.count("set") == names.count("read") == 1


def test_distances_are_log_uniform():
    task = task_of("distant-key", min_distance=10, max_distance=10**6)
    generator = np.random.default_rng(0)
    logs = np.log10([task.draw_length(generator) - 2 for _ in range(4000)])
    assert logs.min() >= 1
    assert logs.max() <= 6
    np.testing.assert_allclose(np.histogram(logs, 5, (1, 6))[0] / 4000, 0.2, atol=0.03)


def joined(chunks: list[Chunk], row: int) -> np.ndarray:
    """ids, labels and document starts of a lane, [3, time]."""
    parts = [(chunk.input_ids[row], chunk.shift_labels[row], chunk.document_starts[row]) for chunk in chunks]
    return np.concatenate([np.stack(part).astype(np.int64) for part in parts], axis=1)


@settings(max_examples=25)
@given(seeds, st.sampled_from(NAMES), st.integers(1, 40), st.integers(1, 5), st.integers(0, 12))
def test_a_lane_is_a_stream_of_documents_however_it_is_cut(
    seed: int, name: str, chunk: int, num_chunks: int, num_read: int
):
    """Chunks of any length, several in a step, a resume, and skipped steps give the same stream."""
    task, lanes = task_of(name), 2
    whole = StreamTaskReader(task, 1, lanes, 16 * chunk * num_chunks, seed).next_chunk()
    reader = StreamTaskReader(task, 1, lanes, chunk, seed, num_chunks=num_chunks)
    chunks = [reader.next_chunk() for _ in range(num_read)]
    state = chunks[-1].state if chunks else None
    skipping = StreamTaskReader(task, 1, lanes, chunk, seed, state, num_chunks)
    skipping.skip(16 - num_read - 1)
    resumed = StreamTaskReader(task, 1, lanes, chunk, seed, state, num_chunks)
    chunks += [resumed.next_chunk() for _ in range(16 - num_read)]
    skipped_to = skipping.next_chunk()
    for row in range(lanes):
        np.testing.assert_array_equal(joined(chunks, row), joined([whole], row))
        np.testing.assert_array_equal(joined([skipped_to], row), joined(chunks[-1:], row))
    assert skipping.next_chunk().state == resumed.next_chunk().state
    singles = [single for each in chunks for single in each.single_chunks()]
    assert all(single.input_ids.shape == (lanes, chunk) for single in singles)


def test_lanes_readers_and_seeds_have_documents_of_their_own():
    task = task_of("distant-register")
    lanes = [
        StreamTaskReader(task, reader, 3, 200, seed).next_chunk().input_ids[row]
        for reader, seed in ((0, 0), (1, 0), (0, 1))
        for row in range(3)
    ]
    assert all((one != other).any() for one, other in itertools.combinations(lanes, 2))


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 50), st.sampled_from(NAMES))
def test_validation_documents_come_whole_in_equally_many_pieces(
    num_readers: int, lanes: int, piece: int, name: str
):
    task = task_of(name, validation_examples=5, test_lengths=[90])
    numbers_of_chunks, lengths = [], []
    for reader in range(num_readers):
        part = TaskValidation(task, reader, num_readers, lanes, piece=piece)
        pieces = list(part.chunks())
        numbers_of_chunks.append(len(pieces))
        assert part.num_positions == sum(chunk.num_tokens for _, chunk in pieces)
        groups: list[list[Chunk]] = []
        for _, chunk in pieces:
            if chunk.document_starts.any():
                groups.append([])
            groups[-1].append(chunk)
        for group in groups:
            assert all(chunk.input_ids.shape[1] == piece for chunk in group)
            for row in range(len(group[0].input_ids)):
                ids, labels, starts = joined(group, row)
                distances = np.concatenate(
                    [chunk.distances[row] for chunk in group if chunk.distances is not None]
                )
                if (real := int((ids != task.pad).sum())) == 0:
                    continue
                lengths.append(real)
                assert starts.tolist() == [1] + [0] * (len(ids) - 1)
                own = task.distances(ids[:real])
                assert own is not None
                np.testing.assert_array_equal(distances[:real], own)
                assert labels[real - 1] != IGNORE_INDEX
    assert len(set(numbers_of_chunks)) == 1
    assert len(lengths) == 10
    assert lengths.count(90) >= 5


@given(st.integers(1, 2**50))
def test_distances_are_grouped_by_powers_of_two(distance: int):
    (power,) = distance_powers(np.array([distance])).tolist()
    assert 2**power <= distance < 2 ** (power + 1)


def test_invalid_options_are_reported():
    options = {"min_distance": 0, "max_distance": -1, "num_values": 1, "num_reads": 0, "test_lengths": [1]}
    with pytest.raises(UserError) as raised:
        build_task("synthetic/distant-register", options)
    assert all(f"{name}: " in str(raised.value) for name in options)
