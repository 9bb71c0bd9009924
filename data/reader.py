"""Readers: the corpus as a stream of chunks, from a position that can be saved and restored.

    documents -> <bos> text <eos> -> lanes -> chunk {input_ids, shift_labels, document_starts}  [lanes, time]

A document of n tokens gives n + 1 positions: inputs `<bos> t1 .. tn`, targets `t1 .. tn <eos>`. Targets are
made from the whole document before it is cut, so every position of the stream is scored, also at the edges of
chunks. A reader's state holds, for each lane, the current document (its window and its number in the window)
and how many of its tokens have been read. The state travels with the chunk, so a checkpoint records what was
consumed, whatever was prefetched.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..common.errors import UserError
from .corpus import CorpusSpec, DocumentStream, Split, Window, WindowAddress
from .files import convert_read_errors
from .sources import Document
from .tokenizer import Encoder

if TYPE_CHECKING:
    from .lra import LabelledData
    from .mixture import MixtureSpec
    from .synthetic.task import Task

IGNORE_INDEX = -100  # target of a position that is not scored, as everywhere in transformers


@dataclass(frozen=True)
class ReaderSpec:
    """The arguments that all readers of a run share; sent to the workers."""

    corpus: "CorpusSpec | MixtureSpec"
    order: Literal["documents", "continuous", "windows"]
    encoder: Encoder
    num_readers: int
    """Number of readers of the whole run."""
    lanes: int
    chunk: int
    """Tokens per lane and chunk."""
    window: int
    """Documents that are shuffled together."""
    seed: int
    """Of the shuffle."""
    task: "Task | LabelledData | None" = None
    """A task, read instead of the corpus."""


@dataclass
class Chunk:
    """What one step reads from one reader's lanes."""

    reader: int
    input_ids: np.ndarray
    """int64 [lanes, time]"""
    shift_labels: np.ndarray
    """int64 [lanes, time]; -100 where nothing is scored"""
    document_starts: np.ndarray
    """bool [lanes, time]"""
    documents: list[list[str]]
    """For each lane, the names of the documents in it."""
    state: dict[str, Any]
    """The reader's position after this chunk; JSON."""

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


