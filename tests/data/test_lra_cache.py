"""Labelled examples are generated once, the same ones in any number of processes."""

import collections
import itertools
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from minrnn.common.errors import UserError
from minrnn.data import build_task, open_data
from minrnn.data.lra import LRA_TASKS, GeneratedTask, LabelledTask
from minrnn.data.lra.cache import FIRST_BLOCKS, fingerprint, generate

TINY: dict[str, dict[str, Any]] = {
    "listops": {"min_length": 4, "max_length": 30, "max_depth": 4},
    "pathfinder": {},
    "pathx": {},
}


def tiny(name: str, **options: Any) -> LabelledTask:
    sizes = {"train_examples": 12, "validation_examples": 5, "test_examples": 4}
    task = build_task(f"lra/{name}", {**sizes, **TINY.get(name, {}), **options})
    assert isinstance(task, LabelledTask)
    return task


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """An image takes as long as a hundred short expressions."""
    for name in ("pathfinder", "pathx"):
        monkeypatch.setattr(LRA_TASKS[name], "BLOCK", 10)


def test_the_same_seed_makes_the_same_examples_in_any_number_of_processes():
    """Three blocks, of which each of two processes makes every second one."""
    task, count = tiny("listops"), 2 * GeneratedTask.BLOCK + 1
    alone, several = (
        list(itertools.islice(generate(task, processes=processes), count)) for processes in (1, 2)
    )
    assert alone == several
    assert len({texts for texts, _ in alone}) == count


@pytest.mark.parametrize("name", list(TINY))
def test_a_block_is_a_function_of_the_seed_and_its_number(name: str):
    task, other = tiny(name), tiny(name, data_seed=1)
    assert isinstance(task, GeneratedTask)
    assert isinstance(other, GeneratedTask)
    first, second = task.block(3), task.block(4)
    assert [task.block(4), task.block(3)] == [second, first]
    assert first != second
    assert other.block(3) != first


def test_generators_end_with_the_process_that_waits_for_them(tmp_path: Path):
    """Whatever ends it; and the script that calls them is not run again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nfrom minrnn.data import build_task\nfrom minrnn.data.lra.cache import generate\n"
        "examples = generate(build_task('lra/listops'), processes=2)\nnext(examples)\n"
        "print('started', flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        process.kill()
        assert not psutil.wait_procs(workers, timeout=30)[1]
        assert process.stdout.read() == ""


def test_a_killed_generator_is_an_error():
    examples = generate(tiny("listops"), processes=2)
    next(examples)
    for worker in psutil.Process().children():
        if "minrnn.data.worker" in worker.cmdline():
            worker.kill()
    message = r"data\.task: a data worker was killed by signal 9 \(SIGKILL\), .* of lra/listops; a "
    with pytest.raises(UserError, match=message):
        collections.deque(examples, maxlen=0)


def test_an_unfinished_folder_is_removed(tmp_path: Path):
    data = open_data(tiny("listops"), tmp_path)
    data.folder.rename(data.folder.with_name(f".{data.folder.name}.host-1.part"))
    assert open_data(tiny("listops"), tmp_path).folder == data.folder
    assert [path.name for path in data.folder.parent.iterdir() if path.is_dir()] == [data.folder.name]


def test_the_source_on_the_hub_decides_the_folder(monkeypatch):
    for task in LRA_TASKS.values():
        if not issubclass(task, GeneratedTask):
            before = fingerprint(task())
            assert len(task.REVISION) == 40
            monkeypatch.setattr(task, "REVISION", "another")
            assert fingerprint(task()) != before


@pytest.mark.parametrize("name", ["listops", "pathfinder"])
def test_splits_do_not_depend_on_the_sizes_of_others_and_share_no_example(name: str, tmp_path: Path):
    small, large = (
        open_data(tiny(name, train_examples=count, validation_examples=more), tmp_path)
        for count, more in ((8, 3), (30, 6))
    )

    def texts(data: Any, split: str) -> list[bytes]:
        examples = data.examples(split)
        return [examples.texts(number)[0].tobytes() for number in range(len(examples))]

    assert texts(small, "test") == texts(large, "test")
    assert texts(small, "train") == texts(large, "train")[:8]
    every = [text for split in ("train", "validation", "test") for text in texts(large, split)]
    assert len(every) == len(set(every)) == 30 + 6 + 4


@pytest.mark.parametrize("name", list(TINY))
def test_examples_are_made_once(name: str, tmp_path: Path, monkeypatch):
    task = tiny(name)
    data = open_data(task, tmp_path)
    assert data.manifest()["examples"] == {"train": 12, "validation": 5, "test": 4}
    stored = {split: data.examples(split) for split in ("train", "validation", "test")}
    texts = [bytes(examples.texts(i)[0]) for examples in stored.values() for i in range(len(examples))]
    assert len(set(texts)) == 21
    assert all(len(text) <= task.length for text in texts)
    monkeypatch.setattr(type(task), "block", None)  # would fail if it were called
    again = open_data(task, tmp_path)
    assert again.folder == data.folder
    assert [path.name for path in data.folder.parent.iterdir() if path.is_dir()] == [data.folder.name]
    tokens = next(data.folder.glob("tokens-train.npy"))
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"tokens-train\.npy has \d+ bytes, not \d+: remove that folder"):
        open_data(task, tmp_path)


def test_one_process_makes_the_examples_and_the_others_wait(tmp_path: Path, monkeypatch):
    """Two at the same time: the generator is called once, and the one that waits reports progress."""
    task, calls, waiting = tiny("listops"), [], threading.Event()
    task_class: Any = type(task)
    original = task_class.block

    def block(self: Any, number: int) -> Any:
        calls.append(number)
        assert waiting.wait(30)
        return original(self, number)

    monkeypatch.setattr(task_class, "block", block)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(open_data, task, tmp_path)
        while not calls:
            time.sleep(0.01)
        second = pool.submit(open_data, task, tmp_path, waiting.set)
        assert first.result(60).folder == second.result(60).folder
    assert calls == list(FIRST_BLOCKS.values())


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache: .* cannot be used \(.*\); name another folder"):
        open_data(tiny("listops"), tmp_path / "cache")
