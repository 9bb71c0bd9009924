"""The fused cell scan against its composition in fp64: values, gradients, boundaries."""

import functools
import itertools

import pytest
import torch
from cell_scan_cases import (
    all_cases,
    few_cases,
    random_boundaries,
    random_constants,
    random_inputs,
    real_tokens,
)
from cell_scan_results import (
    FP32,
    HALF_UNIT,
    assert_results,
    assert_same_bits,
    exact,
    outputs_and_gradients,
    run,
)
from helpers import assert_close, generator
from hypothesis import given, settings
from hypothesis import strategies as st

from minrnn.models.boundaries import Boundaries
from minrnn.models.cell_scan import cell_scan, cell_scan_with_decay, one_token
from minrnn.models.cell_spec import CellSpec
from minrnn.models.minimal_coefficients import candidate

shapes = st.tuples(st.integers(0, 3), st.integers(0, 40), st.sampled_from([1, 2, 15, 16, 17, 33, 70]))


@all_cases
@settings(max_examples=10)
@given(
    shape=shapes,
    with_starts=st.booleans(),
    with_lengths=st.booleans(),
    with_h0=st.booleans(),
    use=st.sampled_from(["both", "both", "y", "h_last"]),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients(spec, dtype, shape, with_starts, with_lengths, with_h0, use, seed):
    projected, gate_bias, h0 = random_inputs(seed, spec, dtype, shape)
    boundaries = random_boundaries(seed, shape[0], shape[1], with_starts, with_lengths)
    arguments = (spec, projected, gate_bias, h0 if with_h0 else None, boundaries)
    assert_results(run(*arguments, use=use), exact(*arguments, use=use), spec, dtype, shape[2])


def in_pieces(spec: CellSpec, edges: list[int], boundaries: Boundaries):
    """cell_scan over [low, high) between neighbouring edges, the state handed over."""

    def scan(projected, gate_bias, h0):
        pieces = []
        for low, high in itertools.pairwise(edges):
            starts, lengths = boundaries.document_starts, boundaries.lengths
            piece = Boundaries(
                starts if starts is None else starts[:, low:high],
                lengths if lengths is None else (lengths - low).clamp(0, high - low),
            )
            y, h0 = cell_scan(projected[:, low:high], gate_bias, h0, spec=spec, boundaries=piece)
            pieces.append(y)
        return torch.cat(pieces, dim=1), h0

    return scan


@few_cases
@settings(max_examples=10)
@given(
    cuts=st.lists(st.integers(0, 20), max_size=4),
    with_starts=st.booleans(),
    with_lengths=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_cuts_change_no_bit(spec, dtype, cuts, with_starts, with_lengths, seed):
    """Whole = cut in pieces, gradients included, but for the order in which those of the bias are summed."""
    projected, gate_bias, h0 = random_inputs(seed, spec, dtype, (2, 20, 17))
    boundaries = random_boundaries(seed, 2, 20, with_starts, with_lengths)
    real = real_tokens(2, 20, boundaries.lengths)
    results = [
        outputs_and_gradients(in_pieces(spec, edges, boundaries), projected, gate_bias, h0, real=real)
        for edges in ([0, *sorted(cuts), 20], [0, 20])
    ]
    actual, whole = (result | {"y": result["y"].where(real, 0)} for result in results)
    assert_same_bits(actual, whole, but=("d_gate_bias",))
    assert_close(actual["d_gate_bias"], whole["d_gate_bias"], atol=1e-5)


@few_cases
@pytest.mark.parametrize("how", ["documents", "padding"])
def test_packed_equals_separate(spec, dtype, how):
    """Rows with document starts = each document in its own row; padded rows = each row at its own length."""
    projected, gate_bias, h0 = random_inputs(5, spec, dtype, (3, 23, 19))
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
                y, state = cell_scan(projected[row : row + 1, low:high], gate_bias, state, spec=spec)
                documents.append(y)
            rows.append(torch.nn.functional.pad(torch.cat(documents, dim=1), (0, 0, 0, 23 - length)))
            states.append(state)
        return torch.cat(rows), torch.cat(states)

    is_packed = how == "documents"
    boundaries = (
        Boundaries(document_starts=starts) if is_packed else Boundaries(lengths=torch.tensor(lengths))
    )
    actual = run(spec, projected, gate_bias, h0, boundaries)
    expected = outputs_and_gradients(
        alone, projected, gate_bias, h0, real=real_tokens(3, 23, torch.tensor(lengths))
    )
    assert_same_bits(actual, expected, but=("d_gate_bias",))
    assert_close(actual["d_gate_bias"], expected["d_gate_bias"], atol=1e-5)


@few_cases
def test_a_start_drops_the_state_and_a_pad_drops_the_token(spec, dtype):
    """NaN before a document start or behind a row's end is not read; it is not multiplied by 0 either."""
    projected, gate_bias, h0 = random_inputs(6, spec, dtype, (2, 9, 17))
    starts, lengths = torch.zeros(2, 9, dtype=torch.bool), torch.tensor([9, 6])
    starts[0, 4] = True
    boundaries = Boundaries(starts, lengths)
    broken = projected.clone()
    broken[0, :4] = broken[1, 6:] = torch.nan
    state = h0.clone()
    state[0] = torch.inf
    actual, expected = (
        cell_scan(broken, gate_bias, state, spec=spec, boundaries=boundaries),
        cell_scan(projected, gate_bias, h0, spec=spec, boundaries=boundaries),
    )
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[0][0, 4:], expected[0][0, 4:])
    assert torch.equal(actual[0][1, :6], expected[0][1, :6])


@few_cases
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nan_stays_in_its_row_and_channel(spec, dtype, poison):
    width, broken_channel = 37, 18
    projected, gate_bias, h0 = random_inputs(7, spec, dtype, (3, 11, width))
    num_parts = projected.shape[2] // width
    sound = run(spec, projected, gate_bias, h0)
    others = [channel for channel in range(width) if channel != broken_channel]
    for part in range(num_parts):
        broken = projected.clone()
        broken[1, 5, part * width + broken_channel] = poison
        actual = run(spec, broken, gate_bias, h0)
        for name, value in actual.items():
            value, expected = (result.unflatten(-1, (-1, width)) for result in (value, sound[name]))
            assert torch.equal(value[..., others], expected[..., others]), name
            if name != "d_gate_bias":
                assert torch.equal(value[[0, 2]], expected[[0, 2]]), name
        assert actual["y"][1, 5, broken_channel].isnan() or not torch.tensor(poison).isnan()


@all_cases
@pytest.mark.parametrize("other", [2.0, 1e4])
def test_extreme_pre_activations(spec, dtype, other):
    """Every combination of 0, +-90, +-1000 and +-1e4 in the gates: finite, and as in fp64.

    p = q = -1000, for example, has a = 1/2.
    """
    num_gates = spec.num_gates
    extremes, others = (
        torch.tensor([0.0, 90.0, -90.0, 1000.0, -1000.0, 1e4, -1e4]),
        torch.tensor([0.0, 1e-3, other, -other]),
    )
    grid = torch.meshgrid(*[extremes] * num_gates, *[others] * (1 + spec.output_gate), indexing="ij")
    width = grid[0].numel()
    projected = torch.cat([part.flatten() for part in grid]).to(dtype).view(1, 1, -1)
    rows = torch.cat([torch.zeros(num_gates, width), random_constants(spec, width, generator(0))])
    arguments = (spec, projected, rows, torch.ones(1, width))
    actual = run(*arguments)
    assert all(value.isfinite().all() for value in actual.values())
    assert_results(actual, exact(*arguments), spec, dtype, width)


@few_cases
def test_long_memory_is_kept(spec, dtype):
    """A memory of a million tokens with bf16 projections: a = 1 - 1e-6 is not rounded to bf16."""
    width, time, memory = 16, 4096, 1e6
    gate_bias = spec.equation.gate_bias(torch.full((width,), memory))
    projected = torch.zeros(1, time, spec.num_projections * width, dtype=dtype)
    _, h_last, decay = cell_scan_with_decay(projected, gate_bias, torch.ones(1, width), spec=spec)
    expected_decay = torch.tensor((1 - 1 / memory) ** time).expand(1, width)
    # one a is within a unit of 2^-24 of the exact decay, and always to the same side here
    assert_close(decay, expected_decay, atol=0, rtol=time * 2**-24)
    assert_close(
        h_last,
        expected_decay + (1 - expected_decay) * candidate(torch.zeros(()), spec.activation),
        atol=0,
        rtol=time * 2**-24,
    )


@all_cases
@settings(max_examples=5)
@given(shape=shapes, with_starts=st.booleans(), with_lengths=st.booleans(), seed=st.integers(0, 2**20))
def test_decay_is_the_product(spec, dtype, shape, with_starts, with_lengths, seed):
    """The product of all decays: 0 after a document start, 1 for padding. It does not change the outputs."""
    batch, time, width = shape
    projected, gate_bias, h0 = random_inputs(seed, spec, dtype, shape)
    h0 = h0.where(h0 != 0, 1)  # no state is another case of the RG-LRU
    boundaries = random_boundaries(seed, batch, time, with_starts, with_lengths)
    scan = functools.partial(cell_scan_with_decay, spec=spec, boundaries=boundaries)
    y, h_last, decay = scan(projected.requires_grad_(), gate_bias, h0)
    assert not decay.requires_grad
    for value, other in zip(
        (y, h_last), cell_scan(projected, gate_bias, h0, spec=spec, boundaries=boundaries), strict=True
    ):
        assert torch.equal(value, other)

    parts = tuple(part.double() for part in projected.detach().split(width, dim=-1))
    a, _ = spec.coefficients(parts, gate_bias.double())
    real, starts = real_tokens(batch, time, boundaries.lengths), boundaries.document_starts
    if starts is not None:
        a = a.masked_fill(starts.unsqueeze(-1), 0)
    expected = a.where(real, 1).prod(1)
    is_normal = expected >= 2**-126  # below that, fp32 has fewer digits
    # A gate of 20 is rounded by 2^-20.
    assert_close(
        decay.where(is_normal, 0),
        expected.where(is_normal, 0),
        atol=0,
        rtol=(time + 1) * 2**-22,
        name="numba",
    )
    for backend in ("reference", "torch"):
        results = scan(projected.detach().double(), gate_bias, h0, backend=backend)
        assert_close(results[2], expected, atol=1e-15, name=backend)
        tiny = torch.full_like(h0, 1e-300, dtype=torch.float64)
        from_zero = cell_scan(projected.double(), gate_bias, tiny, spec=spec, boundaries=boundaries)[1]
        assert_close(results[2] * h0 + from_zero, results[1], atol=1e-12)
    if starts is not None and batch:
        has_start = (starts.unsqueeze(-1) & real).any(1).expand(batch, width)
        assert torch.equal(decay == 0, has_start | (expected == 0))


@all_cases
@pytest.mark.parametrize("with_h0", [False, True])
def test_one_token_of_decoding(spec, dtype, with_h0):
    """`one_token`, which decoding uses instead of the kernel, rounds like the kernel."""
    projected, gate_bias, h0 = random_inputs(16, spec, dtype, (3, 1, 17))
    start = h0 if with_h0 else None
    y, h = one_token(projected, gate_bias, start, spec)
    exact_y, exact_h = cell_scan(projected.double(), gate_bias, start, spec=spec, backend="reference")
    assert (y.dtype, h.dtype) == (dtype, torch.float32)
    assert_close(y, exact_y, atol=FP32, rtol=HALF_UNIT[dtype])
    assert_close(h, exact_h, atol=FP32)
