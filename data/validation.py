"""Held-out documents: each is read whole, every byte is scored, and the state is carried from chunk to chunk.

    documents (up to a budget of tokens) -> HeldOut, kept in a file (validation_file.py)
      -> every R-th for a reader, distributed over lanes
      -> chunks, padded on the right, until all lanes have ended

With order `windows` the set is the last part of the text, cut into consecutive crops without a carried state,
as in the published set-up.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..common.errors import UserError
from .chunk import Chunk, Lane, empty_chunk
from .corpus import CorpusSpec, Split
from .document_stream import DocumentStream
from .read_ahead import encode_document
from .sources import TextFiles
from .tokenizer import Encoder

VALIDATION_SEED = 0  # of the order in which held-out documents are taken: the same for every run


@dataclass
class ValidationSet:
    """One reader's share of the held-out documents."""

    reader: int
    lanes: list[list[np.ndarray]]
    """The documents of each lane, as tokens.

    Lanes are sorted by falling length: those not yet finished come first.
    """
    chunk: int
    """Tokens per lane and chunk."""
    num_bytes: int
    """Bytes of text in the share: the divisor of bits per byte."""
    source: str = ""
    """Name of its source in a mixture."""

    @functools.cached_property
    def num_positions(self) -> int:
        """Number of positions to read."""
        return sum(len(tokens) - 1 for documents in self.lanes for tokens in documents)

    def chunks(self) -> Iterator[Chunk]:
        """Read all documents once.

        A chunk holds the lanes that are not finished: [lanes <= those of the previous chunk, time].
        """
        lanes = [Lane() for _ in self.lanes]
        waiting = [iter(documents) for documents in self.lanes]
        remaining = [sum(len(tokens) - 1 for tokens in documents) for documents in self.lanes]
        while num_running := sum(count > 0 for count in remaining):
            chunk = empty_chunk(self.reader, num_running, self.chunk)
            for row, lane in enumerate(lanes[:num_running]):
                column = 0
                while column < self.chunk and remaining[row] > 0:
                    if lane.num_remaining == 0:
                        lane.start(next(waiting[row]))
                    count = lane.emit(chunk, row, column)
                    column, remaining[row] = column + count, remaining[row] - count
            yield chunk


def _distribute(
    reader: int, documents: list[np.ndarray], num_lanes: int, chunk: int, size: int
) -> ValidationSet:
    """Distribute documents over lanes: the longest document first, each to the shortest lane."""
    lanes: list[list[np.ndarray]] = [[] for _ in range(num_lanes)]
    sizes = [0] * num_lanes
    for tokens in sorted(documents, key=len, reverse=True):
        shortest = min(range(num_lanes), key=sizes.__getitem__)
        lanes[shortest].append(tokens)
        sizes[shortest] += len(tokens) - 1
    order = sorted(range(num_lanes), key=lambda lane: -sizes[lane])
    return ValidationSet(reader, [lanes[lane] for lane in order], chunk, size)


@dataclass
class HeldOut:
    """The held-out text as tokens, for all readers."""

    tokens: np.ndarray
    """Integers [sum of lengths]: one document after another."""
    lengths: np.ndarray
    """int64 [documents]: tokens of each, with bos and eos. Order `windows` has one, without these."""
    sizes: np.ndarray
    """int64 [documents]: bytes of the text of each."""
    num_read: int
    """Documents that were read to find these."""
    sources: np.ndarray | None = None
    """int64 [documents]: the source of each in a mixture; None: there is one."""

    def of_source(self, number: int) -> "HeldOut":
        """The documents of one source."""
        if self.sources is None:
            return self
        chosen = self.sources == number
        tokens = self.tokens[np.repeat(chosen, self.lengths)]
        return HeldOut(tokens, self.lengths[chosen], self.sizes[chosen], self.num_read)

    def documents(self, reader: int, num_readers: int, num_lanes: int, chunk: int) -> ValidationSet:
        """Every num_readers-th document."""
        ends = np.cumsum(self.lengths)
        numbers = range(reader, len(ends), num_readers)
        documents = [self.tokens[ends[i] - self.lengths[i] : ends[i]] for i in numbers]
        return _distribute(reader, documents, num_lanes, chunk, int(self.sizes[reader::num_readers].sum()))

    def crops(self, reader: int, num_readers: int, num_lanes: int, chunk: int) -> ValidationSet:
        """Every num_readers-th of the consecutive crops of the text."""
        starts = range(0, len(self.tokens) - 1, chunk)
        crops = [self.tokens[start : start + chunk + 1] for start in starts][reader::num_readers]
        # counted over the whole text, since a crop may begin or end within a character
        return _distribute(reader, crops, num_lanes, chunk, int(self.sizes.sum()) if reader == 0 else 0)


def concatenated(parts: Sequence[HeldOut]) -> HeldOut:
    """The held-out documents of the sources of a mixture."""
    return HeldOut(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        sum(part.num_read for part in parts),
        np.repeat(np.arange(len(parts)), [len(part.lengths) for part in parts]),
    )


def held_out_documents(
    spec: CorpusSpec,
    part: Split,
    encoder: Encoder,
    max_tokens: int | None,
    after_document: Callable[[], None] = lambda: None,
) -> HeldOut:
    """Held-out documents, whole, up to `max_tokens` tokens in all. They are read once, in one pass.

    Args:
        after_document: called after each document.

    Raises:
        UserError: nothing is held out, or only empty documents.
    """
    stream = DocumentStream(spec, part, 0, 1, window=64, seed=VALIDATION_SEED)
    documents, sizes, total = [], [], 0
    for document in stream.one_epoch():
        documents.append(encode_document(encoder, document))
        sizes.append(document.num_bytes)
        total += len(documents[-1]) - 1
        after_document()
        if max_tokens is not None and total >= max_tokens:
            break
    if total == 0:
        documents = f"document of {spec.corpus}"
        if spec.rules.as_settings()["filter"]:
            documents += " that passes data.filter"
        advice = "raise it, or name a corpus in data.validation"
        if isinstance(stream.shares.source, TextFiles):
            advice += ", or hold out the end of the text with data.order continuous"
        raise UserError("data.validation_fraction", f"no {documents} is held out; {advice}")
    if not sum(sizes):
        limit = "" if max_tokens is None else f" up to data.validation_tokens ({max_tokens})"
        raise UserError(
            "data.validation_fraction",
            f"the held-out documents of {spec.corpus} are empty{limit}, so there is nothing to score; "
            "raise it, or name a corpus in data.validation",
        )
    lengths = np.array(list(map(len, documents)), np.int64)
    return HeldOut(np.concatenate(documents), lengths, np.array(sizes, np.int64), stream.num_read)


def held_out_text(tokens: np.ndarray, encoder: Encoder, max_tokens: int | None) -> HeldOut:
    """The held-out end of a text that is read with order `windows`, up to `max_tokens` tokens.

    Raises:
        UserError: the text is empty.
    """
    tokens = tokens if max_tokens is None else tokens[: max_tokens + 1]
    if len(tokens) < 2:
        raise UserError("data.validation_fraction", "leaves no text for validation; raise it")
    size = encoder.num_bytes(tokens[1:])
    if size == 0:
        raise UserError(
            "data.validation_fraction", "leaves tokens for validation that spell no text; raise it"
        )
    return HeldOut(tokens, np.array([len(tokens)]), np.array([size]), num_read=1)
