"""Cell and scan as one operation: pre-activations in, outputs and the last state out.

    projected [B, T, P*R] = gates | candidate u [| output gate o]        P projections of R channels, as one matrix product left them
    y, h_last = cell_scan(projected, gate_bias, h0, ...)                 y = h [* silu(o)],   h_t = a_t * h_{t-1} + b_t

Composed from `cells.py` and `linear_scan`, it writes a (fp32) and b to memory and reads them again, forward and backward. Fused, nothing but
projections in and outputs out crosses the memory bus: per element of a minGRU in bf16, 6 bytes forward (2 read, 1 written) and 12 backward (4
read, 2 written), where the composed form moves about 40 and 80. The gradient of all projections is one tensor, so no concatenation follows.

Two kinds of boundary, exact in both forms:

- where a document starts, the carried state is dropped (a = 0, b is kept);
- where a row is padded (on the right, from `lengths` on), the state passes through: (a, b) = (1, 0).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .cell_scan_numba import backward as numba_backward
from .cell_scan_numba import forward as numba_forward
from .cell_scan_triton import backward as triton_backward
from .cell_scan_triton import forward as triton_forward
from .cells import CANDIDATE_ACTIVATIONS, CELLS
from .dtypes import at_least_fp32
from .operators import define
from .scan import check_backend, check_one_device, default_backend, linear_scan, linear_scan_with_decay

FUSED_CELLS = ("mingru", "minlstm")
FUSED_DTYPES = {
    "numba": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def composed(
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    document_starts: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    activation: str,
    output_gate: bool,
    want_decay: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation as it is defined, from its parts: y, h_last, and the product of all decays (empty unless wanted)."""
    num_gates, width = gate_bias.shape
    parts = projected.split(width, dim=-1)
    a, b = CELLS[cell].coefficients(
        *(parts[i] + gate_bias[i] for i in range(num_gates)), parts[num_gates], activation
    )
    if lengths is not None:
        is_pad = torch.arange(projected.shape[1], device=projected.device) >= lengths.unsqueeze(1)
        a, b = a.masked_fill(is_pad.unsqueeze(-1), 1), b.masked_fill(is_pad.unsqueeze(-1), 0)
        document_starts = None if document_starts is None else document_starts & ~is_pad
    if document_starts is not None:
        a = a.masked_fill(document_starts.unsqueeze(-1), 0)
    if want_decay:
        h, h_last, decay = linear_scan_with_decay(a, b, h0, backend=backend)
    else:
        (h, h_last), decay = linear_scan(a, b, h0, backend=backend), a.new_empty(0)
    return (h * torch.nn.functional.silu(parts[-1]) if output_gate else h), h_last, decay


def one_token(
    projected: Tensor, gate_bias: Tensor, h0: Tensor | None, cell: str, activation: str, output_gate: bool
) -> tuple[Tensor, Tensor]:
    """`cell_scan` of one token, in operations that `torch.compile` makes one kernel of: [B, 1, P*R], h0 [B, R] -> y [B, 1, R], h [B, R]."""
    num_gates, width = gate_bias.shape
    parts = at_least_fp32(projected).split(width, dim=-1)
    a, b = CELLS[cell].coefficients(
        *(parts[i] + gate_bias[i] for i in range(num_gates)), parts[num_gates], activation
    )
    h = b[:, 0] if h0 is None else torch.addcmul(b[:, 0], a[:, 0], h0.to(a.dtype))
    y = h.unsqueeze(1)
    return (y * torch.nn.functional.silu(parts[-1]) if output_gate else y).to(projected.dtype), h


