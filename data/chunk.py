"""Chunks: what a step reads from the lanes of a reader, and the lanes that documents are emitted from."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

IGNORE_INDEX = -100  # target of a position that is not scored, as everywhere in transformers
ARRAYS = ("input_ids", "shift_labels", "document_starts")  # of a chunk
BLOCK = 2**16  # tokens that are converted at once
NO_TOKENS = np.zeros(0, np.uint16)


@dataclass
class Chunk:
    """What one step reads from one reader's lanes: `num_chunks` chunks, one after another in time."""

    reader: int
    input_ids: np.ndarray
    """int64 [lanes, time of all chunks]"""
    shift_labels: np.ndarray
    """As input_ids; -100 where nothing is scored"""
    document_starts: np.ndarray
    """bool, as input_ids"""
    documents: list[list[str]]
    """For each lane, the names of the documents in it."""
    state: dict[str, Any]
    """The reader's position after this chunk; JSON."""
    num_chunks: int = 1
    """Chunks of equal length that it holds."""
    distances: np.ndarray | None = None
    """int64, as input_ids: how many positions back each answer lies; only in the validation of some tasks."""

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: ids as int16 if they fit, which takes 5 bytes per token instead of 17."""
        return self.__dict__ | {name: _narrow(getattr(self, name)) for name in ("input_ids", "shift_labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ids = {name: state[name].astype(np.int64) for name in ("input_ids", "shift_labels")}
        self.__dict__.update(state | ids)

    @property
    def num_scored(self) -> int:
        return int((self.shift_labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        return self.input_ids.size

    def model_inputs(self) -> dict[str, np.ndarray]:
        """The arguments of a language model's forward."""
        inputs = {"input_ids": self.input_ids, "shift_labels": self.shift_labels}
        return {**inputs, "document_starts": self.document_starts} if self.document_starts.any() else inputs

    def columns(self, select: Callable[[np.ndarray], np.ndarray], num_chunks: int) -> "Chunk":
        """The same with other columns: `select` of each array [lanes, time]."""
        arrays = {name: np.ascontiguousarray(select(getattr(self, name))) for name in ARRAYS}
        distances = None if self.distances is None else np.ascontiguousarray(select(self.distances))
        return replace(self, **arrays, num_chunks=num_chunks, distances=distances)

    def single_chunks(self) -> list["Chunk"]:
        """Its chunks in order of time, each with the position after the last."""
        length = self.input_ids.shape[1] // self.num_chunks
        edges = range(0, self.input_ids.shape[1], length)
        return [self.columns(lambda array, i=i: array[:, i : i + length], 1) for i in edges]


def consecutive_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Consecutive chunks of one reader as one, with the position after the last."""
    if len(chunks) == 1:
        return chunks[0]
    arrays = {name: np.concatenate([getattr(chunk, name) for chunk in chunks], axis=1) for name in ARRAYS}
    documents = [list(names) for names in chunks[0].documents]
    for chunk in chunks[1:]:
        for row, names in enumerate(chunk.documents):
            documents[row] += names[bool(not chunk.document_starts[row, 0]) :]
    return replace(chunks[-1], **arrays, documents=documents, num_chunks=len(chunks))


def _narrow(ids: np.ndarray) -> np.ndarray:
    """The same numbers in int16 or, if they do not fit, in int32."""
    return ids.astype(np.int16 if ids.max() < 2**15 else np.int32)


def empty_chunk(reader: int, lanes: int, time: int, pad: int = 0) -> Chunk:
    """A chunk of padding, to be filled in."""
    shape = (lanes, time)
    ids, labels = np.full(shape, pad, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
    return Chunk(reader, ids, labels, np.zeros(shape, bool), [[] for _ in range(lanes)], {})


@dataclass
class Lane:
    """One row of the batch: its current document and the position in it."""

    tokens: np.ndarray = field(default_factory=lambda: NO_TOKENS)
    """unsigned, `<bos> text <eos>`; empty before the first document"""
    offset: int = 0
    """Number of positions already read."""
    last: int = 0
    """Number of positions of the document."""
    name: str = ""
    window: dict[str, Any] | None = None
    """The address of the document's window; JSON."""
    number: int = 0
    """Index of the document in its window."""
    _digest: str | None = None

    def start(
        self, tokens: np.ndarray, name: str = "", window: dict[str, Any] | None = None, number: int = 0
    ) -> None:
        """Begin a document."""
        self.tokens, self.offset, self.name, self._digest = tokens, 0, name, None
        self.last = max(len(tokens) - 1, 0)
        self.window, self.number = window, number

    @property
    def num_remaining(self) -> int:
        return self.last - self.offset

    @property
    def digest(self) -> str:
        """Hash of the document's tokens as int32."""
        if self._digest is None:
            digest = hashlib.blake2b(digest_size=4)
            for start in range(0, len(self.tokens), BLOCK):
                digest.update(self.tokens[start : start + BLOCK].astype(np.int32).data)
            self._digest = digest.hexdigest()
        return self._digest

    def position(self) -> dict[str, Any]:
        """The lane's position; JSON. Name, length and digest let a resumed run recognize the document."""
        assert self.window is not None
        return {
            "window": self.window,
            "number": self.number,
            "name": self.name,
            "length": len(self.tokens),
            "digest": self.digest,
            "offset": self.offset,
        }

    def emit(self, chunk: Chunk, row: int, column: int, end: int | None = None) -> int:
        """Write as many positions as fit into a row of the chunk from `column` to `end` (its own); returns
        their number."""
        start, tokens = self.offset, self.tokens
        num_free = (chunk.input_ids.shape[1] if end is None else end) - column
        count = min(self.last - start, num_free)
        chunk.input_ids[row, column : column + count] = tokens[start : start + count]
        chunk.shift_labels[row, column : column + count] = tokens[start + 1 : start + count + 1]
        names = chunk.documents[row]
        if start == 0:
            chunk.document_starts[row, column] = True
            names.append(self.name)
        elif not names:
            names.append(self.name)
        self.offset = start + count
        return count
