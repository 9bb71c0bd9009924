"""Who trains what: leases in a folder that all workers share.

    leases/NAME.000003      the third lease of a run: {"worker", "host", "pid", "started", "heartbeat", ...}

A run's lease of the highest number counts. A worker takes a run by creating the next number with O_EXCL,
which one process on all machines can do. It then writes a higher `heartbeat` every few seconds, and at the
end an `outcome`: done, failed, refused (its settings) or stopped. A lease whose heartbeat does not change for
EXPIRY seconds on the observer's own clock has expired, so clocks of machines are never compared; on the same
machine it expires as soon as its process is gone. A worker that finds a higher number than its own has lost
the run and stops training it.
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

HEARTBEAT = 10.0  # seconds between two
EXPIRY = 90.0  # seconds; file servers may show a change after 60
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
        heartbeat: seconds between two of a lease.
        expiry: seconds without one after which a lease has expired.
        clock: in seconds.
    """

    def __init__(
        self,
        folder: Path,
        heartbeat: float = HEARTBEAT,
        expiry: float = EXPIRY,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder, self.heartbeat, self.expiry, self._clock = folder, heartbeat, expiry, clock
        self._seen: dict[str, tuple[Any, float]] = {}  # of each path: its heartbeat, and when it changed
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
        return Lease(path, self._path(name, state.number + 2), owner, self.heartbeat)

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
        if key not in self._seen or self._seen[key][0] != heartbeat:
            self._seen[key] = heartbeat, self._clock()
        return self._clock() - self._seen[key][1] > self.expiry


class Lease:
    """A run that this worker holds; a thread keeps it.

    Args:
        path: of the lease; it exists.
        next_path: of the lease that would supersede it.
        owner: fields of the file.
        heartbeat: seconds between two.
    """

    def __init__(self, path: Path, next_path: Path, owner: dict[str, Any], heartbeat: float):
        self.path, self._next, self._owner, self._heartbeat = path, next_path, owner, heartbeat
        self.is_lost = threading.Event()
        self._ended = threading.Event()
        self._count = 0
        self._write({})
        self._thread = threading.Thread(target=self._keep, name=f"lease of {path.name}", daemon=True)
        self._thread.start()

    def end(self, outcome: str, message: str = "") -> None:
        """Write the outcome, so that the run is free at once, or done."""
        self._ended.set()
        self._thread.join()
        self._write({"outcome": outcome, "message": message})

    def _keep(self) -> None:
        while not self._ended.wait(self._heartbeat):
            if self._next.exists():
                self.is_lost.set()
                return
            with contextlib.suppress(OSError):  # a server that does not answer now
                self._write({})

    def _write(self, more: dict[str, Any]) -> None:
        self._count += 1
        write_text(self.path, json.dumps({**self._owner, "heartbeat": self._count, **more}))


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
