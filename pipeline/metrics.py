"""metrics.jsonl is the truth about a run: one JSON object a line, in the order of the steps, each step
once."""

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

_BLOCK = 1 << 16  # bytes read at a time, from the end


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's object; None for a line that a crash has cut."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [entry for line in file if (entry := _parse(line)) is not None]


def cut_metrics(path: Path, step: int) -> int:
    """Remove, in one atomic step, what was written after `step`: it will be written again. Returns how many
    lines that were.

    Only what is removed is read, so a file of a million lines takes no longer than a short one.
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
        if not last.endswith(b"\n"):  # all of the line but its end
            file.seek(keep)
            file.write(b"\n")
    sync(path)
    return num_cut


def _lines_from_the_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The last line first, each with its offset."""
    start, rest = file.seek(0, os.SEEK_END), b""
    while start > 0:
        end, start = start, max(start - _BLOCK, 0)
        file.seek(start)
        block = file.read(end - start) + rest
        lines = block.splitlines(keepends=True)
        rest = lines.pop(0) if start > 0 else b""  # its beginning may be in the block before
        offset = start + len(block)
        for line in reversed(lines):
            offset -= len(line)
            yield offset, line


def _strict(value: Any) -> Any:
    """The value as JSON has it: null for what is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return {key: _strict(item) for key, item in value.items()} if isinstance(value, dict) else value


class History:
    """What the pictures show of a metrics.jsonl. It is read on as the file grows, never again from its
    beginning."""

    def __init__(self, path: Path):
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self._offset = 0
        self.tokens, self.losses = array("d"), array("d")
        """Of the training lines with a finite loss."""
        self.validations: list[dict[str, Any]] = []

    def update(self) -> "History":
        """Read what has been written since."""
        if not self.path.exists() or self.path.stat().st_size < self._offset:
            self._forget()
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
        if entry.get("kind") == "validation":
            self.validations.append(entry)
        elif (
            entry.get("kind") == "train" and isinstance(loss := entry["loss"], float) and math.isfinite(loss)
        ):
            self.tokens.append(entry["tokens"])
            self.losses.append(loss)


class MetricsFile:
    """metrics.jsonl, one line after another, visible at once. Lines that a full disk does not take are kept
    until it does.

    A checkpoint must not outlive the lines before it: it counts only after `sync`, which the thread that
    saves may call.
    """

    def __init__(self, path: Path, warn: Callable[[str], object]):
        self.path, self.warn = path, warn
        self.history = History(path)
        self._waiting: list[str] = []
        self._whole: int | None = None
        """Size of the file without the half line at its end, if there is one."""
        self._lock = threading.Lock()

    def append(self, entry: dict[str, Any]) -> None:
        """One more line."""
        with self._lock:
            was_waiting = bool(self._waiting)
            self._waiting.append(json.dumps(_strict(entry), allow_nan=False) + "\n")
            try:
                self._write()
            except OSError as error:
                if not was_waiting:
                    self.warn(
                        f"{self.path} takes no more lines ({error.strerror}); they are kept until it does"
                    )

    def _write(self) -> None:
        """Write the lines that wait, all or none.

        Raises:
            OSError: they go on waiting.
        """
        if not self._waiting:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        if self._whole is not None and size > self._whole:
            os.truncate(self.path, self._whole)
            size = self._whole
        try:
            with self.path.open("a") as file:
                file.write("".join(self._waiting))
        except OSError:
            self._whole = size
            with contextlib.suppress(OSError):  # then the next write begins with it
                os.truncate(self.path, size)
            raise
        self._waiting, self._whole = [], None

    def sync(self) -> None:
        """Write all lines to the disk.

        Raises:
            OSError: they are not there.
        """
        with self._lock:
            self._write()
        if self.path.exists():
            sync(self.path)
            sync(self.path.parent)  # its name, too

    def close(self) -> None:
        """Write what waits, or say that it could not be written."""
        with self._lock:
            try:
                self._write()
            except OSError as error:
                self.warn(
                    f"{len(self._waiting)} lines of {self.path} are lost ({error.strerror}); no checkpoint covers them"
                )
