"""metrics.jsonl, the source of truth about a run: one JSON object per line, each step once and in order."""

import contextlib
import json
import math
import os
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..common.files import sync

_BLOCK = 1 << 16  # bytes that are read at a time, from the end


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's object; None for a line that a crash has truncated."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of all whole lines."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [entry for line in file if (entry := _parse(line)) is not None]


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by KIND/NAME, as trackers show them; without the step."""
    return {
        f"{entry['kind']}/{key}": float(value)
        for key, value in entry.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"
    }


def cut_metrics(path: Path, step: int) -> int:
    """Remove, atomically, the lines after `step`; returns their number.

    Only the removed part is read, so the size of the file does not matter.
    """
    if not path.exists():
        return 0
    num_cut, last = 0, b"\n"
    with path.open("r+b") as file:
        size = keep = file.seek(0, os.SEEK_END)
        for offset, line in _lines_from_the_end(file):
            entry = _parse(line)
            if entry is not None and entry["step"] <= step:
                last = line
                break
            num_cut, keep = num_cut + (entry is not None), offset
        if keep < size:
            file.truncate(keep)
        if not last.endswith(b"\n"):  # only the line's end is missing
            file.seek(keep)
            file.write(b"\n")
    sync(path)
    return num_cut


def _lines_from_the_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Each line with its offset, the last line first."""
    start, incomplete = file.seek(0, os.SEEK_END), b""
    while start > 0:
        end, start = start, max(start - _BLOCK, 0)
        file.seek(start)
        block = file.read(end - start) + incomplete
        lines = block.splitlines(keepends=True)
        incomplete = lines.pop(0) if start > 0 else b""  # it may begin in the previous block
        offset = start + len(block)
        for line in reversed(lines):
            offset -= len(line)
            yield offset, line


def _strict_json(value: Any) -> Any:
    """The value as strict JSON: null for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return {key: _strict_json(item) for key, item in value.items()} if isinstance(value, dict) else value


class History:
    """What the pictures need from metrics.jsonl. Each line is read once, also while the file grows."""

    def __init__(self, path: Path):
        self.path = path
        self._reset()

    def _reset(self) -> None:
        self._offset = 0
        self.tokens, self.losses = array("d"), array("d")
        """Of the training lines with a finite loss."""
        self.validations: list[dict[str, Any]] = []
        """The lines of kind validation."""
        self._by_kind = {"validation": self.validations}

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind other than train: validation, test, eval or samples."""
        return self._by_kind.get(kind, [])

    def update(self) -> "History":
        """Read the lines that are new since the last call."""
        if not self.path.exists() or self.path.stat().st_size < self._offset:
            self._reset()
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._add(_parse(line) or {})
        return self

    def _add(self, entry: dict[str, Any]) -> None:
        kind = entry.get("kind")
        if kind == "train":
            if isinstance(loss := entry["loss"], float) and math.isfinite(loss):
                self.tokens.append(entry["tokens"])
                self.losses.append(loss)
        elif kind is not None:
            self._by_kind.setdefault(kind, []).append(entry)


class MetricsFile:
    """Appends lines to metrics.jsonl, each visible at once. Lines that cannot be written are kept and tried
    again.

    A checkpoint is valid only with all lines before it, so `sync` is called before it is published, possibly
    by the saver's thread.
    """

    def __init__(self, path: Path, warn: Callable[[str], object]):
        self.path, self.warn = path, warn
        self.history = History(path)
        self._pending: list[str] = []
        self._intact_size: int | None = None
        """Size of the file without the half line at its end, if there is one."""
        self._lock = threading.Lock()

    def append(self, entry: dict[str, Any]) -> None:
        """Append a line."""
        with self._lock:
            had_pending = bool(self._pending)
            self._pending.append(json.dumps(_strict_json(entry), allow_nan=False) + "\n")
            try:
                self._write()
            except OSError as error:
                if not had_pending:
                    self.warn(
                        f"{self.path} takes no more lines ({error.strerror}); they are kept until it does"
                    )

    def _write(self) -> None:
        """Write all pending lines, or none.

        Raises:
            OSError: the lines stay pending.
        """
        if not self._pending:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        if self._intact_size is not None and size > self._intact_size:
            os.truncate(self.path, self._intact_size)
            size = self._intact_size
        try:
            with self.path.open("a") as file:
                file.write("".join(self._pending))
        except OSError:
            self._intact_size = size
            with contextlib.suppress(OSError):  # otherwise the next write truncates it
                os.truncate(self.path, size)
            raise
        self._pending, self._intact_size = [], None

    def sync(self) -> None:
        """Write all lines and sync them to the disk.

        Raises:
            OSError: some could not be written.
        """
        with self._lock:
            self._write()
        if self.path.exists():
            sync(self.path)
            sync(self.path.parent)  # for its name

    def close(self) -> None:
        """Write the pending lines, or warn that they are lost."""
        with self._lock:
            try:
                self._write()
            except OSError as error:
                lost = f"{len(self._pending)} lines of {self.path} are lost ({error.strerror})"
                self.warn(f"{lost}; no checkpoint covers them")
