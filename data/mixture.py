"""A weighted mixture of corpora: each source gets its share of the tokens.

    source 0: documents in windows  \\
    source 1: documents in windows   >  a free lane takes the next document of the source that lacks most
    source 2: documents in windows  /

Sources are separate: each has its own windows, positions and epochs, and goes through its documents in the
order that it has as the only corpus. Let n_s be the tokens that a reader has read of source s, together with
what its open documents still have (up to CHARGED_AHEAD tokens of each), and n the sum over all sources. With
weights w that sum to 1, a free lane takes the next document of the source with the largest w_s n - n_s. If
documents have at most CHARGED_AHEAD tokens, n_s / n differs from w_s by about a document. A longer document
is counted as it is read. Otherwise one such document would keep all other lanes from its source.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.errors import UserError
from .chunk import Chunk, Lane, consecutive_chunks, empty_chunk
from .corpus import CorpusSpec
from .fingerprint import check_corpus, corpus_fingerprint
from .reader import DocumentReader, ReaderSpec

CHARGED_AHEAD = 65_536
"""Tokens of an open document that are counted before they are read."""


@dataclass(frozen=True)
class MixtureSpec:
    """Identifies a mixture."""

    sources: tuple[CorpusSpec, ...]
    weights: tuple[float, ...]
    """Positive, with sum 1."""

    @property
    def corpus(self) -> str:
        """The names of the sources, for messages."""
        return ", ".join(source.corpus for source in self.sources)


AnyCorpus = CorpusSpec | MixtureSpec


def source_specs(spec: AnyCorpus) -> Sequence[CorpusSpec]:
    """The sources of a mixture, or the corpus itself."""
    return spec.sources if isinstance(spec, MixtureSpec) else (spec,)


class MixtureReader:
    """The lanes of one reader.

    Each source has a `DocumentReader` with as many lanes as the mixture. Lane i of a source has a document
    while lane i of the mixture reads this source.

    Args:
        spec: what all readers share; its corpus is a `MixtureSpec`.
        reader: which of them this is.
        state: the state of a chunk after which to resume; None starts at the beginning.
        helpers: further processes that tokenize, for the sources with the largest weights first.

    Raises:
        UserError: a source cannot be read, or has no document for this reader.
    """

    def __init__(self, spec: ReaderSpec, reader: int, state: dict[str, Any] | None = None, helpers: int = 0):
        assert isinstance(spec.corpus, MixtureSpec)
        self.reader, self.chunk, self.weights = reader, spec.chunk, spec.corpus.weights
        self.num_chunks = spec.num_chunks
        positions = [None] * len(self.weights) if state is None else state["sources"]
        self.sources = [
            DocumentReader(dataclasses.replace(spec, corpus=source), reader, position, count, is_whole=False)
            for source, position, count in zip(
                spec.corpus.sources, positions, _helpers_of(self.weights, helpers), strict=True
            )
        ]
        self.tokens = [0] * len(self.sources) if state is None else list(state["tokens"])
        self.counted = [
            count + sum(_counted_ahead(lane) for lane in source.lanes)
            for count, source in zip(self.tokens, self.sources, strict=True)
        ]
        self.current = [self._source_of(row) for row in range(spec.lanes)]

    def _source_of(self, row: int) -> int | None:
        """The source that a lane reads."""
        reading = (i for i, source in enumerate(self.sources) if source.lanes[row].num_remaining)
        return next(reading, None)

    def _next_source(self) -> int:
        """The source that lacks most tokens; the first of several."""
        total = sum(self.counted)
        lacking = [weight * total - count for weight, count in zip(self.weights, self.counted, strict=True)]
        return max(range(len(lacking)), key=lacking.__getitem__)

    def _lane(self, row: int) -> tuple[int, Lane]:
        """A lane with something to read, and its source."""
        source = self.current[row]
        while source is None or self.sources[source].lanes[row].num_remaining == 0:
            self.current[row] = source = self._next_source()
            lane = self.sources[source].lanes[row]
            self.sources[source].next_document(lane)
            self.counted[source] += _counted_ahead(lane)
        return source, self.sources[source].lanes[row]

    def state(self) -> dict[str, Any]:
        """The reader's position; JSON."""
        sources = [source.state() for source in self.sources]
        return {
            "sources": sources,
            "tokens": list(self.tokens),
            "num_skipped": sum(source["num_skipped"] for source in sources),
            "num_filtered": sum(source["num_filtered"] for source in sources),
        }

    def next_chunk(self) -> Chunk:
        """The next `chunk` tokens of every lane, `num_chunks` times."""
        return consecutive_chunks([self._next_chunk() for _ in range(self.num_chunks)])

    def _next_chunk(self) -> Chunk:
        lanes = len(self.current)
        chunk = empty_chunk(self.reader, lanes, self.chunk)
        for row in range(lanes):
            column = 0
            while column < self.chunk:
                source, lane = self._lane(row)
                ahead = _counted_ahead(lane)
                count = lane.emit(chunk, row, column)
                self.tokens[source] += count
                self.counted[source] += count + _counted_ahead(lane) - ahead
                column += count
        chunk.state = self.state()
        return chunk


def _helpers_of(weights: Sequence[float], helpers: int) -> list[int]:
    """The number of helpers of each source."""
    order = sorted(range(len(weights)), key=lambda source: -weights[source])
    return [len(range(order.index(source), helpers, len(weights))) for source in range(len(weights))]


def _counted_ahead(lane: Lane) -> int:
    return min(lane.num_remaining, CHARGED_AHEAD)


def mixture_fingerprint(spec: AnyCorpus) -> dict[str, Any] | None:
    """`corpus_fingerprint` of each source, or of the corpus itself.

    Raises:
        UserError: a file cannot be read.
    """
    if isinstance(spec, CorpusSpec):
        return corpus_fingerprint(spec)
    return {"sources": [corpus_fingerprint(source) for source in spec.sources]}


def check_mixture(before: dict[str, Any], spec: AnyCorpus, order: str, num_readers: int) -> str | None:
    """`check_corpus` for each source, or for the corpus itself; returns their notes.

    Args:
        before: what `mixture_fingerprint` returned.
        order, num_readers: as in `check_corpus`; a source has an order of its own.

    Raises:
        UserError: the changes of all sources.
    """
    saved = before.get("sources")
    if isinstance(spec, CorpusSpec) and saved is None:
        return check_corpus(before, spec, order, num_readers)
    if isinstance(spec, CorpusSpec) or saved is None or len(saved) != len(spec.sources):
        return None  # another corpus: the comparison of recipes refuses it
    notes, errors = [], []
    for source, fingerprint in zip(spec.sources, saved, strict=True):
        source_order = "continuous" if source.passages else "documents"
        try:
            if fingerprint is not None:
                notes.append(check_corpus(fingerprint, source, source_order, num_readers))
        except UserError as error:
            errors += error.errors
    if errors:
        raise UserError.from_list(errors)
    return "; ".join(filter(None, notes)) or None
