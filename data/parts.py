"""Divides the shards of a source among readers, so that each byte is read by one reader.

    S shards, R readers       each reader owns S // R whole shards and its part of the S % R others

The others are cut into units (row groups of parquet files, pieces of JSON lines), and each reader owns a run
of neighbouring units. If there are too few units:

    S >= R    some readers own a shard more than others
    S <  R    several readers read the same unit, and each keeps every k-th of its documents

For a source that can leave documents out without reading them (text files), each reader owns every R-th
document of the other shards. If S is a multiple of R, or at least 8 R, whole shards are even enough.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from .sources import DivisibleSource, Document, Part, Position, Source

EVEN_SHARDS = 8  # shards per reader from which on nothing is cut: a reader has at most 1/8 more than another


@dataclass
class Shares:
    """A source whose shards are the parts that readers own."""

    source: Source
    owned: list[list[Part]]
    """For each reader, its parts."""
    num_parts: int = 0
    """Number of parts that were divided: that of all shards, unless some are held out."""
    note: str | None = None
    """What an uneven or repeated reading costs, for a message."""

    def read(self, part: Part, start: Position) -> Iterator[Document]:
        """Documents of a part from `start` on."""
        return read_part(self.source, part, start)

    def hint(self) -> Any:
        """The hint for the document that the latest `read` would yield next."""
        return self.source.hint()


def read_part(source: Source, part: Part, start: Position) -> Iterator[Document]:
    """Documents of a part. Of a source that is not divisible, the whole shard is read."""
    if isinstance(source, DivisibleSource):
        return source.read_part(part, start)
    assert part.within is None
    return (document for document in source.read(part.shard, start) if part.has(document.index))


def units_of(source: Source, part: Part) -> list[Part]:
    """The smallest parts that a part can be cut into; the part itself if it cannot be cut."""
    if not isinstance(source, DivisibleSource):
        return [part]
    cuts = source.cuts(part.shard)
    begin, end = part.within or (cuts[0], cuts[-1])
    inside = [cut for cut in cuts if begin <= cut <= end]
    if len(inside) <= 2:
        return [part]
    return [replace(part, within=(a, b)) for a, b in pairwise(inside)]


def joined_units(units: Sequence[Part]) -> list[Part]:
    """The units with neighbours of one shard merged."""
    merged: list[Part] = []
    for unit in units:
        last = merged[-1] if merged else None
        if (
            last
            and last.within
            and unit.within
            and (last.shard, last.within[1]) == (unit.shard, unit.within[0])
        ):
            merged[-1] = replace(last, within=(last.within[0], unit.within[1]))
        else:
            merged.append(unit)
    return merged


def divide(source: Source, parts: Sequence[Part], num_readers: int) -> Shares:
    """Divide parts of a source (usually whole shards) among readers. The same for every process."""
    num_whole, num_others = divmod(len(parts), num_readers)
    owned = [list(parts[reader::num_readers]) for reader in range(num_readers)]
    if num_others == 0 or num_whole >= EVEN_SHARDS:
        return Shares(source, owned, len(parts))
    whole = [list(parts[reader : num_whole * num_readers : num_readers]) for reader in range(num_readers)]
    others = parts[num_whole * num_readers :]
    if getattr(source, "skips_unread", False):
        strided = [
            [replace(part, first=reader, step=num_readers) for part in others]
            for reader in range(num_readers)
        ]
        return Shares(source, [a + b for a, b in zip(whole, strided, strict=True)], len(parts))
    units = [unit for part in others for unit in units_of(source, part)]
    if len(units) >= num_readers:
        edges = [reader * len(units) // num_readers for reader in range(num_readers + 1)]
        runs = [joined_units(units[a:b]) for a, b in pairwise(edges)]
        return Shares(source, [a + b for a, b in zip(whole, runs, strict=True)], len(parts))
    if num_whole:
        note = (
            f"{len(parts)} shards do not divide by {num_readers} readers and cannot be cut, so some readers "
            f"own {num_whole + 1} shards and begin their second epoch later than those that own {num_whole}"
        )
        return Shares(source, owned, len(parts), note)
    owned, note = _shared(units, num_readers)
    # a small corpus is read several times within seconds
    return Shares(source, owned, len(parts), note if getattr(source, "is_stream", False) else None)


def _shared(units: Sequence[Part], num_readers: int) -> tuple[list[list[Part]], str]:
    """Shares of units that are fewer than the readers."""
    unit_of = [reader * len(units) // num_readers for reader in range(num_readers)]
    owned = []
    for reader, number in enumerate(unit_of):
        step, first = unit_of.count(number), reader - unit_of.index(number)
        owned.append([replace(units[number], first=first, step=step)])
    kind = "part that can" if len(units) == 1 else "parts that can"
    note = (
        f"{len(units)} {kind} be read separately for {num_readers} readers: each is read by up to "
        f"{-(-num_readers // len(units))} readers, which keep every k-th document; use fewer batch.readers, "
        "or parquet files with more row groups"
    )
    return owned, note
