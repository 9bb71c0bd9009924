"""Output that cannot stop a run, and the exit status of commands.

A write to stdout or stderr can fail: the disk is full, or the pipe or the descriptor is closed. Python then
raises an exception, or exits with status 120 at the last flush. And it opens its next file on a descriptor
that was closed before the start, so that messages of libraries end up in that file. Runs and their data
workers call `secure_output` first, which prevents all three.
"""

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

from .errors import NonFiniteError, StorageError, UserError


class UnfailingStream:
    """A wrapper of a text stream that drops what cannot be written."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, and ignore errors. Characters that the encoding lacks are escaped."""
        with contextlib.suppress(OSError, ValueError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, and ignore errors: the next write tries again."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def secure_output() -> None:
    """Make writes to stdout and stderr raise nothing, and open descriptors 0 to 2 if they are closed."""
    names = ("stdin", "stdout", "stderr")
    # Python sets a stream to None if its descriptor was closed at the start.
    closed = [number for number, name in enumerate(names) if getattr(sys, name) is None]
    for number in closed:
        _open_descriptor(number)
    for number in closed:
        mode = "r" if number == 0 else "w"
        stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - open until the process ends
        setattr(sys, names[number], stream)
    for name in names[1:]:
        stream: Any = getattr(sys, name)
        if not isinstance(stream, UnfailingStream):
            setattr(sys, name, UnfailingStream(stream))


@contextlib.contextmanager
def conventional_exit() -> Iterator[None]:
    """Exit with status 130 on Ctrl-C and 141 when stdout or stderr has no reader, without a traceback.

    Python's buffers are flushed here, because an error at the interpreter's own flush prints a traceback.
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


@contextlib.contextmanager
def exit_on_error(command: str) -> Iterator[None]:
    """Print a UserError and exit with status 2; print a StorageError or NonFiniteError, status 1."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except (StorageError, NonFiniteError) as error:
        print(f"error: {command}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _flush_output() -> None:
    """Flush stdout and stderr; raises BrokenPipeError if the reader is gone."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _is_closed() -> bool:
    """Whether stdout or stderr has no reader. A flush does not tell: a failed one empties the buffer."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            poll.register(stream.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _discard_output() -> None:
    """Send all later output to /dev/null."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _open_descriptor(number: int) -> None:
    """Open /dev/null as this descriptor, unless it is open."""
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
    """Print one line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm  # not at the top: secure_output runs before other imports

    tqdm.write(f"warning: {message}", file=sys.stderr)


def write_at_once(message: str) -> None:
    """Write to stderr without Python's buffers, in whose write a signal handler may be running."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), message.encode(errors="backslashreplace"))
