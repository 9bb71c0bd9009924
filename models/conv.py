"""The causal depthwise convolution, which can be cut exactly like the scan.

    y_t = sum_j weight_j * x_{t-j},    j = 0 .. min(K-1, reach_t)

Tap j reads j tokens back. The state at a cut is the last K-1 inputs. `reach` limits how far back each token
may read, so that no tap reads across a document start and packed documents are convolved like separate ones.
"""

import torch
from torch import Tensor

from .layers_numba import conv_backward, conv_forward
from .numba_support import serves
from .operators import define


def _conv(x: Tensor, weight: Tensor, state: Tensor, reach: Tensor | None) -> Tensor:
    return conv_forward(x.contiguous(), _taps_first(weight), state.contiguous(), reach)


def _conv_fake(x: Tensor, weight: Tensor, state: Tensor, reach: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _conv_backward(
    x: Tensor, weight: Tensor, state: Tensor, reach: Tensor | None, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, d_weight, d_state = conv_backward(
        x.contiguous(), _taps_first(weight), state.contiguous(), reach, grad_y.contiguous()
    )
    return dx, d_weight.flip(0).t().contiguous(), d_state


def _conv_backward_fake(
    x: Tensor, weight: Tensor, state: Tensor, reach: Tensor | None, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=torch.float32),
        state.new_empty(state.shape),
    )


def _taps_first(weight: Tensor) -> Tensor:
    """[width, K], the current token last -> [K, width] fp32, the current token first."""
    return weight.float().t().flip(0).contiguous()


_conv_backward_op = define("causal_conv_backward", _conv_backward, _conv_backward_fake)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, weight, state, reach = ctx.saved_tensors
    dx, d_weight, d_state = _conv_backward_op(x, weight, state, reach, grad_y)
    return dx, d_weight.to(weight.dtype), d_state, None


_conv_op = define("causal_conv", _conv, _conv_fake, _differentiate, _save)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None = None,
    reach: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Depthwise causal convolution.

    Args:
        x: [batch, time, width].
        weight: [width, kernel]; the last column belongs to the current token.
        state: the kernel-1 inputs before x, [batch, kernel-1, width]; zeros if None.
        reach: result of `boundaries.reach_within_document`, or None if no document starts here.
        backend: as in `scan.linear_scan`; "numba" (and None on the CPU) is one kernel.

    Returns:
        [batch, time, width].

    Raises:
        ValueError: shapes that do not fit.
    """
    (batch, time, width), kernel = x.shape, weight.shape[1]
    shapes = {"weight": (width, kernel), "state": (batch, kernel - 1, width), "reach": (batch, time)}
    for name, tensor in (("weight", weight), ("state", state), ("reach", reach)):
        if tensor is not None and tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"causal_conv takes {name} of shape {shapes[name]} here, but got {tuple(tensor.shape)}."
            )
    state = x.new_zeros(batch, kernel - 1, width) if state is None else state.to(x.dtype)
    if serves(x, backend):
        return _conv_op(x, weight, state, reach)
    extended = torch.cat([state, x], dim=1)
    weight = weight.to(x.dtype)
    y = x * weight[:, -1]
    for j in range(1, kernel):
        tap = extended[:, kernel - 1 - j : kernel - 1 - j + time]
        if reach is not None:
            tap = tap.masked_fill((reach < j).unsqueeze(-1), 0)
        y = torch.addcmul(y, tap, weight[:, -1 - j])
    return y


def causal_window(x: Tensor, kernel: int, state: Tensor | None, reach: Tensor | None) -> Tensor:
    """The last `kernel` inputs of each token side by side, the oldest first; 0 where no tap may read.

    A linear layer on them is a full causal convolution.

    Args:
        x, state, reach: as in `causal_conv`.

    Returns:
        [batch, time, kernel * width].
    """
    (batch, time, width), taps = x.shape, kernel - 1
    state = x.new_zeros(batch, taps, width) if state is None else state.to(x.dtype)
    extended = torch.cat([state, x], dim=1)
    windows = [extended[:, j : j + time] for j in range(kernel)]
    if reach is not None:
        windows = [
            window.masked_fill((reach < taps - j).unsqueeze(-1), 0) for j, window in enumerate(windows)
        ]
    return torch.cat(windows, dim=-1)


def conv_gradients(
    x: Tensor, weight: Tensor, state: Tensor, reach: Tensor | None, grad_y: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `causal_conv` for x, weight and state (in x's dtype), from that of y, without a graph."""
    if serves(x, backend):
        dx, d_weight, d_state = _conv_backward(x, weight, state, reach, grad_y)
        return dx, d_weight.to(weight.dtype), d_state
    with torch.enable_grad():
        x, weight, state = (tensor.detach().requires_grad_() for tensor in (x, weight, state))
        dx, d_weight, d_state = torch.autograd.grad(
            causal_conv(x, weight, state, reach, backend), (x, weight, state), grad_y
        )
    return dx, d_weight, d_state


def conv_one_token(x: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`causal_conv` and `next_conv_state` of one token.

    x [batch, 1, width], state [batch, kernel-1, width] -> y, the next state.
    """
    if state is None:
        state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    extended = torch.cat([state.to(x.dtype), x], dim=1)
    return (extended * weight.t().to(x.dtype)).sum(1, keepdim=True), extended[:, 1:].clone()


def next_conv_state(
    x: Tensor,
    state: Tensor | None,
    kernel: int,
    document_starts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The convolution's state at a cut: the last kernel-1 inputs of each row, 0 for earlier documents.

    Args:
        x: [batch, time, width].
        state: the kernel-1 inputs before x, or None.
        document_starts: bool [batch, time], or None if no document starts here.
        lengths: [batch], real tokens of each row (padding is on the right), or None without padding.

    Returns:
        [batch, kernel-1, width].
    """
    batch, _, width = x.shape
    if state is None:
        state = x.new_zeros(batch, kernel - 1, width)
    extended = torch.cat([state.to(x.dtype), x], dim=1)
    return last_inputs(extended, kernel, document_starts, lengths)


def last_inputs(
    extended: Tensor,
    kernel: int,
    document_starts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """`next_conv_state`, where `extended` [batch, kernel-1 + time, width] is its state and x side by side."""
    batch, time, width = extended.shape[0], extended.shape[1] - (kernel - 1), extended.shape[2]
    if lengths is None and document_starts is None:
        return extended[:, time:].clone()
    if lengths is None:
        lengths = torch.full((batch,), time, device=extended.device)
    # [batch, kernel-1], into `extended`
    index = lengths.unsqueeze(1) + torch.arange(kernel - 1, device=extended.device)
    last = extended.gather(1, index.unsqueeze(-1).expand(-1, -1, width))
    if document_starts is None:
        return last
    positions = torch.arange(time, device=extended.device)
    if time:
        newest_start = torch.where(document_starts, positions, -kernel).amax(1)
    else:
        newest_start = lengths.new_full((batch,), -kernel)
    return last.masked_fill((index - (kernel - 1) < newest_start.unsqueeze(1)).unsqueeze(-1), 0)
