"""The Triton kernels of the cells against a plain loop, on a GPU or in Triton's interpreter.

`test_triton` runs this file.
"""

import itertools

import pytest
import torch
from helpers import assert_close, generator
from triton_helpers import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    TILE,
    Problem,
    Results,
    assert_results,
    ignores_overflow,
    random,
    to_device,
)

from minrnn.models import cell_scan_triton
from minrnn.models.boundaries import NO_BOUNDARIES, Boundaries
from minrnn.models.cell_spec import FUSED_CELLS, CellInputs, CellSpec
from minrnn.models.launches_triton import Tile, run_all
from minrnn.models.minimal_coefficients import MINIMAL_CELLS

KINDS = list(itertools.product(FUSED_CELLS["triton"], ("g", "none", "tanh", "silu"), (False, True)))
Kind = tuple[str, str, bool]  # cell, candidate activation, output gate


def random_cell_inputs(
    seed: int, batch: int, time: int, width: int, cell: str, output_gate: bool, dtype=FP32
) -> Problem:
    """(projected, gate_bias, h0, grad_y, grad_last)."""
    num_gates = MINIMAL_CELLS[cell].num_gates
    projected = 2 * random(seed, batch, time, (num_gates + 1 + output_gate) * width)
    gate_bias, h0, grad_last = (
        random(seed + 1, num_gates, width),
        random(seed + 2, batch, width),
        random(seed + 3, batch, width),
    )
    return (
        projected.to(dtype),
        gate_bias.float(),
        h0.float(),
        random(seed + 4, batch, time, width).to(dtype),
        grad_last.float(),
    )


def boundaries_of(batch: int, time: int, starts: bool, padded: bool) -> Boundaries:
    """Documents that start anywhere, the first token and padding included; rows that end anywhere."""
    flags = torch.rand(batch, time, generator=generator(9)) < 0.3 if starts else None
    lengths = (time - 3 - 2 * torch.arange(batch)).clamp(min=0) if padded else None
    return Boundaries(flags, lengths)


def cell_scan(
    problem: Problem,
    kind: Kind,
    boundaries: Boundaries = NO_BOUNDARIES,
    num_chunks: int | None = 1,
    tile: Tile | None = TILE,
) -> Results:
    projected, gate_bias, h0, grad_y, grad_last = to_device(problem)
    inputs, spec = CellInputs(projected, gate_bias, h0, boundaries.to(DEVICE)), CellSpec(*kind)
    (y, h, h_last, decay), launches = cell_scan_triton.forward_launches(
        inputs, spec, return_decay=True, tile=tile, num_chunks=num_chunks
    )
    run_all(launches)
    saved = h if spec.output_gate else y
    grads, launches = cell_scan_triton.backward_launches(
        inputs, spec, h=saved, grad_y=grad_y, grad_last=grad_last, tile=tile, num_chunks=num_chunks
    )
    run_all(launches)
    d_bias = grads[1].sum((0, 1))
    assert (h.numel() == 0) == (not kind[2] or y.numel() == 0)
    return {
        "y": y,
        "h_last": h_last,
        "decay": decay,
        "d_projected": grads[0],
        "d_gate_bias": d_bias,
        "dh0": grads[2],
    }


