"""Shared by the tests of cell_scan: cells and dtypes to test, random inputs and boundaries."""

import dataclasses

import pytest
import torch
from helpers import generator
from torch import Tensor

from minrnn.models.boundaries import Boundaries
from minrnn.models.cell_spec import FUSED_CELLS, CellSpec
from minrnn.models.minimal_coefficients import CANDIDATE_ACTIVATIONS

# Each spec is a kernel to compile, for a second or two: every minimal cell with every activation once, half
# of them with an output gate, the others as their mixers use them; one of each cell again in bf16.
SPECS = [
    CellSpec(cell, activation, (i + j) % 2 == 1)
    for i, cell in enumerate(FUSED_CELLS["triton"])
    for j, activation in enumerate(CANDIDATE_ACTIVATIONS)
]
DEFAULT, PAPER = CellSpec("mingru", "none", True), CellSpec("minlstm", "g", False)
HGRN, RGLRU = CellSpec("hgrn", "silu", True), CellSpec("rglru", "none", True)
CASES = [(spec, torch.float32) for spec in (*SPECS, HGRN, RGLRU)]
CASES += [(spec, torch.bfloat16) for spec in (DEFAULT, PAPER, HGRN, RGLRU)]
all_cases = pytest.mark.parametrize(
    ("spec", "dtype"),
    CASES,
    ids=["-".join(map(str, [*dataclasses.astuple(spec), d])).replace("torch.", "") for spec, d in CASES],
)
few_cases = pytest.mark.parametrize(
    ("spec", "dtype"),
    [*CASES[-4:], CASES[1], (RGLRU, torch.float32)],
    ids=["mingru-bf16", "minlstm-bf16", "hgrn-bf16", "rglru-bf16", "mingru-fp32", "rglru-fp32"],
)


def random_constants(spec: CellSpec, width: int, random: torch.Generator) -> Tensor:
    """Lower bounds in (0, 1) or rates in (-8, 0), fp32 [num_constants, width]."""
    values = torch.rand(spec.num_rows - spec.num_gates, width, generator=random)
    return -8 * values if spec.cell == "rglru" else values


def random_inputs(
    seed: int, spec: CellSpec, dtype: torch.dtype, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(projected in dtype, gate_bias fp32, h0 fp32, 0 in the second row); shape is (batch, time, width)."""
    (batch, time, width), random = shape, generator(seed)
    projected = 2 * torch.randn(batch, time, spec.num_projections * width, generator=random)
    gate_bias = torch.randn(spec.num_gates, width, generator=random)
    h0 = torch.randn(batch, width, generator=random)
    h0[1:2] = 0
    return projected.to(dtype), torch.cat([gate_bias, random_constants(spec, width, random)]), h0


def random_boundaries(seed: int, batch: int, time: int, with_starts: bool, with_lengths: bool) -> Boundaries:
    random = generator(seed + 1)
    starts = torch.rand(batch, time, generator=random) < 0.2
    lengths = torch.randint(0, time + 1, (batch,), generator=random)
    return Boundaries(starts if with_starts else None, lengths if with_lengths else None)


def real_tokens(batch: int, time: int, lengths: Tensor | None) -> Tensor:
    """[batch, time, 1], False at padding, where y is undefined."""
    lengths = torch.full((batch,), time) if lengths is None else lengths
    return (torch.arange(time) < lengths.unsqueeze(1)).unsqueeze(-1)
