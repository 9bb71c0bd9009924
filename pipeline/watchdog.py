"""When a process hangs, the others wait for it in some collective, which says nothing. The watchdog says who it is, and ends the wait.

Every process has a thread that writes two things to the launcher's store now and then: a beat (the process lives) and the mark where its
training is (a counter, the step, what it is doing). Where no mark has moved for `timeout` seconds, someone hangs: who does not beat (it is
stopped, or its machine is gone), or else whose mark is the oldest. The thread names them and ends its process with status 75, so that an
elastic launcher starts all anew from the newest checkpoint.
"""

import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed import distributed_c10d as c10d

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h


@dataclass(frozen=True)
class Seen:
    """What a process last wrote."""

    rank: int
    host: str
    beat: int
    mark: int
    doing: str


def suspects(before: list[Seen], now: list[Seen]) -> list[Seen]:
    """Who hangs, of processes whose marks did not move between two looks: those that do not beat, or else those furthest behind."""
    if silent := [seen for seen, old in zip(now, before, strict=True) if seen.beat == old.beat]:
        return silent
    furthest = min(seen.mark for seen in now)
    return [seen for seen in now if seen.mark == furthest]


class Watchdog:
    """A context in which hanging ends after `timeout` seconds. Does nothing for a single process.

    Args:
        timeout: seconds for the longest thing between two marks.
    """

    def __init__(self, accelerator: Accelerator, timeout: float):
        self.rank, self.num_processes, self.timeout = accelerator.process_index, accelerator.num_processes, timeout
        self._mark, self._doing, self._beat = 0, "starting", 0
        self._ended = threading.Event()
        self._store: Any = None
        if self.num_processes > 1:
            store: Any = c10d._get_default_store()  # the only way to it; a clone has a connection of its own
            self._store = c10d.PrefixStore("minrnn/watchdog", store.clone())
            self._write()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def mark(self, doing: str) -> None:
        """The training has come this far."""
        self._mark, self._doing = self._mark + 1, doing

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
        self._store.set(str(self.rank), f"{self._beat}|{self._mark}|{socket.gethostname()}|{self._doing}")

    def _look(self) -> list[Seen]:
        keys = [str(rank) for rank in range(self.num_processes)]
        self._store.wait(keys)
        seen = []
        for rank, value in enumerate(self._store.multi_get(keys)):
            beat, mark, host, doing = value.decode().split("|", 3)
            seen.append(Seen(rank, host, int(beat), int(mark), doing))
        return seen

    def _watch(self) -> None:
        period = min(max(self.timeout / 5, 0.1), 15.0)
        last_mark, since, before = self._mark, time.monotonic(), None
        while not self._ended.wait(period):
            try:
                self._write()
                if self._mark != last_mark:
                    last_mark, since, before = self._mark, time.monotonic(), None
                elif time.monotonic() - since > self.timeout:
                    before = self._end(before)
                elif time.monotonic() - since > self.timeout - 2 * period and before is None:
                    before = self._look()
            except (RuntimeError, torch.distributed.DistError) as error:
                if not self._ended.is_set() and time.monotonic() - since > self.timeout:
                    self._leave(f"the launcher's store does not answer ({str(error).splitlines()[0]}): the machine that holds it is gone")

    def _end(self, before: list[Seen] | None) -> list[Seen]:
        now = self._look()
        if before is None:
            return now
        who = suspects(before, now)
        names = "; ".join(f"rank {seen.rank} on {seen.host} ({seen.doing})" for seen in who)
        self._leave(f"nothing has moved for {self.timeout:.0f} seconds; waiting for {names}")
        return now

    def _leave(self, why: str) -> None:
        sys.stderr.write(f"error: training: rank {self.rank}: {why}. Leaving; the newest checkpoint is as it was (train.peer_timeout).\n")
        sys.stderr.flush()
        os._exit(EXIT_STATUS)
