"""Held-out documents: each is read whole, every byte is scored, and the state is carried from chunk to chunk.

    documents (up to a budget of tokens) -> distributed over lanes
      -> chunks, padded on the right, until all lanes have ended

With order `windows` the set is the last part of the text, cut into consecutive crops without a carried state,
as in the published set-up.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..common.errors import UserError
from .corpus import CorpusSpec, DocumentStream, Split
from .reader import Chunk, Lane, empty_chunk, encode_document
from .tokenizer import Encoder, num_bytes

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

    @property
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
                        lane.tokens, lane.offset = next(waiting[row]), 0
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


def document_validation(
    spec: CorpusSpec,
    part: Split,
    encoder: Encoder,
    reader: int,
    num_readers: int,
    num_lanes: int,
    chunk: int,
    max_tokens: int | None,
) -> ValidationSet:
    """Every num_readers-th held-out document.

    Documents are taken whole, up to `max_tokens` tokens in all readers together.

    Raises:
        UserError: nothing is held out, or only empty documents.
    """
    stream = DocumentStream(spec, part, 0, 1, window=64, seed=VALIDATION_SEED)
    documents, size, total, has_text = [], 0, 0, False
    for i, document in enumerate(stream.one_epoch()):
        assert document.text is not None
        tokens = encode_document(encoder, document)
        total += len(tokens) - 1
        has_text = has_text or bool(document.text)
        if i % num_readers == reader:
            documents.append(tokens)
            size += num_bytes(document.text)
        if max_tokens is not None and total >= max_tokens:
            break
    if total == 0:
        raise UserError(
            "data.validation_fraction",
            f"no document of {spec.corpus} is held out; raise it, or name a corpus in data.validation",
        )
    if not has_text:
        limit = "" if max_tokens is None else f" up to data.validation_tokens ({max_tokens})"
        raise UserError(
            "data.validation_fraction",
            f"the held-out documents of {spec.corpus} are empty{limit}, so there is nothing to score; "
            "raise it, or name a corpus in data.validation",
        )
    return _distribute(reader, documents, num_lanes, chunk, size)


def window_validation(
    tokens: np.ndarray,
    encoder: Encoder,
    reader: int,
    num_readers: int,
    num_lanes: int,
    chunk: int,
    max_tokens: int | None,
) -> ValidationSet:
    """Every num_readers-th of the consecutive crops of the held-out text.

    Raises:
        UserError: the text is empty.
    """
    tokens = tokens if max_tokens is None else tokens[: max_tokens + 1]
    if len(tokens) < 2:
        raise UserError("data.validation_fraction", "leaves no text for validation; raise it")
    # counted over the whole text, since a crop may begin or end within a character
    size = encoder.num_bytes(tokens[1:]) if reader == 0 else 0
    if reader == 0 and size == 0:
        raise UserError(
            "data.validation_fraction", "leaves tokens for validation that spell no text; raise it"
        )
    starts = range(0, len(tokens) - 1, chunk)
    crops = [tokens[start : start + chunk + 1] for start in starts][reader::num_readers]
    return _distribute(reader, crops, num_lanes, chunk, size)
