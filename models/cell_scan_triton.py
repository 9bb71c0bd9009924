"""Cell and scan on the GPU: the launches of `cell_kernels_triton`, and the functions that run them."""

from typing import Any

import torch
from torch import Tensor

from .cell_kernels_triton import backward_kernel, forward_kernel
from .cell_spec import CellInputs, CellSpec
from .launches_triton import (
    Launch,
    Tile,
    chunked_launch,
    num_multiprocessors,
    pass_launches,
    plan_chunks,
    run_all,
    with_contiguous_channels,
)


def choose_tile(time: int, itemsize: int, cell: str, output_gate: bool, backward: bool) -> Tile:
    """The largest tile, for operands of `itemsize` bytes, with which two programs share a multiprocessor.

    That is 128 registers per thread with 8 lanes. A backward pass needs 123 registers with 8 x 8 rows for the
    minGRU without an output gate, and 140 to 220 otherwise, hence 4 lanes.
    """
    if time == 1:  # a token of decoding
        return Tile(lanes=1, rows=1, channels=64)
    if not backward:
        return Tile(lanes=8, rows=16 if itemsize == 2 and not output_gate else 8, channels=64)
    return Tile(
        lanes=8 if cell == "mingru" and not output_gate else 4, rows=8 if itemsize == 2 else 4, channels=64
    )


def _as_flags(document_starts: Tensor | None) -> Tensor | None:
    return None if document_starts is None else document_starts.contiguous().view(torch.uint8)


def _constants(spec: CellSpec, lengths: Tensor | None) -> dict[str, Any]:
    """Compile-time constants of both kernels."""
    constants = {"CELL": spec.cell, "ACTIVATION": spec.activation, "OUTPUT_GATE": spec.output_gate}
    return constants | {"TAIL": int(lengths is not None)}


def forward_launches(
    inputs: CellInputs,
    spec: CellSpec,
    *,
    return_decay: bool,
    tile: Tile | None = None,
    num_chunks: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[Launch]]:
    """The outputs of `forward`, not yet computed, and the launches that compute them.

    Tests and tuning can force a tile and a number of chunks.
    """
    batch, time, width = inputs.shape
    projected, gate_bias = with_contiguous_channels(inputs.projected), inputs.gate_bias.float().contiguous()
    tile = tile or choose_tile(time, projected.itemsize, spec.cell, spec.output_gate, backward=False)
    chunks = plan_chunks(batch, time, width, tile, num_multiprocessors(projected.device), num_chunks)
    y = projected.new_empty(batch, time, width)
    h = torch.empty_like(y) if spec.output_gate else y.new_empty(0)
    h_last = torch.empty_like(inputs.h0, dtype=torch.float32, memory_format=torch.contiguous_format)
    decay = torch.empty_like(h_last) if return_decay else h_last.new_empty(0)
    flags, lengths = _as_flags(inputs.boundaries.document_starts), inputs.boundaries.lengths
    constants = {"STEP": projected.stride(1)} | _constants(spec, lengths)

    def launch(entering: Tensor | None, final: Tensor | None, decay: Tensor | None, write: bool) -> Launch:
        arguments = {"projected": projected, "gate_bias": gate_bias, "entering": entering}
        arguments |= {"starts": flags, "lengths": lengths}
        arguments |= {"y": y if write else None, "h": h if write and spec.output_gate else None}
        arguments |= {"final": final, "decay": decay, "projected_row": projected.stride(0)}
        return chunked_launch(forward_kernel, arguments, constants, (batch, time, width), tile, chunks)

    initial, decay_or_none = inputs.h0.float().contiguous(), decay if return_decay else None
    launches = pass_launches(
        launch, chunks, initial, h_last, decay_or_none, reverse=False, resets=flags is not None
    )
    return (y, h, h_last, decay), launches


def backward_launches(
    inputs: CellInputs,
    spec: CellSpec,
    *,
    h: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    tile: Tile | None = None,
    num_chunks: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """As `forward_launches`, for `backward`; d_gate_bias is per chunk, [batch, chunks, gates, width]."""
    batch, time, width = inputs.shape
    projected, h, grad_y = map(with_contiguous_channels, (inputs.projected, h, grad_y))
    gate_bias, h0 = inputs.gate_bias.float().contiguous(), inputs.h0.float().contiguous()
    tile = tile or choose_tile(time, projected.itemsize, spec.cell, spec.output_gate, backward=True)
    chunks = plan_chunks(batch, time, width, tile, num_multiprocessors(projected.device), num_chunks)
    d_projected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    d_gate_bias, dh0 = gate_bias.new_empty(batch, chunks.number, *gate_bias.shape), torch.empty_like(h0)
    flags, lengths = _as_flags(inputs.boundaries.document_starts), inputs.boundaries.lengths
    constants = {"STEP": projected.stride(1), "H_STEP": h.stride(1), "GRAD_STEP": grad_y.stride(1)}
    constants |= _constants(spec, lengths)

    def launch(entering: Tensor | None, final: Tensor | None, decay: Tensor | None, write: bool) -> Launch:
        arguments = {"projected": projected, "gate_bias": gate_bias, "h0": h0, "h": h, "grad_y": grad_y}
        arguments |= {"starts": flags, "lengths": lengths}
        arguments |= {"entering": entering, "final": final, "decay": decay}
        outputs = (d_projected, d_gate_bias) if write else (None, None)
        arguments |= dict(zip(("d_projected", "d_gate_bias"), outputs, strict=True))
        arguments |= {
            "projected_row": projected.stride(0),
            "h_row": h.stride(0),
            "grad_row": grad_y.stride(0),
        }
        return chunked_launch(backward_kernel, arguments, constants, (batch, time, width), tile, chunks)

    initial = grad_last.float().contiguous()
    launches = pass_launches(launch, chunks, initial, dh0, None, reverse=True, resets=flags is not None)
    return (d_projected, d_gate_bias, dh0), launches


def forward(
    inputs: CellInputs, spec: CellSpec, return_decay: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `cell_scan.cell_scan`.

    Returns:
        y; h, empty without an output gate, where it equals y; h_last; decay, empty without `return_decay`.
    """
    outputs, launches = forward_launches(inputs, spec, return_decay=return_decay)
    run_all(launches)
    return outputs


def backward(
    inputs: CellInputs, spec: CellSpec, h: Tensor, grad_y: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`: d_projected, d_gate_bias and dh0 in fp32. `h` is y without an output gate."""
    outputs, launches = backward_launches(inputs, spec, h=h, grad_y=grad_y, grad_last=grad_last)
    run_all(launches)
    d_projected, d_gate_bias, dh0 = outputs
    return d_projected, d_gate_bias.sum((0, 1)), dh0
