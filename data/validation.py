"""Held-out documents, read whole: every document of the set, every byte scored, the state carried from chunk to chunk.

    documents (up to a budget of tokens) -> dealt to lanes -> chunks until all lanes have ended, padded on the right

In order `windows` the set is the text's last part, cut into consecutive crops with nothing carried, as the published set-up scores it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .corpus import CorpusSpec, DocumentStream, Split
from .errors import UserError
from .reader import Chunk, Lane, empty_chunk, encode_document
from .tokenizer import Encoder, num_bytes

VALIDATION_SEED = (
    0  # of the order in which held-out documents are taken: one set for every run, whatever its seed
)


@dataclass
class ValidationSet:
    """One reader's share of what is held out."""

    reader: int
    lanes: list[list[np.ndarray]]
    """For each lane, its documents' tokens; lanes in order of falling length, so that those still running are always the first."""
    chunk: int
    """Tokens per lane and chunk."""
    num_bytes: int
    """Bytes of text in the share, what bits per byte divides by."""

    @property
    def num_positions(self) -> int:
        """How many positions are read."""
        return sum(len(tokens) - 1 for documents in self.lanes for tokens in documents)

    def chunks(self) -> Iterator[Chunk]:
        """All documents once. A chunk holds the lanes that are still running: [lanes <= those of the chunk before, time]."""
        lanes = [Lane() for _ in self.lanes]
        waiting = [iter(documents) for documents in self.lanes]
        remaining = [sum(len(tokens) - 1 for tokens in documents) for documents in self.lanes]
        while num_running := sum(count > 0 for count in remaining):
            chunk = empty_chunk(self.reader, num_running, self.chunk)
            for row, lane in enumerate(lanes[:num_running]):
                column = 0
                while column < self.chunk and remaining[row] > 0:
                    if lane.num_left == 0:
                        lane.tokens, lane.offset = next(waiting[row]), 0
                    count = lane.emit(chunk, row, column)
                    column, remaining[row] = column + count, remaining[row] - count
            yield chunk


def _deal(reader: int, documents: list[np.ndarray], num_lanes: int, chunk: int, size: int) -> ValidationSet:
    """The longest document first, each to the emptiest lane."""
    lanes: list[list[np.ndarray]] = [[] for _ in range(num_lanes)]
    sizes = [0] * num_lanes
    for tokens in sorted(documents, key=len, reverse=True):
        emptiest = min(range(num_lanes), key=sizes.__getitem__)
        lanes[emptiest].append(tokens)
        sizes[emptiest] += len(tokens) - 1
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
    """Every num_readers-th document of the set: whole documents until they have `max_tokens` tokens in all readers together (None: all).

    Raises:
        UserError: nothing is held out, or nothing but empty documents.
    """
    stream = DocumentStream(spec, part, 0, 1, window=64, seed=VALIDATION_SEED)
    documents, size, total, has_text = [], 0, 0, False
    for i, record in enumerate(stream.one_epoch()):
        assert record.text is not None
        tokens = encode_document(encoder, record)
        total += len(tokens) - 1
        has_text = has_text or bool(record.text)
        if i % num_readers == reader:
            documents.append(tokens)
            size += num_bytes(record.text)
        if max_tokens is not None and total >= max_tokens:
            break
    if total == 0:
        raise UserError(
            (
                "data.validation_fraction",
                f"no document of {spec.corpus} is held out; raise it, or name a corpus in data.validation",
            )
        )
    if not has_text:
        limit = "" if max_tokens is None else f" up to data.validation_tokens ({max_tokens})"
        raise UserError(
            (
                "data.validation_fraction",
                f"the held-out documents of {spec.corpus} are empty{limit}, so there is nothing to score; "
                "raise it, or name a corpus in data.validation",
            )
        )
    return _deal(reader, documents, num_lanes, chunk, size)


def window_validation(
    tokens: np.ndarray,
    encoder: Encoder,
    reader: int,
    num_readers: int,
    num_lanes: int,
    chunk: int,
    max_tokens: int | None,
) -> ValidationSet:
    """Every num_readers-th of the consecutive crops of a text.

    Raises:
        UserError: the text is empty.
    """
    tokens = tokens if max_tokens is None else tokens[: max_tokens + 1]
    if len(tokens) < 2:
        raise UserError(("data.validation_fraction", "leaves no text for validation; raise it"))
    size = (
        encoder.num_bytes(tokens[1:]) if reader == 0 else 0
    )  # of the whole: a crop's edge may lie within a character
    if reader == 0 and size == 0:
        raise UserError(
            ("data.validation_fraction", "leaves tokens for validation that spell no text; raise it")
        )
    crops = [tokens[start : start + chunk + 1] for start in range(0, len(tokens) - 1, chunk)][
        reader::num_readers
    ]
    return _deal(reader, crops, num_lanes, chunk, size)
