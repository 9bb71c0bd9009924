"""Where the documents of a shard are, in the units in which its source can be cut (parts.py).

A prepared shard keeps the cuts of the original, and for each document its place: the number of its row group,
of its file, or the offset of its line. So readers divide a prepared corpus as they divide the original.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import convert_read_errors
from ..parquet import Parquet, metadata_of, row_starts
from ..parts import read_part, units_of
from ..rows import JsonLines
from ..sources import DivisibleSource, Part, Position, Source

SCAN_BYTES = 1 << 24


@dataclass(frozen=True)
class Places:
    """The cuts of a shard, and the place of each document."""

    cuts: Sequence[int]
    of: Callable[[np.ndarray], np.ndarray]
    """Indices of documents, int64 -> their places, int64; a document is in the part from cut a to cut b if
    a <= place < b."""
    lines_before: list[int] | None = None
    """For each cut, the number of lines before it, if a part that begins there counts its lines from 0."""


def places(source: Source, shard: int) -> Places:
    """The places of a shard's documents.

    Raises:
        UserError: the shard cannot be read.
    """
    if not isinstance(source, DivisibleSource) or len(cuts := source.cuts(shard)) <= 2:
        return Places((0, 1), np.zeros_like)
    if source.skips_unread:  # files: an index is a place
        return Places(cuts, lambda index: index)
    rows: Any = getattr(source, "_parquet", None) or source  # of a hub dataset
    if isinstance(rows, JsonLines):
        starts = _line_starts(rows.paths[shard])
        return Places(cuts, lambda index: starts[index], np.searchsorted(starts, cuts).tolist())
    if isinstance(rows, Parquet):
        with convert_read_errors(rows.paths[shard]):
            starts = np.asarray(row_starts(metadata_of(rows.paths[shard]))[:-1])
    else:
        starts = _unit_starts(source, shard)
    units = np.asarray(cuts)
    return Places(cuts, lambda index: units[np.searchsorted(starts, index, side="right") - 1])


def _line_starts(path: Path) -> np.ndarray:
    """The offset of each line of a file, int64."""
    starts, offset = [np.zeros(1, np.int64)], 0
    with convert_read_errors(path), path.open("rb") as file:
        while data := file.read(SCAN_BYTES):
            starts.append(np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + offset + 1)
            offset += len(data)
    return np.concatenate(starts)


def _unit_starts(source: Source, shard: int) -> np.ndarray:
    """The index of the first document of each unit of a shard, int64; reads one document of each."""
    starts: list[int] = []
    for unit in units_of(source, Part(shard)):
        first = next(iter(read_part(source, unit, Position())), None)
        starts.append(starts[-1] if first is None and starts else 0 if first is None else first.index)
    return np.asarray(starts)
