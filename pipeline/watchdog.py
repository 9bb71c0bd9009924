"""A watchdog that names the process that hangs, and ends the others instead of letting them wait in a
collective.

A thread of every process writes a heartbeat to the store: a counter that shows that the process lives (beat),
a counter that shows progress (moves), and the number of its phase, which is the same in all processes that
are equally far. If no process has moved for `timeout` seconds, one hangs: one whose beat has stopped (its
process is stopped or its machine is gone), or else one that is in an earlier phase than others. The watchdog
names it and exits with status 75, so that an elastic launcher restarts all processes from the newest
checkpoint.

It also exits if the store has not answered for `timeout` seconds, because then the process that holds it, the
launcher or rank 0, hangs or is gone, and a new start of the run must find the folder unlocked. A stopped
store neither answers nor raises, so a second thread watches the time.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed import distributed_c10d as c10d

from ..common.output import write_at_once
from .processes import launcher_holds_store

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h
SET_UP_SECONDS = 30.0  # added to `timeout` during the set-up, which can take longer than any step


@dataclass(frozen=True)
class Heartbeat:
    """What a process last wrote to the store."""

    rank: int
    host: str
    beat: int
    moves: int
    phase: int
    activity: str


def suspects(before: list[Heartbeat], now: list[Heartbeat]) -> list[Heartbeat]:
    """The processes that may hang, if none moved between two snapshots: those without a beat, else those
    furthest behind."""
    if silent := [
        heartbeat for heartbeat, old in zip(now, before, strict=True) if heartbeat.beat == old.beat
    ]:
        return silent
    furthest = min(heartbeat.phase for heartbeat in now)
    return [heartbeat for heartbeat in now if heartbeat.phase == furthest]


class Watchdog:
    """A context that ends the process if all processes are stuck for `timeout` seconds. Does nothing for a
    single process.

    Args:
        timeout: must exceed the longest time between two moves.
        store: through which the processes are connected; None for a single one.
    """

    def __init__(self, rank: int, num_processes: int, timeout: float, store: Any):
        self.rank, self.num_processes, self.timeout = rank, num_processes, timeout
        self._period = min(max(timeout / 5, 0.1), 15.0)
        self._beat = self._moves = self._phase = 0
        self._activity, self._extra_seconds = "starting", SET_UP_SECONDS
        self._ended, self._wants_snapshots = threading.Event(), threading.Event()
        self._snapshots: list[list[Heartbeat]] = []
        self._answered_at, self._last_error = time.monotonic(), "no answer"
        self._threads: list[threading.Thread] = []
        self.on_phase: Callable[[str, bool], object] = lambda phase, is_set_up: None
        """Called when the process enters a phase."""
        self._store = None if store is None else c10d.PrefixStore("minrnn/watchdog", store)
        if store is not None:
            self._write()
            self._threads = [
                threading.Thread(target=target, daemon=True) for target in (self._exchange, self._watch)
            ]

    @classmethod
    def from_accelerator(cls, accelerator: Accelerator, timeout: float) -> "Watchdog":
        """The watchdog of a connected process, with its own connection to the store."""
        # torch has no public access to the store.
        store: Any = c10d._get_default_store() if accelerator.num_processes > 1 else None
        return cls(accelerator.process_index, accelerator.num_processes, timeout, store and store.clone())

    def enter(self, phase: str, is_set_up: bool = False) -> None:
        """The process enters a phase, which every process enters in its turn."""
        self._extra_seconds = SET_UP_SECONDS if is_set_up else 0.0
        self._phase, self._moves, self._activity = self._phase + 1, self._moves + 1, phase
        self.on_phase(phase, is_set_up)

    def move(self) -> None:
        """The process makes progress within its phase."""
        self._moves += 1

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop watching: from here on, processes exit one by one."""
        self._ended.set()
        for thread in self._threads:
            thread.join(5.0)

    def _write(self) -> None:
        assert self._store is not None
        self._beat += 1
        self._store.set(
            str(self.rank),
            f"{self._beat}|{self._moves}|{self._phase}|{socket.gethostname()}|{self._activity}",
        )

    def _read_heartbeats(self) -> list[Heartbeat]:
        assert self._store is not None
        heartbeats = []
        for rank in range(self.num_processes):
            if not self._store.check([str(rank)]):
                heartbeats.append(Heartbeat(rank, "a host unknown", 0, 0, 0, "has not come so far"))
                continue
            beat, moves, phase, host, activity = self._store.get(str(rank)).decode().split("|", 4)
            heartbeats.append(Heartbeat(rank, host, int(beat), int(moves), int(phase), activity))
        return heartbeats

    def _exchange(self) -> None:
        """The thread that talks to the store. A call may never return."""
        assert self._store is not None
        while not self._ended.wait(self._period):
            try:
                self._write()
                self._store.add(f"answers/{self.rank}", 1)  # unlike `set`, this waits for an answer
                if self._wants_snapshots.is_set():
                    self._snapshots.append(self._read_heartbeats())
                self._answered_at = time.monotonic()
            except (RuntimeError, torch.distributed.DistError) as error:
                self._last_error = str(error).splitlines()[0]

    def _watch(self) -> None:
        """The thread that exits if the store does not answer or no process moves."""
        moves, since = self._moves, time.monotonic()
        while not self._ended.wait(self._period):
            now, limit = time.monotonic(), self.timeout + self._extra_seconds
            if now - self._answered_at > limit:
                self._exit_without_store(limit)
            if self._moves != moves:
                moves, since = self._moves, now
                self._discard_snapshots()
            elif now - since > limit and len(self._snapshots) >= 3:  # first and last are two beats apart
                before, after = self._snapshots[0], self._snapshots[-1]
                if any(new.moves != old.moves for new, old in zip(after, before, strict=True)):
                    since = now  # another process moves; this one waits for it
                    self._discard_snapshots()
                else:
                    ranks = (f"rank {x.rank} on {x.host} ({x.activity})" for x in suspects(before, after))
                    self._exit(f"nothing has moved for {limit:.0f} seconds; waiting for {'; '.join(ranks)}")
            elif now - since > limit - 3 * self._period:
                self._wants_snapshots.set()

    def _discard_snapshots(self) -> None:
        self._wants_snapshots.clear()
        self._snapshots = []

    def _exit_without_store(self, seconds: float) -> None:
        holder = "the launcher" if launcher_holds_store() else "rank 0"
        host = os.environ.get("MASTER_ADDR", "its host")
        self._exit(
            f"the store has not answered for {seconds:.0f} seconds ({self._last_error}); "
            f"{holder} on {host}, which holds it, hangs or is gone"
        )

    def _exit(self, reason: str) -> None:
        write_at_once(
            f"error: training: rank {self.rank}: {reason}. "
            "Leaving; the newest checkpoint is as it was (train.peer_timeout).\n"
        )
        os._exit(EXIT_STATUS)
