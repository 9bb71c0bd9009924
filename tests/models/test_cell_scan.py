"""Cell and scan in one kernel against the composition of their parts in fp64: values, gradients, boundaries, layouts, threads."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cell_scan_problems import Options, boundaries, cases, few, problem, real_tokens
from helpers import assert_close, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minrnn.models.cell_scan import cell_scan, cell_scan_with_decay, one_token
from minrnn.models.cells import CELLS, candidate

Results = dict[str, Tensor]

# How far from the exact result. An fp32 token costs a few roundings of 2^-24, and a memory adds up those of the tokens it holds. In bf16,
# results are rounded once, to nearest, by half a unit in the last place, 2^-8. Gradients of gates also hold the difference of the candidate and
# a saved h that was rounded so. Nothing else does, the carried state included.
FP32 = 2e-6
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


def differentiated(
    scan: Callable[..., tuple[Tensor, Tensor]],
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    use="both",
    real: Tensor | bool = True,
) -> Results:
    """y, h_last and the gradients of their weighted sum; the weights of y are bf16 numbers, and 0 where y is not real."""
    leaves = {"d_projected": projected, "d_gate_bias": gate_bias} | ({} if h0 is None else {"dh0": h0})
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    y, h_last = scan(leaves["d_projected"], leaves["d_gate_bias"], leaves.get("dh0"))
    random = generator(2)
    weights = (
        torch.randint(-8, 9, y.shape, generator=random).double() / 4 * real,
        torch.randn(h_last.shape, generator=random, dtype=torch.float64),
    )
    loss = sum(
        (0 * leaf.double()).sum() for leaf in leaves.values()
    )  # so that every leaf is used, also by the loop over no time
    loss = (
        loss
        + (y.double() * weights[0]).sum() * (use != "h_last")
        + (h_last.double() * weights[1]).sum() * (use != "y")
    )
    assert isinstance(loss, Tensor)
    return {"y": y.detach(), "h_last": h_last.detach()} | dict(
        zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
    )


def run(
    options: Options,
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    use="both",
    backend=None,
    **where: Any,
) -> Results:
    """`differentiated` of cell_scan, on the CPU's default backend (numba), y masked at padding."""
    real = real_tokens(projected.shape[0], projected.shape[1], where.get("lengths"))

    def scan(projected, gate_bias, h0):
        return cell_scan(projected, gate_bias, h0, **options, **where, backend=backend)

    results = differentiated(scan, projected, gate_bias, h0, use=use, real=real)
    return results | {"y": results["y"].where(real, 0)}


def exact(options: Options, projected: Tensor, gate_bias: Tensor, h0: Tensor | None, **where: Any) -> Results:
    """The same of the composition over the plain loop, in fp64."""
    return run(
        options,
        projected.double(),
        gate_bias.double(),
        None if h0 is None else h0.double(),
        backend="reference",
        **where,
    )


def assert_results(
    ours: Results, expected: Results, options: Options, dtype: torch.dtype, width: int
) -> None:
    half = HALF_UNIT[dtype]
    saved_h = half if dtype == torch.bfloat16 else 0.0
    assert_close(ours["y"], expected["y"], atol=FP32, rtol=half, what="y")
    assert_close(ours["h_last"], expected["h_last"], atol=FP32, what="h_last")
    for name, value in ours.items():
        assert value.dtype == (dtype if name in ("y", "d_projected") else torch.float32), name
    if "dh0" in ours:
        assert_close(ours["dh0"], expected["dh0"], atol=FP32, what="dh0")
    num_gates = CELLS[options["cell"]].num_gates
    terms = (
        expected["d_projected"][..., : num_gates * width].abs().sum((0, 1)).max()
        if expected["y"].numel()
        else 0.0
    )  # of a sum that may cancel
    assert (ours["d_gate_bias"].double() - expected["d_gate_bias"]).abs().max() <= (FP32 + saved_h) * terms, (
        "d_gate_bias"
    )
    names = ["gate"] * num_gates + ["candidate"] + ["output gate"] * options["output_gate"]
    for name, value, other in zip(
        names, ours["d_projected"].split(width, -1), expected["d_projected"].split(width, -1), strict=True
    ):
        rtol = 2 * half if name == "output gate" else half  # a product with h
        assert_close(value, other, atol=FP32 + (saved_h if name == "gate" else 0.0), rtol=rtol, what=name)


shapes = st.tuples(st.integers(0, 3), st.integers(0, 40), st.sampled_from([1, 2, 15, 16, 17, 33, 70]))


