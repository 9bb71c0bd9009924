"""The number of workers does not change the data, and errors cross process borders."""

import collections
import json
import pickle
import threading
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_helpers import assert_same_chunk, json_line
from loader_helpers import assert_same_steps, eventually, in_time, reader_spec, steps

from minrnn.common.errors import UserError
from minrnn.data import Chunk, ChunkLoader, CorpusSpec, Encoder, build_task, read_ahead
from minrnn.data import loader as loader_module
from minrnn.data.chunk import empty_chunk
from minrnn.data.loader import READ_AHEAD_STEPS, DirectChunks, shares
from minrnn.data.read_ahead import encode_documents
from minrnn.data.sources import Document


@pytest.mark.parametrize(
    ("num_readers", "order"), [(1, "documents"), (2, "documents"), (4, "documents"), (1, "windows")]
)
def test_any_number_of_workers_gives_the_same_chunks(num_readers: int, order: str, corpus: CorpusSpec):
    spec = reader_spec(corpus, num_readers, order)
    readers = list(range(num_readers))
    expected = steps(spec, readers, 8, workers=0)
    assert [[chunk.reader for chunk in step] for step in expected] == [readers] * 8
    for workers in {1: [3], 2: [1, 2], 4: [3]}[num_readers]:
        assert_same_steps(steps(spec, readers, 8, workers), expected)
    states = [json.loads(json.dumps(chunk.state)) for chunk in expected[3]]
    for workers in (0, 2):
        assert_same_steps(steps(spec, readers, 4, workers, states), expected[4:])


@dataclass
class Local:
    """A `TokenizingProcess` in this process."""

    encoder: Encoder
    source: str

    def encode(self, documents: list[Document]) -> list[np.ndarray]:
        return encode_documents(self.encoder, documents)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch):
    """Workers are threads."""
    monkeypatch.setattr(loader_module, "WorkerChunks", DirectChunks)
    monkeypatch.setattr(read_ahead, "TokenizingProcess", Local)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", ["documents", "windows", "task"])
def test_workers_share_the_readers_in_any_number(kind: str, corpus: CorpusSpec):
    for num_readers in (1, 2, 3):
        spec = reader_spec(corpus, num_readers, "windows" if kind == "windows" else "documents")
        if kind == "task":
            spec = replace(spec, task=build_task("synthetic/parity", {"max_length": 12}), chunk=12)
        readers = list(range(num_readers))
        expected = steps(spec, readers, 9, workers=0)
        states = [chunk.state for chunk in expected[3]]
        for workers in range(1, 8):
            parts = shares(spec, readers, workers)
            assert sum(1 + part.helpers for part in parts) == workers
            assert {reader for part in parts for reader in part.readers} == set(readers)
            assert_same_steps(steps(spec, readers, 5, workers, states), expected[4:])


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("num_readers", [1, 3])
def test_a_few_steps_are_read_ahead_and_no_more(num_readers: int, corpus: CorpusSpec):
    expected = steps(reader_spec(corpus, 1), [0], 1, workers=0)[0][0]
    loader = ChunkLoader(reader_spec(corpus, 3), range(num_readers), [None] * num_readers, workers=0)
    counts: collections.Counter[int] = collections.Counter()

    class Counting:
        def __init__(self, number: int):
            self.number = number

        def next_chunk(self) -> Chunk:
            counts[self.number] += 1
            return replace(expected, reader=self.number)

    loader._sources[0]._readers = [Counting(reader) for reader in range(num_readers)]  # pyright: ignore
    for step in (1, 2):
        in_time(loader.take)
        ahead = READ_AHEAD_STEPS + step
        assert eventually(lambda ahead=ahead: set(counts.values()) == {ahead})
    time.sleep(0.05)
    assert set(counts.values()) == {READ_AHEAD_STEPS + 2}
    loader.close()


@pytest.mark.parametrize("largest", [300, 70_000])
def test_a_chunk_is_small_when_pickled(largest: int):
    chunk = empty_chunk(3, lanes=4, time=1000, pad=largest)
    chunk.shift_labels[0] = np.arange(1000)
    data = pickle.dumps(chunk, pickle.HIGHEST_PROTOCOL)
    assert_same_chunk(pickle.loads(data), chunk)
    assert len(data) < (6 if largest < 2**15 else 10) * chunk.num_tokens


