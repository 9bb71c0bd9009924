"""Boundaries inside a batch: where documents start, and where rows end.

Both kinds are exact in the scan and in the convolution:

- At a document start the carried state is dropped: the decay is 0, the input is kept, and no convolution tap
  reaches across.
- Padding is on the right of each row, from its length on. A padded token has (a, b) = (1, 0) in the
  recurrence, so the state passes through. The convolution's state is taken at the end of the row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Boundaries:
    """Where the state is cut in each row. Computed once per batch and used by every block."""

    document_starts: Tensor | None = None
    """bool [batch, time]: the state before such a token is dropped."""
    lengths: Tensor | None = None
    """int64 [batch], real tokens of each row; padding is on the right."""
    reach: Tensor | None = None
    """int64 [batch, time], how many tokens back the convolution may read; None where no document starts."""

    @classmethod
    def of(cls, document_starts: Tensor | None, lengths: Tensor | None, kernel: int) -> "Boundaries":
        """The boundaries of a batch, with `reach` for a convolution of width `kernel`.

        Document starts in padding are removed.
        """
        if document_starts is None:
            return cls(lengths=lengths)
        if lengths is not None:
            positions = torch.arange(document_starts.shape[1], device=lengths.device)
            document_starts = document_starts & (positions < lengths.unsqueeze(1))
        return cls(document_starts, lengths, reach_within_document(document_starts, kernel))

    def padding(self, time: int) -> Tensor | None:
        """Which tokens of rows of `time` tokens are padding, bool [batch, time]; None without padding."""
        if self.lengths is None:
            return None
        return torch.arange(time, device=self.lengths.device) >= self.lengths.unsqueeze(1)

    def bound(self, a: Tensor, b: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decays and inputs [batch, time, width]: a is 0 at document starts, (a, b) is (1, 0) in padding.

        Args:
            initial: what a document that started at the token would have kept of a state before its first
                token, a * h0 [batch, time, width]; added to b at document starts. None if documents start
                from 0.
        """
        if self.document_starts is not None:
            starts = self.document_starts.unsqueeze(-1)
            if initial is not None:
                b = (b + initial.masked_fill(~starts, 0)).to(b.dtype)
            a = a.masked_fill(starts, 0)
        if (padding := self.padding(b.shape[1])) is not None:
            padding = padding.unsqueeze(-1)
            a, b = a.masked_fill(padding, 1), b.masked_fill(padding, 0)
        return a, b

    def reversed(self, time: int, kernel: int) -> tuple[Tensor | None, "Boundaries"]:
        """The order in which a pass from right to left reads each row, and the boundaries in that order.

        Real tokens are read in reverse order; padding stays on the right. A document is read from its last
        token, which is its start in the new order.

        Args:
            time: length of the rows.
            kernel: width of the convolution.

        Returns:
            Index int64 [batch, time] of the token that is read at each step. Applied twice, it restores the
            row. None without padding, where all rows are flipped. And the boundaries, with `reach`.
        """
        starts, lengths = self.document_starts, self.lengths
        if starts is None and lengths is None:
            return None, self
        order = None
        if lengths is not None:
            positions = torch.arange(time, device=lengths.device)
            order = lengths.unsqueeze(1) - 1 - positions
            order = torch.where(order < 0, positions, order)
        if starts is not None:
            ends = F.pad(starts[:, 1:], (0, 1))
            starts = ends.flip(1) if order is None else ends.gather(1, order)
        return order, Boundaries.of(starts, lengths, kernel)

    def to(self, device: torch.device | str | int) -> "Boundaries":
        """The same on a device: the blocks of a model may be on several devices (`device_map`)."""
        if self.document_starts is None and self.lengths is None:
            return self  # as in each step of decoding
        tensors = self.document_starts, self.lengths, self.reach
        return Boundaries(*(None if tensor is None else tensor.to(device) for tensor in tensors))


NO_BOUNDARIES = Boundaries()


def reach_within_document(document_starts: Tensor, kernel: int) -> Tensor:
    """How many tokens back each token may read, at most kernel-1: bool [batch, time] -> int64 [batch, time].

    Tokens before the first one count as the same document until a document starts.
    """
    positions = torch.arange(document_starts.shape[1], device=document_starts.device)
    newest_start = torch.where(document_starts, positions, -kernel).cummax(1).values
    return (positions - newest_start).clamp(max=kernel - 1)
