"""Readers: the corpus as a stream of chunks, from a position that can be saved and restored.

    documents -> <bos> text <eos> -> lanes -> chunk {input_ids, shift_labels, document_starts}  [lanes, time]

A document of n tokens gives n + 1 positions: inputs `<bos> t1 .. tn`, targets `t1 .. tn <eos>`. Targets are
made from the whole document before it is cut, so every position of the stream is scored, also at the edges of
chunks. A reader's state holds, for each lane, the current document (its window and its number in the window)
and how many of its tokens have been read. The state travels with the chunk, so a checkpoint records what was
consumed, whatever was prefetched.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..common.errors import UserError
from .chunk import NO_TOKENS, Chunk, Lane, empty_chunk
from .corpus import CorpusSpec, Split
from .document_stream import DocumentStream, Window, WindowAddress
from .read_ahead import Group, GroupStream, encode_document, encode_documents
from .sources import Document
from .tokenizer import Encoder

if TYPE_CHECKING:
    from .lra import LabelledData
    from .mixture import MixtureSpec
    from .synthetic.task import Task

STATE_VERSION = 2  # of a reader's position: 2 reads parts of shards, in an order of (seed, epoch, reader)


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
    num_chunks: int = 1
    """Consecutive chunks that a step reads from each lane, with order `documents`."""


class DocumentReader:
    """Reads with order `documents`: each lane reads its document to the end, then takes the next one of the
    stream.

    Args:
        spec: what all readers share.
        reader: which of them this is.
        state: the state of a chunk after which to resume; None starts at the beginning.
        helpers: further processes that tokenize.
        is_whole: whether the first chunk is to be filled without a second epoch; a source of a mixture may
            have less text.
    """

    def __init__(
        self,
        spec: ReaderSpec,
        reader: int,
        state: dict[str, Any] | None = None,
        helpers: int = 0,
        is_whole: bool = True,
    ):
        assert isinstance(spec.corpus, CorpusSpec)
        self.encoder, self.reader, self.chunk = spec.encoder, reader, spec.chunk
        self.num_chunks = spec.num_chunks
        self.stream = DocumentStream(
            spec.corpus, "train", reader, spec.num_readers, window=spec.window, seed=spec.seed
        )
        self.lanes = [Lane() for _ in range(spec.lanes)]
        self.num_skipped = self.num_filtered = 0
        window, self.number = (WindowAddress(), 0) if state is None else self._restore(state)
        self.groups = GroupStream(self.stream, spec.encoder, window, self.number, helpers)
        if state is None:
            self._check_size(spec.corpus.corpus, spec.num_readers, is_whole)
        self.group = self.groups.take()
        if state is None:
            self.num_skipped, self.num_filtered = self.group.num_skipped, self.group.num_filtered

    def _check_size(self, corpus: str, num_readers: int, is_whole: bool) -> None:
        """Check that there are documents, and if `is_whole` that the first step needs no second epoch."""
        step = self.num_chunks * self.chunk
        needed, lanes = (len(self.lanes) * step, len(self.lanes)) if is_whole else (0, 1)
        groups: list[Group] = []
        count = num_documents = 0
        while not groups or (
            (count < needed or num_documents < lanes)
            and not (groups[-1].is_last and groups[-1].next_address.epoch > 0)
        ):
            groups.append(self.groups.take())
            count += sum(len(tokens) - 1 for tokens in groups[-1].documents)
            num_documents += len(groups[-1].documents)
        self.groups.put_back(groups)
        share = (
            f"reader {self.reader}'s share (1 of {num_readers}) of {corpus}" if num_readers > 1 else corpus
        )
        num_filtered = sum(group.num_filtered for group in groups)
        if not num_documents and num_filtered:
            raise UserError(
                "data.filter",
                f"leaves nothing of {share}: none of {num_filtered:,} documents passes; widen it",
            )
        if not num_documents:
            raise UserError(
                "data.corpus",
                f"{share} holds no documents; use fewer readers (batch.readers) or another corpus",
            )
        if count < needed:
            chunks = f"{self.num_chunks} chunks" if self.num_chunks > 1 else "one chunk"
            names = (
                "batch.lanes, batch.chunk or batch.backprop_chunks"
                if self.num_chunks > 1
                else ("batch.lanes or batch.chunk")
            )
            raise UserError(
                "data.corpus",
                f"{share} has {count} tokens, fewer than {chunks} of {lanes} lanes x {self.chunk}; "
                f"lower {names}",
            )
        if num_documents < lanes:
            raise UserError(
                "data.corpus",
                f"{share} has {num_documents} documents for {lanes} lanes; "
                "lower batch.lanes, or set data.order to continuous (text files) or windows",
            )

    def _restore(self, state: dict[str, Any]) -> tuple[Window, int]:
        """Find the documents of the lanes again; returns the window and the number of the next document."""
        if state.get("version") != STATE_VERSION and not self.stream.is_as_before:
            problem = "was saved by a version of minrnn that read this corpus in another order"
            advice = "finish it with that version, or name another run.dir (model.init_from takes its export)"
            raise UserError("run.dir", f"{problem}; {advice}")
        windows: dict[tuple[int, int], Window] = {}  # most lanes share a few windows

        def find(address: dict[str, Any]) -> Window:
            key = (address["epoch"], address["number"])
            if key not in windows:
                windows[key] = self.stream.window(WindowAddress(**address))
            return windows[key]

        saved_lanes = [
            (lane, saved) for lane, saved in zip(self.lanes, state["lanes"], strict=True) if saved is not None
        ]
        documents = [_document_at(find(saved["window"]), saved["number"]) for _, saved in saved_lanes]
        tokens = encode_documents(self.encoder, documents)
        for (lane, saved), document, its_tokens in zip(saved_lanes, documents, tokens, strict=True):
            lane.start(its_tokens, document.name, saved["window"], saved["number"])
            _check_unchanged(lane, saved)
            lane.offset = saved["offset"]
        self.num_skipped = state["num_skipped"]
        self.num_filtered = state.get("num_filtered", 0)  # older checkpoints have none
        return find(state["window"]), state["number"]

    def next_document(self, lane: Lane) -> None:
        """Start the next document of the stream in a lane."""
        epoch = self.group.window.epoch
        while self.number == self.group.end:
            if self.group.is_last:
                self.number = 0
            self.group = self.groups.take()
            self.num_skipped += self.group.num_skipped
            self.num_filtered += self.group.num_filtered
            if self.group.window.epoch > epoch + 1:  # a whole epoch without a document: there are none
                corpus = self.stream.spec.corpus
                raise UserError(
                    "data.corpus",
                    f"{corpus} holds no documents any more; a run needs its corpus until it ends",
                )
        group, place = self.group, self.number - self.group.first
        lane.start(group.documents[place], group.names[place], group.position, self.number)
        group.documents[place] = NO_TOKENS  # they are freed when the lane has read them
        self.number += 1

    def state(self) -> dict[str, Any]:
        """The reader's position; JSON."""
        lanes = [None if lane.num_remaining == 0 else lane.position() for lane in self.lanes]
        return {
            "version": STATE_VERSION,
            "window": self.group.position,
            "number": self.number,
            "num_skipped": self.num_skipped,
            "num_filtered": self.num_filtered,
            "lanes": lanes,
        }

    def next_chunk(self) -> Chunk:
        """The next `chunk` tokens of every lane, `num_chunks` times: lanes take their next documents in the
        same order as if each chunk were read alone."""
        chunk = empty_chunk(self.reader, len(self.lanes), self.num_chunks * self.chunk)
        for end in range(self.chunk, (self.num_chunks + 1) * self.chunk, self.chunk):
            for row, lane in enumerate(self.lanes):
                column = end - self.chunk
                while column < end:
                    if lane.num_remaining == 0:
                        self.next_document(lane)
                    column += lane.emit(chunk, row, column, end)
        chunk.num_chunks, chunk.state = self.num_chunks, self.state()
        return chunk


