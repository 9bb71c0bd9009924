"""Cell and scan as one operation: pre-activations in, outputs and the last state out.

    projected [B, T, P*R] = gates | candidate u [| output gate o]   P projections of R channels
    y, h_last = cell_scan(projected, gate_bias, h0, spec=...)       y = h [* silu(o)], h_t = a_t h_{t-1} + b_t

The operation is defined as a composition of `minimal_coefficients.py` and `linear_scan`. That form writes a
(fp32) and b to memory and reads them again, forward and backward. The fused kernels move only projections and
outputs over the memory bus: per element of a minGRU in bf16, 6 bytes forward (4 read, 2 written) and 12
backward (8 read, 4 written), where the composed form moves about 40 and 80. The gradient of all projections
is one tensor, so no concatenation follows.

Both forms treat document starts and padding exactly (boundaries.py).
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .boundaries import NO_BOUNDARIES, Boundaries
from .cell_scan_numba import backward as numba_backward
from .cell_scan_numba import forward as numba_forward
from .cell_scan_triton import backward as triton_backward
from .cell_scan_triton import forward as triton_forward
from .cell_spec import CellInputs, CellSpec, check_shapes, empty_rows, zero_state
from .dtypes import at_least_fp32
from .operators import define
from .scan import check_backend, check_one_device, default_backend, linear_scan, linear_scan_with_decay


def cell_scan(
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None = None,
    *,
    spec: CellSpec,
    boundaries: Boundaries = NO_BOUNDARIES,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state of a cell, from its projections.

    Args:
        projected: [batch, time, spec.num_projections * width]: the gates' pre-activations in the order of the
            cell's formula, then the candidate's, then the output gate's.
        gate_bias: [spec.num_rows, width]: biases, added to the gates in fp32, and the cell's constants.
        h0: state before the first token, [batch, width] fp32; zeros if None. A row of zeros is no state: the
            RG-LRU does not scale the token after it.
        spec: cell, candidate activation, output gate.
        boundaries: document starts and padding; `reach` is not read.
        backend: as in `linear_scan`. "numba" and "triton" are fused for their `FUSED_CELLS` in fp32 and bf16
            (triton: fp16 too); other cells, fp64 and the other backends are composed.

    Returns:
        y [batch, time, width] in projected's dtype (undefined at padding), and h_last [batch, width] in fp32
        (fp64 if projected is fp64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run here.
    """
    backend = backend or default_backend(projected.device, projected.dtype)
    inputs = checked_inputs(projected, gate_bias, h0, spec, boundaries, backend=backend)
    y, h_last, _ = _run(inputs, spec, backend=backend, return_decay=False)
    return y, h_last


