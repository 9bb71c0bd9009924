"""The recurrences that cells are made of, exact at every cut.

    linear      h_t = a_t h_{t-1} + b_t                       per channel
    rotating    h_t = a_t exp(i theta) h_{t-1} + b_t          per pair of channels, a complex number
    readout     y_t = sum_n Re(w_n h_{t,n}), rotating h      n complex states for each channel
    matrix      S_t = diag(a_t) S_{t-1} + k_t v_t^T           per head, read out as y_t = S_t^T q_t
    max_plus    m_t = max(m_{t-1} - w_t, k_t)                 per channel, without gradients
    previous    h_{t-1}

Each starts from the state before the batch, drops it at document starts, and passes it through padding
(boundaries.py). The linear and the rotating recurrence can begin documents from a learnt state h0 in place of
0: at a document start, (a, b) becomes (0, a h0 + b). Each also works on one process's slice of a text
(context_parallel.py) and on a single token.

Shapes: B batch, T time, W width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .boundaries import Boundaries
from .context_parallel import ContextGroup
from .context_scan import LinearScan, MatrixScan, ReadoutScan, RotatingScan, context_max_plus, context_scan
from .dtypes import accumulate_dtype, at_least_fp32
from .matrix_scan import matrix_scan
from .max_plus import EMPTY, max_plus_scan
from .numba_support import serves
from .readout_scan import readout_scan
from .rotating_scan import rotate, rotating_scan
from .scan import default_backend, linear_scan


class Scanned(NamedTuple):
    """The result of a scan."""

    h: Tensor
    """[B, T, W]; undefined at padding."""
    last: Tensor
    """State after the last token, [B, W], fp32 (fp64)."""
    entering: Tensor
    """State before the first token of this process's slice, [B, W]: what `previous` needs."""