def _document_at(window: Window, number: int) -> Document:
    if number >= len(window.documents):
        raise UserError(
            "data.corpus",
            f"has changed: document {number} of window {window.address.number} is gone; "
            "a run can resume only with the corpus it began with",
        )
    return window.documents[number]


def _check_unchanged(lane: Lane, saved: dict[str, Any]) -> None:
    """Check that the document of a lane is the one that was being read."""
    digest = saved.get("digest")  # older checkpoints have none
    # the name may differ: a corpus can move
    name = lane.name if digest == lane.digest else saved["name"]
    if (lane.name, len(lane.tokens)) != (name, saved["length"]):
        was, now = f"{saved['name']} of {saved['length']} tokens", f"{lane.name} of {len(lane.tokens)}"
        raise UserError(
            "data.corpus",
            f"has changed: where {was} was being read there is {now}; "
            "a run can resume only with the corpus it began with",
        )
    if digest is not None and lane.digest != digest:
        raise UserError(
            "data.corpus",
            f"has changed: {lane.name}, which was being read, has other text; "
            "a run can resume only with the corpus it began with",
        )


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

    def skip(self, count: int) -> None:
        """Leave out this many steps."""
        self.step += count


def corpus_tokens(spec: CorpusSpec, part: Split, encoder: Encoder) -> np.ndarray:
    """The tokens of the whole corpus as one text; for training its first part, for validation its last
    part.
    """
    stream = DocumentStream(spec, "all", 0, 1, window=1024, seed=None)
    pieces = [encode_document(encoder, document)[1:-1] for document in stream.one_epoch()]
    tokens = np.concatenate([np.zeros(0, encoder.dtype), *pieces])
    edge = len(tokens) if part == "all" else round(len(tokens) * (1 - spec.held_out))
    return tokens[edge:] if part == "validation" else tokens[:edge]
