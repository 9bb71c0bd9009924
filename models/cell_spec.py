"""The arguments of a cell scan, grouped: `CellSpec` says what is computed, `CellInputs` holds the tensors."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .boundaries import NO_BOUNDARIES, Boundaries
from .gated_coefficients import GATED_CELLS
from .minimal_coefficients import CANDIDATE_ACTIVATIONS, MINIMAL_CELLS, MinimalCell

SCANNED_CELLS = MINIMAL_CELLS | GATED_CELLS
FUSED_CELLS: dict[str, tuple[str, ...]] = {
    "numba": ("mingru", "minlstm", "hgrn", "rglru"),
    "triton": ("mingru", "minlstm"),
}
FUSED_DTYPES = {
    "numba": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


@dataclass(frozen=True)
class CellSpec:
    """What a cell scan computes.

    Raises:
        ValueError: a cell or an activation that does not exist.
    """

    cell: str
    """One of `SCANNED_CELLS`."""
    activation: str = "none"
    """Candidate activation, one of `minimal_coefficients.CANDIDATE_ACTIVATIONS`."""
    output_gate: bool = False
    """Multiply h by silu (RG-LRU: gelu) of the last projection."""

    def __post_init__(self) -> None:
        for kind, name, choices in (
            ("cell", self.cell, tuple(SCANNED_CELLS)),
            ("candidate activation", self.activation, CANDIDATE_ACTIVATIONS),
        ):
            if name not in choices:
                raise ValueError(f"There is no {kind} {name!r}; choose one of {', '.join(choices)}.")

    @property
    def equation(self) -> MinimalCell:
        return SCANNED_CELLS[self.cell]

    @property
    def num_gates(self) -> int:
        return self.equation.num_gates

    @property
    def num_rows(self) -> int:
        """Numbers of each channel: the gates' biases and the constants."""
        return self.num_gates + self.equation.num_constants

    @property
    def num_projections(self) -> int:
        """Gates, candidate and output gate."""
        return self.num_gates + 1 + int(self.output_gate)

    def is_fused(self, dtype: torch.dtype, backend: str) -> bool:
        """Whether a backend has one kernel for this; otherwise the scan is composed of its parts."""
        return self.cell in FUSED_CELLS.get(backend, ()) and dtype in FUSED_DTYPES[backend]

    def coefficients(
        self, projections: tuple[Tensor, ...], gate_bias: Tensor, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(a, b), each [batch, time, width], of the scan's arguments; `starts` is `CellInputs.starts()`."""
        gates = (projections[i] + gate_bias[i] for i in range(self.num_gates))
        constants, u = gate_bias[self.num_gates :], projections[self.num_gates]
        others = (starts,) if self.equation.reads_starts else ()
        return self.equation.coefficients(*gates, *constants, u, self.activation, *others)

    def gated(self, h: Tensor, projections: tuple[Tensor, ...]) -> Tensor:
        """h, times the activated output gate if there is one."""
        if not self.output_gate:
            return h
        activation = F.gelu if self.equation.output_gate == "gelu" else F.silu
        return h * activation(projections[-1])


@dataclass(frozen=True)
class CellInputs:
    """The tensors that a cell scan reads."""

    projected: Tensor
    """[batch, time, num_projections * width]: gates, candidate, output gate side by side."""
    gate_bias: Tensor
    """[num_rows, width]: biases, added to the gates in fp32, and the cell's constants."""
    h0: Tensor
    """State before the first token, [batch, width]."""
    boundaries: Boundaries = NO_BOUNDARIES
    is_empty: Tensor | None = None
    """bool [batch], rows without a state before the first token; None for no row, or where a cell does not
    ask."""

    def starts(self) -> Tensor | None:
        """Where no state precedes a token: bool [batch, time, 1]; None for nowhere."""
        starts = self.boundaries.document_starts
        if self.is_empty is not None:
            is_first = torch.arange(self.projected.shape[1], device=self.projected.device) == 0
            first = is_first & self.is_empty.unsqueeze(1)
            starts = first if starts is None else starts | first
        return None if starts is None else starts.unsqueeze(-1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, time, width) of the outputs."""
        batch, time, _ = self.projected.shape
        return batch, time, self.gate_bias.shape[1]


def zero_state(projected: Tensor, gate_bias: Tensor) -> Tensor:
    """[batch, width] in the state's dtype."""
    dtype = torch.promote_types(projected.dtype, torch.float32)
    return projected.new_zeros(projected.shape[0], gate_bias.shape[1], dtype=dtype)


def empty_rows(h0: Tensor, spec: CellSpec) -> Tensor | None:
    """`CellInputs.is_empty` of a state, [batch, width]: rows of zeros, as after a piece of padding only."""
    return (h0 == 0).all(1) if spec.equation.reads_starts else None


def check_shapes(
    spec: CellSpec, projected: Tensor, gate_bias: Tensor, h0: Tensor | None, boundaries: Boundaries
) -> None:
    """Raises ValueError where shapes do not fit each other, or document starts are not bool."""
    width, num_projections = gate_bias.shape[-1], spec.num_projections
    fits = gate_bias.shape == (spec.num_rows, width) and projected.ndim == 3
    if not fits or projected.shape[2] != num_projections * width:
        raise ValueError(
            f"cell_scan takes projected [batch, time, {num_projections} * width] and gate_bias "
            f"[{spec.num_rows}, width] for {spec.cell!r}{' with an output gate' * spec.output_gate}, "
            f"but got {tuple(projected.shape)} and {tuple(gate_bias.shape)}."
        )
    batch, time, _ = projected.shape
    for name, tensor, shape in (
        ("h0", h0, (batch, width)),
        ("document_starts", boundaries.document_starts, (batch, time)),
        ("lengths", boundaries.lengths, (batch,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"cell_scan takes {name} of shape {shape}, but got {tuple(tensor.shape)}.")
    starts = boundaries.document_starts
    if starts is not None and starts.dtype != torch.bool:
        raise ValueError(f"cell_scan takes document_starts as bool, but got {starts.dtype}.")
