"""What the tests of cell_scan share: cells and dtypes to try, and random inputs with their boundaries."""

from typing import Any

import pytest
import torch
from helpers import generator
from torch import Tensor

from minrnn.models.cell_scan import FUSED_CELLS
from minrnn.models.cells import CANDIDATE_ACTIVATIONS, CELLS

Options = dict[str, Any]


def variant(cell: str, activation: str, output_gate: bool) -> Options:
    return {"cell": cell, "activation": activation, "output_gate": output_gate}


# Each is a kernel to compile, for a second or two: every cell with every activation once, the gate on for half, two again in bf16.
EIGHT = [
    variant(cell, activation, (i + j) % 2 == 1)
    for i, cell in enumerate(FUSED_CELLS)
    for j, activation in enumerate(CANDIDATE_ACTIVATIONS)
]
DEFAULT, PAPER = variant("mingru", "none", True), variant("minlstm", "g", False)
CASES = [(options, torch.float32) for options in EIGHT] + [(DEFAULT, torch.bfloat16), (PAPER, torch.bfloat16)]
cases = pytest.mark.parametrize(
    ("options", "dtype"),
    CASES,
    ids=["-".join(map(str, [*o.values(), d])).replace("torch.", "") for o, d in CASES],
)
few = pytest.mark.parametrize(
    ("options", "dtype"), [*CASES[-2:], CASES[1]], ids=["mingru-bf16", "minlstm-bf16", "mingru-fp32"]
)


def problem(
    seed: int, options: Options, dtype: torch.dtype, batch: int, time: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(projected in dtype, gate_bias fp32, h0 fp32)."""
    random, num_gates = generator(seed), CELLS[options["cell"]].num_gates
    projected = 2 * torch.randn(
        batch, time, (num_gates + 1 + options["output_gate"]) * width, generator=random
    )
    return (
        projected.to(dtype),
        torch.randn(num_gates, width, generator=random),
        torch.randn(batch, width, generator=random),
    )


def boundaries(seed: int, batch: int, time: int, with_starts: bool, with_lengths: bool) -> Options:
    random = generator(seed + 1)
    starts, lengths = (
        torch.rand(batch, time, generator=random) < 0.2,
        torch.randint(0, time + 1, (batch,), generator=random),
    )
    return {"document_starts": starts if with_starts else None, "lengths": lengths if with_lengths else None}


def real_tokens(batch: int, time: int, lengths: Tensor | None) -> Tensor:
    """[batch, time, 1], False at padding, where y means nothing."""
    return (
        torch.arange(time) < (torch.full((batch,), time) if lengths is None else lengths).unsqueeze(1)
    ).unsqueeze(-1)
