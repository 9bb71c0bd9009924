"""Complex states that are only read out as a sum: N for each channel, with one real input and output.

    h_{t,n} = decay_n h_{t-1,n} + u_t,   y_t = sum_n Re(weight_n h_{t,n})

The composed form (`bounded_scans.py`) writes the 2 N numbers of each channel for every token. On the CPU this
operator replaces it, in fp32 and bf16 (`readout_scan_numba.py`).
"""

import torch
from torch import Tensor

from .boundaries import Boundaries
from .operators import define
from .readout_scan_numba import backward, forward


def _scan(
    u: Tensor,
    decay: Tensor,
    weight: Tensor,
    h0: Tensor,
    document_starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return forward(u, decay, weight, h0, Boundaries(document_starts, lengths))


def _scan_fake(u, decay, weight, h0, document_starts, lengths):
    return u.new_empty(u.shape, dtype=torch.float32), h0.new_empty(h0.shape)


def _scan_backward(
    u: Tensor,
    decay: Tensor,
    weight: Tensor,
    h0: Tensor,
    document_starts: Tensor | None,
    lengths: Tensor | None,
    grad_y: Tensor,
    grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(u, decay, weight, h0, Boundaries(document_starts, lengths), grad_y, grad_last)


def _scan_backward_fake(u, decay, weight, h0, document_starts, lengths, grad_y, grad_last):
    return tuple(x.new_empty(x.shape) for x in (u, decay, weight, h0))


_backward_operator = define("readout_scan_backward", _scan_backward, _scan_backward_fake)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_y: Tensor | None, grad_last: Tensor | None) -> tuple:
    saved = ctx.saved_tensors  # read once: a checkpointed block refuses a second time
    u, _, _, h0, *_ = saved
    grad_y = torch.zeros_like(u, dtype=torch.float32) if grad_y is None else grad_y
    grad_last = torch.zeros_like(h0) if grad_last is None else grad_last
    return *_backward_operator(*saved, grad_y, grad_last), None, None


_operator = define("readout_scan", _scan, _scan_fake, _differentiate, _save)


def readout_scan(
    u: Tensor, decay: Tensor, weight: Tensor, h0: Tensor, boundaries: Boundaries
) -> tuple[Tensor, Tensor]:
    """The scan on the CPU.

    Args:
        u: [batch, time, width], fp32 or bf16.
        decay, weight: real and imaginary parts, [2, N, width] fp32.
        h0: state before the first token, [batch, 2, N, width] fp32.
        boundaries: document starts and padding; `reach` is not read.

    Returns:
        y [batch, time, width] fp32, 0 at padding, and the state after the last token as h0.
    """
    return _operator(u, decay, weight, h0, boundaries.document_starts, boundaries.lengths)
