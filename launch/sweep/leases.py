"""Who trains what: leases, which are files in a folder that all workers share.

    leases/NAME.000003      the third lease of a run: {"worker", "host", "pid", "started", "heartbeat", ...}

A lease is a worker's right to train a run. The worker takes it by creating the file of the next number with
O_EXCL, which succeeds for one process on all machines. The newest lease of a run, that of the highest number,
says who holds the run.

While the worker trains, it counts up `heartbeat` in the file every few seconds. At the end it writes an
`outcome`: done, failed, refused (training refused the settings) or stopped.

A lease without an outcome expires when its worker seems dead, and then any worker may take the next one. On
the worker's own machine that is as soon as its process is gone. Elsewhere it is when `heartbeat` has not
changed for EXPIRY seconds on the clock of the machine that looks, so clocks are never compared. A worker that
was only slow finds the newer lease: it has lost the run, and stops training it.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from ...common.files import make_folder, write_text

HEARTBEAT = 10.0  # seconds between two heartbeats
EXPIRY = 90.0  # seconds without a heartbeat; file servers may show a change after 60
DIGITS = 6
FAILURES = ("failed", "refused")  # outcomes


@dataclass(frozen=True)
class RunState:
    """What the leases of a run say."""

    number: int = 0
    """Of the newest lease; 0 without one."""
    content: dict[str, Any] = field(default_factory=dict)
    """Of the newest lease."""
    is_held: bool = False
    """A worker that is alive has it."""
    is_done: bool = False
    failures: list[str] = field(default_factory=list)
    """A message for each lease that ended with a failure."""
    is_refused: bool = False
    """Training refused the settings, and would again."""


class Leases:
    """The leases of a sweep, as one worker process sees them.

    Args:
        folder: that all workers share.
        interval: seconds between two heartbeats of a lease.
        expiry: seconds without a new heartbeat after which a lease has expired.
        clock: the time in seconds, from any start.
    """

    def __init__(
        self,
        folder: Path,
        interval: float = HEARTBEAT,
        expiry: float = EXPIRY,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder, self.interval, self.expiry, self._clock = folder, interval, expiry, clock
        # By file name: the newest heartbeat, and when it was first seen.
        self._heartbeats: dict[str, tuple[Any, float]] = {}
        self._ended: dict[str, dict[str, Any]] = {}  # leases with an outcome, which never change
        self._lock = threading.Lock()
        make_folder(folder)

    def survey(self, names: Iterable[str]) -> dict[str, RunState]:
        """The state of each run."""
        numbers: dict[str, list[int]] = {name: [] for name in names}
        for path in os.listdir(self.folder):
            name, _, number = path.rpartition(".")
            if name in numbers and number.isdigit():
                numbers[name].append(int(number))
        with self._lock:
            return {name: self._state(name, sorted(found)) for name, found in numbers.items()}

    def take(self, name: str, state: RunState, worker: str) -> "Lease | None":
        """The next lease of a run, or None if another worker was faster.

        Args:
            state: of the run, from `survey`; not held and not done.
        """
        path = self._path(name, state.number + 1)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return None
        me = psutil.Process()
        owner = {"worker": worker, "host": host(), "pid": me.pid, "started": me.create_time()}
        return Lease(path, self._path(name, state.number + 2), owner, self.interval)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number:0{DIGITS}d}"

    def _state(self, name: str, numbers: list[int]) -> RunState:
        if not numbers:
            return RunState()
        contents = [self._read(self._path(name, number)) for number in numbers]
        return RunState(
            numbers[-1],
            contents[-1],
            is_held="outcome" not in contents[-1] and not self._has_expired(name, numbers[-1], contents[-1]),
            is_done=any(content.get("outcome") == "done" for content in contents),
            failures=[content["message"] for content in contents if content.get("outcome") in FAILURES],
            is_refused=any(content.get("outcome") == "refused" for content in contents),
        )

    def _read(self, path: Path) -> dict[str, Any]:
        if (ended := self._ended.get(path.name)) is not None:
            return ended
        try:
            content = json.loads(path.read_text() or "{}")
        except (OSError, ValueError):  # just created, or a server that does not answer
            return {}
        if "outcome" in content:
            self._ended[path.name] = content
        return content

    def _has_expired(self, name: str, number: int, content: dict[str, Any]) -> bool:
        if content.get("host") == host() and not _is_running(content["pid"], content["started"]):
            return True
        key, heartbeat = self._path(name, number).name, content.get("heartbeat")
        if key not in self._heartbeats or self._heartbeats[key][0] != heartbeat:
            self._heartbeats[key] = heartbeat, self._clock()
        return self._clock() - self._heartbeats[key][1] > self.expiry


class Lease:
    """A lease that this worker holds. A thread writes its heartbeats.

    Args:
        path: of the lease's file, which exists.
        next_path: of the run's next lease. Once it exists, another worker has taken the run.
        owner: the worker: {"worker", "host", "pid", "started"}.
        interval: seconds between two heartbeats.
    """

    def __init__(self, path: Path, next_path: Path, owner: dict[str, Any], interval: float):
        self.path, self._next_path, self._owner, self._interval = path, next_path, owner, interval
        self.is_lost = threading.Event()
        """Set when another worker has taken the run."""
        self._ended = threading.Event()
        self._heartbeat = 0
        self._write({})
        self._thread = threading.Thread(
            target=self._write_heartbeats, name=f"lease of {path.name}", daemon=True
        )
        self._thread.start()

    def end(self, outcome: str, message: str = "") -> None:
        """Write the outcome. Unless it is done, another worker may take the run at once."""
        self._ended.set()
        self._thread.join()
        self._write({"outcome": outcome, "message": message})

    def _write_heartbeats(self) -> None:
        while not self._ended.wait(self._interval):
            if self._next_path.exists():
                self.is_lost.set()
                return
            with contextlib.suppress(OSError):  # a server that does not answer now
                self._write({})

    def _write(self, more: dict[str, Any]) -> None:
        self._heartbeat += 1
        write_text(self.path, json.dumps({**self._owner, "heartbeat": self._heartbeat, **more}))


@cache
def host() -> str:
    """Where a process number means this process: the machine, its start, and the namespace of processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    return " ".join(parts)


def _is_running(pid: int, started: float) -> bool:
    """Whether the process with this number is the one that was started then."""
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.Error:
        return False
