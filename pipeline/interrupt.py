"""Ctrl-C and SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once."""

import os
import signal
import sys
from types import FrameType


class Interrupt:
    """A context in which SIGINT and SIGTERM are noted instead of obeyed; the loop asks `requested` between steps."""

    def __init__(self) -> None:
        self.requested: int | None = None
        """The signal that came, if one did."""
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested is not None:
            os.write(2, b"\nLeaving at once; the last checkpoint is untouched.\n")
            os._exit(128 + number)
        self.requested = number
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step, then leaving (Ctrl-C once more leaves at once).\n".encode())

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] - what signal.signal returned


def leave(number: int, message: str, is_main: bool) -> None:
    """End the process as one that a signal ended, but in peace."""
    if is_main:
        print(message, file=sys.stderr)
    raise SystemExit(128 + number)