@cases
@settings(max_examples=10)
@given(
    shape=shapes,
    with_starts=st.booleans(),
    with_lengths=st.booleans(),
    with_h0=st.booleans(),
    use=st.sampled_from(["both", "both", "y", "h_last"]),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients(options, dtype, shape, with_starts, with_lengths, with_h0, use, seed):
    projected, gate_bias, h0 = problem(seed, options, dtype, *shape)
    arguments = (options, projected, gate_bias, h0 if with_h0 else None)
    where = boundaries(seed, shape[0], shape[1], with_starts, with_lengths) | {"use": use}
    ours = run(*arguments, **where)
    assert_results(ours, exact(*arguments, **where), options, dtype, shape[2])


def assert_same_bits(ours: Results, expected: Results, but: tuple[str, ...] = ()) -> None:
    for name in expected.keys() - set(but):
        assert torch.equal(ours[name], expected[name]), name


def in_pieces(options: Options, edges: list[int], where: Options):
    """cell_scan over [low, high) between neighbouring edges, the state handed over."""

    def scan(projected, gate_bias, h0):
        pieces = []
        for low, high in itertools.pairwise(edges):
            starts, lengths = where["document_starts"], where["lengths"]
            cut: Options = {"document_starts": starts if starts is None else starts[:, low:high]}
            cut["lengths"] = lengths if lengths is None else (lengths - low).clamp(0, high - low)
            y, h0 = cell_scan(projected[:, low:high], gate_bias, h0, **options, **cut)
            pieces.append(y)
        return torch.cat(pieces, dim=1), h0

    return scan


@few
@settings(max_examples=10)
@given(
    cuts=st.lists(st.integers(0, 20), max_size=4),
    with_starts=st.booleans(),
    with_lengths=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_cuts_change_no_bit(options, dtype, cuts, with_starts, with_lengths, seed):
    """Whole = cut in pieces, gradients included, but for the order in which those of the bias are summed."""
    projected, gate_bias, h0 = problem(seed, options, dtype, 2, 20, 17)
    where = boundaries(seed, 2, 20, with_starts, with_lengths)
    real = real_tokens(2, 20, where["lengths"])
    results = [
        differentiated(in_pieces(options, edges, where), projected, gate_bias, h0, real=real)
        for edges in ([0, *sorted(cuts), 20], [0, 20])
    ]
    ours, whole = (result | {"y": result["y"].where(real, 0)} for result in results)
    assert_same_bits(ours, whole, but=("d_gate_bias",))
    assert_close(ours["d_gate_bias"], whole["d_gate_bias"], atol=1e-5)


@few
@pytest.mark.parametrize("how", ["documents", "padding"])
def test_packed_is_each_alone(options, dtype, how):
    """Rows with document starts = every document in a row of its own; rows with padding = every row at its own length."""
    projected, gate_bias, h0 = problem(5, options, dtype, 3, 23, 19)
    starts, lengths = torch.zeros(3, 23, dtype=torch.bool), [23, 23, 23] if how == "documents" else [23, 9, 0]
    starts[0, [0, 4, 5, 17]] = starts[1, [2, 22]] = how == "documents"

    def alone(projected, gate_bias, h0):
        rows, states = [], []
        for row, length in enumerate(lengths):
            edges, state, documents = (
                [0, *(t for t in range(1, length) if starts[row, t]), length],
                h0[row : row + 1],
                [],
            )
            for low, high in itertools.pairwise(edges):
                state = torch.zeros_like(state) if low < length and starts[row, low] else state
                y, state = cell_scan(projected[row : row + 1, low:high], gate_bias, state, **options)
                documents.append(y)
            rows.append(torch.nn.functional.pad(torch.cat(documents, dim=1), (0, 0, 0, 23 - length)))
            states.append(state)
        return torch.cat(rows), torch.cat(states)

    where: Options = {"document_starts": starts} if how == "documents" else {"lengths": torch.tensor(lengths)}
    ours = run(options, projected, gate_bias, h0, **where)
    expected = differentiated(alone, projected, gate_bias, h0, real=real_tokens(3, 23, torch.tensor(lengths)))
    assert_same_bits(ours, expected, but=("d_gate_bias",))
    assert_close(ours["d_gate_bias"], expected["d_gate_bias"], atol=1e-5)


@few
def test_a_start_drops_the_state_and_a_pad_drops_the_token(options, dtype):
    """NaN that came before a document start, or lies behind a row's end, is not multiplied by 0 but not looked at."""
    projected, gate_bias, h0 = problem(6, options, dtype, 2, 9, 17)
    starts, lengths = torch.zeros(2, 9, dtype=torch.bool), torch.tensor([9, 6])
    starts[0, 4] = True
    where: Options = {"document_starts": starts, "lengths": lengths}
    broken = projected.clone()
    broken[0, :4] = broken[1, 6:] = torch.nan
    state = h0.clone()
    state[0] = torch.inf
    ours, expected = (
        cell_scan(broken, gate_bias, state, **options, **where),
        cell_scan(projected, gate_bias, h0, **options, **where),
    )
    assert torch.equal(ours[1], expected[1])
    assert torch.equal(ours[0][0, 4:], expected[0][0, 4:])
    assert torch.equal(ours[0][1, :6], expected[0][1, :6])


@few
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_or_channel_breaks_no_other(options, dtype, poison):
    width, broken_channel = 37, 18
    projected, gate_bias, h0 = problem(7, options, dtype, 3, 11, width)
    num_parts = projected.shape[2] // width
    sound = run(options, projected, gate_bias, h0)
    others = [channel for channel in range(width) if channel != broken_channel]
    for part in range(num_parts):
        broken = projected.clone()
        broken[1, 5, part * width + broken_channel] = poison
        ours = run(options, broken, gate_bias, h0)
        for name, value in ours.items():
            value, expected = (result.unflatten(-1, (-1, width)) for result in (value, sound[name]))
            assert torch.equal(value[..., others], expected[..., others]), name
            if name != "d_gate_bias":
                assert torch.equal(value[[0, 2]], expected[[0, 2]]), name
        assert ours["y"][1, 5, broken_channel].isnan() or not torch.tensor(poison).isnan()


@cases
@pytest.mark.parametrize("other", [2.0, 1e4])
def test_extreme_pre_activations(options, dtype, other):
    """Every combination of 0, +-90, +-1000 and +-1e4 in the gates: as in fp64 (p = q = -1000 has a = 1/2), and everything finite."""
    num_gates = CELLS[options["cell"]].num_gates
    extremes, others = (
        torch.tensor([0.0, 90.0, -90.0, 1000.0, -1000.0, 1e4, -1e4]),
        torch.tensor([0.0, 1e-3, other, -other]),
    )
    grid = torch.meshgrid(*[extremes] * num_gates, *[others] * (1 + options["output_gate"]), indexing="ij")
    width = grid[0].numel()
    projected = torch.cat([part.flatten() for part in grid]).to(dtype).view(1, 1, -1)
    arguments = (options, projected, torch.zeros(num_gates, width), torch.ones(1, width))
    ours = run(*arguments)
    assert all(value.isfinite().all() for value in ours.values())
    assert_results(ours, exact(*arguments), options, dtype, width)


@few
def test_long_memory_is_kept(options, dtype):
    """A memory of a million tokens, under bf16 projections: a = 1 - 1e-6 is not rounded to 1 nor to bf16's next number, 0.996."""
    width, time, memory = 16, 4096, 1e6
    num_gates = CELLS[options["cell"]].num_gates
    gate_bias = CELLS[options["cell"]].gate_bias(torch.full((width,), memory))
    projected = torch.zeros(1, time, (num_gates + 1 + options["output_gate"]) * width, dtype=dtype)
    _, h_last, decay = cell_scan_with_decay(projected, gate_bias, torch.ones(1, width), **options)
    kept = torch.tensor((1 - 1 / memory) ** time).expand(1, width)
    # one a is within a unit of 2^-24 of the exact decay, and always to the same side here
    assert_close(decay, kept, atol=0, rtol=time * 2**-24)
    assert_close(
        h_last,
        kept + (1 - kept) * candidate(torch.zeros(()), options["activation"]),
        atol=0,
        rtol=time * 2**-24,
    )


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same numbers in another layout; sliced, with others between them."""
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack([tensor, ~tensor if tensor.dtype == torch.bool else tensor - 7], dim=-1)[..., 0]


@few
@pytest.mark.parametrize("how", ["transposed", "sliced"])
@pytest.mark.parametrize("time", [0, 1, 13])
def test_any_layout(options, dtype, how, time):
    projected, gate_bias, h0 = problem(8, options, dtype, 3, time, 17)
    where = boundaries(8, 3, time, True, True)
    expected = run(options, projected, gate_bias, h0, **where)
    elsewhere: Options = {name: strided(tensor, how) for name, tensor in where.items()}
    ours = run(options, strided(projected, how), strided(gate_bias, how), strided(h0, how), **elsewhere)
    assert_same_bits(ours, expected)


@few
def test_gradients_in_any_layout(options, dtype):
    """A gradient may come in expanded (of a sum) or transposed."""
    projected, gate_bias, h0 = problem(9, options, dtype, 2, 6, 5)
    leaves = [tensor.requires_grad_() for tensor in (projected, gate_bias, h0)]
    y, h_last = cell_scan(projected, gate_bias, h0, **options)
    ones = (
        torch.ones_like(y).transpose(0, 2).contiguous().transpose(0, 2),
        torch.ones_like(h_last).t().contiguous().t(),
    )
    results = [
        torch.autograd.grad(outputs, leaves, retain_graph=True)
        for outputs in (y.sum() + h_last.sum(), (y * ones[0]).sum() + (h_last * ones[1]).sum())
    ] + [torch.autograd.grad((y, h_last), leaves, ones)]
    for other in results[1:]:
        assert all(torch.equal(value, first) for value, first in zip(other, results[0], strict=True))


@few
@pytest.mark.parametrize(("batch", "time", "width"), [(1, 21, 70), (3, 33, 130), (40, 2, 1100)])
def test_threads_change_no_bit(options, dtype, batch, time, width):
    """Rows among threads, stripes of one row among them, and a gate bias whose gradient torch would sum in several threads."""
    arguments, results = problem(10, options, dtype, batch, time, width), []
    for num_threads in (1, 2, 3, 8):
        torch.set_num_threads(num_threads)
        results.append(run(options, *arguments, **boundaries(10, batch, time, True, False)))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@few
def test_the_process_default_dtype_plays_no_role(options, dtype):
    arguments = problem(11, options, dtype, 2, 7, 9)
    expected = (*cell_scan_with_decay(*arguments, **options), *run(options, *arguments).values())
    torch.set_default_dtype(torch.float64)
    try:
        ours = (*cell_scan_with_decay(*arguments, **options), *run(options, *arguments).values())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(
        value.dtype == other.dtype and torch.equal(value, other)
        for value, other in zip(ours, expected, strict=True)
    )


@few
def test_autocast_leaves_it_alone(options, dtype):
    arguments = problem(12, options, dtype, 2, 7, 9)
    expected = run(options, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(options, *arguments)
    assert_same_bits(ours, expected)


@cases
@settings(max_examples=5)
@given(shape=shapes, with_starts=st.booleans(), with_lengths=st.booleans(), seed=st.integers(0, 2**20))
def test_decay_is_the_product(options, dtype, shape, with_starts, with_lengths, seed):
    """Of all decays, in fp64: 0 behind a document start, 1 for padding; and outputs are the same with it as without."""
    batch, time, width = shape
    projected, gate_bias, h0 = problem(seed, options, dtype, *shape)
    where = boundaries(seed, batch, time, with_starts, with_lengths)
    y, h_last, decay = cell_scan_with_decay(projected.requires_grad_(), gate_bias, h0, **options, **where)
    assert not decay.requires_grad
    for value, other in zip(
        (y, h_last), cell_scan(projected, gate_bias, h0, **options, **where), strict=True
    ):
        assert torch.equal(value, other)

    parts = [part.double() for part in projected.detach().split(width, dim=-1)]
    num_gates = CELLS[options["cell"]].num_gates
    a, _ = CELLS[options["cell"]].coefficients(
        *(parts[i] + gate_bias[i] for i in range(num_gates)), parts[num_gates], options["activation"]
    )
    real = real_tokens(batch, time, where["lengths"])
    if with_starts:
        a = a.masked_fill(where["document_starts"].unsqueeze(-1), 0)
    expected = a.where(real, 1).prod(1)
    assert_close(
        decay, expected, atol=0, rtol=(time + 1) * 2**-22, what="numba"
    )  # a gate of 20 is rounded by 2^-20
    for backend in ("reference", "torch"):
        results = cell_scan_with_decay(
            projected.detach().double(), gate_bias, h0, **options, **where, backend=backend
        )
        assert_close(results[2], expected, atol=1e-15, what=backend)
        assert_close(
            results[2] * h0 + cell_scan(projected.double(), gate_bias, None, **options, **where)[1],
            results[1],
            atol=1e-12,
        )
    if with_starts and batch:
        began = (where["document_starts"].unsqueeze(-1) & real).any(1).expand(batch, width)
        assert torch.equal(decay == 0, began | (expected == 0))


@cases
@pytest.mark.parametrize("with_h0", [False, True])
def test_one_token_of_decoding(options, dtype, with_h0):
    """What decoding takes instead of the kernel rounds where the kernel does: a text goes on as it was read."""
    projected, gate_bias, h0 = problem(16, options, dtype, 3, 1, 17)
    start = h0 if with_h0 else None
    y, h = one_token(projected, gate_bias, start, **options)
    exact_y, exact_h = cell_scan(projected.double(), gate_bias, start, **options, backend="reference")
    assert (y.dtype, h.dtype) == (dtype, torch.float32)
    assert_close(y, exact_y, atol=FP32, rtol=HALF_UNIT[dtype])
    assert_close(h, exact_h, atol=FP32)