def cell_scan_with_decay(
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None = None,
    *,
    spec: CellSpec,
    boundaries: Boundaries = NO_BOUNDARIES,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cell_scan`, and the product of all decays, [batch, width] in the state's dtype.

    h_last = decay * h0 + (h_last from h0 = 0; RG-LRU: from h0 near 0). A document start makes the product 0;
    padding counts as 1. No gradient flows through it.
    """
    backend = backend or default_backend(projected.device, projected.dtype)
    inputs = checked_inputs(projected, gate_bias, h0, spec, boundaries, backend=backend)
    y, h_last, decay = _run(inputs, spec, backend=backend, return_decay=True)
    return y, h_last, decay.detach()


def _run(
    inputs: CellInputs, spec: CellSpec, *, backend: str, return_decay: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not spec.is_fused(inputs.projected.dtype, backend):
        return composed(inputs, spec, backend=backend, return_decay=return_decay)
    y, _, h_last, decay = _call_operator(inputs, spec, backend=backend, return_decay=return_decay)
    return y, h_last, decay


def checked_inputs(
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    spec: CellSpec,
    boundaries: Boundaries,
    *,
    backend: str,
) -> CellInputs:
    """The inputs of a cell scan, with h0 = 0 if None. Raises ValueError as `cell_scan` does."""
    check_backend(backend, projected.device, projected.dtype)
    check_shapes(spec, projected, gate_bias, h0, boundaries)
    tensors = {"gate_bias": gate_bias, "h0": h0}
    tensors |= {"document_starts": boundaries.document_starts, "lengths": boundaries.lengths}
    check_one_device(tensors, projected.device)
    h0 = zero_state(projected, gate_bias) if h0 is None else h0
    return CellInputs(projected, gate_bias, h0, boundaries, empty_rows(h0, spec))


def composed(
    inputs: CellInputs, spec: CellSpec, *, backend: str, return_decay: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation as defined, from its parts: y, h_last, decay (empty without `return_decay`)."""
    projected, gate_bias = inputs.projected, inputs.gate_bias
    projections = projected.split(gate_bias.shape[1], dim=-1)
    a, b = inputs.boundaries.bound(*spec.coefficients(projections, gate_bias, inputs.starts()))
    if return_decay:
        h, h_last, decay = linear_scan_with_decay(a, b, inputs.h0, backend=backend)
    else:
        (h, h_last), decay = linear_scan(a, b, inputs.h0, backend=backend), a.new_empty(0)
    return spec.gated(h, projections), h_last, decay


def one_token(
    projected: Tensor, gate_bias: Tensor, h0: Tensor | None, spec: CellSpec
) -> tuple[Tensor, Tensor]:
    """`cell_scan` of one token: [B, 1, P*R], h0 [B, R] -> y [B, 1, R], h [B, R].

    These are plain operations, which `torch.compile` fuses into one kernel.
    """
    projections = at_least_fp32(projected).split(gate_bias.shape[1], dim=-1)
    is_empty = empty_rows(zero_state(projected, gate_bias) if h0 is None else h0, spec)
    starts = None if is_empty is None else is_empty[:, None, None]
    a, b = spec.coefficients(projections, gate_bias, starts)
    h = b[:, 0] if h0 is None else torch.addcmul(b[:, 0], a[:, 0], h0.to(a.dtype))
    return spec.gated(h.unsqueeze(1), projections).to(projected.dtype), h


# The torch operators. Their schemas take only tensors, strings and bools: inputs and spec are flattened here.


def _flatten(inputs: CellInputs) -> tuple[Tensor | None, ...]:
    tensors, boundaries = (inputs.projected, inputs.gate_bias, inputs.h0), inputs.boundaries
    return *tensors, boundaries.document_starts, boundaries.lengths, inputs.is_empty


def _fake(projected, gate_bias, h0, *others):
    """Empty outputs of the forward operator."""
    *_, output_gate, return_decay = others
    (batch, time, _), width = projected.shape, gate_bias.shape[1]
    y, h_last = projected.new_empty(batch, time, width), h0.new_empty(h0.shape, dtype=torch.float32)
    h = torch.empty_like(y) if output_gate else y.new_empty(0)
    return y, h, h_last, h_last.new_empty(h0.shape if return_decay else 0)


def _fake_backward(projected, gate_bias, h0, *_):
    """Empty outputs of the backward operator."""
    d_projected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    d_gate_bias = gate_bias.new_empty(gate_bias.shape, dtype=torch.float32)
    return d_projected, d_gate_bias, h0.new_empty(h0.shape, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    *tensors, cell, activation, output_gate, _ = inputs
    ctx.save_for_backward(*tensors, output[1] if output_gate else output[0])
    ctx.spec = cell, activation, output_gate


def _register(name: str, forward: Callable, backward: Callable) -> Callable:
    """Make a backend's two functions one differentiable operator, `minrnn_HASH::cell_scan_NAME`."""

    def scan(
        projected: Tensor,
        gate_bias: Tensor,
        h0: Tensor,
        document_starts: Tensor | None,
        lengths: Tensor | None,
        is_empty: Tensor | None,
        cell: str,
        activation: str,
        output_gate: bool,
        return_decay: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = CellInputs(projected, gate_bias, h0, Boundaries(document_starts, lengths), is_empty)
        return forward(inputs, CellSpec(cell, activation, output_gate), return_decay)

    def scan_backward(
        projected: Tensor,
        gate_bias: Tensor,
        h0: Tensor,
        document_starts: Tensor | None,
        lengths: Tensor | None,
        is_empty: Tensor | None,
        h: Tensor,
        grad_y: Tensor,
        grad_last: Tensor,
        cell: str,
        activation: str,
        output_gate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = CellInputs(projected, gate_bias, h0, Boundaries(document_starts, lengths), is_empty)
        return backward(inputs, CellSpec(cell, activation, output_gate), h, grad_y, grad_last)

    backward_operator = define(f"cell_scan_backward_{name}", scan_backward, _fake_backward)

    def differentiate(ctx, grad_y: Tensor | None, _, grad_last: Tensor | None, __) -> tuple:
        *tensors, h = ctx.saved_tensors
        _, gate_bias, h0, *_ = tensors
        grad_y = torch.zeros_like(h) if grad_y is None else grad_y
        grad_last = torch.zeros_like(h0, dtype=torch.float32) if grad_last is None else grad_last
        d_projected, d_bias, dh0 = backward_operator(*tensors, h, grad_y, grad_last, *ctx.spec)
        return d_projected, d_bias.to(gate_bias.dtype), dh0.to(h0.dtype), *(None,) * 7

    return define(f"cell_scan_{name}", scan, _fake, differentiate, _save)


_KERNELS = {"numba": (numba_forward, numba_backward), "triton": (triton_forward, triton_backward)}
_OPERATORS = {name: _register(name, *kernels) for name, kernels in _KERNELS.items()}


def _call_operator(
    inputs: CellInputs, spec: CellSpec, *, backend: str, return_decay: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h (empty without an output gate), h_last, decay (empty without `return_decay`)."""
    return _OPERATORS[backend](*_flatten(inputs), spec.cell, spec.activation, spec.output_gate, return_decay)


# What context parallelism needs: the operation and its gradients without a graph.


@torch.no_grad()
def summarize(inputs: CellInputs, spec: CellSpec, backend: str) -> tuple[Tensor, Tensor]:
    """(decay, last), each [batch, width] in the state's dtype.

    The tokens map a state h to decay * h + last. `inputs.h0` is not read.
    """
    inputs = dataclasses.replace(inputs, h0=zero_state(inputs.projected, inputs.gate_bias))
    _, last, decay = _run(inputs, spec, backend=backend, return_decay=True)
    return decay, last


@torch.no_grad()
def scan_without_graph(inputs: CellInputs, spec: CellSpec, backend: str) -> tuple[Tensor, Tensor]:
    """y of `cell_scan`, and h for `scan_gradients`: y itself without an output gate, empty if composed."""
    if not spec.is_fused(inputs.projected.dtype, backend):
        y = composed(inputs, spec, backend=backend, return_decay=False)[0]
        return y, y.new_empty(0)
    y, h, _, _ = _call_operator(inputs, spec, backend=backend, return_decay=False)
    return y, h if spec.output_gate else y


def scan_gradients(
    inputs: CellInputs, spec: CellSpec, backend: str, *, h: Tensor, grad_y: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for projected, gate_bias and h0 from those of y and h_last; `h` from `scan_without_graph`."""
    if spec.is_fused(inputs.projected.dtype, backend):
        return _KERNELS[backend][1](inputs, spec, h, grad_y, grad_last)
    with torch.enable_grad():
        tensors = inputs.projected, inputs.gate_bias, inputs.h0
        projected, gate_bias, h0 = leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        inputs = CellInputs(projected, gate_bias, h0, inputs.boundaries, inputs.is_empty)
        y, h_last, _ = composed(inputs, spec, backend=backend, return_decay=False)
        d_projected, d_gate_bias, dh0 = torch.autograd.grad((y, h_last), leaves, (grad_y, grad_last))
    return d_projected, d_gate_bias, dh0
