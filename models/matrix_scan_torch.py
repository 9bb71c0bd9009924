"""The matrix scan in chunks, in plain torch: matrix products inside a chunk, a short loop over chunks.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        y_t = S_t^T q_t

With a(i, j) the product of the decays after token j up to token i, s_ij the scores of matrix_scan_scores.py,
and E the state that enters a chunk:

    y_i = E^T (a(i, start) q_i) + sum_{j <= i} s_ij v_j
    leaving state = a(end, start) E + sum_j (a(end, j) k_j) v_j^T

Backward. With dy the gradient of y and R that of the state that leaves a chunk, the loop runs from the end:

    R of the chunk before = a(end, start) R + sum_i (a(i, start) q_i) dy_i^T

Only the inputs are saved; states between chunks and scores are computed again. The largest tensors are the
scores, [C] per token and head, and the states, [K, V] per chunk and head.

Shapes: C tokens in a chunk, M = batch * heads, X = M * chunks; K and V channels of a head; G decays per token
and head, K or 1. Inside of chunks all tensors are fp32 (fp64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .matrix_scan_scores import (
    from_start,
    log_gradient_from_start,
    log_gradient_to_end,
    scores,
    scores_and_gradients,
    to_end,
)

CHUNK = 64


class _Chunks:
    """A sequence in chunks, and the states between them."""

    def __init__(self, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor):
        self.length = min(CHUNK, 1 << (v.shape[1] - 1).bit_length())
        self.num_chunks, self.dtype = -(-v.shape[1] // self.length), state.dtype
        self.k, self.v, self.decay = self.divide(k), self.divide(v), self.divide(log_decay).exp()
        self.from_start, self.to_end = from_start(self.decay), to_end(self.decay)
        self.k_to_end = self.k * self.to_end
        added = torch.bmm(self.k_to_end.mT, self.v)
        self.entering, last = self.carry(added, state.flatten(0, 1))
        self.last = last.view(state.shape)

    def divide(self, x: Tensor) -> Tensor:
        """[batch, time, heads, D] -> [X, C, D] in the dtype of the state; zeros after the last token."""
        if missing := self.num_chunks * self.length - x.shape[1]:
            x = F.pad(x, (0, 0, 0, 0, 0, missing))
        x = x.unflatten(1, (self.num_chunks, self.length)).permute(0, 3, 1, 2, 4)
        return x.flatten(0, 2).contiguous().to(self.dtype)

    def carry(self, added: Tensor, carried: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
        """carried = a(end, start) * carried + added, over chunks from the first to the last, or backwards.

        added [X, K, V], carried [M, K, V] -> what each chunk receives [X, K, V], and what the last one passes
        on [M, K, V].
        """
        whole = self.from_start[:, -1:].mT  # [X, G, 1]
        decays, terms = (x.unflatten(0, (-1, self.num_chunks)).unbind(1) for x in (whole, added))
        received, step = [], -1 if backwards else 1
        for decay, term in zip(decays[::step], terms[::step], strict=True):
            received.append(carried)
            carried = torch.addcmul(term, decay, carried)
        return torch.stack(received[::step], dim=1).flatten(0, 1), carried


def _join(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_Chunks.divide`: [X, C, D] -> [batch, time, heads, D], shape and dtype of `like`."""
    batch, time, heads, _ = like.shape
    x = x.unflatten(0, (batch, heads, -(-time // x.shape[1]))).permute(0, 2, 3, 1, 4)
    return x.flatten(1, 2)[:, :time].to(like.dtype).contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """See `matrix_scan.matrix_scan`: at least one token, no boundaries, the state in its final dtype."""
    with torch.autocast(v.device.type, enabled=False):
        chunks = _Chunks(k, v, log_decay, state)
        q_chunks = chunks.divide(q)
        y = torch.bmm(q_chunks * chunks.from_start, chunks.entering)
        y.baddbmm_(scores(q_chunks, chunks.k, chunks.decay), chunks.v)
        return _join(y, v), chunks.last


def backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, grad_y: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for the arguments of `forward`, in their dtypes, from those for its results."""
    with torch.autocast(v.device.type, enabled=False):
        chunks = _Chunks(k, v, log_decay, state)
        q_chunks, dy = chunks.divide(q), chunks.divide(grad_y)
        q_from_start = q_chunks * chunks.from_start
        leaving, d_state = chunks.carry(
            torch.bmm(q_from_start.mT, dy), grad_last.flatten(0, 1), backwards=True
        )
        # Inside of chunks.
        inside, dq, dk, d_log = scores_and_gradients(
            q_chunks, chunks.k, chunks.decay, torch.bmm(dy, chunks.v.mT)
        )
        # Through the states.
        dv = torch.bmm(inside.mT, dy).baddbmm_(chunks.k_to_end, leaving)
        d_q_from_start = torch.bmm(dy, chunks.entering.mT)
        d_k_to_end = torch.bmm(chunks.v, leaving.mT)
        dq.addcmul_(d_q_from_start, chunks.from_start)
        dk.addcmul_(d_k_to_end, chunks.to_end)
        d_whole = (chunks.entering * leaving).sum(-1).unsqueeze(1) * chunks.from_start[:, -1:]
        d_log_from_start = d_q_from_start.mul_(q_from_start)
        d_log_from_start[:, -1:] += d_whole
        d_log_to_end = d_k_to_end.mul_(chunks.k_to_end)
        if log_decay.shape[-1] != k.shape[-1]:  # one decay for all channels receives the sum
            d_log_from_start, d_log_to_end = (
                x.sum(-1, keepdim=True) for x in (d_log_from_start, d_log_to_end)
            )
        d_log += log_gradient_from_start(d_log_from_start) + log_gradient_to_end(d_log_to_end)
        dq, dk, dv, d_log = (_join(x, to) for x, to in ((dq, q), (dk, k), (dv, v), (d_log, log_decay)))
        return dq, dk, dv, d_log, d_state.view(state.shape)


def summarize(k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The product of all decays [batch, heads, G], and the last state from `state`."""
    with torch.autocast(v.device.type, enabled=False):
        chunks = _Chunks(k, v, log_decay, state)
        decay = chunks.from_start[:, -1].unflatten(0, (*state.shape[:2], chunks.num_chunks)).prod(2)
        return decay, chunks.last
