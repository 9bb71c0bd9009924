"""Signals that stop a run: finish the step, save, exit. A second Ctrl-C exits at once."""

import os
import signal
import sys
from types import FrameType

from ..common.output import write_at_once

# A closed terminal sends SIGHUP, batch systems SIGTERM or SIGUSR1. Windows has neither SIGHUP nor SIGUSR1.
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]


class Interrupt:
    """A context in which SIGNALS are recorded; the loop checks `requested` between steps.

    Signals that the caller ignores stay ignored (`nohup` ignores SIGHUP), except SIGINT, which shells ignore
    in background jobs.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        """The signal that was received, if any."""
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested is not None:
            write_at_once("\nLeaving at once; the last checkpoint is untouched.\n")
            os._exit(128 + number)
        self.requested = number
        name = signal.Signals(number).name
        write_at_once(f"\n{name}: saving after this step, then leaving (Ctrl-C once more leaves at once).\n")

    def __enter__(self) -> "Interrupt":
        for number in SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] - what signal.signal returned


def exit_after_signal(number: int, message: str, is_main: bool) -> None:
    """Exit with the status of a process that this signal ended."""
    if is_main:
        print(message, file=sys.stderr)
    raise SystemExit(128 + number)
