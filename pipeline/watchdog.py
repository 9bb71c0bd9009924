"""When a process hangs, the others wait for it in some collective, which says nothing. The watchdog says who it is, and ends the wait.

Every process has a thread that writes down in the launcher's store, now and then, that it lives (a beat), whether its training moves (a count),
and which phase it has come to (another count, the same on all processes where they are equally far). Where nobody has moved for `timeout`
seconds, someone hangs: who does not beat (it is stopped, or its machine is gone), or else who is phases behind. The thread names them and ends
its process with status 75, so that an elastic launcher starts all anew from the newest checkpoint. It ends it too where the store has been
gone for so long: then the launcher is, and whoever comes to start the run again is to find nobody in its folder.
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

from ..data.output import write_at_once

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h


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
    """

    def __init__(self, accelerator: Accelerator, timeout: float):
        self.rank, self.num_processes, self.timeout = accelerator.process_index, accelerator.num_processes, timeout
        self._beat, self._moves, self._phase, self._doing = 0, 0, 0, "starting"
        self._ended = threading.Event()
        self._store: Any = None
        if self.num_processes > 1:
            store: Any = c10d._get_default_store()  # the only way to it; a clone has a connection of its own
            self._store = c10d.PrefixStore("minrnn/watchdog", store.clone())
            self._write()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: str) -> None:
        """The training has come to a phase that all processes come to."""
        self._phase, self._moves, self._doing = self._phase + 1, self._moves + 1, phase

    def move(self) -> None:
        """It moves within the phase."""
        self._moves += 1

    def __enter__(self) -> "Watchdog":
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._store is not None:
            self._thread.join(self.timeout)

    def _write(self) -> None:
        self._beat += 1
        self._store.set(str(self.rank), f"{self._beat}|{self._moves}|{self._phase}|{socket.gethostname()}|{self._doing}")

    def _look(self) -> list[Seen]:
        keys = [str(rank) for rank in range(self.num_processes)]
        self._store.wait(keys)
        seen = []
        for rank, value in enumerate(self._store.multi_get(keys)):
            beat, moves, phase, host, doing = value.decode().split("|", 4)
            seen.append(Seen(rank, host, int(beat), int(moves), int(phase), doing))
        return seen

    def _watch(self) -> None:
        period = min(max(self.timeout / 5, 0.1), 15.0)
        moves, since, before, reached = self._moves, time.monotonic(), None, time.monotonic()
        while not self._ended.wait(period):
            waited = time.monotonic() - since
            try:
                self._write()
                reached = time.monotonic()
                if self._moves != moves:
                    moves, since, before = self._moves, time.monotonic(), None
                elif waited > self.timeout - 2 * period and before is None:
                    before = self._look()
                elif waited > self.timeout and before is not None:
                    now = self._look()
                    if any(seen.moves != old.moves for seen, old in zip(now, before, strict=True)):
                        since, before = time.monotonic(), None  # it is its turn
                    else:
                        names = "; ".join(f"rank {seen.rank} on {seen.host} ({seen.doing})" for seen in suspects(before, now))
                        self._leave(f"nothing has moved for {self.timeout:.0f} seconds; waiting for {names}")
            except (RuntimeError, torch.distributed.DistError) as error:
                if not self._ended.is_set() and time.monotonic() - reached > self.timeout:
                    why = str(error).splitlines()[0]
                    self._leave(f"the launcher's store does not answer ({why}): the launcher, or the machine that holds it, is gone")

    def _leave(self, why: str) -> None:
        write_at_once(f"error: training: rank {self.rank}: {why}. Leaving; the newest checkpoint is as it was (train.peer_timeout).\n")
        os._exit(EXIT_STATUS)
