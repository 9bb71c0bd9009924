"""No worker outlives its run, none ends before it, and one that stalls or is killed does not stop the run
without a message.
"""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from itertools import islice

import psutil
import pytest
from loader_helpers import assert_same_steps, eventually, in_time, reader_spec, steps

from minrnn.common.errors import UserError
from minrnn.data import ChunkLoader, CorpusSpec


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def loader(corpus: CorpusSpec):
    loader = ChunkLoader(reader_spec(corpus, 2), [0, 1], [None, None], workers=2)
    yield loader
    loader.close()


def test_every_worker_is_a_process_and_helpers_end_with_the_worker(corpus: CorpusSpec):
    loader = ChunkLoader(reader_spec(corpus, 2), [0, 1], [None, None], workers=5)
    try:
        expected = steps(reader_spec(corpus, 2), [0, 1], 12, workers=0)
        assert_same_steps([in_time(loader.take) for _ in range(12)], expected)
        processes = psutil.Process().children(recursive=True)
        assert len(processes) == 5
    finally:
        loader.close()
    assert eventually(lambda: all(is_gone(process.pid) for process in processes))


def test_close_leaves_no_process_no_thread_and_no_file(corpus: CorpusSpec):
    threads, files = threading.active_count(), psutil.Process().num_fds()
    for count in (0, 2, 5):
        loader = ChunkLoader(reader_spec(corpus, 2), [0, 1], [None, None], workers=2)
        assert len(children()) == 2
        list(islice(loader, count))
        loader.close()
        assert not children()
        loader.close()  # twice does no harm
    assert eventually(lambda: threading.active_count() == threads)
    del loader
    assert eventually(lambda: psutil.Process().num_fds() == files)


def test_a_killed_worker_is_an_error_and_no_hang(corpus: CorpusSpec, loader: ChunkLoader):
    stepping = iter(loader)
    next(stepping)
    victim = children()[1]
    victim.kill()

    def read_on() -> None:
        for _ in range(10_000):  # what was read ahead may still come
            next(stepping)

    error = in_time(read_on)
    assert type(error) is UserError
    (line,) = str(error).splitlines()
    assert line.startswith("error: data.workers: a data worker was killed by signal 9 (SIGKILL), after ")
    assert "jsonl" in line
    assert f"of {corpus.corpus}; a system that runs out of memory does that" in line


def test_signals_that_end_a_run_do_not_end_its_workers(loader: ChunkLoader):
    """A run that is stopped by a signal still saves; its workers must last until then."""
    stepping = iter(loader)
    next(stepping)
    for process in children():
        assert os.getpgid(process.pid) != os.getpgid(0), "Ctrl-C does not reach it"
        process.send_signal(signal.SIGTERM)  # Slurm tells every process, whatever its group
    assert len(list(islice(stepping, 300))) == 300


@pytest.mark.parametrize("steps_taken", [0, 3])
def test_workers_end_with_their_parent(steps_taken: int, corpus: CorpusSpec):
    script = f"""
        import itertools, time, psutil
        from minrnn.data import ChunkLoader, CorpusSpec, Encoder, ReaderSpec
        spec = ReaderSpec(CorpusSpec({corpus.corpus!r}), "documents", Encoder(256, 257, None), 2, 2, 12, 4, 1)
        loader = ChunkLoader(spec, [0, 1], [None, None], workers=2)
        list(itertools.islice(loader, {steps_taken}))
        print(*[process.pid for process in psutil.Process().children()], flush=True)
        time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert eventually(lambda: all(map(is_gone, workers)))


def test_a_library_that_prints_does_not_disturb_the_stream(
    corpus: CorpusSpec, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    expected = steps(reader_spec(corpus), [0], 4, workers=0)
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(
        "import json, os\n"
        "original = json.loads\n"
        "def loads(*args, **kwargs):\n"
        "    print('from Python')\n"
        "    os.write(1, b'from C')\n"
        "    return original(*args, **kwargs)\n"
        "json.loads = loads\n"
    )
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    outcome = in_time(lambda: steps(reader_spec(corpus), [0], 4, workers=1))
    assert not isinstance(outcome, Exception), outcome
    assert_same_steps(outcome, expected)


def test_take_returns_in_time_although_a_worker_stalls(corpus: CorpusSpec):
    """`take` returns without a chunk, and later with the next one."""
    expected = steps(reader_spec(corpus, 2), [0, 1], 30, workers=0)
    loader = ChunkLoader(reader_spec(corpus, 2), [0, 1], [None, None], workers=2)
    try:
        (slow,) = [process for process in children() if process.pid == loader._sources[1]._process.pid]  # pyright: ignore
        slow.suspend()
        taken = []
        while (chunks := loader.take(0.2)) is not None:  # what was read ahead
            taken.append(chunks)
        assert loader.take(0.0) is None
        slow.resume()
        assert_same_steps(taken + [in_time(loader.take) for _ in range(30 - len(taken))], expected)
        slow.suspend()
    finally:
        loader.close()
    assert not children()
