"""The causal depthwise convolution, cut as exactly as the scan.

    y_t = sum_j weight_j * x_{t-j},    j = 0 .. K-1

Tap j reads j tokens back. At a cut, the last K-1 inputs are the state. A tap that would reach across a document start reads zero, so that
packed documents are convolved as if each stood alone.
"""

import torch
from torch import Tensor


def taps_within_document(document_starts: Tensor, kernel: int) -> list[Tensor]:
    """For tap j = 1 .. kernel-1, where it may read: no document starts at t-j+1 .. t.

    bool [batch, time] -> bool [batch, time] each.
    """
    allowed, blocked = [], torch.zeros_like(document_starts)
    for j in range(1, kernel):
        shifted = torch.zeros_like(document_starts)
        shifted[:, j - 1 :] = document_starts[:, : max(document_starts.shape[1] - (j - 1), 0)]
        blocked = blocked | shifted
        allowed.append(~blocked)
    return allowed


def causal_conv(x: Tensor, weight: Tensor, state: Tensor | None = None, taps: list[Tensor] | None = None) -> Tensor:
    """Depthwise causal convolution.

    Args:
        x: [batch, time, width].
        weight: [width, kernel]; the last column belongs to the current token.
        state: the kernel-1 inputs before x, [batch, kernel-1, width]; zeros when not given.
        taps: result of `taps_within_document`, or None if no document starts here.

    Returns:
        [batch, time, width].
    """
    (batch, time, width), kernel = x.shape, weight.shape[1]
    if state is None:
        state = x.new_zeros(batch, kernel - 1, width)
    extended = torch.cat([state.to(x.dtype), x], dim=1)
    weight = weight.to(x.dtype)
    y = x * weight[:, -1]
    for j in range(1, kernel):
        tap = extended[:, kernel - 1 - j : kernel - 1 - j + time]
        if taps is not None:
            tap = tap.masked_fill(~taps[j - 1].unsqueeze(-1), 0)
        y = torch.addcmul(y, tap, weight[:, -1 - j])
    return y


def next_conv_state(
    x: Tensor, state: Tensor | None, kernel: int, document_starts: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """What the convolution hands over at a cut: the last kernel-1 inputs of each row, zero where they belong to a document that has ended.

    Args:
        x: [batch, time, width].
        state: the kernel-1 inputs before x, or None.
        document_starts: bool [batch, time], or None if no document starts here.
        lengths: [batch], the number of real tokens of each row where rows are padded on the right, or None if none is.

    Returns:
        [batch, kernel-1, width].
    """
    batch, time, width = x.shape
    if state is None:
        state = x.new_zeros(batch, kernel - 1, width)
    extended = torch.cat([state.to(x.dtype), x], dim=1)
    if lengths is None and document_starts is None:
        return extended[:, time:].clone()
    if lengths is None:
        lengths = torch.full((batch,), time, device=x.device)
    index = lengths.unsqueeze(1) + torch.arange(kernel - 1, device=x.device)  # into extended: [batch, kernel-1]
    last = extended.gather(1, index.unsqueeze(-1).expand(-1, -1, width))
    if document_starts is None:
        return last
    positions = torch.arange(time, device=x.device)
    newest_start = torch.where(document_starts, positions, -kernel).amax(1) if time else lengths.new_full((batch,), -kernel)
    return last.masked_fill((index - (kernel - 1) < newest_start.unsqueeze(1)).unsqueeze(-1), 0)
