"""Runs a function in a worker process and receives what it yields, pickled, over a pipe.

A worker is a fresh interpreter that imports only what the function needs. multiprocessing is not used: it
forks or re-imports the training program, and its workers outlive a parent that is killed. A worker is the
leader of its own process group, so neither Ctrl-C nor a signal to the run's group reaches it. It ends when
the parent's end of the pipe is closed, however that happens.
"""

import contextlib
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..common.errors import UserError

CLOSE_SECONDS = 10.0  # how long to wait for a killed worker to end
READ_AHEAD = 4  # items
ADVICE = "use fewer data.workers, a smaller data.shuffle_window, or smaller documents or row groups"


@dataclass(frozen=True)
class Job:
    """What a worker does."""

    produce: Callable[..., Iterable[Any]]
    """A function of a module: it is imported by its name."""
    arguments: tuple
    source: str
    """What it reads or makes, for messages."""
    key: str
    """The setting that errors of the process name."""
    advice: str
    """What to do if memory is short."""


def next_ready(ready: "queue.Queue[Any] | queue.SimpleQueue[Any]", timeout: float | None) -> Any:
    """The next item of a queue, or None if there is none in time; an exception in the queue is raised."""
    try:
        item = ready.get(timeout=timeout)
    except queue.Empty:
        return None
    if isinstance(item, Exception):
        raise item
    return item


class WorkerProcess:
    """A process that does a job; a few items are read ahead.

    Args:
        job: the job.
        name_of: the name of an item, for messages.
        read_ahead: items that are kept ready.
        has_input: the job reads objects from standard input (`send`).
    """

    def __init__(
        self,
        job: Job,
        name_of: Callable[[Any], str],
        read_ahead: int = READ_AHEAD,
        has_input: bool = False,
    ):
        command = [sys.executable, "-P", "-m", f"{__package__}.worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has died already: `take` raises the reason
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()
        if not has_input:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._job, self._name_of = job, name_of
        self._ready: queue.Queue[Any] = queue.Queue(read_ahead)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        assert self._process.stdout is not None
        name = None
        try:
            while True:
                item = pickle.load(self._process.stdout)
                self._ready.put(item)
                if isinstance(item, Exception):
                    return
                name = self._name_of(item)
        except Exception:  # any error is passed on to the parent
            progress = "before its first chunk of" if name is None else f"after {name} of"
            self._ready.put(_worker_died(self._process.wait(), progress, self._job))

    def send(self, item: Any) -> None:
        """Send an object to the job.

        Raises:
            BrokenPipeError: the process has died.
        """
        assert self._process.stdin is not None
        pickle.dump(item, self._process.stdin, pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def take(self, timeout: float | None = None) -> Any:
        """The next item, or None if it is not ready in time.

        Raises:
            UserError: as the job, or the process has died.
            RuntimeError: the job failed.
        """
        return next_ready(self._ready, timeout)

    def close(self) -> None:
        """Stop the process and the thread that reads from it.

        The wait is limited: a process can hang on a dead disk.
        """
        end = time.monotonic() + CLOSE_SECONDS
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        while self._thread.is_alive() and time.monotonic() < end:  # it may be blocked on a full queue
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if not self._thread.is_alive():
            self._process.stdout.close()


def _worker_died(status: int, progress: str, job: Job) -> UserError:
    """The error for a worker that ended without sending an error; `progress` says how far it came."""
    place = f"{progress} {job.source}"
    if status >= 0:
        return UserError(job.key, f"a data worker ended with exit status {status}, {place}")
    number = -status
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    problem = f"a data worker was killed by signal {number} ({name}), {place}"
    if number == signal.SIGKILL:
        problem += f"; a system that runs out of memory does that: {job.advice}"
    return UserError(job.key, problem)
