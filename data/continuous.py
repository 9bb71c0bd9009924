"""Reads with order `continuous`: every lane reads on through one long text, from a position of its own.

    |      lane 0      |      lane 1      |      lane 2      |  tail for validation  |
      -> reads on through lane 1's part, then lane 2's, then from the beginning

The text is a circle of pieces (long_text.py). Lane i of L, counted over all readers, begins at piece
floor(i x pieces / L), moved by a number drawn from the seed. It reads to the end of the text and goes on at
the beginning of the text. So in each epoch the lanes together read every token once, and a lane's state is
carried through the whole text. Inputs and targets are those of `documents`: `<bos>`, with a reset state,
where a document begins and once where a lane begins; `<eos>` where a document ends. If the tail of a document
is held out, its part for training ends without `<eos>`.

A lane's position is the number of its piece, counted from the first one without end, the number of targets
read in it, and the next input.
"""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..common.errors import UserError
from .chunk import Chunk, consecutive_chunks, empty_chunk
from .corpus import CorpusSpec, open_text
from .files import convert_read_errors
from .long_text import LongText, Piece
from .reader import ReaderSpec
from .tokenizer import Encoder

PIECE_BYTES = (16, 4096)
"""Smallest and largest size of a piece; in between it is an eighth of a lane's part of the text."""


@dataclass
class _Lane:
    piece: int
    """Number of the piece, over all epochs."""
    offset: int
    """Number of the piece's targets already read."""
    input: int
    """The next input token."""
    is_start: bool
    """Whether the state is reset before that token."""
    targets: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32: the tokens of the piece, and <eos> if its document ends"""
    name: str = ""
    digest: str = ""
    """Hash of the targets."""

    def position(self) -> dict[str, Any]:
        """JSON; the digest lets a resumed run recognize the text."""
        return {
            "piece": self.piece,
            "offset": self.offset,
            "input": self.input,
            "is_start": self.is_start,
            "digest": self.digest,
        }


def train_text(spec: CorpusSpec, num_lanes: int) -> LongText:
    """The text to train on, in pieces small enough for this number of lanes.

    Raises:
        UserError: as `open_text`.
    """
    text = open_text(spec, "train")
    size = min(max(text.num_bytes // (8 * num_lanes), PIECE_BYTES[0]), PIECE_BYTES[1])
    return replace(text, piece_bytes=size)


class ContinuousReader:
    """The lanes of one reader.

    Args:
        spec: what all readers share.
        reader: which of them this is.
        state: the state of a chunk after which to resume; None starts at the beginning.

    Raises:
        UserError: the corpus is not made of text files, or is too short for the lanes.
    """

    def __init__(self, spec: ReaderSpec, reader: int, state: dict[str, Any] | None = None):
        assert isinstance(spec.corpus, CorpusSpec)
        self.encoder, self.reader, self.chunk = spec.encoder, reader, spec.chunk
        self.num_chunks = spec.num_chunks
        num_lanes = spec.num_readers * spec.lanes
        self.text = train_text(spec.corpus, num_lanes)
        self.first_pieces = [
            first_piece(self.text.num_pieces, reader * spec.lanes + row, num_lanes, spec.seed)
            for row in range(spec.lanes)
        ]
        if state is None:
            if reader == 0:  # one check is enough, and all readers stop if one has an error
                self.text.check()
                _check_size(self.text, spec)
            self.num_skipped = self.text.num_skipped if reader == 0 else 0
            self.lanes = [_Lane(piece, 0, self.encoder.bos, True) for piece in self.first_pieces]
            self.num_skipped += sum(self._load(lane).text is None for lane in self.lanes)
        else:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.num_skipped = state["num_skipped"]
        self.lanes = []
        for saved in state["lanes"]:
            lane = _Lane(saved["piece"], saved["offset"], saved["input"], saved["is_start"])
            self._load(lane)
            if lane.digest != saved["digest"]:
                raise UserError(
                    "data.corpus",
                    f"has changed: {lane.name}, which was being read, has other text; "
                    "a run can resume only with the corpus it began with",
                )
            self.lanes.append(lane)

    def _load(self, lane: _Lane) -> Piece:
        """Read and encode the lane's piece."""
        piece = self.text.piece(lane.piece % self.text.num_pieces)
        with convert_read_errors(piece.name):
            tokens = self.encoder.encode(piece.text or "")
        end = [self.encoder.eos] if piece.is_end else []
        lane.targets = np.concatenate([tokens, end]).astype(np.int32)
        lane.name = piece.name
        lane.digest = hashlib.blake2b(lane.targets.data, digest_size=4).hexdigest()
        return piece

    def _next_piece(self, lane: _Lane) -> None:
        """Go on to the next piece that has tokens."""
        for _ in range(self.text.num_pieces):
            lane.piece, lane.offset = lane.piece + 1, 0
            piece = self._load(lane)
            self.num_skipped += piece.text is None
            if piece.is_begin or piece.text is None:
                lane.input, lane.is_start = self.encoder.bos, True
            if len(lane.targets):
                return
        raise UserError("data.corpus", f"{self.text.corpus} holds no text that can be read")

    def state(self) -> dict[str, Any]:
        """The reader's position; JSON. The numbers of epochs of all readers add up to those of the run."""
        num_read = sum(
            lane.piece - first + lane.offset / max(len(lane.targets), 1)
            for lane, first in zip(self.lanes, self.first_pieces, strict=True)
        )
        return {
            "lanes": [lane.position() for lane in self.lanes],
            "num_skipped": self.num_skipped,
            "epochs": num_read / self.text.num_pieces,
        }

    def next_chunk(self) -> Chunk:
        """The next `chunk` tokens of every lane, `num_chunks` times."""
        return consecutive_chunks([self._next_chunk() for _ in range(self.num_chunks)])

    def _next_chunk(self) -> Chunk:
        chunk = empty_chunk(self.reader, len(self.lanes), self.chunk)
        for row, lane in enumerate(self.lanes):
            column = 0
            while column < self.chunk:
                if lane.offset == len(lane.targets):
                    self._next_piece(lane)
                column += _emit(lane, chunk, row, column)
        chunk.state = self.state()
        return chunk


