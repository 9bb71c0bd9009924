"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1: finish the step, save, leave. A second Ctrl-C leaves at once."""

import contextlib
import os
import signal
import sys
from types import FrameType

# A closed terminal sends SIGHUP, batch systems SIGTERM or SIGUSR1. Windows has neither SIGHUP nor SIGUSR1.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Interrupt:
    """A context in which SIGNALS are noted instead of obeyed; the loop asks `requested` between steps.

    A signal that the caller had set to be ignored stays so (`nohup` does that to SIGHUP); not SIGINT, which shells ignore in background jobs.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        """The signal that came, if one did."""
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested is not None:
            _write_stderr("Leaving at once; the last checkpoint is untouched.")
            os._exit(128 + number)
        self.requested = number
        _write_stderr(f"{signal.Signals(number).name}: saving after this step, then leaving (Ctrl-C once more leaves at once).")

    def __enter__(self) -> "Interrupt":
        for number in SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] - what signal.signal returned


def _write_stderr(line: str) -> None:
    """Past Python's buffers, which a signal may have met in the middle of a write."""
    with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
        os.write(2, f"\n{line}\n".encode())


def leave(number: int, message: str, is_main: bool) -> None:
    """End the process as one that a signal ended, but in peace."""
    if is_main:
        print(message, file=sys.stderr)
    raise SystemExit(128 + number)