class BoundedScans:
    """The scans of one batch.

    Args:
        boundaries: document starts and padding of the batch.
        backend: as in `scan.linear_scan`.
        group: the processes that share the sequence, or None.
        is_single_token: the batch is one token per row in inference, without boundaries.
    """

    def __init__(
        self,
        boundaries: Boundaries,
        backend: str | None,
        group: ContextGroup | None,
        *,
        is_single_token: bool = False,
    ):
        self.boundaries, self.backend, self.group = boundaries, backend, group
        self.is_single_token = is_single_token
        self.starts_documents = boundaries.document_starts is not None

    def linear(self, a: Tensor, b: Tensor, h0: Tensor | None, initial: Tensor | None = None) -> Scanned:
        """The diagonal recurrence. a, b [B, T, W] (a may be [W]), h0 [B, W]; h in b's dtype.

        initial [W] is the state before each document that starts in the batch; 0 if None.
        """
        a = a.expand(b.shape)
        if self.is_single_token:
            last = at_least_fp32(b[:, 0]) if h0 is None else torch.addcmul(b[:, 0].to(h0.dtype), a[:, 0], h0)
            return Scanned(last.unsqueeze(1).to(b.dtype), last, _zeros(a, b) if h0 is None else h0)
        kept = a * initial if initial is not None and self.starts_documents else None
        a, b = self.boundaries.bound(a, b, kept)
        h0 = _zeros(a, b) if h0 is None else h0
        if self.group is not None:
            backend = self.backend or default_backend(b.device, b.dtype)
            return Scanned(*context_scan(LinearScan(backend), self.group, h0, a, b))
        h, last = linear_scan(a, b, h0, backend=self.backend)
        return Scanned(h, last, h0)

    def rotating(
        self, a: Tensor, theta: Tensor, b: Tensor, h0: Tensor | None, initial: Tensor | None = None
    ) -> Scanned:
        """The complex diagonal recurrence.

        Args:
            a: absolute values of the decays, [B, T, W/2] or [W/2].
            theta: their angles in radians, [W/2].
            b: inputs, real parts | imaginary parts, [B, T, W].
            h0: state before the first token, as b, [B, W].
            initial: state before each document that starts in the batch, as b, [W]; 0 if None.

        Returns:
            h as b, in at least fp32.
        """
        b = at_least_fp32(b)
        a = at_least_fp32(a).expand(*b.shape[:2], theta.shape[0])
        if self.is_single_token:
            turned = _zeros(a, b) if h0 is None else rotate(h0, theta.cos(), theta.sin())
            last = torch.addcmul(b[:, 0], torch.cat([a, a], dim=-1)[:, 0], turned)
            return Scanned(last.unsqueeze(1), last, turned)
        kept = None
        if initial is not None and self.starts_documents:
            kept = torch.cat([a, a], dim=-1) * rotate(initial, theta.cos(), theta.sin())
        a, b = self.boundaries.bound(a, b, kept)
        h0 = _zeros(a, b) if h0 is None else h0
        backend = self.backend or default_backend(b.device, b.dtype)
        if self.group is not None:
            return Scanned(*context_scan(RotatingScan(backend), self.group, h0, a, theta, b))
        h, last = rotating_scan(a, theta, b, h0, backend)
        return Scanned(h, last if self.boundaries.lengths is None else self._last_real(h, h0), h0)

    def readout(self, a: Tensor, theta: Tensor, weight: Tensor, u: Tensor, h0: Tensor | None) -> Scanned:
        """Complex states that are only read out as a sum: N for each channel of a real input.

            h_{t,n} = a_n exp(i theta_n) h_{t-1,n} + u_t,   y_t = sum_n Re(weight_n h_{t,n})

        Args:
            a, theta: absolute values and angles of the decays, [W, N].
            weight: real and imaginary parts, [2, W, N].
            u: inputs, [B, T, W].
            h0: state before the first token, real parts | imaginary parts, [B, 2 W N].

        Returns:
            y [B, T, W], in at least fp32, and the state as h0.
        """
        if serves(u, self.backend):
            shape = (len(u), 2, *a.shape)
            state = a.new_zeros(shape) if h0 is None else h0.view(shape)
            decay = torch.stack([a * theta.cos(), a * theta.sin()])
            decay, weight, state = (x.transpose(-1, -2).float() for x in (decay, weight, state))
            if self.group is None:
                y, last = readout_scan(u, decay, weight, state, self.boundaries)
            else:
                scan = ReadoutScan(self.boundaries)
                y, last, state = context_scan(scan, self.group, state, u, decay, weight)
            return Scanned(y, *(x.transpose(-1, -2).flatten(1) for x in (last, state)))
        b = at_least_fp32(u).repeat_interleave(a.shape[1], dim=-1)
        b = torch.cat([b, torch.zeros_like(b)], dim=-1)
        h, last, entering = self.rotating(a.flatten(), theta.flatten(), b, h0)
        y = h * torch.cat([weight[0].flatten(), -weight[1].flatten()])
        return Scanned(y.unflatten(-1, (2, *a.shape)).sum((-3, -1)), last, entering)

    def matrix(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None
    ) -> Scanned:
        """The recurrence of a state matrix per head.

        Args:
            q, k, v, log_decay: as in `matrix_scan`, with N heads.
            state: before the first token, [B, N K V].

        Returns:
            y [B, T, N, V] in v's dtype.
        """
        # Of the backends of `linear_scan`, numba and triton have no kernels for matrices.
        backend = self.backend if self.backend in ("reference", "torch") else None
        (batch, _, num_heads, num_keys), num_values = k.shape, v.shape[-1]
        if state is None:
            dtype = torch.promote_types(v.dtype, torch.float32)
            state = v.new_zeros(batch, num_heads * num_keys * num_values, dtype=dtype)
        matrix = state.view(batch, num_heads, num_keys, num_values)
        if self.group is None:
            y, last = matrix_scan(q, k, v, log_decay, matrix, boundaries=self.boundaries, backend=backend)
            return Scanned(y, last.flatten(1), state)
        log_decay = torch.zeros_like(q[..., :1]) if log_decay is None else log_decay
        scan = MatrixScan(backend, self.boundaries.document_starts)
        y, last, entering = context_scan(scan, self.group, matrix, q, k, v, log_decay)
        return Scanned(y, last.flatten(1), entering.flatten(1))

    def max_plus(self, w: Tensor, key: Tensor, m0: Tensor | None) -> Scanned:
        """A running maximum that falls by w from token to token, as a constant.

        w [W] or [B, T, W], key [B, T, W] fp32, m0 [B, W].
        """
        w, key = w.detach().expand(key.shape), key.detach()
        if self.is_single_token and m0 is not None:
            last = torch.maximum(m0 - w[:, 0], key[:, 0])
            return Scanned(last.unsqueeze(1), last, m0)
        if self.boundaries.document_starts is not None:
            w = w.masked_fill(self.boundaries.document_starts.unsqueeze(-1), -EMPTY)
        if (padding := self.boundaries.padding(key.shape[1])) is not None:
            padding = padding.unsqueeze(-1)
            w, key = w.masked_fill(padding, 0), key.masked_fill(padding, EMPTY)
        m0 = key.new_full((key.shape[0], key.shape[2]), EMPTY) if m0 is None else m0.detach()
        if self.group is not None:
            m, last, entering = context_max_plus(w, key, m0, self.group)
            return Scanned(m, last, entering)
        m, last = max_plus_scan(w, key, m0)
        return Scanned(m, last, m0)

    def previous(self, scanned: Scanned, empty: float | Tensor = 0.0) -> Tensor:
        """h_{t-1} of a scan's result, `empty` (a number, or [W]) at document starts: [B, T, W]."""
        entering = scanned.entering.to(scanned.h.dtype).unsqueeze(1)
        before = torch.cat([entering, scanned.h], dim=1)[:, :-1]
        starts = self.boundaries.document_starts
        if starts is None:
            return before
        if isinstance(empty, Tensor):
            return torch.where(starts.unsqueeze(-1), empty.to(before.dtype), before)
        return before.masked_fill(starts.unsqueeze(-1), empty)

    def _last_real(self, h: Tensor, h0: Tensor) -> Tensor:
        """The state after the last real token of each row, as a rotation does not stand still in padding."""
        lengths = self.boundaries.lengths
        assert lengths is not None
        states = torch.cat([h0.to(h.dtype).unsqueeze(1), h], dim=1)
        return states.gather(1, lengths.view(-1, 1, 1).expand(-1, 1, h.shape[2])).squeeze(1)


def _zeros(a: Tensor, b: Tensor) -> Tensor:
    return b.new_zeros(b.shape[0], b.shape[2], dtype=accumulate_dtype(a, b))