def plain_cell_scan(problem: Problem, kind: Kind, boundaries: Boundaries = NO_BOUNDARIES) -> Results:
    """The cell's own formulas and the loop in fp64, differentiated by autograd."""
    cell, activation, output_gate = kind
    starts, lengths = boundaries.document_starts, boundaries.lengths
    projected, gate_bias, h0 = (x.double().requires_grad_() for x in problem[:3])
    grad_y, grad_last = (x.double() for x in problem[3:])
    num_gates, width = gate_bias.shape
    parts = projected.split(width, -1) if width else [projected] * 4
    a, b = MINIMAL_CELLS[cell].coefficients(
        *(parts[i] + gate_bias[i] for i in range(num_gates)), parts[num_gates], activation
    )
    is_pad = (
        torch.zeros(a.shape[:2], dtype=torch.bool)
        if lengths is None
        else torch.arange(a.shape[1]) >= lengths.unsqueeze(1)
    )
    drops = torch.zeros_like(is_pad) if starts is None else starts & ~is_pad
    a, b = (
        a.masked_fill(drops.unsqueeze(-1), 0).masked_fill(is_pad.unsqueeze(-1), 1),
        b.masked_fill(is_pad.unsqueeze(-1), 0),
    )
    state, states = h0, []
    for t in range(a.shape[1]):
        state = a[:, t] * state + b[:, t]
        states.append(state)
    h = torch.stack(states, 1) if states else torch.zeros_like(a)
    y = h * torch.nn.functional.silu(parts[-1]) if output_gate else h
    loss = (y * grad_y).sum() + (state * grad_last).sum() + 0 * (projected.sum() + gate_bias.sum())
    grads = torch.autograd.grad(loss, (projected, gate_bias, h0))
    values = {"y": y.detach(), "h_last": state.detach(), "decay": a.detach().prod(1)}
    return values | {"d_projected": grads[0], "d_gate_bias": grads[1], "dh0": grads[2]}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cells(kind):
    """Every cell, candidate and gate, each with another mixture of boundaries and chunks."""
    index = KINDS.index(kind)
    problem = random_cell_inputs(index, 1, 7, 3, kind[0], kind[2])
    boundaries = boundaries_of(1, 7, index % 4 in (0, 3), False)
    assert_results(
        cell_scan(problem, kind, boundaries, 1 + index // 2 % 2 * 2),
        plain_cell_scan(problem, kind, boundaries),
    )


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize(("starts", "padded"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", [("mingru", "none", True), ("minlstm", "g", False)], ids=str)
def test_boundaries(kind, starts, padded, num_chunks):
    problem = random_cell_inputs(20, 2, 9, 3, kind[0], kind[2])
    boundaries = boundaries_of(2, 9, starts, padded)
    assert_results(
        cell_scan(problem, kind, boundaries, num_chunks), plain_cell_scan(problem, kind, boundaries)
    )


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("kind", [("mingru", "none", True), ("minlstm", "tanh", False)], ids=str)
def test_narrow_dtypes(kind, dtype):
    problem = random_cell_inputs(30, 1, 9, 5, kind[0], kind[2], dtype)
    actual = cell_scan(problem, kind, num_chunks=2)
    narrow = {"y", "d_projected"}
    assert {name: value.dtype for name, value in actual.items()} == {
        name: dtype if name in narrow else FP32 for name in actual
    }
    assert_results(actual, plain_cell_scan(problem, kind), dtype)


@pytest.mark.parametrize(("batch", "time", "width"), [(0, 3, 2), (2, 0, 3), (1, 1, 1), (1, 4, 4), (1, 5, 1)])
def test_cell_shapes(batch, time, width):
    kind = ("mingru", "silu", True)
    problem = random_cell_inputs(40, batch, time, width, kind[0], kind[2])
    assert_results(cell_scan(problem, kind, num_chunks=2), plain_cell_scan(problem, kind))


def test_projections_of_views():
    kind = ("minlstm", "none", True)
    projected, gate_bias, h0, grad_y, grad_last = random_cell_inputs(41, 2, 6, 3, kind[0], kind[2])
    wider = torch.cat([projected, projected], -1)[:, :, 5:17]
    for view in (
        wider,
        projected.transpose(0, 1).contiguous().transpose(0, 1),
        projected.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        problem = (view, gate_bias, h0, grad_y[:, :1].expand(2, 6, 3), grad_last)
        assert_results(cell_scan(problem, kind), plain_cell_scan(problem, kind))


@pytest.mark.parametrize("which", ["y", "h_last"])
def test_one_gradient_only(which):
    kind = ("mingru", "tanh", False)
    projected, gate_bias, h0, grad_y, grad_last = random_cell_inputs(42, 1, 7, 3, kind[0], kind[2])
    if which == "y":
        grad_last = torch.zeros_like(grad_last)
    else:
        grad_y = torch.zeros_like(grad_y)
    problem = (projected, gate_bias, h0, grad_y, grad_last)
    assert_results(cell_scan(problem, kind), plain_cell_scan(problem, kind))


@ignores_overflow
@pytest.mark.parametrize("cell", FUSED_CELLS["triton"])
def test_extreme_gates(cell):
    """Decays close to 0 and 1, gates beyond the range of exp, and infinities: no NaN, and full precision."""
    kind, width = (cell, "none", False), 4
    num_gates = MINIMAL_CELLS[cell].num_gates
    projected, gate_bias, h0, grad_y, grad_last = random_cell_inputs(43, 1, 12, width, cell, False)
    extremes = torch.tensor([-300.0, -100, -40, -15, -5, 0, 5, 15, 40, 100, 300, 20])
    projected[0, :, :width] = extremes.unsqueeze(1)
    projected[0, :, 1] = -20.0 * torch.arange(12)
    if num_gates == 2:
        projected[0, :, width : 2 * width] = extremes.roll(4).unsqueeze(1)
        projected[0, :, width + 1] = -20.0 * torch.arange(12) - 3
    problem = (projected, gate_bias, h0, grad_y, grad_last)
    assert_results(cell_scan(problem, kind), plain_cell_scan(problem, kind))
    projected[0, 3, :width] = torch.tensor([float("inf"), float("-inf"), 1.0, 1.0])
    actual = cell_scan(problem, kind)
    assert all(value.isfinite().all() for value in actual.values())
    assert_close(actual["y"].cpu(), plain_cell_scan(problem, kind)["y"], atol=3e-6)


@ignores_overflow
@pytest.mark.parametrize(("poison", "num_chunks"), [(float("nan"), 3), (float("inf"), 1)])
def test_documents_are_independent(poison, num_chunks):
    """A broken document harms neither the next one nor the one before it, nor another channel."""
    kind = ("mingru", "none", False)
    problem = random_cell_inputs(44, 1, 13, 3, kind[0], kind[2])
    starts = torch.zeros(1, 13, dtype=torch.bool)
    starts[0, [4, 9]] = True
    clean = cell_scan(problem, kind, Boundaries(starts), num_chunks)
    projected = problem[0].clone()
    projected[0, 4:7, 4] = projected[0, 4, 1] = (
        poison  # the candidate of channel 1, and its gate where the document starts
    )
    dirty = cell_scan((projected, *problem[1:]), kind, Boundaries(starts), num_chunks)
    assert not dirty["y"][0, 4:9, 1].isfinite().any()
    for part in (slice(0, 4), slice(9, 13)):
        assert torch.equal(clean["y"][:, part], dirty["y"][:, part])
        assert torch.equal(clean["d_projected"][:, part], dirty["d_projected"][:, part])
    others = [0, 2]
    for name in ("y", "h_last", "dh0", "decay"):
        assert torch.equal(clean[name][..., others], dirty[name][..., others]), name
    for name in ("h_last", "dh0", "decay"):
        assert torch.equal(clean[name], dirty[name]), name


@ignores_overflow
def test_padding_is_not_read():
    """Values behind a row's end affect only their own output gate."""
    kind = ("minlstm", "g", False)
    problem = random_cell_inputs(45, 2, 9, 3, kind[0], kind[2])
    lengths = torch.tensor([5, 0])
    clean = cell_scan(problem, kind, Boundaries(lengths=lengths), 2)
    projected = problem[0].clone()
    projected[0, 5:] = projected[1] = float("nan")
    dirty = cell_scan((projected, *problem[1:]), kind, Boundaries(lengths=lengths), 2)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    assert not clean["d_projected"][0, 5:].any()
    assert not clean["d_projected"][1].any()
    assert torch.equal(clean["h_last"][1].cpu(), problem[2][1])
    assert (clean["decay"][1] == 1).all()


def test_cell_cut_in_two():
    kind = ("minlstm", "silu", True)
    problem = random_cell_inputs(46, 2, 13, 3, kind[0], kind[2])
    whole = cell_scan(problem, kind)
    projected, gate_bias, h0, grad_y, grad_last = problem
    early = cell_scan((projected[:, :6], gate_bias, h0, grad_y[:, :6], grad_last), kind)
    late = cell_scan((projected[:, 6:], gate_bias, early["h_last"].cpu(), grad_y[:, 6:], grad_last), kind)
    early = cell_scan((projected[:, :6], gate_bias, h0, grad_y[:, :6], late["dh0"].cpu()), kind)
    for name in ("y", "d_projected"):
        assert_close(torch.cat([early[name], late[name]], 1), whole[name], atol=2e-6, name=name)
    assert_close(late["h_last"], whole["h_last"], atol=1e-6)
    assert_close(early["dh0"], whole["dh0"], atol=1e-6)
    assert_close(early["d_gate_bias"] + late["d_gate_bias"], whole["d_gate_bias"], atol=2e-6)
    assert_close(early["decay"] * late["decay"], whole["decay"], atol=1e-6)


def test_cell_is_deterministic():
    kind = ("mingru", "g", True)
    problem, boundaries = random_cell_inputs(47, 1, 11, 5, kind[0], kind[2]), boundaries_of(1, 11, True, True)
    once, again = (cell_scan(problem, kind, boundaries, 3) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_cells_with_their_own_tiles():
    """As a call would launch it."""
    for kind, time in ((("mingru", "none", True), 70), (("minlstm", "none", False), 1)):
        problem = random_cell_inputs(48, 1, time, 40, kind[0], kind[2])
        boundaries = boundaries_of(1, time, True, False)
        assert_results(
            cell_scan(problem, kind, boundaries, None, None), plain_cell_scan(problem, kind, boundaries)
        )
