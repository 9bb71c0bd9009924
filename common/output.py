"""Output is not worth a run: a full disk, a closed pipe or a closed descriptor behind stdout or stderr raises nothing.

Python raises where a write fails, opens its next file on a descriptor that was closed before the start (so that messages of libraries end up
in it), and leaves with status 120 where the last flush fails. A run calls `secure_output` first, and its data workers do.
"""

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import Any


class UnfailingStream:
    """A text stream that drops what cannot be written; everything else is the stream's own."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written; characters that the encoding lacks are escaped."""
        with contextlib.suppress(OSError, ValueError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or try again with the next write."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def secure_output() -> None:
    """From here on writing to stdout and stderr raises nothing, and descriptors 0 to 2 are open."""
    names = ("stdin", "stdout", "stderr")
    closed = [
        number for number, name in enumerate(names) if getattr(sys, name) is None
    ]  # when Python started
    for number in closed:
        _open_descriptor(number)
    for number in closed:
        stream = open(os.devnull, "r" if number == 0 else "w", encoding="utf-8")  # noqa: SIM115 - lasts as long as the process
        setattr(sys, names[number], stream)
    for name in names[1:]:
        stream: Any = getattr(sys, name)
        if not isinstance(stream, UnfailingStream):
            setattr(sys, name, UnfailingStream(stream))


@contextlib.contextmanager
def conventional_exit() -> Iterator[None]:
    """Within, Ctrl-C ends the program with status 130, and a pipe behind stdout or stderr that is closed with 141, without a traceback.

    What is still in Python's buffers is written here, since an error at the end of the interpreter would be one more traceback.
    """
    try:
        try:
            yield
        finally:
            _flush_output()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        if not _is_closed():  # a pipe to something else
            raise
        _discard_output()
        raise SystemExit(141) from None


def _flush_output() -> None:
    """Write what is buffered; BrokenPipeError if nobody reads it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _is_closed() -> bool:
    """Whether nobody reads stdout, or stderr, any more. A buffer whose flush failed is empty, so another flush does not say."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            poll.register(stream.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _discard_output() -> None:
    """Nothing that is written from here on can fail."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _open_descriptor(number: int) -> None:
    """Put /dev/null there, unless something else has been opened on it since."""
    try:
        os.fstat(number)
    except OSError:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor == number:
            os.set_inheritable(number, True)
        else:
            os.dup2(descriptor, number)
            os.close(descriptor)


def warn(message: str) -> None:
    """One line on standard error, above a progress bar if there is one."""
    from tqdm import tqdm  # here, since who secures the output does so before importing anything

    tqdm.write(f"warning: {message}", file=sys.stderr)


def write_at_once(message: str) -> None:
    """Write to stderr past Python's buffers, which a signal may have met in the middle of a write."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), message.encode(errors="backslashreplace"))