def empty_chunk(reader: int, lanes: int, time: int, pad: int = 0) -> Chunk:
    """A chunk of padding, to be filled in."""
    shape = (lanes, time)
    ids, labels = np.full(shape, pad, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
    return Chunk(reader, ids, labels, np.zeros(shape, bool), [[] for _ in range(lanes)], {})


@dataclass
class Lane:
    """One row of the batch: its current document and the position in it."""

    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32, `<bos> text <eos>`; empty before the first document"""
    offset: int = 0
    """Number of positions already read."""
    name: str = ""
    window: WindowAddress | None = None
    number: int = 0
    """Index of the document in its window."""
    digest: str = ""
    """Hash of the document's tokens."""

    @property
    def num_remaining(self) -> int:
        return max(len(self.tokens) - 1 - self.offset, 0)

    def position(self) -> dict[str, Any]:
        """The lane's position; JSON. Name, length and digest let a resumed run recognize the document."""
        assert self.window is not None
        return {
            "window": asdict(self.window),
            "number": self.number,
            "name": self.name,
            "length": len(self.tokens),
            "digest": self.digest,
            "offset": self.offset,
        }

    def emit(self, chunk: Chunk, row: int, column: int) -> int:
        """Write as many positions as fit into a row of the chunk from `column` on; returns their number."""
        count = min(self.num_remaining, chunk.input_ids.shape[1] - column)
        piece = self.tokens[self.offset : self.offset + count + 1]
        chunk.input_ids[row, column : column + count] = piece[:-1]
        chunk.shift_labels[row, column : column + count] = piece[1:]
        chunk.document_starts[row, column] = self.offset == 0
        chunk.documents[row].append(self.name)
        self.offset += count
        return count


def encode_document(encoder: Encoder, document: Document) -> np.ndarray:
    """The tokens of a document, `<bos> text <eos>`, without `<eos>` if the text goes on after it.

    Raises:
        UserError: the tokenizer fails, or the document does not fit into memory; the message names the
            document.
    """
    with convert_read_errors(document.name):
        tokens = encoder(document.text or "")
    return tokens[:-1] if document.is_cut else tokens


class DocumentReader:
    """Reads with order `documents`: each lane reads its document to the end, then takes the next one of the
    stream.

    Args:
        spec: what all readers share.
        reader: which of them this is.
        state: the state of a chunk after which to resume; None starts at the beginning.
        is_whole: whether the first chunk is to be filled without a second epoch; a source of a mixture may
            have less text.
    """

    def __init__(
        self, spec: ReaderSpec, reader: int, state: dict[str, Any] | None = None, is_whole: bool = True
    ):
        assert isinstance(spec.corpus, CorpusSpec)
        self.encoder, self.reader, self.chunk = spec.encoder, reader, spec.chunk
        self.stream = DocumentStream(
            spec.corpus, "train", reader, spec.num_readers, window=spec.window, seed=spec.seed
        )
        self.lanes = [Lane() for _ in range(spec.lanes)]
        if state is None:
            self.window, self.number = self.stream.window(WindowAddress()), 0
            self.num_skipped = self.window.num_skipped
            self._check_size(spec.corpus.corpus, spec.num_readers, is_whole)
        else:
            self._restore(state)

    def _check_size(self, corpus: str, num_readers: int, is_whole: bool) -> None:
        """Check that there are documents, and if `is_whole` that the first chunk needs no second epoch."""
        needed, lanes = (len(self.lanes) * self.chunk, len(self.lanes)) if is_whole else (0, 0)
        documents, address = list(self.window.documents), self.window.next_address
        count = sum(len(encode_document(self.encoder, document)) - 1 for document in documents[: needed + 1])
        while (count < needed or len(documents) < lanes) and address.epoch == 0:
            next_address = self.stream.window(address)
            documents += next_address.documents
            count += sum(
                len(encode_document(self.encoder, document)) - 1 for document in next_address.documents
            )
            address = next_address.next_address
        share = (
            f"reader {self.reader}'s share (1 of {num_readers}) of {corpus}" if num_readers > 1 else corpus
        )
        if not documents:
            raise UserError(
                "data.corpus",
                f"{share} holds no documents; use fewer readers (batch.readers) or another corpus",
            )
        if count < needed:
            raise UserError(
                "data.corpus",
                f"{share} has {count} tokens, fewer than one chunk of {lanes} lanes x {self.chunk}; "
                "lower batch.lanes or batch.chunk",
            )
        if len(documents) < lanes:
            raise UserError(
                "data.corpus",
                f"{share} has {len(documents)} documents for {lanes} lanes; "
                "lower batch.lanes, or set data.order to continuous (text files) or windows",
            )

    def _restore(self, state: dict[str, Any]) -> None:
        windows: dict[tuple[int, int], Window] = {}  # most lanes share a few windows

        def find(address: dict[str, Any]) -> Window:
            key = (address["epoch"], address["number"])
            if key not in windows:
                windows[key] = self.stream.window(WindowAddress(**address))
            return windows[key]

        for lane, saved in zip(self.lanes, state["lanes"], strict=True):
            if saved is not None:
                self._start(lane, find(saved["window"]), saved["number"])
                if (lane.name, len(lane.tokens)) != (saved["name"], saved["length"]):
                    was, now = (
                        f"{saved['name']} of {saved['length']} tokens",
                        f"{lane.name} of {len(lane.tokens)}",
                    )
                    raise UserError(
                        "data.corpus",
                        f"has changed: where {was} was being read there is {now}; "
                        "a run can resume only with the corpus it began with",
                    )
                if lane.digest != saved.get("digest", lane.digest):  # older checkpoints have no digest
                    raise UserError(
                        "data.corpus",
                        f"has changed: {lane.name}, which was being read, has other text; "
                        "a run can resume only with the corpus it began with",
                    )
                lane.offset = saved["offset"]
        self.window, self.number = find(state["window"]), state["number"]
        self.num_skipped = state["num_skipped"]

    def _start(self, lane: Lane, window: Window, number: int) -> None:
        if number >= len(window.documents):
            raise UserError(
                "data.corpus",
                f"has changed: document {number} of window {window.address.number} is gone; "
                "a run can resume only with the corpus it began with",
            )
        document = window.documents[number]
        lane.tokens, lane.offset = encode_document(self.encoder, document), 0
        lane.name, lane.window, lane.number = document.name, window.address, number
        lane.digest = hashlib.blake2b(lane.tokens.data, digest_size=4).hexdigest()

    def next_document(self, lane: Lane) -> None:
        """Start the next document of the stream in a lane."""
        epoch = self.window.address.epoch
        while self.number == len(self.window.documents):
            self.window, self.number = self.stream.window(self.window.next_address), 0
            self.num_skipped += self.window.num_skipped
            if self.window.address.epoch > epoch + 1:  # a whole epoch without a document: there are none
                corpus = self.stream.spec.corpus
                raise UserError(
                    "data.corpus",
                    f"{corpus} holds no documents any more; a run needs its corpus until it ends",
                )
        self._start(lane, self.window, self.number)
        self.number += 1

    def state(self) -> dict[str, Any]:
        """The reader's position; JSON."""
        lanes = [None if lane.num_remaining == 0 else lane.position() for lane in self.lanes]
        return {
            "window": asdict(self.window.address),
            "number": self.number,
            "num_skipped": self.num_skipped,
            "lanes": lanes,
        }

    def next_chunk(self) -> Chunk:
        """The next `chunk` tokens of every lane."""
        chunk = empty_chunk(self.reader, len(self.lanes), self.chunk)
        for row, lane in enumerate(self.lanes):
            column = 0
            while column < self.chunk:
                if lane.num_remaining == 0:
                    self.next_document(lane)
                column += lane.emit(chunk, row, column)
        chunk.state = self.state()
        return chunk


class WindowReader:
    """Reads with order `windows`: crops of one long text, drawn by (seed, step, reader), with no state
    carried.

    This is the published character-level Shakespeare set-up. The text is all documents concatenated; its last
    part (the fraction `held_out`) is for validation.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        reader: int,
        lanes: int,
        chunk: int,
        seed: int,
        state: dict[str, Any] | None = None,
    ):
        if len(tokens) <= chunk:
            raise UserError(
                "data.corpus",
                f"the text has {len(tokens)} tokens, too few for a crop of batch.chunk {chunk} + 1",
            )
        self.tokens, self.reader, self.lanes, self.chunk, self.seed = tokens, reader, lanes, chunk, seed
        self.step = 0 if state is None else state["step"]

    def next_chunk(self) -> Chunk:
        """The crops of the next step."""
        generator = np.random.default_rng([self.seed, self.step, self.reader])
        chunk = empty_chunk(self.reader, self.lanes, self.chunk)
        for row, start in enumerate(generator.integers(0, len(self.tokens) - self.chunk, self.lanes)):
            piece = self.tokens[start : start + self.chunk + 1]
            chunk.input_ids[row], chunk.shift_labels[row] = piece[:-1], piece[1:]
            chunk.documents[row].append(f"tokens {start} to {start + self.chunk}")
        chunk.document_starts[:, 0] = True
        self.step += 1
        chunk.state = {"step": self.step}
        return chunk


def corpus_tokens(spec: CorpusSpec, part: Split, encoder: Encoder) -> np.ndarray:
    """The tokens of the whole corpus as one text, int32; for training its first part, for validation its last
    part.
    """
    stream = DocumentStream(spec, "all", 0, 1, window=1024, seed=None)
    pieces = [encode_document(encoder, document)[1:-1] for document in stream.one_epoch()]
    tokens = np.concatenate(pieces) if pieces else np.zeros(0)
    edge = len(tokens) if part == "all" else round(len(tokens) * (1 - spec.held_out))
    return (tokens[edge:] if part == "validation" else tokens[:edge]).astype(np.int32)