def test_readers_may_be_distributed_over_processes(corpus: CorpusSpec):
    """Two processes of two readers each read what one process of four readers reads."""
    spec = reader_spec(corpus, 4)
    in_one_process = steps(spec, [0, 1, 2, 3], 5, workers=0)
    in_two_processes = [steps(spec, readers, 5, workers=2) for readers in ([0, 1], [2, 3])]
    assert_same_steps([one + other for one, other in zip(*in_two_processes, strict=True)], in_one_process)


def test_readers_read_different_documents(corpus: CorpusSpec):
    names = [
        {
            name
            for step in steps(reader_spec(corpus, 2), [r], 6, workers=0)
            for lane in step[0].documents
            for name in lane
        }
        for r in (0, 1)
    ]
    assert not names[0] & names[1]


@pytest.mark.parametrize("num_good", [0, 200])
def test_a_user_error_in_a_worker_is_raised_in_the_run(num_good: int, tmp_path: Path):
    """Both while a reader is opened and in the middle of the stream."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json_line(f"document {i}") for i in range(num_good)) + "broken\n"
    )
    spec = reader_spec(CorpusSpec(str(tmp_path)))
    errors = [in_time(lambda workers=workers: steps(spec, [0], 200, workers)) for workers in (0, 1)]
    assert [type(error) for error in errors] == [UserError, UserError]
    assert f"a.jsonl:{num_good + 1} is not JSON" in str(errors[0])
    assert errors[0].errors == errors[1].errors


def test_chunks_before_an_error_are_delivered(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("".join(json_line(f"document {i}") for i in range(40)) + "broken\n")
    counts = []
    for workers in (0, 1):
        loader = ChunkLoader(reader_spec(CorpusSpec(str(tmp_path))), [0], [None], workers)
        stepping, delivered = iter(loader), []
        with pytest.raises(UserError):
            delivered.extend(stepping)
        counts.append(len(delivered))
        loader.close()
    assert counts[0] == counts[1] > 5


def test_an_internal_error_in_a_worker_is_not_a_user_error(
    corpus: CorpusSpec, capfd: pytest.CaptureFixture[str]
):
    wrong = steps(reader_spec(corpus), [0], 1, workers=0)[0][0].state | {"lanes": []}
    error = in_time(lambda: steps(reader_spec(corpus), [0], 1, 1, [wrong]))
    assert type(error) is RuntimeError
    assert f"a data worker failed while reading {corpus.corpus} (ValueError: " in str(error)
    assert "Traceback" in capfd.readouterr().err


def test_user_errors_are_pickled_whole():
    error = UserError.from_list([("data.corpus", "one"), ("batch.lanes", "two")])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is UserError
    assert again.errors == error.errors
    assert str(again) == "error: data.corpus: one\nerror: batch.lanes: two"


def test_windows_of_one_text_in_workers(corpus: CorpusSpec):
    spec = replace(reader_spec(corpus, 2, "windows"), chunk=30)
    one, other = steps(spec, [0, 1], 1, workers=2)[0]
    assert not np.array_equal(one.input_ids, other.input_ids)


def test_take_returns_in_time_although_a_reader_in_this_process_stalls(corpus: CorpusSpec):
    expected = steps(reader_spec(corpus), [0], 2, workers=0)
    loader = ChunkLoader(reader_spec(corpus), [0], [None], workers=0)
    disk = threading.Event()

    class Stalled:
        def next_chunk(self) -> Chunk:
            disk.wait()
            return expected[0][0]

    loader._sources[0]._readers = [Stalled()]  # pyright: ignore
    assert loader.take(0.01) is None
    assert loader.take(0.0) is None
    disk.set()
    assert in_time(loader.take) == expected[0]
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_deleted_while_it_is_read_is_reported_in_one_line(
    workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    for number in range(300):
        (tmp_path / f"{number:03d}.txt").write_text("x" * 100)
    loader = ChunkLoader(reader_spec(CorpusSpec(str(tmp_path))), [0], [None], workers)
    in_time(loader.take)
    for path in tmp_path.iterdir():
        path.unlink()
    error = in_time(lambda: list(islice(loader, 1000)))
    loader.close()
    assert type(error) is UserError
    assert ".txt cannot be read any more (No such file or directory)" in str(error)
    assert "Traceback" not in capfd.readouterr().err
