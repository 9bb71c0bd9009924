"""The fused cell scan against its composition in fp64: values, gradients, boundaries, layouts, threads."""

import functools
import itertools
from collections.abc import Callable

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
from helpers import assert_close, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minrnn.models.boundaries import NO_BOUNDARIES, Boundaries
from minrnn.models.cell_scan import cell_scan, cell_scan_with_decay, one_token
from minrnn.models.cell_spec import CellSpec
from minrnn.models.minimal_coefficients import candidate

Results = dict[str, Tensor]

# Tolerances. A token in fp32 costs a few roundings of 2^-24, which add up over the length of the memory. In
# bf16 results are rounded once, to nearest, by half a unit in the last place, 2^-8. Gradients of gates also
# depend on the saved h, which is rounded in the same way. Nothing else is, the carried state included.
FP32 = 2e-6
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


def outputs_and_gradients(
    scan: Callable[..., tuple[Tensor, Tensor]],
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    use="both",
    real: Tensor | bool = True,
) -> Results:
    """y, h_last and the gradients of their weighted sum; the weights of y are bf16 numbers, 0 at padding."""
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
    spec: CellSpec,
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    boundaries: Boundaries = NO_BOUNDARIES,
    *,
    use="both",
    backend=None,
) -> Results:
    """`outputs_and_gradients` of cell_scan, on the CPU's default backend (numba), y masked at padding."""
    real = real_tokens(projected.shape[0], projected.shape[1], boundaries.lengths)

    def scan(projected, gate_bias, h0):
        return cell_scan(projected, gate_bias, h0, spec=spec, boundaries=boundaries, backend=backend)

    results = outputs_and_gradients(scan, projected, gate_bias, h0, use=use, real=real)
    return results | {"y": results["y"].where(real, 0)}


def exact(
    spec: CellSpec,
    projected: Tensor,
    gate_bias: Tensor,
    h0: Tensor | None,
    boundaries: Boundaries = NO_BOUNDARIES,
    *,
    use="both",
) -> Results:
    """The same of the composition over the plain loop, in fp64."""
    h0 = None if h0 is None else h0.double()
    projected, gate_bias = projected.double(), gate_bias.double()
    results = run(spec, projected, gate_bias, h0, boundaries, use=use, backend="reference")
    return results | {"d_gate_bias_terms": bias_terms(spec, projected, gate_bias, results["d_projected"])}


def bias_terms(spec: CellSpec, projected: Tensor, gate_bias: Tensor, d_projected: Tensor) -> Tensor:
    """The largest sum of the sizes of what is summed in d_gate_bias: [num_rows, 1].

    The gradient for a constant of one token is that for the first gate's sigmoid, but for a factor.
    """
    width, num_gates = gate_bias.shape[1], spec.num_gates
    gates = d_projected[..., : num_gates * width].unflatten(-1, (num_gates, width)).unbind(2)
    p, constant = projected[..., :width] + gate_bias[0], gate_bias[-1]
    factor = (1 - constant) * p.sigmoid() if spec.cell == "hgrn" else constant * (-p).sigmoid()
    terms = [*gates, *[gates[0] / factor] * spec.equation.num_constants]
    sums = [term.nan_to_num(0, 0, 0).abs().sum((0, 1)).amax() for term in terms]
    largest = torch.stack(sums[:num_gates]).amax()
    return torch.stack([*[largest] * num_gates, *sums[num_gates:]]).unsqueeze(1)


def assert_results(
    actual: Results, expected: Results, spec: CellSpec, dtype: torch.dtype, width: int
) -> None:
    half = HALF_UNIT[dtype]
    saved_h = half if dtype == torch.bfloat16 else 0.0
    assert_close(actual["y"], expected["y"], atol=FP32, rtol=half, name="y")
    assert_close(actual["h_last"], expected["h_last"], atol=FP32, name="h_last")
    for name, value in actual.items():
        assert value.dtype == (dtype if name in ("y", "d_projected") else torch.float32), name
    if "dh0" in actual:
        assert_close(actual["dh0"], expected["dh0"], atol=FP32, name="dh0")
    num_gates = spec.num_gates
    error = (actual["d_gate_bias"].double() - expected["d_gate_bias"]).abs()
    assert (error <= (FP32 + saved_h) * expected["d_gate_bias_terms"]).all(), "d_gate_bias"
    names = ["gate"] * num_gates + ["candidate"] + ["output gate"] * spec.output_gate
    for name, value, other in zip(
        names, actual["d_projected"].split(width, -1), expected["d_projected"].split(width, -1), strict=True
    ):
        rtol = 2 * half if name == "output gate" else half  # a product with h
        assert_close(value, other, atol=FP32 + (saved_h if name == "gate" else 0.0), rtol=rtol, name=name)


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


def assert_same_bits(actual: Results, expected: Results, but: tuple[str, ...] = ()) -> None:
    for name in expected.keys() - set(but):
        assert torch.equal(actual[name], expected[name]), name


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


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same numbers in another layout; sliced, with others between them."""
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack([tensor, ~tensor if tensor.dtype == torch.bool else tensor - 7], dim=-1)[..., 0]


@few_cases
@pytest.mark.parametrize("how", ["transposed", "sliced"])
@pytest.mark.parametrize("time", [0, 1, 13])
def test_any_layout(spec, dtype, how, time):
    projected, gate_bias, h0 = random_inputs(8, spec, dtype, (3, time, 17))
    boundaries = random_boundaries(8, 3, time, True, True)
    assert boundaries.document_starts is not None
    assert boundaries.lengths is not None
    expected = run(spec, projected, gate_bias, h0, boundaries)
    boundaries = Boundaries(strided(boundaries.document_starts, how), strided(boundaries.lengths, how))
    actual = run(spec, strided(projected, how), strided(gate_bias, how), strided(h0, how), boundaries)
    assert_same_bits(actual, expected)


@few_cases
def test_gradients_in_any_layout(spec, dtype):
    """A gradient may come in expanded (of a sum) or transposed."""
    projected, gate_bias, h0 = random_inputs(9, spec, dtype, (2, 6, 5))
    leaves = [tensor.requires_grad_() for tensor in (projected, gate_bias, h0)]
    y, h_last = cell_scan(projected, gate_bias, h0, spec=spec)
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


@few_cases
@pytest.mark.parametrize(("batch", "time", "width"), [(1, 21, 70), (3, 33, 130), (40, 2, 1100)])
def test_threads_change_no_bit(spec, dtype, batch, time, width):
    """Threads share rows, or stripes of a row; torch would sum the bias's gradient in several threads."""
    arguments, results = random_inputs(10, spec, dtype, (batch, time, width)), []
    for num_threads in (1, 2, 3, 8):
        torch.set_num_threads(num_threads)
        results.append(run(spec, *arguments, random_boundaries(10, batch, time, True, False)))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@few_cases
def test_default_dtype_has_no_effect(spec, dtype):
    arguments = random_inputs(11, spec, dtype, (2, 7, 9))
    expected = (*cell_scan_with_decay(*arguments, spec=spec), *run(spec, *arguments).values())
    torch.set_default_dtype(torch.float64)
    try:
        actual = (*cell_scan_with_decay(*arguments, spec=spec), *run(spec, *arguments).values())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(
        value.dtype == other.dtype and torch.equal(value, other)
        for value, other in zip(actual, expected, strict=True)
    )


@few_cases
def test_autocast_has_no_effect(spec, dtype):
    arguments = random_inputs(12, spec, dtype, (2, 7, 9))
    expected = run(spec, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(spec, *arguments)
    assert_same_bits(actual, expected)


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