def _register(name: str, forward: Callable, backward: Callable) -> Callable:
    """Make a backend's two functions one differentiable operator, `minrnn_HASH::cell_scan_NAME`."""

    def scan(
        projected: Tensor,
        gate_bias: Tensor,
        h0: Tensor,
        document_starts: Tensor | None,
        lengths: Tensor | None,
        cell: str,
        activation: str,
        output_gate: bool,
        want_decay: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return forward(
            projected, gate_bias, h0, document_starts, lengths, cell, activation, output_gate, want_decay
        )

    def fake(projected, gate_bias, h0, document_starts, lengths, cell, activation, output_gate, want_decay):
        (batch, time, _), width = projected.shape, gate_bias.shape[1]
        y, h_last = projected.new_empty(batch, time, width), h0.new_empty(h0.shape, dtype=torch.float32)
        return (
            y,
            torch.empty_like(y) if output_gate else y.new_empty(0),
            h_last,
            h_last.new_empty(h0.shape if want_decay else 0),
        )

    def scan_backward(
        projected: Tensor,
        gate_bias: Tensor,
        h0: Tensor,
        document_starts: Tensor | None,
        lengths: Tensor | None,
        h: Tensor,
        grad_y: Tensor,
        grad_last: Tensor,
        cell: str,
        activation: str,
        output_gate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward(
            projected,
            gate_bias,
            h0,
            document_starts,
            lengths,
            h,
            grad_y,
            grad_last,
            cell,
            activation,
            output_gate,
        )

    def fake_backward(
        projected,
        gate_bias,
        h0,
        document_starts,
        lengths,
        h,
        grad_y,
        grad_last,
        cell,
        activation,
        output_gate,
    ):
        contiguous = torch.empty_like(projected, memory_format=torch.contiguous_format)
        return (
            contiguous,
            gate_bias.new_empty(gate_bias.shape, dtype=torch.float32),
            h0.new_empty(h0.shape, dtype=torch.float32),
        )

    backward_operator = define(f"cell_scan_backward_{name}", scan_backward, fake_backward)

    def setup_context(ctx, inputs, output) -> None:
        *tensors, cell, activation, output_gate, _ = inputs
        ctx.save_for_backward(*tensors, output[1] if output_gate else output[0])
        ctx.options = cell, activation, output_gate

    def differentiate(ctx, grad_y: Tensor | None, _, grad_last: Tensor | None, __) -> tuple:
        projected, gate_bias, h0, document_starts, lengths, h = ctx.saved_tensors
        grad_y = torch.zeros_like(h) if grad_y is None else grad_y
        grad_last = torch.zeros_like(h0, dtype=torch.float32) if grad_last is None else grad_last
        grads = backward_operator(
            projected, gate_bias, h0, document_starts, lengths, h, grad_y, grad_last, *ctx.options
        )
        d_projected, d_bias, dh0 = grads
        return d_projected, d_bias.to(gate_bias.dtype), dh0.to(h0.dtype), None, None, None, None, None, None

    return define(f"cell_scan_{name}", scan, fake, differentiate, setup_context)


_KERNELS = {"numba": (numba_forward, numba_backward), "triton": (triton_forward, triton_backward)}
_FUSED = {name: _register(name, *kernels) for name, kernels in _KERNELS.items()}


def _is_fused(projected: Tensor, cell: str, backend: str) -> bool:
    return cell in FUSED_CELLS and projected.dtype in FUSED_DTYPES.get(backend, ())


def _check(
    projected: Tensor, gate_bias: Tensor, h0: Tensor | None, document_starts: Tensor | None, lengths: Tensor | None,
    cell: str, activation: str, output_gate: bool, backend: str,
) -> None:  # fmt: skip
    check_backend(backend, projected.device, projected.dtype)
    for what, name, known in (
        ("cell", cell, tuple(CELLS)),
        ("candidate activation", activation, CANDIDATE_ACTIVATIONS),
    ):
        if name not in known:
            raise ValueError(f"There is no {what} {name!r}; choose one of {', '.join(known)}.")
    num_gates, num_parts = CELLS[cell].num_gates, CELLS[cell].num_gates + 1 + int(output_gate)
    width = gate_bias.shape[-1]
    if (
        gate_bias.shape != (num_gates, width)
        or projected.ndim != 3
        or projected.shape[2] != num_parts * width
    ):
        raise ValueError(
            f"cell_scan takes projected [batch, time, {num_parts} * width] and gate_bias [{num_gates}, width] for {cell!r}"
            f"{' with an output gate' if output_gate else ''}, but got {tuple(projected.shape)} and {tuple(gate_bias.shape)}."
        )
    batch, time, _ = projected.shape
    shapes = {"h0": (batch, width), "document_starts": (batch, time), "lengths": (batch,)}
    tensors = {"h0": h0, "document_starts": document_starts, "lengths": lengths}
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"cell_scan takes {name} of shape {shapes[name]}, but got {tuple(tensor.shape)}."
            )
    if document_starts is not None and document_starts.dtype != torch.bool:
        raise ValueError(f"cell_scan takes document_starts as bool, but got {document_starts.dtype}.")
    check_one_device({"gate_bias": gate_bias, **tensors}, projected.device)


def cell_scan(
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None = None,
    *,
    cell: str,
    activation: str = "none",
    output_gate: bool = False,
    document_starts: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of a cell, from its projections.

    Args:
        projected: [batch, time, (num_gates + 1 + output_gate) * width]: the gates' pre-activations in the order of the cell's formula, then the
            candidate's, then the output gate's.
        gate_bias: [num_gates, width], added to the gates in fp32.
        h0: state before the first token, [batch, width] fp32; zeros when not given.
        cell: one of `cells.CELLS`; fused are "mingru" and "minlstm", the others are composed.
        activation: candidate activation, one of `cells.CANDIDATE_ACTIVATIONS`.
        output_gate: multiply h by silu of the last projection.
        document_starts: bool [batch, time]: the state before such a token is dropped.
        lengths: int64 [batch], real tokens of each row; what follows is padding and leaves the state as it is.
        backend: as in `linear_scan`. "numba" and "triton" are fused for fp32 and bf16 (triton: fp16 too); fp64 and the other backends compose.

    Returns:
        y [batch, time, width] in projected's dtype (at padding it means nothing), and h_last [batch, width] in fp32 (fp64 if projected is).

    Raises:
        ValueError: names that are not known, shapes, dtypes or devices that do not fit, or a backend that cannot run here.
    """
    y, h_last, _ = _cell_scan(
        projected, gate_bias, h0, document_starts, lengths, cell, activation, output_gate, False, backend
    )
    return y, h_last


def cell_scan_with_decay(
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None = None,
    *,
    cell: str,
    activation: str = "none",
    output_gate: bool = False,
    document_starts: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cell_scan`, and the product of all decays, [batch, width] in the state's dtype: h_last = decay * h0 + (h_last from h0 = 0).

    A document start makes it 0, padding counts as 1. No gradient flows through it.
    """
    y, h_last, decay = _cell_scan(
        projected, gate_bias, h0, document_starts, lengths, cell, activation, output_gate, True, backend
    )
    return y, h_last, decay.detach()


def _cell_scan(
    projected: Tensor, gate_bias: Tensor, h0: Tensor | None, document_starts: Tensor | None, lengths: Tensor | None,
    cell: str, activation: str, output_gate: bool, want_decay: bool, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    backend = backend or default_backend(projected.device, projected.dtype)
    _check(projected, gate_bias, h0, document_starts, lengths, cell, activation, output_gate, backend)
    if not _is_fused(projected, cell, backend):
        return composed(
            projected,
            gate_bias,
            h0,
            document_starts,
            lengths,
            cell,
            activation,
            output_gate,
            want_decay,
            backend,
        )
    if h0 is None:
        h0 = projected.new_zeros(projected.shape[0], gate_bias.shape[1], dtype=torch.float32)
    options = cell, activation, output_gate, want_decay
    y, _, h_last, decay = _FUSED[backend](projected, gate_bias, h0, document_starts, lengths, *options)
    return y, h_last, decay


@torch.no_grad()
def summarize(
    projected: Tensor, gate_bias: Tensor, document_starts: Tensor | None, cell: str, activation: str, output_gate: bool, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What these tokens do to the state, h -> decay * h + last: both [batch, width] in the state's dtype, without a graph."""
    h0 = projected.new_zeros(
        projected.shape[0], gate_bias.shape[1], dtype=torch.promote_types(projected.dtype, torch.float32)
    )
    _check(projected, gate_bias, h0, document_starts, None, cell, activation, output_gate, backend)
    arguments = projected, gate_bias, h0, document_starts, None, cell, activation, output_gate, True
    if not _is_fused(projected, cell, backend):
        _, last, decay = composed(*arguments, backend)
    else:  # not the operator, whose outputs selective recomputation would keep
        _, _, last, decay = _KERNELS[backend][0](*arguments)
    return decay, last


@torch.no_grad()
def scan_without_graph(
    projected: Tensor, gate_bias: Tensor, h0: Tensor, document_starts: Tensor | None,
    cell: str, activation: str, output_gate: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`cell_scan`'s y, and the h that `scan_gradients` needs: y itself without an output gate, empty where the parts are composed."""
    arguments = projected, gate_bias, h0, document_starts, None, cell, activation, output_gate, False
    if not _is_fused(projected, cell, backend):
        y = composed(*arguments, backend)[0]
        return y, y.new_empty(0)
    y, h, _, _ = _FUSED[backend](*arguments)
    return y, h if output_gate else y


def scan_gradients(
    projected: Tensor, gate_bias: Tensor, h0: Tensor, document_starts: Tensor | None, h: Tensor, grad_y: Tensor, grad_last: Tensor,
    cell: str, activation: str, output_gate: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for projected, gate_bias and h0 from those of y and h_last; `h` as `scan_without_graph` gave it."""
    if _is_fused(projected, cell, backend):
        arguments = (
            projected,
            gate_bias,
            h0,
            document_starts,
            None,
            h,
            grad_y,
            grad_last,
            cell,
            activation,
            output_gate,
        )
        return _KERNELS[backend][1](*arguments)
    with torch.enable_grad():
        projected, gate_bias, h0 = (tensor.detach().requires_grad_() for tensor in (projected, gate_bias, h0))
        y, h_last, _ = composed(
            projected, gate_bias, h0, document_starts, None, cell, activation, output_gate, False, backend
        )
        d_projected, d_gate_bias, dh0 = torch.autograd.grad(
            (y, h_last), (projected, gate_bias, h0), (grad_y, grad_last)
        )
    return d_projected, d_gate_bias, dh0
