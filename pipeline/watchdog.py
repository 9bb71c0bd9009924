"""When a process hangs, the others wait for it in some collective, which says nothing. The watchdog says who it is, and ends the wait.

Every process has a thread that writes down in the store, now and then, that it lives (a beat), whether it moves (a count), and which
phase it has come to (another count, the same on all processes where they are equally far). Where nobody has moved for `timeout` seconds,
someone hangs: who does not beat (it is stopped, or its machine is gone), or else who is phases behind. They are named, and the process ends
with status 75, so that an elastic launcher starts all anew from the newest checkpoint. It ends too where the store has not answered for so
long: who holds it, the launcher or rank 0, hangs or is gone, and whoever comes to start the run again is to find nobody in its folder. A
store that is stopped answers nothing and raises nothing, so a second thread looks at the clock.
"""

import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed import distributed_c10d as c10d

from ..common.output import write_at_once
from .processes import launcher_holds_store

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h
SET_UP_SECONDS = (
    30.0  # that a phase of the set-up may take longer than `timeout`: a step says nothing about it
)


@dataclass(frozen=True)
class Seen:
    """What a process last wrote."""

    rank: int
    host: str
    beat: int
    moves: int
    phase: int
    doing: str


def suspects(before: list[Seen], now: list[Seen]) -> list[Seen]:
    """Who hangs, of processes of which none moved between two looks: those that do not beat, or else those furthest behind."""
    if silent := [seen for seen, old in zip(now, before, strict=True) if seen.beat == old.beat]:
        return silent
    furthest = min(seen.phase for seen in now)
    return [seen for seen in now if seen.phase == furthest]


class Watchdog:
    """A context in which hanging ends after `timeout` seconds. Does nothing for a single process.

    Args:
        timeout: seconds for the longest thing between two moves.
        store: where the processes meet; None for a single one.
    """

    def __init__(self, rank: int, num_processes: int, timeout: float, store: Any):
        self.rank, self.num_processes, self.timeout = rank, num_processes, timeout
        self._period = min(max(timeout / 5, 0.1), 15.0)
        self._beat, self._moves, self._phase, self._doing, self._slack = 0, 0, 0, "starting", SET_UP_SECONDS
        self._ended, self._look_is_wanted = threading.Event(), threading.Event()
        self._looks: list[list[Seen]] = []
        self._answered, self._why = time.monotonic(), "no answer"
        self._threads: list[threading.Thread] = []
        self._store = None if store is None else c10d.PrefixStore("minrnn/watchdog", store)
        if store is not None:
            self._write()
            self._threads = [
                threading.Thread(target=target, daemon=True) for target in (self._talk, self._watch)
            ]

    @classmethod
    def of(cls, accelerator: Accelerator, timeout: float) -> "Watchdog":
        """That of a connected process, over a connection of its own."""
        store: Any = (
            c10d._get_default_store() if accelerator.num_processes > 1 else None
        )  # the only way to it
        return cls(accelerator.process_index, accelerator.num_processes, timeout, store and store.clone())

    def enter(self, phase: str, is_set_up: bool = False) -> None:
        """The process has come to a phase that all processes come to."""
        self._slack = SET_UP_SECONDS if is_set_up else 0.0
        self._phase, self._moves, self._doing = self._phase + 1, self._moves + 1, phase

    def move(self) -> None:
        """It moves within the phase."""
        self._moves += 1

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Watch no more: from here on each process leaves when it has done its own."""
        self._ended.set()
        for thread in self._threads:
            thread.join(5.0)

    def _write(self) -> None:
        assert self._store is not None
        self._beat += 1
        self._store.set(
            str(self.rank), f"{self._beat}|{self._moves}|{self._phase}|{socket.gethostname()}|{self._doing}"
        )

    def _look(self) -> list[Seen]:
        assert self._store is not None
        seen = []
        for rank in range(self.num_processes):
            if not self._store.check([str(rank)]):
                seen.append(Seen(rank, "a host unknown", 0, 0, 0, "has not come so far"))
                continue
            beat, moves, phase, host, doing = self._store.get(str(rank)).decode().split("|", 4)
            seen.append(Seen(rank, host, int(beat), int(moves), int(phase), doing))
        return seen

    def _talk(self) -> None:
        """All that is said to the store: here an answer may never come."""
        assert self._store is not None
        while not self._ended.wait(self._period):
            try:
                self._write()
                self._store.add(f"answers/{self.rank}", 1)  # unlike `set`, it waits for one
                if self._look_is_wanted.is_set():
                    self._looks.append(self._look())
                self._answered = time.monotonic()
            except (RuntimeError, torch.distributed.DistError) as error:
                self._why = str(error).splitlines()[0]

    def _watch(self) -> None:
        moves, since = self._moves, time.monotonic()
        while not self._ended.wait(self._period):
            now, limit = time.monotonic(), self.timeout + self._slack
            if now - self._answered > limit:
                holder = "the launcher" if launcher_holds_store() else "rank 0"
                host = os.environ.get("MASTER_ADDR", "its host")
                self._leave(
                    f"the store has not answered for {limit:.0f} seconds ({self._why}); {holder} on {host}, which holds it, hangs or is gone"
                )
            if self._moves != moves:
                moves, since = self._moves, now
                self._forget_looks()
            elif now - since > limit and len(self._looks) >= 3:  # the first and the last are two beats apart
                before, after = self._looks[0], self._looks[-1]
                if any(seen.moves != old.moves for seen, old in zip(after, before, strict=True)):
                    since = now  # it is its turn
                    self._forget_looks()
                else:
                    names = "; ".join(
                        f"rank {seen.rank} on {seen.host} ({seen.doing})" for seen in suspects(before, after)
                    )
                    self._leave(f"nothing has moved for {limit:.0f} seconds; waiting for {names}")
            elif now - since > limit - 3 * self._period:
                self._look_is_wanted.set()

    def _forget_looks(self) -> None:
        self._look_is_wanted.clear()
        self._looks = []

    def _leave(self, why: str) -> None:
        write_at_once(
            f"error: training: rank {self.rank}: {why}. Leaving; the newest checkpoint is as it was (train.peer_timeout).\n"
        )
        os._exit(EXIT_STATUS)