def first_piece(num_pieces: int, lane: int, num_lanes: int, seed: int) -> int:
    """The piece at which a lane begins; lanes are counted over all readers."""
    shift = int(np.random.default_rng(seed).integers(max(num_pieces // num_lanes, 1)))
    return lane * num_pieces // num_lanes + shift


def _emit(lane: _Lane, chunk: Chunk, row: int, column: int) -> int:
    """Write as many positions of the piece as fit into a row from `column` on; returns their number."""
    count = min(len(lane.targets) - lane.offset, chunk.input_ids.shape[1] - column)
    targets = lane.targets[lane.offset : lane.offset + count]
    chunk.input_ids[row, column] = lane.input
    chunk.input_ids[row, column + 1 : column + count] = targets[:-1]
    chunk.shift_labels[row, column : column + count] = targets
    chunk.document_starts[row, column] = lane.is_start
    if lane.is_start or not chunk.documents[row]:  # a document, or where in it the chunk begins
        chunk.documents[row].append(lane.name)
    lane.offset, lane.input, lane.is_start = lane.offset + count, int(targets[-1]), False
    return count


def _check_size(text: LongText, spec: ReaderSpec) -> None:
    """Check that every lane has a start of its own, and that the first step does not need a second epoch."""
    num_lanes = spec.num_readers * spec.lanes
    needed = num_lanes * spec.chunk * spec.num_chunks
    lanes = f"{spec.num_readers} readers x " * (spec.num_readers > 1) + f"{spec.lanes} lanes"
    # no tokenizer makes one token of 16 bytes on average
    count = needed if text.num_bytes >= 16 * needed else _count_tokens(text, spec.encoder, needed)
    if count < needed:
        chunks, names = "one chunk", "batch.lanes or batch.chunk"
        if spec.num_chunks > 1:
            chunks, names = f"{spec.num_chunks} chunks", "batch.lanes, batch.chunk or batch.backprop_chunks"
        raise UserError(
            "data.corpus",
            f"{text.corpus} has {count:,} tokens to train on, fewer than {chunks} of {lanes} x "
            f"{spec.chunk}; lower {names}",
        )
    if text.num_pieces < num_lanes:
        raise UserError(
            "data.corpus",
            f"{text.corpus} has {text.num_bytes:,} bytes to train on, too few to give each of {lanes} "
            "a start of its own; lower batch.lanes",
        )


def _count_tokens(text: LongText, encoder: Encoder, needed: int) -> int:
    """The number of tokens, counted until there are as many as needed."""
    count = 0
    for number in range(text.num_pieces):
        piece = text.piece(number)
        count += len(encoder.encode(piece.text or "")) + piece.is_end
        if count >= needed:
            break
    return count
